"""DeepFM: a factorization machine and a perceptron over the same embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from semid.recommenders.ranking.interactions import FactorizationMachine
from semid.recommenders.ranking.layers import Perceptron

__all__ = ["DeepFM"]


class DeepFM(nn.Module):
    """``b + sum_f w_f + 1/2 sum_d [(sum_f e_fd)^2 - sum_f e_fd^2] + MLP(concat e)``.

    Args:
        fields: number of fields.
        width: of a field's embedding.
        hidden: widths of the perceptron (400-400 is ours: the MoC paper prints none).
        batch_norm: in the perceptron.
        dropout: in the perceptron.

    Source: Guo et al., IJCAI 2017 (arXiv 1703.04247), eq. 1 to 4.
    """

    first_order: ClassVar[bool] = True

    def __init__(
        self,
        fields: int,
        width: int,
        *,
        hidden: Sequence[int] = (400, 400),
        batch_norm: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.fm = FactorizationMachine()
        self.deep = Perceptron(fields * width, hidden, batch_norm=batch_norm, dropout=dropout)

    def forward(self, e: Tensor, first: Tensor | None = None) -> Tensor:
        """Return logits ``(batch,)``; ``first`` is ``(batch, fields)``."""
        logits: Tensor = self.bias + self.fm(e) + self.deep(e.flatten(1))[:, 0]
        return logits if first is None else logits + first.sum(1)
