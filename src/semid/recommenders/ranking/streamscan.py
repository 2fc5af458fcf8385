"""The first pass over a log on disk: vocabularies, counts, and the rows that are not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.ids import ItemIds, hash_strings, share_mask
from semid.data.parquet_files import ParquetFiles
from semid.data.tables import open_table
from semid.errors import InteractionsError
from semid.filesystems import open_parquet
from semid.recommenders.ranking.catalogue import read_item_columns
from semid.recommenders.ranking.data import COLD_SALT, RankingDataConfig
from semid.recommenders.ranking.labels import Label
from semid.recommenders.ranking.schema import Schema
from semid.recommenders.ranking.splits import COLD, PARTS
from semid.recommenders.ranking.tables import dense_values
from semid.recommenders.ranking.vocabulary import Vocabulary, as_text

__all__ = ["Scan", "ScanResult", "scan_log"]

MERGE_ROWS = 1 << 20
TRAIN = 0


@dataclass(frozen=True)
class Scan:
    """How the rows of a log on disk are read.

    Attributes:
        files: the log.
        columns: those that are read.
        user: the user column.
        item: the item column.
        label: how rows are labelled.
        config: how the log becomes training rows.
    """

    files: ParquetFiles
    columns: tuple[str, ...]
    user: str
    item: str
    label: Label
    config: RankingDataConfig

    def tables(self) -> Iterator[pa.Table]:
        """Yield the log in pieces, in order."""
        for path in self.files.paths:
            with open_parquet(path, memory_map=True) as parquet:
                for batch in parquet.iter_batches(columns=list(self.columns), use_threads=False):
                    yield pa.Table.from_batches([batch])

    def labels(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Return the labels ``(rows,)``."""
        values = dense_values(
            table.column(self.label.column), name=self.label.column, label=self.files.label
        )
        limit = np.float32(self.label.threshold)
        return values > limit if self.label.strict else values >= limit

    def parts(self, table: pa.Table) -> npt.NDArray[np.int8]:
        """Return the part ``(rows,)`` of every row, from hashes of its user and item alone."""
        config = self.config
        users = as_text(table.column(self.user), name=self.user, label=self.files.label)
        items = as_text(table.column(self.item), name=self.item, label=self.files.label)
        if users.null_count or items.null_count:
            raise InteractionsError(
                f"columns '{self.user}' and '{self.item}' of {self.files.label} hold "
                f"{users.null_count + items.null_count} nulls; drop those rows"
            )
        pair = hash_strings(users, salt=f"split {config.seed}")
        pair = (pair ^ (pair >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        pair ^= hash_strings(items, salt=f"split {config.seed}")
        pair = (pair ^ (pair >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
        train, validation, _ = config.fractions
        part = np.full(len(table), 2, dtype=np.int8)
        part[share_mask(pair, 0.0, train)] = TRAIN
        part[share_mask(pair, train, min(train + validation, 1.0))] = 1
        if config.cold_items:
            cold = share_mask(hash_strings(items, salt=COLD_SALT), 0.0, config.cold_items)
            part[cold] = COLD
        return part


@dataclass
class _Counter:
    """Counts of strings, merged now and then so that memory follows the distinct ones."""

    pieces: list[pa.Table] = field(default_factory=list)
    waiting: int = 0

    def add(self, values: pa.Array) -> None:
        """Count the values."""
        counted = pc.value_counts(values.drop_null())
        self.pieces.append(
            pa.table({"value": counted.field("values"), "n": counted.field("counts")})
        )
        self.waiting += len(counted)
        if self.waiting > MERGE_ROWS:
            self._merge()

    def _merge(self) -> pa.Table:
        table = pa.concat_tables(self.pieces) if self.pieces else _EMPTY
        merged = table.group_by("value", use_threads=False).aggregate([("n", "sum")])
        merged = merged.select(["value", "n_sum"]).rename_columns(["value", "n"])
        self.pieces, self.waiting = [merged], 0
        return merged

    def result(self, least: int = 1) -> tuple[pa.Array, npt.NDArray[np.int64]]:
        """Return the values counted at least so often, and their counts, in order of value."""
        merged = self._merge()
        merged = merged.filter(pc.greater_equal(merged["n"], least)).sort_by("value")
        return (
            merged["value"].combine_chunks().cast(pa.large_string()),
            merged["n"].to_numpy().astype(np.int64),
        )


_EMPTY = pa.table({"value": pa.array([], pa.large_string()), "n": pa.array([], pa.int64())})


@dataclass(frozen=True)
class ScanResult:
    """What the first pass found; see `RankingStream`, whose fields these are.

    Attributes:
        schema: vocabularies of the training rows.
        held: rows of the other parts, as tables, by number of the part.
        interactions: ``(items + 1,)`` training rows of each catalogue row.
        positives: ``(items + 1,)`` positive ones among them.
        protocol: label, split, seed and features in one line.
        train_rows: training rows.
        log_digest: SHA-256 of the columns that were read, for a resume.
    """

    schema: Schema
    held: dict[int, pa.Table]
    interactions: npt.NDArray[np.int64]
    positives: npt.NDArray[np.int64]
    protocol: str
    train_rows: int
    log_digest: str


def scan_log(scan: Scan, items: Any, id_column: str | None) -> ScanResult:
    """Read the log once.

    Memory: the distinct users and items, and the rows of validation and test.
    """
    config = scan.config
    users, train_items, positive_items, all_items = (_Counter() for _ in range(4))
    context = {name: _Counter() for name in config.categorical}
    moments = {name: np.zeros(3) for name in config.dense}
    held: dict[int, list[pa.Table]] = {}
    train_rows = positives = 0
    digest = hashlib.sha256()
    for table in scan.tables():
        _add_to_digest(digest, table, scan)
        part, labels = scan.parts(table), scan.labels(table)
        for number in np.unique(part[part != TRAIN]).tolist():
            rows = pa.array(np.flatnonzero(part == number))
            held.setdefault(number, []).append(table.take(rows))
        own = table.take(pa.array(np.flatnonzero(part == TRAIN)))
        positive = labels[part == TRAIN]
        train_rows, positives = train_rows + len(own), positives + int(positive.sum())
        all_items.add(_text(table, scan.item, scan))
        users.add(_text(own, scan.user, scan))
        seen = _text(own, scan.item, scan)
        train_items.add(seen)
        positive_items.add(seen.filter(pa.array(positive)))
        for name, counter in context.items():
            counter.add(_text(own, name, scan))
        for name, sums in moments.items():
            wide = dense_values(own.column(name), name=name, label=scan.files.label).astype(float)
            sums += [len(wide), wide.sum(), (wide**2).sum()]
    _check_parts(scan, held, train_rows, positives)
    catalogue = _catalogue(all_items.result()[0], items, id_column)
    counted = _counts(train_items, catalogue, config.min_count)
    id_rows = np.zeros(len(catalogue) + 1, np.int64)
    id_rows[1:][counted >= config.min_count] = 1 + np.arange(
        int((counted >= config.min_count).sum())
    )
    columns = read_item_columns(
        items,
        catalogue,
        id_column=id_column,
        single=config.item_columns,
        multi=config.multi_columns,
    )
    schema = Schema(
        users=Vocabulary(users.result(config.min_count)[0]),
        items=Vocabulary(catalogue),
        id_rows=id_rows,
        id_size=int(id_rows.max()) + 1,
        attributes=columns.attributes(counted > 0),
        context={name: Vocabulary(counter.result()[0]) for name, counter in context.items()},
        dense={name: _mean_and_spread(sums) for name, sums in moments.items()},
        user_column=scan.user,
        item_column=scan.item,
    )
    return ScanResult(
        schema,
        {number: pa.concat_tables(tables) for number, tables in held.items()},
        np.concatenate([[0], counted]),
        np.concatenate([[0], _counts(positive_items, catalogue, 1)]),
        _protocol(scan, schema),
        train_rows,
        digest.hexdigest(),
    )


def _add_to_digest(digest: Any, table: pa.Table, scan: Scan) -> None:
    """Hash the values that training reads."""
    for name in scan.columns:
        column = table.column(name)
        if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
            digest.update(column.cast(pa.float64()).to_numpy().tobytes())
        else:
            digest.update(hash_strings(_text(table, name, scan).fill_null("")).tobytes())


def _text(table: pa.Table, name: str, scan: Scan) -> pa.Array:
    return as_text(table.column(name), name=name, label=scan.files.label)


def _check_parts(
    scan: Scan, held: dict[int, list[pa.Table]], train_rows: int, positives: int
) -> None:
    empty = [PARTS[n] for n in (1, 2) if n not in held] + (["train"] if not train_rows else [])
    if empty:
        raise InteractionsError(
            f"the split of {scan.files.label} leaves no row for {', '.join(empty)}; give more "
            "interactions or other fractions"
        )
    if positives in (0, train_rows):
        raise InteractionsError(
            f"every training row has one label under --label '{scan.label}'; choose another "
            "threshold"
        )


def _catalogue(seen: pa.Array, items: Any, id_column: str | None) -> ItemIds:
    if items is None:
        return ItemIds(seen)
    table = open_table(items, what="the table of items")
    key = id_column or "item_id"
    if key not in table.names:
        return ItemIds(seen)  # reading the columns says what is wrong
    known = ItemIds(table.read([key]).column(key), source=f"id column '{key}' of {table.label}")
    extra = pa.array(np.flatnonzero(known.index_of(seen) < 0))
    if len(extra) == len(seen):
        raise InteractionsError(
            f"none of the {len(seen)} items of the log is in {table.label}; check --id-column"
        )
    return ItemIds(pa.concat_arrays([known.strings(), seen.take(extra)]))


def _counts(counter: _Counter, catalogue: ItemIds, least: int) -> npt.NDArray[np.int64]:
    values, counts = counter.result(least)
    found = np.zeros(len(catalogue), np.int64)
    if len(values):
        found[catalogue.index_of(values)] = counts
    return found


def _mean_and_spread(sums: npt.NDArray[np.float64]) -> tuple[float, float]:
    mean = float(sums[1] / sums[0])
    spread = float(np.sqrt(max(sums[2] / sums[0] - mean * mean, 0.0)))
    return mean, spread if spread > 0 else 1.0


def _protocol(scan: Scan, schema: Schema) -> str:
    config = scan.config
    shares = "/".join(f"{share:g}" for share in config.fractions)
    fields = ["user", "item", *schema.attributes, *schema.context, *schema.dense]
    parts = [
        f"label={scan.label}",
        f"split=random({shares}) by hash",
        f"data_seed={config.seed}",
        f"fields={'+'.join(fields)}",
    ]
    if config.cold_items:
        parts.append(f"cold_items={config.cold_items:g}")
    if config.min_count > 1:
        parts.append(f"min_count={config.min_count}")
    return " ".join(parts)
