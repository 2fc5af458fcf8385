"""Layers of next-item models: a causal transformer, the softmax, sums of code embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from semid.options import MAX_WIDTH, Options, option
from semid.recommenders.retrieval.data import Packed

LOSS_ROWS = 128
"""Rows of logits at once in the softmax; on a GPU up to 2**26 logits, if those are more rows."""


@dataclass(frozen=True, kw_only=True)
class TransformerOptions(Options):
    """Options of the causal transformer over a history."""

    width: int = option(64, ge=1, le=MAX_WIDTH, help="Width of item vectors and hidden states.")
    layers: int = option(2, ge=1, le=64, help="Layers of the transformer.")
    heads: int = option(2, ge=1, le=64, help="Attention heads per layer; they divide the width.")
    dropout: float = option(0.3, ge=0, lt=1, help="Dropout rate of embeddings and layers.")
    max_length: int = option(50, ge=1, le=4096, help="Newest items of a history that are read.")

    def _problems(self) -> list[str]:
        if self.heads > 0 and self.width % self.heads:
            return [f"heads={self.heads} do not divide width={self.width}"]
        return []


class Block(nn.Module):
    """One layer: attention, then a perceptron, each with layer normalization before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return states ``(rows, length, width)``, and keys and values for a later place.

        ``past`` holds keys and values ``(rows, heads, before, width / heads)`` of earlier places,
        all of which are seen; else ``mask`` says what is, and None is causal.
        """
        rows, length, width = x.shape
        shape = (rows, length, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(self.norm_attention(x)).view(shape).permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        # Dropout of attention weights is that of the layers; none in evaluation.
        mixed = functional.scaled_dot_product_attention(
            *(query, key, value, mask),
            dropout_p=self.rate if self.training else 0.0,
            is_causal=mask is None and past is None and length > 1,
        )
        mixed = mixed.transpose(1, 2).reshape(rows, length, width)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.mlp(self.norm_mlp(x))), (key, value)


class Transformer(nn.Module):
    """Causal transformer over packed histories (as SASRec, Kang and McAuley 2018)."""

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        width = options.width
        self.positions = nn.Embedding(options.max_length, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(width, options.heads, options.dropout) for _ in range(options.layers)
        )
        self.norm_input, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.dropout)
        # Layers start near the identity, so that what an item is reaches the output from the first
        # step on: with PyTorch's start, what they add covers it.
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, vectors: Tensor, batch: Packed) -> Tensor:
        """Return the states ``(n, width)`` of the places that predict."""
        x = self.dropout(self.norm_input(vectors + self.positions(batch.positions)))
        # A place sees earlier ones of its own history. Padding sees itself alone, so that no
        # softmax is empty.
        # Histories of one row do not see each other.
        same = batch.segments[:, :, None] == batch.segments[:, None, :]
        mask = same.tril() & (batch.segments > 0)[:, None, :]
        mask = (mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=x.device))[:, None]
        for block in self.blocks:
            x, _ = block(x, mask)
        states: Tensor = self.norm(x.flatten(0, 1)[batch.places])
        return states


class SoftmaxLoss(torch.autograd.Function):
    """Cross-entropy over the target and some classes without a stored matrix of logits.

    The gradients are computed in the forward pass, a few rows at a time: the softmax of a row is
    needed once, while it is still in the cache. Memory: `LOSS_ROWS` rows of logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        right: Tensor,
        right_bias: Tensor,
        vectors: Tensor,
        bias: Tensor,
        columns: Tensor,
    ) -> Tensor:
        """Return the mean loss of ``states`` (n, width).

        Args:
            ctx: what `backward` needs.
            states: ``(n, width)``.
            right: ``(n, width)`` vector of each state's target.
            right_bias: ``(n,)`` what is added to the target's logit.
            vectors: ``(classes, width)`` of the classes beside the target.
            bias: ``(classes,)`` what is added to their logits.
            columns: ``(n,)`` where the target stands among them, which counts once; -1 is nowhere.
        """
        d_states, d_vectors = torch.empty_like(states), torch.zeros_like(vectors)
        at_target = (states * right).sum(1) + right_bias
        d_target = torch.empty_like(at_target)
        total = states.new_zeros(())
        low = torch.is_autocast_enabled(states.device.type)
        size = max(LOSS_ROWS, (1 << 26) // len(vectors)) if states.is_cuda else LOSS_ROWS
        # One buffer for all logits: fresh memory for each costs more than the arithmetic.
        buffer = vectors.new_empty(min(size, len(states)) * len(vectors))
        for start in range(0, len(states), size):
            rows = slice(start, start + size)
            part = states[rows]
            # A column of logits per row of states: all three products run faster than on rows.
            if low:
                logits = (vectors @ part.T).float()
            else:
                logits = buffer[: len(vectors) * len(part)].view(len(vectors), len(part))
                torch.mm(vectors, part.T, out=logits)
            logits += bias[:, None]
            among = torch.nonzero(columns[rows] >= 0)[:, 0]
            logits[columns[rows][among], among] = -torch.inf
            largest = torch.maximum(logits.amax(0), at_target[rows])
            # From here on `logits` holds the softmax before its division by the sums.
            target = (at_target[rows] - largest).exp()
            sums = logits.sub_(largest).exp_().sum(0) + target
            total += (sums.log() + largest - at_target[rows]).sum()
            d_target[rows] = target / sums - 1
            d_states[rows] = (logits.T @ vectors) / sums[:, None]
            scaled = part / sums[:, None]
            if low:
                d_vectors += logits @ scaled
            else:
                d_vectors.addmm_(logits, scaled)
        # The gradient of a logit is the softmax, less 1 at the target.
        d_states += d_target[:, None] * right
        ctx.save_for_backward(d_states, d_target[:, None] * states, d_vectors)
        ctx.count = len(states)
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients."""
        scale = gradients[0] / ctx.count
        d_states, d_right, d_vectors = (each * scale for each in ctx.saved_tensors)
        return d_states, d_right, None, d_vectors, None, None


class CodeSum(nn.Module):
    """Sums of code embeddings: one vector per distinct id, ``(buckets, width)``."""

    def __init__(self, codes: npt.NDArray[np.int64], sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.starts = [int(start) for start in np.cumsum([0, *sizes[:-1]])]
        rows = torch.from_numpy(codes + np.array(self.starts))
        # The transpose: for each code the ids that have it, one code after another.
        order = torch.argsort(rows.flatten(), stable=True)
        ends = torch.bincount(rows.flatten(), minlength=sum(sizes)).cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
        self.rows = nn.Buffer(rows, persistent=False)
        self.holders = nn.Buffer(order // len(sizes), persistent=False)
        self.offsets = nn.Buffer(offsets, persistent=False)
        # The sum of the levels has the variance of one table of items.
        self.table = nn.Parameter(torch.randn(sum(sizes), width) * 0.02 / len(sizes) ** 0.5)

    def forward(self, ids: Tensor | None = None) -> Tensor:
        """Return the sums of all distinct ids, or of some ``(...)``: ``(..., width)``."""
        if ids is not None:  # few against all: no pass over the whole catalogue
            some = functional.embedding_bag(self.rows[ids.flatten()], self.table, mode="sum")
            return some.view(*ids.shape, -1)
        sums: Tensor = _CodeSum.apply(  # type: ignore[no-untyped-call]
            self.table, self.rows, self.holders, self.offsets
        )
        return sums


class _CodeSum(torch.autograd.Function):
    """Sums over the codes of each id, whose gradient is a sum over the ids of each code.

    Both are sums of rows in one pass; the gradient of a gather would scatter them one by one.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, holders: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(holders, offsets)
        return functional.embedding_bag(rows, table, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        holders, offsets = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        return functional.embedding_bag(holders, gradient, offsets, mode="sum"), None, None, None
