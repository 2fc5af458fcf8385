"""What items are called: titles, categories and texts, lined up with a catalogue's rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from semid.data.columns import is_list
from semid.data.id_sources import DEFAULT_ID_COLUMN, split_column
from semid.data.ids import ItemIds
from semid.data.tables import open_table
from semid.errors import IdsError, InputError, UsageError

_TEXT_COLUMNS = ("title", "categories", "brand", "text")


@dataclass(frozen=True)
class ItemTexts:
    """Texts of items, row by row.

    Attributes:
        ids: the items.
        titles: (items,) Arrow large_string array without nulls: the title, else the text, else
            empty.
        categories: (items,) Arrow large_string array without nulls, or None without the column.
        brand: likewise.
        text: likewise.
        missing: items of ``ids`` that the table did not have.
    """

    ids: ItemIds
    titles: Any
    categories: Any = None
    brand: Any = None
    text: Any = None
    missing: int = 0

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
        take = pa.array(rows, mask=rows < 0)
        columns = {
            name: None if column is None else column.take(take).fill_null("")
            for name, column in self._columns().items()
        }
        return ItemTexts(ids, missing=missing, **columns)

    def _columns(self) -> dict[str, Any]:
        names = ("titles", "categories", "brand", "text")
        return {name: getattr(self, name) for name in names}


def read_items(
    source: Any,
    *,
    ids: ItemIds | None = None,
    id_column: str | None = None,
    title_column: str | None = None,
) -> ItemTexts:
    """Read what items are called.

    Shapes: ``source`` (file, folder or glob).
    """
    if isinstance(source, ItemTexts):
        return source if ids is None else source.aligned(ids)
    key = id_column
    if isinstance(source, str | Path):
        source, column = split_column(source)
        key = key or column
    opened = open_table(source, what="items", error=IdsError)
    names = opened.names
    key = opened.require(key or DEFAULT_ID_COLUMN, flag="--id-column (id_column=)")
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
    columns = {c: _texts(table, c) for c in text_columns}
    titles = _texts(table, title_column) if title_column else columns.get("title")
    text = columns.get("text")
    if titles is None:
        titles = text
    elif text is not None:
        titles = pc.if_else(pc.equal(titles, ""), text, titles)
    table_ids = ItemIds(table.column(key), source=f"id column '{key}' of {opened.label}")
    items = ItemTexts(table_ids, titles, columns.get("categories"), columns.get("brand"), text)
    return items if ids is None else items.aligned(ids)


def _texts(table: pa.Table, name: str) -> Any:
    """Return a column as text without nulls; a list of categories is joined with ' > '."""
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
