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

from semid.quantization.engine.plain import SCAN
from semid.quantization.engine.sweep import F32, F64, I32, I64, kth_largest, scan, trim_rows
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


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def scan_children(
    base: F32, halves: F32, products: F32, lines: I64, offsets: F32, margin: F32, top: F32,
    counts: I64, candidates: I32, values: F32, k: int, scratch: F32, scores: F32,
) -> None:  # fmt: skip
    """Note every child whose score lies within ``margin`` of its item's ``k``-th best.

    ``base`` ``(items, columns)``: products of items and codewords, less half the codewords'
    squares; columns without a codeword are minus infinity. ``halves`` ``(items, partials)``: half
    the squared residual of each partial code. ``products`` ``(codes before, columns)``: of earlier
    codewords with this level's; ``lines`` ``(items, partials, levels before)`` names its rows.
    ``offsets`` ``(columns,)`` has no effect. ``scores`` ``(1, columns)`` and ``scratch``
    ``(capacity,)`` are scratch. A candidate is ``partial * columns + codeword``; the rest is as in
    `scan`.
    """
    items, partials, before = lines.shape
    columns = base.shape[1]
    lanes = np.empty(SCAN, np.float32)
    score = scores[0]
    for i in range(items):
        shared = base[i]
        for p in range(partials):
            half = halves[i, p]
            if before == 0:
                for j in range(columns):
                    score[j] = shared[j] - half
            else:
                line = products[lines[i, p, 0]]
                for j in range(columns):
                    score[j] = shared[j] - line[j] - half
            for level in range(1, before):
                line = products[lines[i, p, level]]
                for j in range(columns):
                    score[j] -= line[j]
            if p == 0 and k <= SCAN:
                # The best of each lane are as many different children of the best partial code, so
                # that the k-th of them is a bound to start from. Fewer lanes are quicker to sort.
                lanes[:] = score[:SCAN]
                for at in range(SCAN, columns, SCAN):
                    for j in range(SCAN):
                        value = score[at + j]
                        lanes[j] = value if value > lanes[j] else lanes[j]
                count = SCAN
                while count >= 6 * k:
                    count //= 2
                    for j in range(count):
                        value = lanes[count + j]
                        lanes[j] = value if value > lanes[j] else lanes[j]
                top[i] = max(top[i], kth_largest(lanes, count, k))
            scan(
                scores, 1, columns, p * columns, offsets, margin, top, counts, candidates, values,
                i, k, scratch,
            )  # fmt: skip
    trim_rows(items, k, margin, top, counts, candidates, values, scratch)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def resolve_children(
    rows: F32, earlier: F32, lines: I64, codewords: F32, columns: int, counts: I64,
    candidates: I32, parents: I64, labels: I64, distances: F32,
) -> None:  # fmt: skip
    """Sort each item's best children by distance; ties go to the better parent, the lower code.

    ``rows`` ``(items, width)``; ``earlier`` ``(codes before, width)`` are the codewords of the
    levels before, of which ``lines`` ``(items, partials, levels before)`` names those of each
    partial code; ``codewords`` ``(codes, width)``; ``columns`` per partial code among the
    candidates of `scan_children`, of which ``counts`` ``(items,)`` are used (below 0: all
    children). Writes ``parents``, ``labels`` and ``distances`` ``(items, best)``, infinite where an
    item has too few.
    """
    items, best = labels.shape
    partials, before = lines.shape[1], lines.shape[2]
    width = rows.shape[1]
    exact = np.empty(best)
    residual = np.empty((1, width), np.float32)
    for i in range(items):
        everything = counts[i] < 0
        size, parent = 0, -1
        for number in range(partials * columns if everything else counts[i]):
            child = number if everything else candidates[i, number]
            p, code = child // columns, child % columns
            if code >= codewords.shape[0]:
                continue
            if p != parent:  # candidates come by parent, then by code
                parent = p
                for d in range(width):
                    residual[0, d] = rows[i, d]
                for level in range(before):
                    codeword = earlier[lines[i, p, level]]
                    for d in range(width):
                        residual[0, d] -= codeword[d]
            value = key(0, residual, 0, 0.0, codewords, code, 0.0)
            if math.isnan(value):
                value = math.inf
            # Insert it among the best so far. Partial codes compare as they are kept, in float32,
            # ties to the better parent; within one parent all digits count.
            rounded, at = np.float32(value), size
            while at > 0 and (
                rounded < distances[i, at - 1]
                or (
                    rounded == distances[i, at - 1]
                    and p == parents[i, at - 1]
                    and value < exact[at - 1]
                )
            ):
                at -= 1
            if at == best:
                continue
            size = min(size + 1, best)
            for place in range(size - 1, at, -1):
                exact[place], distances[i, place] = exact[place - 1], distances[i, place - 1]
                parents[i, place], labels[i, place] = parents[i, place - 1], labels[i, place - 1]
            exact[at], distances[i, at], parents[i, at], labels[i, at] = value, rounded, p, code
        for at in range(size, best):
            distances[i, at], parents[i, at], labels[i, at] = np.inf, 0, 0
