"""Leading principal components of rows that are read in blocks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.blocks import Blocks
from semid.quantization.threads import map_blocks, one_blas_thread

__all__ = ["leading_components"]

Array = npt.NDArray[np.float32]
PART = 8192


def leading_components(
    blocks: Blocks,
    mean: npt.NDArray[np.float64],
    *,
    share: float,
    threads: int | None = None,
) -> Array:
    """Return the fewest principal components that hold a share of the rows' variance.

    Args:
        blocks: ``(items, dim)`` rows, at least one.
        mean: ``(dim,)`` of the rows.
        share: in (0, 1].
        threads: plain threads; they change no bit.

    Returns:
        ``(dim, components)`` float32 with orthonormal columns, largest variance first, at least
        one; the largest entry of each is positive.

    Cost: a pass with items x dim^2 products in float64, and an eigendecomposition.
    """
    scatter = np.zeros((blocks.dim, blocks.dim))
    for _, block in blocks.blocks():

        def product(start: int, block: Array = block) -> npt.NDArray[np.float64]:
            part = torch.from_numpy(block[start : start + PART] - mean)
            return (part.T @ part).numpy()

        for each in map_blocks(product, range(0, len(block), PART), threads=threads):
            scatter += each
    with one_blas_thread():
        found = torch.linalg.eigh(torch.from_numpy(scatter))
    variances, vectors = (each.numpy() for each in found)
    variances, vectors = np.maximum(variances[::-1], 0.0), vectors[:, ::-1]
    held = np.cumsum(variances)
    kept = 1 + int(np.searchsorted(held[:-1], share * held[-1]))
    chosen = vectors[:, :kept]
    largest = np.abs(chosen).argmax(axis=0)
    signs = np.where(chosen[largest, np.arange(kept)] < 0, -1.0, 1.0)
    return np.ascontiguousarray(chosen * signs, dtype=np.float32)
