"""Next-item models that score items by their vectors or their codes.

`SASRec` is the control of the field: a causal transformer over item ids. `Composed` replaces the
table of items by sums of code embeddings, and `Parallel` predicts each code of the next item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from semid.errors import UsageError
from semid.options import MAX_WIDTH, Options, option
from semid.recommenders.retrieval.data import Packed, RetrievalItems
from semid.training.loop import Step

FULL_SOFTMAX = 100_000
"""Catalogues up to this size get a full softmax by default."""

LOSS_ROWS = 256
"""Rows of logits at once in the full softmax."""

LOSSES = ("auto", "full", "sampled")


@dataclass(frozen=True, kw_only=True)
class TransformerOptions(Options):
    """Options of the causal transformer over a history."""

    width: int = option(64, ge=1, le=MAX_WIDTH, help="Width of item vectors and hidden states.")
    layers: int = option(2, ge=1, le=64, help="Layers of the transformer.")
    heads: int = option(2, ge=1, le=64, help="Attention heads per layer; they divide the width.")
    dropout: float = option(0.3, ge=0, lt=1, help="Dropout rate of embeddings and layers.")
    max_length: int = option(50, ge=1, le=4096, help="Newest items of a history that are read.")

    def _problems(self) -> list[str]:
        if self.width % self.heads:
            return [f"heads={self.heads} do not divide width={self.width}"]
        return []


@dataclass(frozen=True, kw_only=True)
class SASRecOptions(TransformerOptions):
    """Options of `SASRec`."""

    loss: str = option(
        "auto",
        choices=LOSSES,
        help="Softmax over all items or over sampled ones; auto samples above 100,000 items.",
    )
    negatives: int = option(1024, ge=1, help="Sampled items per batch, with --loss sampled.")


@dataclass(frozen=True, kw_only=True)
class ComposedOptions(SASRecOptions):
    """Options of `Composed`."""

    item_id: bool = option(False, help="Add an embedding of the item itself to those of its codes.")
    text: bool = option(False, help="Add a projection of the item's embedding to its codes'.")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions(TransformerOptions):
    """Options of `Parallel`."""

    item_id: bool = option(False, help="Add an embedding of the item itself to those of its codes.")
    temperature: float = option(0.07, gt=0, help="Divisor of the cosines in the softmax of codes.")


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
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(options.dropout)

    def forward(self, vectors: Tensor, batch: Packed) -> Tensor:
        """Return the states ``(n, width)`` of the places that predict."""
        x = self.dropout(vectors + self.positions(batch.positions))
        # A place sees earlier ones of its own history. Padding sees itself alone, so that no
        # softmax is empty.
        same = batch.segments[:, :, None] == batch.segments[:, None, :]
        mask = same.tril() & (batch.segments > 0)[:, None, :]
        mask = (mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=x.device))[:, None]
        for block in self.blocks:
            x, _ = block(x, mask)
        states: Tensor = self.norm(x.flatten(0, 1)[batch.places])
        return states


class FullSoftmax(torch.autograd.Function):
    """Cross-entropy over all classes without a stored matrix of logits.

    The gradients are computed in the forward pass, a few rows at a time: the softmax of a row is
    needed once, while it is still in the cache. Memory: `LOSS_ROWS` rows of logits.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, vectors: Tensor, targets: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return the mean loss of ``states`` (n, width) against ``vectors`` (classes, width)."""
        d_states, d_vectors = torch.empty_like(states), torch.zeros_like(vectors)
        total = states.new_zeros(())
        # One buffer for all logits: fresh memory for each costs more than the arithmetic.
        buffer = vectors.new_empty((min(LOSS_ROWS, len(states)), len(vectors)))
        low = torch.is_autocast_enabled(states.device.type)
        for start in range(0, len(states), LOSS_ROWS):
            part, right = states[start : start + LOSS_ROWS], targets[start : start + LOSS_ROWS]
            if low:
                logits = (part @ vectors.T).float()
            else:
                logits = torch.mm(part, vectors.T, out=buffer[: len(part)])
            if bias is not None:
                logits += bias
            largest = logits.amax(1, keepdim=True)
            at_target = logits.gather(1, right[:, None]) - largest
            # From here on `logits` holds the softmax, and then its difference to the target.
            sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += (sums.log() - at_target).sum()
            logits.div_(sums)
            logits[torch.arange(len(right), device=right.device), right] -= 1
            d_states[start : start + LOSS_ROWS] = logits @ vectors
            if low:
                d_vectors += logits.T @ part
            else:
                d_vectors.addmm_(logits.T, part)
        ctx.save_for_backward(d_states, d_vectors)
        ctx.count = len(states)
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients."""
        d_states, d_vectors = ctx.saved_tensors
        scale = gradients[0] / ctx.count
        return d_states * scale, d_vectors * scale, None, None


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

    def forward(self) -> Tensor:
        """Return the sums of all distinct ids."""
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


