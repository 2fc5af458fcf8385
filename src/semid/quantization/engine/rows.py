"""Rows made ready for screening: centered, scaled by a power of two, measured, rounded."""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_TABLE_RADII",
    "center_queries",
    "center_table",
    "first_copies",
    "round_bfloat16",
    "slack",
]

MAX_TABLE_RADII = 2.0**30
"""A query further from the table's center than this many table radii is not screened."""

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

FAST = {"reassoc", "contract", "nsz"}  # NaN and infinity keep their meaning


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True, fastmath=FAST)
def center_queries(
    x: F32, rows: int, center: F32, factor: float, own_scale: bool, y: F32, half_square: F64
) -> None:
    """Write ``(x - center) * factor`` to ``y`` and half its squared norm to ``half_square``.

    Args:
        x: ``(>= rows, width)`` queries.
        rows: how many to take; further rows of ``y`` are set to zero.
        center: ``(width,)``.
        factor: power of two that brings the table's radius to at most 1.
        own_scale: scale each row by its own power of two instead (metrics in which the length
            of a query changes no ranking); ``center`` must be zero.
        y: ``(>= rows, width)`` float32 result; zero where a row cannot be screened.
        half_square: ``(rows,)``; -1 marks a row that cannot be screened (not finite, or beyond
            `MAX_TABLE_RADII`).
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
    """Center and scale a table; see `center_queries`.

    Args:
        table: ``(entries, width)`` rows as given.
        norms: ``(entries,)`` their lengths.
        normalize: divide each row by its length first (zero rows stay zero).
        center: ``(width,)`` result: the mean row.
        scaled: ``(>= entries, width)`` result: ``(row - center) * 2**-exponent``.
        offsets: ``(entries,)`` result: half the squared norm of each scaled row.
        lengths: ``(entries,)`` result: norm of each scaled row, at most 1.

    Returns:
        The exponent.
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

    Args:
        rows: ``(entries, width)`` without negative zeros.

    Returns:
        ``(different,)`` ascending indices of the rows that equal no earlier row.
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

    Args:
        y: ``(rows, width)`` finite values.
        bits: the same memory as uint32.
        wide: ``(width,)`` scratch.
        wide_bits: the same memory as uint32.
        out: ``(rows, >= width)`` bfloat16 bit patterns; further columns become zero.
        residual: ``(rows,)`` norm of the rounding error (float32 sums: see `slack`).
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
    """Bound the true rounding error of rows from its float32 measurement.

    Covers the sum's own rounding (``width`` float32 terms), squares that underflowed, and the
    float32 rounding of the centered row before it was rounded further.

    Args:
        residual: measured norms, as `round_bfloat16` gives them.
        length: norms of the centered rows.
        width: columns.
    """
    return residual * (1.0 + (width + 8) * 2.0**-24) + length * 2.0**-22 + 2.0**-60
