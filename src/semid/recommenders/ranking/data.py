"""Interactions, items and labels as training tensors, split so that nothing leaks."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from semid.data.ids import ItemIds, held_out_mask
from semid.data.interactions import Interactions, read_interactions
from semid.data.tables import open_table
from semid.errors import InteractionsError
from semid.options import Options, option
from semid.recommenders.ranking.catalogue import read_item_columns
from semid.recommenders.ranking.labels import Label, draw_negatives
from semid.recommenders.ranking.rows import HistoryIndex, RankingRows
from semid.recommenders.ranking.schema import Schema
from semid.recommenders.ranking.splits import COLD, PARTS, SPLITS, check_fractions, split_rows
from semid.recommenders.ranking.tables import dense_values
from semid.recommenders.ranking.vocabulary import Vocabulary, as_text

__all__ = ["RankingData", "RankingDataConfig", "prepare_ranking_data"]

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
MAX_HISTORY = 10_000
"""Most items of a history: every row of a batch holds as many."""
COLD_SALT = "cold items"

MAX_HISTORY = 10_000
"""Items per user that are held with the model; published models see 20 to 1,000."""

TRAIN = 0


@dataclass(frozen=True, kw_only=True)
class RankingDataConfig(Options):
    """How a log becomes training rows.

    Attributes:
        label: ``COLUMN>=NUMBER``, ``COLUMN>NUMBER``, ``sampled(uniform,k)`` or
            ``sampled(popularity,k)``.
        split: ``random``, ``leave-last-out`` or ``time``.
        fractions: shares of train, validation and test.
        cold_items: share of the items, by a hash of their id, that training never sees; their
            interactions form the part ``cold``.
        min_count: training rows below which a user or an item shares the unknown row.
        history: items of a user's history that the model sees; 0 sees none.
        categorical: columns of the log that are categories.
        dense: columns of the log that are numbers.
        item_columns: columns of the items with one value; None takes ``brand`` if it is there.
        multi_columns: columns with several; None takes ``categories`` if it is there.
        seed: decides the split and the negatives.
    """

    label: str = "sampled(uniform,1)"
    split: str = option("random", choices=SPLITS, name="--split (split=)")
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    cold_items: float = option(0.0, ge=0, lt=1)
    min_count: int = option(1, ge=1)
    history: int = option(0, ge=0, le=MAX_HISTORY)
    categorical: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    item_columns: tuple[str, ...] | None = None
    multi_columns: tuple[str, ...] | None = None
    seed: int = 0

    def _problems(self) -> list[str]:
        check_fractions(self.fractions)
        Label.parse(self.label)
        twice = set(self.categorical) & set(self.dense)
        if twice:
            return [f"columns {sorted(twice)} are both categorical and dense"]
        return []


@dataclass(frozen=True)
class RankingData:
    """Training tensors and everything needed to read more rows the same way.

    Attributes:
        schema: vocabularies and item attributes.
        parts: rows by part: ``train``, ``validation``, ``test``, and ``cold`` where items were
            held out.
        interactions: ``(items + 1,)`` logged training interactions of each catalogue row.
        positives: ``(items + 1,)`` positive ones among them; what popularity means here.
        protocol: label, split, seed and features in one line, to stand beside every result.
        dropped_negatives: negatives that were given up because their user took nearly all items.
        training_log: the positive training interactions, for tokenizers that learn from behavior.
    """

    schema: Schema
    parts: dict[str, RankingRows]
    interactions: Ints
    positives: Ints
    protocol: str
    dropped_negatives: int = 0
    training_log: Interactions | None = None

    @property
    def train_items(self) -> npt.NDArray[np.bool_]:
        """Mask ``(items,)`` of the catalogue's items with a training interaction."""
        return self.interactions[1:] > 0


