"""Interaction logs: who took which item, and when or in which order if that is known."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.columns import id_type_problem, is_list, normalize_ids, whole_text
from semid.data.ids import ItemIds, hash_strings, mix_hashes, share_mask
from semid.data.sequences import Sequences, offsets_of
from semid.data.tables import Table, open_table
from semid.errors import InteractionsError, UsageError, brief, check_choice

# The parts of `split_users`: 80, 10 and 10 % of the users.
TRAIN, SELECT, TEST = 0, 1, 2

TIES = ("shuffle", "file")
"""What decides between interactions of one user at the same time, see `read_interactions`."""

LIST_POSITION = "place in the list"
"""`Interactions.order_column` of a log whose rows hold a user's items as a list."""

# Where the time comes from by default: what the file's order has entered is no time.
_ORDER_COLUMNS = {"shuffle": ("timestamp", "position"), "file": ("position", "timestamp")}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Interactions:
    """Interactions in columns, in the order of their file.

    Attributes:
        users: (interactions,) int32 codes into ``user_ids``.
        items: (interactions,) int32 codes into ``item_ids``.
        user_ids: (users,) Arrow large_string array, in order of first appearance.
        item_ids: (items,) Arrow large_string array of the items that occur; not the catalogue.
        order: (interactions,) numbers that rise with time within a user, or None.
        order_column: the column that ``order`` comes from, or None.
        rating: (interactions,) float64, NaN where there is none; or None without such a column.
        columns: further columns that were asked for, by name, as Arrow arrays.
        label: the log in the user's words.
        ties: ``shuffle`` or ``file``: the order of a user's interactions at the same time.
        ties_seed: seed of the shuffle.
    """

    users: np.ndarray
    items: np.ndarray
    user_ids: Any
    item_ids: Any
    order: np.ndarray | None = None
    order_column: str | None = None
    rating: np.ndarray | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    label: str = "the interaction log"
    ties: str = "shuffle"
    ties_seed: int = 0

    def __len__(self) -> int:
        return len(self.users)

    def __repr__(self) -> str:
        order = f"ordered by {self.order_column}" if self.has_order else "without an order"
        users, items = len(self.user_ids), len(self.item_ids)
        return f"Interactions({len(self):,} of {users:,} users with {items:,} items, {order})"

    @property
    def has_order(self) -> bool:
        """Whether it is known which interaction of a user came first."""
        return self.order is not None

    @property
    def order_text(self) -> str:
        """What orders a user's interactions, for the protocol line of a result."""
        if self.order is None:
            return "file order"
        shuffled = f"shuffled with seed {self.ties_seed}"
        return (
            f"{self.order_column}, ties {shuffled if self.ties == 'shuffle' else 'in file order'}"
        )

    def where(self, rows: np.ndarray) -> Interactions:
        """Return the interactions at which the mask ``rows`` (interactions,) is true.

        Users and items keep their numbers, those without an interaction left among them.
        """
        return replace(
            self,
            users=self.users[rows],
            items=self.items[rows],
            order=None if self.order is None else self.order[rows],
            rating=None if self.rating is None else self.rating[rows],
            columns={name: column.filter(pa.array(rows)) for name, column in self.columns.items()},
        )

    def sequences(self, ids: ItemIds, *, require_order: bool = True) -> Sequences:
        """Collect each user's items, oldest first.

        Returns sequences of all users, in order of first appearance.
        """
        if require_order and self.order is None:
            raise InteractionsError(
                f"{self.label} has no order: there is no column 'position' or 'timestamp'; name "
                "the one that has the time with --time-column (time_column=)"
            )
        items = self.catalogue_rows(ids)[self.items][self.by_user()]
        counts = np.bincount(self.users, minlength=len(self.user_ids))
        return Sequences(self.user_ids, offsets_of(counts), items, self.has_order)

    def catalogue_rows(self, ids: ItemIds) -> np.ndarray:
        """Return the catalogue row (items,) int32 of each of ``item_ids``, -1 for unknown ones."""
        rows = ids.index_of(self.item_ids)
        missing = int((rows < 0).sum())
        if missing == len(rows):
            raise InteractionsError(
                f"none of the {len(rows)} items of {self.label} is in the catalogue of {len(ids)}: "
                f"they are called like '{self.item_ids[0]}', the catalogue's like {ids.example}; "
                "check --id-column and --ids (id_column=, ids=)"
                f"{ids.whitespace_hint(self.item_ids)}"
            )
        if missing:
            hint = ids.whitespace_hint(self.item_ids.filter(pa.array(rows < 0)))
            percent = 100 * (rows < 0)[self.items].mean()
            _log.warning(
                "%s: %d of %d items are not in the catalogue; the %.2f %% of interactions with "
                "them count as gaps%s",
                *(self.label, missing, len(rows), percent, hint),
            )
        return rows.astype(np.int32)

    def by_user(self) -> np.ndarray:
        """Return the rows (interactions,) user by user, oldest first; ties as ``ties`` says."""
        rows = np.arange(len(self))
        if self.order is not None:
            if self.ties == "shuffle":
                rows = np.argsort(self._tie_keys(), kind="stable")
            rows = rows[np.argsort(self.order[rows], kind="stable")]
        # The sorts are stable, so each keeps the order of the one before within equal values.
        ordered: np.ndarray = rows[np.argsort(self.users[rows], kind="stable")]
        return ordered

    def _tie_keys(self) -> np.ndarray:
        """Return a hash (interactions,) of the seed, the user and the item.

        So the order within a tie depends neither on the file's order nor on the other rows.
        """
        salt = f"ties {self.ties_seed}"
        users = hash_strings(self.user_ids, salt=salt)[self.users]
        return mix_hashes(users, hash_strings(self.item_ids, salt=salt)[self.items])


