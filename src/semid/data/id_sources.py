"""Item ids and codes from where they lie: a table's column, a text file, an array."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.columns import is_list, listed, refuse_repeated, require_column
from semid.data.file_kinds import HEAD_BYTES, PARQUET_SUFFIXES, UNKNOWN, recognize, wrong_format
from semid.data.frames import Frame, library_of, open_frame
from semid.data.ids import ItemIds, cast_ids
from semid.data.parquet_files import ParquetFiles, is_glob
from semid.data.tables import is_csv, open_table
from semid.errors import ArtefactError, IdsError, SemidError, UsageError, nearest_name
from semid.filesystems import FilePath, is_uri

DEFAULT_ID_COLUMN = "item_id"
_FLAG = "--id-column (id_column=)"
_log = logging.getLogger(__name__)


def load_ids(ids: Any, *, id_column: str | None = None) -> ItemIds:
    """Read item ids given apart from the embeddings.

    Returns the ids. Those from CSV and text files stay text, so ``007`` does not become 7.

    Shapes: ``ids`` (file, folder or glob).
    """
    if isinstance(ids, ItemIds):
        return ids
    if isinstance(ids, str | Path):
        path, column = split_column(ids)
        if column and id_column and column != id_column:
            raise UsageError(
                f"the ids are to come from column '{column}' (in '{ids}') and from '{id_column}' "
                f"({_FLAG}); name one of them"
            )
        return _from_path(path, column or id_column)
    library = library_of(ids)
    if library == "torch":
        return _ids(ids.cpu().numpy())
    if isinstance(ids, pa.Array | pa.ChunkedArray):
        return _ids(ids)
    if library in ("pandas", "polars", "pyarrow"):
        if library == "pandas" and ids.ndim == 1:
            return _ids(pa.array(ids, from_pandas=True))
        if type(ids).__name__ == "Series":
            return _ids(ids.to_frame().to_arrow().column(0))
        frame = open_frame(ids)
        column = _choose(frame.schema.names, id_column, label=frame.label, explicit=True)
        return _ids(frame.column(str(column)), source=f"column '{column}' of {frame.label}")
    if isinstance(ids, Sequence | np.ndarray):
        return _ids(ids)
    raise UsageError(
        f"ids are a {type(ids).__name__}; give a path, an array, a list, a table or None"
    )


def parquet_ids(files: ParquetFiles, id_column: str | None) -> ItemIds | None:
    """Read the ids that stand beside the embeddings in Parquet; None for row numbers."""
    names = files.schemas[0].names
    column = _choose(names, id_column, label=files.label, explicit=False)
    return None if column is None else _parquet_column(files, column)


def frame_ids(frame: Frame, id_column: str | None) -> ItemIds | None:
    """Take the ids that stand beside the embeddings in a frame; None for row numbers."""
    column = _choose(frame.schema.names, id_column, label=frame.label, explicit=False)
    if column is None:
        return None
    return _ids(frame.column(column), source=f"id column '{column}' of {frame.label}")


def _ids(values: Any, *, source: str = "item ids") -> ItemIds:
    return ItemIds(values, source=source, allow_empty=False)


def split_column(spec: str | Path) -> tuple[FilePath, str | None]:
    """Split ``items.parquet:asin`` into the path or URI and the column.

    A path that exists as it stands is never split, so a colon in a file name is safe.
    """
    whole: FilePath = str(spec) if is_uri(spec) else Path(spec).expanduser()
    text = str(whole)
    if isinstance(whole, Path) and (whole.exists() or (is_glob(text) and ":" not in text)):
        return whole, None
    path, colon, column = text.rpartition(":")
    # A drive letter such as C:\items.parquet and the scheme of a URI are followed by no column.
    if colon and path and column and not any(c in column for c in "/\\"):
        return (path if is_uri(path) else Path(path)), column
    return whole, None


def _choose(names: list[str], column: str | None, *, label: str, explicit: bool) -> str | None:
    """Choose the id column; None (row numbers) only for a table that is not about ids."""
    if column is not None:
        return require_column(column, names, label=label, flag=_FLAG)
    if DEFAULT_ID_COLUMN in names:
        return require_column(DEFAULT_ID_COLUMN, names, label=label, flag=_FLAG)
    if not explicit:
        _log.warning(
            "%s has no column '%s': items are named by row number; name the column with %s",
            label,
            DEFAULT_ID_COLUMN,
            _FLAG,
        )
        return None
    if len(names) == 1:
        return names[0]
    raise UsageError(
        f"{label} has no column '{DEFAULT_ID_COLUMN}'{nearest_name(DEFAULT_ID_COLUMN, names)}; "
        f"it has {listed(names)}: name one as 'file:column' or with {_FLAG}"
    )


def _from_path(path: FilePath, column: str | None) -> ItemIds:
    if isinstance(path, Path) and is_csv(path):
        table = open_table(path, error=IdsError)
        name = str(_choose(table.names, column, label=table.label, explicit=True))
        values = table.read([name], text=[name]).column(0)
        return _ids(values, source=f"column '{name}' of {table.label}")
    if (
        not isinstance(path, Path)
        or path.is_dir()
        or is_glob(path)
        or path.suffix.lower() in PARQUET_SUFFIXES
    ):
        files = ParquetFiles.open(path, error=IdsError)
        name = str(_choose(files.schemas[0].names, column, label=files.label, explicit=True))
        return _parquet_column(files, name)
    if not path.exists():
        raise UsageError(f"'{path}' does not exist; check the path of the ids")
    if column is not None:
        raise UsageError(
            f"'{path}' is read as text with one id per line and has no column '{column}'; give "
            "Parquet or CSV (.csv, .tsv) for ids in a column"
        )
    return _ids(_read_text(path), source=f"ids of '{path}'")


def _parquet_column(files: ParquetFiles, column: str) -> ItemIds:
    for path, schema in zip(files.paths, files.schemas, strict=True):
        require_column(column, schema.names, label=f"'{path}'", flag=_FLAG)
    values = files.read([column]).column(0)
    return _ids(values, source=f"id column '{column}' of {files.label}")


def _read_text(path: Path) -> pa.Array:
    """Read a text file with one id per line (only the last may be empty), or LC-Rec's item2id."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror or error}") from error
    kind = recognize(data[:HEAD_BYTES], path)
    if kind is UNKNOWN or kind.name == "text":
        lines = _lines(path, data)
        tabs = [number for number, line in enumerate(lines, start=1) if "\t" in line]
        if tabs:
            raise IdsError(
                f"'{path}' has {len(tabs)} lines with a tab (first: line {tabs[0]}); write one id "
                "per line, or a table that ends in .tsv, whose first line names the columns"
            )
        return pa.array(lines, type=pa.large_string())
    if kind.name == "tab" and (ids := _by_row_number(_lines(path, data))) is not None:
        return ids
    hint = ""
    if kind.phrase.endswith("columns"):
        hint = (
            f", and --ids '{path.with_suffix('.csv')}:COLUMN' names the ids' column (ids that "
            "contain the separator are given as Parquet)"
        )
        hint = hint.replace(".csv", ".tsv") if kind.name == "tab" else hint
    raise IdsError(f"{wrong_format(path, 'ids', kind)}{hint}")


