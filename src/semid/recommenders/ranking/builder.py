"""Ranking data, and its builder: one pass over batches of a log gives everything in it.

A log in memory is one batch per part, and its training rows are kept. A log on disk gives many
batches, and its training rows are read again every epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.ids import ItemIds, hash_strings
from semid.data.interactions import Interactions
from semid.errors import InteractionsError
from semid.lazy import torch
from semid.options import Options, option
from semid.recommenders.ranking.item_table import read_item_columns
from semid.recommenders.ranking.schema import (
    BatchSource,
    HistoryIndex,
    MemoryBatches,
    RankingRows,
    Schema,
    Vocabulary,
    as_categories,
    dense_values,
    one_array,
)
from semid.recommenders.ranking.splits import COLD, PARTS, SPLITS, TRAIN, Label, check_fractions

MAX_HISTORY = 10_000
"""Largest history: every row of a batch holds as many items; published models see 20 to 1,000."""

MERGE_ROWS = 1 << 20
"""Distinct values that wait until counts are merged."""

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class RankingDataConfig(Options):
    """How a log becomes ranking data; see `split_rows` for the splits.

    A label is ``COLUMN>=NUMBER``, ``COLUMN>NUMBER``, or ``sampled(uniform,k)`` or
    ``sampled(popularity,k)`` with k negatives per positive. Interactions of items that are held out
    of training, by a hash of their id, form the part ``cold``.
    """

    label: str = option(
        "sampled(uniform,1)",
        help="Click label: a threshold such as 'rating>=4', or sampled negatives such as "
        "'sampled(uniform,1)'.",
    )
    split: str = option(
        "random",
        choices=SPLITS,
        name="--split",
        help="Split into training, validation and test.",
    )
    fractions: tuple[float, float, float] = option(
        (0.8, 0.1, 0.1), help="Shares of training, validation and test."
    )
    cold_items: float = option(
        0.0, ge=0, lt=1, help="Share of items that are held out of training."
    )
    min_count: int = option(
        1, ge=1, help="Training rows below which a user or item counts as unknown."
    )
    history: int = option(0, ge=0, le=MAX_HISTORY, help="Length of the user's history; 0 for none.")
    categorical: tuple[str, ...] = option((), help="Categorical columns of the log.")
    dense: tuple[str, ...] = option((), help="Numeric columns of the log.")
    item_columns: tuple[str, ...] | None = option(
        None, help="Item attributes with one value; brand by default."
    )
    multi_columns: tuple[str, ...] | None = option(
        None, help="Item attributes with several values; categories by default."
    )
    seed: int = option(0, help="Seed of the split and of sampled negatives.")

    def _problems(self) -> list[str]:
        check_fractions(self.fractions)
        Label.parse(self.label)
        both = set(self.categorical) & set(self.dense)
        return [f"columns {sorted(both)} are both categorical and dense"] if both else []

    @property
    def parsed_label(self) -> Label:
        """The label, parsed."""
        return Label.parse(self.label)

    @property
    def column_flags(self) -> dict[str, str]:
        """The flag that names each column beside user and item, for errors."""
        return {
            **dict.fromkeys(self.categorical, "--categorical (categorical=)"),
            **dict.fromkeys(self.dense, "--dense (dense=)"),
            self.parsed_label.column: "--label (label=)",
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class RankingData:
    """Training tensors and everything needed to read more rows the same way."""

    schema: Schema  # vocabularies and item attributes
    # rows per part: ``train`` (if training rows are in memory), ``validation``, ``test``, and
    # ``cold`` if items were held out
    parts: dict[str, RankingRows]
    interactions: Ints  # ``(items + 1,)`` logged training interactions of each catalogue row
    positives: Ints  # ``(items + 1,)`` positive ones among them, the measure of popularity
    protocol: str  # label, split, seed and features in one line, to stand beside every result
    train_rows: int  # training rows per epoch
    # negatives without an item, because their user took nearly all of them
    dropped_negatives: int = 0
    # positive training interactions, for tokenizers that learn from behavior
    training_log: Interactions | None = None

    log_digest: str = ""  # SHA-256 of a log on disk, so that a resume on another log is refused

    def __repr__(self) -> str:
        """Give the size and the protocol."""
        return f"RankingData({self.train_rows:,} training rows; {self.protocol})"

    def batches(self, batch_size: int, *, seed: int, device: torch.device) -> BatchSource:
        """Return training batches for the loop."""
        return MemoryBatches(self.parts["train"].to(device), batch_size=batch_size, seed=seed)


@dataclass(frozen=True)
class LogBatch:
    """Rows of a log with their parts and labels."""

    users: pa.Array  # ``(rows,)`` Arrow strings, dictionary-coded if the log is in memory
    items: pa.Array  # ``(rows,)`` likewise
    columns: dict[str, Any]  # context and dense columns by name, each ``(rows,)``
    parts: npt.NDArray[np.int8]  # ``(rows,)`` int8 indices into `PARTS`
    labels: Mask  # ``(rows,)`` bool
    history: HistoryIndex | None = None  # histories of the rows, or None

    def of_part(self, number: int) -> LogBatch:
        """Return the rows of one part."""
        mask = self.parts == number
        if mask.all():  # a log in memory comes part by part
            return self
        arrow = pa.array(mask)
        columns = {name: column.filter(arrow) for name, column in self.columns.items()}
        users, items = self.users.filter(arrow), self.items.filter(arrow)
        return LogBatch(users, items, columns, self.parts[mask], self.labels[mask])


@dataclass
class ValueCounts:
    """Counts of strings, merged now and then so that memory follows the distinct ones."""

    pieces: list[pa.Table] = field(default_factory=list)
    waiting: int = 0

    def add(self, values: pa.Array) -> None:
        """Count the values; nulls are left out."""
        counted = pc.value_counts(values.drop_null())
        distinct = counted.field("values")
        if pa.types.is_dictionary(distinct.type):
            distinct = distinct.dictionary_decode()
        columns = {"value": distinct.cast(pa.large_string()), "n": counted.field("counts")}
        self.pieces.append(pa.table(columns))
        # Merging costs the distinct values so far, so it waits until as many new ones have come.
        self.waiting += len(counted)
        if self.waiting > MERGE_ROWS:
            self._merge()

    def _merge(self) -> pa.Table:
        # A single piece is the result of `value_counts`: its values are distinct already.
        if len(self.pieces) != 1:
            table = pa.concat_tables(self.pieces or [_NO_COUNTS])
            merged = table.group_by("value", use_threads=False).aggregate([("n", "sum")])
            merged = merged.select(["value", "n_sum"]).rename_columns(["value", "n"])
            self.pieces, self.waiting = [merged.combine_chunks()], 0
        return self.pieces[0]

    def values(self, *, in_order: bool) -> pa.Array:
        """Return the distinct values, sorted or in the order of their first appearance."""
        merged = self._merge()
        return one_array((merged.sort_by("value") if in_order else merged)["value"])

    def of(self, values: pa.Array) -> Ints:
        """Return how often each of ``values`` (n,) was counted."""
        # Counted values that are not asked for are left out.
        merged = self._merge()
        counts = np.zeros(len(values), np.int64)
        rows = pc.fill_null(pc.index_in(merged["value"], value_set=values), -1).to_numpy()
        counts[rows[rows >= 0]] = merged["n"].to_numpy()[rows >= 0]
        return counts


_NO_COUNTS = pa.table({"value": pa.nulls(0, pa.large_string()), "n": pa.nulls(0, pa.int64())})


@dataclass
class _Moments:
    """Mean and sum of squared deviations of a column that arrives in batches."""

    rows: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Merge the moments of ``values`` (rows,) into these (Chan et al., 1979)."""
        if not len(values):
            return
        # The deviations of the two means from the joint mean add to the squares of both sides.
        mean = float(values.mean(dtype=np.float64))
        rows = self.rows + len(values)
        difference = mean - self.mean
        self.squares += float(np.square(values - np.float64(mean)).sum())
        self.squares += difference**2 * self.rows * len(values) / rows
        self.mean = mean if not self.rows else self.mean + difference * len(values) / rows
        self.rows = rows

    @property
    def mean_and_spread(self) -> tuple[float, float]:
        """Mean and standard deviation, the latter 1 for a constant column."""
        return self.mean, math.sqrt(self.squares / self.rows) or 1.0


