"""Tables of item ids and codes: lists as a matrix, and files of one catalogue as one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.columns import is_list, refuse_repeated
from semid.data.ids import cast_ids
from semid.errors import ArtefactError, SemidError

__all__ = ["code_rows", "join_tables"]


def code_rows(
    table: pa.Table,
    name: str,
    levels: int,
    *,
    where: str,
    error: type[SemidError] = ArtefactError,
) -> npt.NDArray[Any]:
    """Return a column of lists as ``(items, levels)`` integers of its own type.

    Args:
        table: with the column.
        name: of the column.
        levels: codes per item.
        where: the table in messages.
        error: class of the error.

    Raises:
        SemidError: of the class ``error``, if it holds anything else than as many integers for
            every item.
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

    Raises:
        ArtefactError: if a column is missing in some, or holds values of another type.
        UsageError: if two columns have one name.
        IdsError: if item ids cannot be written in the first one's type.
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
