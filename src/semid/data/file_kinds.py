"""What a file is, judged by its first bytes, and what to do where a reader expects another kind."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import PurePath

import pyarrow as pa

from semid.filesystems import FilePath, resolve

PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")

HEAD_BYTES = 65_536
"""How much of a file is looked at; a few hundred rows of a table of text."""

_JSON = re.compile(r"\s*(\{\s*[\"}]|\[\s*[\[{\"\d\-\]])")
_SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}

_AGAIN = "it is not the data but most likely what a failed download left: download the file again"
_UNPACK = "decompress it first, for example with: {tool} '{path}'"


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: short name, which readers compare.
        phrase: what the file is, in a sentence after "is".
        advice: what to do with it where it cannot be read, with ``{path}``; empty where that
            depends on the reader.
    """

    name: str
    phrase: str
    advice: str = ""


def _to_parquet(read: str) -> str:
    return "convert it: pyarrow.parquet.write_table(" + read + ", '{path}.parquet')"


EMPTY = FileKind("empty", "empty (0 bytes)", "write or download it again")
TEXT = FileKind("text", "text")
JSON = FileKind(
    "json", "JSON", "convert it: pandas.read_json('{path}').to_parquet('{path}.parquet')"
)
JSON_LINES = FileKind(
    "jsonl", "JSON lines (one object per line)", _to_parquet("pyarrow.json.read_json('{path}')")
)
PICKLE = FileKind("pickle", "a Python pickle, which is never loaded")
UTF16 = FileKind("utf16", "text in UTF-16", "save it as UTF-8")
UNKNOWN = FileKind("unknown", "of a format that semid does not know")

_MAGIC = {
    b"PAR1": FileKind("parquet", "Parquet", "rename it to end in .parquet"),
    b"PARE": FileKind("encrypted", "encrypted Parquet", "decrypt it first"),
    b"\x93NUMPY": FileKind("npy", "a NumPy array (.npy)"),
    b"ARROW1": FileKind(
        "arrow",
        "an Arrow file (.arrow, .feather)",
        _to_parquet("pyarrow.feather.read_table('{path}')"),
    ),
    b"FEA1": FileKind(
        "arrow", "a Feather file", _to_parquet("pyarrow.feather.read_table('{path}')")
    ),
    b"\xff\xff\xff\xff": FileKind(
        "arrow", "an Arrow stream", _to_parquet("pyarrow.ipc.open_stream('{path}').read_all()")
    ),
    b"ORC": FileKind("orc", "an ORC file", _to_parquet("pyarrow.orc.read_table('{path}')")),
    b"\x1f\x8b": FileKind("gzip", "compressed with gzip", _UNPACK.replace("{tool}", "gunzip")),
    b"BZh": FileKind("bzip2", "compressed with bzip2", _UNPACK.replace("{tool}", "bunzip2")),
    b"\x28\xb5\x2f\xfd": FileKind(
        "zstd", "compressed with Zstandard", _UNPACK.replace("{tool}", "unzstd")
    ),
    b"\xfd7zXZ\x00": FileKind("xz", "compressed with xz", _UNPACK.replace("{tool}", "unxz")),
    b"PK\x03\x04": FileKind("zip", "a zip archive (.zip, .npz, .pt or .xlsx)"),
    b"\x89HDF": FileKind("hdf5", "an HDF5 file"),
    b"Obj\x01": FileKind("avro", "an Avro file"),
    b"SQLite format 3": FileKind("sqlite", "an SQLite database"),
    b"%PDF": FileKind("pdf", "a PDF document"),
    b"\x80\x02": PICKLE,
    b"\x80\x03": PICKLE,
    b"\x80\x04": PICKLE,
    b"\x80\x05": PICKLE,
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
}
"""Binary formats by their first bytes; of text, which may begin with ``ORC`` too, never asked."""

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
        if suffix in (".jsonl", ".ndjson") or (rest.strip() and _is_json(first)):
            return JSON_LINES
        return JSON
    lines = text.splitlines()
    if not complete:
        lines = lines[:-1] or lines
    for separator, word in _SEPARATORS.items():
        widths = {len(row) for row in csv.reader(lines, delimiter=separator) if row}
        if len(widths) == 1 and (columns := widths.pop()) > 1:
            advice = {
                "\t": "rename it to end in .tsv; its first line must name the columns",
                ",": "rename it to end in .csv; its first line must name the columns",
            }.get(separator, "separate the columns by commas, in a file that ends in .csv")
            return FileKind(word, f"{word}-separated text with {columns} columns", advice)
    return TEXT


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def wrong_format(
    path: FilePath, expected: str, kind: FileKind | None = None, *, allowed: str = ""
) -> str | None:
    """Say in a sentence what a file is and what to give instead.

    Returns the sentence, or None where the file is of that kind or of none that is known here.
    """
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
