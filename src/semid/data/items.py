"""Items from where they lie: ids and codes in tables, text files and arrays, titles and texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.columns import is_list, listed, refuse_repeated, require_column
from semid.data.files import (
    HEAD_BYTES,
    PARQUET_SUFFIXES,
    UNKNOWN,
    ParquetFiles,
    is_glob,
    recognize,
    wrong_format,
)
from semid.data.ids import ItemIds, cast_ids
from semid.data.tables import (
    Frame,
    collected,
    csv_delimiter,
    library_of,
    open_arrow,
    open_frame,
    open_table,
)
from semid.errors import (
    ArtefactError,
    IdsError,
    InputError,
    SemidError,
    UsageError,
    nearest_name,
)
from semid.filesystems import FilePath, is_uri

DEFAULT_ID_COLUMN = "item_id"
_FLAG = "--id-column (id_column=)"
_log = logging.getLogger(__name__)


def load_ids(ids: Any, *, id_column: str | None = None) -> ItemIds:
    """Read item ids from a path (``file:column``), array, list or table; text stays text."""
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
    ids = collected(ids)
    library = library_of(ids)
    if library in ("pandas", "polars", "pyarrow") and not isinstance(
        ids, pa.Array | pa.ChunkedArray
    ):
        if library == "pandas" and ids.ndim == 1:
            return _ids(pa.array(ids, from_pandas=True))
        if type(ids).__name__ == "Series":
            return _ids(ids.to_frame().to_arrow().column(0))
        frame = open_frame(ids)
        column = _choose(frame.schema.names, id_column, label=frame.label, explicit=True)
        return _ids(frame.column(str(column)), source=f"column '{column}' of {frame.label}")
    if library == "torch":
        ids = ids.cpu().numpy()
    if library == "pyarrow" or isinstance(ids, Sequence | np.ndarray):
        return _ids(ids)
    raise UsageError(
        f"ids are a {type(ids).__name__}; give a path, an array, a list, a table or None"
    )


def parquet_ids(files: ParquetFiles, id_column: str | None) -> ItemIds | None:
    """Read the ids that stand beside the embeddings in Parquet; None for row numbers."""
    column = _choose(files.schemas[0].names, id_column, label=files.label, explicit=False)
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
    """Split ``items.parquet:asin`` into the path or URI and the column."""
    # A path that exists as it stands is never split, so a colon in a file name is safe.
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
            *(label, DEFAULT_ID_COLUMN, _FLAG),
        )
        return None
    if len(names) == 1:
        return names[0]
    raise UsageError(
        f"{label} has no column '{DEFAULT_ID_COLUMN}'{nearest_name(DEFAULT_ID_COLUMN, names)}; "
        f"it has {listed(names)}: name one as 'file:column' or with {_FLAG}"
    )


def _from_path(path: FilePath, column: str | None) -> ItemIds:
    if (frame := open_arrow(path, error=IdsError)) is not None:
        name = str(_choose(frame.schema.names, column, label=frame.label, explicit=True))
        return _ids(frame.column(name), source=f"column '{name}' of {frame.label}")
    if isinstance(path, Path) and csv_delimiter(path):
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
        table = path.with_suffix(".tsv" if kind.name == "tab" else ".csv")
        hint = (
            f", and --ids '{table}:COLUMN' names the ids' column (ids that contain the separator "
            "are given as Parquet)"
        )
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
    # LC-Rec writes a row number behind each id, in any order.
    ids = {int(p[1]): p[0] for p in pairs if len(p) == 2 and p[1].isascii() and p[1].isdigit()}
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
    """Return a column of lists of ``levels`` integers as a matrix, or raise ``error``."""
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
    """Return the rows of several tables of Semantic IDs, ids in the type of the first one's."""
    if any(t.column_names != tables[0].column_names for t in tables):
        raise ArtefactError(f"the files of {where} have different columns; encode them again")
    refuse_repeated(tables[0].column_names, tables[0].column_names, label=where)
    # Files of one catalogue may differ in the width of their integers or texts, and in whether
    # repeated texts are coded in a dictionary. The last table's metadata are those of all.
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


