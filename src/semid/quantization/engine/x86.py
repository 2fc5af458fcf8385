"""Tile and dot-product instructions of x86 for numba, and whether this machine has them.

A table is packed in panels of 16 entries: for each 4 bytes of a row (4 int8 or 2 bfloat16), the
16 entries' 4 bytes side by side. Such a line of 64 bytes is one row of an AMX tile and one
AVX-512 register, so both instruction sets read the same copy.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from semid.quantization.engine.vector import F32, I32, I64, data_pointer, load

__all__ = [
    "LINE",
    "amx_begin",
    "amx_block",
    "amx_end",
    "avx512_block",
    "call",
    "missing_features",
    "pitch",
    "shape",
]

I8 = ir.IntType(8)
BYTES = I8.as_pointer()
VOID = ir.VoidType()
LINE = 64


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """The LLVM type ``bfloat``, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@functools.cache
def host_features() -> frozenset[str]:
    """Return the CPU features LLVM sees on this machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    found = llvmlite.binding.get_host_cpu_features()
    return frozenset(name for name, there in found.items() if there)


@functools.cache
def _tile_permission() -> bool:
    """Ask Linux for the tile registers; granted once for the whole process."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None).syscall
        # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
        return bool(call(ctypes.c_long(158), ctypes.c_long(0x1023), ctypes.c_long(18)) == 0)
    except (AttributeError, OSError):
        return False


def missing_features(*needed: str) -> str | None:
    """Name what this machine lacks, or None; asks for the tile registers where AMX is needed."""
    lacking = [name for name in needed if name not in host_features()]
    if lacking:
        return "the chip has no " + ", ".join(lacking)
    if any(name.startswith("amx") for name in needed) and not _tile_permission():
        return "the system does not grant the AMX tile registers"
    return None


def call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Emit a call of the LLVM intrinsic ``name``."""
    kind = ir.FunctionType(result, [value.type for value in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for a line of memory; an address past the end of the table does no harm."""
    call(builder, "llvm.prefetch.p0", VOID, [pointer, I32(0), I32(3), I32(1)])


