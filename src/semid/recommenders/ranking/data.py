"""Ranking data in memory: labels, negatives, histories and rows of a log, split without leaks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from semid.data.ids import ItemIds, held_out_mask
from semid.data.interactions import Interactions, read_interactions
from semid.data.tables import open_table
from semid.errors import InteractionsError
from semid.recommenders.ranking.builder import (
    DataBuilder,
    LogBatch,
    RankingData,
    RankingDataConfig,
)
from semid.recommenders.ranking.item_table import join_catalogue
from semid.recommenders.ranking.schema import HistoryIndex, Schema, as_text, dense_values
from semid.recommenders.ranking.splits import (
    COLD,
    COLD_SALT,
    PARTS,
    TRAIN,
    draw_negatives,
    split_rows,
)

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def prepare_ranking_data(
    interactions: Any,
    *,
    items: Any = None,
    config: RankingDataConfig | None = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str | None = None,
    id_column: str | None = None,
    ties: str = "shuffle",
    ties_seed: int = 0,
) -> RankingData:
    """Turn a log into rows for training, validation and test.

    Vocabularies, normalization and popularity come from training rows alone. A history holds
    training positives from before its row. Negatives of a part avoid what their user took in that
    part and the parts before it, so that training does not know what is tested.

    Args:
        interactions: the log: a path, a frame, or `semid.Interactions` with the columns that
            ``config`` names.
        items: table of items with brand, categories and the like; None uses no attributes.
        config: label, split and features.
        user_column: user column of the log.
        item_column: item column of the log.
        time_column: time column of the log; None chooses as `read_interactions` does (for
            ``split=time`` always ``timestamp`` first).
        id_column: id column of ``items``; None takes ``item_id``.
        ties: order of interactions at the same time, ``shuffle`` or ``file``, see
            `read_interactions`.
        ties_seed: seed of the shuffle.

    Raises:
        UsageError: a column or file that does not exist.
        InteractionsError: labels of one class, or a part without rows.
        InputError: columns of a wrong type, NaN in a dense column.

    Cost: a few arrays of 8 bytes per row while it runs; the result takes about 20 bytes per row
    and 16 per training positive.
    """
    config = config or RankingDataConfig()
    label = config.parsed_label
    by_time = time_column is None and config.split == "time"
    if by_time and not isinstance(interactions, Interactions):
        present = open_table(interactions, what="the interaction log").names
        time_column = "timestamp" if "timestamp" in present else None
    # Users and items are coded by first appearance; only the columns that are used are read.
    log = read_interactions(
        interactions,
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        rating_column="" if label.sampled else label.column,
        extra_columns=[*config.categorical, *config.dense],
        flags=config.column_flags,
        ties=ties,
        ties_seed=ties_seed,
    )
    if not label.sampled and log.rating is None:
        raise InteractionsError(f"{log.label} has no column '{label.column}' for --label '{label}'")
    # The catalogue is known before the split, because cold items are chosen by their id.
    catalogue = join_catalogue(log.item_ids, items, id_column, label=log.label)
    item_rows = catalogue.index_of(log.item_ids)
    cold = held_out_mask(catalogue, config.cold_items, salt=COLD_SALT)
    shares, seed = config.fractions, config.seed
    part = split_rows(log, config.split, fractions=shares, cold_items=cold[item_rows], seed=seed)
    positive = np.ones(len(log), bool) if label.sampled else label.apply(np.asarray(log.rating))
    source = _MemoryLog(
        log, catalogue, item_rows[log.items].astype(np.int64), part, positive, cold, config
    )
    # One batch per part; the builder sees no difference to a log on disk.
    builder = DataBuilder(config, user_column, item_column, label=log.label, in_memory=True)
    for batch in source.batches():
        builder.add(batch)
    data = builder.finish(
        catalogue, items=items, id_column=id_column, users=log.user_ids, order=log.order_text
    )
    if config.history:
        histories = source.last_histories(data.schema)
        data = replace(data, schema=replace(data.schema, user_history=histories))
    if source.dropped:
        logger.warning("%d negatives found no item that their user lacks", source.dropped)
    return replace(
        data,
        dropped_negatives=source.dropped,
        training_log=replace(log, rating=None, columns={}).where(source.training_positive),
    )


@dataclass
class _MemoryLog:
    """A log in memory as one batch per part."""

    log: Interactions
    catalogue: ItemIds
    item: Ints  # ``(interactions,)`` catalogue rows from 0
    part: npt.NDArray[np.int8]  # ``(interactions,)`` indices into `PARTS`
    positive: Mask  # ``(interactions,)``
    cold: Mask  # ``(items,)`` which items are held out of training
    config: RankingDataConfig
    dropped: int = 0

    @property
    def training_positive(self) -> Mask:
        """Mask of the positive training interactions."""
        mask: Mask = (self.part == TRAIN) & self.positive
        return mask

    def batches(self) -> Iterator[LogBatch]:
        """Yield the rows of each part, negatives after the logged ones."""
        config, log, label = self.config, self.log, self.config.parsed_label
        # Every value is looked up once: columns are coded by their distinct values.
        ids = self.catalogue.strings()
        columns = {
            name: as_text(log.columns[name], name=name, label=log.label).dictionary_encode()
            for name in config.categorical
        }
        for name in config.dense:
            columns[name] = pa.array(dense_values(log.columns[name], name=name, label=log.label))
        spans = self._history_spans() if config.history else None
        for number in range(len(PARTS)):
            rows = np.flatnonzero(self.part == number)
            if not len(rows):
                continue
            items, labels = self.item[rows], self.positive[rows]
            if label.sampled:  # the negatives of a row follow all logged rows of the part
                repeated = np.repeat(rows, label.negatives)
                negatives, valid = self._negatives(number, repeated)
                self.dropped += int((~valid).sum())
                rows = np.concatenate([rows, repeated[valid]])
                items = np.concatenate([items, negatives[valid]])
                labels = np.concatenate([labels, np.zeros(int(valid.sum()), dtype=bool)])
            history = None
            if spans is not None:
                history = HistoryIndex(self._events, torch.from_numpy(spans[rows]), config.history)
            # Codes into the distinct ids, so that later look-ups cost the distinct ids alone.
            yield LogBatch(
                users=pa.DictionaryArray.from_arrays(pa.array(log.users[rows]), log.user_ids),
                items=pa.DictionaryArray.from_arrays(pa.array(items), ids),
                columns={name: column.take(pa.array(rows)) for name, column in columns.items()},
                parts=np.full(len(rows), number, np.int8),
                labels=labels,
                history=history,
            )

    def _negatives(self, number: int, rows: Ints) -> tuple[Ints, Mask]:
        """Draw negatives of a part for the users of ``rows``, and say which were found."""
        items, cold = len(self.catalogue), number == COLD
        # What the user took in this part and those before it is no negative. Later parts are left
        # in the pool: to avoid them would tell the model what is tested.
        known = self.part == COLD if cold else self.part <= number
        in_log = np.zeros(items, dtype=bool)
        in_log[self.item] = True
        pool = np.flatnonzero(in_log & (self.cold if cold else ~self.cold))
        weights = None
        if self.config.parsed_label.distribution == "popularity":
            counted = self.part == (COLD if cold else TRAIN)
            weights = np.bincount(self.item[counted], minlength=items)[pool]
        return draw_negatives(
            self.log.users[rows].astype(np.int64),
            excluded=(self.log.users[known].astype(np.int64), self.item[known]),
            pool=pool,
            weights=weights,
            items=items,
            seed=self.config.seed,
            name=PARTS[number],
        )

    @cached_property
    def _ordered(self) -> Ints:
        """The interactions user by user, oldest first; without a time in file order."""
        return self.log.by_user()

    @cached_property
    def _events(self) -> torch.Tensor:
        """Catalogue rows of all training positives, user by user, oldest first."""
        ordered = self._ordered
        events = self.item[ordered[self.training_positive[ordered]]] + 1
        return torch.from_numpy(events.astype(np.int32))

    def _history_spans(self) -> Ints:
        """Return per interaction where its history begins and ends in `_events`: ``(rows, 2)``."""
        # Validation and test rows see the training positives before them, never each other.
        ordered = self._ordered
        is_event = self.training_positive[ordered]
        # Events that lie before each interaction in the order: the exclusive end of its history.
        # The interaction itself is not counted, so no row sees its own item.
        before: Ints = np.cumsum(is_event) - is_event
        # The history begins where the user's first interaction stands in the order.
        users = self.log.users[ordered]
        first = np.searchsorted(users, users, side="left")
        spans = np.empty((len(ordered), 2), dtype=np.int64)
        spans[ordered, 0], spans[ordered, 1] = before[first], before
        return spans

    def last_histories(self, schema: Schema) -> Ints:
        """Return ``(users + 1, history)`` the last training positives of each known user."""
        # Events stand user by user, so the counts per user give where each user's events lie.
        counts = np.bincount(
            self.log.users[self.training_positive], minlength=len(self.log.user_ids)
        )
        ends = np.cumsum(counts)
        known = schema.users.rows(self.log.user_ids) > 0
        spans = torch.from_numpy(np.stack([ends - counts, ends], axis=1)[known])
        index = HistoryIndex(self._events, spans, self.config.history)
        histories = schema.user_history.copy()
        histories[1:] = index.of(torch.arange(len(spans))).numpy()
        return histories
