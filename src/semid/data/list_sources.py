"""Embeddings in columns of float lists: Arrow, frames and Parquet, viewed where possible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.blocks import BLOCK, Flag, RawBlock, gather
from semid.data.columns import (
    TextModel,
    float_list_width,
    is_float_list,
    listed,
    not_float_list,
    refuse_repeated,
    storage,
)
from semid.data.files import ParquetFiles
from semid.data.ids import ItemIds
from semid.data.source import EmbeddingSource
from semid.errors import EmbeddingError, brief
from semid.filesystems import FilePath


def row_lengths(array: Any) -> np.ndarray:
    """Return the lengths of the lists (n,) of an Arrow array of variable lists, nulls left out."""
    return np.asarray(pc.list_value_length(_plain(array)).drop_null())


def most_common_width(lengths: Iterable[np.ndarray], rows: int) -> int | None:
    """Return the most frequent length among pieces of lengths, the first of equals, or None."""
    # Empty lists count only where there are no others. Reading ends when one length has a majority
    # of all rows.
    votes: Counter[int] = Counter()
    empty = False
    for part in lengths:
        # Widths of a piece vote in the order in which they first occur.
        empty |= bool((part == 0).any())
        widths, first, counts = np.unique(part[part > 0], return_index=True, return_counts=True)
        for place in np.argsort(first):
            votes[int(widths[place])] += int(counts[place])
        if votes and 2 * max(votes.values()) > rows:
            break
    # max() returns the first of equals, and a Counter keeps the order of insertion.
    return max(votes, key=votes.__getitem__, default=0 if empty else None)


def list_rows(array: Any, dim: int) -> RawBlock:
    """View an Arrow array (n,) of float lists as a block (n, dim); a float32 one is not copied."""
    # A null row, a null value and a row of another width become NaN and a flag.
    array = _plain(array)
    n, width = len(array), float_list_width(array.type)
    if width is None:
        offsets = array.offsets.to_numpy().astype(np.int64, copy=False)
    else:  # `.values` forgets the slice the array is, `.flatten()` drops null rows: cut by hand
        offsets = (array.offset + np.arange(n + 1)) * width
    flags = np.where(np.diff(offsets) == dim, 0, Flag.RAGGED).astype(np.uint8)
    if array.null_count:
        flags[array.is_null().to_numpy(zero_copy_only=False)] = Flag.NULL_ROW
    whole = np.flatnonzero(flags == 0)
    # Rows that lie one after another are viewed; null rows of a fixed width have a place too.
    if len(whole) == n or width == dim:
        values, shared, broken = _floats(array.values.slice(int(offsets[0]), n * dim), n, dim)
        flags[broken & (flags == 0)] = Flag.NULL_VALUE
        if flags.any():
            values, shared = values.copy() if shared else values, False
            values[flags != 0] = np.nan
        return RawBlock(values, flags if flags.any() else None, shared)
    values = np.full((n, dim), np.nan, dtype=np.float32)
    if len(whole):
        # Rows of the right width lie apart, so their values are drawn one by one.
        where = (offsets[whole][:, None] + np.arange(dim)).reshape(-1)
        values[whole], _, broken = _floats(array.values.take(pa.array(where)), len(whole), dim)
        flags[whole[broken]] = Flag.NULL_VALUE
        values[flags != 0] = np.nan
    return RawBlock(values, flags)


def _floats(children: Any, n: int, width: int) -> tuple[np.ndarray, bool, np.ndarray]:
    """Return child values as (n, width) float32, whether shared, and the rows holding a null."""
    broken = np.zeros(n, dtype=bool)
    if children.null_count:
        # A null child leaves its row unusable.
        nulls = children.is_null().to_numpy(zero_copy_only=False)
        broken = nulls.reshape(n, width).any(axis=1)
    flat = children.to_numpy(zero_copy_only=not children.null_count)
    with np.errstate(over="ignore"):
        values = flat.reshape(n, width).astype(np.float32, copy=False)
    return values, not children.null_count and values.dtype == flat.dtype, broken


def _plain(array: Any) -> Any:
    return array.storage if isinstance(array, pa.ExtensionArray) else array


class ObjectChunk:
    """A pandas object column (n,) of lists or 1-D arrays, turned into Arrow a block at a time."""

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
                "give one flat list or 1-D array of floats per item"
            ) from error


class ArrowSource(EmbeddingSource):
    """A column of float lists, in chunks that are Arrow arrays or `ObjectChunk`."""

    def __init__(
        self,
        chunks: Sequence[Any],
        *,
        dtype: str,
        ids: ItemIds | None = None,
        label: str = "the column",
        kind: str = "arrow",
        dim: int | None = None,
    ) -> None:
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._starts = np.cumsum([0, *map(len, self._chunks)])
        count = int(self._starts[-1])
        # The width is that of all the rows that these may be a part of.
        self._set_shape(label, (count, _width(self._chunks, count) if dim is None else dim), ids)
        self._dtype = dtype
        self._kind = kind

    def describe(self) -> dict[str, Any]:
        """Return kind, dtype, items and dim."""
        return {"kind": self._kind, "dtype": self._dtype, "items": len(self), "dim": self.dim}

    def _pieces(self, size: int, begin: int) -> Iterator[RawBlock]:
        """Cut chunks at the block boundaries, so that a block inside one chunk is a view."""
        for chunk, first in zip(self._chunks, self._starts, strict=False):
            at = max(0, begin - int(first))
            while at < len(chunk):
                n = min(len(chunk) - at, size - int(first + at) % size)
                yield list_rows(chunk.slice(at, n), self.dim)
                at += n

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        return gather(len(indices), self.dim, self._parts(indices))

    def _parts(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, RawBlock]]:
        # Each chunk is read once, for all rows that lie in it.
        chunk_of = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(chunk_of):
            places = np.flatnonzero(chunk_of == number)
            # Lists count values in 32 bits: draw a block at a time.
            for start in range(0, len(places), BLOCK):
                part = places[start : start + BLOCK]
                local = pa.array(indices[part] - self._starts[number])
                yield part, list_rows(self._chunks[number].take(local), self.dim)


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


class ParquetSource(EmbeddingSource):
    """A column of float lists in Parquet files.

    A pass decodes one block at a time. Rows at random decode every row group they lie in
    (`cheap_rows` is False): for training write a memory map first, `EmbeddingSource.to_npy`.
    """

    cheap_rows = False

    def __init__(
        self,
        files: ParquetFiles,
        column: str,
        *,
        ids: ItemIds | None = None,
        dim: int | None = None,
    ) -> None:
        self._files = files
        self._column = column
        self.label = f"embedding column '{column}' of {files.label}"
        self._refuse_disagreement()
        self.text_model = TextModel.of_schemas(files.schemas, files.label)
        # The width is that of all the files that these may be a part of.
        self._set_shape(self.label, (files.count, self._width() if dim is None else dim), ids)

    def describe(self) -> dict[str, Any]:
        """Return kind, path, column, dtype, items, dim and the number of files."""
        kind = storage(self._files.schemas[0].field(self._column).type)
        return {
            "kind": "parquet",
            "path": self._files.label.strip("'"),
            "column": self._column,
            "dtype": str(kind.value_type),
            "items": len(self),
            "dim": self.dim,
            "files": len(self._files.paths),
        }

    def _refuse_disagreement(self) -> None:
        """Compare the files' schemas, so that what the types show is refused before reading."""
        problems: list[str] = []
        widths: dict[int, FilePath] = {}
        for path, schema in zip(self._files.paths, self._files.schemas, strict=True):
            if self._column not in schema.names:
                problems.append(
                    f"'{path}' has no column '{self._column}', which other files of "
                    f"{self._files.label} have; it has {listed(schema.names)}"
                )
                continue
            refuse_repeated([self._column], schema.names, label=f"'{path}'")
            kind = schema.field(self._column).type
            if not is_float_list(kind):
                problems.append(
                    f"column '{self._column}' of '{path}' {not_float_list(kind)}; write all files "
                    "with one schema"
                )
            elif (width := float_list_width(kind)) is not None:
                widths.setdefault(width, path)
        if len(widths) > 1:
            listing = ", ".join(f"{width} in '{path}'" for width, path in sorted(widths.items()))
            problems.append(
                f"{self.label} has rows of several widths: {listing}; all files must come from one "
                "embedding model"
            )
        if problems:
            raise EmbeddingError(problems)

    def _width(self) -> int | None:
        """Return the width that the types fix, else the most frequent length of the lists."""
        for schema in self._files.schemas:
            fixed = float_list_width(schema.field(self._column).type)
            if fixed is not None:
                return fixed
        if not self._files.count:
            return None
        # The footers count the values of each row group: where these are a multiple of its rows
        # for a majority, and the first rows agree, the lists need not be read.
        votes: Counter[int] = Counter()
        for rows, values in self._files.value_counts(self._column):
            if rows and values is not None and values % rows == 0:
                votes[values // rows] += rows
        [(width, support)] = votes.most_common(1) or [(0, 0)]
        first = next(iter(self._lengths(size=1024)))
        if 2 * support > self._files.count and most_common_width([first], len(first)) == width:
            return width
        return most_common_width(self._lengths(size=BLOCK), self._files.count)

    def _lengths(self, *, size: int) -> Iterator[np.ndarray]:
        for file in range(len(self._files.paths)):
            for batch in self._files.batches(file, self._column, size=size):
                yield row_lengths(batch)

    def _pieces(self, size: int, first: int) -> Iterator[RawBlock]:
        """Read from the row group on that row ``first`` lies in."""
        stop = 0
        for file, groups in enumerate(self._files.row_groups):
            # Row groups that end before row `first` are skipped without being decoded.
            ends = stop + np.cumsum(groups, dtype=np.int64)
            needed = np.flatnonzero(ends > first).tolist()
            start = stop + sum(groups[: len(groups) - len(needed)])
            stop += sum(groups)
            if not needed:
                continue
            for batch in self._files.batches(
                file, self._column, size=min(size, BLOCK), row_groups=needed
            ):
                rest = batch.slice(max(0, first - start))
                start += len(batch)
                if len(rest):
                    yield list_rows(rest, self.dim)

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        return gather(len(indices), self.dim, self._parts(indices))

    def _parts(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, RawBlock]]:
        # One pass in the order of the files: `rising[:done]` has been read and belongs to the
        # places `order[:done]`. Row groups without a row asked for are skipped.
        order = np.argsort(indices, kind="stable")
        rising = indices[order]
        done, file_start = 0, 0
        for file, groups in enumerate(self._files.row_groups):
            starts = file_start + np.cumsum([0, *groups])
            file_start = int(starts[-1])
            for group in np.flatnonzero(np.diff(np.searchsorted(rising, starts))).tolist():
                start = int(starts[group])
                for batch in self._files.batches(
                    file, self._column, size=BLOCK, row_groups=[group]
                ):
                    high = int(np.searchsorted(rising, start + len(batch)))
                    if high > done:
                        local = rising[done:high] - start
                        yield order[done:high], list_rows(batch, self.dim).take(local)
                        done = high
                    start += len(batch)
                    if done == len(rising) or rising[done] >= starts[group + 1]:
                        break
