"""`assign`, the half of the K-means seam that labels rows (the other is `statistics`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.nearest import PreparedCodebook, nearest

__all__ = ["THREADED_WORK", "assign"]

Array = npt.NDArray[np.float32]

# Multiply-adds below which starting threads costs more than they bring.
THREADED_WORK = 20_000_000


def assign(
    block: Array, centroids: Array | PreparedCodebook, *, threads: int | None = None
) -> tuple[npt.NDArray[np.int64], Array]:
    """Label a block's rows: with `statistics`, the seam that everything larger is built on.

    Args:
        block: ``(n, dim)`` float32 rows.
        centroids: ``(codes, dim)`` float32, prepared once if used for several blocks.
        threads: plain threads; None takes what the machine allows.

    Returns:
        Labels ``(n,)`` int64, ties to the lowest, and squared distances ``(n,)`` float32.
    """
    words = torch.from_numpy(centroids) if isinstance(centroids, np.ndarray) else centroids
    if len(block) * len(centroids) * block.shape[1] < THREADED_WORK:
        threads = 1
    found = nearest(torch.from_numpy(block), words, threads=threads)
    return found.labels.numpy(), found.distances.numpy()
