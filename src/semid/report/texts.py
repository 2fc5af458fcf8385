"""Titles and texts for the pictures, matched to the catalogue by item id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from semid.data.frames import is_frame, open_frame
from semid.data.id_sources import split_column
from semid.data.ids import ItemIds
from semid.data.parquet_files import ParquetFiles
from semid.errors import IdsError, UsageError
from semid.report.explorer import ItemTexts

__all__ = ["load_texts"]

_COLUMNS = ("title", "text")


def load_texts(items: Any, ids: ItemIds, *, required: bool) -> tuple[ItemTexts, list[str]]:
    """Read the titles and texts of the catalogue's items.

    Args:
        items: Parquet path (``items.parquet``, or ``items.parquet:asin`` to name the id column),
            or an Arrow, pandas or polars table with ``title`` or ``text`` or both; None for none.
        ids: the catalogue.
        required: whether a table without titles is an error; it is not where the table was given
            for its ids only.

    Returns:
        The texts, and sentences on what was missing.

    Raises:
        UsageError: no such file or column, though ``required``.
        IdsError: item ids of the table repeat or none of them is in the catalogue.

    Memory: the two columns for the catalogue's items.
    """
    if items is None:
        return ItemTexts(), []
    found = _read(items, required)
    if found is None:
        return ItemTexts(), []
    table, id_column, label = found
    columns = [name for name in _COLUMNS if name in table.column_names]
    if id_column is None:
        if len(table) != len(ids):
            raise IdsError(
                f"{label} has no id column and {len(table)} rows for {len(ids)} items; add "
                "'item_id', or name the column: items.parquet:asin"
            )
        rows = None
    else:
        rows = pa.array(ItemIds(table[id_column], source=f"ids of {label}").index_of(ids.strings()))
    missing = 0
    picked = {}
    for name in columns:
        values = table[name].combine_chunks()
        if rows is not None:
            known = pa.compute.if_else(pa.compute.less(rows, 0), None, rows)
            missing = known.null_count
            values = values.take(known)
        picked[name] = values
    if rows is not None and missing == len(ids):
        raise IdsError(
            f"none of the {len(ids)} items is in {label}: its ids are called like "
            f"'{table[id_column][0]}', the catalogue's like '{ids[0]}'"
        )
    notes = [f"{missing:,} of {len(ids):,} items have no row in {label}"] if missing else []
    return (
        ItemTexts(picked.get("title", picked.get("text")), picked.get("text", picked.get("title"))),
        notes,
    )


def _read(items: Any, required: bool) -> tuple[pa.Table, str | None, str] | None:
    """Read the id and text columns; None for a table without titles that need not have any."""
    if isinstance(items, str | Path):
        path, named = split_column(items)
        if not required and path.suffix.lower() not in (".parquet", ".pq", ".parq"):
            return None
        files = ParquetFiles.open(path)
        names, label = files.schemas[0].names, files.label
    elif is_frame(items) and hasattr(items, "columns"):
        frame = open_frame(items)
        names, label, named = frame.schema.names, frame.label, None
    elif not required:
        return None
    else:
        raise UsageError(
            f"items are a {type(items).__name__}; give a Parquet path or an Arrow, pandas or "
            "polars table with the columns 'item_id' and 'title'"
        )
    texts = [name for name in _COLUMNS if name in names]
    if not texts:
        if not required:
            return None
        raise UsageError(
            f"{label} has neither a column 'title' nor 'text'; add one, or leave --items out"
        )
    if named is not None and named not in names:
        raise UsageError(f"{label} has no column '{named}'; name its id column")
    id_column = named or ("item_id" if "item_id" in names else None)
    wanted = [*([id_column] if id_column else []), *texts]
    if isinstance(items, str | Path):
        table = files.read(wanted)
    else:
        table = pa.table({name: frame.column(name) for name in wanted})
    for name in texts:
        table = table.set_column(
            table.column_names.index(name), name, table[name].cast(pa.large_string())
        )
    return table, id_column, label
