"""The number formats in which routes screen: how rows are rounded, and what that takes from them.

`FusedInt8`, `FusedShort` and `FusedBfloat16` multiply and scan in one `sweep`; `Float32Gemm` and
`Bfloat16Gemm` write blocks of scores with torch and scan them from memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
import numpy.typing as npt

from semid.lazy import torch
from semid.quantization.engine.plain import L2, SCAN, padded
from semid.quantization.engine.sweep import F32, F64, I32, I64, scan, sweep
from semid.quantization.engine.table import (
    START_LIMIT,
    Operand,
    VectorTable,
    aligned,
    center_queries,
    pack,
    quantize_table,
    quantize_tiles,
    round_bfloat16,
    slack,
)
from semid.quantization.engine.x86 import AMX, BLOCKS, LINE, ROW_TILE, missing_features, pitch

LOWEST = -(2**30)
"""Below every int32 score, and far enough from the end to subtract a margin."""
WIDEST = 16384
"""Widest int8 rows: 255 * 127 * 16384 is below 2**29."""
NORM = 2.0**14
"""Longest int16 row: the product of two, and every part of it, stays within 2**28."""


class QueryBlock:
    """Buffers for up to ``limit`` queries, a multiple of `ROW_TILE`, against tables of one width.

    ``k`` entries are searched for each query (one more where entries are excluded); ``best_only``
    is one entry by squared distance, the case with its own shorter path.
    """

    def __init__(self, limit: int, width: int, *, k: int, best_only: bool) -> None:
        self.limit, self.width, self.k, self.best_only = limit, width, k, best_only
        self.capacity = 4 * SCAN if best_only else max(8 * SCAN, 4 * k + 2 * SCAN)
        self.rows = 0  # queries in the current block
        # Centered and scaled queries, half their squares, their norms, those of their rounding
        # errors, and how far a score may lie from the truth (scaled units).
        self.y: F32 = aligned((limit, width), np.float32)
        self.y[:] = 0.0
        self.half_square: F64 = np.empty(limit)
        self.length: F64 = np.zeros(limit)
        self.residual: F64 = np.zeros(limit)
        self.bound: F64 = np.zeros(limit)
        # The estimate of a true score is stored score * unit + shift.
        self.unit: F64 = np.zeros(limit)
        self.shift: F64 = np.zeros(limit)
        # A count of -1 means that every entry is a candidate.
        self.counts: I64 = np.empty(limit, np.int64)
        self.candidates: I32 = np.empty((limit, self.capacity), np.int32)
        # In the stored scores' own type; see `scan`.
        self.margin: Any = None
        self.top: Any = None
        self.scores: Any = None
        self.scratch: Any = None
        self._attained: F64 | None = None
        self._buffers: dict[str, npt.NDArray[Any]] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Return scratch memory that is reused for the next block; its contents are undefined."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = aligned((size,), dtype)
        return buffer[:size].reshape(shape)

    def load(self, x: F32, table: VectorTable, within: F64 | None = None) -> None:
        """Center, scale and measure a block ``x`` ``(rows, width)``.

        ``within`` ``(rows,)``: squared distances that ``k`` entries are known not to exceed.
        """
        self.rows = rows = len(x)
        l2 = table.metric == L2
        center = table.center if l2 else np.zeros_like(table.center)
        # Centering shortens vectors and so the bound; distances alone do not depend on it.
        factor = 2.0**-table.exponent
        center_queries(x, rows, center, factor, not l2, self.y, self.half_square)
        self.length[:rows] = np.sqrt(2.0 * np.maximum(self.half_square[:rows], 0.0))
        self.length[rows:] = 0.0
        # The score that an entry at the distance `within` has: half |y|^2 less half of it.
        self._attained = (
            None if within is None else self.half_square[:rows] - 0.5 * within * factor * factor
        )

    def set_rounded_bound(
        self,
        table: VectorTable,
        operand: Operand,
        bits: npt.NDArray[np.uint16],
        width: int,
        *,
        relative: float = 0.0,
    ) -> None:
        """Write the queries as bfloat16 to ``bits`` and bound what their rounding changes."""
        round_bfloat16(self.y[: len(bits)], bits, self.residual)
        residual = slack(self.residual, self.length, width)
        self.set_bound(table, residual=residual, entry_residual=operand.residual, relative=relative)

    def set_bound(
        self, table: VectorTable, *, residual: F64, entry_residual: float, relative: float = 0.0,
        absolute: F64 | float = 0.0, unit: F64 | None = None, shift: F64 | None = None,
    ) -> None:  # fmt: skip
        """Bound each row's score error (README.md, "The bound") and reset its candidates.

        Shapes: ``residual`` (limit,).
        """
        # What rounding of both sides and of the sums may add to a score, then what the format adds.
        length = self.length
        bound = table.score_error(length, residual, entry_residual, relative=relative)
        self.bound[:] = bound + absolute + 2.0**-60
        if unit is None or shift is None:
            self.unit[:] = 1.0
            self.shift[:] = 0.0
            self._reset(np.dtype(np.float32))
            # Widened for the rounding of the threshold, which is a float32 subtraction.
            self.margin[:] = 2.0 * self.bound * (1.0 + 2.0**-20)
            self.margin[:] += 2.0**-21 * (length * (table.radius + entry_residual) + 1.0)
            return
        self.unit[:] = unit
        self.shift[:] = shift
        self._reset(np.dtype(np.int32))
        # In whole steps, rounded up; a margin that leaves int32 makes every entry a candidate.
        wide = np.ceil(2.0 * self.bound / np.maximum(unit, 2.0**-120)) + 2.0
        self.counts[wide > -LOWEST] = -1
        self.margin[:] = np.minimum(wide, -LOWEST)

    def _reset(self, dtype: np.dtype[Any]) -> None:
        if self.margin is None or self.margin.dtype != dtype:
            self.margin = np.empty(self.limit, dtype)
            self.top = np.empty(self.limit, dtype)
            self.scores = np.empty((self.limit, self.capacity), dtype)
            self.scratch = np.empty(self.capacity, dtype)
        integers = dtype == np.int32
        self.top[:] = LOWEST if integers else -np.inf
        rows = self.rows
        if self._attained is not None:
            # Start from scores that the k-th best entry of each row is known to reach.
            stored = (self._attained - self.shift[:rows]) / np.maximum(self.unit[:rows], 2.0**-120)
            stored[~np.isfinite(stored)] = -np.inf
            if integers:
                self.top[:rows] = np.clip(np.floor(stored), LOWEST, -LOWEST)
            else:
                self.top[:rows] = np.nextafter(stored.astype(np.float32), np.float32(-np.inf))
        # Rows that were not centered, too far away or not finite, have no scores.
        self.counts[:] = 0
        self.counts[:rows][self.half_square[:rows] < 0] = -1

    def scan(self, table: VectorTable, scores: npt.NDArray[Any], start: int, at: int) -> None:
        """Note the candidates among the scores of rows from ``start`` and entries from ``at``."""
        scan(
            scores, *scores.shape, at, table.offsets, self.margin, self.top, self.counts,
            self.candidates, self.scores, start, *self._many(),
        )  # fmt: skip

    def _many(self) -> tuple[Any, Any]:
        """Return the last arguments of `scan`."""
        return (None, None) if self.best_only else (self.k, self.scratch)


class _Fused:
    """Products and scan in one pass (`sweep`) on a ``chip``: `AMX`, `AVX512` or `AVX2`.

    ``features`` are the CPU features that it takes, as LLVM names them; ``library`` is what log
    messages call it.
    """

    uses_torch = False

    def __init__(self, chip: Any, *, features: tuple[str, ...], library: str) -> None:
        self.chip, self.features, self.library = chip, features, library

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""
        return missing_features(*self.features)

    def _sweep(
        self, table: VectorTable, queries: QueryBlock, rows: npt.NDArray[Any], panels: Any,
        start: Any,
    ) -> None:  # fmt: skip
        group = BLOCKS[type(self.chip)].group
        saved = queries.buffer("tiles", (LINE,), np.uint8) if isinstance(self.chip, AMX) else None
        sweep(
            self.chip, rows, panels, start,
            queries.buffer("scores" + start.dtype.str, (ROW_TILE, group), start.dtype), saved,
            queries.rows, table.offsets, queries.margin, queries.top, queries.counts,
            queries.candidates, queries.scores,
            *queries._many(),
        )  # fmt: skip


class FusedInteger(_Fused):
    """Integer products: queries with a step for each 32 rows, the table with one."""

    kernels = 3
    name: str
    integer: Any  # type of the queries' integers
    zero: int  # added to the table's integers, since VNNI and AMX take one side unsigned
    limit: float  # largest integer, or length of the longest row with `by_length`
    by_length: bool  # whether rows are scaled by their length

    def prepare(self, table: VectorTable) -> Operand | None:
        """Round the scaled rows to integers; None where rows are too wide."""
        if padded(table.scaled.shape[1], 64) > WIDEST:  # a sum of products could leave int32
            return None
        codes, step, residual = self.round_entries(table.scaled, table.radius)
        return Operand(pack(codes), residual, step)

    def round_entries(self, scaled: F32, radius: float) -> tuple[npt.NDArray[Any], float, float]:
        """Return integers ``(columns, width)``, their step, and the largest norm of what is lost.

        ``radius`` is the length of the longest of the rows ``scaled`` ``(columns, width)``.
        """
        largest = radius if self.by_length else float(np.abs(scaled).max())
        step = max(largest / self.limit, 2.0**-60)
        width = padded(scaled.shape[1], 64)
        codes = np.empty((len(scaled), width), np.uint8 if self.zero else self.integer)
        lost = float(quantize_table(scaled, step, self.limit, self.zero, codes))
        return codes, step, lost * (1 + 2.0**-20) + radius * 2.0**-23 + 2.0**-60

    def screen(self, table: VectorTable, operand: Operand, queries: QueryBlock) -> None:
        """Fill the candidates of ``queries``; see `engine.search`."""
        tiled = padded(queries.rows, ROW_TILE)
        width = operand.data.shape[1] // 16
        stride = pitch(width, np.dtype(self.integer).itemsize)
        codes = queries.buffer(self.name, (tiled, stride), self.integer)
        start = queries.buffer("start", (tiled // ROW_TILE, len(table.offsets)), np.int32)
        steps = queries.buffer("steps", (queries.limit,), np.float64)
        sums = queries.buffer("sums", (queries.limit,), np.float64)
        steps[tiled:], sums[tiled:] = 1.0, 0.0
        # The largest offset must fit into int32 in steps of the products.
        offset = float(table.offsets[: len(table)].max())
        least = max(offset / (operand.step * START_LIMIT), 2.0**-60)
        quantize_tiles(
            queries.y, queries.length if self.by_length else np.empty(0), queries.rows, self.limit,
            least, table.offsets, operand.step, codes, steps, sums, queries.residual, start,
        )  # fmt: skip
        unit = steps * operand.step
        queries.set_bound(
            table,
            residual=slack(queries.residual, queries.length, width),
            entry_residual=operand.residual,
            absolute=unit,  # the offset is rounded to a whole number of steps
            unit=unit,
            shift=-self.zero * unit * sums,  # what the table's zero adds to the products
        )
        self._sweep(table, queries, codes, operand.data, start)


class FusedInt8(FusedInteger):
    """8 bits, scaled by the largest element: AMX tiles or AVX-512 VNNI."""

    name, integer, zero, limit, by_length = "int8", np.int8, 128, 127.0, False


class FusedShort(FusedInteger):
    """16 bits, scaled by the longest row so that 32-bit sums are exact: AVX2."""

    name, integer, zero, limit, by_length = "int16", np.int16, 0, NORM, True


class FusedBfloat16(_Fused):
    """bfloat16 products with float32 sums that start from minus the offset."""

    name = "bf16"
    kernels = 2

    def prepare(self, table: VectorTable) -> Operand | None:
        """Round the scaled rows to bfloat16."""
        bits, residual = table.bfloat16(32)
        start = aligned((1, len(table.offsets)), np.float32)
        start[0] = -table.offsets
        return Operand((pack(bits), start), residual)

    def screen(self, table: VectorTable, operand: Operand, queries: QueryBlock) -> None:
        """Fill the candidates of ``queries``; see `engine.search`."""
        panels, start = operand.data
        width = panels.shape[1] // 16
        bits = queries.buffer("bf16", (padded(queries.rows, ROW_TILE), pitch(width, 2)), np.uint16)
        queries.set_rounded_bound(table, operand, bits, width)
        self._sweep(table, queries, bits, panels, start)


CHUNK = 2048  # columns a product: 256 rows of float32 scores take 2 MB
ROWS = 256
BFLOAT16 = ("amx-bf16", "avx512bf16", "bf16")
"""What LLVM calls the instructions, on x86 and Arm. Without them torch's products take a hundred
times as long as those of float32."""


def _bfloat16(bits: npt.NDArray[np.uint16]) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def _scan_products(
    queries: QueryBlock,
    table: VectorTable,
    multiply: Callable[[slice, slice, npt.NDArray[Any]], Any],
    dtype: Any,
) -> None:
    """Scan scores ``multiply(rows, entries, out)`` of type ``dtype``, block by block."""
    columns = len(table.offsets)
    for at in range(0, columns, CHUNK):
        for start in range(0, queries.rows, ROWS):
            rows = slice(start, min(start + ROWS, queries.rows))
            entries = slice(at, min(at + CHUNK, columns))
            shape = (rows.stop - start, entries.stop - at)
            scores = queries.buffer("products", shape, dtype)
            multiply(rows, entries, scores)
            queries.scan(table, scores, start, at)


def rounds_float32() -> bool:
    """Say whether torch may round float32 operands to bfloat16 or TF32 inside its products."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # told so of one library alone, which torch cannot say in one word
        return True


