"""The number formats in which routes screen: how rows are rounded, and what that takes from them.

`FusedInt8`, `FusedShort` and `FusedBfloat16` multiply and scan in one `sweep`; `Float32Gemm` and
`Bfloat16Gemm` write blocks of scores with torch and scan them from memory.
"""

from __future__ import annotations

import math
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.engine.search import State
from semid.quantization.engine.sweep import scan_best, scan_many, sweep
from semid.quantization.engine.table import FAST, PAD_OFFSET, Operand, Table, aligned, padded, slack
from semid.quantization.engine.x86 import AMX, BLOCKS, LINE, ROW_TILE, missing_features, pitch

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]

START_LIMIT = 2.0**28
"""Largest offset in integer steps; with `WIDEST` products it stays within int32."""
WIDEST = 16384
"""Widest int8 rows: 255 * 127 * 16384 is below 2**29."""
NORM = 2.0**14
"""Longest int16 row: the product of two, and every part of it, stays within 2**28."""


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, fastmath=FAST)
def _quantize_tiles(
    y: F32, lengths: F64, rows: int, limit: float, least: float, offsets: F32, entry_step: float,
    out: Any, steps: F64, sums: F64, residual: F64, start: I32,
) -> None:  # fmt: skip
    """Round rows to integers with one step per 32 rows, and express the offsets in steps.

    ``y`` ``(n, width)``, ``n`` a multiple of 32. ``lengths`` ``(n,)``: norms of the rows, to scale
    by the longest; empty scales by the largest element. Either becomes ``limit``; ``least`` is the
    smallest step, so that the ``offsets`` ``(columns,)`` fit. Writes integers to ``out`` ``(n, >=
    width)``, further columns zero; per row its step, the sum of its integers and the norm of its
    rounding error, summed in float32 (see `slack`); and minus the offsets, in steps of the product
    with the table's ``entry_step``, to ``start`` ``(tiles, columns)``.
    """
    width = y.shape[1]
    most = np.float32(limit)
    for tile in range((rows + 31) // 32):
        largest = np.float32(0.0)
        for i in range(32 * tile, 32 * tile + 32):
            if lengths.size > 0:
                largest = max(largest, np.float32(lengths[i]))
                continue
            for j in range(width):
                largest = max(largest, abs(y[i, j]))
        step = np.float32(max(float(largest) / limit, least))
        inverse = np.float32(1.0) / step
        for i in range(32 * tile, 32 * tile + 32):
            steps[i] = step
            lost, count = np.float32(0.0), np.int32(0)
            for j in range(width):
                nearest = np.rint(y[i, j] * inverse)
                nearest = min(max(nearest, -most), most)
                error = y[i, j] - nearest * step
                lost += error * error
                code = np.int32(nearest)
                out[i, j] = code
                count += code
            for j in range(width, out.shape[1]):
                out[i, j] = 0
            residual[i] = math.sqrt(lost)
            sums[i] = count
        scale = np.float32(1.0 / (np.float64(step) * entry_step))
        for j in range(start.shape[1]):
            if offsets[j] == np.float32(PAD_OFFSET):
                start[tile, j] = -np.int32(2 * START_LIMIT)
            else:
                steps_down = min(offsets[j] * scale, np.float32(START_LIMIT))
                start[tile, j] = -np.int32(np.rint(steps_down))


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, fastmath=FAST)
def _quantize_table(rows: F32, step: float, limit: float, zero: int, out: Any) -> float:
    """Round rows to at most ``limit`` multiples of ``step`` either way, plus ``zero``.

    Writes ``out`` ``(entries, >= width)``, further columns ``zero``; returns the largest norm of a
    row's rounding error.
    """
    width = rows.shape[1]
    inverse = 1.0 / step
    largest = 0.0
    for i in range(rows.shape[0]):
        lost = 0.0
        for j in range(width):
            value = np.float64(rows[i, j])
            nearest = min(max(np.rint(value * inverse), -limit), limit)
            error = value - nearest * step
            lost += error * error
            out[i, j] = np.int32(nearest) + zero
        for j in range(width, out.shape[1]):
            out[i, j] = zero
        largest = max(largest, lost)
    return math.sqrt(largest)


