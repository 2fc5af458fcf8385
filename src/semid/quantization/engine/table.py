"""A table of vectors indexed for exact search; kernels that center, scale and round rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from semid.quantization.engine.keys import norms
from semid.quantization.engine.plain import (
    COSINE,
    L2,
    SCAN,
    Rows,
    check_entries,
    float32_rows,
    padded,
)
from semid.quantization.engine.sweep import F32, F64, I32, I64

PAD_OFFSET = 1e30
"""Offset of the columns that only fill a block: their score is far below every real one."""
START_LIMIT = 2.0**28
"""Largest offset in integer steps; with products of the widest rows it stays within int32."""


@dataclass(frozen=True)
class Operand:
    """A table's low-precision copy for one route."""

    data: Any  # what the route multiplies with, in a layout of its own
    residual: float  # the largest norm of what rounding took from a row, scaled units
    step: float = 1.0  # size of one integer step, 1 for floating-point copies


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return uninitialized memory that starts on a cache line, as numpy's own need not.

    A tile or register of 64 bytes that straddles two lines costs two loads.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class VectorTable:
    """Vectors ``(entries, dim)`` to search, with everything screening needs.

    Scaled units: rows are centered on ``center`` and multiplied by ``2**-exponent``, which brings
    the longest to at most 1. With ``unique`` only the first of exact duplicates stays: the others
    can never win a tie. ``name`` is the argument's name for messages.
    """

    def __init__(self, rows: Rows, *, metric: int, unique: bool, name: str = "codebook") -> None:
        vectors = float32_rows(rows, name=name)
        check_entries(vectors, name=name)
        self.metric, self.dim = metric, int(rows.shape[1])
        # (entries, width), padded with zero columns: a private copy in which -0 became 0.
        self.rows: F32 = vectors + np.float32(0.0)
        # Index of each row among the rows given, ascending.
        self.original: I64 = np.arange(len(vectors), dtype=np.int64)
        if unique:
            self.original = first_copies(self.rows)
            if len(self.original) < len(vectors):
                self.rows = self.rows[self.original]
        self._scale()
        self._lock = threading.Lock()
        self._operands: dict[str, Operand | None] = {}
        self.on_devices: dict[Any, Any] = {}  # see `gpu.device_table`
        self.routes: dict[int, Any] = {}  # the route chosen for each k

    def _scale(self) -> None:
        entries, width = self.rows.shape
        columns = padded(entries, SCAN)
        self.norms: F64 = np.empty(entries)  # lengths of the rows
        norms(self.rows, self.norms)
        self.center: F32 = np.empty(width, np.float32)
        self.scaled: F32 = aligned((columns, width), np.float32)  # zero rows after the entries
        self.lengths: F64 = np.empty(entries)  # lengths of the scaled rows
        half = np.empty(entries)
        self.exponent: int = center_table(
            self.rows, self.norms, self.metric == COSINE, self.center, self.scaled, half,
            self.lengths,
        )  # fmt: skip
        # Subtracted from products: x.c - |c|^2 / 2 is largest for the nearest entry.
        self.offsets: F32 = np.full(columns, PAD_OFFSET, np.float32)
        self.offsets[:entries] = half if self.metric == L2 else 0.0
        self.radius = float(self.lengths.max())
        center = float(np.linalg.norm(self.center.astype(np.float64)))
        self.reach = self.radius + center * 2.0**-self.exponent  # of uncentered rows

    def __len__(self) -> int:
        return len(self.rows)

    def operand(self, name: str, make: Callable[[VectorTable], Operand | None]) -> Operand | None:
        """Return the copy called ``name``, made at its first use; None if impossible."""
        if name not in self._operands:
            with self._lock:
                if name not in self._operands:
                    self._operands[name] = make(self)
        return self._operands[name]

    def score_error(
        self, length: Any, residual: Any, entry_residual: float, *,
        relative: float = 0.0, products: float = 2.0**-23,
    ) -> Any:  # fmt: skip
        """Bound the score errors of queries (README.md, "The bound"), as arrays or tensors.

        ``length`` and ``residual`` ``(n,)`` are norms of the centered queries and of their rounding
        errors, ``entry_residual`` the largest of an entry; ``products`` is the error of a product
        and a sum, ``relative`` that of a stored result, relative to the vectors' lengths.
        """
        width = self.rows.shape[1]
        reach = self.radius + entry_residual
        product = (length + residual) * reach
        # Cauchy-Schwarz on what rounding changed on either side, then the products' own error.
        bound = residual * self.radius + (length + residual) * entry_residual
        bound += relative * product + (width + 32) * products * (product + reach * reach)
        # The canonical float64 sums round too, and decide: cover what they may turn over.
        whole = (length + self.radius) ** 2 if self.metric == L2 else length * self.reach
        bound += (width + 64) * 2.0**-52 * whole
        return bound

    def bfloat16(self, multiple: int) -> tuple[npt.NDArray[np.uint16], float]:
        """Return bfloat16 bits ``(columns, >= width)`` of the scaled rows, and the largest loss."""
        columns, width = self.scaled.shape
        bits = aligned((columns, padded(width, multiple)), np.uint16)
        residual = np.empty(columns)
        round_bfloat16(self.scaled, bits, residual)
        return bits, float(slack(residual[: len(self)], self.lengths, width).max())


