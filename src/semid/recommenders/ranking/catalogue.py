"""What is known of the items: brand, categories and the like, as rows of embedding tables."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.columns import require_column
from semid.data.ids import ItemIds
from semid.data.tables import open_table
from semid.errors import UsageError
from semid.recommenders.ranking.vocabulary import Vocabulary, as_text

__all__ = ["ItemAttribute", "ItemColumns", "read_item_columns"]

logger = logging.getLogger(__name__)

SEPARATORS = (" > ", "|", ";", ", ")
"""What categories in one string are split at: the first that occurs in the column."""

ADVICE = (
    "cut the numbers into bins and give those, or leave it out of --item-columns and "
    "--multi-columns (item_columns=, multi_columns=)"
)
"""Items have no numeric features: what to do about a column of floats."""

_SINGLE, _MULTI = ("brand",), ("categories",)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ItemAttribute:
    """One attribute of the items.

    Attributes:
        vocabulary: its values.
        rows: of each item; ``(items + 1,)`` for one value, ``(items + 1, most values)`` padded
            with 0 for several. Row 0 is the unknown item.
    """

    vocabulary: Vocabulary
    rows: Ints

    @property
    def multi(self) -> bool:
        """Whether an item has several values."""
        return self.rows.ndim == 2


@dataclass(frozen=True)
class ItemColumns:
    """Raw attributes of a catalogue, before it is known which items train.

    Attributes:
        ids: the catalogue.
        values: per attribute and item the values as a list of strings (Arrow
            ``large_list<large_string>``, ``(items,)``).
        multi: names of the attributes with several values.
    """

    ids: ItemIds
    values: dict[str, Any]
    multi: frozenset[str]

    def attributes(self, train: npt.NDArray[np.bool_]) -> dict[str, ItemAttribute]:
        """Build the vocabularies from the training items alone.

        Args:
            train: ``(items,)`` mask of the items that occur in training.
        """
        return {name: self._attribute(name, train) for name in self.values}

    def _attribute(self, name: str, train: npt.NDArray[np.bool_]) -> ItemAttribute:
        seen = self.values[name].filter(pa.array(train)).flatten()
        known = pc.drop_null(pc.unique(seen))
        known = known.filter(pc.not_equal(known, ""))
        vocabulary = Vocabulary(known.cast(pa.large_string()), source=f"values of '{name}'")
        return ItemAttribute(vocabulary, self.rows(name, vocabulary))

    def rows(self, name: str, vocabulary: Vocabulary, width: int | None = None) -> Ints:
        """Look the values up: ``(items + 1,)``, or ``(items + 1, width)`` for several.

        Args:
            name: the attribute.
            vocabulary: where its values are looked up.
            width: most values an item; None takes what the items have, at least 1.
        """
        column = self.values[name]
        found = vocabulary.rows(column.flatten())
        starts = column.offsets.to_numpy()
        counts = np.diff(starts)
        place = np.arange(len(found)) - np.repeat(starts[:-1] - starts[0], counts)
        item = np.repeat(np.arange(len(counts)), counts) + 1
        # Unknown values of a list are left out, so that they do not take part in the mean.
        kept = (found > 0) & (place < (width if width is not None else len(found) + 1))
        if name not in self.multi:
            single = np.zeros(len(counts) + 1, dtype=np.int64)
            first = kept & (place == 0)
            single[item[first]] = found[first]
            return single
        most = width if width is not None else max(1, int(counts.max(initial=1)))
        table = np.zeros((len(counts) + 1, most), dtype=np.int64)
        table[item[kept], place[kept]] = found[kept]
        return table


def read_item_columns(
    source: Any,
    ids: ItemIds,
    *,
    id_column: str | None = None,
    single: Sequence[str] | None = None,
    multi: Sequence[str] | None = None,
) -> ItemColumns:
    """Read attributes and line them up with a catalogue.

    Args:
        source: table of items, as `open_table` takes it; None knows nothing of the items.
        ids: the catalogue, in order.
        id_column: column of the item ids; None takes ``item_id``.
        single: columns with one value an item; None takes ``brand`` if it is there.
        multi: columns with several, as lists or as text split at the first of " > ", "|", ";" and
            ", " that occurs in it; None takes ``categories`` if it is there.

    Raises:
        UsageError: a column does not exist, or is named twice.
        InputError: a column holds something else than categories.
    """
    if source is None:
        if single or multi:
            raise UsageError(
                f"item columns {[*(single or ()), *(multi or ())]} are named, but no table of "
                "items is given: pass --items (items=)"
            )
        return ItemColumns(ids, {}, frozenset())
    table = open_table(source, what="the table of items")
    key = require_column(
        id_column or "item_id", table.names, label=table.label, flag="--id-column (id_column=)"
    )
    ones = [n for n in _SINGLE if n in table.names] if single is None else list(single)
    many = [n for n in _MULTI if n in table.names] if multi is None else list(multi)
    if set(ones) & set(many):
        raise UsageError(f"item columns {sorted(set(ones) & set(many))} are named twice")
    for name in [*ones, *many]:
        flag = (
            "--item-columns (item_columns=)" if name in ones else "--multi-columns (multi_columns=)"
        )
        require_column(name, table.names, label=table.label, flag=flag)
    read = table.read([key, *ones, *many])
    own = ItemIds(read.column(key), source=f"id column '{key}' of {table.label}")
    rows = own.index_of(ids.strings())
    missing = int((rows < 0).sum())
    if missing:
        logger.warning(
            "%s has no row for %d of %d items; their attributes count as unknown",
            table.label,
            missing,
            len(ids),
        )
    take = pa.array(rows, mask=rows < 0)
    values = {}
    for name in [*ones, *many]:
        lists = _lists(read.column(name), name=name, label=table.label, split=name in many)
        values[name] = _no_null(lists.take(take))
    return ItemColumns(ids, values, frozenset(many))


def _lists(column: Any, *, name: str, label: str, split: bool) -> Any:
    """Return a column as lists of strings."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        column = column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        as_text(column.flatten().slice(0, 0), name=name, label=label, advice=ADVICE)
        return column.cast(pa.large_list(pa.large_string()))
    text = as_text(column, name=name, label=label, advice=ADVICE).fill_null("")
    if split:
        for separator in SEPARATORS:
            if pc.any(pc.match_substring(text, separator)).as_py():
                return pc.split_pattern(text, separator).cast(pa.large_list(pa.large_string()))
    offsets = pa.array(np.arange(len(text) + 1), type=pa.int64())
    return pa.LargeListArray.from_arrays(offsets, text)


def _no_null(lists: Any) -> Any:
    """Put an empty list for a null, so that values and offsets stay in step."""
    return pc.if_else(lists.is_valid(), lists, pa.scalar([], type=lists.type))
