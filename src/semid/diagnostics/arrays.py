"""Input of the diagnostics: shapes are checked, blocks are cut, cast and checked for NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from semid.errors import InputError
from semid.quantization.threads import map_blocks

Matrix = npt.NDArray[Any] | torch.Tensor

BLOCK_ROWS = 16_384
"""Rows per block; fixed, so that sums do not depend on memory or threads."""


def as_matrix(x: Matrix, name: str) -> npt.NDArray[Any]:
    """Return ``x`` (items, dim) as an array without copying it; ``name`` is for the error."""
    array = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asanyarray(x)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] == 0:
        raise InputError(
            f"{name} has shape {array.shape}; (items, dim) with at least one row is needed"
        )
    if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} has dtype {array.dtype}; numbers are needed")
    return array


def row_blocks(items: int, size: int = BLOCK_ROWS) -> Iterator[slice]:
    """Yield slices over the rows, in order."""
    for start in range(0, items, size):
        yield slice(start, min(start + size, items))


def as_block(array: npt.NDArray[Any], rows: slice | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return rows as contiguous float32 ``(batch, dim)``; InputError if one is not finite."""
    block = np.ascontiguousarray(array[rows], dtype=np.float32)
    if not np.isfinite(block).all():
        bad = int(np.flatnonzero(~np.isfinite(block).all(1))[0])
        start = rows.start or 0 if isinstance(rows, slice) else None
        row = int(rows[bad]) if start is None else start + bad  # type: ignore[index]
        raise InputError(f"row {row} holds NaN or infinite values; drop such rows first")
    return block


def unit_rows(block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the rows scaled to length one; rows of zeros stay zeros."""
    norms = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    result: npt.NDArray[np.float32] = (block * scale[:, None]).astype(np.float32)
    return result


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _dots(
    table: npt.NDArray[np.float32],
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    out: npt.NDArray[np.float64],
) -> None:
    """Write the inner products of pairs of rows, products and sums in float64."""
    for i in range(len(first)):
        a, b = first[i], second[i]
        total = 0.0
        for j in range(table.shape[1]):
            total += np.float64(table[a, j]) * np.float64(table[b, j])
        out[i] = total


def pair_cosines(
    table: npt.NDArray[Any],
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    *,
    threads: int | None = None,
) -> npt.NDArray[np.float64]:
    """Return the cosines of pairs of rows ``(pairs,)``: exactly 1 for equal rows, 0 for zero rows.

    Args:
        table: ``(rows, dim)``; copied when it is not float32.
        first: row of each pair, ``(pairs,)``.
        second: the other row, ``(pairs,)``.
        threads: number of CPU threads; the result does not depend on it.
    """
    rows = np.asarray(np.ascontiguousarray(table, dtype=np.float32))
    every = np.arange(len(rows))
    squares, result = np.empty(len(rows)), np.empty(len(first))

    # Squared norms are taken by the same function as the products of pairs, so the cosine of equal
    # rows is exactly 1.
    def norm(part: slice) -> None:
        _dots(rows, every[part], every[part], squares[part])

    def cosine(part: slice) -> None:
        a, b, out = first[part], second[part], result[part]
        _dots(rows, a, b, out)
        scale = np.sqrt(squares[a] * squares[b])  # of equal rows exactly the product
        np.divide(out, scale, out=out, where=scale > 0)

    map_blocks(norm, list(row_blocks(len(rows))), threads=threads)
    if not np.isfinite(squares).all():
        bad = int(np.flatnonzero(~np.isfinite(squares))[0])
        raise InputError(f"row {bad} holds NaN or infinite values; drop such rows first")
    map_blocks(cosine, list(row_blocks(len(first))), threads=threads)
    return result
