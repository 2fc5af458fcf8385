"""The canonical key that decides every search, and the kernels that measure candidates with it.

The key of a pair is a float64 number that is smaller for a better match: the squared distance, or
the negative inner product or cosine. Sums run in the fixed order of `vector`, so a key is the same
number on every chip, route, block size and thread; equal keys go to the lowest index.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from semid.quantization.engine.sweep import F32, F64, I32, I64
from semid.quantization.engine.vector import dot, square_distance


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def key(
    metric: int, x: F32, row: int, x_norm: float, table: F32, index: int, table_norm: float
) -> float:
    """Key of query ``row`` and table entry ``index``; both C-contiguous with padded rows."""
    width = x.shape[1]
    if metric == 0:
        return square_distance(x, row * width, table, index * width, width // 16)  # type: ignore[no-any-return]
    product = dot(x, row * width, table, index * width, width // 16)
    if metric == 1:
        return -product  # type: ignore[no-any-return]
    scale = x_norm * table_norm
    return -(product / scale) if scale > 0.0 else 0.0


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def norms(rows: F32, out: F64) -> None:
    """Euclidean norms in the canonical order, written to ``out``."""
    width = rows.shape[1]
    for i in range(rows.shape[0]):
        out[i] = math.sqrt(dot(rows, i * width, rows, i * width, width // 16))


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def resolve_best(
    x: F32, table: F32, rows: int, counts: I64, candidates: I32, scores: Any,
    unit: F64, shift: F64, bound: F64, half_square: F64, half_scale: float, labels: I64,
    distances: F64,
) -> int:  # fmt: skip
    """Choose the entry with the smallest squared distance among each row's candidates.

    The candidate with the best score is measured first; its true distance then rules out every
    candidate whose score, even with the whole bound added, stays behind it.

    Shapes: ``x`` ``(>= rows, width)``, ``table`` ``(entries, width)``; ``candidates`` and
    ``scores`` ``(rows, capacity)``, of which ``counts`` are used (0 or less: all entries are
    candidates); all others ``(rows,)``. A score stands for ``score * unit + shift`` in scaled
    units, at most ``bound`` from the truth; ``half_square`` is half the query's squared norm there,
    and ``half_scale`` half the square of the factor from real to scaled units. Writes ``labels``
    and ``distances``; returns the number of pairs measured.
    """
    measured = 0
    for i in range(rows):
        count = counts[i]
        best = 0
        if count <= 0:
            smallest = key(0, x, i, 0.0, table, 0, 0.0)
            for k in range(1, table.shape[0]):
                value = key(0, x, i, 0.0, table, k, 0.0)
                if value < smallest:
                    smallest, best = value, k
            measured += table.shape[0]
        else:
            # The best score's entry gives a first true distance.
            top = 0
            for j in range(1, count):
                if scores[i, j] > scores[i, top]:
                    top = j
            best = candidates[i, top]
            smallest = key(0, x, i, 0.0, table, best, 0.0)
            measured += 1
            # A score of S = |y|^2 / 2 - |y - e|^2 / 2 means the distance: what even with the bound
            # added stays below the best distance's score cannot win.
            floor = half_square[i] - smallest * half_scale - bound[i]
            for j in range(count):
                if j == top or scores[i, j] * unit[i] + shift[i] < floor:
                    continue
                k = candidates[i, j]
                if k >= table.shape[0]:  # a padding column
                    continue
                value = key(0, x, i, 0.0, table, k, 0.0)
                measured += 1
                if value < smallest or (value == smallest and k < best):
                    smallest, best = value, k
                    floor = half_square[i] - smallest * half_scale - bound[i]
        labels[i] = best
        distances[i] = smallest
    return measured


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def drop_rows_without(
    targets: I64, bounds: I64, first: int, rows: int, counts: I64, candidates: I32
) -> None:
    """Set a row's count of candidates to 0 where none of its targets is among them.

    Row i of the block has the targets ``targets[bounds[first + i] : bounds[first + i + 1]]``.
    """
    for i in range(rows):
        if counts[i] <= 0:  # every entry is a candidate
            counts[i] = -1
            continue
        reached = False
        for j in range(counts[i]):
            for t in range(bounds[first + i], bounds[first + i + 1]):
                reached = reached or candidates[i, j] == targets[t]
            if reached:
                break
        if not reached:
            counts[i] = 0


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def resolve_many(
    metric: int, x: F32, x_norms: F64, table: F32, table_norms: F64, rows: int, exclude: I64,
    counts: I64, candidates: I32, limited: bool, labels: I64, keys: F64,
) -> int:  # fmt: skip
    """Sort each row's ``m`` best candidates by (key, index); see `resolve_best`.

    ``x_norms`` ``(rows,)`` and ``table_norms`` ``(entries,)`` are lengths; ``exclude`` ``(rows,)``
    an entry to leave out, -1 for none. With ``limited`` a row without candidates has none, instead
    of every entry, and a row with fewer than ``m`` is filled with entry 0 at infinity. Writes
    ``labels`` and ``keys`` ``(rows, m)``, best first; returns the number of pairs measured.
    """
    measured = 0
    best = labels.shape[1]
    entries = np.empty(candidates.shape[1], np.int64)
    values = np.empty(candidates.shape[1])
    for i in range(rows):
        everything = counts[i] < 0 or (counts[i] == 0 and not limited)
        count = table.shape[0] if everything else counts[i]
        if count > len(values):
            entries, values = np.empty(count, np.int64), np.empty(count)
        size = 0
        for j in range(count):
            k = j if everything else candidates[i, j]
            if k == exclude[i] or k >= table.shape[0]:
                continue
            value = key(metric, x, i, x_norms[i], table, k, table_norms[k])
            entries[size] = k
            values[size] = math.inf if math.isnan(value) else value
            size += 1
        measured += size
        # Candidates were noted in the order of the table: a stable sort leaves ties in it.
        order = np.argsort(values[:size], kind="mergesort")
        for place in range(best):
            keys[i, place] = values[order[place]] if place < size else math.inf
            labels[i, place] = entries[order[place]] if place < size else 0
    return measured
