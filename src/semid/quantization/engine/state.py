"""What one thread keeps while it screens a block of queries: buffers, bounds, candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from semid.quantization.engine.canonical import L2
from semid.quantization.engine.rows import center_queries, round_bfloat16
from semid.quantization.engine.screen import trim_rows
from semid.quantization.engine.table import Table, aligned
from semid.quantization.engine.vector import SCAN

__all__ = ["ROW_TILE", "State"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

ROW_TILE = 32
"""Rows the compiled kernels take together; blocks are padded to it with zero rows."""
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

        Args:
            table: what is searched.
            residual: ``(limit,)`` norms of what rounding took from the queries.
            entry_residual: the same for the table's rows, the largest.
            relative: rounding of the finished product, relative to the norms' product (that of
                its float32 sums, in any order, is always counted).
            absolute: further error, scaled units.
            unit: int32 scores: what turns one into scaled units (score * unit + shift).
            shift: see ``unit``.
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