class DataBuilder:
    """Collects from the batches of a log everything that ranking data holds."""

    def __init__(
        self, config: RankingDataConfig, user: str, item: str, *, label: str, in_memory: bool
    ) -> None:
        # Names of the columns, and of the log in errors. In memory, training rows are kept, and
        # vocabularies follow the order of first appearance instead of that of the values.
        self.config, self.user, self.item = config, user, item
        self.label, self.in_memory = label, in_memory
        self.users, self.items, self.positive_items = (ValueCounts() for _ in range(3))
        self.context = {name: ValueCounts() for name in config.categorical}
        self.moments = {name: _Moments() for name in config.dense}
        self.batches: dict[int, list[LogBatch]] = {}
        self.rows = np.zeros(len(PARTS), np.int64)
        self.positives = np.zeros(len(PARTS), np.int64)

    def add(self, batch: LogBatch) -> None:
        """Count the training rows of a batch and hold the others."""
        # Rows and positives per part show later whether each part has rows of both labels.
        self.rows += np.bincount(batch.parts, minlength=len(PARTS))
        self.positives += np.bincount(batch.parts[batch.labels], minlength=len(PARTS))
        for number in np.unique(batch.parts).tolist():
            rows = batch.of_part(number)
            if number == TRAIN:  # validation and test teach nothing, not even a vocabulary
                self._count(rows)
            if number != TRAIN or self.in_memory:
                self.batches.setdefault(number, []).append(rows)

    def _count(self, rows: LogBatch) -> None:
        self.users.add(rows.users)
        self.items.add(rows.items)
        self.positive_items.add(rows.items.filter(pa.array(rows.labels)))
        for name, counts in self.context.items():
            counts.add(as_categories(rows.columns[name], name=name, label=self.label))
        for name, moments in self.moments.items():
            moments.add(dense_values(rows.columns[name], name=name, label=self.label))

    def finish(
        self,
        catalogue: ItemIds,
        *,
        items: Any,
        id_column: str | None,
        users: pa.Array | None = None,
        split_note: str = "",
        order: str = "",
    ) -> RankingData:
        """Build the vocabularies from the training rows and look every held row up."""
        # Users and items with enough training rows get rows of their own.
        self._check_parts()
        config = self.config
        users = self.users.values(in_order=True) if users is None else users
        frequent = self.users.of(users) >= config.min_count
        ids = catalogue.strings()
        counts, positives = self.items.of(ids), self.positive_items.of(ids)
        # Items below the threshold share row 0; the others are numbered from 1 on.
        known = np.concatenate([[False], counts >= config.min_count])
        # Attributes' vocabularies come from training items, the rows of all items are looked up.
        named = {"single": config.item_columns, "multi": config.multi_columns}
        columns = read_item_columns(items, catalogue, id_column=id_column, **named)
        in_order = not self.in_memory
        context = {
            name: Vocabulary(counted.values(in_order=in_order), source=f"values of '{name}'")
            for name, counted in self.context.items()
        }
        vocabulary = Vocabulary(users.filter(pa.array(frequent)))
        schema = Schema(
            users=vocabulary,
            items=Vocabulary(catalogue),
            id_rows=np.where(known, np.cumsum(known), 0),
            id_size=int(known.sum()) + 1,
            attributes=columns.attributes(counts > 0),
            context=context,
            dense={name: moments.mean_and_spread for name, moments in self.moments.items()},
            history=config.history,
            user_history=np.zeros((len(vocabulary), config.history), np.int64),
            user_column=self.user,
            item_column=self.item,
        )
        # Sampled negatives are no interactions: then the positives are all there is in the log.
        interactions = positives if config.parsed_label.sampled else counts
        return RankingData(
            schema=schema,
            parts={
                PARTS[number]: self._encoded(batches, schema)
                for number, batches in sorted(self.batches.items())
            },
            interactions=np.concatenate([[0], interactions]),
            positives=np.concatenate([[0], positives]),
            protocol=self._protocol(schema, split_note, order),
            train_rows=int(self.rows[TRAIN]),
        )

    def _check_parts(self) -> None:
        empty = [name for n, name in enumerate(PARTS) if not self.rows[n] and n != COLD]
        if empty:
            raise InteractionsError(
                f"the split of {self.label} leaves no row for {', '.join(empty)}; give more "
                "interactions or other fractions"
            )
        for number, name in enumerate(PARTS):
            if self.rows[number] and self.positives[number] in (0, self.rows[number]):
                raise InteractionsError(
                    f"every row of the part {name} has one label under --label "
                    f"'{self.config.label}'; give more interactions or another threshold"
                )

    def _encoded(self, batches: list[LogBatch], schema: Schema) -> RankingRows:
        encoded = [encode(batch, schema, label=self.label) for batch in batches]
        columns = {name: np.concatenate([each[name] for each in encoded]) for name in encoded[0]}
        # Metrics per user need numbers of users, also of those without an embedding.
        users = batches[0].users
        if pa.types.is_dictionary(users.type):
            person = users.indices.to_numpy()
        else:  # strings: equal hashes are one user
            hashes = np.concatenate([hash_strings(batch.users) for batch in batches])
            person = np.unique(hashes, return_inverse=True)[1]
        return RankingRows.of(columns, person=person, history=batches[0].history)

    def _protocol(self, schema: Schema, split_note: str, order: str) -> str:
        config = self.config
        shares = "/".join(f"{share:g}" for share in config.fractions)
        split = config.split if config.split == "leave-last-out" else f"{config.split}({shares})"
        fields = ["user", "item", *schema.attributes, *schema.context, *schema.dense]
        words = [
            f"label={config.parsed_label}",
            f"split={split}{split_note}",
            f"data_seed={config.seed}",
            f"fields={'+'.join(fields)}",
            f"cold_items={config.cold_items:g}" if config.cold_items else "",
            f"min_count={config.min_count}" if config.min_count > 1 else "",
            f"history={config.history}" if config.history else "",
            f"order=({order})" if config.history or config.split == "leave-last-out" else "",
        ]
        return " ".join(filter(None, words))


def encode(batch: LogBatch, schema: Schema, *, label: str) -> dict[str, npt.NDArray[Any]]:
    """Look the rows of a batch up: arrays ``(rows, ...)`` named as in `RankingRows`."""
    context, dense = schema.context_rows(batch.columns, rows=len(batch.parts), label=label)
    return {
        "user": schema.users.rows(batch.users).astype(np.int32),
        "item": schema.items.rows(batch.items).astype(np.int32),
        "label": batch.labels.astype(np.float32),
        "context": context,
        "dense": dense,
    }
