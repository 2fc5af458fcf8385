"""How well vectors are reconstructed, streaming and per level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.diagnostics.arrays import Matrix, as_block, as_matrix, row_blocks, unit_rows
from semid.errors import InputError, UsageError
from semid.results import Result

__all__ = ["Reconstruction", "ReconstructionCounter", "reconstruction", "reconstruction_by_level"]


@dataclass(frozen=True)
class Reconstruction(Result):
    """Reconstruction error under every reading the papers use.

    Attributes:
        name: what was reconstructed from what: ``decoder(codes)`` or ``decoder(z)``.
        items: rows compared.
        dim: width.
        mse: squared error per element.
        normalized_error: squared error summed over l2-normalized vectors, ``2 (1 - cosine)``; the
            DRQ paper's reading. Rows that are zero on one side are left out.
        relative_error: ``sum |x - x_hat|^2 / sum |x - mean|^2``; 1 is as good as the mean vector,
            None where all rows are equal.
        cosine: mean cosine of x and x_hat; rows that are zero on one side are left out.
        zero_rows: how many those are.
    """

    name: str
    items: int
    dim: int
    mse: float
    normalized_error: float | None
    relative_error: float | None
    cosine: float | None
    zero_rows: int


class ReconstructionCounter:
    """Adds up errors block by block, on one machine or many.

    Args:
        name: what is reconstructed from what, for the record.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._items = 0
        self._mean: npt.NDArray[np.float64] | None = None
        self._spread = self._squared = self._normalized = self._cosine = 0.0
        self._zero_rows = 0

    def update(self, x: Matrix, x_hat: Matrix) -> None:
        """Add rows ``(batch, dim)`` and their reconstructions.

        Raises:
            InputError: shapes differ, or values that are not finite.
        """
        whole, other = as_matrix(x, "x"), as_matrix(x_hat, "x_hat")
        if whole.shape != other.shape:
            raise InputError(f"x has shape {whole.shape} and x_hat {other.shape}; give the same")
        for rows in row_blocks(len(whole)):
            self._add(as_block(whole, rows), as_block(other, rows))

    def _add(self, x: npt.NDArray[np.float32], x_hat: npt.NDArray[np.float32]) -> None:
        difference = x.astype(np.float64) - x_hat
        self._squared += float(np.einsum("nd,nd->", difference, difference))
        a, b = unit_rows(x), unit_rows(x_hat)
        used = a.any(1) & b.any(1)
        self._zero_rows += int((~used).sum())
        # Of near-equal unit vectors the difference keeps digits that 1 - cosine loses.
        gap = a[used].astype(np.float64) - b[used]
        gaps = np.einsum("nd,nd->n", gap, gap)
        self._normalized += float(gaps.sum())
        self._cosine += float((1.0 - gaps / 2.0).sum())
        mean = x.mean(0, dtype=np.float64)
        centered = x - mean
        self._pool(len(x), mean, float(np.einsum("nd,nd->", centered, centered)))

    def _pool(self, items: int, mean: npt.NDArray[np.float64], spread: float) -> None:
        """Merge a mean and the squared distances to it into those so far."""
        if self._mean is None:
            self._items, self._mean, self._spread = items, mean, spread
            return
        if mean.shape != self._mean.shape:
            raise InputError(f"blocks are {len(self._mean)} and {len(mean)} wide; give one width")
        both = self._items + items
        step = mean - self._mean
        self._spread += spread + float(step @ step) * self._items * items / both
        self._mean = self._mean + step * (items / both)
        self._items = both

    def merge(self, other: ReconstructionCounter) -> None:
        """Add what another counter has added up."""
        if other._mean is None:
            return
        self._pool(other._items, other._mean, other._spread)
        self._squared += other._squared
        self._normalized += other._normalized
        self._cosine += other._cosine
        self._zero_rows += other._zero_rows

    def result(self) -> Reconstruction:
        """Return the errors of everything so far.

        Raises:
            InputError: nothing was added yet.
        """
        if self._mean is None:
            raise InputError("no rows were added yet; call update first")
        used = self._items - self._zero_rows
        return Reconstruction(
            name=self.name,
            items=self._items,
            dim=len(self._mean),
            mse=self._squared / (self._items * len(self._mean)),
            normalized_error=self._normalized / used if used else None,
            relative_error=self._squared / self._spread if self._spread > 0 else None,
            cosine=self._cosine / used if used else None,
            zero_rows=self._zero_rows,
        )


def reconstruction(x: Matrix, x_hat: Matrix, *, name: str) -> Reconstruction:
    """Compare vectors with their reconstructions.

    Args:
        x: ``(items, dim)``.
        x_hat: ``(items, dim)``.
        name: ``decoder(codes)`` or ``decoder(z)``; the two differ by an order of magnitude, so
            every table must say which it shows.

    Returns:
        A `Reconstruction`.

    Raises:
        InputError: shapes differ, or values that are not finite.

    Source: DRQ section 5.5 (0.000432 is ``2 (1 - 0.999784)``).
    """
    counter = ReconstructionCounter(name)
    counter.update(x, x_hat)
    return counter.result()


def reconstruction_by_level(
    x: Matrix,
    codes: Matrix,
    decode: Callable[[npt.NDArray[np.int64], int], Any],
) -> tuple[Reconstruction, ...]:
    """Compare vectors with what the first 1, 2, ... levels of their codes give.

    Args:
        x: ``(items, dim)``.
        codes: integers ``(items, levels)``.
        decode: codes ``(batch, levels)`` and a depth to reconstructions ``(batch, dim)`` from the
            first ``depth`` levels alone; how the others are left out is the tokenizer's matter.

    Returns:
        One `Reconstruction` a depth, named ``decoder(codes), levels 1-<depth>``.

    Raises:
        InputError: lengths or widths that do not fit, or values that are not finite.
        UsageError: codes that are not integers.

    Cost: as many decodings as there are levels.
    """
    array, ids = as_matrix(x, "x"), as_matrix(codes, "codes")
    if len(array) != len(ids):
        raise InputError(f"x has {len(array)} rows and codes {len(ids)}; give the same items")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(f"codes have dtype {ids.dtype}; integers are needed")
    levels = ids.shape[1]
    counters = [ReconstructionCounter(f"decoder(codes), levels 1-{d + 1}") for d in range(levels)]
    for rows in row_blocks(len(array)):
        block, part = as_block(array, rows), ids[rows].astype(np.int64)
        for depth, counter in enumerate(counters, start=1):
            found = decode(part, depth)
            if isinstance(found, torch.Tensor):
                found = found.detach().cpu().numpy()
            counter.update(block, np.asarray(found))
    return tuple(counter.result() for counter in counters)
