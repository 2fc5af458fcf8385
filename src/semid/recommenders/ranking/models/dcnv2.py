"""DCNv2: explicit feature crosses of rising degree, parallel to or below a perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from semid.errors import UsageError, check_choice
from semid.recommenders.ranking.interactions import CrossLayer, ExpertCrossLayer, LowRankCrossLayer
from semid.recommenders.ranking.layers import Perceptron

__all__ = ["STRUCTURES", "DCNv2"]

STRUCTURES = ("parallel", "stacked")


class DCNv2(nn.Module):
    """Cross layers ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l`` and a perceptron.

    Args:
        fields: number of fields.
        width: of a field's embedding.
        layers: cross layers.
        rank: of ``W``; None keeps it full.
        experts: low-rank experts a layer; above 1 needs a rank.
        structure: ``parallel`` (both read the embeddings, a linear map reads both) or ``stacked``
            (the perceptron reads the crosses).
        hidden: widths of the perceptron.
        batch_norm: in it.
        dropout: in it.

    Source: Wang et al., WWW 2021 (arXiv 2008.13535).
    """

    first_order: ClassVar[bool] = False

    def __init__(
        self,
        fields: int,
        width: int,
        *,
        layers: int = 3,
        rank: int | None = None,
        experts: int = 1,
        structure: str = "parallel",
        hidden: Sequence[int] = (400, 400),
        batch_norm: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_choice("structure", structure, STRUCTURES)
        if layers < 1 or experts < 1 or (rank is not None and rank < 1):
            raise UsageError(f"layers={layers}, experts={experts}, rank={rank}: give at least 1")
        if experts > 1 and rank is None:
            raise UsageError(f"experts={experts} are low-rank: give a rank too")
        self.parallel = structure == "parallel"
        size = fields * width
        self.cross = nn.ModuleList(_cross(size, rank, experts) for _ in range(layers))
        self.deep = Perceptron(size, hidden, out=None, batch_norm=batch_norm, dropout=dropout)
        self.linear = nn.Linear(self.deep.width + (size if self.parallel else 0), 1)

    def forward(self, e: Tensor, first: Tensor | None = None) -> Tensor:
        """Return logits ``(batch,)``; ``first`` is not read."""
        x0 = e.flatten(1)
        x = x0
        for layer in self.cross:
            x = layer(x0, x)
        x = torch.cat([x, self.deep(x0)], 1) if self.parallel else self.deep(x)
        logits: Tensor = self.linear(x)
        return logits[:, 0]


def _cross(width: int, rank: int | None, experts: int) -> nn.Module:
    if rank is None:
        return CrossLayer(width)
    if experts == 1:
        return LowRankCrossLayer(width, rank=rank)
    return ExpertCrossLayer(width, rank=rank, experts=experts)