def read_interactions(
    source: Any,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str | None = None,
    rating_column: str | None = None,
    extra_columns: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
    ties: str = "shuffle",
    ties_seed: int = 0,
) -> Interactions:
    """Read interactions into memory, ids dictionary-coded.

    A row is one interaction; or one user, with a list of items, oldest first, or of items and
    times.

    Args:
        source: a path to Parquet (file, folder or glob), CSV (``.csv``, ``.tsv``, compressed or
            not), RecBole's ``.inter`` (types in the header) or a JSON object of lists of items by
            user (LC-Rec, LETTER: ``.inter.json``); an Arrow table, pandas or polars frame; or
            `Interactions`, returned as they are.
        user_column: the users, text or integers.
        item_column: the items, by the catalogue's ids.
        time_column: numbers, dates or timestamps that rise with time. None takes ``timestamp``,
            else ``position`` (0 is the oldest), else the place in the list, else there is no
            order. With ``ties="file"`` position goes before timestamp.
        rating_column: numbers; None takes ``rating`` if there is one, an empty name reads none.
        extra_columns: further columns to keep, for example context features.
        flags: column -> what errors tell the user to name it with, for callers that take columns
            under other names.
        ties: the order of interactions of one user at the same time: ``shuffle`` draws it by a
            hash of ``ties_seed``, user and item; ``file`` takes that of the file, or of
            ``position``. Where times are days, file order can leak: the Amazon 2014 files are
            sorted by item id within a day, and neighboring ids are often variants of one product.
        ties_seed: seed of the shuffle.

    Returns:
        The interactions: 8 bytes each for user and item, 8 for the order, 8 for the rating.

    Raises:
        UsageError: no such file or column.
        InteractionsError: no rows, null users or items, or a column of a wrong type. Every
            problem is listed.
    """
    if isinstance(source, Interactions):
        return source
    check_choice("--ties (ties=)", ties, TIES)
    opened = _open_log(source, user_column, item_column)
    names, label = opened.names, opened.label
    order_column = time_column or next((c for c in _ORDER_COLUMNS[ties] if c in names), None)
    if rating_column is None and "rating" in names:
        rating_column = "rating"
    named = {
        "--user-column (user_column=)": user_column,
        "--item-column (item_column=)": item_column,
        "--time-column (time_column=)": order_column,
        "rating_column=": rating_column or None,
    }
    columns = [(flag, name) for flag, name in named.items() if name is not None]
    columns += [("extra_columns=", column) for column in extra_columns]
    for flag, column in columns:
        opened.require(column, flag=(flags or {}).get(column, flag))
    table = opened.read(
        list(dict.fromkeys(column for _, column in columns)),
        text=[user_column, item_column],
        numbers=[rating_column] if rating_column else [],
        coded=True,
    )
    if is_list(table.schema.field(item_column).type):
        table = _one_row_per_item(table, item_column, label)
        if order_column is None:
            order_column = LIST_POSITION
    if len(table) == 0:
        raise InteractionsError(f"{label} holds no rows; give at least one interaction")

    problems: list[str] = []
    users, user_ids = _codes(table, user_column, label, problems)
    items, item_ids = _codes(table, item_column, label, problems)
    order = rating = None
    if order_column is not None:
        order = _numbers(table, order_column, label, problems, nulls=False)
    if rating_column:
        rating = _numbers(table, rating_column, label, problems, nulls=True)
    if problems:
        raise InteractionsError(problems)
    extra = {name: table.column(name).combine_chunks() for name in extra_columns}
    return Interactions(
        *(users, items, user_ids, item_ids, order, order_column, rating, extra, label),
        ties=ties,
        ties_seed=ties_seed,
    )


