"""Penalties per codeword that even out usage (a power diagram).

A row takes the codeword of least ``|x - c|^2 + penalty``. Penalties are one more coordinate: with
``x' = [x, 0]`` and ``c' = [c, sqrt(penalty)]`` the plain nearest codeword is the penalized one, so
the engine, its bounds and beams need know nothing of penalties.
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

Array = npt.NDArray[np.float32]

STEP = 0.1
"""Fraction of the highest penalty that a codeword e times too large gets in the first round."""


def balance_penalties(
    rows: Blocks,
    codebooks: Sequence[Array],
    *,
    strength: float,
    columns: int | None = None,
    beam_width: int = 1,
    rounds: int = 20,
    threads: int | None = None,
) -> list[npt.NDArray[np.float64]]:
    """Find penalties that even out how many rows take each codeword, for all levels together.

    A codeword's penalty rises with the logarithm of its size and never above ``strength`` times
    what all levels leave of a row on average. At one level a row's squared error rises by at most
    that much: with ``k`` the nearest codeword and ``j`` the one that it takes,
    ``|x - j|^2 + p_j <= |x - k|^2 + p_k``. Steps shrink, and of all rounds the penalties with the
    most even usage (entropy, summed over levels) are returned: sizes that oscillate cannot leave
    usage less even than no penalties do.

    Returns ``(codes,)`` float64 per level, the lowest of each 0, in squared units of the rows.

    Cost: ``rounds`` + 1 encodings of all rows.

    Shapes: ``rows`` (items, dim), ``codebooks`` (codes, dim).
    """
    if not 0 <= strength < float("inf") or rounds < 1:
        raise UsageError(
            f"strength={strength}, rounds={rounds}: give a strength of 0 or more and at least 1 "
            "round"
        )
    penalties = [np.zeros(len(book)) for book in codebooks]
    if strength == 0:
        return penalties
    sizes, residual = _sizes(rows, codebooks, penalties, columns or rows.dim, beam_width, threads)
    highest = strength * residual
    best, best_entropy = penalties, _entropy(sizes)
    for number in range(1, rounds + 1):
        # Raise the penalty of codewords larger than the mean size and lower that of smaller ones.
        # Steps fall with 1 / sqrt(round), so that sizes settle.
        step = STEP * highest / np.sqrt(number)
        penalties = [
            np.clip(p + step * (np.log1p(n) - np.log1p(n.mean())), 0.0, highest)
            for p, n in zip(penalties, sizes, strict=True)
        ]
        sizes, _ = _sizes(rows, codebooks, penalties, columns or rows.dim, beam_width, threads)
        entropy = _entropy(sizes)
        if entropy > best_entropy:
            best, best_entropy = penalties, entropy
    # A constant that all codewords of a level pay changes no code.
    return [each - each.min() for each in best]


def _entropy(sizes: Sequence[npt.NDArray[np.float64]]) -> float:
    total = 0.0
    for counts in sizes:
        share = counts[counts > 0] / counts.sum()
        total -= float((share * np.log(share)).sum())
    return total


def _sizes(
    rows: Blocks,
    codebooks: Sequence[Array],
    penalties: Sequence[npt.NDArray[np.float64]],
    columns: int,
    beam_width: int,
    threads: int | None,
) -> tuple[list[npt.NDArray[np.float64]], float]:
    """Return rows per codeword of each level, and the mean squared residual without penalties."""
    levels = len(codebooks)
    books = [
        index_codebook(torch.from_numpy(add_penalties(book, penalty, level=level, levels=levels)))
        for level, (book, penalty) in enumerate(zip(codebooks, penalties, strict=True))
    ]
    sizes, total = [np.zeros(len(book)) for book in codebooks], 0.0
    for _, block in read_ahead(rows):
        codes = encode_residual(
            pad_columns(block, levels), books, beam_width=beam_width, threads=threads
        ).codes
        for level, counts in enumerate(sizes):
            counts += np.bincount(codes[:, level], minlength=len(counts))
        residual = block[:, :columns] - dequantize(codes, [book[:, :columns] for book in codebooks])
        total += float(np.einsum("nd,nd->", residual, residual, dtype=np.float64))
    return sizes, total / max(len(rows), 1)


def pad_columns(rows: Array, count: int) -> Array:
    """Return rows ``(n, dim)`` with ``count`` more columns of zeros."""
    return np.pad(rows, ((0, 0), (0, count)))


def add_penalties(
    codebook: Array, penalties: npt.NDArray[np.float64], *, level: int = 0, levels: int = 1
) -> Array:
    """Return codewords with their penalties as coordinates.

    Every level has a coordinate of its own, so that the penalty of a level stays as a constant in
    the residual and a beam adds up the penalties of all levels.

    Shapes: ``codebook`` (codes, dim), ``penalties`` (codes,), returns (codes, dim + levels).
    """
    padded = pad_columns(codebook, levels)
    padded[:, codebook.shape[1] + level] = np.sqrt(penalties)
    return padded
