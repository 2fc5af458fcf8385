"""A table of vectors made ready for exact search: immutable, shared by threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import EmbeddingError, UsageError
from semid.quantization.engine.canonical import COSINE, L2, norms
from semid.quantization.engine.rows import center_table, first_copies, round_bfloat16, slack
from semid.quantization.engine.vector import LANES, SCAN

__all__ = ["PAD_OFFSET", "Operand", "Table", "aligned", "check_rows", "float32_rows", "padded"]

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

    Args:
        rows: ``(n, dim)`` float32, float16 or bfloat16 on the CPU; all three convert exactly.
        name: the argument's name for messages.

    Returns:
        ``(n, width)``, sharing memory with ``rows`` where nothing had to change.

    Raises:
        UsageError: another dtype or not two-dimensional.
    """
    check_rows(rows, name=name)
    wide = rows.detach().to(torch.float32).contiguous()
    extra = padded(rows.shape[1], LANES) - rows.shape[1]
    if extra:
        wide = torch.nn.functional.pad(wide, (0, extra))
    found: F32 = wide.numpy()
    return found


def check_rows(rows: torch.Tensor, *, name: str) -> None:
    """Refuse anything but a matrix of float32, float16 or bfloat16.

    Raises:
        UsageError: naming what was given.
    """
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