MAX_TABLE_RADII = 2.0**30
"""A query further from the table's center than this many table radii is not screened."""


FAST = {"reassoc", "contract", "nsz"}  # NaN and infinity keep their meaning


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, fastmath=FAST)
def center_queries(
    x: F32, rows: int, center: F32, factor: float, own_scale: bool, y: F32, half_square: F64
) -> None:
    """Write ``(x - center) * factor`` to ``y`` and half its squared norm to ``half_square``.

    Shapes: ``x`` and ``y`` ``(>= rows, width)``, ``center`` ``(width,)``, ``half_square``
    ``(rows,)``. With ``own_scale`` each row is scaled by its own power of two instead (metrics in
    which the length of a query changes no ranking) and ``center`` must be zero. A row that is not
    finite or beyond `MAX_TABLE_RADII` gets -1 and zeros; rows of ``y`` past ``rows`` become zero.
    """
    width = x.shape[1]
    for i in range(rows):
        scale = factor
        if own_scale:
            largest = np.float32(0.0)
            for j in range(width):
                largest = max(largest, abs(x[i, j]))
            if 0.0 < largest < np.inf:
                scale = math.ldexp(1.0, -math.frexp(float(largest))[1])
        total = 0.0
        for j in range(width):
            value = (np.float64(x[i, j]) - np.float64(center[j])) * scale
            total += value * value
            y[i, j] = value
        # Rows too far away get no scores: every entry is their candidate.
        if total <= MAX_TABLE_RADII * MAX_TABLE_RADII:
            half_square[i] = total / 2.0
        else:  # also when total is NaN
            half_square[i] = -1.0
            y[i] = np.float32(0.0)
    y[rows:] = np.float32(0.0)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def center_table(
    table: F32, norms: F64, normalize: bool, center: F32, scaled: F32, offsets: F64, lengths: F64
) -> int:
    """Center and scale a table ``(entries, width)``; return the exponent.

    With ``normalize`` each row is divided by its length in ``norms`` first (zero rows stay zero).
    Writes the mean row to ``center``, ``(row - center) * 2**-exponent`` to ``scaled`` ``(>=
    entries, width)``, its norm, at most 1, to ``lengths``, and half the square of that to
    ``offsets`` ``(entries,)``.
    """
    entries, width = table.shape
    mean = np.zeros(width)
    for i in range(entries):
        divisor = norms[i] if normalize and norms[i] > 0.0 else 1.0
        for j in range(width):
            mean[j] += table[i, j] / divisor
    for j in range(width):
        center[j] = mean[j] / entries
    # Lengths in float64; the power of two that brings the longest to at most 1 is exact.
    largest = 0.0
    for i in range(entries):
        divisor = norms[i] if normalize and norms[i] > 0.0 else 1.0
        total = 0.0
        for j in range(width):
            value = table[i, j] / divisor - np.float64(center[j])
            total += value * value
        lengths[i] = math.sqrt(total)
        largest = max(largest, lengths[i])
    exponent = math.frexp(largest)[1] if largest > 0.0 else 0
    scale = math.ldexp(1.0, -exponent)
    for i in range(entries):
        divisor = norms[i] if normalize and norms[i] > 0.0 else 1.0
        for j in range(width):
            scaled[i, j] = (table[i, j] / divisor - np.float64(center[j])) * scale
        lengths[i] *= scale
        offsets[i] = lengths[i] * lengths[i] / 2.0
    scaled[entries:] = np.float32(0.0)
    return exponent