def check_columns(
    source: str | Path, *, user_column: str, item_column: str, time_column: str | None = None
) -> None:
    """Refuse interactions that lack a column, from their schema alone.

    Raises:
        UsageError: no such file or column.
        InteractionsError: a file that is not a table.
    """
    opened = _open_log(source, user_column, item_column)
    names = {"user": user_column, "item": item_column, "time": time_column}
    for kind, column in names.items():
        if column is not None:
            opened.require(column, flag=f"--{kind}-column ({kind}_column=)")


def _open_log(source: Any, user_column: str, item_column: str) -> Table:
    """Open a table of interactions, or LC-Rec's JSON as a table of users and lists."""
    if not (isinstance(source, str | Path) and str(source).lower().endswith(".json")):
        return open_table(source, what="interactions", error=InteractionsError)
    try:
        lists = json.loads(Path(source).read_text(encoding="utf8"))
    except FileNotFoundError:
        raise UsageError(f"'{source}' does not exist; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InteractionsError(f"'{source}' cannot be read as JSON ({brief(error)})") from error
    if not isinstance(lists, dict) or not all(isinstance(each, list) for each in lists.values()):
        raise InteractionsError(
            f"'{source}' is not an object of lists of items by user, such as "
            '{"u1": [3, 17]}; give that, or a table with a row per interaction'
        )
    items = [
        [each if isinstance(each, str) else str(each) for each in row if _is_id(each)]
        for row in lists.values()
    ]
    if sum(map(len, items)) != sum(map(len, lists.values())):
        raise InteractionsError(f"'{source}' holds items that are neither text nor whole numbers")
    columns = {
        user_column: pa.array(list(lists), pa.large_string()),
        item_column: pa.array(items, pa.large_list(pa.large_string())),
    }
    table = open_table(pa.table(columns), error=InteractionsError)
    return replace(table, label=f"'{source}'")


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _one_row_per_item(table: pa.Table, item_column: str, label: str) -> pa.Table:
    """Return a table of lists with one row per item; other columns are repeated for each."""
    table = table.combine_chunks()
    lists = table.column(item_column)
    if lists.null_count:
        raise InteractionsError(
            f"column '{item_column}' of {label} holds {lists.null_count} nulls; drop those rows"
        )
    counts = pc.list_value_length(lists).to_numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(lists)), counts)
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if not is_list(column.type):
            columns[name] = column.take(pa.array(rows))
            continue
        if column.null_count or (pc.list_value_length(column).to_numpy() != counts).any():
            raise InteractionsError(
                f"the lists in column '{name}' of {label} are not as long as those of "
                f"'{item_column}'; give one value per item"
            )
        columns[name] = pc.list_flatten(column)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return pa.table({**columns, LIST_POSITION: np.arange(len(rows)) - starts})


