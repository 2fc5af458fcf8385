"""What x86 chips do in a sweep (`sweep`): their matrix and dot-product instructions, for numba.

A table is packed in panels of 16 entries: for each 4 bytes of a row (4 int8, or 2 int16 or
bfloat16), the 16 entries' 4 bytes side by side. Such a line of 64 bytes is one row of an AMX tile,
one AVX-512 register or two AVX2 registers, so all instruction sets read the same copy.

A chip is an empty named tuple: its type selects the code that numba compiles, so a chip without an
instruction never sees a function that holds it.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from semid.quantization.engine.vector import F32, I32, I64, call, data_pointer, load

I8 = ir.IntType(8)
I16 = ir.IntType(16)
BYTES = I8.as_pointer()
VOID = ir.VoidType()
LINE = 64
"""Bytes of a cache line."""
ROW_TILE = 32
"""Rows of a sweep's tile: their scores of a group stay in cache until they are scanned."""


class AMX(NamedTuple):
    """Tile registers: int8 and bfloat16."""


class AVX512(NamedTuple):
    """AVX-512 VNNI (int8) and AVX-512 BF16."""


class AVX2(NamedTuple):
    """`vpmaddwd`: 16 products of int16 per instruction, added in pairs into int32.

    That is the rate of a float32 FMA of 8 on chips from Zen 2 and Skylake on: twice the
    multiply-adds per cycle, and exact.
    """


class Block(NamedTuple):
    """Scores that one `score_block` computes; `ROW_TILE` is a multiple of its rows."""

    rows: int
    columns: int
    group: int  # entries whose scores are scanned together


BLOCKS = {
    AMX: Block(rows=32, columns=32, group=256),
    # 32 rows of 256 scores take 32 KB, 256 packed entries of 512 bytes 128 KB.
    AVX512: Block(rows=4, columns=64, group=256),
    # The sums of 4 rows and 16 entries fill half of the 16 registers; 32 rows of 128 scores take
    # half of a first-level cache of 32 KB.
    AVX2: Block(rows=4, columns=16, group=128),
}


def _constant(field: str) -> Any:
    """Build ``(chip) -> int64``: a field of the chip's `Block`, known when it is compiled."""

    def build(typing: Any, chip: Any) -> Any:
        value = getattr(BLOCKS[chip.instance_class], field)
        return types.int64(chip), lambda context, builder, signature, args: I64(value)

    return intrinsic(build)


block_rows = _constant("rows")
block_columns = _constant("columns")
group_columns = _constant("group")


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """The LLVM type ``bfloat``, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


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
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    features = llvmlite.binding.get_host_cpu_features() if x86 else {}
    lacking = [name for name in needed if not features.get(name, False)]
    if lacking:
        return "the chip has no " + ", ".join(lacking)
    if any(name.startswith("amx") for name in needed) and not _tile_permission():
        return "the system does not grant the AMX tile registers"
    return None


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for a line of memory; an address past the end of the table does no harm."""
    call(builder, "llvm.prefetch.p0", VOID, [pointer, I32(0), I32(3), I32(1)])


def _offset(builder: Any, pointer: Any, distance: Any) -> Any:
    return builder.gep(pointer, [distance])


