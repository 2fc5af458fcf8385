"""Parquet on disk: a file, a folder of files, or a glob, as one list of readable files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from semid.data.columns import concat_tables, is_text, refuse_repeated
from semid.data.file_kinds import PARQUET_SUFFIXES, wrong_format
from semid.errors import EmbeddingError, InputError, UsageError, brief
from semid.filesystems import FilePath, is_uri, list_files, open_parquet


def is_glob(path: str | Path) -> bool:
    """Whether a path has glob characters and does not itself exist."""
    return any(c in str(path) for c in "*?[") and not Path(path).exists()


def find_parquet(path: str | Path, *, expected: str = "table") -> list[FilePath]:
    """List the Parquet files that a path, folder (with its subfolders), glob or URI names.

    They are sorted by path, character by character: the order of their rows. ``expected`` says in
    advice what they should hold: ``embeddings`` or ``table``.
    """
    if is_uri(path):
        return list(list_files(str(path)))
    place = Path(path).expanduser()
    if is_glob(place):
        return list(_from_glob(place))
    if not place.exists():
        raise UsageError(f"'{path}' does not exist; check the path")
    if place.is_file():
        return [place]
    visible = [
        file
        for file in sorted(place.rglob("*"))
        # Engines leave markers such as _SUCCESS and .part.crc beside their data.
        if file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(place).parts)
    ]
    if not visible:
        raise UsageError(f"folder '{path}' holds no files; name a folder of Parquet files")
    strangers = [file for file in visible if file.suffix.lower() not in PARQUET_SUFFIXES]
    if len(strangers) == len(visible) and (sentence := wrong_format(visible[0], expected)):
        raise UsageError(f"folder '{path}' holds no Parquet files: {sentence}")
    if strangers:
        raise UsageError(
            f"folder '{path}' holds files that are not Parquet ({len(strangers)}, first: "
            f"'{strangers[0].relative_to(place)}'); keep Parquet files alone in it, or name them "
            f"by a glob: '{path}/*.parquet'"
        )
    return list(visible)


def _from_glob(pattern: Path) -> list[Path]:
    parts = pattern.parts
    magic = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root = Path(*parts[:magic]) if magic else Path()
    matches = sorted(file for file in root.glob(str(Path(*parts[magic:]))) if file.is_file())
    if not matches:
        raise UsageError(
            f"glob '{pattern}' matches no file; check the pattern, and quote it on a command line"
        )
    return matches


def _expected(error: type[InputError]) -> str:
    return "embeddings" if error is EmbeddingError else "table"


def read_failure(
    path: FilePath, error: Exception, kind: type[InputError] = EmbeddingError
) -> InputError:
    """Return the error for a file that Parquet's reader refuses."""
    sentence = wrong_format(path, _expected(kind), allowed="parquet")
    if sentence is not None:
        return kind(sentence)
    if "Expected all lists to be of size=" in str(error):
        return kind(
            f"'{path}' has null rows in a column of fixed-size lists, which pyarrow "
            f"{pa.__version__} cannot read; upgrade it with: pip install -U 'pyarrow>=26', or "
            "write the column as lists of variable length"
        )
    return kind(
        f"'{path}' could not be read as Parquet: it is truncated, damaged or another format "
        f"({brief(error)}); write or copy it again"
    )


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files that are read one after another as one table.

    Attributes:
        paths: the files in the order of their rows.
        schemas: each file's Arrow schema.
        row_groups: each file's row groups, as numbers of rows.
        label: the whole of it in the user's words.
        error: which error a file that cannot be read raises.
        chosen: the numbers of those row groups in their files; None has all of them.
    """

    paths: tuple[FilePath, ...]
    schemas: tuple[pa.Schema, ...]
    row_groups: tuple[tuple[int, ...], ...]
    label: str
    error: type[InputError] = EmbeddingError
    chosen: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def open(cls, path: str | Path, *, error: type[InputError] = EmbeddingError) -> ParquetFiles:
        """Read the footers of the files that ``path`` names."""
        paths = find_parquet(path, expected=_expected(error))
        schemas, groups = [], []
        for file in paths:
            try:
                with open_parquet(file) as parquet:
                    schemas.append(parquet.schema_arrow)
                    meta = parquet.metadata
                    groups.append(
                        tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
                    )
            except (pa.ArrowException, OSError) as failure:
                raise read_failure(file, failure, error) from failure
        return cls(tuple(paths), tuple(schemas), tuple(groups), f"'{path}'", error)

    @property
    def count(self) -> int:
        """Rows of all files together."""
        return sum(sum(groups) for groups in self.row_groups)

    def select(self, parts: Sequence[tuple[int, Sequence[int]]]) -> ParquetFiles:
        """Return row groups, by file number and numbers in it, as files of their own."""
        return replace(
            self,
            paths=tuple(self.paths[file] for file, _ in parts),
            schemas=tuple(self.schemas[file] for file, _ in parts),
            row_groups=tuple(
                tuple(self.row_groups[file][group] for group in groups) for file, groups in parts
            ),
            chosen=tuple(tuple(self._numbers(file, list(groups)) or ()) for file, groups in parts),
        )

    def _numbers(self, file: int, row_groups: list[int] | None) -> list[int] | None:
        """Return the numbers of row groups in their file."""
        if self.chosen is None:
            return row_groups
        numbers = self.chosen[file]
        return list(numbers) if row_groups is None else [numbers[group] for group in row_groups]

    def batches(
        self, file: int, column: str, *, size: int, row_groups: list[int] | None = None
    ) -> Iterator[Any]:
        """Yield one column of one file, in Arrow arrays of at most ``size`` rows."""
        path = self.paths[file]
        refuse_repeated([column], self.schemas[file].names, label=f"'{path}'")
        try:
            # Mapping the file keeps a row group's pages out of memory until they are decoded.
            # The scanner of `pyarrow.dataset` decodes whole row groups: 2.0 instead of 0.5 GiB for
            # a million rows of 256 float32 in one group, and four times the time.
            with open_parquet(path, memory_map=True) as parquet:
                for batch in parquet.iter_batches(
                    batch_size=size,
                    columns=[column],
                    row_groups=self._numbers(file, row_groups),
                    use_threads=False,
                ):
                    yield batch.column(0)
        except (pa.ArrowException, OSError) as failure:
            raise read_failure(path, failure, self.error) from failure

    def value_counts(self, column: str) -> Iterator[tuple[int, int | None]]:
        """Yield the rows of each row group and the values in their lists, from the footers.

        A null and an empty list count as one value. The count is None where several columns of
        the file could be meant.
        """
        for file, path in enumerate(self.paths):
            with open_parquet(path) as parquet:
                meta = parquet.metadata
            numbers = self._numbers(file, list(range(len(self.row_groups[file]))))
            for number in numbers or ():
                group = meta.row_group(number)
                leaves = [
                    leaf.num_values
                    for leaf in map(group.column, range(group.num_columns))
                    if leaf.path_in_schema.startswith(f"{column}.")
                ]
                yield group.num_rows, leaves[0] if len(leaves) == 1 else None

    def read(self, columns: list[str], *, dictionaries: Sequence[str] = ()) -> pa.Table:
        """Read columns of all files, some text dictionary-coded to save memory, in file order."""
        tables = []
        for file, path in enumerate(self.paths):
            schema = self.schemas[file]
            refuse_repeated(columns, schema.names, label=f"'{path}'")
            coded = [name for name in dictionaries if is_text(schema.field(name).type)]
            try:
                with open_parquet(path, memory_map=True, read_dictionary=coded) as parquet:
                    groups = self._numbers(file, None)
                    tables.append(
                        parquet.read(columns=columns)
                        if groups is None
                        else parquet.read_row_groups(groups, columns=columns)
                    )
            except (pa.ArrowException, OSError) as failure:
                raise read_failure(path, failure, self.error) from failure
        try:
            return concat_tables(tables)
        except pa.ArrowException as failure:
            kinds = {str(t.schema.field(c).type) for c in columns for t in tables}
            raise self.error(
                f"the files of {self.label} do not agree on the types of {columns}: they hold "
                f"{sorted(kinds)}; write them with one schema"
            ) from failure
