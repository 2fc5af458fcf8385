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
import torch

from semid.errors import EmbeddingError, UsageError
from semid.quantization.engine.keys import COSINE, L2, norms
from semid.quantization.engine.vector import LANES, SCAN

PAD_OFFSET = 1e30
"""Offset of the columns that only fill a block: their score is far below every real one."""

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Operand:
    """A table's low-precision copy for one route.

    Attributes:
        data: what the route multiplies with; its layout is the route's business.
        residual: the largest norm of what rounding took from a row, scaled units.
        step: size of one integer step, 1 for floating-point copies.
    """

    data: Any
    residual: float
    step: float = 1.0


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return uninitialized memory that starts on a cache line, as numpy's own need not.

    A tile or register of 64 bytes that straddles two lines costs two loads.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    memory: npt.NDArray[Any] = torch.empty(size, dtype=torch.uint8).numpy()  # 64-byte aligned
    return memory.view(kind).reshape(shape)


def padded(columns: int, multiple: int) -> int:
    """Round ``columns`` up to a multiple."""
    return -(-columns // multiple) * multiple


def float32_rows(rows: torch.Tensor, *, name: str) -> F32:
    """Return ``rows`` as C-contiguous float32, zero-padded to a multiple of `LANES` columns.

    Shapes: ``rows`` (n, dim), returns (n, width).
    """
    check_rows(rows, name=name)
    wide = rows.detach().to(torch.float32).contiguous()
    extra = padded(rows.shape[1], LANES) - rows.shape[1]
    if extra:
        wide = torch.nn.functional.pad(wide, (0, extra))
    found: F32 = wide.numpy()
    return found


def check_rows(rows: torch.Tensor, *, name: str) -> None:
    """Refuse anything but a matrix of float32, float16 or bfloat16."""
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise UsageError(
            f"{name} has shape {tuple(rows.shape)}; give (rows, dim) with dim at least 1"
        )
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(
            f"{name} is {rows.dtype}; give float32, float16 or bfloat16 "
            f"(for example {name}.float())"
        )


class Table:
    """Vectors to search, with everything screening needs.

    Scaled units: rows are centered on ``center`` and multiplied by ``2**-exponent``, which brings
    the longest to at most 1.

    Args:
        rows: ``(entries, dim)`` float32, float16 or bfloat16 on the CPU.
        metric: `L2`, `INNER` or `COSINE`.
        unique: keep only the first of exact duplicates (they can never win a tie).
        name: the argument's name for messages.

    Attributes:
        rows: ``(entries, width)`` float32, as given, padded with zero columns.
        original: ``(entries,)`` int64, index of each kept row in what was given, ascending.
        norms: ``(entries,)`` float64 lengths of the rows.
        scaled: ``(columns, width)`` float32 scaled rows, then zero rows up to a multiple of 64.
        offsets: ``(columns,)`` float32, subtracted from products; `PAD_OFFSET` on padding.
        lengths: ``(entries,)`` float64 norms of the scaled rows.
        radius: the largest of ``lengths``.
        reach: length of the center plus ``radius``, scaled units.

    Raises:
        UsageError: no rows, another dtype or shape.
        EmbeddingError: a value is NaN or infinite.
    """

    def __init__(
        self, rows: torch.Tensor, *, metric: int, unique: bool, name: str = "codebook"
    ) -> None:
        given = float32_rows(rows, name=name)
        if len(given) == 0:
            raise UsageError(f"{name} is empty; give at least one row")
        if not np.isfinite(given).all():
            bad = int((~np.isfinite(given).all(axis=1)).sum())
            raise EmbeddingError(
                f"{name} holds NaN or infinite values in {bad} of {len(given)} rows; "
                "remove or replace them first"
            )
        self.metric = metric
        self.dim = int(rows.shape[1])
        given = given + np.float32(0.0)  # a copy of our own, -0 becomes 0
        self.original: I64 = np.arange(len(given), dtype=np.int64)
        if unique:
            self.original = first_copies(given)
            if len(self.original) < len(given):
                given = given[self.original]
        self.rows: F32 = given
        self._scale()
        self._lock = threading.Lock()
        self._operands: dict[str, Operand | None] = {}
        self.on_devices: dict[Any, Any] = {}  # see `gpu.device_table`
        self.routes: dict[int, Any] = {}  # the route chosen for each k

    def _scale(self) -> None:
        entries, width = self.rows.shape
        columns = padded(entries, SCAN)
        self.norms: F64 = np.empty(entries)
        norms(self.rows, self.norms)
        self.center: F32 = np.empty(width, np.float32)
        self.scaled: F32 = aligned((columns, width), np.float32)
        self.lengths: F64 = np.empty(entries)
        half = np.empty(entries)
        self.exponent: int = center_table(
            self.rows,
            self.norms,
            self.metric == COSINE,
            self.center,
            self.scaled,
            half,
            self.lengths,
        )
        self.offsets: F32 = np.full(columns, PAD_OFFSET, np.float32)
        self.offsets[:entries] = half if self.metric == L2 else 0.0
        self.radius = float(self.lengths.max())
        center = float(np.linalg.norm(self.center.astype(np.float64)))
        self.reach = self.radius + center * 2.0**-self.exponent

    def __len__(self) -> int:
        return len(self.rows)

    def operand(self, name: str, make: Callable[[Table], Operand | None]) -> Operand | None:
        """Return the copy called ``name``, made at its first use; None if impossible."""
        if name not in self._operands:
            with self._lock:
                if name not in self._operands:
                    self._operands[name] = make(self)
        return self._operands[name]

    def bfloat16(self, multiple: int) -> tuple[npt.NDArray[np.uint16], float]:
        """Round the scaled rows to bfloat16.

        Args:
            multiple: pad the width to a multiple of this.

        Returns:
            Bit patterns ``(columns, width)``, and the largest norm of what rounding took.
        """
        columns, width = self.scaled.shape
        bits = aligned((columns, padded(width, multiple)), np.uint16)
        residual = np.empty(columns)
        line = np.empty(width, np.float32)
        round_bfloat16(
            self.scaled, self.scaled.view(np.uint32), line, line.view(np.uint32), bits, residual
        )
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
        if total <= MAX_TABLE_RADII * MAX_TABLE_RADII:
            half_square[i] = total / 2.0
        else:  # also when total is NaN
            half_square[i] = -1.0
            for j in range(width):
                y[i, j] = np.float32(0.0)
    for i in range(rows, y.shape[0]):
        for j in range(width):
            y[i, j] = np.float32(0.0)


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
    for i in range(entries, scaled.shape[0]):
        for j in range(width):
            scaled[i, j] = np.float32(0.0)
    return exponent


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def _hash_rows(
    bits: npt.NDArray[np.uint32],
    weights: npt.NDArray[np.uint64],
    hashes: npt.NDArray[np.uint64],
) -> None:
    for i in range(bits.shape[0]):
        total = np.uint64(0)
        for j in range(bits.shape[1]):
            total += np.uint64(bits[i, j]) * weights[j]
        hashes[i] = total


def first_copies(rows: F32) -> I64:
    """Find exact duplicates.

    Returns ``(different,)`` ascending indices of the rows that equal no earlier row.

    Shapes: ``rows`` (entries, width).
    """
    bits = rows.view(np.uint32)
    weights = np.random.default_rng(0).integers(2**63, size=rows.shape[1], dtype=np.uint64)
    hashes = np.empty(len(rows), np.uint64)
    _hash_rows(bits, weights * np.uint64(2) + np.uint64(1), hashes)
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    twin = np.zeros(len(rows), bool)
    twin[order[1:]] |= ranked[1:] == ranked[:-1]
    twin[order[:-1]] |= ranked[1:] == ranked[:-1]
    keep = np.ones(len(rows), bool)
    seen: set[bytes] = set()
    for i in np.flatnonzero(twin):
        row = bits[i].tobytes()
        keep[i] = row not in seen
        seen.add(row)
    return np.flatnonzero(keep)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, fastmath=FAST)
def round_bfloat16(
    y: F32,
    bits: npt.NDArray[np.uint32],
    wide: F32,
    wide_bits: npt.NDArray[np.uint32],
    out: npt.NDArray[np.uint16],
    residual: F64,
) -> None:
    """Round rows to bfloat16 (nearest, ties to even) and measure what the rounding lost.

    ``y`` ``(rows, width)`` finite, ``wide`` ``(width,)`` scratch; ``bits`` and ``wide_bits`` are
    the same memory as uint32. Writes bit patterns to ``out`` ``(rows, >= width)``, further columns
    zero, and the norm of the rounding error, summed in float32 (see `slack`), to ``residual``
    ``(rows,)``.
    """
    rows, width = y.shape
    one, half, sixteen = np.uint32(1), np.uint32(0x7FFF), np.uint32(16)
    for i in range(rows):
        for j in range(width):
            raw = bits[i, j]
            rounded = (raw + half + ((raw >> sixteen) & one)) >> sixteen
            out[i, j] = rounded
            wide_bits[j] = rounded << sixteen
        for j in range(width, out.shape[1]):
            out[i, j] = np.uint16(0)
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