def split_users(users: Any, *, salt: str = "users") -> np.ndarray:
    """Split users (users,), repeats allowed, 80/10/10 by a hash of their id alone.

    Returns an int8 array of `TRAIN` (0), `SELECT` (1) or `TEST` (2). New users leave the split of
    the others unchanged; another salt gives an independent split.
    """
    # Ids as text: the user 7 belongs to the same part as the user "7".
    array = users if isinstance(users, pa.Array | pa.ChunkedArray) else pa.array(whole_text(users))
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    hashes = hash_strings(array.cast(pa.large_string()), salt=salt)
    # Shares of the range of hashes do not depend on which users there are.
    part = np.full(len(hashes), TRAIN, dtype=np.int8)
    part[share_mask(hashes, 0.8, 0.9)] = SELECT
    part[share_mask(hashes, 0.9, 1.0)] = TEST
    return part


def _codes(table: pa.Table, name: str, label: str, problems: list[str]) -> tuple[np.ndarray, Any]:
    """Code a column of ids as int32 into the distinct ids, in order of first appearance."""
    column = normalize_ids(table.column(name))
    problem = id_type_problem(column.type)
    if problem is None and column.null_count:
        problem = f"{column.null_count} nulls; drop those rows"
    if problem is not None:
        problems.append(f"column '{name}' of {label} holds {problem}")
        return np.empty(0, np.int32), None
    if pa.types.is_dictionary(column.type):
        # A dictionary from outside may hold values unused, out of order or twice: code afresh,
        # from the codes where that is enough.
        chunks = [chunk for chunk in column.unify_dictionaries().chunks if len(chunk)]
        distinct = chunks[0].dictionary.cast(pa.large_string()).dictionary_encode()
        codes = np.concatenate([chunk.indices.to_numpy() for chunk in chunks])
        coded = pa.array(distinct.indices.to_numpy()[codes]).dictionary_encode()
        names = distinct.dictionary.take(coded.dictionary)
    else:
        coded = column.dictionary_encode().unify_dictionaries().combine_chunks()
        coded = coded if isinstance(coded, pa.Array) else coded.chunk(0)
        names = coded.dictionary.cast(pa.large_string())
    return coded.indices.to_numpy().astype(np.int32, copy=False), names


def _numbers(
    table: pa.Table, name: str, label: str, problems: list[str], *, nulls: bool
) -> np.ndarray | None:
    """Return a column as int64 or float64; times become integers in their own unit."""
    column = table.column(name)
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        column = column.cast(pa.int64())
    elif pa.types.is_date32(kind):
        column = column.cast(pa.int32())
    elif pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    problem = ""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        problem = f"{kind}; give numbers, dates or timestamps (ISO 8601 in CSV)"
    elif nulls:
        return np.asarray(column.cast(pa.float64(), safe=False))  # beyond 2^53 rounded
    elif column.null_count:
        problem = (
            f"{column.null_count} nulls, so the order of those rows is unknown; drop them or fill "
            "in the time"
        )
    else:
        values = np.asarray(column)
        # CSV makes floats of whole numbers beyond int64, and with them their order is lost.
        usable = values.dtype.kind != "f" or np.abs(values) < 2.0**63
        if np.all(usable):
            return values
        problem = (
            f"{int(np.sum(~usable))} times that are NaN, infinite or beyond 64 bits; drop those "
            "rows or give smaller numbers"
        )
    problems.append(f"column '{name}' of {label} holds {problem}")
    return None
