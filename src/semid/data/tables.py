"""The reader of tables: CSV, Parquet, and tables in memory, column by column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv as pa_csv

from semid.data.columns import ARROW_CONVERSION_ERRORS, refuse_repeated, require_column
from semid.data.file_kinds import HEAD_BYTES, UNKNOWN, recognize, wrong_format
from semid.data.frames import is_frame, open_frame
from semid.data.parquet_files import ParquetFiles
from semid.errors import InputError, UsageError, brief
from semid.filesystems import local_path

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SEPARATED = {"comma", "tab", "semicolon", "bar"}


class _Reader(Protocol):
    def __call__(
        self, columns: list[str], *, text: Sequence[str], numbers: Sequence[str], coded: bool
    ) -> pa.Table: ...


@dataclass(frozen=True)
class Table:
    """A table whose columns are read when they are asked for.

    Attributes:
        names: its columns.
        label: the table in the user's words.
    """

    names: list[str]
    label: str
    _read: _Reader

    def read(
        self,
        columns: Sequence[str],
        *,
        text: Sequence[str] = (),
        numbers: Sequence[str] = (),
        coded: bool = False,
    ) -> pa.Table:
        """Read columns into memory.

        Args:
            columns: names, all present.
            text: those that stay text in a CSV file, so that ``007`` is not 7; an empty field is
                null. Types of the others are inferred from the first megabyte.
            numbers: those that a CSV file gives as float64 whatever they begin with.
            coded: dictionary-code the columns of ``text`` from Parquet too, as those from CSV are;
                saves memory where values repeat.
        """
        return self._read(list(columns), text=text, numbers=numbers, coded=coded)

    def require(self, column: str, *, flag: str) -> str:
        """Return ``column`` if the table has exactly one such column; see `require_column`."""
        return require_column(column, self.names, label=self.label, flag=flag)


def open_table(
    source: Any, *, what: str = "the table", error: type[InputError] = InputError
) -> Table:
    """Open a table; reads names and types of its columns.

    Shapes: ``source`` (file, folder, glob or URI).
    """
    if isinstance(source, str | Path):
        path = local_path(source)
        if path is not None and is_csv(path):
            return _open_csv(path, f"'{source}'", error)
        files = ParquetFiles.open(source if path is None else path, error=error)
        return Table(
            list(files.schemas[0].names),
            files.label,
            lambda columns, text, numbers, coded: files.read(
                columns, dictionaries=text if coded else ()
            ),
        )
    if isinstance(source, dict):
        try:
            source = pa.table(source)
        except (*ARROW_CONVERSION_ERRORS, ValueError) as failure:
            raise UsageError(
                f"{what} cannot be read as columns of equal length: {brief(failure)}"
            ) from None
    if is_frame(source):
        frame = open_frame(source)
        return Table(
            list(frame.schema.names),
            frame.label,
            lambda columns, text, numbers, coded: pa.table({c: frame.column(c) for c in columns}),
        )
    raise UsageError(
        f"{what} cannot be read from a {type(source).__name__}; give a path to Parquet or CSV, an "
        "Arrow table, a pandas or polars frame, or a dictionary of columns"
    )


def is_csv(path: Path) -> bool:
    """Whether a path is named like CSV or TSV, compressed (``.gz``, ``.bz2``) or not."""
    return bool(_delimiter(path))


def _delimiter(path: Path) -> str:
    """Return the separator that a file's name promises, empty for one that is no CSV."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2"):
        suffixes.pop()
    return _DELIMITERS.get(suffixes[-1], "") if suffixes else ""


def _open_csv(path: Path, label: str, error: type[InputError]) -> Table:
    def read(
        columns: list[str], *, text: Sequence[str], numbers: Sequence[str], coded: bool
    ) -> pa.Table:
        refuse_repeated(columns, names, label=label)
        types = {column: pa.dictionary(pa.int32(), pa.string()) for column in text}
        options = pa_csv.ConvertOptions(
            include_columns=columns,
            column_types=types | {column: pa.float64() for column in numbers},
            strings_can_be_null=True,
            # Only an empty field is missing: an item may well be called "NA" or "null".
            null_values=[""],
        )
        table = _read_csv(path, options, pa_csv.CSVStreamingReader.read_all, error)
        if len(table) == 0:
            raise error(f"{label} has a header and no rows; give at least one row")
        return table

    names = list(_read_csv(path, None, lambda reader: reader.schema.names, error))
    return Table(names, label, read)


def _read_csv(
    path: Path,
    options: pa_csv.ConvertOptions | None,
    read: Callable[[pa_csv.CSVStreamingReader], Any],
    error: type[InputError],
) -> Any:
    """Open a CSV file, apply ``read``, and say what is wrong with a file that is none."""
    if not path.is_file():
        raise UsageError(f"'{path}' does not exist; check the path")
    delimiter = _delimiter(path)
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            head = stream.read(HEAD_BYTES)
        kind = recognize(head)
        if kind.name in _SEPARATED:
            # Only a header without the separator that the name promises shows that it is another.
            readable = delimiter.encode() in head.partition(b"\n")[0]
        else:
            readable = kind.name in ("text", "empty") or kind is UNKNOWN
        if not readable:
            raise error(str(wrong_format(path, "table", kind)))
        parse = pa_csv.ParseOptions(delimiter=delimiter)
        with pa_csv.open_csv(str(path), parse_options=parse, convert_options=options) as reader:
            return read(reader)
    except (pa.ArrowException, OSError, UnicodeError) as failure:
        if path.stat().st_size == 0:
            raise error(f"'{path}' is empty; its first line must name the columns") from failure
        # Arrow raises OSError for what is not compressed as the file's name says.
        sentence = wrong_format(path, "table") if isinstance(failure, OSError) else None
        raise error(
            sentence or f"'{path}' could not be read as CSV ({brief(failure)}); correct the file"
        ) from failure
