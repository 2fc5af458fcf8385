"""The interface to embeddings: length, width, ids, blocks in order, rows at random."""

from __future__ import annotations

import copy as copy_module
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semid.data.blocks import BLOCK, RawBlock, RowProblems, reblock, within_range
from semid.data.ids import ItemIds
from semid.errors import EmbeddingError, IdsError, UsageError
from semid.output import atomic_file


class EmbeddingSource(ABC):
    """Embeddings of a catalogue, wherever they lie; nothing ever copies the whole matrix.

    Made by `semid.data.embeddings.open_embeddings`. Values arrive as float32 whatever they are
    stored as, and a value that is null, NaN or infinite never leaves a source: reading raises.

    Attributes:
        ids: the item ids, in row order.
        dim: width of a row.
        label: what the embeddings are called in errors, in the user's words.
        cheap_rows: whether rows at random cost only those rows.
    """

    ids: ItemIds
    dim: int
    label: str
    cheap_rows: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        facts = ", ".join(f"{key}={value!r}" for key, value in self.describe().items())
        return f"{type(self).__name__}({facts})"

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a log line needs: kind, path where there is one, dtype, items, dim."""

    @abstractmethod
    def _raw_blocks(self, size: int, first: int = 0) -> Iterator[RawBlock]:
        """Yield the rows from ``first`` on in order, ``size`` at a time (the last may be shorter).

        ``first`` is a multiple of ``size``; rows before it are not read where that can be helped.
        """

    @abstractmethod
    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        """Read rows (n,) that are known to exist, in the order asked for."""

    def blocks(
        self, size: int = BLOCK, *, first: int = 0, copy: bool = True
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each block's first row and rows (n, dim) float32, C-contiguous and finite."""
        if size < 1:
            raise UsageError(f"block size {size} is not positive")
        if first < 0 or first % size:
            raise UsageError(f"first={first} is not a multiple of the block size {size}")
        start = first
        for raw in self._raw_blocks(size, first):
            if raw.flags is not None or not within_range(raw.values):
                raise EmbeddingError(self._problems())
            owned = raw.values.copy() if copy and raw.shared else raw.values
            yield start, owned
            start += len(owned)

    def rows(self, indices: Any) -> np.ndarray:
        """Return the rows at ``indices`` (n,), any order, repeats allowed: (n, dim) float32.

        Arrays and Arrow tables read the rows asked for. Parquet decodes every row group that holds
        one of them, so rows at random cost a pass: make a memory map first (`to_npy`).
        """
        numbers = _check_indices(indices, len(self))
        raw = self._raw_rows(numbers)
        if raw.flags is not None or not within_range(raw.values):
            problems = RowProblems(self.label, self.dim, self.ids)
            problems.add(raw, numbers)
            raise EmbeddingError(problems.sentences())
        return raw.values.copy() if raw.shared else raw.values

    def validate(self) -> None:
        """Read everything once and raise an EmbeddingError that lists every kind of problem."""
        problems = self._problems()
        if problems:
            raise EmbeddingError(problems)

    def valid_rows(self) -> np.ndarray:
        """Return which rows can be used: boolean mask (items,), from one pass over the rows."""
        mask = np.zeros(len(self), dtype=bool)
        problems = RowProblems(self.label, self.dim, self.ids)
        for rows, raw in self._numbered():
            mask[rows] = problems.add(raw, rows)
        return mask

    def subset(self, mask_or_indices: Any) -> EmbeddingSource:
        """Return a lazy view of some rows, which reads from this source.

        Shapes: ``mask_or_indices`` (items,).
        """
        from semid.data.source import SubsetSource

        return SubsetSource.of(self, mask_or_indices)

    def with_ids(self, ids: ItemIds) -> EmbeddingSource:
        """Return the same embeddings under other ids, one per row (shares all memory)."""
        view = copy_module.copy(self)
        view.ids = matching_ids(ids, len(self), self.label)
        return view

    def to_npy(self, path: str | Path, *, overwrite: bool = False) -> EmbeddingSource:
        """Write the rows to an ``.npy`` file in float32 and return it as a memory-mapped source.

        The cache for training: rows at random from it cost what they weigh. Written a block at a
        time beside the target and renamed when complete.
        """
        from semid.data.array_source import open_npy

        with atomic_file(path, overwrite=overwrite) as work:
            write_npy(work, (block for _, block in self.blocks()), shape=(len(self), self.dim))
        return open_npy(Path(path), ids=self.ids)

    def _numbered(self) -> Iterator[tuple[np.ndarray, RawBlock]]:
        start = 0
        for raw in self._raw_blocks(BLOCK):
            yield np.arange(start, start + len(raw.values)), raw
            start += len(raw.values)

    def _problems(self) -> list[str]:
        problems = RowProblems(self.label, self.dim, self.ids)
        for rows, raw in self._numbered():
            problems.add(raw, rows)
        return problems.sentences()


