"""Tables from codes to targets, with the ridge chosen on items held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semid.quantization.additive import NormalEquations
from semid.quantization.residual import dequantize

__all__ = ["Tables", "fit_tables"]

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.integer]
Pairs = Iterable[tuple[Codes, Array]]


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
    blocks: Pairs,
    sizes: Sequence[int],
    width: int,
    *,
    judged: Callable[[], Pairs] | None,
    ridges: Sequence[float],
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
) -> Tables:
    """Fit tables whose rows, summed by codes, predict targets.

    Args:
        blocks: codes ``(n, levels)`` and targets ``(n, width)`` to fit to, in order.
        sizes: codewords of each level.
        width: width of the targets.
        judged: gives codes and targets to choose the ridge on, block by block, once a ridge; with
            None the middle ridge is taken.
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
    candidates = sorted(ridges)
    if judged is None:
        candidates = [candidates[len(candidates) // 2]]
    best: Tables | None = None
    least = np.inf
    for ridge in candidates:
        solved = equations.solve(ridge=ridge, start=start, threads=threads)
        tables = tuple(table.astype(np.float32) for table in solved)
        if judged is None:
            return Tables(tables, float(ridge), None)
        left, spread = _errors(judged(), tables, width)
        if left < least:
            error = left / spread if spread > 0 else None
            best, least = Tables(tables, float(ridge), error), left
    assert best is not None
    return best


def _errors(blocks: Pairs, tables: Sequence[Array], width: int) -> tuple[float, float]:
    """Return what tables leave of the targets, squared, and the targets' squares about their mean.

    The second is 0 where it is no more than rounding, as for a single item.
    """
    count, left, squares, total = 0, 0.0, 0.0, np.zeros(width)
    for codes, targets in blocks:
        count += len(targets)
        left += float(np.square(targets - dequantize(codes, tables), dtype=np.float64).sum())
        squares += float(np.square(targets, dtype=np.float64).sum())
        total += targets.sum(axis=0, dtype=np.float64)
    spread = squares - float(total @ total) / max(count, 1)
    return left, spread if spread > 1e-12 * squares else 0.0
