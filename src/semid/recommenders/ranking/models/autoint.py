"""AutoInt+: self-attention over the fields, beside a perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from semid.errors import UsageError
from semid.recommenders.ranking.interactions import FieldAttention
from semid.recommenders.ranking.layers import Perceptron

__all__ = ["AutoInt"]


class AutoInt(nn.Module):
    """Layers of `FieldAttention`, flattened into a linear map, plus a parallel perceptron.

    Args:
        fields: number of fields.
        width: of a field's embedding.
        layers: attention layers.
        heads: of each.
        head_width: of each head.
        preset: ``authors`` (their code) or ``paper`` (the printed formula).
        relu_projections: overrides the preset.
        layer_norm: overrides the preset.
        scale: divide scores by ``sqrt(head_width)``.
        residual: the layers' residual map.
        plus: the parallel perceptron, which makes AutoInt AutoInt+.
        hidden: its widths.
        batch_norm: in it.
        dropout: in it.

    Source: Song et al., CIKM 2019 (arXiv 1810.11921).
    """

    first_order: ClassVar[bool] = False

    def __init__(
        self,
        fields: int,
        width: int,
        *,
        layers: int = 3,
        heads: int = 2,
        head_width: int = 32,
        preset: str = "authors",
        relu_projections: bool | None = None,
        layer_norm: bool | None = None,
        scale: bool = True,
        residual: bool = True,
        plus: bool = True,
        hidden: Sequence[int] = (400, 400),
        batch_norm: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UsageError(f"layers={layers}: give at least 1")
        made, size = [], width
        for _ in range(layers):
            made.append(
                FieldAttention(
                    size,
                    head_width=head_width,
                    heads=heads,
                    preset=preset,
                    relu_projections=relu_projections,
                    layer_norm=layer_norm,
                    scale=scale,
                    residual=residual,
                )
            )
            size = made[-1].out
        self.attention = nn.Sequential(*made)
        self.linear = nn.Linear(fields * size, 1)
        self.deep = (
            Perceptron(fields * width, hidden, batch_norm=batch_norm, dropout=dropout)
            if plus
            else None
        )

    def forward(self, e: Tensor, first: Tensor | None = None) -> Tensor:
        """Return logits ``(batch,)``; ``first`` is not read."""
        logits: Tensor = self.linear(self.attention(e).flatten(1))[:, 0]
        return logits if self.deep is None else logits + self.deep(e.flatten(1))[:, 0]
