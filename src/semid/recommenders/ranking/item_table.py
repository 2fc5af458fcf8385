"""Tables of items: attributes such as brand and categories, lined up with a catalogue."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.ids import ItemIds
from semid.data.tables import open_table
from semid.errors import InteractionsError, UsageError
from semid.recommenders.ranking.schema import ItemAttribute, Schema, Vocabulary, as_text, one_array

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

SEPARATORS = (" > ", "|", ";", ", ")
"""What categories in one string are split at: the first that occurs in the column."""

MULTI_FLAG = "--multi-columns (multi_columns=)"
ADVICE = (
    "cut the numbers into bins and give those, or leave it out of --item-columns and "
    "--multi-columns (item_columns=, multi_columns=)"
)
"""Items have no numeric features: what to do about a column of floats."""


@dataclass(frozen=True)
class ItemColumns:
    """Raw attributes of a catalogue, before it is known which items train."""

    # the values of each item by attribute, Arrow ``large_list<large_string>`` ``(items,)``
    values: dict[str, Any]
    multi: frozenset[str]  # names of the attributes with several values

    def attributes(self, train: npt.NDArray[np.bool_]) -> dict[str, ItemAttribute]:
        """Return the attributes, their vocabularies from the items in the mask ``train`` alone."""
        attributes = {}
        for name, column in self.values.items():
            # An empty text is a missing value: it gets no row and reads the unknown one.
            values = pc.drop_null(pc.unique(column.filter(pa.array(train)).flatten()))
            values = values.filter(pc.not_equal(values, ""))
            vocabulary = Vocabulary(values.cast(pa.large_string()), source=f"values of '{name}'")
            attributes[name] = ItemAttribute(vocabulary, self.rows(name, vocabulary))
        return attributes

    def rows(self, name: str, vocabulary: Vocabulary, width: int | None = None) -> Ints:
        """Look values up: ``(items + 1,)``, or ``(items + 1, width)`` for several values."""
        column = self.values[name]
        rows = vocabulary.rows(column.flatten())
        offsets = column.offsets.to_numpy()
        counts = np.diff(offsets)
        multi = name in self.multi
        if width is None or not multi:
            width = int(counts.max(initial=1)) if multi else 1
        # Each value's place within its item, and its item's row.
        place = np.arange(len(rows)) - np.repeat(offsets[:-1] - offsets[0], counts)
        item = np.repeat(np.arange(len(counts)), counts) + 1
        # Unknown values of a list are left out, so that they do not take part in the mean.
        used = (rows > 0) & (place < width)
        table = np.zeros((len(counts) + 1, width), dtype=np.int64)
        table[item[used], place[used]] = rows[used]
        return table if multi else table[:, 0]


def read_item_columns(
    source: Any,
    ids: ItemIds,
    *,
    id_column: str | None = None,
    single: Sequence[str] | None = None,
    multi: Sequence[str] | None = None,
) -> ItemColumns:
    """Read attributes of items and line them up with a catalogue."""
    if source is None:
        if single or multi:
            raise UsageError(
                f"item columns {[*(single or ()), *(multi or ())]} are named, but no table of "
                "items is given: pass --items (items=)"
            )
        return ItemColumns({}, frozenset())
    table = open_table(source, what="the table of items")
    key = table.require(id_column or "item_id", flag="--id-column (id_column=)")
    # The flag that names a column, for errors; it also says whether values are split.
    flags: dict[str, str] = {}
    for names, defaults, flag in (
        (single, ("brand",), "--item-columns (item_columns=)"),
        (multi, ("categories",), MULTI_FLAG),
    ):
        present = [name for name in defaults if name in table.names]
        for name in present if names is None else names:
            if flags.setdefault(name, flag) != flag:
                raise UsageError(f"item columns ['{name}'] are named twice")
            table.require(name, flag=flag)
    read = table.read([key, *flags])
    table_ids = ItemIds(read.column(key), source=f"id column '{key}' of {table.label}")
    rows = table_ids.index_of(ids.strings())
    # Items of the log that the table lacks have no attributes.
    missing = int((rows < 0).sum())
    if missing:
        logger.warning(
            "%s has no row for %d of %d items; their attributes count as unknown",
            table.label,
            missing,
            len(ids),
        )
    positions = pa.array(rows, mask=rows < 0)
    several = frozenset(name for name, flag in flags.items() if flag == MULTI_FLAG)
    values = {}
    for name in flags:
        lists = _lists(read.column(name), name=name, label=table.label, split=name in several)
        lists = lists.take(positions)
        # An empty list for a null, so that values and offsets stay aligned.
        values[name] = pc.if_else(lists.is_valid(), lists, pa.scalar([], type=lists.type))
    return ItemColumns(values, several)


def _lists(column: Any, *, name: str, label: str, split: bool) -> Any:
    """Return a column as lists of strings."""
    column, types = one_array(column), pa.types
    list_checks = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if any(check(column.type) for check in list_checks):
        as_text(column.flatten().slice(0, 0), name=name, label=label, advice=ADVICE)
        return column.cast(pa.large_list(pa.large_string()))
    text = as_text(column, name=name, label=label, advice=ADVICE).fill_null("")
    for separator in SEPARATORS if split else ():
        if pc.any(pc.match_substring(text, separator)).as_py():
            return pc.split_pattern(text, separator).cast(pa.large_list(pa.large_string()))
    offsets = pa.array(np.arange(len(text) + 1), type=pa.int64())
    return pa.LargeListArray.from_arrays(offsets, text)


def join_catalogue(item_ids: pa.Array, items: Any, id_column: str | None, *, label: str) -> ItemIds:
    """Return the catalogue: the items of the table, then the further items of the log."""
    if items is None:
        return ItemIds(item_ids)
    table = open_table(items, what="the table of items")
    key = id_column or "item_id"
    if key not in table.names:
        return ItemIds(item_ids)  # reading the columns says what is wrong
    known = ItemIds(table.read([key]).column(key), source=f"id column '{key}' of {table.label}")
    # The table comes first, so that its items have equal rows whatever the log holds.
    extra = np.flatnonzero(known.index_of(item_ids) < 0)
    if len(extra) == len(item_ids):
        raise InteractionsError(
            f"none of the {len(item_ids)} items of {label} is in {table.label}: they are called "
            f"like {ItemIds(item_ids).example}, the table's like {known.example}; check --id-column"
        )
    return ItemIds(pa.concat_arrays([known.strings(), item_ids.take(pa.array(extra))]))


def extend_schema(schema: Schema, items: Any) -> tuple[Schema, ItemIds]:
    """Append the items of a table that the schema does not know; return their ids too."""
    table = open_table(items, what="the table of items")
    if "item_id" not in table.names:
        raise UsageError(f"{table.label} has no column 'item_id'; name the new items in it")
    ids = ItemIds(table.read(["item_id"]).column("item_id"), source=f"item_id of {table.label}")
    rows = np.flatnonzero(schema.items.rows(ids.strings()) == 0)
    if not len(rows):
        raise UsageError(f"the model knows all {len(ids)} items of {table.label} already")
    new = ItemIds(ids.strings().take(pa.array(rows)))
    # Attributes of the new items, in the vocabularies of the model: no row of a table is added.
    multi = [name for name, attribute in schema.attributes.items() if attribute.multi]
    single = [name for name in schema.attributes if name not in multi]
    columns = read_item_columns(items, new, single=single, multi=multi)
    attributes = {}
    for name, known in schema.attributes.items():
        width = known.rows.shape[1] if known.multi else None
        added = columns.rows(name, known.vocabulary, width)[1:]
        attributes[name] = ItemAttribute(known.vocabulary, np.concatenate([known.rows, added]))
    joined = Vocabulary(pa.concat_arrays([schema.items.ids.strings(), new.strings()]))
    id_rows = np.concatenate([schema.id_rows, np.zeros(len(new), np.int64)])
    return replace(schema, items=joined, id_rows=id_rows, attributes=attributes), new
