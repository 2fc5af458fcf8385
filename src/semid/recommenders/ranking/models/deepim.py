"""DeepIM: products of every number of fields by symmetric polynomials, beside a perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from semid.recommenders.ranking.interactions import SymmetricPolynomials
from semid.recommenders.ranking.layers import Perceptron

__all__ = ["DeepIM"]


class DeepIM(nn.Module):
    """``Linear([e_1; ...; e_K]) + MLP(concat e)``, e_k the k-th symmetric polynomial.

    Args:
        fields: number of fields.
        width: of a field's embedding.
        order: K, most fields in a product.
        polynomial_norm: batch norm on the polynomials (ours).
        hidden: widths of the perceptron.
        batch_norm: in the perceptron.
        dropout: in the perceptron.

    Source: Yu et al., CIKM 2020.
    """

    first_order: ClassVar[bool] = False

    def __init__(
        self,
        fields: int,
        width: int,
        *,
        order: int = 3,
        polynomial_norm: bool = True,
        hidden: Sequence[int] = (400, 400),
        batch_norm: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.polynomials = SymmetricPolynomials(width, order=order, batch_norm=polynomial_norm)
        self.linear = nn.Linear(order * width, 1)
        self.deep = Perceptron(fields * width, hidden, batch_norm=batch_norm, dropout=dropout)

    def forward(self, e: Tensor, first: Tensor | None = None) -> Tensor:
        """Return logits ``(batch,)``; ``first`` is not read."""
        logits: Tensor = self.linear(self.polynomials(e)) + self.deep(e.flatten(1))
        return logits[:, 0]
