"""The nearest entry of narrow rows: float32 scores that stay in registers and the first cache.

Rows of a few dozen columns are a special case: preparing and rounding them for a low-precision
product costs more than the float32 product itself. Here a tile of rows is centered, multiplied and
scanned at once. The bound is that of every route (README.md), with worst cases for the rounding of
float32 numbers in place of measured ones; canonical keys decide as everywhere.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from semid.quantization.engine.keys import key
from semid.quantization.engine.plain import L2, SCAN, Rows, check_rows, float32_rows
from semid.quantization.engine.search import SearchResult
from semid.quantization.engine.sweep import F32, I64
from semid.quantization.engine.table import Operand, VectorTable, aligned
from semid.quantization.engine.vector import F32 as FLOAT
from semid.quantization.engine.vector import I32 as SHORT
from semid.quantization.engine.vector import I64 as INTEGER
from semid.quantization.engine.vector import (
    SHRINK,
    call,
    center_row,
    data_pointer,
    hits,
    larger,
    load,
    maximum,
    others,
    store,
    trailing_zeros,
)
from semid.quantization.threads import map_blocks

MAX_WIDTH = 64
"""Widest rows that take this way."""
MAX_ENTRIES = 1024
"""Largest table: its transposed copy and the scores of a tile must stay in the second cache."""
TILE, PANEL = 6, 16
"""Rows and entries scored together: with AVX2 their sums take 12 of 16 registers."""
STEP_ROWS = 48
"""Rows that are copied and centered together."""
BLOCK = 4096
"""Rows that one of several threads takes at once."""
FAR = 2.0**30
"""Rows further away, in table radii, are measured against every entry."""

F64 = npt.NDArray[np.float64]


@intrinsic
def score_tile(
    typing: Any, rows: Any, numbers: Any, first: Any, panels: Any, panel: Any, offsets: Any,
    dim: Any, scores: Any, to: Any,
) -> Any:  # fmt: skip
    """Write ``row . entry - offset`` of `TILE` rows and the `PANEL` entries of one panel.

    The rows are ``rows[numbers[first + i]]``. ``rows`` ``(n, width)``, ``numbers`` int64,
    ``panels`` ``(panels, dim, PANEL)``, ``offsets`` ``(columns,)``, ``scores`` ``(TILE, columns)``,
    written from column ``to`` on; sums with fused additions, for which the bound has room.
    """
    long = types.int64
    signature = types.void(rows, numbers, long, panels, long, offsets, long, scores, long)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.VectorType(FLOAT, PANEL)
        zero, four = INTEGER(0), INTEGER(4)
        kinds = signature.args
        x, entries, start = (
            data_pointer(context, builder, kinds[at], args[at], zero) for at in (0, 3, 5)
        )
        places = data_pointer(context, builder, kinds[1], args[1], args[2])
        out = data_pointer(context, builder, kinds[7], args[7], args[8])
        width, columns = (
            builder.extract_value(
                context.make_array(kinds[at])(context, builder, args[at]).shape, 1
            )
            for at in (0, 7)
        )
        line = INTEGER(4 * PANEL)
        column = builder.mul(args[4], line)
        # Sums start at minus half the entry's square, so the nearest has the largest score.
        first = builder.fsub(ir.Constant(wide, None), load(builder, start, wide, column))
        sums = [cgutils.alloca_once_value(builder, first) for _ in range(TILE)]
        spread = ir.Constant(ir.VectorType(ir.IntType(32), PANEL), [0] * PANEL)
        base = builder.mul(column, args[6])
        numbers = [load(builder, places, INTEGER, INTEGER(8 * row)) for row in range(TILE)]
        starts = [builder.mul(number, width) for number in numbers]
        with cgutils.for_range(builder, args[6]) as loop:
            entry = load(builder, entries, wide, builder.add(base, builder.mul(loop.index, line)))
            for row, total in enumerate(sums):
                place = builder.add(starts[row], loop.index)
                value = load(builder, x, FLOAT, builder.mul(place, four))
                single = builder.insert_element(ir.Constant(wide, ir.Undefined), value, zero)
                # One value of the row in all lanes, times this column of the panel's entries.
                every = builder.shuffle_vector(single, single, spread)
                product = builder.fmul(every, entry, flags=("contract",))
                added = builder.fadd(builder.load(total), product, flags=("contract",))
                builder.store(added, total)
        for row, total in enumerate(sums):
            place = builder.mul(builder.mul(INTEGER(row), columns), four)
            pointer = builder.bitcast(builder.gep(out, [place]), wide.as_pointer())
            builder.store(builder.load(total), pointer, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def bound_tile(
    typing: Any, scores: Any, numbers: Any, first: Any, places: Any, group: Any, halves: Any,
    floors: Any, lower: Any, groups: Any,
) -> Any:  # fmt: skip
    """Write the bounds of the rows of a tile for one group, from its scores.

    ``scores`` ``(TILE, PANEL)``; the rows are ``numbers[first + t]``; the rest is as in
    `measure_hits`. Bit ``t`` of the result: may another codeword of the group be nearest to row
    ``t``?
    """
    long = types.int64
    signature = types.uint64(scores, numbers, long, places, long, halves, floors, lower, long)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds, lanes, none = signature.args, 8, INTEGER(0)
        start, own, half, floor, out = (
            data_pointer(context, builder, kinds[at], args[at], offset)
            for at, offset in ((1, args[2]), (3, none), (5, none), (6, none), (7, args[4]))
        )
        narrow = ir.VectorType(FLOAT, lanes)
        tops, rows = [], [load(builder, start, INTEGER, INTEGER(8 * t)) for t in range(TILE)]
        minus, limits = ir.Constant(narrow, None), ir.Constant(narrow, [float("inf")] * lanes)
        before = builder.mul(args[4], INTEGER(PANEL))
        for t, row in enumerate(rows):
            at = builder.mul(row, INTEGER(4))
            place = builder.sext(load(builder, own, SHORT, at), INTEGER)
            lane = builder.sub(place, before)
            tops.append(others(context, builder, signature, (args[0], INTEGER(t * PANEL), lane)))
            minus = builder.insert_element(minus, load(builder, half, FLOAT, at), SHORT(t))
            limits = builder.insert_element(limits, load(builder, floor, FLOAT, at), SHORT(t))
        # Rows become lanes: the larger of both halves of each row, of two registers in one.
        tops += tops[:1] * (lanes - TILE)
        size = PANEL
        while size > 1:
            size //= 2
            starts = range(0, 2 * PANEL if len(tops) > 1 else PANEL, 2 * size)
            sides = [
                ir.Constant(ir.VectorType(SHORT, len(starts) * size), list(places))
                for places in (
                    [start + side + i for start in starts for i in range(size)]
                    for side in (0, size)
                )
            ]
            tops = [
                larger(builder, *(builder.shuffle_vector(a, b, side) for side in sides))
                for a, b in zip(tops[::2], tops[1::2] or tops, strict=True)
            ]
        hit = builder.fcmp_ordered(">=", tops[0], limits)
        # |y - e|^2 = |y|^2 - 2 score, each off by at most the bound.
        apart = builder.fsub(minus, tops[0])
        apart = larger(builder, builder.fadd(apart, apart), ir.Constant(narrow, None))
        root = call(builder, "llvm.sqrt.v8f32", narrow, [apart])
        kept = builder.fmul(root, ir.Constant(narrow, [SHRINK] * lanes))
        bounds = builder.fsub(kept, ir.Constant(narrow, [2.0**-60] * lanes))
        for t, row in enumerate(rows):
            place = builder.mul(builder.mul(row, args[8]), INTEGER(4))
            store(builder, builder.extract_element(bounds, SHORT(t)), out, place)
        return builder.zext(builder.bitcast(hit, ir.IntType(lanes)), INTEGER)

    return signature, generate


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def center_rows(x: F32, center: F32, scale: float, raw: F32, y: F32, squares: F32) -> None:
    """Copy a few rows ``(n, dim)`` to ``raw``; write ``(x - center) scale`` to ``y``.

    ``raw`` and ``y`` ``(>= n, width)``, ``raw`` 0 beyond the rows' columns; ``squares`` ``(>= n,)``
    gets the squared lengths in ``y``.
    """
    width = y.shape[1]
    # One step after the other for all rows: what was just written cannot be read at once by wider
    # registers, and waits.
    for i in range(x.shape[0]):
        source, copy = x[i], raw[i]
        for d in range(x.shape[1]):
            copy[d] = source[d]
    for i in range(x.shape[0]):
        squares[i] = center_row(raw, i * width, center, scale, y, width // PANEL)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def nearest_narrow(
    x: F32, rows: F32, panels: F32, offsets: F32, center: F32, scale: float, radius: float,
    raw: F32, y: F32, scores: F32, labels: I64, distances: F64,
) -> int:  # fmt: skip
    """Find the entry nearest to each row by the canonical key, ties to the lowest index.

    Shapes: ``x`` ``(n, dim)``, ``rows`` ``(entries, width)``, ``panels``
    ``(columns / PANEL, dim, PANEL)`` scaled entries, ``offsets`` ``(columns,)``; ``raw`` and
    ``y`` ``(STEP_ROWS, width)``, zeros, and ``scores`` ``(TILE, columns)`` are scratch; ``labels``
    and ``distances`` ``(n,)`` are written. Returns the number of pairs measured.
    """
    dim, columns, width = panels.shape[1], len(offsets), rows.shape[1]
    numbers, lengths = np.arange(STEP_ROWS), np.empty(STEP_ROWS)
    squares = np.empty(STEP_ROWS, np.float32)
    places, thresholds = np.empty(STEP_ROWS, np.int64), np.empty(STEP_ROWS, np.float32)
    alone = np.empty(STEP_ROWS, np.bool_)
    zero, one = np.uint64(0), np.uint64(1)
    measured = 0
    factor = (width + 40.0) * 2.0**-23 * radius
    for start in range(0, x.shape[0], STEP_ROWS):
        size = min(STEP_ROWS, x.shape[0] - start)
        center_rows(x[start : start + size], center, np.float32(scale), raw, y, squares)
        for i in range(size):
            lengths[i] = np.sqrt(np.float64(squares[i])) * 1.00001
        # Rows past the last one are left from before, or zeros.
        for tile in range(0, size, TILE):
            for panel in range(panels.shape[0]):
                score_tile(y, numbers, tile, panels, panel, offsets, dim, scores, PANEL * panel)
            last = min(tile + TILE, size)
            for i in range(tile, last):
                # Rounding of the row, of the entries and of the sums; then what canonical sums
                # round.
                whole = lengths[i] + radius
                bound = factor * whole + (width + 64.0) * 2.0**-52 * whole * whole + 2.0**-60
                base = (i - tile) * columns
                top = maximum(scores, base, offsets, 0, columns)
                # Both the best score and a rival's may be off by the bound; the last term covers
                # the rounding of the threshold.
                threshold = np.float32(top - 2.0 * bound - 2.0**-23 * abs(top))
                # Without a branch: where a row's best entry lies cannot be foretold.
                words, several, place = 0, zero, 0
                for column in range(0, columns, SCAN):
                    mask = hits(scores, base + column, offsets, 0, threshold)
                    words += mask != zero
                    several |= mask & (mask - one)
                    place = column + trailing_zeros(mask) if mask != zero else place
                places[i], thresholds[i] = place, threshold
                alone[i] = words == 1 and several == zero and lengths[i] < FAR
            for i in range(tile, last):
                best, smallest = places[i], np.inf
                if alone[i]:
                    smallest = key(0, raw, i, 0.0, rows, best, 0.0)
                    measured += 1
                elif lengths[i] < FAR:
                    best = -1
                    base = (i - tile) * columns
                    for column in range(0, columns, SCAN):
                        mask = hits(scores, base + column, offsets, 0, thresholds[i])
                        while mask != zero:
                            k = column + trailing_zeros(mask)
                            mask &= mask - one
                            if k < rows.shape[0]:
                                # Scores only select candidates; the canonical key decides.
                                value = key(0, raw, i, 0.0, rows, k, 0.0)
                                measured += 1
                                if best < 0 or value < smallest:
                                    smallest, best = value, k
                else:
                    best, smallest = 0, key(0, raw, i, 0.0, rows, 0, 0.0)
                    for k in range(1, rows.shape[0]):
                        value = key(0, raw, i, 0.0, rows, k, 0.0)
                        if value < smallest:
                            smallest, best = value, k
                    measured += rows.shape[0]
                labels[start + i], distances[start + i] = best, smallest
    return measured


def suits(table: VectorTable) -> bool:
    """Return whether a table is one of squared distances, and small enough for this way."""
    return table.metric == L2 and table.dim <= MAX_WIDTH and len(table) <= MAX_ENTRIES


def _panels(table: VectorTable) -> Operand:
    entries = table.scaled[:, : table.dim].reshape(-1, PANEL, table.dim)
    data = aligned((len(entries), table.dim, PANEL), np.float32)
    # (panels, dim, PANEL): one load reads the same column of all entries of a panel.
    data[:] = entries.transpose(0, 2, 1)
    return Operand(data, 0.0)


def search_narrow(
    queries: Rows, table: VectorTable, *, threads: int | None, name: str
) -> SearchResult:
    """Find the entry nearest to each row ``(n, dim)``, ties to the lowest index."""
    labels, keys = np.empty((len(queries), 1), np.int64), np.empty((len(queries), 1))
    operand = table.operand("narrow", _panels)
    assert operand is not None
    width = table.rows.shape[1]
    check_rows(queries, name=name)

    size = max(len(queries), 1) if threads == 1 else BLOCK

    def work(start: int) -> int:
        span = slice(start, start + size)
        x = float32_rows(queries[span], name=name, multiple=1)
        raw, y = (aligned((STEP_ROWS, width), np.float32) for _ in range(2))
        raw[:], y[:] = 0.0, 0.0
        measured = nearest_narrow(
            x, table.rows, operand.data, table.offsets, table.center, 2.0**-table.exponent,
            table.radius, raw, y, aligned((TILE, len(table.offsets)), np.float32),
            labels[span, 0], keys[span, 0],
        )  # fmt: skip
        return int(measured)

    measured = sum(map_blocks(work, range(0, len(queries), size), threads=threads))
    return SearchResult(table.original[labels], keys, measured)