def hash_rows(rows: F32) -> npt.NDArray[np.uint64]:
    """Return a sum of each row's bits with random odd weights: equal rows have equal hashes."""
    bits = rows.view(np.uint32)
    weights = np.random.default_rng(0).integers(2**63, size=rows.shape[1], dtype=np.uint64)
    weights = weights * np.uint64(2) + np.uint64(1)
    hashes: npt.NDArray[np.uint64] = np.einsum(
        "nd,d->n", bits, weights, dtype=np.uint64, casting="unsafe"
    )
    return hashes


def first_copies(rows: F32) -> I64:
    """Return ascending indices ``(different,)`` of the rows that equal no earlier row."""
    hashes = hash_rows(rows)
    ordered = np.sort(hashes)
    if (ordered[1:] != ordered[:-1]).all():
        return np.arange(len(rows))
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[group] != np.arange(len(rows)))
    # Equal hashes are not yet equal rows; one copy too many would change no result.
    bits = rows.view(np.uint32)
    same = (bits[repeated] == bits[first[group[repeated]]]).all(axis=1)
    return np.delete(np.arange(len(rows)), repeated[same])


def round_bfloat16(rows: F32, out: npt.NDArray[np.uint16], residual: F64) -> None:
    """Round finite rows to bfloat16 (nearest, ties to even) and measure what the rounding lost.

    Writes bit patterns to ``out`` ``(rows, >= width)``, further columns zero, and the norm of the
    rounding error, summed in float32 (see `slack`), to ``residual`` ``(rows,)``.
    """
    wide = np.empty(rows.shape[1], np.float32)
    _round_bfloat16(rows, rows.view(np.uint32), wide, wide.view(np.uint32), out, residual)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, fastmath=FAST)
def _round_bfloat16(
    y: F32, bits: npt.NDArray[np.uint32], wide: F32, wide_bits: npt.NDArray[np.uint32],
    out: npt.NDArray[np.uint16], residual: F64,
) -> None:  # fmt: skip
    rows, width = y.shape
    one, half, sixteen = np.uint32(1), np.uint32(0x7FFF), np.uint32(16)
    for i in range(rows):
        for j in range(width):
            # Adding 0x7FFF and the lowest bit that stays rounds to nearest, ties to even.
            raw = bits[i, j]
            rounded = (raw + half + ((raw >> sixteen) & one)) >> sixteen
            out[i, j] = rounded
            wide_bits[j] = rounded << sixteen
        out[i, width:] = np.uint16(0)
        total = np.float32(0.0)
        for j in range(width):
            lost = y[i, j] - wide[j]
            total += lost * lost
        residual[i] = math.sqrt(total)


def slack(residual: F64, length: F64, width: int) -> F64:
    """Bound the true rounding error of rows from its float32 measurement ``residual``.

    Covers the sum's own rounding (``width`` float32 terms), squares that underflowed, and the
    float32 rounding of the centered row of norm ``length`` before it was rounded further.
    """
    return residual * (1.0 + (width + 8) * 2.0**-24) + length * 2.0**-22 + 2.0**-60


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, fastmath=FAST)
def quantize_tiles(
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
        # One step for the tile, so that 32 rows share the start values of their sums.
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
            out[i, width:] = 0
            residual[i] = math.sqrt(lost)
            sums[i] = count
        # Offsets in whole steps of the products, within int32; padding far below all of them.
        scale = np.float32(1.0 / (np.float64(step) * entry_step))
        for j in range(start.shape[1]):
            if offsets[j] == np.float32(PAD_OFFSET):
                start[tile, j] = -np.int32(2 * START_LIMIT)
            else:
                steps_down = min(offsets[j] * scale, np.float32(START_LIMIT))
                start[tile, j] = -np.int32(np.rint(steps_down))


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, fastmath=FAST)
def quantize_table(rows: F32, step: float, limit: float, zero: int, out: Any) -> float:
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
        out[i, width:] = zero
        largest = max(largest, lost)
    return math.sqrt(largest)


def pack(codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Lay out ``(columns, width)`` codes in panels of 16 entries (see `x86`)."""
    columns, width = codes.shape
    per = 4 // codes.itemsize
    panels = codes.reshape(columns // 16, 16, width // per, per).transpose(0, 2, 1, 3)
    packed = aligned(panels.shape, codes.dtype)
    packed[:] = panels
    return packed.reshape(columns // 16, width * 16)
