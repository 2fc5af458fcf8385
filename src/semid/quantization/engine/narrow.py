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
from semid.quantization.engine.vector import I64 as INTEGER
from semid.quantization.engine.vector import (
    data_pointer,
    dot,
    hits,
    load,
    maximum,
    trailing_zeros,
)
from semid.quantization.threads import map_blocks

MAX_WIDTH = 64
"""Widest rows that take this way."""
MAX_ENTRIES = 1024
"""Largest table: its transposed copy and the scores of a tile must stay in the second cache."""
TILE, PANEL = 6, 16
"""Rows and entries scored together: with AVX2 their sums take 12 of 16 registers."""
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


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def nearest_narrow(
    x: F32, rows: F32, panels: F32, offsets: F32, center: F32, scale: float, radius: float,
    raw: F32, tile: F32, scores: F32, labels: I64, distances: F64,
) -> int:  # fmt: skip
    """Find the entry nearest to each row by the canonical key, ties to the lowest index.

    Shapes: ``x`` ``(n, dim)``, ``rows`` ``(entries, width)``, ``panels``
    ``(columns / PANEL, dim, PANEL)`` scaled entries, ``offsets`` ``(columns,)``; ``raw`` and
    ``tile`` ``(TILE, width)`` and ``scores`` ``(TILE, columns)`` are scratch; ``labels`` and
    ``distances`` ``(n,)`` are written. Returns the number of pairs measured.
    """
    dim, columns, width = panels.shape[1], len(offsets), rows.shape[1]
    raw[:], tile[:] = 0, 0  # columns beyond the rows' own
    numbers = np.arange(TILE)
    measured = 0
    factor = (width + 40.0) * 2.0**-23 * radius
    for first in range(0, x.shape[0], TILE):
        count = min(TILE, x.shape[0] - first)
        # The last tile repeats its last row.
        for i in range(TILE):
            source = first + min(i, count - 1)
            for d in range(dim):
                raw[i, d] = x[source, d]
                tile[i, d] = (x[source, d] - center[d]) * np.float32(scale)
        for panel in range(panels.shape[0]):
            score_tile(tile, numbers, 0, panels, panel, offsets, dim, scores, PANEL * panel)
        for i in range(count):
            length = np.sqrt(dot(tile, i * width, tile, i * width, width // 16)) * 1.000001
            row = first + i
            if not length < FAR:
                best, smallest = 0, key(0, raw, i, 0.0, rows, 0, 0.0)
                for k in range(1, rows.shape[0]):
                    value = key(0, raw, i, 0.0, rows, k, 0.0)
                    if value < smallest:
                        smallest, best = value, k
                measured += rows.shape[0]
                labels[row], distances[row] = best, smallest
                continue
            # Rounding of the row, of the entries and of the sums; then what canonical sums round.
            bound = factor * (length + radius)
            bound += (width + 64.0) * 2.0**-52 * (length + radius) ** 2 + 2.0**-60
            base = i * columns
            top = maximum(scores, base, offsets, 0, columns)
            # Both the best score and a rival's may be off by the bound; the last term covers the
            # rounding of the threshold.
            threshold = np.float32(top - 2.0 * bound - 2.0**-23 * abs(top))
            best, smallest = -1, np.inf
            for column in range(0, columns, SCAN):
                mask = hits(scores, base + column, offsets, 0, threshold)
                while mask != 0:
                    k = column + trailing_zeros(mask)
                    mask &= mask - np.uint64(1)
                    if k < rows.shape[0]:
                        # Scores only select candidates; the canonical key decides among them.
                        value = key(0, raw, i, 0.0, rows, k, 0.0)
                        measured += 1
                        if best < 0 or value < smallest:
                            smallest, best = value, k
            labels[row], distances[row] = best, smallest
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
        measured = nearest_narrow(
            x, table.rows, operand.data, table.offsets, table.center, 2.0**-table.exponent,
            table.radius, aligned((TILE, width), np.float32), aligned((TILE, width), np.float32),
            aligned((TILE, len(table.offsets)), np.float32), labels[span, 0], keys[span, 0],
        )  # fmt: skip
        return int(measured)

    measured = sum(map_blocks(work, range(0, len(queries), size), threads=threads))
    return SearchResult(table.original[labels], keys, measured)
