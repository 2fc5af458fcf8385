"""Layers of ranking models: what they do to field embeddings, one module each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization that takes a training batch of one row, which has no variance."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(batch, width)``."""
        # One row is normalized by the running moments, which it leaves as they are.
        if self.training and x.shape[0] == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(x)


class Dropout(nn.Dropout):
    """Dropout with a fast mask on CPUs, where torch draws one Bernoulli variable per unit."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop units of a tensor of any shape in training mode."""
        # Sixteen random bits decide on a unit, so its rate is a multiple of 2^-16, and the others
        # are scaled by that rate.
        limit = round(self.p * 2**16)
        if not self.training or x.device.type != "cpu" or not 0 < limit < 2**16:
            return super().forward(x)
        # Each random 64-bit integer gives four units their 16 bits.
        integers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = integers.view(torch.int16)[: x.numel()].view(x.shape)
        # A mask of the tensor's own type: a product with booleans is many times slower.
        return x * (bits >= limit - 2**15).to(x.dtype).mul_(2**16 / (2**16 - limit))


def _linear(width: int, out: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear map with Xavier weights and no offset at first."""
    linear = nn.Linear(width, out, bias=bias)
    nn.init.xavier_normal_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class Perceptron(nn.Module):
    """Linear layers with batch norm, ReLU and dropout; ``out`` None ends at the last hidden one."""

    def __init__(
        self,
        width: int,
        hidden: Sequence[int],
        *,
        out: int | None = 1,
        batch_norm: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in hidden:
            # Batch normalization subtracts the mean, and any bias with it.
            layers.append(_linear(width, size, bias=not batch_norm))
            layers += [BatchNorm(size)] if batch_norm else []
            layers.append(nn.ReLU())
            layers += [Dropout(dropout)] if dropout else []
            width = size
        if out is not None:
            layers.append(_linear(width, out))
        self.layers = nn.Sequential(*layers)
        self.width = width if out is None else out

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, width)`` to ``(batch, out)``."""
        result: Tensor = self.layers(x)
        return result


class FactorizationMachine(nn.Module):
    """All pairwise products of fields: ``1/2 sum_d [(sum_f e_fd)^2 - sum_f e_fd^2]``."""

    def forward(self, e: Tensor) -> Tensor:
        """Return ``(batch,)`` for embeddings ``(batch, fields, width)``."""
        # The square of the sum holds every pair twice and every square once.
        total = e.sum(1)
        return 0.5 * (total.square() - e.square().sum(1)).sum(1)


class SymmetricPolynomials(nn.Module):
    """Elementary symmetric polynomials of the fields: all products of 1, 2, ..., K of them.

    Newton's recurrence over the power sums ``p_k = sum_f e_f^k``:
    ``k e_k = sum_{i=1..k} (-1)^(i-1) e_{k-i} p_i``, ``e_0 = 1``; in float32 also under autocast,
    since its terms cancel. Batch normalization of each polynomial is ours: for small embeddings e_3
    is near 0 and gets no gradient without it.

    Source: DeepIM, Yu et al., CIKM 2020.
    """

    def __init__(self, width: int, *, order: int = 3, batch_norm: bool = True) -> None:
        super().__init__()
        self.order = order
        self.norms = nn.ModuleList(
            BatchNorm(width) if batch_norm else nn.Identity() for _ in range(order)
        )

    def polynomials(self, e: Tensor) -> list[Tensor]:
        """Return e_1 to e_K, each ``(batch, width)``, of embeddings ``(batch, fields, width)``."""
        # Power sums p_k, from powers that are multiplied up one by one.
        e = e.float()
        powers, power = [], e
        for k in range(self.order):
            power = power if k == 0 else power * e
            powers.append(power.sum(1))
        # Newton's recurrence: powers[i - 1] is p_i, and each e_k follows from those before it.
        elementary = [torch.ones_like(powers[0])]
        for k in range(1, self.order + 1):
            terms = [(-1) ** (i - 1) * elementary[k - i] * powers[i - 1] for i in range(1, k + 1)]
            elementary.append(torch.stack(terms).sum(0) / k)
        return elementary[1:]

    def forward(self, e: Tensor) -> Tensor:
        """Return ``(batch, order * width)``."""
        with torch.autocast(e.device.type, enabled=False):
            polynomials = self.polynomials(e)
            return torch.cat([norm(p) for norm, p in zip(self.norms, polynomials, strict=True)], 1)


ATTENTION_PRESETS = ("authors", "paper")


class FieldAttention(nn.Module):
    """One layer of multi-head self-attention over the fields.

    The preset ``paper`` is ``ReLU(attention + W_res x)``, scores divided by ``sqrt(d)`` of a head.
    ``authors`` (their code) has ReLU also on the projections of query, key, value and residual, and
    layer norm at the end. The arguments after it override the preset.

    Source: AutoInt, Song et al., CIKM 2019, eq. 5 to 8; their code for ``authors``.
    """

    def __init__(
        self,
        width: int,
        *,
        head_width: int = 32,
        heads: int = 2,
        preset: str = "authors",
        relu_projections: bool | None = None,
        layer_norm: bool | None = None,
        scale: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        authors = preset == "authors"
        self.heads, self.head_width = heads, head_width
        self.out = heads * head_width
        self.relu = authors if relu_projections is None else relu_projections
        self.scale = head_width**-0.5 if scale else 1.0
        self.query = nn.Linear(width, self.out, bias=False)
        self.key = nn.Linear(width, self.out, bias=False)
        self.value = nn.Linear(width, self.out, bias=False)
        self.residual = nn.Linear(width, self.out, bias=False) if residual else None
        use_norm = authors if layer_norm is None else layer_norm
        self.norm = nn.LayerNorm(self.out) if use_norm else None
        for linear in (self.query, self.key, self.value, self.residual):
            if linear is not None:
                nn.init.xavier_normal_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, fields, width)`` to ``(batch, fields, heads * head_width)``."""

        def project(linear: nn.Linear) -> Tensor:
            projected: Tensor = linear(x)
            return projected.relu() if self.relu else projected

        def split(linear: nn.Linear) -> Tensor:
            shape = (-1, x.shape[1], self.heads, self.head_width)
            return project(linear).reshape(shape).transpose(1, 2)

        # Every field attends to all fields, in each head of its own; the heads are concatenated.
        scores = split(self.query) @ split(self.key).transpose(-1, -2) * self.scale
        mixed = (scores.softmax(-1) @ split(self.value)).transpose(1, 2).flatten(-2)
        if self.residual is not None:
            mixed = mixed + project(self.residual)
        mixed = mixed.relu()
        return mixed if self.norm is None else self.norm(mixed)


class CrossLayer(nn.Module):
    """``x_{l+1} = x_0 * (W x_l + b) + x_l`` with a full matrix or, given a rank, ``W = U V^T``.

    Source: DCNv2, Wang et al., WWW 2021, eq. 1 and 2.
    """

    def __init__(self, width: int, *, rank: int | None = None) -> None:
        super().__init__()
        self.rank = rank
        if rank is None:
            self.linear = _linear(width, width)
        else:
            # Both maps before their weights: the random numbers come in this order.
            self.inner = nn.Linear(width, rank, bias=False)
            self.outer = nn.Linear(rank, width)
            nn.init.xavier_normal_(self.inner.weight)
            nn.init.xavier_normal_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """Cross ``(batch, width)`` with the input ``x0`` of the same shape."""
        mapped = self.linear(x) if self.rank is None else self.outer(self.inner(x))
        return torch.addcmul(x, x0, mapped)


class ExpertCrossLayer(nn.Module):
    """A gated mixture of low-rank experts: ``x + sum_i G_i(x) x_0 * (U_i g(C_i g(V_i^T x)) + b)``.

    Source: DCNv2, eq. 3 and 4, with g = tanh and a softmax gate.
    """

    def __init__(self, width: int, *, rank: int, experts: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(experts, width, rank))
        self.c = nn.Parameter(torch.empty(experts, rank, rank))
        self.u = nn.Parameter(torch.empty(experts, rank, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.gate = nn.Linear(width, experts)
        for stack in (self.v, self.c, self.u):
            nn.init.normal_(stack, std=math.sqrt(2.0 / (stack.shape[1] + stack.shape[2])))

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """Cross ``(batch, width)`` with the input ``x0`` of the same shape."""
        # Every expert maps into its low-rank space, transforms there and maps back; the gate
        # mixes their outputs per row.
        inner = torch.einsum("bw,ewr->ber", x, self.v).tanh()
        inner = torch.einsum("ber,ers->bes", inner, self.c).tanh()
        outer = torch.einsum("bes,esw->bew", inner, self.u) + self.bias
        gates = self.gate(x).softmax(1)
        return torch.addcmul(x, x0, torch.einsum("be,bew->bw", gates, outer))


class MoCFusion(nn.Module):
    """``e' = e + e W_down W_up`` over the concatenation of all field embeddings.

    ``W_up`` starts at zero (ours), so that a model with fusion begins as the model without. The
    paper prints no rank of the bottleneck; 16 is ours.

    Source: MoC §4.2, eq. 8.
    """

    def __init__(self, fields: int, width: int, *, rank: int = 16) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(fields * width, rank))
        self.up = nn.Parameter(torch.zeros(rank, fields * width))
        nn.init.xavier_normal_(self.down)

    def forward(self, e: Tensor) -> Tensor:
        """Mix ``(batch, fields, width)``; the shape stays."""
        flat = e.flatten(1)
        return (flat + flat @ self.down @ self.up).view_as(e)

    def norm(self) -> float:
        """Return the Frobenius norm of ``W_down W_up``, 0 while fusion does nothing."""
        # Without the large product: |AB|^2 = trace(A'A BB'), two matrices of the rank's size.
        with torch.no_grad():
            inner = (self.down.T @ self.down) * (self.up @ self.up.T)
            return float(inner.sum().clamp(min=0).sqrt())
