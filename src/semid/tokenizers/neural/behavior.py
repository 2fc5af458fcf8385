"""From what a user gives (`interactions=`, `pairs=`) to pairs of training rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from semid.data.columns import require_column
from semid.data.csv_files import csv_columns, is_csv, read_csv
from semid.data.embeddings import EmbeddingSource, open_embeddings
from semid.data.frames import is_frame, open_frame
from semid.data.ids import ItemIds
from semid.data.interactions import SELECT, TRAIN, read_interactions, split_users
from semid.data.parquet_files import ParquetFiles
from semid.errors import InteractionsError, UsageError
from semid.quantization.topk import prepare_database, top_k
from semid.tokenizers.neural.pairs import Behavior, PairSource, SequencePairs, TablePairs

__all__ = ["Neighbors", "read_behavior"]

Rows = npt.NDArray[np.int64]
QUERIES = 4096


@dataclass(frozen=True)
class Neighbors:
    """Pairs of each item with its nearest neighbors in a second embedding, by cosine.

    Attributes:
        source: embeddings of the same items, anything `semid.open_embeddings` reads.
        k: neighbors an item, at least 1.
        ids: item ids for a source that has none.
    """

    source: Any
    k: int = 5
    ids: Any = None


def read_behavior(
    interactions: Any,
    pairs: Any,
    *,
    ids: ItemIds,
    train: npt.NDArray[np.bool_],
    threads: int | None = None,
) -> Behavior | None:
    """Turn interactions or pairs into pairs of training rows.

    Args:
        interactions: user sequences, anything `semid.read_interactions` reads. Pairs to learn from
            are consecutive items of the training users, 80 % by a hash of their id; a tenth serves
            to choose checkpoints; the last tenth, the test users, is not looked at.
        pairs: a table or path with ``item_id`` and ``related_item_id``; an ``(n, 2)`` array of ids
            or of row numbers; or `Neighbors`.
        ids: the catalogue.
        train: ``(items,)`` which items are trained on; pairs with others are left out.
        threads: plain threads for the search of neighbors.

    Returns:
        Pairs in numbers of training rows, or None if nothing was given.

    Raises:
        UsageError: both were given, or pairs of an unknown form.
        InteractionsError: no order, or no usable pair.
    """
    if interactions is None and pairs is None:
        return None
    if interactions is not None and pairs is not None:
        raise UsageError(
            "both interactions and pairs were given; give one of --interactions and --pairs "
            "(interactions=, pairs=) to learn from"
        )
    rows = np.where(train, np.cumsum(train) - 1, -1)
    if interactions is not None:
        return _from_interactions(interactions, ids, rows)
    first, second, origin = _read_pairs(pairs, ids, threads)
    if not ((first >= 0) & (second >= 0)).any():
        raise InteractionsError(
            f"none of the {len(first)} pairs has both items in the catalogue of {len(ids)}, whose "
            f"ids are like '{ids[0]}'; check --pairs and --ids (pairs=, ids=)"
        )
    found = TablePairs(
        _through(rows, first),
        _through(rows, second),
        int(train.sum()),
        protocol=f"contrastive pairs: {origin}; items held out for validation left out",
    )
    return Behavior(found, None)


def _through(rows: Rows, items: npt.NDArray[np.integer]) -> Rows:
    """Map catalogue rows to training rows; -1 stays -1."""
    mapped: Rows = np.where(items >= 0, rows[items], -1)
    return mapped


def _from_interactions(interactions: Any, ids: ItemIds, rows: Rows) -> Behavior:
    log = read_interactions(interactions)
    sequences = log.sequences(ids)
    part = split_users(log.user_ids)
    items = _through(rows, sequences.items).astype(np.int32)
    count = int(rows.max()) + 1

    def of(users: npt.NDArray[np.bool_], name: str) -> PairSource:
        return SequencePairs(
            items,
            sequences.offsets,
            users,
            count,
            protocol=f"contrastive pairs: consecutive items of {int(users.sum())} {name} users of "
            f"{len(part)} (80/10/10 by a hash of their id, order by '{log.order_column}'); test "
            "users and items held out for validation never seen",
        )

    train = of(part == TRAIN, "training")
    try:
        select = of(part == SELECT, "selection")
    except InteractionsError:  # too few users for pairs to choose by: the error decides alone
        select = None
    return Behavior(train, select)


def _read_pairs(pairs: Any, ids: ItemIds, threads: int | None) -> tuple[Rows, Rows, str]:
    if isinstance(pairs, Neighbors):
        return _neighbors(pairs, ids, threads)
    if isinstance(pairs, str | Path) or is_frame(pairs):
        table, label = _read_table(pairs)
        first, second = (ids.index_of(column.combine_chunks()) for column in table.columns)
        return first, second, f"{len(table)} pairs of {label}"
    array = np.asarray(pairs)
    if array.ndim != 2 or array.shape[1] != 2:
        raise UsageError(
            f"pairs have shape {array.shape}; give (n, 2) item ids or row numbers, a table or path "
            "with 'item_id' and 'related_item_id', or semid.Neighbors"
        )
    label = f"{len(array)} pairs given as an array"
    if array.dtype.kind in "iu":
        outside = (array < 0) | (array >= len(ids))
        if outside.any():
            raise UsageError(
                f"{int(outside.any(axis=1).sum())} pairs hold row numbers outside 0 to "
                f"{len(ids) - 1}; give rows of the embeddings, or ids as strings"
            )
        return array[:, 0].astype(np.int64), array[:, 1].astype(np.int64), label
    strings = [pa.array(array[:, side].astype(str), pa.large_string()) for side in (0, 1)]
    return ids.index_of(strings[0]), ids.index_of(strings[1]), label


def _read_table(source: Any) -> tuple[pa.Table, str]:
    wanted = ["item_id", "related_item_id"]
    flag = "the column's name in the file"
    if is_frame(source):
        frame = open_frame(source)
        for column in wanted:
            require_column(column, list(frame.schema.names), label=frame.label, flag=flag)
        return pa.table({name: frame.column(name) for name in wanted}), frame.label
    path, label = Path(source).expanduser(), f"'{source}'"
    if is_csv(path):
        for column in wanted:
            require_column(
                column, csv_columns(path, error=InteractionsError), label=label, flag=flag
            )
        return read_csv(path, wanted, text=wanted, error=InteractionsError), label
    files = ParquetFiles.open(path, error=InteractionsError)
    for column in wanted:
        require_column(column, list(files.schemas[0].names), label=label, flag=flag)
    return files.read(wanted), label


def _neighbors(given: Neighbors, ids: ItemIds, threads: int | None) -> tuple[Rows, Rows, str]:
    """Pair every item with its ``k`` nearest others; reads the second embedding into memory."""
    second: EmbeddingSource = open_embeddings(given.source, ids=given.ids)
    if given.k < 1:
        raise UsageError(f"Neighbors k={given.k}: give at least 1")
    at = second.ids.index_of(ids.to_arrow())
    known = np.flatnonzero(at >= 0)
    if len(known) <= given.k:
        raise InteractionsError(
            f"only {len(known)} of {len(ids)} items have a second embedding; {given.k} neighbors "
            "need more: give embeddings of the same items (--neighbors, --ids)"
        )
    matrix = torch.from_numpy(second.rows(at[known]))
    base = prepare_database(matrix)
    found = np.empty((len(known), given.k), dtype=np.int64)
    for start in range(0, len(known), QUERIES):
        stop = min(start + QUERIES, len(known))
        best = top_k(
            matrix[start:stop], base, given.k, exclude=torch.arange(start, stop), threads=threads
        )
        found[start:stop] = best.indices.numpy()
    first = np.repeat(known, given.k)
    return first, known[found.reshape(-1)], f"{given.k} nearest neighbors in {second.label}"
