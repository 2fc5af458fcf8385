"""The perceptron that every ranking model has beside its interactions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["BatchNorm", "Perceptron"]


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that also takes a training batch of one row.

    One row has no variance; it is normalised by the running moments, which it leaves as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(batch, width)``."""
        if self.training and x.shape[0] == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(x)


class Perceptron(nn.Module):
    """Linear layers with batch norm, ReLU and dropout, ``(batch, width)`` to ``(batch, out)``.

    Args:
        width: of the input.
        hidden: widths of the hidden layers; empty leaves one linear map.
        out: width of the output; None stops after the last hidden layer.
        batch_norm: normalise before each ReLU.
        dropout: share of the units that are dropped after it, in [0, 1).
    """

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
            # The bias would be taken out again by the batch norm's mean.
            linear = nn.Linear(width, size, bias=not batch_norm)
            nn.init.xavier_normal_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            layers.append(linear)
            if batch_norm:
                layers.append(BatchNorm(size))
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = size
        if out is not None:
            last = nn.Linear(width, out)
            nn.init.xavier_normal_(last.weight)
            nn.init.zeros_(last.bias)
            layers.append(last)
        self.layers = nn.Sequential(*layers)
        self.width = width if out is None else out

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, width)`` to ``(batch, out)``."""
        result: Tensor = self.layers(x)
        return result
