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

__all__ = [
    "EmbeddingSource",
    "write_npy",
]


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
        """Yield ``(start_row, block)`` in order.

        Args:
            size: rows of a block, at least 1. Boundaries are multiples of it, whatever row groups,
                chunks or files the rows are stored in; only the last block may be shorter.
            first: row to begin at, a multiple of ``size``: what a run that was stopped had done is
                not read again.
            copy: give blocks that are the caller's own to change. With False they may be views of
                the source's memory, possibly read-only: cheaper, and not to be written to.

        Yields:
            The first row of the block and the block, (n, dim) float32, C-contiguous and finite.

        Raises:
            EmbeddingError: a value is null, NaN or infinite; lists what is wrong in all rows.
            UsageError: ``size`` below 1, or ``first`` not a multiple of it.
        """
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
        """Read rows at random.

        Args:
            indices: (n,) integers from 0 to ``len(self) - 1``, in any order, repeats allowed.

        Returns:
            Array (n, dim) of float32, the caller's own. From arrays and Arrow tables this costs
            the rows asked for. From Parquet it decodes every row group that holds one of them, so
            rows drawn at random cost a pass over the file: make a memory map first (`to_npy`).

        Raises:
            EmbeddingError: one of these rows is null, NaN or infinite.
            UsageError: an index is no integer or outside the rows.
        """
        wanted = _check_indices(indices, len(self))
        raw = self._raw_rows(wanted)
        if raw.flags is not None or not within_range(raw.values):
            tally = RowProblems(self.label, self.dim, self.ids)
            tally.add(raw, wanted)
            raise EmbeddingError(tally.sentences())
        return raw.values.copy() if raw.shared else raw.values

    def validate(self) -> None:
        """Read everything once and raise if any row cannot be used.

        Raises:
            EmbeddingError: every kind of problem, each with its count and the first item.
        """
        problems = self._problems()
        if problems:
            raise EmbeddingError(problems)

    def valid_rows(self) -> np.ndarray:
        """Return which rows can be used: boolean mask (items,), from one pass over the rows."""
        mask = np.zeros(len(self), dtype=bool)
        tally = RowProblems(self.label, self.dim, self.ids)
        for rows, raw in self._numbered():
            mask[rows] = tally.add(raw, rows)
        return mask

    def subset(self, mask_or_indices: Any) -> EmbeddingSource:
        """Return a lazy view of some rows, which reads from this source.

        Args:
            mask_or_indices: boolean mask (items,), or unique row numbers (n,) in the order wanted.
                Rising row numbers (a mask's always rise) read in order; others read at random.

        Returns:
            A source of those rows and their ids; it may be empty.

        Raises:
            UsageError: a mask of another length, or row numbers that repeat or do not exist.
        """
        from semid.data.source import SubsetSource

        return SubsetSource.of(self, mask_or_indices)

    def with_ids(self, ids: ItemIds) -> EmbeddingSource:
        """Return the same embeddings under other ids (shares all memory).

        Raises:
            IdsError: another number of ids than rows.
        """
        if len(ids) != len(self):
            raise IdsError(
                f"{self.label} has {len(self)} rows and there are {len(ids)} ids; give one id a "
                "row, in the same order"
            )
        twin = copy_module.copy(self)
        twin.ids = ids
        return twin

    def to_npy(self, path: str | Path, *, overwrite: bool = False) -> EmbeddingSource:
        """Write the rows to an ``.npy`` file in float32 and return it as a memory-mapped source.

        The cache for training: rows at random from it cost what they weigh. Written a block at a
        time beside the target and renamed when complete.

        Raises:
            EmbeddingError: a row cannot be used.
            OutputExistsError: the file exists and ``overwrite`` is False.
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
        tally = RowProblems(self.label, self.dim, self.ids)
        for rows, raw in self._numbered():
            tally.add(raw, rows)
        return tally.sentences()


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
    wanted = np.asarray(indices)
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise UsageError(
            f"row indices are {wanted.dtype} of shape {wanted.shape}; give a flat array of integers"
        )
    wanted = wanted.astype(np.int64, copy=False)
    if wanted.size and not (wanted.min() >= 0 and wanted.max() < count):
        raise UsageError(
            f"row indices run from {wanted.min()} to {wanted.max()}; the rows are 0 to {count - 1}"
        )
    return wanted


class SubsetSource(EmbeddingSource):
    """A lazy view of rows of another source; see `EmbeddingSource.subset`.

    Args:
        base: where the rows come from.
        indices: (n,) int64 unique rows of ``base``, in the order wanted.
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
        chosen = np.asarray(mask_or_indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(base),):
                raise UsageError(
                    f"the mask has shape {chosen.shape} and there are {len(base)} rows; give one "
                    "value a row"
                )
            chosen = np.flatnonzero(chosen)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            raise UsageError(
                f"a subset is chosen by a mask or row numbers, not {chosen.dtype} of shape "
                f"{chosen.shape}"
            )
        chosen = chosen.astype(np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(base)):
            raise UsageError(
                f"row numbers run from {chosen.min()} to {chosen.max()}; the rows are 0 to "
                f"{len(base) - 1}"
            )
        if len(np.unique(chosen)) != len(chosen):
            raise UsageError("the row numbers of a subset repeat; name every row once")
        if isinstance(base, SubsetSource):
            ids = base.ids
            flat = cls(base.base, base.indices[chosen])
            flat.ids = ids.take(chosen)
            return flat
        return cls(base, chosen)

    def describe(self) -> dict[str, Any]:
        """Return the base's facts with this subset's number of items."""
        return {**self.base.describe(), "items": len(self), "subset_of": len(self.base)}

    def _raw_blocks(self, size: int, first: int = 0) -> Iterator[RawBlock]:
        if not self._rising or self.base.cheap_rows:
            for start in range(first, len(self), size):
                yield self.base._raw_rows(self.indices[start : start + size])
            return
        yield from reblock(self._in_order(first), size, self.dim)

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
                # Flags say that a row cannot be used: none, where all such rows were left out.
                yield RawBlock(
                    raw.values[local], flags if flags is not None and flags.any() else None
                )
            if high == len(self.indices):
                return
            start = stop

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        return self.base._raw_rows(self.indices[indices])
