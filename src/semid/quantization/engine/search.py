"""The search itself: blocks of queries through a route, candidates through the canonical key."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import UsageError
from semid.quantization.engine.keys import L2, norms, resolve_best, resolve_many
from semid.quantization.engine.sweep import trim_rows
from semid.quantization.engine.table import (
    Operand,
    Table,
    aligned,
    center_queries,
    float32_rows,
    padded,
    round_bfloat16,
)
from semid.quantization.engine.vector import SCAN
from semid.quantization.engine.x86 import ROW_TILE
from semid.quantization.threads import map_blocks

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

LOWEST = -(2**30)  # below every int32 score, and far enough from the end to subtract a margin


class State:
    """Buffers for up to ``limit`` queries against tables of one width.

    Args:
        limit: most queries in a block, a multiple of `ROW_TILE`.
        width: columns of the padded rows.
        k: entries wanted for each query (one more where entries are excluded).
        best_only: one entry by squared distance, the case with its own shorter path.

    Attributes:
        rows: queries in the current block.
        y: ``(limit, width)`` float32 centered and scaled queries.
        length, residual, bound: ``(limit,)`` float64: norm of each query, what rounding took
            from it, and how far a score may lie from the truth (scaled units).
        unit, shift: ``(limit,)`` float64: true score estimate = stored score * unit + shift.
        margin, top, kept: per row and candidate, in the stored scores' own type.
        counts, candidates: per row; a count of -1 means that every entry is a candidate.
    """

    def __init__(self, limit: int, width: int, *, k: int, best_only: bool) -> None:
        self.limit, self.width, self.k, self.best_only = limit, width, k, best_only
        self.capacity = 4 * SCAN if best_only else max(8 * SCAN, 4 * k + 2 * SCAN)
        self.rows = 0
        self.y: F32 = aligned((limit, width), np.float32)
        self.y[:] = 0.0
        self.half_square: F64 = np.empty(limit)
        self.length: F64 = np.zeros(limit)
        self.residual: F64 = np.zeros(limit)
        self.bound: F64 = np.zeros(limit)
        self.unit: F64 = np.zeros(limit)
        self.shift: F64 = np.zeros(limit)
        self.counts: npt.NDArray[np.int64] = np.empty(limit, np.int64)
        self.candidates: npt.NDArray[np.int32] = np.empty((limit, self.capacity), np.int32)
        self.margin: Any = None
        self.top: Any = None
        self.kept: Any = None
        self.scratch: Any = None
        self._attained: F64 | None = None
        self._buffers: dict[str, npt.NDArray[Any]] = {}

    def fits(self, limit: int, width: int, k: int, best_only: bool) -> bool:
        """Return whether these buffers are the ones such a search would make."""
        return (self.limit, self.width, self.k, self.best_only) == (limit, width, k, best_only)

    def buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Return scratch memory that is kept for the next block; its contents are left over."""
        size = int(np.prod(shape))
        found = self._buffers.get(name)
        if found is None or found.size < size or found.dtype != dtype:
            found = self._buffers[name] = aligned((size,), dtype)
        return found[:size].reshape(shape)

    def load(self, x: F32, table: Table, within: F64 | None = None) -> None:
        """Take a block: center, scale and measure ``x`` ``(rows, width)``.

        ``within`` ``(rows,)``: squared distances that ``k`` entries are known not to exceed.
        """
        self.rows = rows = len(x)
        l2 = table.metric == L2
        center = table.center if l2 else np.zeros_like(table.center)
        factor = 2.0**-table.exponent
        center_queries(x, rows, center, factor, not l2, self.y, self.half_square)
        self.length[:rows] = np.sqrt(2.0 * np.maximum(self.half_square[:rows], 0.0))
        self.length[rows:] = 0.0
        self._attained = (
            None if within is None else self.half_square[:rows] - 0.5 * within * factor * factor
        )

    def round_bfloat16(self, bits: npt.NDArray[np.uint16]) -> None:
        """Write the queries as bfloat16 to ``bits`` and note what that took from them."""
        line = self.buffer("line", (self.width,), np.float32)
        y = self.y[: len(bits)]
        round_bfloat16(y, y.view(np.uint32), line, line.view(np.uint32), bits, self.residual)

    def set_bound(
        self, table: Table, *, residual: F64, entry_residual: float, relative: float = 0.0,
        absolute: F64 | float = 0.0, unit: F64 | None = None, shift: F64 | None = None,
    ) -> None:  # fmt: skip
        """Bound each row's score error and reset its candidates.

        Shapes: ``residual`` (limit,).
        """
        length = self.length
        reach = table.radius + entry_residual
        product = (length + residual) * reach
        bound = residual * table.radius + (length + residual) * entry_residual
        bound += relative * product + (self.width + 32) * 2.0**-23 * (product + reach * reach)
        # The canonical float64 sums round too, and decide: cover what they may turn over.
        canonical = (self.width + 64) * 2.0**-52
        whole = length + table.radius if table.metric == L2 else table.reach
        bound += canonical * (whole * whole if table.metric == L2 else length * whole)
        self.bound[:] = bound + absolute + 2.0**-60
        if unit is None or shift is None:
            self.unit[:] = 1.0
            self.shift[:] = 0.0
            self._reset(np.dtype(np.float32))
            # Widened for the rounding of the threshold, which is a float32 subtraction.
            self.margin[:] = 2.0 * self.bound * (1.0 + 2.0**-20)
            self.margin[:] += 2.0**-21 * (length * reach + 1.0)
            return
        self.unit[:] = unit
        self.shift[:] = shift
        self._reset(np.dtype(np.int32))
        wide = np.ceil(2.0 * self.bound / np.maximum(unit, 2.0**-120)) + 2.0
        self.counts[wide > -LOWEST] = -1
        self.margin[:] = np.minimum(wide, -LOWEST)

    def _reset(self, dtype: np.dtype[Any]) -> None:
        if self.margin is None or self.margin.dtype != dtype:
            self.margin = np.empty(self.limit, dtype)
            self.top = np.empty(self.limit, dtype)
            self.kept = np.empty((self.limit, self.capacity), dtype)
            self.scratch = np.empty(self.capacity, dtype)
        self.top[:] = LOWEST if dtype == np.int32 else -np.inf
        if self._attained is not None:
            self._raise(self._attained)
        self.counts[:] = 0
        self.counts[: self.rows][self.half_square[: self.rows] < 0] = -1

    def _raise(self, attained: F64) -> None:
        """Start from scores that the ``k``-th best entry of each row is known to reach."""
        rows = self.rows
        stored = (attained - self.shift[:rows]) / np.maximum(self.unit[:rows], 2.0**-120)
        stored[~np.isfinite(stored)] = -np.inf
        if self.top.dtype == np.int32:
            self.top[:rows] = np.clip(np.floor(stored), LOWEST, -LOWEST)
        else:
            self.top[:rows] = np.nextafter(stored.astype(np.float32), np.float32(-np.inf))

    def trim_all(self) -> None:
        """Drop the candidates that the final ``k``-th best score of each row rules out."""
        trim_rows(
            self.rows, self.k, self.margin, self.top, self.counts, self.candidates, self.kept,
            self.scratch,
        )  # fmt: skip