def prepare_ranking_data(
    interactions: Any,
    *,
    items: Any = None,
    config: RankingDataConfig | None = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str | None = None,
    id_column: str | None = None,
) -> RankingData:
    """Turn a log into rows to train, choose and test on.

    Vocabularies, normalization and popularity come from training rows alone; a history holds
    training positives from before its row; negatives of a part avoid what their user took in that
    part and the parts before it, so that training does not know what is tested.

    Args:
        interactions: the log: a path, a frame, or `semid.Interactions` with the columns that
            ``config`` names.
        items: table of items with brand, categories and the like; None knows nothing of them.
        config: label, split and features.
        user_column: the users of the log.
        item_column: the items of the log.
        time_column: when; None takes ``position``, else ``timestamp`` (for ``split=time``
            ``timestamp`` first).
        id_column: the item ids of ``items``; None takes ``item_id``.

    Raises:
        UsageError: a column or file that does not exist.
        InteractionsError: labels of one class, or a part without rows.
        InputError: columns of a wrong type, NaN in a dense column.

    Cost: a few arrays of 8 bytes a row while it runs; about 20 bytes a row and 16 a training
    positive are kept.
    """
    config = config or RankingDataConfig()
    label = Label.parse(config.label)
    if time_column is None and config.split == "time":
        time_column = _timestamp(interactions)
    log = read_interactions(
        interactions,
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        rating_column="" if label.sampled else label.column,
        extra_columns=[*config.categorical, *config.dense],
        flags={
            **dict.fromkeys(config.categorical, "--categorical (categorical=)"),
            **dict.fromkeys(config.dense, "--dense (dense=)"),
            label.column: "--label (label=)",
        },
    )
    if not label.sampled and log.rating is None:
        raise InteractionsError(f"{log.label} has no column '{label.column}' for --label '{label}'")
    catalogue, log_row = _catalogue(log, items, id_column)
    cold = _cold(catalogue, config.cold_items)
    part = split_rows(
        log,
        config.split,
        fractions=config.fractions,
        cold_items=cold[log_row],
        seed=config.seed,
    )
    positive = np.ones(len(log), dtype=bool) if label.sampled else label.of(np.asarray(log.rating))
    draft = _Draft(log, log_row[log.items].astype(np.int64), part, positive, cold, config, label)
    rows = draft.rows(len(catalogue))
    return draft.finish(
        rows,
        catalogue,
        read_item_columns(
            items,
            catalogue,
            id_column=id_column,
            single=config.item_columns,
            multi=config.multi_columns,
        ),
        columns=(user_column, item_column),
    )


def _timestamp(interactions: Any) -> str | None:
    if isinstance(interactions, Interactions):
        return None
    names = open_table(interactions, what="the interaction log").names
    return "timestamp" if "timestamp" in names else None


def _catalogue(log: Interactions, items: Any, id_column: str | None) -> tuple[ItemIds, Ints]:
    """Return the catalogue (the table's items, then others of the log) and the log's rows in it."""
    own = ItemIds(log.item_ids)
    if items is None:
        return own, np.arange(len(own))
    table = open_table(items, what="the table of items")
    key = id_column or "item_id"
    if key not in table.names:
        return own, np.arange(len(own))  # reading the columns says what is wrong
    known = ItemIds(table.read([key]).column(key), source=f"id column '{key}' of {table.label}")
    rows = known.index_of(log.item_ids)
    extra = np.flatnonzero(rows < 0)
    if len(extra) == len(rows):
        raise InteractionsError(
            f"none of the {len(rows)} items of {log.label} is in {table.label}: they are called "
            f"like {own.example}, the table's like {known.example}; check --id-column"
        )
    rows[extra] = len(known) + np.arange(len(extra))
    joined = pa.concat_arrays([known.strings(), log.item_ids.take(pa.array(extra))])
    return ItemIds(joined), rows


def _cold(catalogue: ItemIds, share: float) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = held_out_mask(catalogue, share, salt=COLD_SALT)
    return found