def pitch(width: int, size: int) -> int:
    """Return how many elements apart rows should lie: an odd number of cache lines.

    With a power of two the 16 rows of a tile share a few sets of the cache and push each other out.
    """
    lines = -(-width * size // LINE)
    return (lines + 1 - lines % 2) * LINE // size


@intrinsic
def begin(typing: Any, chip: Any, saved: Any) -> Any:
    """Start a sweep. AMX: keep the thread's tile configuration in ``saved`` and set 8 full tiles.

    ``saved`` is ``(64,)`` uint8 for AMX and None for other chips.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if chip.instance_class is AMX:
            store = data_pointer(context, builder, signature.args[1], args[1], I64(0))
            call(builder, "llvm.x86.sttilecfg", VOID, [store])
            layout = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
            constant = ir.Constant(ir.ArrayType(I8, LINE), layout)
            slot = builder.bitcast(cgutils.alloca_once_value(builder, constant), BYTES)
            call(builder, "llvm.x86.ldtilecfg", VOID, [slot])
        return context.get_dummy_value()

    return types.void(chip, saved), generate


@intrinsic
def end(typing: Any, chip: Any, saved: Any) -> Any:
    """End a sweep. AMX: restore the thread's tile configuration (oneDNN may rely on it)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if chip.instance_class is AMX:
            store = data_pointer(context, builder, signature.args[1], args[1], I64(0))
            # A configuration that was never set reads as zeros; loading zeros releases the tiles.
            call(builder, "llvm.x86.ldtilecfg", VOID, [store])
        return context.get_dummy_value()

    return types.void(chip, saved), generate


@intrinsic
def score_block(
    typing: Any, chip: Any, rows: Any, row: Any, panels: Any, panel: Any, start: Any, column: Any,
    scores: Any, to: Any,
) -> Any:  # fmt: skip
    """Scores of a `Block` of rows and entries: ``start[column + j] + rows[row + i] . entry j``.

    Shapes: ``rows`` (n, >= width), ``panels`` (panels, width * 16), ``scores`` (ROW_TILE,
    columns).
    """
    signature = types.void(
        chip, rows, types.int64, panels, types.int64, start, types.int64, scores, types.int64
    )  # fmt: skip
    block = BLOCKS[chip.instance_class]
    emit = _tile_products if chip.instance_class is AMX else _register_products

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pointer(index: int, offset: Any) -> Any:
            return data_pointer(context, builder, signature.args[index], args[index], offset)

        def width_of(index: int) -> Any:
            array = context.make_array(signature.args[index])(context, builder, args[index])
            return builder.extract_value(array.shape, 1)

        dtype = signature.args[1].dtype
        size = dtype.bitwidth // 8
        width = width_of(1)
        row_bytes = builder.mul(width, I64(size))
        columns = width_of(7)
        out_bytes = builder.mul(columns, I64(4))
        row_start = pointer(1, builder.mul(args[2], width))
        panel_size = width_of(3)
        entry_bytes = builder.udiv(builder.mul(panel_size, I64(size)), I64(16))
        entry_start = pointer(3, builder.mul(args[4], panel_size))
        first = pointer(5, args[6])
        at = args[8]
        if block.rows < ROW_TILE:
            tile_row = builder.urem(args[2], I64(ROW_TILE))
            at = builder.add(builder.mul(tile_row, columns), at)
        out = pointer(7, at)
        panel_bytes = builder.mul(panel_size, I64(size))
        emit(
            builder, block, dtype, row_start, row_bytes, entry_start, panel_bytes, entry_bytes,
            first, out, out_bytes,
        )  # fmt: skip
        return context.get_dummy_value()

    return signature, generate


def _tile_products(
    builder: Any, block: Block, dtype: Any, row_start: Any, row_bytes: Any, entry_start: Any,
    panel_bytes: Any, entry_bytes: Any, first: Any, out: Any, out_bytes: Any,
) -> None:  # fmt: skip
    """Emit a block by tiles: 4 of sums (0 to 3), 2 of rows (4, 5) and 2 of entries (6, 7)."""
    dot = "llvm.x86.tdpbsud" if dtype == types.int8 else "llvm.x86.tdpbf16ps"

    def tile_load(tile: int, pointer: Any, stride: Any) -> None:
        call(builder, "llvm.x86.tileloadd64", VOID, [I8(tile), pointer, stride])

    # A stride of 0 repeats the entries' start values in all 16 rows of a tile.
    for tile in range(4):
        tile_load(tile, _offset(builder, first, I64(LINE * (tile % 2))), I64(0))
    lower = _offset(builder, row_start, builder.mul(row_bytes, I64(16)))
    second = _offset(builder, entry_start, panel_bytes)
    two_panels = I64(LINE * 32)
    with cgutils.for_range(builder, builder.udiv(entry_bytes, I64(LINE))) as loop:
        along = builder.mul(loop.index, I64(LINE))
        deep = builder.mul(loop.index, I64(LINE * 16))
        # The hardware prefetcher does not see through tile loads: ask for the table's lines that
        # the next block reads (the panels lie one after the other).
        for base in (entry_start, second):
            ahead = _offset(builder, _offset(builder, base, deep), two_panels)
            for part in range(16):
                _prefetch(builder, _offset(builder, ahead, I64(LINE * part)))
        tile_load(4, _offset(builder, row_start, along), row_bytes)
        tile_load(6, _offset(builder, entry_start, deep), I64(LINE))
        call(builder, dot, VOID, [I8(0), I8(4), I8(6)])
        tile_load(7, _offset(builder, second, deep), I64(LINE))
        call(builder, dot, VOID, [I8(1), I8(4), I8(7)])
        tile_load(5, _offset(builder, lower, along), row_bytes)
        call(builder, dot, VOID, [I8(2), I8(5), I8(6)])
        call(builder, dot, VOID, [I8(3), I8(5), I8(7)])
    for tile in range(4):
        place = _offset(builder, out, I64(LINE * (tile % 2)))
        if tile >= 2:
            place = _offset(builder, place, builder.mul(out_bytes, I64(16)))
        call(builder, "llvm.x86.tilestored64", VOID, [I8(tile), place, out_bytes])


def _register_products(
    builder: Any, block: Block, dtype: Any, row_start: Any, row_bytes: Any, entry_start: Any,
    panel_bytes: Any, entry_bytes: Any, first: Any, out: Any, out_bytes: Any,
) -> None:  # fmt: skip
    """Emit a block by vector registers, 4 of entries per row: one register per sum."""
    dot = {types.int8: _vnni, types.uint16: _bfloat16_dot, types.int16: _madd}[dtype]
    registers, register = (2, 32) if dtype == types.int16 else (4, 64)
    lanes = register // 4
    words = ir.VectorType(I32, lanes)
    sums = ir.VectorType(F32, lanes) if dtype == types.uint16 else words
    totals = [
        [
            cgutils.alloca_once_value(builder, load(builder, first, sums, I64(register * p)))
            for p in range(registers)
        ]
        for _ in range(block.rows)
    ]
    zeros = ir.Constant(words, [0] * lanes)
    with cgutils.for_range(builder, builder.udiv(entry_bytes, I64(4))) as loop:
        deep = builder.mul(loop.index, I64(LINE))
        along = builder.mul(loop.index, I64(4))
        lines = []
        for p in range(registers):
            # AVX-512 reads a register of each of 4 panels, AVX2 both halves of one panel's line.
            offset = builder.mul(panel_bytes, I64(p)) if register == LINE else I64(register * p)
            lines.append(load(builder, entry_start, words, builder.add(deep, offset)))
        for r in range(block.rows):
            # 4 bytes of the row, repeated in all lanes, meet the same 4 bytes of every entry.
            word = load(builder, row_start, I32, builder.add(along, builder.mul(row_bytes, I64(r))))
            single = builder.insert_element(ir.Constant(words, ir.Undefined), word, I32(0))
            spread = builder.shuffle_vector(single, single, zeros)
            for p in range(registers):
                total = builder.load(totals[r][p])
                builder.store(dot(builder, total, lines[p], spread), totals[r][p])
    for r in range(block.rows):
        for p in range(registers):
            at = builder.add(builder.mul(out_bytes, I64(r)), I64(register * p))
            place = builder.bitcast(_offset(builder, out, at), sums.as_pointer())
            builder.store(builder.load(totals[r][p]), place, align=1)


def _vnni(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Emit `vpdpbusd`; LLVM 22 types its operands as bytes, earlier ones as int32."""
    if llvmlite.binding.llvm_version_info[0] >= 22:
        packed = ir.VectorType(I8, LINE)
        unsigned, signed = builder.bitcast(unsigned, packed), builder.bitcast(signed, packed)
    name = "llvm.x86.avx512.vpdpbusd.512"
    return call(builder, name, total.type, [total, unsigned, signed])


def _bfloat16_dot(builder: Any, total: Any, line: Any, spread: Any) -> Any:
    pairs = ir.VectorType(_BFloat(), 32)
    operands = [builder.bitcast(value, pairs) for value in (line, spread)]
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, [total, *operands])


def _madd(builder: Any, total: Any, line: Any, spread: Any) -> Any:
    pairs = ir.VectorType(I16, 16)
    operands = [builder.bitcast(value, pairs) for value in (line, spread)]
    return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", total.type, operands))
