"""CSV and TSV files, read by column, with ids kept as the text they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pc_csv

from semid.data.columns import refuse_repeated
from semid.data.file_kinds import HEAD_BYTES, UNKNOWN, recognize, wrong_format
from semid.errors import InputError, UsageError, brief

__all__ = ["csv_columns", "is_csv", "read_csv"]

_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_SEPARATED = {"comma", "tab", "semicolon", "bar"}


def is_csv(path: Path) -> bool:
    """Whether a path is named like CSV or TSV, compressed (``.gz``, ``.bz2``) or not."""
    return bool(_delimiter(path))


def csv_columns(path: Path, *, error: type[InputError]) -> list[str]:
    """Return the column names, read from the first lines.

    Raises:
        UsageError: the file does not exist.
        InputError: the file is empty or no CSV; of the class ``error``.
    """
    try:
        with _open(path, None, error) as reader:
            return list(reader.schema.names)
    except (pa.ArrowException, OSError, UnicodeError) as failure:
        raise _refusal(path, failure, error) from failure


def read_csv(
    path: Path,
    columns: list[str],
    *,
    text: list[str],
    error: type[InputError],
    numbers: Sequence[str] = (),
) -> pa.Table:
    """Read columns into memory.

    Args:
        path: the file; its first line names the columns.
        columns: names to read, all present.
        text: the columns of ids: kept as text, so that ``007`` stays, dictionary-coded, with an
            empty field as null. Types of the others are inferred from the first megabyte.
        error: which error a file that cannot be read raises.
        numbers: columns to read as float64 whatever they begin with.
    """
    refuse_repeated(columns, csv_columns(path, error=error), label=f"'{path}'")
    types = {c: pa.dictionary(pa.int32(), pa.string()) for c in text}
    options = pc_csv.ConvertOptions(
        include_columns=columns,
        column_types=types | {c: pa.float64() for c in numbers},
        strings_can_be_null=True,
        # Only an empty field is missing: an item may well be called "NA" or "null".
        null_values=[""],
    )
    try:
        with _open(path, options, error) as reader:
            table = reader.read_all()
    except (pa.ArrowException, OSError) as failure:
        raise _refusal(path, failure, error) from failure
    if len(table) == 0:
        raise error(f"'{path}' has a header and no rows; give at least one row")
    return table


def _open(
    path: Path, convert: pc_csv.ConvertOptions | None, error: type[InputError]
) -> pc_csv.CSVStreamingReader:
    if not path.is_file():
        raise UsageError(f"'{path}' does not exist; check the path")
    with pa.input_stream(str(path), compression="detect") as stream:
        head = stream.read(HEAD_BYTES)
    kind = recognize(head)
    if kind.name in _SEPARATED:
        # Only a header without the separator that the name promises shows that it is another.
        readable = _delimiter(path).encode() in head.partition(b"\n")[0]
    else:
        readable = kind.name in ("text", "empty") or kind is UNKNOWN
    if not readable:
        raise error(str(wrong_format(path, "table", kind)))
    return pc_csv.open_csv(
        str(path),
        parse_options=pc_csv.ParseOptions(delimiter=_delimiter(path)),
        convert_options=convert,
    )


def _delimiter(path: Path) -> str:
    """Return the separator that a file's name promises, empty for one that is no CSV."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2"):
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1], "") if suffixes else ""


def _refusal(path: Path, failure: Exception, error: type[InputError]) -> InputError:
    if path.stat().st_size == 0:
        return error(f"'{path}' is empty; its first line must name the columns")
    # Arrow raises OSError for what is not compressed as the file's name says.
    if isinstance(failure, OSError) and (sentence := wrong_format(path, "table")):
        return error(sentence)
    return error(f"'{path}' could not be read as CSV ({brief(failure)}); correct the file")
