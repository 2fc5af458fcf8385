"""The space in which behaviour and content lie side by side."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.quantization.blocks import BLOCK_ROWS, Blocks
from semid.tokenizers.neural.autoencoder import ExactEncoder

__all__ = ["Blend", "BlendGraph", "Columns", "unit_rows"]

Array = npt.NDArray[np.float32]


def unit_rows(rows: Array) -> Array:
    """Scale rows ``(n, dim)`` to length 1, each by itself; zero rows stay zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    norms[norms == 0] = 1.0
    scaled: Array = (rows / norms[:, None]).astype(np.float32)
    return scaled


class Blend:
    """Rows ``x`` to ``[x, scale u(x), 0...]``, with ``u`` the direction of the encoder's latent.

    Args:
        encoder: the behaviour encoder; None leaves ``x`` alone.
        scale: what directions are multiplied by.
        prices: coordinates at the end for codewords' prices, 0 in every row.
        threads: plain threads; they change no bit.
    """

    def __init__(
        self, encoder: ExactEncoder | None, *, scale: float, prices: int, threads: int | None
    ) -> None:
        self.encoder, self.scale = encoder, np.float32(scale)
        self.prices, self.threads = prices, threads

    def directions(self, x: Array) -> Array:
        """Return ``u(x)`` ``(n, latent)``, of width 0 without an encoder."""
        if self.encoder is None:
            return np.empty((len(x), 0), dtype=np.float32)
        return unit_rows(self.encoder(x, threads=self.threads))

    def __call__(self, x: Array) -> Array:
        """Return ``(n, dim + latent + prices)``; each row depends on that row alone."""
        room = np.zeros((len(x), self.prices), dtype=np.float32)
        return np.concatenate([x, self.scale * self.directions(x), room], axis=1)


class Columns:
    """A view of blocks that keeps the first columns.

    Args:
        base: ``(items, dim)``.
        width: columns kept.
    """

    def __init__(self, base: Blocks, width: int) -> None:
        self.base, self.dim = base, width

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.base)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, rows)`` in order."""
        for start, block in self.base.blocks(size):
            yield start, np.ascontiguousarray(block[:, : self.dim])

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``indices``."""
        return np.ascontiguousarray(self.base.rows(indices)[:, : self.dim])


class BlendGraph(nn.Module):
    """`Blend` as a module that can be traced.

    Args:
        prepare: preprocessing of rows.
        encoder: rows ``(batch, dim)`` to latents; None leaves the rows alone.
        scale: what directions are multiplied by.
        prices: coordinates at the end, all 0.
    """

    def __init__(
        self, prepare: nn.Module, encoder: nn.Module | None, *, scale: float, prices: int
    ) -> None:
        super().__init__()
        self.prepare, self.encoder = prepare, encoder
        self.scale, self.prices = scale, prices

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, dim + latent + prices)``."""
        parts = [self.prepare(x)]
        if self.encoder is not None:
            z = self.encoder(x).double()
            norms = z.square().sum(dim=1, keepdim=True).sqrt()
            norms = torch.where(norms == 0, torch.ones_like(norms), norms)
            parts.append((self.scale * (z / norms)).float())
        if self.prices:
            parts.append(parts[0].new_zeros((x.shape[0], self.prices)))
        return torch.cat(parts, dim=1)