BLOCK = 1024
"""Queries a block: enough to reuse the table from cache, few enough to share among threads."""


class Found(NamedTuple):
    """What `search` found.

    Attributes:
        labels: ``(queries, k)`` int64, best first.
        keys: ``(queries, k)`` float64 canonical keys.
        measured: pairs whose canonical key was computed.
    """

    labels: npt.NDArray[np.int64]
    keys: npt.NDArray[np.float64]
    measured: int


class Route(Protocol):
    """A way to score all entries for a block of queries and to bound the scores' error."""

    name: str
    library: str

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""

    def prepare(self, table: Table) -> Operand | None:
        """Make the table's copy for this route; None where it cannot hold this table."""

    def screen(self, table: Table, operand: Operand, state: State) -> None:
        """Fill ``state``'s candidates so that every possible winner is among them."""


# Fresh buffers cost page faults, which for a small block take longer than the search.
_kept = threading.local()


def _state(limit: int, width: int, k: int, best_only: bool) -> State:
    """Return this thread's buffers, those of its last search where they fit."""
    found: State | None = getattr(_kept, "state", None)
    if found is None or not found.fits(limit, width, k, best_only):
        found = _kept.state = State(limit, width, k=k, best_only=best_only)
    return found


def search(
    queries: torch.Tensor,
    table: Table,
    route: Route,
    *,
    k: int = 1,
    exclude: npt.NDArray[np.int64] | None = None,
    within: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    name: str = "x",
) -> Found:
    """Find the ``k`` entries with the smallest canonical keys, ties to the lowest index.

    Shapes: ``queries`` (queries, dim), ``exclude`` (queries,), ``within`` (queries,).
    """
    count, width = len(queries), table.rows.shape[1]
    labels = np.empty((count, k), np.int64)
    keys = np.empty((count, k))
    best_only = k == 1 and exclude is None and within is None and table.metric == L2
    wanted = k if exclude is None else k + 1
    operand = table.operand(route.name + route.library, route.prepare)
    if operand is None:
        raise UsageError(f"route '{route.name}' cannot hold a table {table.dim} columns wide")
    limit = min(BLOCK, padded(max(count, 1), ROW_TILE))

    def work(start: int) -> int:
        stop = min(start + limit, count)
        x = float32_rows(queries[start:stop], name=name)
        state = _state(limit, width, wanted, best_only)
        state.load(x, table, None if within is None else within[start:stop])
        route.screen(table, operand, state)
        found, ranked = labels[start:stop], keys[start:stop]
        if best_only:
            return int(
                resolve_best(
                    x, table.rows, state.rows, state.counts, state.candidates, state.kept,
                    state.unit, state.shift, state.bound, state.half_square,
                    0.5 * 4.0**-table.exponent, found[:, 0], ranked[:, 0],
                )
            )  # fmt: skip
        state.trim_all()
        lengths = np.empty(len(x))
        norms(x, lengths)
        left_out = np.full(len(x), -1) if exclude is None else exclude[start:stop]
        return int(
            resolve_many(
                table.metric, x, lengths, table.rows, table.norms, state.rows, left_out,
                state.counts, state.candidates, within is not None, found, ranked,
            )
        )  # fmt: skip

    measured = sum(map_blocks(work, range(0, count, limit), threads=threads))
    return Found(table.original[labels], keys, measured)
