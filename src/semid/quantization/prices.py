"""Size offsets: a price per codeword that evens out usage (a power diagram).

A row takes the codeword of least ``|x - c|^2 + price``. Prices are one more coordinate: with
``x' = [x, 0]`` and ``c' = [c, sqrt(price)]`` the plain nearest codeword is the priced one, so the
engine, its bounds and beams need know nothing of prices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import UsageError
from semid.quantization.blocks import Blocks, read_ahead
from semid.quantization.nearest import index_codebook
from semid.quantization.residual import dequantize, encode_residual

__all__ = ["priced", "size_prices", "with_room"]

Array = npt.NDArray[np.float32]

# Share of the highest price that a codeword e times too large pays after the first round.
STEP = 0.1


def size_prices(
    rows: Blocks,
    codebooks: Sequence[Array],
    *,
    limit: float,
    columns: int | None = None,
    beam_width: int = 1,
    rounds: int = 20,
    threads: int | None = None,
) -> list[npt.NDArray[np.float64]]:
    """Find prices that even out how many rows take each codeword, for all levels together.

    A codeword's price rises with the logarithm of its size and never above ``limit`` times what all
    levels leave of a row on average. At one level a row's squared error rises by at most that much:
    with ``k`` the nearest codeword and ``j`` the one taken,
    ``|x - j|^2 + p_j <= |x - k|^2 + p_k``. Steps shrink, and of all rounds the prices with the most
    even usage (entropy, all levels added) are returned: sizes that swing to and fro cannot leave
    usage less even than no prices do.

    Args:
        rows: ``(items, dim)``.
        codebooks: ``(codes, dim)`` float32, one a level.
        limit: highest price in mean squared residuals, 0 or more; 0 prices nothing.
        columns: count the residuals of the first so many columns; None counts all.
        beam_width: partial codes kept while encoding.
        rounds: passes over the rows, at least 1.
        threads: plain threads; they change no result.

    Returns:
        ``(codes,)`` float64 prices a level, the lowest of each 0, in squared units of the rows.

    Raises:
        UsageError: if ``limit`` or ``rounds`` is out of range.

    Cost: ``rounds`` + 1 encodings of all rows.
    """
    if not 0 <= limit < float("inf") or rounds < 1:
        raise UsageError(
            f"limit={limit}, rounds={rounds}: give a limit of 0 or more and at least 1 round"
        )
    prices = [np.zeros(len(book)) for book in codebooks]
    if limit == 0:
        return prices
    sizes, spread = _sizes(rows, codebooks, prices, columns or rows.dim, beam_width, threads)
    highest = limit * spread
    best, most = prices, _entropy(sizes)
    for number in range(1, rounds + 1):
        step = STEP * highest / np.sqrt(number)
        prices = [
            np.clip(p + step * (np.log1p(n) - np.log1p(n.mean())), 0.0, highest)
            for p, n in zip(prices, sizes, strict=True)
        ]
        sizes, _ = _sizes(rows, codebooks, prices, columns or rows.dim, beam_width, threads)
        if (found := _entropy(sizes)) > most:
            best, most = prices, found
    return [found - found.min() for found in best]


def _entropy(sizes: Sequence[npt.NDArray[np.float64]]) -> float:
    total = 0.0
    for counts in sizes:
        share = counts[counts > 0] / counts.sum()
        total -= float((share * np.log(share)).sum())
    return total


def _sizes(
    rows: Blocks,
    codebooks: Sequence[Array],
    prices: Sequence[npt.NDArray[np.float64]],
    columns: int,
    beam_width: int,
    threads: int | None,
) -> tuple[list[npt.NDArray[np.float64]], float]:
    """Return rows a codeword, level by level, and the mean squared residual without prices."""
    levels = len(codebooks)
    books = [
        index_codebook(torch.from_numpy(priced(book, paid, level=level, levels=levels)))
        for level, (book, paid) in enumerate(zip(codebooks, prices, strict=True))
    ]
    sizes, total = [np.zeros(len(book)) for book in codebooks], 0.0
    for _, block in read_ahead(rows):
        codes = encode_residual(
            with_room(block, levels), books, beam_width=beam_width, threads=threads
        ).codes
        for level, counts in enumerate(sizes):
            counts += np.bincount(codes[:, level], minlength=len(counts))
        left = block[:, :columns] - dequantize(codes, [book[:, :columns] for book in codebooks])
        total += float(np.einsum("nd,nd->", left, left, dtype=np.float64))
    return sizes, total / max(len(rows), 1)


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
