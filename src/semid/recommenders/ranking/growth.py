"""Further items for a trained model: attributes and codes, no row of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.codes import SemanticIds
from semid.data.ids import ItemIds
from semid.data.tables import open_table
from semid.errors import UsageError
from semid.recommenders.ranking.catalogue import ItemAttribute, read_item_columns
from semid.recommenders.ranking.features import CodeFeatures, CodeTable
from semid.recommenders.ranking.schema import Schema
from semid.recommenders.ranking.vocabulary import Vocabulary

__all__ = ["grown_codes", "grown_schema"]

Ints = npt.NDArray[np.int64]


def grown_schema(schema: Schema, items: Any) -> tuple[Schema, ItemIds]:
    """Append the items that the schema does not know.

    Args:
        schema: of the trained model.
        items: table with ``item_id`` and the model's attributes.

    Returns:
        The new schema and the ids that were appended.

    Raises:
        UsageError: a column is missing, or there is no new item.
    """
    table = open_table(items, what="the table of items")
    if "item_id" not in table.names:
        raise UsageError(f"{table.label} has no column 'item_id'; name the new items in it")
    given = ItemIds(table.read(["item_id"]).column("item_id"), source=f"item_id of {table.label}")
    fresh = np.flatnonzero(schema.items.rows(given.strings()) == 0)
    if not len(fresh):
        raise UsageError(f"the model knows all {len(given)} items of {table.label} already")
    new = ItemIds(given.strings().take(pa.array(fresh)))
    multi = [name for name, a in schema.attributes.items() if a.multi]
    columns = read_item_columns(
        items, new, single=[n for n in schema.attributes if n not in multi], multi=multi
    )
    attributes = {}
    for name, known in schema.attributes.items():
        width = known.rows.shape[1] if known.multi else None
        rows = columns.rows(name, known.vocabulary, width)[1:]
        attributes[name] = ItemAttribute(known.vocabulary, np.concatenate([known.rows, rows]))
    joined = pa.concat_arrays([schema.items.ids.strings(), new.strings()])
    return (
        replace(
            schema,
            items=Vocabulary(joined),
            id_rows=np.concatenate([schema.id_rows, np.zeros(len(new), np.int64)]),
            attributes=attributes,
        ),
        new,
    )


def grown_codes(
    table: CodeTable,
    features: CodeFeatures,
    catalogue: ItemIds,
    new: ItemIds,
    ids: SemanticIds | None,
) -> CodeTable:
    """Append the rows of new items to a table of codes.

    Args:
        table: of the trained model.
        features: how its codes are used.
        catalogue: items of the table.
        new: items to append.
        ids: codes of the new items; None leaves them without. For prefixes and n-grams also those
            of the catalogue: a new item takes the row of an item that shares the prefix, and the
            reserved row where none does.

    Raises:
        UsageError: the table belongs to a control, whose codes mean nothing.
    """
    rows = np.zeros((len(new), table.rows.shape[1]), np.int64)
    if ids is None or features.control != "none":
        if ids is not None:
            raise UsageError(
                f"this model is a control ({features.control}): real codes mean nothing to it"
            )
        return replace(table, rows=np.concatenate([table.rows, rows]))
    at = ids.items.index_of(new.strings())
    known = at >= 0
    codes = ids.codes.astype(np.int64)
    levels = list(features.levels or range(features.scale or codes.shape[1]))
    if features.mode == "multi":
        rows[known] = codes[at[known], :1] + 1
    elif features.mode in ("levels", "parallel"):
        rows[known] = codes[at[known]][:, levels] + 1
    else:
        old = ids.items.index_of(catalogue.strings())
        have = old >= 0
        used = codes[:, levels]
        spans = (
            [(0, end) for end in range(1, len(levels) + 1)]
            if features.mode == "prefix"
            else [(s, s + features.n) for s in range(len(levels) - features.n + 1)]
        )
        for slot, (start, end) in enumerate(spans):
            part = used[:, start:end]
            rows[known, slot] = _shared_row(
                part[old[have]], table.rows[1:][have, slot], part[at[known]]
            )
    return replace(
        table,
        rows=np.concatenate([table.rows, rows]),
        without=table.without + int((~known).sum()),
    )


def _shared_row(codes: Ints, rows: Ints, wanted: Ints) -> Ints:
    """Return for each of ``wanted`` (n, codes) the row of an equal one of ``codes``, else 0."""
    unique, inverse = np.unique(np.concatenate([codes, wanted]), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    row_of = np.zeros(len(unique), np.int64)
    row_of[inverse[: len(codes)]] = rows
    return row_of[inverse[len(codes) :]]
