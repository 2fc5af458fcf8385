"""What the search needs of numpy alone: rows as float32, and the nearest codewords of few rows.

A command that encodes ten thousand rows would spend most of its time importing numba and fetching
kernels. So the first `WORK` multiply-adds of a process are done here, in float64 products, with the
candidates and the canonical keys of the other files: the answers are the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from semid.errors import EmbeddingError, UsageError
from semid.lazy import is_imported
from semid.quantization.threads import one_numpy_thread

if TYPE_CHECKING:
    from torch import Tensor

Rows: TypeAlias = "npt.NDArray[Any] | Tensor"
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

L2, INNER, COSINE = 0, 1, 2
METRICS = {"l2": L2, "ip": INNER, "cosine": COSINE}
"""Names of the metrics."""
LANES = 16
"""Lanes of the canonical sums; rows are zero-padded to a multiple of it."""
SCAN = 64
"""Scores that kernels look at together; score rows are padded to a multiple of it."""
WORK = 5_000_000_000
"""Multiply-adds that take about as long as importing numba and fetching the kernels."""
ROWS = 128
"""Rows whose float64 scores and differences are held at once: they stay in the second cache."""


def padded(columns: int, multiple: int) -> int:
    """Round ``columns`` up to a multiple."""
    return -(-columns // multiple) * multiple


def check_rows(rows: Rows, *, name: str) -> None:
    """Refuse anything but a matrix of float32, float16 or bfloat16, an array or a tensor."""
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise UsageError(
            f"{name} has shape {tuple(rows.shape)}; give (rows, dim) with dim at least 1"
        )
    if str(rows.dtype).removeprefix("torch.") not in ("float32", "float16", "bfloat16"):
        cast = "astype(np.float32)" if isinstance(rows, np.ndarray) else "float()"
        raise UsageError(
            f"{name} is {rows.dtype}; give float32, float16 or bfloat16 (for example {name}.{cast})"
        )


def float32_rows(rows: Rows, *, name: str, multiple: int = LANES) -> F32:
    """Return ``rows`` as C-contiguous float32 ``(n, width)``, ``multiple`` of columns wide."""
    check_rows(rows, name=name)
    # Tensors without naming torch, which may not have been imported.
    array = rows if isinstance(rows, np.ndarray) else rows.detach().float().cpu().numpy()
    dim = array.shape[1]
    if dim % multiple == 0:
        return np.ascontiguousarray(array, dtype=np.float32)
    wide = np.zeros((len(array), padded(dim, multiple)), np.float32)
    wide[:, :dim] = array
    return wide


def check_entries(vectors: F32, *, name: str) -> None:
    """Refuse a table to search ``(entries, width)`` that is empty or not finite."""
    if len(vectors) == 0:
        raise UsageError(f"{name} is empty; give at least one row")
    if not np.isfinite(vectors).all():
        bad = int((~np.isfinite(vectors).all(axis=1)).sum())
        raise EmbeddingError(
            f"{name} holds NaN or infinite values in {bad} of {len(vectors)} rows; "
            "remove or replace them first"
        )


_done = 0  # multiply-adds of this process so far


def would_suit(work: int) -> bool:
    """Whether ``work`` multiply-adds more are better done here than by kernels."""
    return not is_imported("numba") and _done + work <= WORK


def suits_plain(work: int) -> bool:
    """As `would_suit`; what suits counts as done."""
    global _done
    suits = would_suit(work)
    _done += work * suits
    return suits


def lengths(rows: F32) -> F64:
    """Return the lengths of rows ``(n, dim)``, summed in the order of canonical keys."""
    rows, squares = float32_rows(rows, name="x"), np.empty(len(rows))
    for start in range(0, len(rows), ROWS):
        block = rows[start : start + ROWS].astype(np.float64)
        squares[start : start + ROWS] = _square_sums(block)
    return np.asarray(np.sqrt(squares))


def nearest_plain(x: Rows, codewords: F32, *, name: str = "x") -> tuple[I64, F64]:
    """Find the codeword ``(codes, dim)`` nearest to each row ``(n, dim)`` by the canonical key.

    Returns labels ``(n,)``, ties to the lowest, and keys ``(n,)``, as `engine.search.search` does.
    """
    rows, entries = float32_rows(x, name=name), float32_rows(codewords, name="codebook")
    labels, keys = np.empty(len(rows), np.int64), np.empty(len(rows))
    table = entries.astype(np.float64)
    lengths = np.sqrt(np.einsum("kd,kd->k", table, table))
    half_squares, longest = 0.5 * lengths**2, float(lengths.max())
    factor = (table.shape[1] + 64) * 2.0**-52
    for start in range(0, len(rows), ROWS):
        span = slice(start, start + ROWS)
        block = rows[span].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # rows that are not finite
            length = np.sqrt(np.einsum("nd,nd->n", block, block))
            with one_numpy_thread():
                scores = block @ table.T
            scores -= half_squares
            # Scores and canonical keys are both rounded: twice the bound of either covers a winner.
            threshold = scores.max(axis=1) - 2.0 * factor * (length + longest) ** 2
            row, entry = np.nonzero(scores >= threshold[:, None])
            # Rows that are not finite have no scores; they are as far from one entry as from all.
            bad = np.flatnonzero(~np.isfinite(threshold))
            if len(bad):
                finite = ~np.isin(row, bad)
                row = np.concatenate([row[finite], bad])
                entry = np.concatenate([entry[finite], np.zeros(len(bad), np.int64)])
            values = _square_distances(block[row], table[entry])
        # By row, then key, then index: the first of each row wins.
        order = np.lexsort((entry, values, row))
        first = order[np.unique(row[order], return_index=True)[1]]
        labels[span], keys[span] = entry[first], values[first]
    return labels, keys


def _square_distances(a: F64, b: F64) -> F64:
    """Return canonical keys ``(n,)`` of pairs ``(n, width)``; see `vector`."""
    a -= b
    return _square_sums(a)


def _square_sums(a: F64) -> F64:
    """Return the sums of squares ``(n,)`` of rows ``(n, width)``, which are overwritten."""
    a *= a
    lanes = a.reshape(len(a), -1, LANES)
    total = lanes[:, 0].copy()
    for block in range(1, lanes.shape[1]):
        total += lanes[:, block]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]