def matching_ids(ids: ItemIds | None, rows: int, label: str) -> ItemIds:
    """Return the ids, or row numbers, after checking that there is one per row."""
    if ids is None:
        return ItemIds.range(rows)
    if len(ids) != rows:
        raise IdsError(
            f"{label} has {rows} rows and there are {len(ids)} ids; give one id per row, in the "
            "same order"
        )
    return ids


def write_npy(
    path: Path, blocks: Iterable[np.ndarray], *, shape: tuple[int, int], dtype: str = "<f4"
) -> None:
    """Write blocks of rows as one ``.npy`` file."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=dtype).data)


def _check_indices(indices: Any, count: int) -> np.ndarray:
    numbers = np.asarray(indices)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise UsageError(
            f"row numbers are {numbers.dtype} of shape {numbers.shape}; give a flat array of "
            "integers"
        )
    numbers = numbers.astype(np.int64, copy=False)
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < count):
        raise UsageError(
            f"row numbers run from {numbers.min()} to {numbers.max()}; the rows are 0 to "
            f"{count - 1}"
        )
    return numbers


class SubsetSource(EmbeddingSource):
    """A lazy view of rows of another source; see `EmbeddingSource.subset`.

    ``indices`` (n,) int64 are unique rows of ``base``.
    """

    def __init__(self, base: EmbeddingSource, indices: np.ndarray) -> None:
        self.base = base
        self.indices = indices
        self.ids = base.ids.take(indices)
        self.dim = base.dim
        self.label = base.label
        self._rising = bool((indices[1:] > indices[:-1]).all())

    @classmethod
    def of(cls, base: EmbeddingSource, mask_or_indices: Any) -> SubsetSource:
        """Check the mask or the row numbers, and flatten a subset of a subset."""
        mask = np.asarray(mask_or_indices)
        if mask.dtype == bool:
            if mask.shape != (len(base),):
                raise UsageError(
                    f"the mask has shape {mask.shape} and there are {len(base)} rows; give one "
                    "value per row"
                )
            mask_or_indices = np.flatnonzero(mask)
        rows = _check_indices(mask_or_indices, len(base))
        if len(np.unique(rows)) != len(rows):
            raise UsageError("the row numbers of a subset repeat; name every row once")
        if isinstance(base, SubsetSource):
            view = cls(base.base, base.indices[rows])
            view.ids = base.ids.take(rows)
            return view
        return cls(base, rows)

    def describe(self) -> dict[str, Any]:
        """Return the base's facts with this subset's number of items."""
        return {**self.base.describe(), "items": len(self), "subset_of": len(self.base)}

    def _raw_blocks(self, size: int, first: int = 0) -> Iterator[RawBlock]:
        if not self._rising or self.base.cheap_rows:
            for start in range(first, len(self), size):
                yield self.base._raw_rows(self.indices[start : start + size])
            return
        yield from reblock(self._in_order(first), size)

    def _in_order(self, first: int) -> Iterator[RawBlock]:
        """Pass over the base once and keep the rows of this subset."""
        if first >= len(self):
            return
        start = int(self.indices[first]) // BLOCK * BLOCK
        for raw in self.base._raw_blocks(BLOCK, start):
            stop = start + len(raw.values)
            low, high = np.searchsorted(self.indices, (start, stop))
            low = max(int(low), first)
            if high > low:
                local = self.indices[low:high] - start
                flags = None if raw.flags is None else raw.flags[local]
                yield RawBlock(raw.values[local], flags)
            if high == len(self.indices):
                return
            start = stop

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        return self.base._raw_rows(self.indices[indices])