def _lines(path: Path, data: bytes) -> list[str]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IdsError(
            f"'{path}' is not UTF-8 text (byte {error.start}); ids are read from Parquet, CSV or a "
            "UTF-8 text file with one id per line"
        ) from error
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    empty = [number for number, line in enumerate(lines, start=1) if line == ""]
    if empty:
        raise IdsError(
            f"'{path}' has {len(empty)} empty lines (first: line {empty[0]}); write one id per line"
        )
    return lines


def _by_row_number(lines: list[str]) -> pa.Array | None:
    """Return the ids of lines ``id<TAB>row number`` by row; None unless each row occurs once."""
    pairs = [line.split("\t") for line in lines]
    ids = {
        int(pair[1]): pair[0]
        for pair in pairs
        if len(pair) == 2 and pair[1].isascii() and pair[1].isdigit()
    }
    if len(ids) != len(lines) or max(ids) != len(lines) - 1:
        return None
    return pa.array([ids[row] for row in range(len(lines))], type=pa.large_string())


def code_rows(
    table: pa.Table,
    name: str,
    levels: int,
    *,
    where: str,
    error: type[SemidError] = ArtefactError,
) -> npt.NDArray[Any]:
    """Return a column of lists as ``(items, levels)`` integers of its own type.

    Anything else than as many integers for every item raises ``error`` naming ``where``.
    """
    column = table[name]
    if not is_list(column.type) or not pa.types.is_integer(column.type.value_type):
        raise error(f"column '{name}' of {where} holds {column.type}; codes are lists of integers")
    lists = column.combine_chunks()
    values = lists.flatten()
    empty = lists.null_count or values.null_count
    sizes = pc.list_value_length(lists).unique().to_pylist()
    if empty or any(size != levels for size in sizes):
        problem = "has nulls" if empty else f"holds lists of {sorted(sizes)[:8]} codes"
        raise error(
            f"column '{name}' of {where} {problem}; every item needs {levels} codes, for "
            f"this model has {levels} levels: give the model that made them, or encode again"
        )
    codes: npt.NDArray[Any] = values.to_numpy().reshape(len(table), levels)
    return codes


def join_tables(tables: Sequence[pa.Table], *, where: str) -> pa.Table:
    """Return the rows of several tables of Semantic IDs, with the item ids in the first one's type.

    Files of one catalogue may differ in the width of their integers or texts, and in whether
    repeated texts are coded in a dictionary. The last table's metadata are those of all.
    """
    if any(t.column_names != tables[0].column_names for t in tables):
        raise ArtefactError(f"the files of {where} have different columns; encode them again")
    refuse_repeated(tables[0].column_names, tables[0].column_names, label=where)
    joined = [t.replace_schema_metadata(None) for t in tables]
    if (
        "item_id" in tables[0].column_names
        and len({t.schema.field("item_id").type for t in tables}) > 1
    ):
        kind = joined[0].schema.field("item_id").type
        joined = [
            t.set_column(
                t.schema.get_field_index("item_id"),
                "item_id",
                cast_ids(t["item_id"], kind, source=f"item ids of {where}"),
            )
            for t in joined
        ]
    try:
        table = pa.concat_tables(joined, promote_options="permissive")
    except pa.ArrowException as error:
        raise ArtefactError(
            f"the files of {where} disagree on the types of their columns ({error}); encode them "
            "again"
        ) from None
    return table.replace_schema_metadata(tables[-1].schema.metadata)
