"""The screen of the nearest entry as three Triton kernels: no score leaves the chip.

torch writes all scores and reads them three times; here a tile of queries meets tile after tile of
entries and keeps its best two. Imported on CUDA devices alone, and by tests under
``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES, ENTRIES, COLUMNS = 128, 128, 64
"""Tile of one step of the product."""


@triton.jit
def _center(  # type: ignore[no-untyped-def]
    x_ptr, center_ptr, factor_ptr, half_ptr, length_ptr, residual_ptr, usable_ptr, queries,
    longest, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Center and scale rows in float64, round them to float16, measure what that loses."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(factor_ptr)
    square = tl.zeros((ROWS,), tl.float64)
    largest = tl.zeros((ROWS,), tl.float64)
    for start in range(0, WIDTH, COLS):
        column = start + tl.arange(0, COLS)
        inside = (row[:, None] < queries) & (column[None, :] < WIDTH)
        x = tl.load(x_ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :], inside, other=0.0)
        middle = tl.load(center_ptr + column, column < WIDTH, other=0.0)
        y = (x.to(tl.float64) - middle[None, :]) * factor
        y = tl.where(inside, y, 0.0)
        square += tl.sum(y * y, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
    # False for NaN; float16 ends at 65,504.
    usable = (square <= longest * longest) & (largest <= 32768.0)
    lost = tl.zeros((ROWS,), tl.float64)
    for start in range(0, WIDTH, COLS):
        column = start + tl.arange(0, COLS)
        inside = (row[:, None] < queries) & (column[None, :] < WIDTH)
        place = row[:, None].to(tl.int64) * WIDTH + column[None, :]
        x = tl.load(x_ptr + place, inside, other=0.0)
        middle = tl.load(center_ptr + column, column < WIDTH, other=0.0)
        y = (x.to(tl.float64) - middle[None, :]) * factor
        y = tl.where(inside & usable[:, None], y, 0.0)
        half = y.to(tl.float32).to(tl.float16)
        apart = y - half.to(tl.float64)
        lost += tl.sum(apart * apart, axis=1)
        tl.store(half_ptr + place, half, inside)
    tl.store(length_ptr + row, tl.sqrt(tl.where(usable, square, 0.0)), row < queries)
    tl.store(residual_ptr + row, tl.sqrt(lost), row < queries)
    tl.store(usable_ptr + row, usable.to(tl.int8), row < queries)


@triton.jit
def _best_two(  # type: ignore[no-untyped-def]
    query_ptr, entry_ptr, offset_ptr, best_ptr, label_ptr, second_ptr, queries, entries,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Score a tile of queries against all entries; keep the best, its label and the second."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    second = tl.full((ROWS,), float("-inf"), tl.float32)
    label = tl.zeros((ROWS,), tl.int32)
    for first in range(0, entries, TILE):
        entry = first + tl.arange(0, TILE)
        scores = tl.zeros((ROWS, TILE), tl.float32)
        for start in range(0, WIDTH, COLS):
            column = start + tl.arange(0, COLS)
            mine = (row[:, None] < queries) & (column[None, :] < WIDTH)
            left = query_ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :]
            theirs = (entry[None, :] < entries) & (column[:, None] < WIDTH)
            right = entry_ptr + entry[None, :].to(tl.int64) * WIDTH + column[:, None]
            scores = tl.dot(
                tl.load(left, mine, other=0.0), tl.load(right, theirs, other=0.0), scores
            )
        offset = tl.load(offset_ptr + entry, entry < entries, other=float("-inf"))
        scores += offset[None, :]
        top, at = tl.max(scores, axis=1, return_indices=True)
        others = tl.where(tl.arange(0, TILE)[None, :] == at[:, None], float("-inf"), scores)
        # The second of both: the better of the seconds and of the worse best.
        second = tl.maximum(tl.maximum(second, tl.max(others, axis=1)), tl.minimum(best, top))
        label = tl.where(top > best, first + at, label)
        best = tl.maximum(best, top)
    tl.store(best_ptr + row, best, row < queries)
    tl.store(label_ptr + row, label.to(tl.int64), row < queries)
    tl.store(second_ptr + row, second, row < queries)


@triton.jit
def _distances(  # type: ignore[no-untyped-def]
    query_ptr, entry_ptr, label_ptr, key_ptr, queries, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Measure one entry per query in the canonical order: 16 lanes, then 8, 4, 2 and 1 apart."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    label = tl.load(label_ptr + row, row < queries, other=0)
    lanes = tl.zeros((ROWS, 16), tl.float64)
    for start in range(0, WIDTH, 16):
        column = start + tl.arange(0, 16)
        inside = row[:, None] < queries
        x = tl.load(
            query_ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :], inside, other=0.0
        )
        c = tl.load(entry_ptr + label[:, None] * WIDTH + column[None, :], inside, other=0.0)
        apart = x.to(tl.float64) - c.to(tl.float64)
        lanes = lanes + apart * apart
    # A sum of two numbers is the same in either order.
    lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, 8)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, 4)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, 2)), axis=1)
    key = tl.sum(lanes, axis=1)
    tl.store(key_ptr + row, tl.where(key == key, key, float("inf")), row < queries)


def center(x: Tensor, middle: Tensor, factor: Tensor, longest: float) -> tuple[Tensor, ...]:
    """Return centered, scaled float16 rows ``(queries, width)``, lengths, losses, which are usable.

    ``x`` float32, its width a multiple of 16; ``middle`` ``(width,)`` and ``factor`` float64.
    Rows longer than ``longest``, not finite, or beyond float16 become zeros.
    """
    queries, width = x.shape
    half = torch.empty_like(x, dtype=torch.float16)
    length, residual = (x.new_empty(queries, dtype=torch.float64) for _ in range(2))
    usable = x.new_empty(queries, dtype=torch.int8)
    _launch(
        _center, queries, 32, x, middle, factor, half, length, residual, usable, queries, longest,
        width, COLS=COLUMNS,
    )  # fmt: skip
    return half, length, residual, usable.bool()


def best_two(half: Tensor, entries: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best score ``(queries,)``, its entry (ties to the lowest) and the second best.

    ``entries`` ``(entries, width)`` float16; sums and ``offsets`` are float32.
    """
    best, second = (half.new_empty(len(half), dtype=torch.float32) for _ in range(2))
    label = half.new_empty(len(half), dtype=torch.int64)
    _launch(
        _best_two, len(half), QUERIES, half, entries, offsets, best, label, second, len(half),
        len(entries), half.shape[1], TILE=ENTRIES, COLS=COLUMNS, num_warps=8, num_stages=3,
    )  # fmt: skip
    return best, label, second


def distances(x: Tensor, entries: Tensor, label: Tensor) -> Tensor:
    """Return the canonical keys ``(queries,)`` of one entry per query."""
    key = x.new_empty(len(x), dtype=torch.float64)
    # A fused multiply-add would round once where the CPU's kernel rounds twice.
    _launch(
        _distances, len(x), 64, x, entries, label, key, len(x), x.shape[1], enable_fp_fusion=False
    )
    return key


def _launch(kernel: Any, queries: int, rows: int, *arguments: Any, **options: Any) -> None:
    kernel[(triton.cdiv(queries, rows),)](*arguments, ROWS=rows, **options)
