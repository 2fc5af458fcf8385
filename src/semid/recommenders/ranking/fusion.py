"""Mixture-of-Codes fusion: field embeddings are mixed through a bottleneck before the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semid.errors import UsageError

__all__ = ["MoCFusion"]


class MoCFusion(nn.Module):
    """``e' = e + e W_down W_up`` over the concatenation of all field embeddings.

    It works before any model and with any features. ``W_up`` starts at zero (ours), so that a
    model with fusion begins as the model without.

    Args:
        fields: number of fields.
        width: of a field's embedding.
        rank: of the bottleneck (the paper prints none; 16 is ours).

    Raises:
        UsageError: the rank is below 1.

    Source: MoC §4.2, eq. 8.
    """

    def __init__(self, fields: int, width: int, *, rank: int = 16) -> None:
        super().__init__()
        if rank < 1:
            raise UsageError(f"--fusion-rank (fusion_rank=) is {rank}; give at least 1")
        self.down = nn.Parameter(torch.empty(fields * width, rank))
        self.up = nn.Parameter(torch.zeros(rank, fields * width))
        nn.init.xavier_normal_(self.down)

    def forward(self, e: Tensor) -> Tensor:
        """Mix ``(batch, fields, width)``; the shape stays."""
        flat = e.flatten(1)
        return (flat + flat @ self.down @ self.up).view_as(e)

    def norm(self) -> float:
        """Return the Frobenius norm of ``W_down W_up``, 0 while fusion does nothing.

        Without the product: ``|AB|^2 = trace(A'A BB')``, two matrices of the rank's size.
        """
        with torch.no_grad():
            inner = (self.down.T @ self.down) * (self.up @ self.up.T)
            return float(inner.sum().clamp(min=0).sqrt())
