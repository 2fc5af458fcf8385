"""Sums a K-means update needs, exact to float64 and independent of threads and blocking."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from semid.quantization.threads import map_blocks

__all__ = ["Statistics", "statistics"]


@dataclass
class Statistics:
    """What a block (or several, added in block order) contributes to an update.

    Attributes:
        sums: ``(codes, dim)`` float64, weighted sum of the rows assigned to each codeword.
        counts: ``(codes,)`` float64, their total weight.
        inertia: weighted sum of squared distances.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]
    inertia: float

    @classmethod
    def zeros(cls, codes: int, dim: int) -> Statistics:
        """Return the neutral element of `add_`."""
        return cls(np.zeros((codes, dim)), np.zeros(codes), 0.0)

    def add_(self, other: Statistics) -> None:
        """Add another block's statistics in place; call in block order."""
        self.sums += other.sums
        self.counts += other.counts
        self.inertia += other.inertia


@numba.njit(nogil=True, cache=True)
def _group(labels: npt.NDArray[np.int64], codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Counting sort: row numbers by code, rows in order inside a code."""
    starts = np.zeros(codes + 1, dtype=np.int64)
    for label in labels:
        starts[label + 1] += 1
    for code in range(codes):
        starts[code + 1] += starts[code]
    cursor = starts[:-1].copy()
    order = np.empty(len(labels), dtype=np.int64)
    for row in range(len(labels)):
        order[cursor[labels[row]]] = row
        cursor[labels[row]] += 1
    return order, starts


@numba.njit(nogil=True, cache=True)
def _sum_codes(
    x: np.ndarray,
    weights: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Add rows into codewords ``first..last``; one code's rows stay in cache while it is summed."""
    weighted = len(weights) > 0
    for code in range(first, last):
        total = sums[code]
        for place in range(starts[code], starts[code + 1]):
            row = order[place]
            if weighted:
                weight = weights[row]
                counts[code] += weight
                for d in range(x.shape[1]):
                    total[d] += weight * np.float64(x[row, d])
            else:
                for d in range(x.shape[1]):
                    total[d] += np.float64(x[row, d])
        if not weighted:
            counts[code] += starts[code + 1] - starts[code]


def statistics(
    block: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    distances: npt.NDArray[np.float32],
    *,
    codes: int,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int = 1,
) -> Statistics:
    """Sum a block's rows by label.

    Threads share out codewords, not rows, so every sum is taken in row order whatever their
    number.

    Args:
        block: ``(n, dim)`` float32 rows.
        labels: ``(n,)`` codes in ``[0, codes)``.
        distances: ``(n,)`` squared distances to the assigned codeword.
        codes: number of codewords.
        weights: ``(n,)`` non-negative weights; None counts every row once.
        threads: plain threads to use.

    Returns:
        The block's `Statistics`. Time O(n dim), memory O(codes dim).
    """
    result = Statistics.zeros(codes, block.shape[1])
    order, starts = _group(labels, codes)
    by_row = np.empty(0) if weights is None else weights
    if threads <= 1 or len(block) < 4096:
        _sum_codes(block, by_row, order, starts, result.sums, result.counts, 0, codes)
    else:
        cuts = np.searchsorted(starts, np.linspace(0, len(block), threads + 1)[1:-1])
        bounds = [0, *np.clip(cuts, 0, codes).tolist(), codes]
        map_blocks(
            lambda span: _sum_codes(
                block, by_row, order, starts, result.sums, result.counts, *span
            ),
            list(itertools.pairwise(bounds)),
            threads=threads,
        )
    squared = distances.astype(np.float64)
    result.inertia = float((squared if weights is None else squared * weights).sum())
    return result
