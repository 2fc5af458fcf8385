"""Scanning score blocks: which entries can still be among a row's best, given the bound."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from semid.quantization.engine.plain import SCAN
from semid.quantization.engine.vector import hits, maximum, score, trailing_zeros
from semid.quantization.engine.x86 import (
    ROW_TILE,
    begin,
    block_columns,
    block_rows,
    end,
    group_columns,
    score_block,
)

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def _keep(row: int, candidates: I32, values: Any, count: int, threshold: Any) -> int:
    """Drop a row's candidates whose score is below ``threshold``, in place and in order."""
    size = 0
    for j in range(count):
        if values[row, j] >= threshold:
            candidates[row, size] = candidates[row, j]
            values[row, size] = values[row, j]
            size += 1
    return size


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def kth_largest(values: Any, count: int, k: int) -> Any:
    """Return the ``k``-th largest (1-based) of ``values[:count]``; reorders ``values``."""
    # Hoare's selection: partition about a pivot, continue in the part that holds place k - 1.
    low, high, goal = 0, count - 1, k - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                held = values[i]
                values[i] = values[j]
                values[j] = held
                i += 1
                j -= 1
        if goal <= j:
            high = j
        elif goal >= i:
            low = i
        else:
            break
    return values[goal]


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def trim(
    row: int, k: int, margin: Any, top: Any, counts: I64, candidates: I32, values: Any, scratch: Any
) -> None:
    """Raise a row's ``top`` to the ``k``-th best score seen and drop what falls behind it."""
    count = counts[row]
    if count < k:
        return
    for j in range(count):
        scratch[j] = values[row, j]
    # Entries still to come can only raise it: the k-th best so far is a lower bound.
    best = kth_largest(scratch, count, k)
    if best > top[row]:
        top[row] = best
    counts[row] = _keep(row, candidates, values, count, top[row] - margin[row])


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def trim_rows(
    rows: int, k: int, margin: Any, top: Any, counts: I64, candidates: I32, values: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """`trim` rows 0 to ``rows``."""
    for row in range(rows):
        trim(row, k, margin, top, counts, candidates, values, scratch)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def scan(
    scores: Any, rows: int, columns: int, first: int, offsets: F32, margin: Any, top: Any,
    counts: I64, candidates: I32, values: Any, row0: int, k: Any, scratch: Any,
) -> None:  # fmt: skip
    """Note every entry whose score lies within ``margin`` of its row's ``k``-th best so far.

    ``scores`` ``(>= rows, stride)``, larger is better: int32, float32, or uint16 that holds
    bfloat16 products from which the float32 ``offsets`` of all entries are still to be subtracted.
    ``columns``, a positive multiple of `SCAN`, are scanned; column 0 is entry ``first``, row 0 is
    row ``row0`` of what follows: ``margin``, twice the bound in the scores' own units and type;
    ``top``, a lower bound on the ``k``-th best score; ``counts`` of candidates, -1 once a row holds
    too many; ``candidates`` and their scores ``values`` ``(all rows, capacity)``. The last four are
    updated. For the best entry alone ``k`` and ``scratch`` are None; else ``scratch`` holds
    ``capacity``, at least ``k + 2 * SCAN``, scores.
    """
    stride = scores.shape[1]
    capacity = candidates.shape[1]
    for local in range(rows):
        i = row0 + local
        if counts[i] < 0:
            continue
        base = local * stride
        if k is None:
            # The best score of the block raises the threshold before anything is noted.
            best = maximum(scores, base, offsets, first, columns)
            if best > top[i]:
                top[i] = best
            if best < top[i] - margin[i]:
                continue
        for column in range(0, columns, SCAN):
            # An entry whose score lies further below `top` than both errors allow cannot win.
            threshold = top[i] - margin[i]
            mask = hits(scores, base + column, offsets, first + column, threshold)
            if mask == 0:
                continue
            if counts[i] > capacity - SCAN:
                # Full: `top` has risen since older candidates were noted, so some fall behind it.
                if k is None:
                    counts[i] = _keep(i, candidates, values, counts[i], threshold)
                else:
                    trim(i, k, margin, top, counts, candidates, values, scratch)
                if counts[i] > capacity - SCAN:
                    counts[i] = -1  # every entry becomes a candidate, which costs time alone
                    break
            count = counts[i]
            while mask != 0:
                at = trailing_zeros(mask)
                # Clears the lowest bit that is set.
                mask &= mask - np.uint64(1)
                candidates[i, count] = first + column + at
                values[i, count] = score(scores, base + column + at, offsets, first + column + at)
                count += 1
            counts[i] = count


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def sweep(
    chip: Any, a: Any, panels: Any, start: Any, scores: Any, saved: Any, rows: int, offsets: F32,
    margin: Any, top: Any, counts: I64, candidates: I32, values: Any, k: Any, scratch: Any,
) -> None:  # fmt: skip
    """Score and scan all rows and entries; a block of scores never leaves the cache.

    It is compiled per type of ``chip`` (see `x86`) at its first use, and separately for the best
    entry alone and for the ``k`` best: numba drops the branch that a ``k`` of None rules out.

    ``a`` ``(>= rows, width)``: rounded queries, a multiple of `ROW_TILE` rows. ``panels``: the
    packed table. ``start`` ``(tiles or 1, columns)``: what the sums start from, minus the offsets.
    ``scores`` ``(ROW_TILE, group)`` and ``saved`` ``(64,)``, which is None but for AMX, are
    scratch. The rest is as in `scan`.
    """
    columns = start.shape[1]
    begin(chip, saved)
    # All rows go past one group of entries before the next, so its packed lines stay in cache.
    for group in range(0, columns, group_columns(chip)):
        size = min(group_columns(chip), columns - group)
        for row in range(0, rows, ROW_TILE):
            line = (row // ROW_TILE) % start.shape[0]
            for column in range(0, size, block_columns(chip)):
                for block in range(row, row + ROW_TILE, block_rows(chip)):
                    score_block(
                        chip, a, block, panels, (group + column) // 16, start,
                        line * columns + group + column, scores, column,
                    )  # fmt: skip
            scan(
                scores, min(ROW_TILE, rows - row), size, group, offsets, margin, top, counts,
                candidates, values, row, k, scratch,
            )  # fmt: skip
    end(chip, saved)
