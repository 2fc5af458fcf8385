"""Kernels that extend the partial codes of rows level by level (see `levels`)."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from semid.quantization.engine.plain import SCAN
from semid.quantization.engine.sweep import F32, F64, I32, I64, kth_largest
from semid.quantization.engine.vector import (
    dot,
    hits,
    lane_maxima,
    maximum,
    square_distance,
    trailing_zeros,
)
from semid.quantization.engine.x86 import (
    ROW_TILE,
    begin,
    block_columns,
    block_rows,
    end,
    score_block,
)

REDUCED = 16
"""Most partial codes whose threshold is found by repeated maxima."""


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, error_model="numpy")
def _score_children(
    shared: F32, products: F32, start: int, columns: int, lines: I64, halves: F32, partials: int,
    level: int, scores: F32,
) -> None:  # fmt: skip
    """Write the scores of all children of a row's partial codes, ``columns`` for each of them.

    ``shared`` ``(columns,)``: products of the row with the level's codewords; ``lines``
    ``(partials, levels)``; ``halves`` ``(partials,)``: half the square of what each partial leaves.
    """
    # Slices, since numba checks an index that is a sum for its sign, and then vectorizes nothing.
    for p in range(partials):
        half, out = halves[p], scores[p * columns : (p + 1) * columns]
        place = start + lines[p, 0] * columns
        line = products[place : place + columns]
        for j in range(columns):
            out[j] = shared[j] - line[j] - half
        for before in range(1, level):
            place = start + lines[p, before] * columns
            line = products[place : place + columns]
            for j in range(columns):
                out[j] -= line[j]


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, error_model="numpy")
def _subtract(x: F32, row: int, codewords: F32, lines: I64, level: int, residual: F32) -> None:
    """Write to ``residual[0]`` what a partial code leaves of a row before ``level``."""
    left, whole = residual[0], x[row]
    for d in range(len(left)):
        left[d] = whole[d]
    for before in range(level):
        codeword = codewords[lines[before]]
        for d in range(len(left)):
            left[d] -= codeword[d]


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, error_model="numpy")
def _distance(x: F32, row: int, codewords: F32, lines: I64, level: int, residual: F32) -> float:
    """Return the squared length of what a partial code leaves of a row, its last at ``level``."""
    width = x.shape[1]
    _subtract(x, row, codewords, lines, level, residual)
    value = square_distance(residual, 0, codewords, lines[level] * width, width // 16)
    return math.inf if math.isnan(value) else value


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, error_model="numpy")
def _precedes(
    x: F32, row: int, codewords: F32, one: I64, other: I64, level: int, residual: F32
) -> bool:
    """Whether a partial code up to ``level`` is better than another: the order of all ties."""
    while True:
        mine = _distance(x, row, codewords, one, level, residual)
        theirs = _distance(x, row, codewords, other, level, residual)
        if np.float32(mine) != np.float32(theirs):
            return bool(mine < theirs)
        same = True
        for before in range(level):
            same = same and one[before] == other[before]
        if same:  # within one parent all digits count
            return bool(mine < theirs or (mine == theirs and one[level] < other[level]))
        level -= 1


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, error_model="numpy")
def _measure(
    x: F32, row: int, codewords: F32, columns: int, codes: int, first: int, lines: I64,
    level: int, count: int, candidates: I32, everything: int, children: I32, exact: F64,
    residual: F32, spare: F32,
) -> None:  # fmt: skip
    """Sort a row's best children by distance; ties go to the better parent, the lower code.

    Children are ``partial * columns + code``: ``count`` candidates, or all below ``everything``
    where that is positive. Writes ``children`` and ``exact`` ``(best,)``.
    """
    best, size, parent, width = len(exact), 0, -1, x.shape[1]
    for number in range(everything if everything > 0 else count):
        child = number if everything > 0 else candidates[number]
        p, code = child // columns, child % columns
        if code >= codes:  # a padding column
            continue
        if p != parent:  # candidates come by parent, then by code
            parent = p
            _subtract(x, row, codewords, lines[p], level, residual)
        value = square_distance(residual, 0, codewords, (first + code) * width, width // 16)
        if math.isnan(value):
            value = math.inf
        at = size
        while at > 0:
            rounded, other = np.float32(value), np.float32(exact[at - 1])
            if rounded == other:
                before = children[at - 1] // columns
                if p == before:
                    better = value < exact[at - 1]
                else:
                    better = _precedes(x, row, codewords, lines[p], lines[before], level - 1, spare)
            else:
                better = rounded < other
            if not better:
                break
            at -= 1
        if at == best:
            continue
        size = min(size + 1, best)
        for place in range(size - 1, at, -1):
            exact[place], children[place] = exact[place - 1], children[place - 1]
        exact[at], children[at] = value, child


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, error_model="numpy")
def _screen(
    scores: F32, total: int, best: int, margin: float, candidates: I32, values: F32, scratch: F32,
    lanes: F32,
) -> int:  # fmt: skip
    """Note the children that can be among the ``best``; return how many, -1 if all of them.

    The first ``total`` of ``scores`` ``(1, columns)`` count; ``candidates`` and their ``values``
    ``(capacity,)`` are written in order.
    """
    if best <= REDUCED:
        # The best of each lane are as many different children, so that the k-th of them is a lower
        # bound on the k-th of all.
        lane_maxima(scores, total, lanes)
        top = maximum(lanes, 0, lanes, 0, SCAN)
        for _ in range(1, best):
            for j in range(SCAN):
                lanes[j] = -np.inf if lanes[j] >= top else lanes[j]
            top = maximum(lanes, 0, lanes, 0, SCAN)
    else:
        for j in range(total):
            scratch[j] = scores[0, j]
        top = kth_largest(scratch, total, best)
    threshold, count = np.float32(top - margin), 0
    for column in range(0, total, SCAN):
        mask = hits(scores, column, lanes, 0, threshold)
        if mask != 0 and count > len(candidates) - SCAN:
            return -1
        while mask != 0:
            at = column + trailing_zeros(mask)
            mask &= mask - np.uint64(1)  # clears the lowest bit that is set
            candidates[count], values[count] = at, scores[0, at]
            count += 1
    return count


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, error_model="numpy")
def _settle(
    best: int, margin: float, count: int, candidates: I32, values: F32, scratch: F32,
    children: I32, minus: F64,
) -> tuple[int, int]:  # fmt: skip
    """Take the candidates that are surely among the ``best``: they need no distance.

    Writes ``children`` and minus their scores; the other candidates are moved to the front. Returns
    how many there are of either.
    """
    sure = -np.inf
    if count < best:  # below 0: every child is a candidate
        return 0, count
    if count > best:
        # Surely better than the first that does not fit: then at most ``best - 1`` are better yet.
        for at in range(count):
            scratch[at] = values[at]
        sure = kth_largest(scratch, count, best + 1) + margin
    taken, rest = 0, 0
    for at in range(count):
        if values[at] > sure:
            children[taken], minus[taken] = candidates[at], -values[at]
            taken += 1
        else:
            candidates[rest] = candidates[at]
            rest += 1
    return taken, rest


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, error_model="numpy")
def extend_rows(
    chip: Any, saved: Any, rounded: Any, panels: Any, start: Any, base: Any, units: F32,
    shift: I32, margins: F32, half: F64, half_scale: float, x: F32, codewords: F32, shape: I64,
    products: F32, kept: I64, scratch: Any, codes: I64, distances: F32, lengths: F32,
) -> None:  # fmt: skip
    """Extend the partial codes of rows level by level; a tile of rows takes all levels in turn.

    Integer products: ``rounded`` ``(tiles, >= width)`` rows and ``panels`` as in `sweep`; ``start``
    ``(1, columns)`` is zero and ``base`` ``(ROW_TILE, columns)`` scratch for the widest level. A
    product less ``shift`` ``(rows,)``, times ``units`` ``(levels, rows)``, is in scaled units.
    Without a ``chip``, ``base`` ``(rows, columns of all levels)`` holds float32 products.

    ``margins`` ``(levels, rows)``; ``half`` ``(rows,)``: half the squares of scaled rows, negative
    where a row has no scores; ``half_scale``: half the square of the factor to scaled units; ``x``
    ``(rows, width)``; ``kept``: partial codes after each level. Writes ``codes``, ``distances`` and
    ``lengths`` (see `levels.LevelCodes`).
    """
    levels, rows = len(shape), len(x)
    lines, halves, moved, shared, scores, residual, spare, children, exact, minus = scratch[0]
    candidates, values, pivots, lanes = scratch[1]
    if chip is not None:
        begin(chip, saved)
    for tile in range(0, rows, ROW_TILE):
        size = min(ROW_TILE, rows - tile)
        partials = 1
        for local in range(size):  # the empty code has one line of products
            lines[local, 0, 0], halves[local, 0] = 0, 0.0
        for level in range(levels):
            columns, number, first, column, place = shape[level]
            best, last = kept[level], level == levels - 1
            if chip is not None:
                for at in range(0, columns, block_columns(chip)):
                    for block in range(tile, tile + ROW_TILE, block_rows(chip)):
                        score_block(
                            chip, rounded, block, panels, (column + at) // 16, start, at, base, at
                        )
            for local in range(size):
                row = tile + local
                count, margin = -1, margins[level, row]
                if half[row] >= 0:
                    if chip is None:
                        line = base[row, column : column + columns]
                        for j in range(columns):
                            shared[j] = line[j]
                    else:
                        line, unit, zero = base[local], units[level, row], shift[row]
                        for j in range(columns):
                            shared[j] = np.float32(np.int32(line[j] - zero)) * unit
                    _score_children(
                        shared, products, place, columns, lines[local], halves[local], partials,
                        level, scores[0],
                    )  # fmt: skip
                    count = _screen(
                        scores, partials * columns, best, margin, candidates, values, pivots, lanes
                    )
                taken, rest = 0, count
                if best == 1 or not last:  # the last level's are sorted
                    taken, rest = _settle(
                        best, margin, count, candidates, values, pivots, children, minus
                    )
                if taken < best:
                    _measure(
                        x, row, codewords, columns, number, first, lines[local], level, rest,
                        candidates, partials * columns if rest < 0 else 0,
                        children[taken:best], exact[taken:best], residual, spare,
                    )  # fmt: skip
                for p in range(best):
                    parent = children[p] // columns
                    for before in range(level):
                        moved[p, before] = lines[local, parent, before]
                    moved[p, level] = first + children[p] - parent * columns
                    # Minus the score of a measured one; one partial code alone needs none.
                    value = minus[p] if p < taken else exact[p] * half_scale - half[row]
                    halves[local, p] = value if best > 1 else 0.0
                for p in range(best):
                    for before in range(level + 1):
                        lines[local, p, before] = moved[p, before]
                        if last:
                            codes[row, p, before] = moved[p, before] - shape[before, 2]
                    if last and best > 1:
                        distances[row, p] = exact[p]
                if last:
                    _subtract(x, row, codewords, lines[local, 0], levels, residual)
                    lengths[row] = math.sqrt(dot(residual, 0, residual, 0, x.shape[1] // 16))
            partials = best
    if chip is not None:
        end(chip, saved)