class NextItemModel(nn.Module):
    """Base of models that give every class of items a score.

    Items of a class cannot be told apart by the model: it scores distinct ids where it reads codes
    alone. Training items alone enter the softmax, so that an unseen item is not trained away.

    Attributes:
        options: class of the options.
        needs: what of `RetrievalItems` the model cannot do without: ``codes`` or ``vectors``.
        trains: whether there is anything to train.
        exact: whether `scores` scores the whole catalogue; else `top` searches.
        by_item: whether every item is a class of its own.
        classes: ``(items,)`` int64 class of each item.
    """

    options: ClassVar[type[Options]] = TransformerOptions
    needs: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def __init__(self, items: RetrievalItems, *, by_item: bool) -> None:
        super().__init__()
        for name in self.needs:
            if getattr(items, name) is None:
                flag = "Semantic IDs (--ids, ids=)"
                if name == "vectors":
                    flag = "item embeddings (--embeddings, embeddings=)"
                raise UsageError(f"this model needs {flag}")
        count = len(items)
        self.by_item = by_item
        item_class = np.arange(count) if by_item else items.buckets[1]
        classes = int(item_class.max()) + 1
        seen = np.bincount(item_class, weights=items.counts > 0, minlength=classes)
        self.classes = nn.Buffer(torch.from_numpy(item_class), persistent=False)
        # Softmax over training items: a class counts as often as it has of them.
        with np.errstate(divide="ignore"):
            bias = np.log(seen).astype(np.float32)
        self.log_sizes = nn.Buffer(torch.from_numpy(bias), persistent=False)

    @property
    def reads_vectors(self) -> bool:
        """Whether the embeddings of `RetrievalItems` are part of the model."""
        return "vectors" in self.needs

    def scores(self, batch: Packed) -> Tensor:
        """Return the score ``(histories, classes)`` of every class as the next; -inf is never."""
        raise NotImplementedError

    def top(self, batch: Packed, k: int) -> tuple[Tensor, Tensor]:
        """Return scores and classes ``(histories, k)`` of the best classes, best first.

        Places that stay empty have the score -inf.
        """
        scores = self.scores(batch)
        best = scores.topk(min(k, scores.shape[1]))
        return best.values, best.indices


