"""Files: what one is, by its first bytes, and Parquet files, folders and globs as one table."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow as pa

from semid.data.columns import concat_tables, is_text, refuse_repeated
from semid.errors import EmbeddingError, InputError, UsageError, brief
from semid.filesystems import FilePath, is_uri, list_files, open_parquet, resolve

PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")

# How much of a file is looked at; a few hundred rows of a table of text.
HEAD_BYTES = 65_536

_JSON = re.compile(r"\s*(\{\s*[\"}]|\[\s*[\[{\"\d\-\]])")
_COMMAS = "separate the columns by commas, in a file that ends in .csv"
_RENAME = "rename it to end in {}; its first line must name the columns"
_SEPARATORS = {
    "\t": ("tab", _RENAME.format(".tsv")),
    ",": ("comma", _RENAME.format(".csv")),
    ";": ("semicolon", _COMMAS),
    "|": ("bar", _COMMAS),
}

_AGAIN = "it is not the data but most likely what a failed download left: download the file again"


class FileKind(NamedTuple):
    """A kind of file, which readers compare by ``name``.

    ``phrase`` is what it is, after "is"; ``advice`` what to do with it where it cannot be read,
    with ``{path}``, empty where that depends on the reader.
    """

    name: str
    phrase: str
    advice: str = ""


def _convert(name: str, phrase: str, read: str) -> FileKind:
    return FileKind(
        name, phrase, "convert it: pyarrow.parquet.write_table(" + read + ", '{path}.parquet')"
    )


def _compressed(name: str, phrase: str, tool: str) -> FileKind:
    advice = "decompress it first, for example with: " + tool + " '{path}'"
    return FileKind(name, f"compressed with {phrase}", advice)


EMPTY = FileKind("empty", "empty (0 bytes)", "write or download it again")
TEXT = FileKind("text", "text")
JSON = FileKind(
    "json", "JSON", "convert it: pandas.read_json('{path}').to_parquet('{path}.parquet')"
)
JSON_LINES = _convert(
    "jsonl", "JSON lines (one object per line)", "pyarrow.json.read_json('{path}')"
)
PICKLE = FileKind("pickle", "a Python pickle, which is never loaded")
UTF16 = FileKind("utf16", "text in UTF-16", "save it as UTF-8")
UNKNOWN = FileKind("unknown", "of a format that semid does not know")

# Binary formats by their first bytes; of text, which may begin with ``ORC`` too, never asked.
_MAGIC = {
    b"PAR1": FileKind("parquet", "Parquet", "rename it to end in .parquet"),
    b"PARE": FileKind("encrypted", "encrypted Parquet", "decrypt it first"),
    b"\x93NUMPY": FileKind("npy", "a NumPy array (.npy)"),
    b"ARROW1": _convert(
        "arrow", "an Arrow file (.arrow, .feather)", "pyarrow.feather.read_table('{path}')"
    ),
    b"FEA1": _convert("arrow", "a Feather file", "pyarrow.feather.read_table('{path}')"),
    b"\xff\xff\xff\xff": _convert(
        "arrow", "an Arrow stream", "pyarrow.ipc.open_stream('{path}').read_all()"
    ),
    b"ORC": _convert("orc", "an ORC file", "pyarrow.orc.read_table('{path}')"),
    b"\x1f\x8b": _compressed("gzip", "gzip", "gunzip"),
    b"BZh": _compressed("bzip2", "bzip2", "bunzip2"),
    b"\x28\xb5\x2f\xfd": _compressed("zstd", "Zstandard", "unzstd"),
    b"\xfd7zXZ\x00": _compressed("xz", "xz", "unxz"),
    b"PK\x03\x04": FileKind("zip", "a zip archive (.zip, .npz, .pt or .xlsx)"),
    b"\x89HDF": FileKind("hdf5", "an HDF5 file"),
    b"Obj\x01": FileKind("avro", "an Avro file"),
    b"SQLite format 3": FileKind("sqlite", "an SQLite database"),
    b"%PDF": FileKind("pdf", "a PDF document"),
    **{bytes([0x80, protocol]): PICKLE for protocol in (2, 3, 4, 5)},
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
}

_POINTERS = {
    "version https://git-lfs.github.com/spec/": FileKind(
        "lfs", "a Git LFS pointer, not the data", "fetch the data with: git lfs pull"
    ),
    "/annex/objects/": FileKind(
        "annex", "a git-annex pointer, not the data", "fetch the data with: git annex get '{path}'"
    ),
}
_PAGES = ("<!doctype", "<html", "<?xml", "<error")

_EXPECTED = {
    "embeddings": "write embeddings with numpy.save as one .npy file, or as a Parquet column of "
    "float lists",
    "ids": "give Parquet, CSV (.csv, .tsv) or text with one id per line",
    "table": "give a table in Parquet or CSV (.csv, .tsv)",
}


def read_head(path: FilePath) -> bytes:
    """Return the first bytes of a file, on this machine or behind a URI."""
    system, inner = resolve(path)
    with system.open_input_file(inner) as file:
        return bytes(file.read(HEAD_BYTES))


def recognize(head: bytes, path: FilePath = "") -> FileKind:
    """Tell what a file is."""
    if not head:
        return EMPTY
    suffix = PurePath(str(path)).suffix.lower()
    # Text is looked at first: an id may begin with ORC or PAR1 too.
    text = _decode(head)
    if text is not None and not (head.startswith(b"PAR1") and suffix in PARQUET_SUFFIXES):
        return _recognize_text(text, suffix, len(head) < HEAD_BYTES)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[8:9] == b"{" and head[6:8] == b"\x00\x00":
        return FileKind("safetensors", "a safetensors file")
    return UNKNOWN


def _decode(head: bytes) -> str | None:
    """Return the bytes as text, or None for what is no UTF-8 text."""
    if b"\x00" in head:
        return None
    try:
        return head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The end of what was read may cut a character in two.
        if len(head) == HEAD_BYTES and error.start > HEAD_BYTES - 4:
            return head[: error.start].decode("utf-8-sig")
        return None


def _recognize_text(text: str, suffix: str, complete: bool) -> FileKind:
    for start, kind in _POINTERS.items():
        if text.startswith(start):
            return kind
    if text.lstrip()[:16].lower().startswith(_PAGES):
        return FileKind("page", "a page of HTML or XML", _AGAIN)
    if _JSON.match(text):
        first, _, rest = text.lstrip().partition("\n")
        if suffix in (".jsonl", ".ndjson"):
            return JSON_LINES
        with contextlib.suppress(ValueError):
            json.loads(first)
            return JSON_LINES if rest.strip() else JSON
        return JSON
    # The last line of an incomplete head may be cut and is not counted.
    lines = text.splitlines()
    if not complete:
        lines = lines[:-1] or lines
    for separator, (word, advice) in _SEPARATORS.items():
        # A table has the same number of columns, more than one, in every line.
        widths = {len(row) for row in csv.reader(lines, delimiter=separator) if row}
        if len(widths) == 1 and (columns := widths.pop()) > 1:
            return FileKind(word, f"{word}-separated text with {columns} columns", advice)
    return TEXT


def wrong_format(
    path: FilePath, expected: str, kind: FileKind | None = None, *, allowed: str = ""
) -> str | None:
    """Say what a file is and what to give instead; None where it is allowed or not recognized."""
    if kind is None:
        try:
            kind = recognize(read_head(path), path)
        except (OSError, pa.ArrowException):
            return None
    if kind is UNKNOWN or kind.name == allowed:
        return None
    advice = kind.advice.replace("{path}", str(path))
    # A table of text holds no embeddings, however its file is called.
    if not advice or (expected == "embeddings" and kind.phrase.endswith("columns")):
        advice = _EXPECTED[expected]
    if kind.name == "npy" and expected == "embeddings":
        advice = (
            "give one .npy file by its name, which ends in .npy: several are joined with "
            "numpy.concatenate and numpy.save"
        )
    return f"'{path}' is {kind.phrase}; {advice}"


def is_glob(path: str | Path) -> bool:
    """Whether a path has glob characters and does not itself exist."""
    return any(c in str(path) for c in "*?[") and not Path(path).exists()


def find_parquet(path: str | Path, *, expected: str = "table") -> list[FilePath]:
    """List the Parquet files that a path, folder (with its subfolders), glob or URI names.

    They are sorted by path, character by character: the order of their rows.
    """
    if is_uri(path):
        return list(list_files(str(path)))
    place = Path(path).expanduser()
    if is_glob(place):
        parts = place.parts
        magic = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
        matches = Path(*parts[:magic]).glob(str(Path(*parts[magic:])))
        if not (files := sorted(file for file in matches if file.is_file())):
            raise UsageError(
                f"glob '{place}' matches no file; check the pattern, and quote it on a command line"
            )
        return list(files)
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
    # Files of other kinds are refused, since leaving them out would lose rows unnoticed.
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


@contextlib.contextmanager
def _opened(path: FilePath, error: type[InputError], **options: Any) -> Iterator[Any]:
    """Open a Parquet file; what its reader refuses becomes an ``error``."""
    try:
        with open_parquet(path, **options) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as failure:
        raise read_failure(path, failure, error) from failure


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files that are read one after another as one table."""

    paths: tuple[FilePath, ...]  # the files in the order of their rows
    schemas: tuple[pa.Schema, ...]  # each file's Arrow schema
    row_groups: tuple[tuple[int, ...], ...]  # each file's row groups, as numbers of rows
    numbers: tuple[tuple[int, ...], ...]  # the numbers of those row groups in their files
    label: str  # the whole of it in the user's words
    error: type[InputError] = EmbeddingError  # which error a file that cannot be read raises

    @classmethod
    def open(cls, path: str | Path, *, error: type[InputError] = EmbeddingError) -> ParquetFiles:
        """Read the footers of the files that ``path`` names."""
        paths = find_parquet(path, expected=_expected(error))
        schemas, groups = [], []
        for file in paths:
            with _opened(file, error) as parquet:
                schemas.append(parquet.schema_arrow)
                meta = parquet.metadata
                groups.append(tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups)))
        numbers = tuple(tuple(range(len(rows))) for rows in groups)
        return cls(tuple(paths), tuple(schemas), tuple(groups), numbers, f"'{path}'", error)

    @property
    def count(self) -> int:
        """Rows of all files together."""
        return sum(map(sum, self.row_groups))

    def select(self, parts: Sequence[tuple[int, Sequence[int]]]) -> ParquetFiles:
        """Return row groups, by file number and places among its groups, as files of their own."""

        def pick(column: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(column[file][group] for group in groups) for file, groups in parts)

        return replace(
            self,
            paths=tuple(self.paths[file] for file, _ in parts),
            schemas=tuple(self.schemas[file] for file, _ in parts),
            row_groups=pick(self.row_groups),
            numbers=pick(self.numbers),
        )

    def batches(
        self, file: int, column: str, *, size: int, row_groups: Sequence[int] | None = None
    ) -> Iterator[Any]:
        """Yield one column of one file, in Arrow arrays of at most ``size`` rows."""
        path, numbers = self.paths[file], self.numbers[file]
        refuse_repeated([column], self.schemas[file].names, label=f"'{path}'")
        groups = range(len(numbers)) if row_groups is None else row_groups
        # Mapping the file keeps a row group's pages out of memory until they are decoded.
        # The scanner of `pyarrow.dataset` decodes whole row groups: 2.0 instead of 0.5 GiB for
        # a million rows of 256 float32 in one group, and four times the time.
        with _opened(path, self.error, memory_map=True) as parquet:
            for batch in parquet.iter_batches(
                batch_size=size,
                columns=[column],
                row_groups=[numbers[group] for group in groups],
                use_threads=False,
            ):
                yield batch.column(0)

    def value_counts(self, column: str) -> Iterator[tuple[int, int | None]]:
        """Yield the rows of each row group and the values in their lists, from the footers."""
        # A null and an empty list count as one value; where several columns of the file could be
        # meant, the count is None.
        for path, numbers in zip(self.paths, self.numbers, strict=True):
            with _opened(path, self.error) as parquet:
                meta = parquet.metadata
            for group in map(meta.row_group, numbers):
                leaves = [
                    leaf.num_values
                    for leaf in map(group.column, range(group.num_columns))
                    if leaf.path_in_schema.startswith(f"{column}.")
                ]
                yield group.num_rows, leaves[0] if len(leaves) == 1 else None

    def read(self, columns: list[str], *, dictionaries: Sequence[str] = ()) -> pa.Table:
        """Read columns of all files, some text dictionary-coded to save memory, in file order."""
        tables = []
        for path, schema, numbers in zip(self.paths, self.schemas, self.numbers, strict=True):
            refuse_repeated(columns, schema.names, label=f"'{path}'")
            coded = [name for name in dictionaries if is_text(schema.field(name).type)]
            with _opened(path, self.error, memory_map=True, read_dictionary=coded) as parquet:
                tables.append(parquet.read_row_groups(list(numbers), columns=columns))
        try:
            return concat_tables(tables)
        except pa.ArrowException as failure:
            kinds = {str(t.schema.field(c).type) for c in columns for t in tables}
            raise self.error(
                f"the files of {self.label} do not agree on the types of {columns}: they hold "
                f"{sorted(kinds)}; write them with one schema"
            ) from failure