def _pack(codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Lay out ``(columns, width)`` codes in panels of 16 entries (see `x86`)."""
    columns, width = codes.shape
    per = 4 // codes.itemsize
    panels = codes.reshape(columns // 16, 16, width // per, per).transpose(0, 2, 1, 3)
    packed = aligned(panels.shape, codes.dtype)
    packed[:] = panels
    return packed.reshape(columns // 16, width * 16)


class _Fused:
    """What all number formats share: products and scan in one pass (`sweep`).

    Args:
        chip: `AMX`, `AVX512` or `AVX2`.
        features: CPU features that it takes, as LLVM names them.
        library: what log messages call it.
    """

    def __init__(self, chip: Any, *, features: tuple[str, ...], library: str) -> None:
        self.chip, self.features, self.library = chip, features, library

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""
        return missing_features(*self.features)

    def _sweep(
        self, table: Table, state: State, rows: npt.NDArray[Any], panels: Any, start: Any
    ) -> None:
        group = BLOCKS[type(self.chip)].group
        saved = state.buffer("tiles", (LINE,), np.uint8) if isinstance(self.chip, AMX) else None
        sweep(
            self.chip, rows, panels, start,
            state.buffer("scores" + start.dtype.str, (ROW_TILE, group), start.dtype), saved,
            state.rows, table.offsets, state.margin, state.top, state.counts, state.candidates,
            state.kept, *((None, None) if state.best_only else (state.k, state.scratch)),
        )  # fmt: skip


class _FusedInteger(_Fused):
    """Integer products: queries with a step for each 32 rows, the table with one.

    Attributes:
        zero: added to the table's integers, since VNNI and AMX take one side unsigned.
    """

    name: str
    integer: Any
    zero: int

    def _limit(self, table: Table) -> tuple[float, float]:
        """Return the most steps of a table's element, and what they stand for."""
        raise NotImplementedError

    def _by_length(self, state: State) -> tuple[F64, float]:
        """Return the rows' norms if they are scaled by those (else none), and to how many steps."""
        raise NotImplementedError

    def prepare(self, table: Table) -> Operand | None:
        """Round the scaled rows to integers; None where rows are too wide."""
        width = padded(table.scaled.shape[1], 64)
        if width > WIDEST:
            return None
        limit, largest = self._limit(table)
        step = max(largest / limit, 2.0**-60)
        stored = np.uint8 if self.zero else self.integer
        codes = np.empty((len(table.scaled), width), stored)
        lost = float(_quantize_table(table.scaled, step, limit, self.zero, codes))
        residual = lost * (1 + 2.0**-20) + table.radius * 2.0**-23 + 2.0**-60
        return Operand(_pack(codes), residual, step)

    def screen(self, table: Table, operand: Operand, state: State) -> None:
        """Fill ``state``'s candidates; see `engine.search`."""
        tiled = padded(state.rows, ROW_TILE)
        width = operand.data.shape[1] // 16
        apart = pitch(width, np.dtype(self.integer).itemsize)
        codes = state.buffer(self.name, (tiled, apart), self.integer)
        start = state.buffer("start", (tiled // ROW_TILE, len(table.offsets)), np.int32)
        steps = state.buffer("steps", (state.limit,), np.float64)
        sums = state.buffer("sums", (state.limit,), np.float64)
        steps[tiled:], sums[tiled:] = 1.0, 0.0
        offset = float(table.offsets[: len(table)].max())
        least = max(offset / (operand.step * START_LIMIT), 2.0**-60)
        lengths, limit = self._by_length(state)
        _quantize_tiles(
            state.y, lengths, state.rows, limit, least, table.offsets, operand.step, codes, steps,
            sums, state.residual, start,
        )  # fmt: skip
        unit = steps * operand.step
        state.set_bound(
            table,
            residual=slack(state.residual, state.length, width),
            entry_residual=operand.residual,
            absolute=unit,
            unit=unit,
            shift=-self.zero * unit * sums,
        )
        self._sweep(table, state, codes, operand.data, start)


class FusedInt8(_FusedInteger):
    """8 bits, scaled by the largest element: AMX tiles or AVX-512 VNNI."""

    name, integer, zero = "int8", np.int8, 128

    def _limit(self, table: Table) -> tuple[float, float]:
        return 127.0, float(np.abs(table.scaled).max())

    def _by_length(self, state: State) -> tuple[F64, float]:
        return np.empty(0), 127.0


class FusedShort(_FusedInteger):
    """16 bits, scaled by the longest row so that 32-bit sums are exact: AVX2."""

    name, integer, zero = "int16", np.int16, 0

    def _limit(self, table: Table) -> tuple[float, float]:
        return NORM, table.radius

    def _by_length(self, state: State) -> tuple[F64, float]:
        return state.length, NORM


class FusedBfloat16(_Fused):
    """bfloat16 products with float32 sums that start from minus the offset."""

    name = "bf16"

    def prepare(self, table: Table) -> Operand | None:
        """Round the scaled rows to bfloat16."""
        bits, residual = table.bfloat16(32)
        start = aligned((1, len(table.offsets)), np.float32)
        start[0] = -table.offsets
        return Operand((_pack(bits), start), residual)

    def screen(self, table: Table, operand: Operand, state: State) -> None:
        """Fill ``state``'s candidates; see `engine.search`."""
        panels, start = operand.data
        width = panels.shape[1] // 16
        bits = state.buffer("bf16", (padded(state.rows, ROW_TILE), pitch(width, 2)), np.uint16)
        state.round_bfloat16(bits)
        state.set_bound(
            table,
            residual=slack(state.residual, state.length, width),
            entry_residual=operand.residual,
        )
        self._sweep(table, state, bits, panels, start)


CHUNK = 2048  # columns a product: 256 rows of float32 scores take 2 MB
ROWS = 256
BFLOAT16 = ("amx-bf16", "avx512bf16", "bf16")
"""What LLVM calls the instructions, on x86 and Arm. Without them torch's products take a hundred
times as long as those of float32."""


def _bfloat16(bits: npt.NDArray[np.uint16]) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def _scan(state: State, table: Table, scores: npt.NDArray[np.generic], start: int, at: int) -> None:
    rows, columns = scores.shape
    shared = (
        scores, rows, columns, at, table.offsets, state.margin, state.top, state.counts,
        state.candidates, state.kept, start,
    )  # fmt: skip
    if state.best_only:
        scan_best(*shared)
    else:
        scan_many(*shared, state.k, state.scratch)


class Float32Gemm:
    """Scores by float32 products; the route that is always there."""

    name = "fp32"
    library = "torch float32"

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""
        return None

    def prepare(self, table: Table) -> Operand | None:
        """Use the table's scaled rows, which carry only float32 rounding."""
        return Operand(None, table.radius * 2.0**-23 + 2.0**-60)

    def screen(self, table: Table, operand: Operand, state: State) -> None:
        """Fill ``state``'s candidates; see `engine.search`."""
        y, length, rows = state.y, state.length, state.rows
        # torch may be told to round float32 operands to bfloat16 or TF32 inside its products.
        loose = torch.get_float32_matmul_precision() != "highest"
        unit = 2.0**-8 if loose else 0.0
        state.set_bound(
            table,
            residual=length * (2.0**-23 + unit) + 2.0**-60,
            entry_residual=operand.residual + unit * table.radius,
        )
        weights = torch.from_numpy(table.scaled)
        bias = torch.from_numpy(table.offsets)
        for at in range(0, len(table.offsets), CHUNK):
            part = slice(at, min(at + CHUNK, len(table.offsets)))
            for start in range(0, rows, ROWS):
                block = torch.from_numpy(y[start : min(start + ROWS, rows)])
                scores = state.buffer("fp32", (len(block), part.stop - at), np.float32)
                torch.addmm(
                    bias[part], block, weights[part].T, beta=-1.0, out=torch.from_numpy(scores)
                )
                _scan(state, table, scores, start, at)


class Bfloat16Gemm:
    """Scores by bfloat16 products with bfloat16 results, whose rounding is in the bound."""

    name = "bf16"
    library = "torch bfloat16"

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""
        features = llvmlite.binding.get_host_cpu_features()
        if any(features.get(name, False) for name in BFLOAT16):
            return None
        return "the chip has no bfloat16 products"

    def prepare(self, table: Table) -> Operand | None:
        """Round the scaled rows to bfloat16."""
        bits, residual = table.bfloat16(32)
        return Operand(bits, residual)

    def screen(self, table: Table, operand: Operand, state: State) -> None:
        """Fill ``state``'s candidates; see `engine.search`."""
        rows = state.rows
        bits = state.buffer("bf16", (rows, operand.data.shape[1]), np.uint16)
        state.round_bfloat16(bits)
        width = operand.data.shape[1]
        state.set_bound(
            table,
            residual=slack(state.residual, state.length, width),
            entry_residual=operand.residual,
            relative=2.0**-8,
        )
        weights, y = _bfloat16(operand.data), _bfloat16(bits)
        for at in range(0, len(weights), CHUNK):
            part = weights[at : at + CHUNK].T
            for start in range(0, rows, ROWS):
                block = y[start : start + ROWS]
                scores = state.buffer("products", (len(block), part.shape[1]), np.uint16)
                torch.mm(block, part, out=_bfloat16(scores))
                _scan(state, table, scores, start, at)