@dataclass
class _Draft:
    """A log on its way to rows; arrays are ``(interactions,)``."""

    log: Interactions
    item: Ints  # rows of the catalogue, from 0
    part: npt.NDArray[np.int8]
    positive: npt.NDArray[np.bool_]
    cold: npt.NDArray[np.bool_]
    config: RankingDataConfig
    label: Label
    dropped: int = 0

    def rows(self, items: int) -> dict[int, tuple[Ints, Ints, npt.NDArray[np.bool_]]]:
        """Return per part the log row, the catalogue row and the label of every training row."""
        found = {}
        in_log = np.zeros(items, dtype=bool)
        in_log[self.item] = True
        for number in range(len(PARTS)):
            own = np.flatnonzero(self.part == number)
            if number == COLD and not len(own):
                continue
            sources, chosen, labels = own, self.item[own], self.positive[own]
            if self.label.sampled:
                repeated = np.repeat(own, self.label.negatives)
                drawn, kept = self._negatives(number, repeated, in_log, items)
                self.dropped += int((~kept).sum())
                sources = np.concatenate([own, repeated[kept]])
                chosen = np.concatenate([chosen, drawn[kept]])
                labels = np.concatenate([labels, np.zeros(int(kept.sum()), dtype=bool)])
            if labels.all() or not labels.any():
                raise InteractionsError(
                    f"every row of the part {PARTS[number]} has one label under --label "
                    f"'{self.label}'; give more interactions or another threshold"
                )
            found[number] = (sources, chosen, labels)
        if self.dropped:
            logger.warning("%d negatives found no item that their user lacks", self.dropped)
        return found

    def _negatives(
        self, number: int, rows: Ints, in_log: npt.NDArray[np.bool_], items: int
    ) -> tuple[Ints, npt.NDArray[np.bool_]]:
        known = self.part == COLD if number == COLD else self.part <= number
        pool = np.flatnonzero(in_log & (self.cold if number == COLD else ~self.cold))
        weights = None
        if self.label.distribution == "popularity":
            counted = self.part == (COLD if number == COLD else TRAIN)
            weights = np.bincount(self.item[counted], minlength=items)[pool]
        return draw_negatives(
            self.log.users[rows].astype(np.int64),
            taken=(self.log.users[known].astype(np.int64), self.item[known]),
            pool=pool,
            weights=weights,
            items=items,
            seed=self.config.seed,
            name=PARTS[number],
        )

    def finish(
        self, rows: dict[int, Any], catalogue: ItemIds, columns_of: Any, *, columns: tuple[str, str]
    ) -> RankingData:
        """Build vocabularies from the training rows and look every row up."""
        log, config, items = self.log, self.config, len(catalogue)
        sources, chosen, _ = rows[TRAIN]
        user_counts = np.bincount(log.users[sources], minlength=len(log.user_ids))
        known_users = np.flatnonzero(user_counts >= config.min_count)
        user_rows = np.zeros(len(log.user_ids), dtype=np.int64)
        user_rows[known_users] = np.arange(1, len(known_users) + 1)
        item_counts = np.bincount(chosen, minlength=items)
        known_items = np.flatnonzero(item_counts >= config.min_count)
        id_rows = np.zeros(items + 1, dtype=np.int64)
        id_rows[known_items + 1] = np.arange(1, len(known_items) + 1)
        context = {
            name: _vocabulary(log.columns[name].take(pa.array(sources)), name, log.label)
            for name in config.categorical
        }
        histories = self._histories(rows) if config.history else None
        schema = Schema(
            users=Vocabulary(log.user_ids.take(pa.array(known_users))),
            items=Vocabulary(catalogue),
            id_rows=id_rows,
            id_size=len(known_items) + 1,
            attributes=columns_of.attributes(item_counts > 0),
            context=context,
            dense={
                name: _moments(dense_values(log.columns[name], name=name, label=log.label)[sources])
                for name in config.dense
            },
            history=config.history,
            user_history=np.zeros((len(known_users) + 1, config.history), np.int64),
            user_column=columns[0],
            item_column=columns[1],
        )
        categories, numbers = schema.context_rows(log.columns, rows=len(log), label=log.label)
        parts = {}
        for number, (source, item, labels) in rows.items():
            at = torch.from_numpy(source)
            history = None
            if histories is not None:
                events, spans = histories
                history = HistoryIndex(events, spans[at], config.history)
            parts[PARTS[number]] = RankingRows(
                user=torch.from_numpy(user_rows[log.users[source]].astype(np.int32)),
                item=torch.from_numpy((item + 1).astype(np.int32)),
                label=torch.from_numpy(labels.astype(np.float32)),
                context=categories[at],
                dense=numbers[at],
                history=history,
                person=torch.from_numpy(log.users[source].astype(np.int32)),
            )
        if histories is not None:
            self._last_histories(schema, histories, known_users)
        trained = self.part == TRAIN
        return RankingData(
            schema,
            parts,
            np.bincount(self.item[trained] + 1, minlength=items + 1),
            np.bincount(self.item[trained & self.positive] + 1, minlength=items + 1),
            self._protocol(schema),
            self.dropped,
            replace(log, rating=None, columns={}).where(trained & self.positive),
        )

    def _histories(self, rows: dict[int, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all training positives user by user, and each interaction's span in them."""
        log = self.log
        by_time = np.arange(len(log)) if log.order is None else np.argsort(log.order, kind="stable")
        ranks = by_time[np.argsort(log.users[by_time], kind="stable")]
        event = (self.part == TRAIN) & self.positive
        taken = event[ranks]
        before = np.cumsum(taken) - taken
        users = log.users[ranks]
        first = np.searchsorted(users, users, side="left")
        spans = np.empty((len(log), 2), dtype=np.int64)
        spans[ranks, 0], spans[ranks, 1] = before[first], before
        events = (self.item[ranks][taken] + 1).astype(np.int32)
        return torch.from_numpy(events), torch.from_numpy(spans)

    def _last_histories(
        self, schema: Schema, histories: tuple[torch.Tensor, torch.Tensor], known: Ints
    ) -> None:
        """Fill in each known user's last training positives."""
        event = (self.part == TRAIN) & self.positive
        counts = np.bincount(self.log.users[event], minlength=len(self.log.user_ids))
        ends = np.cumsum(counts)
        spans = torch.from_numpy(np.stack([ends - counts, ends], axis=1)[known])
        index = HistoryIndex(histories[0], spans, self.config.history)
        schema.user_history[1:] = index.of(torch.arange(len(known))).numpy()

    def _protocol(self, schema: Schema) -> str:
        config = self.config
        shares = "/".join(f"{share:g}" for share in config.fractions)
        split = config.split if config.split == "leave-last-out" else f"{config.split}({shares})"
        fields = ["user", "item", *schema.attributes, *schema.context, *schema.dense]
        ordered = "" if self.log.has_order else ", file order"
        parts = [
            f"label={self.label}",
            f"split={split}",
            f"data_seed={config.seed}",
            f"fields={'+'.join(fields)}",
        ]
        if config.cold_items:
            parts.append(f"cold_items={config.cold_items:g}")
        if config.min_count > 1:
            parts.append(f"min_count={config.min_count}")
        if config.history:
            parts.append(f"history={config.history}{ordered}")
        return " ".join(parts)


def _vocabulary(column: Any, name: str, label: str) -> Vocabulary:
    text = as_text(column, name=name, label=label)
    return Vocabulary(pc.drop_null(pc.unique(text)), source=f"values of '{name}'")


def _moments(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    spread = float(values.std(dtype=np.float64))
    return float(values.mean(dtype=np.float64)), spread if spread > 0 else 1.0
