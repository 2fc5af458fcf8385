"""Embeddings in a column of one or many Parquet files, read a block at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from semid.data.array_source import check_matrix, matching_ids
from semid.data.arrow_rows import list_rows, most_common_width, row_lengths
from semid.data.blocks import BLOCK, RawBlock, reblock
from semid.data.columns import (
    float_list_width,
    is_float_list,
    listed,
    not_float_list,
    refuse_repeated,
    storage,
)
from semid.data.ids import ItemIds
from semid.data.parquet_files import ParquetFiles
from semid.data.source import EmbeddingSource
from semid.errors import EmbeddingError
from semid.filesystems import FilePath

__all__ = ["ParquetSource"]


class ParquetSource(EmbeddingSource):
    """A column of float lists in Parquet files.

    A pass decodes one block at a time. Rows at random decode every row group they lie in
    (`cheap_rows` is False): for training write a memory map first, `EmbeddingSource.to_npy`.

    Args:
        files: the files, in the order of their rows.
        column: the embedding column.
        ids: item ids, or None for row numbers.
        dim: width of a row, where it is known from all the files that these are a part of.

    Raises:
        EmbeddingError: no rows, nothing but nulls, or files that do not agree on the column.
        IdsError: another number of ids than rows.
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
        width = self._width() if dim is None else dim
        if files.count and width is None:
            raise EmbeddingError(f"{self.label} holds nothing but nulls in its {files.count} rows")
        check_matrix(self.label, (files.count, width or 0))
        self.dim = width or 0
        self.ids = matching_ids(ids, files.count, self.label)

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
            found = ", ".join(f"{width} in '{path}'" for width, path in sorted(widths.items()))
            problems.append(
                f"{self.label} has rows of several widths: {found}; all files must come from one "
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
        # The footers say how many values a row group holds, so lists of one length are told
        # without reading them: then the first rows are enough.
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

    def _raw_blocks(self, size: int, first: int = 0) -> Iterator[RawBlock]:
        yield from reblock(self._pieces(size, first), size, self.dim)

    def _pieces(self, size: int, first: int) -> Iterator[RawBlock]:
        """Read from the row group on that row ``first`` lies in."""
        stop = 0
        for file, groups in enumerate(self._files.row_groups):
            ends = stop + np.cumsum(groups, dtype=np.int64)
            wanted = np.flatnonzero(ends > first).tolist()
            start = stop + sum(groups[: len(groups) - len(wanted)])
            stop += sum(groups)
            if not wanted:
                continue
            for batch in self._files.batches(
                file, self._column, size=min(size, BLOCK), row_groups=wanted
            ):
                kept = batch.slice(max(0, first - start))
                start += len(batch)
                if len(kept):
                    yield list_rows(kept, self.dim)

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        values = np.empty((len(indices), self.dim), dtype=np.float32)
        flags = np.zeros(len(indices), dtype=np.uint8)
        order = np.argsort(indices, kind="stable")
        rising = indices[order]
        done, file_start = 0, 0
        for file, groups in enumerate(self._files.row_groups):
            group_starts = file_start + np.cumsum([0, *groups])
            file_start = int(group_starts[-1])
            needed = [
                g
                for g in range(len(groups))
                if np.diff(np.searchsorted(rising, group_starts[g : g + 2]))[0]
            ]
            for group in needed:
                start = int(group_starts[group])
                for batch in self._files.batches(
                    file, self._column, size=BLOCK, row_groups=[group]
                ):
                    stop = start + len(batch)
                    high = int(np.searchsorted(rising, stop))
                    if high > done:
                        places = order[done:high]
                        raw = list_rows(batch, self.dim)
                        values[places] = raw.values[rising[done:high] - start]
                        if raw.flags is not None:
                            flags[places] = raw.flags[rising[done:high] - start]
                        done = high
                    start = stop
                    if done == len(rising) or rising[done] >= group_starts[group + 1]:
                        break
        return RawBlock(values, flags if flags.any() else None)