class Float32Gemm:
    """Scores by float32 products; the route that is always there."""

    name = "fp32"
    library = "torch float32"
    uses_torch = True
    kernels = 1

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""
        return None

    def prepare(self, table: VectorTable) -> Operand | None:
        """Use the table's scaled rows, which carry only float32 rounding."""
        return Operand(None, table.radius * 2.0**-23 + 2.0**-60)

    def screen(self, table: VectorTable, operand: Operand, queries: QueryBlock) -> None:
        """Fill the candidates of ``queries``; see `engine.search`."""
        unit = 2.0**-8 if rounds_float32() else 0.0
        queries.set_bound(
            table,
            residual=queries.length * (2.0**-23 + unit) + 2.0**-60,
            entry_residual=operand.residual + unit * table.radius,
        )
        weights, y = torch.from_numpy(table.scaled), torch.from_numpy(queries.y)
        bias = torch.from_numpy(table.offsets)

        def multiply(rows: slice, entries: slice, out: F32) -> None:
            scores = torch.from_numpy(out)
            torch.addmm(bias[entries], y[rows], weights[entries].T, beta=-1.0, out=scores)

        _scan_products(queries, table, multiply, np.float32)


class Bfloat16Gemm:
    """Scores by bfloat16 products with bfloat16 results, whose rounding is in the bound."""

    name = "bf16"
    library = "torch bfloat16"
    uses_torch = True
    kernels = 2

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""
        features = llvmlite.binding.get_host_cpu_features()
        if any(features.get(name, False) for name in BFLOAT16):
            return None
        return "the chip has no bfloat16 products"

    def prepare(self, table: VectorTable) -> Operand | None:
        """Round the scaled rows to bfloat16."""
        return Operand(*table.bfloat16(32))

    def screen(self, table: VectorTable, operand: Operand, queries: QueryBlock) -> None:
        """Fill the candidates of ``queries``; see `engine.search`."""
        width = operand.data.shape[1]
        bits = queries.buffer("bf16", (queries.rows, width), np.uint16)
        queries.set_rounded_bound(table, operand, bits, width, relative=2.0**-8)
        weights, y = _bfloat16(operand.data), _bfloat16(bits)
        _scan_products(
            queries,
            table,
            lambda rows, entries, out: torch.mm(y[rows], weights[entries].T, out=_bfloat16(out)),
            np.uint16,
        )
