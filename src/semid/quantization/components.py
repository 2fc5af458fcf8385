"""Leading principal components of rows that are read in blocks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.blocks import Blocks
from semid.quantization.threads import one_blas_thread

__all__ = ["leading_components"]

Array = npt.NDArray[np.float32]
PART = 8192
"""Rows turned into float64 at a time."""


def leading_components(blocks: Blocks, mean: npt.NDArray[np.float64], *, share: float) -> Array:
    """Return the fewest principal components that hold a share of the rows' variance.

    Args:
        blocks: ``(items, dim)`` rows, at least one.
        mean: ``(dim,)`` of the rows.
        share: in (0, 1].

    Returns:
        ``(dim, components)`` float32 with orthonormal columns, largest variance first, at least
        one; the largest entry of each is positive.

    Cost: a pass with items x dim^2 products in float64, and an eigendecomposition.
    """
    scatter = torch.zeros((blocks.dim, blocks.dim), dtype=torch.float64)
    with one_blas_thread():  # another number of threads may add in another order
        for _, block in blocks.blocks(PART):
            left = torch.from_numpy(block - mean)
            scatter += left.T @ left
        found = torch.linalg.eigh(scatter)
    variances, vectors = (each.numpy() for each in found)
    variances, vectors = np.maximum(variances[::-1], 0.0), vectors[:, ::-1]
    held = np.cumsum(variances)
    kept = 1 + int(np.searchsorted(held[:-1], share * held[-1]))
    chosen = vectors[:, :kept]
    largest = np.abs(chosen).argmax(axis=0)
    signs = np.where(chosen[largest, np.arange(kept)] < 0, -1.0, 1.0)
    return np.ascontiguousarray(chosen * signs, dtype=np.float32)
