"""Integer products for x86 chips without VNNI: `vpmaddwd`, 16 bits times 16 bits into 32.

An instruction multiplies 16 pairs and adds neighbors, at the rate of a float32 FMA of 8 on chips
from Zen 2 and Skylake on: twice the multiply-adds a cycle, and exact.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from semid.quantization.engine.screen import F32, I32, I64, scan_best, scan_many
from semid.quantization.engine.vector import data_pointer, load
from semid.quantization.engine.x86 import LINE, call, shape

__all__ = ["AVX2_GROUP", "avx2_best", "avx2_many"]

ROWS = 4
"""Rows a block: with 16 entries their sums fill half of the 16 registers."""
AVX2_GROUP = 128
"""Entries a group: 32 rows of scores take half of a first-level cache of 32 KB."""

INT32 = ir.IntType(32)
INT64 = ir.IntType(64)


@intrinsic
def avx2_block(
    typing: Any, rows: Any, row: Any, panels: Any, panel: Any, start: Any, column: Any, scores: Any,
    to: Any,
) -> Any:  # fmt: skip
    """Scores of 4 rows and the 16 entries of one panel; arguments as in `x86.avx512_block`.

    ``rows`` and ``panels`` are int16; rows ``row % 32`` on of ``scores`` are written.
    """
    signature = types.void(
        rows, types.int64, panels, types.int64, start, types.int64, scores, types.int64
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums = ir.VectorType(INT32, 8)
        pairs = ir.VectorType(ir.IntType(16), 16)
        zeros = ir.Constant(sums, [0] * 8)
        width = builder.extract_value(shape(context, builder, signature, args, 0), 1)
        apart = builder.mul(width, INT64(2))
        columns = builder.extract_value(shape(context, builder, signature, args, 6), 1)
        left = data_pointer(
            context, builder, signature.args[0], args[0], builder.mul(args[1], width)
        )
        panel_size = builder.extract_value(shape(context, builder, signature, args, 2), 1)
        right = data_pointer(
            context, builder, signature.args[2], args[2], builder.mul(args[3], panel_size)
        )
        first = data_pointer(context, builder, signature.args[4], args[4], args[5])
        local = builder.mul(builder.urem(args[1], INT64(32)), columns)
        out = data_pointer(
            context, builder, signature.args[6], args[6], builder.add(local, args[7])
        )
        totals = [
            [
                cgutils.alloca_once_value(builder, load(builder, first, sums, INT64(32 * p)))
                for p in range(2)
            ]
            for _ in range(ROWS)
        ]
        with cgutils.for_range(builder, builder.udiv(panel_size, INT64(32))) as loop:
            deep = builder.mul(loop.index, INT64(LINE))
            along = builder.mul(loop.index, INT64(4))
            lines = [
                load(builder, right, pairs, builder.add(deep, INT64(32 * p))) for p in range(2)
            ]
            for r in range(ROWS):
                at = builder.add(along, builder.mul(apart, INT64(r)))
                word = load(builder, left, INT32, at)
                single = builder.insert_element(ir.Constant(sums, ir.Undefined), word, INT32(0))
                spread = builder.bitcast(builder.shuffle_vector(single, single, zeros), pairs)
                for p in range(2):
                    name = "llvm.x86.avx2.pmadd.wd"
                    product = call(builder, name, sums, [lines[p], spread])
                    builder.store(builder.add(builder.load(totals[r][p]), product), totals[r][p])
        for r in range(ROWS):
            for p in range(2):
                at = builder.add(builder.mul(columns, INT64(4 * r)), INT64(32 * p))
                place = builder.bitcast(builder.gep(out, [at]), sums.as_pointer())
                builder.store(builder.load(totals[r][p]), place, align=1)
        return context.get_dummy_value()

    return signature, generate


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def avx2_best(
    a: Any, panels: Any, start: Any, scores: Any, rows: int, offsets: F32,
    margin: Any, top: Any, counts: I64, candidates: I32, kept: Any,
) -> None:  # fmt: skip
    """Score and scan all rows and entries; see `fused`."""
    columns = start.shape[1]
    for group in range(0, columns, AVX2_GROUP):
        size = min(AVX2_GROUP, columns - group)
        for row in range(0, rows, 32):
            line = (row // 32) % start.shape[0]
            for column in range(0, size, 16):
                for part in range(row, row + 32, ROWS):
                    avx2_block(
                        a, part, panels, (group + column) // 16, start,
                        line * columns + group + column, scores, column,
                    )  # fmt: skip
            scan_best(
                scores, min(32, rows - row), size, group, offsets, margin, top, counts,
                candidates, kept, row,
            )  # fmt: skip


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def avx2_many(
    a: Any, panels: Any, start: Any, scores: Any, rows: int, offsets: F32,
    margin: Any, top: Any, counts: I64, candidates: I32, kept: Any, k: int, scratch: Any,
) -> None:  # fmt: skip
    """`avx2_best` for the ``k`` best."""
    columns = start.shape[1]
    for group in range(0, columns, AVX2_GROUP):
        size = min(AVX2_GROUP, columns - group)
        for row in range(0, rows, 32):
            line = (row // 32) % start.shape[0]
            for column in range(0, size, 16):
                for part in range(row, row + 32, ROWS):
                    avx2_block(
                        a, part, panels, (group + column) // 16, start,
                        line * columns + group + column, scores, column,
                    )  # fmt: skip
            scan_many(
                scores, min(32, rows - row), size, group, offsets, margin, top, counts,
                candidates, kept, row, k, scratch,
            )  # fmt: skip
