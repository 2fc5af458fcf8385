"""The perceptron that every ranking model has beside its interactions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from semid.errors import UsageError
from semid.options import MAX_WIDTH

__all__ = ["BatchNorm", "Dropout", "Perceptron"]


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization that also takes a training batch of one row.

    One row has no variance; it is normalized by the running moments, which it leaves as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(batch, width)``."""
        if self.training and x.shape[0] == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(x)


class Dropout(nn.Dropout):
    """Dropout whose mask costs little on CPUs, where torch draws a Bernoulli a unit.

    Sixteen random bits decide on a unit, so its rate is ``p`` to the nearest 2^-16; the kept are
    scaled by the rate that holds. Elsewhere it is torch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop units of a tensor of any shape, in training mode alone."""
        limit = round(self.p * 2**16)
        if not self.training or x.device.type != "cpu" or not 0 < limit < 2**16:
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        # A mask of the tensor's own type: a product with booleans is many times slower.
        return x * (bits >= limit - 2**15).to(x.dtype).mul_(2**16 / (2**16 - limit))


class Perceptron(nn.Module):
    """Linear layers with batch norm, ReLU and dropout, ``(batch, width)`` to ``(batch, out)``.

    Args:
        width: of the input.
        hidden: widths of the hidden layers; empty leaves one linear map.
        out: width of the output; None stops after the last hidden layer.
        batch_norm: normalize before each ReLU.
        dropout: share of the units that are dropped after it, in [0, 1).

    Raises:
        UsageError: a width or the share is out of range.
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
        if not all(1 <= size <= MAX_WIDTH for size in hidden):
            raise UsageError(
                f"--hidden (hidden=) is {list(hidden)}; give widths of 1 to {MAX_WIDTH:,}"
            )
        if not 0 <= dropout < 1:
            raise UsageError(f"--dropout (dropout=) is {dropout}; give a share in [0, 1)")
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
                layers.append(Dropout(dropout))
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