class SASRec(NextItemModel):
    """Causal transformer over item ids with a tied output and a softmax over the catalogue.

    Kang and McAuley, ICDM 2018, with the cross-entropy that later work found better than sampled
    binary losses. The control of every model with codes.
    """

    options: ClassVar[type[Options]] = SASRecOptions

    def __init__(self, items: RetrievalItems, options: SASRecOptions, *, by_item: bool = True):
        super().__init__(items, by_item=by_item)
        self.settings = options
        self.transformer = Transformer(options)
        self._make_tables(items)
        self._sampler = _sampler(items.counts, self.classes.numpy())
        classes = len(self.log_sizes)
        self.sampled = options.loss == "sampled" or (
            options.loss == "auto" and classes > FULL_SOFTMAX
        )

    def _make_tables(self, items: RetrievalItems) -> None:
        self.table = nn.Parameter(torch.randn(len(items), self.settings.width) * 0.02)

    def vectors(self) -> Tensor:
        """Return the vector ``(classes, width)`` of every class."""
        return self.table

    def scoreable(self) -> Tensor:
        """Return which classes ``(classes,)`` have a vector that means something."""
        return torch.isfinite(self.log_sizes)

    def forward(self, batch: Packed) -> Step:
        """Return the cross-entropy of the items that follow."""
        vectors = self.vectors()
        states = self.transformer(vectors[self.classes[batch.items]], batch)
        targets = self.classes[batch.targets]
        if self.sampled:
            loss = self._sampled_loss(states, vectors, targets)
        else:
            loss = FullSoftmax.apply(  # type: ignore[no-untyped-call]
                states, vectors, targets, self.log_sizes
            )
        return Step(loss, {})

    def _sampled_loss(self, states: Tensor, vectors: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy against items drawn for the batch, by sampled softmax.

        Each drawn logit loses the logarithm of the item's expected count among the draws (Bengio
        and Senecal 2008), so that the sum over draws estimates that over all items but the target.
        """
        drawn, log_count = self._sampler(self.settings.negatives, states.device)
        at_target = (states * vectors[targets]).sum(1)
        logits = states @ vectors[drawn].T - log_count[drawn]
        # A draw that is the target itself is no negative.
        logits = logits.masked_fill(drawn[None, :] == targets[:, None], -torch.inf)
        return (torch.logaddexp(logits.logsumexp(1), at_target) - at_target).mean()

    def scores(self, batch: Packed) -> Tensor:
        """Return the score of every class."""
        vectors = self.vectors()
        states = self.transformer(vectors[self.classes[batch.items]], batch)
        scores: Tensor = (states @ vectors.T).float()
        return scores.masked_fill(~self.scoreable(), -torch.inf)


def _sampler(
    counts: npt.NDArray[np.int64], item_class: npt.NDArray[np.int64]
) -> Callable[[int, torch.device], tuple[Tensor, Tensor]]:
    """Return a function that draws classes log-uniformly in the order of popularity.

    It returns the draws ``(n,)`` and the logarithm of each class's expected count ``(classes,)``.
    """
    totals = np.bincount(item_class, weights=counts)
    order = np.argsort(-totals, kind="stable")[: int((totals > 0).sum())]
    seen = len(order)
    share = np.log1p(1 / np.arange(1, seen + 1)) / np.log(seen + 1)
    log_share = np.full(len(totals), np.inf)
    log_share[order] = np.log(share)
    ordered, log_shares = torch.from_numpy(order), torch.from_numpy(log_share).float()

    def draw(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # The inverse of the distribution: exp of a uniform number times the logarithm of the size.
        rank = torch.exp(torch.rand(n) * float(np.log(seen + 1))).long() - 1
        draws = ordered[rank.clamp(0, seen - 1)]
        return draws.to(device), (log_shares + float(np.log(n))).to(device)

    return draw


class Composed(SASRec):
    """A transformer over items whose vectors are sums of code embeddings.

    An item's vector is the sum of the embeddings of its codes (Hou et al., "Learning
    Vector-Quantized Item Representation for Transferable Sequential Recommenders", WWW 2023, with
    the codes of any tokenizer); optionally plus an embedding of the item and a projection of its
    vector. The output is tied, so an item that training never saw is scored by its codes.
    """

    options: ClassVar[type[Options]] = ComposedOptions
    needs: ClassVar[tuple[str, ...]] = ("codes",)

    def __init__(self, items: RetrievalItems, options: ComposedOptions) -> None:
        if options.text and items.vectors is None:
            raise UsageError("text=True needs item embeddings (--embeddings, embeddings=)")
        super().__init__(items, options, by_item=options.item_id or options.text)

    def _make_tables(self, items: RetrievalItems) -> None:
        options: Any = self.settings
        self.codes = CodeSum(items.buckets[0], items.sizes, options.width)
        self.buckets = nn.Buffer(torch.from_numpy(items.buckets[1]), persistent=False)
        if options.item_id:
            # From zero: an unseen item has no part of its own and is scored by its codes.
            self.table = nn.Parameter(torch.zeros(len(items), options.width))
        if options.text:
            assert items.vectors is not None
            self.text = nn.Buffer(torch.from_numpy(items.vectors), persistent=False)
            self.project = nn.Linear(items.vectors.shape[1], options.width, bias=False)
            nn.init.normal_(self.project.weight, std=0.02)

    @property
    def reads_vectors(self) -> bool:
        """Whether the embeddings of `RetrievalItems` are part of the model."""
        return hasattr(self, "text")

    def vectors(self) -> Tensor:
        """Return the vector ``(classes, width)`` of every class."""
        vectors = self.codes()
        if not self.by_item:
            return vectors  # type: ignore[no-any-return]
        vectors = vectors[self.buckets]
        if hasattr(self, "table"):
            vectors = vectors + self.table
        if hasattr(self, "project"):
            vectors = vectors + self.project(self.text)
        return vectors  # type: ignore[no-any-return]

    def scoreable(self) -> Tensor:
        """Return which classes have a vector that means something: all, since all have codes."""
        return torch.ones_like(self.log_sizes, dtype=torch.bool)


class Parallel(NextItemModel):
    """A transformer over items that predicts every code of the next item at once.

    Hou et al., "Generating Long Semantic IDs in Parallel for Recommendation" (RPG, KDD 2025):
    an item is the mean of its code embeddings, each position has a head of its own, the loss is the
    mean of the cross-entropies, and an item's score is the sum of the log-probabilities of its
    codes. Heads and embeddings are compared by their cosine over a temperature.
    """

    options: ClassVar[type[Options]] = ParallelOptions
    needs: ClassVar[tuple[str, ...]] = ("codes",)

    def __init__(self, items: RetrievalItems, options: ParallelOptions) -> None:
        # The score reads the codes alone, so items of one id are one class.
        super().__init__(items, by_item=False)
        distinct, bucket = items.buckets
        self.temperature, self.sizes = options.temperature, items.sizes
        self.transformer = Transformer(options)
        self.codes = CodeSum(distinct, items.sizes, options.width)
        nn.init.normal_(self.codes.table, std=0.02)
        levels = len(items.sizes)
        self.heads = nn.Linear(options.width, levels * options.width)
        self.buckets = nn.Buffer(torch.from_numpy(bucket), persistent=False)
        if options.item_id:
            self.table = nn.Parameter(torch.zeros(len(items), options.width))

    def _log_probabilities(self, batch: Packed) -> list[Tensor]:
        """Return the log-probability ``(n, size)`` of every code of each level."""
        vectors = self.codes()[self.buckets[batch.items]] / len(self.sizes)
        if hasattr(self, "table"):
            vectors = vectors + self.table[batch.items]
        states = self.transformer(vectors, batch)
        # A residual block per level, as in the paper.
        moved = states[:, None] + functional.silu(self.heads(states)).view(
            len(states), len(self.sizes), -1
        )
        moved = functional.normalize(moved, dim=-1)
        table = functional.normalize(self.codes.table, dim=-1)
        books = torch.split(table, list(self.sizes))
        return [
            functional.log_softmax((moved[:, level] @ book.T).float() / self.temperature, -1)
            for level, book in enumerate(books)
        ]

    def forward(self, batch: Packed) -> Step:
        """Return the mean over levels of the cross-entropy of the next item's code."""
        right = self.codes.rows[self.buckets[batch.targets]]
        losses = [
            functional.nll_loss(logs, right[:, level] - self.codes.starts[level])
            for level, logs in enumerate(self._log_probabilities(batch))
        ]
        return Step(torch.stack(losses).mean(), {})

    def scores(self, batch: Packed) -> Tensor:
        """Return the sum of the log-probabilities of the codes of every distinct id."""
        levels = self._log_probabilities(batch)
        total = torch.zeros(len(batch.places), len(self.codes.rows), device=levels[0].device)
        for level, logs in enumerate(levels):
            total += logs[:, self.codes.rows[:, level] - self.codes.starts[level]]
        return total