def pitch(width: int, size: int) -> int:
    """Return how many elements apart rows should lie: an odd number of cache lines.

    With a power of two the 16 rows of a tile share a few sets of the cache and push each other out.
    """
    lines = -(-width * size // LINE)
    return (lines + 1 - lines % 2) * LINE // size


@intrinsic
def amx_begin(typing: Any, saved: Any) -> Any:
    """Keep the thread's tile configuration in ``saved`` (64 bytes) and set ours: 8 full tiles."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store = data_pointer(context, builder, signature.args[0], args[0], I64(0))
        call(builder, "llvm.x86.sttilecfg", VOID, [store])
        layout = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
        constant = ir.Constant(ir.ArrayType(I8, LINE), layout)
        slot = builder.bitcast(cgutils.alloca_once_value(builder, constant), BYTES)
        call(builder, "llvm.x86.ldtilecfg", VOID, [slot])
        return context.get_dummy_value()

    return types.void(saved), generate


@intrinsic
def amx_end(typing: Any, saved: Any) -> Any:
    """Give the thread its old tile configuration back (oneDNN may rely on it)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store = data_pointer(context, builder, signature.args[0], args[0], I64(0))
        # A configuration that was never set reads as zeros, and loading zeros releases the tiles.
        call(builder, "llvm.x86.ldtilecfg", VOID, [store])
        return context.get_dummy_value()

    return types.void(saved), generate


def _offset(builder: Any, pointer: Any, distance: Any) -> Any:
    return builder.gep(pointer, [distance])


@intrinsic
def amx_block(
    typing: Any, rows: Any, row: Any, panels: Any, panel: Any, start: Any, column: Any, scores: Any,
    to: Any,
) -> Any:  # fmt: skip
    """Scores of 32 rows and 32 entries by tiles: ``start[column + j] + rows[row + i] . entry j``.

    Args:
        typing: numba's, not part of a call.
        rows: ``(n, >= width)`` int8, or uint16 bit patterns of bfloat16; see `pitch`.
        row: first row.
        panels: ``(panels, width * 16)`` packed table, uint8 (codes + 128) or uint16.
        panel: first of two panels.
        start: what the sums start from, int32 or float32.
        column: first element of ``start``.
        scores: ``(32, columns)`` result, of the type of ``start``.
        to: first column of ``scores`` to write.
    """
    signature = types.void(
        rows, types.int64, panels, types.int64, start, types.int64, scores, types.int64
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integers = signature.args[0].dtype == types.int8
        size = 1 if integers else 2
        name = "llvm.x86.tdpbsud" if integers else "llvm.x86.tdpbf16ps"
        width = builder.extract_value(shape(context, builder, signature, args, 0), 1)
        apart = builder.mul(width, I64(size))
        columns = builder.extract_value(shape(context, builder, signature, args, 6), 1)
        out_pitch = builder.mul(columns, I64(4))
        left = data_pointer(
            context, builder, signature.args[0], args[0], builder.mul(args[1], width)
        )
        panel_size = builder.extract_value(shape(context, builder, signature, args, 2), 1)
        depth = builder.udiv(builder.mul(panel_size, I64(size)), I64(16))  # bytes of one entry
        right = data_pointer(
            context, builder, signature.args[2], args[2], builder.mul(args[3], panel_size)
        )
        first = data_pointer(context, builder, signature.args[4], args[4], args[5])
        out = data_pointer(context, builder, signature.args[6], args[6], args[7])

        def tile_load(tile: int, pointer: Any, stride: Any) -> None:
            call(builder, "llvm.x86.tileloadd64", VOID, [I8(tile), pointer, stride])

        for tile in range(4):
            tile_load(tile, _offset(builder, first, I64(LINE * (tile % 2))), I64(0))
        lower = _offset(builder, left, builder.mul(apart, I64(16)))
        second = _offset(builder, right, builder.mul(panel_size, I64(size)))
        two_panels = I64(LINE * 32)
        with cgutils.for_range(builder, builder.udiv(depth, I64(LINE))) as loop:
            along = builder.mul(loop.index, I64(LINE))
            deep = builder.mul(loop.index, I64(LINE * 16))
            # The hardware prefetcher does not see through tile loads: ask for the table's lines
            # that the next block reads (the panels lie one after the other).
            for base in (right, second):
                ahead = _offset(builder, _offset(builder, base, deep), two_panels)
                for part in range(16):
                    _prefetch(builder, _offset(builder, ahead, I64(LINE * part)))
            tile_load(4, _offset(builder, left, along), apart)
            tile_load(6, _offset(builder, right, deep), I64(LINE))
            call(builder, name, VOID, [I8(0), I8(4), I8(6)])
            tile_load(7, _offset(builder, second, deep), I64(LINE))
            call(builder, name, VOID, [I8(1), I8(4), I8(7)])
            tile_load(5, _offset(builder, lower, along), apart)
            call(builder, name, VOID, [I8(2), I8(5), I8(6)])
            call(builder, name, VOID, [I8(3), I8(5), I8(7)])
        for tile in range(4):
            place = _offset(builder, out, I64(LINE * (tile % 2)))
            if tile >= 2:
                place = _offset(builder, place, builder.mul(out_pitch, I64(16)))
            call(builder, "llvm.x86.tilestored64", VOID, [I8(tile), place, out_pitch])
        return context.get_dummy_value()

    return signature, generate


def shape(context: Any, builder: Any, signature: Any, args: Any, index: int) -> Any:
    """Return the shape tuple of the array that is argument ``index``."""
    array = context.make_array(signature.args[index])(context, builder, args[index])
    return array.shape


@intrinsic
def avx512_block(
    typing: Any, rows: Any, row: Any, panels: Any, panel: Any, start: Any, column: Any, scores: Any,
    to: Any,
) -> Any:  # fmt: skip
    """Scores of 4 rows and 64 entries by VNNI or AVX512-BF16; arguments as in `amx_block`.

    ``panel`` is the first of four; rows ``row % 32`` on of ``scores`` are written.
    """
    signature = types.void(
        rows, types.int64, panels, types.int64, start, types.int64, scores, types.int64
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integers = signature.args[0].dtype == types.int8
        size = 1 if integers else 2
        line = ir.VectorType(I32, 16)
        sums = line if integers else ir.VectorType(F32, 16)
        pairs = ir.VectorType(_BFloat(), 32)
        width = builder.extract_value(shape(context, builder, signature, args, 0), 1)
        apart = builder.mul(width, I64(size))
        columns = builder.extract_value(shape(context, builder, signature, args, 6), 1)
        left = data_pointer(
            context, builder, signature.args[0], args[0], builder.mul(args[1], width)
        )
        panel_size = builder.extract_value(shape(context, builder, signature, args, 2), 1)
        depth = builder.udiv(builder.mul(panel_size, I64(size)), I64(16))  # bytes of one entry
        right = data_pointer(
            context, builder, signature.args[2], args[2], builder.mul(args[3], panel_size)
        )
        first = data_pointer(context, builder, signature.args[4], args[4], args[5])
        local = builder.mul(builder.urem(args[1], I64(32)), columns)
        out = data_pointer(
            context, builder, signature.args[6], args[6], builder.add(local, args[7])
        )
        totals = [
            [
                cgutils.alloca_once_value(builder, load(builder, first, sums, I64(LINE * p)))
                for p in range(4)
            ]
            for _ in range(4)
        ]
        panel_bytes = builder.mul(panel_size, I64(size))
        zeros = ir.Constant(ir.VectorType(I32, 16), [0] * 16)
        with cgutils.for_range(builder, builder.udiv(depth, I64(4))) as loop:
            deep = builder.mul(loop.index, I64(LINE))
            along = builder.mul(loop.index, I64(4))
            lines = []
            for p in range(4):
                at = builder.add(deep, builder.mul(panel_bytes, I64(p)))
                lines.append(load(builder, right, line, at))
            for r in range(4):
                word = load(builder, left, I32, builder.add(along, builder.mul(apart, I64(r))))
                single = builder.insert_element(ir.Constant(line, ir.Undefined), word, I32(0))
                spread = builder.shuffle_vector(single, single, zeros)
                for p in range(4):
                    total = builder.load(totals[r][p])
                    if integers:  # the unsigned operand comes first
                        name = "llvm.x86.avx512.vpdpbusd.512"
                        value = _vpdpbusd(builder, name, total, lines[p], spread)
                    else:
                        name = "llvm.x86.avx512bf16.dpbf16ps.512"
                        operands = [builder.bitcast(v, pairs) for v in (lines[p], spread)]
                        value = call(builder, name, sums, [total, *operands])
                    builder.store(value, totals[r][p])
        for r in range(4):
            for p in range(4):
                at = builder.add(builder.mul(columns, I64(4 * r)), I64(LINE * p))
                place = builder.bitcast(_offset(builder, out, at), sums.as_pointer())
                builder.store(builder.load(totals[r][p]), place, align=1)
        return context.get_dummy_value()

    return signature, generate


def _vpdpbusd(builder: Any, name: str, total: Any, unsigned: Any, signed: Any) -> Any:
    """Emit the instruction; LLVM 22 types its operands as bytes, earlier ones as int32."""
    if llvmlite.binding.llvm_version_info[0] >= 22:
        packed = ir.VectorType(I8, LINE)
        unsigned, signed = builder.bitcast(unsigned, packed), builder.bitcast(signed, packed)
    return call(builder, name, total.type, [total, unsigned, signed])
