"""Embeddings in an Arrow column, or in a frame's column that can be seen as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from semid.data.array_source import check_matrix, matching_ids
from semid.data.arrow_rows import list_rows, most_common_width, row_lengths
from semid.data.blocks import BLOCK, RawBlock, reblock
from semid.data.columns import float_list_width
from semid.data.ids import ItemIds
from semid.data.source import EmbeddingSource
from semid.errors import EmbeddingError, brief

__all__ = ["ArrowSource", "ObjectChunk"]


class Chunk(Protocol):
    """A run of rows that can be cut and drawn from as Arrow; an Arrow array is one."""

    def __len__(self) -> int: ...

    def slice(self, offset: int, length: int) -> Any:
        """Return ``length`` rows from ``offset`` as an Arrow array."""

    def take(self, indices: Any) -> Any:
        """Return the rows at an Arrow array of indices as an Arrow array."""


class ObjectChunk:
    """A pandas object column of lists or arrays, turned into Arrow a block at a time.

    Args:
        values: (n,) numpy object array; each entry a list or a 1-D array of floats, or null.
        label: the column in the user's words.
    """

    def __init__(self, values: np.ndarray, *, label: str) -> None:
        self._values = values
        self._label = label

    def __len__(self) -> int:
        return len(self._values)

    def slice(self, offset: int, length: int) -> Any:
        """Return ``length`` rows from ``offset`` as an Arrow array."""
        return self._convert(self._values[offset : offset + length])

    def take(self, indices: Any) -> Any:
        """Return the rows at an Arrow array of indices as an Arrow array."""
        return self._convert(self._values[indices.to_numpy()])

    def lengths(self) -> np.ndarray:
        """Return the lengths (n,) of the lists and arrays among the rows."""
        lengths = (
            len(row)
            for row in self._values
            if isinstance(row, list | tuple) or (isinstance(row, np.ndarray) and row.ndim)
        )
        return np.fromiter(lengths, dtype=np.int64)

    def _convert(self, values: np.ndarray) -> Any:
        try:
            return pa.array(values, type=pa.large_list(pa.float64()), from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise EmbeddingError(
                f"{self._label} holds something other than lists of numbers ({brief(error)}); "
                "give one flat list or 1-D array of floats an item"
            ) from error


class ArrowSource(EmbeddingSource):
    """A column of float lists; see `semid.data.arrow_rows` for what is viewed and what copied.

    Args:
        chunks: the column's chunks in order.
        dtype: the type of the values, for logs.
        ids: item ids, or None for row numbers.
        label: the column in the user's words.
        kind: what the column came in, for logs: ``arrow``, ``pandas`` or ``polars``.

    Raises:
        EmbeddingError: no rows, nothing but nulls, or rows of width 0.
        IdsError: another number of ids than rows.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        *,
        dtype: str,
        ids: ItemIds | None = None,
        label: str = "the column",
        kind: str = "arrow",
    ) -> None:
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._starts = np.cumsum([0, *map(len, self._chunks)])
        count = int(self._starts[-1])
        width = _width(self._chunks, count)
        if count and width is None:
            raise EmbeddingError(f"{label} holds nothing but nulls in its {count} rows")
        check_matrix(label, (count, width or 0))
        self.dim = width or 0
        self.label = label
        self.ids = matching_ids(ids, count, label)
        self._dtype = dtype
        self._kind = kind

    def describe(self) -> dict[str, Any]:
        """Return kind, dtype, items and dim."""
        return {"kind": self._kind, "dtype": self._dtype, "items": len(self), "dim": self.dim}

    def _raw_blocks(self, size: int, first: int = 0) -> Iterator[RawBlock]:
        yield from reblock(self._pieces(size, first), size, self.dim)

    def _pieces(self, size: int, begin: int) -> Iterator[RawBlock]:
        """Cut chunks at the block boundaries, so that a block inside one chunk is a view."""
        for chunk, first in zip(self._chunks, self._starts, strict=False):
            at = max(0, begin - int(first))
            while at < len(chunk):
                n = min(len(chunk) - at, size - int(first + at) % size)
                yield list_rows(chunk.slice(at, n), self.dim)
                at += n

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        values = np.empty((len(indices), self.dim), dtype=np.float32)
        flags = np.zeros(len(indices), dtype=np.uint8)
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(owner):
            places = np.flatnonzero(owner == number)
            local = indices[places] - self._starts[number]
            # Lists count values in 32 bits: draw a block at a time.
            for start in range(0, len(places), BLOCK):
                part = places[start : start + BLOCK]
                taken = self._chunks[number].take(pa.array(local[start : start + BLOCK]))
                raw = list_rows(taken, self.dim)
                values[part] = raw.values
                if raw.flags is not None:
                    flags[part] = raw.flags
        return RawBlock(values, flags if flags.any() else None)


def _width(chunks: Sequence[Any], count: int) -> int | None:
    """Return the width that the type of the chunks fixes, else the most frequent length."""
    if chunks and not isinstance(chunks[0], ObjectChunk):
        fixed = float_list_width(chunks[0].type)
        if fixed is not None:
            return fixed
    lengths = (
        chunk.lengths() if isinstance(chunk, ObjectChunk) else row_lengths(chunk)
        for chunk in chunks
    )
    return most_common_width(lengths, count)
