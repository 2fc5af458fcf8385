"""Vector instructions for the kernels, written as portable LLVM IR with a fixed order of sums.

numba vectorizes a reduction only when it may reorder it, and the canonical distance must not be
reordered: its value is the same on every chip because the lanes and the order they are added in
are written down here. LLVM splits the wide vectors where a chip has narrower ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from semid.quantization.engine.plain import LANES, SCAN

I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
F64 = ir.DoubleType()


def data_pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """Return an ``i8*`` to element ``offset`` of a C-contiguous array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), ir.IntType(8).as_pointer())


def load(builder: Any, pointer: Any, kind: Any, byte_offset: Any = None, *, align: int = 1) -> Any:
    """Load a value of type ``kind`` from ``pointer`` plus ``byte_offset``, any alignment."""
    if byte_offset is not None:
        pointer = builder.gep(pointer, [byte_offset])
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)


def store(builder: Any, value: Any, pointer: Any, byte_offset: Any) -> None:
    """Store a value at ``pointer`` plus ``byte_offset``, any alignment."""
    place = builder.gep(pointer, [byte_offset])
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=1)


def spread(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector that holds one value in all lanes."""
    single = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, I32(0)
    )
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(single, single, zeros)


def call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Emit a call of the LLVM intrinsic ``name``."""
    kind = ir.FunctionType(result, [value.type for value in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def fold(builder: Any, vector: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine lanes that lie half the width apart until one is left."""
    while lanes > 1:
        lanes //= 2
        low, high = (
            ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes)))
            for first in (0, lanes)
        )
        vector = combine(
            builder.shuffle_vector(vector, vector, low),
            builder.shuffle_vector(vector, vector, high),
        )
    return builder.extract_element(vector, I32(0))


def _sum_of(term: Callable[[Any, Any, Any], Any]) -> Any:
    """Build ``(a, a_offset, b, b_offset, blocks) -> float64``, a sum in the canonical order.

    Lane ``l`` adds elements ``l, l + 16, l + 32, ...`` in turn; then lanes 8 apart are added,
    then 4, 2 and 1 apart. Every step is a separate IEEE float64 operation.
    """

    def build(typing: Any, a: Any, a_offset: Any, b: Any, b_offset: Any, blocks: Any) -> Any:
        signature = types.float64(a, types.int64, b, types.int64, types.int64)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            wide = ir.VectorType(F64, LANES)
            narrow = ir.VectorType(F32, LANES)
            a_start = data_pointer(context, builder, signature.args[0], args[0], args[1])
            b_start = data_pointer(context, builder, signature.args[2], args[2], args[3])
            total = cgutils.alloca_once_value(builder, ir.Constant(wide, None))
            with cgutils.for_range(builder, args[4]) as loop:
                step = builder.mul(loop.index, I64(4 * LANES))
                # float32 fits in float64 exactly, so only the operations below round.
                x = builder.fpext(load(builder, a_start, narrow, step), wide)
                y = builder.fpext(load(builder, b_start, narrow, step), wide)
                builder.store(builder.fadd(builder.load(total), term(builder, x, y)), total)
            return fold(builder, builder.load(total), LANES, builder.fadd)

        return signature, generate

    return build


def _square(builder: Any, x: Any, y: Any) -> Any:
    difference = builder.fsub(x, y)
    return builder.fmul(difference, difference)


square_distance = intrinsic(_sum_of(_square))
dot = intrinsic(_sum_of(lambda builder, x, y: builder.fmul(x, y)))


def _score_loader(
    context: Any, builder: Any, signature: Any, args: Any, lanes: int
) -> Callable[[Any], Any]:
    """Return a function that loads ``lanes`` scores at an element index.

    int32 and float32 scores are read as they are. uint16 holds bfloat16 products: they are
    widened and the float32 offsets (same column index, no row) are subtracted.
    """
    scores_type = signature.args[0]
    scores = data_pointer(context, builder, scores_type, args[0], args[1])
    if scores_type.dtype == types.uint16:
        offsets = data_pointer(context, builder, signature.args[2], args[2], args[3])
    bits = scores_type.dtype.bitwidth

    def read(index: Any) -> Any:
        at = builder.mul(index, I64(bits // 8))
        if scores_type.dtype == types.int32:
            return load(builder, scores, ir.VectorType(I32, lanes), at)
        if scores_type.dtype == types.float32:
            return load(builder, scores, ir.VectorType(F32, lanes), at)
        raw = load(builder, scores, ir.VectorType(ir.IntType(16), lanes), at)
        # A bfloat16 number is the upper half of a float32.
        wide = builder.zext(raw, ir.VectorType(I32, lanes))
        shift = ir.Constant(ir.VectorType(I32, lanes), [16] * lanes)
        value = builder.bitcast(builder.shl(wide, shift), ir.VectorType(F32, lanes))
        offset = load(builder, offsets, ir.VectorType(F32, lanes), builder.mul(index, I64(4)))
        return builder.fsub(value, offset)

    return read


def _score_type(scores: Any) -> Any:
    return types.int32 if scores.dtype == types.int32 else types.float32


@intrinsic
def maximum(typing: Any, scores: Any, offset: Any, offsets: Any, first: Any, count: Any) -> Any:
    """Largest of ``count`` (a positive multiple of `SCAN`) scores from element ``offset`` on."""
    signature = _score_type(scores)(scores, types.int64, offsets, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        read = _score_loader(context, builder, signature, args, SCAN)
        integers = signature.return_type == types.int32

        def larger(a: Any, b: Any) -> Any:
            if integers:
                return builder.select(builder.icmp_signed(">", a, b), a, b)
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        best = cgutils.alloca_once_value(builder, read(I64(0)))
        with cgutils.for_range(builder, builder.udiv(args[4], I64(SCAN))) as loop:
            value = read(builder.mul(loop.index, I64(SCAN)))
            builder.store(larger(value, builder.load(best)), best)
        return fold(builder, builder.load(best), SCAN, larger)

    return signature, generate


@intrinsic
def lane_maxima(typing: Any, scores: Any, count: Any, lanes: Any) -> Any:
    """Write to ``lanes[j]`` the largest of the float32 ``scores[j::SCAN]``, ``j`` below `SCAN`.

    ``count``, a positive multiple of `SCAN`, of the scores are read.
    """
    signature = types.void(scores, types.int64, lanes)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds, vector = signature.args, ir.VectorType(F32, SCAN)
        start, out = (data_pointer(context, builder, kinds[at], args[at], I64(0)) for at in (0, 2))
        best = cgutils.alloca_once_value(builder, load(builder, start, vector))
        with cgutils.for_range(builder, builder.udiv(args[1], I64(SCAN))) as loop:
            value = load(builder, start, vector, builder.mul(loop.index, I64(4 * SCAN)))
            top = builder.load(best)
            larger = builder.fcmp_ordered(">", value, top)
            builder.store(builder.select(larger, value, top), best)
        place = builder.bitcast(out, vector.as_pointer())
        builder.store(builder.load(best), place, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def hits(typing: Any, scores: Any, offset: Any, offsets: Any, first: Any, threshold: Any) -> Any:
    """Bit ``i`` of the result: is score ``offset + i`` at least ``threshold`` (`SCAN` scores)."""
    signature = types.uint64(scores, types.int64, offsets, types.int64, _score_type(scores))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _score_loader(context, builder, signature, args, SCAN)(I64(0))
        limit = spread(builder, args[4], SCAN)
        if signature.args[4] == types.int32:
            mask = builder.icmp_signed(">=", values, limit)
        else:
            mask = builder.fcmp_ordered(">=", values, limit)
        # `SCAN` is 64: one bit per score makes one word.
        return builder.bitcast(mask, I64)

    return signature, generate


@intrinsic
def score(typing: Any, scores: Any, offset: Any, offsets: Any, first: Any) -> Any:
    """One score, as `maximum` and `hits` see it."""
    signature = _score_type(scores)(scores, types.int64, offsets, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _score_loader(context, builder, signature, args, 1)(I64(0))
        return builder.extract_element(value, I32(0))

    return signature, generate


@intrinsic
def trailing_zeros(typing: Any, value: Any) -> Any:
    """Index of the lowest set bit of a non-zero uint64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


# Bounds of rows and groups of codewords (`bounded`) -----------------------------------------------

WIDE = ir.VectorType(F32, LANES)
SHRINK = 1.0 - 2.0**-20
"""Factor of a bound that is lowered: more than float32 rounds."""


@intrinsic
def center_row(typing: Any, x: Any, at: Any, center: Any, scale: Any, y: Any, blocks: Any) -> Any:
    """Write ``(x - center) scale`` of a row to ``y``; return the sum of its squares.

    ``x`` and ``y`` are read and written from element ``at`` on, ``blocks`` times `LANES` elements;
    ``center`` is as long as the row.
    """
    signature = types.float32(x, types.int64, center, types.float32, y, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, middle, out = (
            data_pointer(context, builder, signature.args[at], args[at], offset)
            for at, offset in ((0, args[1]), (2, I64(0)), (4, args[1]))
        )
        factor = spread(builder, args[3], LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(WIDE, None))
        with cgutils.for_range(builder, args[5]) as loop:
            offset = builder.mul(loop.index, I64(4 * LANES))
            apart = builder.fsub(
                load(builder, source, WIDE, offset), load(builder, middle, WIDE, offset)
            )
            scaled = builder.fmul(apart, factor)
            store(builder, scaled, out, offset)
            builder.store(builder.fadd(builder.load(total), builder.fmul(scaled, scaled)), total)
        return fold(builder, builder.load(total), LANES, builder.fadd)

    return signature, generate


@intrinsic
def lower_bounds(typing: Any, lower: Any, at: Any, moves: Any, first: Any, reach: Any) -> Any:
    """Lower `LANES` bounds from element ``at`` on by the moves from ``first`` on.

    Bit ``i`` of the result is 0 where the bound is still above ``reach``.
    """
    signature = types.uint64(lower, types.int64, moves, types.int64, types.float32)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bounds = data_pointer(context, builder, signature.args[0], args[0], args[1])
        move = data_pointer(context, builder, signature.args[2], args[2], args[3])
        # The triangle inequality; the factor covers the rounding of the difference.
        kept = builder.fmul(load(builder, bounds, WIDE), ir.Constant(WIDE, [SHRINK] * LANES))
        left = builder.fsub(kept, load(builder, move, WIDE))
        store(builder, left, bounds, I64(0))
        return _bits(builder, builder.fcmp_unordered("<=", left, spread(builder, args[4], LANES)))

    return signature, generate


def _bits(builder: Any, mask: Any) -> Any:
    return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), I64)


def others(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Load `LANES` scores from element ``args[1]`` on, with minus infinity in lane ``args[2]``."""
    scores = data_pointer(context, builder, signature.args[0], args[0], args[1])
    numbers = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
    lane = spread(builder, builder.trunc(args[2], I32), LANES)
    own = builder.icmp_signed("==", lane, numbers)
    return builder.select(
        own, ir.Constant(WIDE, [float("-inf")] * LANES), load(builder, scores, WIDE)
    )


def larger(builder: Any, a: Any, b: Any) -> Any:
    """Emit the larger of two vectors of floats, lane by lane."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def best_other(typing: Any, scores: Any, at: Any, own: Any) -> Any:
    """Largest of `LANES` scores from element ``at`` on, but for lane ``own``, which may be none."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = others(context, builder, signature, args)
        return fold(builder, values, LANES, partial(larger, builder))

    return types.float32(scores, types.int64, types.int64), generate


@intrinsic
def other_hits(typing: Any, scores: Any, at: Any, own: Any, threshold: Any) -> Any:
    """Bits: which of `LANES` scores are at least ``threshold``; see `best_other`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = others(context, builder, signature, args)
        limit = spread(builder, args[3], LANES)
        return _bits(builder, builder.fcmp_ordered(">=", values, limit))

    return types.uint64(scores, types.int64, types.int64, types.float32), generate
