"""Codebooks start from K-means over the whole data set's latents, never from one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from semid.quantization.blocks import BLOCK_ROWS, Blocks, in_memory
from semid.quantization.kmeans import KMeansOptions, KMeansResult, kmeans
from semid.quantization.residual import fit_residual
from semid.seeds import child_seed
from semid.tokenizers.neural.codebook import Codebook
from semid.tokenizers.neural.quantizers import ParallelQuantizer, Quantizer

__all__ = ["LatentBlocks", "initialize_"]

Array = npt.NDArray[np.float32]
INITIAL = KMeansOptions(iterations=10)


class LatentBlocks:
    """A view of rows after an encoder, computed as they are read.

    Args:
        base: ``(rows, dim)``.
        encode: maps rows ``(n, dim)`` to latents ``(n, latent)``, each row by itself.
        latent: width of the latents.
    """

    def __init__(self, base: Blocks, encode: Callable[[Array], Array], latent: int) -> None:
        self.base, self.encode, self.latent = base, encode, latent

    @property
    def dim(self) -> int:
        """Width of a latent."""
        return self.latent

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.base)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, latents)`` in order."""
        for start, block in self.base.blocks(size):
            yield start, self.encode(block)

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the latents of the rows at ``indices``."""
        return self.encode(self.base.rows(indices))


def initialize_(
    quantizer: Quantizer,
    latents: Blocks,
    *,
    seed: int,
    batch: int,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    memory_bytes: int = 1 << 30,
) -> None:
    """Set every codebook by K-means, each with a child seed of its own.

    Args:
        quantizer: its codebooks are set, level by level or each on its own.
        latents: ``(rows, latent)`` of all training rows.
        seed: any integer.
        batch: rows of a training step, for the first moving counts.
        weights: ``(rows,)`` item weights.
        threads: plain threads; it changes no result.
        memory_bytes: latents are held up to this size.

    Cost: ten Lloyd iterations a codebook.
    """
    held = in_memory(latents, limit_bytes=memory_bytes)
    books = [book for book in quantizer.books if isinstance(book, Codebook)]

    def set_(book: Codebook, result: KMeansResult) -> None:
        counts = np.bincount(result.labels, weights, minlength=len(result.centroids))
        shares = torch.from_numpy((counts / counts.sum()).astype(np.float32))
        book.initialize_(torch.from_numpy(result.centroids), shares, batch=batch)

    if isinstance(quantizer, ParallelQuantizer):
        for number, book in enumerate(books):
            rows = held
            if len(quantizer.maps):
                rows = _mapped(held, quantizer.maps[number])
            result = kmeans(
                rows,
                len(book.codewords),
                seed=child_seed(seed, "codebook", number),
                options=INITIAL,
                weights=weights,
                threads=threads,
            )
            set_(book, result)
        return
    fit_residual(
        held,
        [len(book.codewords) for book in books],
        seed=child_seed(seed, "initial"),
        options=INITIAL,
        weights=weights,
        threads=threads,
        on_level=lambda level, result: set_(books[level], result),
    )


def _mapped(latents: Blocks, each: nn.Module) -> Blocks:
    assert isinstance(each, nn.Linear)
    weight = each.weight.detach().cpu().numpy().T.copy()
    return LatentBlocks(latents, lambda z: z @ weight, latents.dim)
