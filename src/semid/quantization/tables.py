"""Tables from codes to targets, with the ridge chosen on items held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semid.quantization.additive import NormalEquations
from semid.quantization.residual import dequantize

__all__ = ["Tables", "fit_tables"]

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Tables:
    """Least-squares tables.

    Attributes:
        tables: one ``(codes, width)`` float32 a level.
        ridge: the ridge that was chosen.
        error: ``sum |y - f|^2 / sum |y - mean|^2`` on the judged items; None without any.
    """

    tables: tuple[Array, ...]
    ridge: float
    error: float | None


def fit_tables(
    blocks: Iterable[tuple[Codes, Array]],
    sizes: Sequence[int],
    width: int,
    *,
    judged: tuple[Codes, Array],
    ridges: Sequence[float],
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
) -> Tables:
    """Fit tables whose rows, summed by codes, predict targets.

    Args:
        blocks: codes ``(n, levels)`` and targets ``(n, width)`` to fit to, in order.
        sizes: codewords of each level.
        width: width of the targets.
        judged: codes and targets to choose the ridge on; with none the middle ridge is taken.
        ridges: to choose from, each above 0.
        weights: ``(items,)`` weights of all blocks' items; None counts every item once.
        threads: plain threads; they change no result.

    Returns:
        The tables of least error on the judged items.
    """
    equations = NormalEquations(sizes, width)
    at = 0
    for codes, targets in blocks:
        equations.add_(codes, targets, None if weights is None else weights[at : at + len(codes)])
        at += len(codes)
    start = [np.zeros((size, width)) for size in sizes]
    start[0] += equations.total / max(equations.items, 1.0)
    own, rows = judged
    candidates = sorted(ridges) if len(rows) else [sorted(ridges)[len(ridges) // 2]]
    best: Tables | None = None
    least = np.inf
    for ridge in candidates:
        solved = equations.solve(ridge=ridge, start=start, threads=threads)
        tables = tuple(table.astype(np.float32) for table in solved)
        left = float(np.square(rows - dequantize(own, tables), dtype=np.float64).sum())
        if left < least:
            best, least = Tables(tables, float(ridge), None), left
    assert best is not None
    if not len(rows):
        return best
    spread = float(np.square(rows - rows.mean(axis=0), dtype=np.float64).sum())
    return Tables(best.tables, best.ridge, least / spread if spread > 0 else None)
