"""Size offsets: a price per codeword that evens out usage (a power diagram).

A row takes the codeword of least ``|x - c|^2 + price``. Prices are one more coordinate: with
``x' = [x, 0]`` and ``c' = [c, sqrt(price)]`` the plain nearest codeword is the priced one, so the
engine, its bounds and beams need know nothing of prices.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import UsageError
from semid.quantization.assign import assign
from semid.quantization.blocks import Blocks, read_ahead
from semid.quantization.nearest import prepare

__all__ = ["priced", "size_prices", "with_room"]

Array = npt.NDArray[np.float32]

# Share of the highest price that a codeword e times too large pays after the first round.
STEP = 0.1


def size_prices(
    rows: Blocks,
    codebook: Array,
    *,
    limit: float,
    rounds: int = 20,
    threads: int | None = None,
) -> npt.NDArray[np.float64]:
    """Find prices that even out how many rows take each codeword.

    A codeword's price rises with the logarithm of its size and never above ``limit`` times the mean
    squared distance, so a row's squared error rises by at most that much: with ``k`` the nearest
    codeword and ``j`` the one taken, ``|x - j|^2 + p_j <= |x - k|^2 + p_k``. Steps shrink, and of
    all rounds the prices with the most even usage (entropy) are returned: sizes that swing to and
    fro cannot leave usage less even than no prices do.

    Args:
        rows: ``(items, dim)``.
        codebook: ``(codes, dim)`` float32.
        limit: highest price in mean squared distances, 0 or more; 0 prices nothing.
        rounds: passes over the rows, at least 1.
        threads: plain threads; they change no result.

    Returns:
        ``(codes,)`` float64 prices, the lowest 0, in squared units of the rows.

    Raises:
        UsageError: if ``limit`` or ``rounds`` is out of range.

    Cost: ``rounds`` + 1 assignments of all rows.
    """
    if not 0 <= limit < float("inf") or rounds < 1:
        raise UsageError(
            f"limit={limit}, rounds={rounds}: give a limit of 0 or more and at least 1 round"
        )
    prices = np.zeros(len(codebook))
    if limit == 0:
        return prices
    counts, spread = _sizes(rows, codebook, prices, threads)
    highest = limit * spread
    best, most = prices, _entropy(counts)
    for number in range(1, rounds + 1):
        uneven = np.log1p(counts) - np.log1p(len(rows) / len(codebook))
        prices = np.clip(prices + STEP * highest * uneven / np.sqrt(number), 0.0, highest)
        counts, _ = _sizes(rows, codebook, prices, threads)
        if (found := _entropy(counts)) > most:
            best, most = prices, found
    lowest: npt.NDArray[np.float64] = best - best.min()
    return lowest


def _entropy(counts: npt.NDArray[np.float64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _sizes(
    rows: Blocks, codebook: Array, prices: npt.NDArray[np.float64], threads: int | None
) -> tuple[npt.NDArray[np.float64], float]:
    """Return rows a codeword, and the mean priced squared distance."""
    book = prepare(torch.from_numpy(priced(codebook, prices)))
    counts, total = np.zeros(len(codebook)), 0.0
    for _, block in read_ahead(rows):
        labels, distances = assign(with_room(block, 1), book, threads=threads)
        counts += np.bincount(labels, minlength=len(codebook))
        total += float(distances.sum(dtype=np.float64))
    return counts, total / max(len(rows), 1)


def with_room(rows: Array, prices: int) -> Array:
    """Return rows ``(n, dim)`` with ``prices`` more coordinates, all 0."""
    return np.pad(rows, ((0, 0), (0, prices)))


def priced(
    codebook: Array, prices: npt.NDArray[np.float64], *, level: int = 0, levels: int = 1
) -> Array:
    """Return codewords with their prices as coordinates.

    Every level has a coordinate of its own, so that what a level pays stays as a constant in the
    residual and a beam adds up the prices of all levels.

    Args:
        codebook: ``(codes, dim)``.
        prices: ``(codes,)``, each 0 or more.
        level: level of the codebook.
        levels: number of levels.

    Returns:
        ``(codes, dim + levels)`` float32.
    """
    made = with_room(codebook, levels)
    made[:, codebook.shape[1] + level] = np.sqrt(prices)
    return made