_TEXT_COLUMNS = ("title", "categories", "brand", "text")


@dataclass(frozen=True)
class ItemTexts:
    """Texts of items, row by row."""

    ids: ItemIds  # the items
    # (items,) Arrow large_string array without nulls: the title, else the text, else empty
    titles: Any
    # (items,) Arrow large_string array without nulls, or None without the column
    categories: Any = None
    brand: Any = None  # likewise
    text: Any = None  # likewise
    missing: int = 0  # items of ``ids`` that the table did not have

    def __len__(self) -> int:
        return len(self.ids)

    def title(self, row: int) -> str:
        """Return the title of one row, or the item id where nothing is known."""
        return str(self.titles[int(row)].as_py()) or self.ids[int(row)]

    def aligned(self, ids: ItemIds) -> ItemTexts:
        """Return the texts in the order of other ids; items without a row get empty texts."""
        rows = self.ids.index_of(ids.strings())
        missing = int((rows < 0).sum())
        if len(ids) and not len(self.ids):
            raise IdsError("the table of items has no rows; give one with a row per item")
        if len(ids) and missing == len(ids):
            raise IdsError(
                f"none of the {len(ids)} items has a row in the table of items: they are called "
                f"like {ids.example}, the table's like {self.ids.example}; check --id-column "
                f"(id_column=){self.ids.whitespace_hint(ids.strings(0, 65_536))}"
            )
        # A masked row number draws a null, which becomes an empty text.
        take = pa.array(rows, mask=rows < 0)
        columns = {
            name: None if column is None else column.take(take).fill_null("")
            for name in ("titles", "categories", "brand", "text")
            for column in [getattr(self, name)]
        }
        return ItemTexts(ids, missing=missing, **columns)


def read_items(
    source: Any,
    *,
    ids: ItemIds | None = None,
    id_column: str | None = None,
    title_column: str | None = None,
) -> ItemTexts:
    """Read what items are called from a table or the path of one (file, folder or glob)."""
    if isinstance(source, ItemTexts):
        return source if ids is None else source.aligned(ids)
    column = None
    if isinstance(source, str | Path):
        source, column = split_column(source)
    opened = open_table(source, what="items", error=IdsError)
    names = opened.names
    key = opened.require(id_column or column or DEFAULT_ID_COLUMN, flag=_FLAG)
    if title_column is not None:
        opened.require(title_column, flag="title_column=")
    elif "title" not in names and "text" not in names:
        raise UsageError(
            f"{opened.label} has neither a column 'title' nor 'text'; name the one to call items "
            "by with title_column="
        )
    text_columns = [c for c in _TEXT_COLUMNS if c in names]
    read = list(dict.fromkeys([key, *text_columns, *([title_column] if title_column else [])]))
    table = opened.read(read, text=read)  # a title such as 1984 is no number
    columns = {c: text_column_of(table, c) for c in text_columns}
    text = columns.get("text")
    # An item without a title is called by its text.
    titles = text_column_of(table, title_column) if title_column else columns.get("title", text)
    if text is not None:
        titles = pc.if_else(pc.equal(titles, ""), text, titles)
    table_ids = ItemIds(table.column(key), source=f"id column '{key}' of {opened.label}")
    items = ItemTexts(table_ids, titles, columns.get("categories"), columns.get("brand"), text)
    return items if ids is None else items.aligned(ids)


def text_column_of(table: pa.Table, name: str) -> Any:
    """Return a column as an Arrow array of text without nulls; lists are joined with ' > '."""
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        if is_list(column.type):
            column = pc.binary_join(column.cast(pa.list_(pa.string())), " > ")
        array = column.cast(pa.large_string()).fill_null("").combine_chunks()
    except pa.ArrowException:
        raise InputError(
            f"column '{name}' of the table of items holds {column.type}; give text or lists of text"
        ) from None
    return array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)
