"""Logs larger than memory: Parquet read in row groups through a shuffle buffer, epoch by epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from semid.data.columns import require_column
from semid.data.files import ParquetFiles
from semid.data.ids import hash_strings
from semid.errors import InteractionsError, UsageError
from semid.filesystems import open_parquet
from semid.recommenders.ranking.builder import (
    DataBuilder,
    LogBatch,
    RankingData,
    RankingDataConfig,
    ValueCounts,
    encode,
)
from semid.recommenders.ranking.item_table import join_catalogue
from semid.recommenders.ranking.schema import Inputs, RankingRows, as_text, dense_values
from semid.recommenders.ranking.splits import TRAIN, Label, hash_parts
from semid.seeds import numpy_generator
from semid.training.batches import process_share
from semid.training.distributed import rank, world_size

BUFFER_ROWS = 1 << 20
"""Rows of the shuffle buffer."""

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class LogFiles:
    """A log on disk and how its rows are read."""

    files: ParquetFiles  # the Parquet files
    user: str  # name of the user column
    item: str  # name of the item column
    label: Label  # how rows are labelled
    config: RankingDataConfig  # how the log becomes ranking data

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        config = self.config
        return [self.user, self.item, self.label.column, *config.categorical, *config.dense]

    def tables(self, file: int, groups: list[int] | None = None) -> Iterator[pa.Table]:
        """Yield a file in pieces, all of it or some row groups alone."""
        with open_parquet(self.files.paths[file], memory_map=True) as parquet:
            for batch in parquet.iter_batches(
                columns=self.columns, row_groups=groups, use_threads=False
            ):
                yield pa.Table.from_batches([batch])

    def batch(self, table: pa.Table) -> LogBatch:
        """Return rows with their parts and labels."""
        config, label = self.config, self.files.label
        users, items = (
            as_text(table.column(name), name=name, label=label) for name in (self.user, self.item)
        )
        if users.null_count or items.null_count:
            raise InteractionsError(
                f"columns '{self.user}' and '{self.item}' of {label} hold "
                f"{users.null_count + items.null_count} nulls; drop those rows"
            )
        column = self.label.column
        values = dense_values(table.column(column), name=column, label=label)
        return LogBatch(
            users=users,
            items=items,
            columns={name: table.column(name) for name in (*config.categorical, *config.dense)},
            parts=hash_parts(
                users,
                items,
                fractions=config.fractions,
                cold_share=config.cold_items,
                seed=config.seed,
            ),
            labels=self.label.compare(values),
        )

    def add_to_digest(self, digest: Any, table: pa.Table) -> None:
        """Hash the values that training reads."""
        # Values, not encoded bytes: the same log in other Parquet files has the same digest.
        for name in self.columns:
            column = table.column(name)
            if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
                digest.update(column.cast(pa.float64()).to_numpy().tobytes())
            else:
                text = as_text(column, name=name, label=self.files.label)
                digest.update(hash_strings(text.fill_null("")).tobytes())


@dataclass(frozen=True, kw_only=True)
class RankingStream(RankingData):
    """A log on disk whose training rows are read anew every epoch.

    Use `prepare_ranking_data` where the log fits in memory. Validation and test rows are held in
    memory: for a very large log give them small ``fractions``.

    Attributes:
        log: the files.
        buffer_rows: rows of the shuffle buffer.
    """

    log: LogFiles
    buffer_rows: int = BUFFER_ROWS

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        items: Any = None,
        config: RankingDataConfig | None = None,
        user_column: str = "user_id",
        item_column: str = "item_id",
        id_column: str | None = None,
        buffer_rows: int = BUFFER_ROWS,
    ) -> RankingStream:
        """Read the log once for vocabularies, counts and the rows that are not trained on.

        Args:
            path: Parquet file, folder or glob, with a column to label by.
            items: table of items, as for `prepare_ranking_data`; read into memory.
            config: as for `prepare_ranking_data`. The label has to be a threshold (a negative can
                only be drawn with all of its user's items at hand), the split ``random`` (by a hash
                of user and item, so that a pair stays together) and ``history`` 0.
            user_column: user column of the log.
            item_column: item column of the log.
            id_column: id column of ``items``.
            buffer_rows: rows of the shuffle buffer: the larger, the better mixed.

        Raises:
            UsageError: an option that needs the whole log at once.
            InteractionsError: no rows, labels of one class, or a part without rows.
            InputError: columns of a wrong type, NaN in a dense column.

        Memory: the distinct users and items, and the rows of validation and test.
        """
        config = config or RankingDataConfig(label="label>=1")
        label = config.parsed_label
        _check_streamable(config, label)
        files = ParquetFiles.open(path, error=InteractionsError)
        log = LogFiles(files, user_column, item_column, label, config)
        flags = {
            **config.column_flags,
            user_column: "--user-column (user_column=)",
            item_column: "--item-column (item_column=)",
        }
        for name in log.columns:
            require_column(name, list(files.schemas[0].names), label=files.label, flag=flags[name])
        builder = DataBuilder(config, user_column, item_column, label=files.label, in_memory=False)
        all_items, digest = ValueCounts(), hashlib.sha256()
        for table in (table for file in range(len(files.paths)) for table in log.tables(file)):
            log.add_to_digest(digest, table)
            batch = log.batch(table)
            all_items.add(batch.items)
            builder.add(batch)
        catalogue = join_catalogue(
            all_items.values(in_order=True), items, id_column, label=files.label
        )
        data = builder.finish(catalogue, items=items, id_column=id_column, split_note=" by hash")
        fields = {**vars(data), "log_digest": digest.hexdigest()}
        return cls(**fields, log=log, buffer_rows=buffer_rows)

    def batches(self, batch_size: int, *, seed: int, device: torch.device) -> StreamBatches:
        """Return training batches for the loop."""
        return StreamBatches(self, batch_size=batch_size, seed=seed, device=device)


class StreamBatches:
    """Batches of a log on disk, mixed by a shuffle buffer."""

    def __init__(
        self, stream: RankingStream, *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self.stream, self.seed, self.device = stream, seed, device
        self.steps_per_epoch = max(1, round(stream.train_rows / batch_size))
        # Batches of nearly equal size: the first ones have the remaining rows.
        size, larger = divmod(stream.train_rows, self.steps_per_epoch)
        self.sizes = [size + (step < larger) for step in range(self.steps_per_epoch)]

    def batches(self, epoch: int, first: int) -> Iterator[tuple[tuple[Inputs, Tensor], float]]:
        """Yield ``((inputs, labels), weight)`` of an epoch from step ``first`` on."""
        # Row groups come in a random order per epoch and pass through the buffer: every row that
        # leaves it is a random one of those inside.
        generator = numpy_generator(self.seed, "stream", epoch)
        buffer: list[Columns] = []
        count, step = 0, 0
        for chunk in self._chunks(generator):
            buffer.append(chunk)
            count += len(chunk["label"])
            # Draw while a full buffer stays behind, so that a batch mixes buffer_rows rows.
            while step < len(self.sizes) and count - self.sizes[step] >= self.stream.buffer_rows:
                batch, buffer = _draw(buffer, self.sizes[step], generator)
                count -= self.sizes[step]
                if step >= first:  # a resumed run draws the steps before, but skips them
                    yield self._batch(batch)
                step += 1
        # The log is read; the rest of the buffer makes the last batches.
        while step < len(self.sizes):
            batch, buffer = _draw(buffer, self.sizes[step], generator)
            if step >= first:
                yield self._batch(batch)
            step += 1

    def _chunks(self, generator: np.random.Generator) -> Iterator[Columns]:
        """Yield the training rows of every row group, the groups in a random order."""
        # Row groups are the unit of reading; the buffer mixes what they hold.
        log, schema = self.stream.log, self.stream.schema
        places = [
            (file, group)
            for file, groups in enumerate(log.files.row_groups)
            for group in range(len(groups))
        ]
        for place in generator.permutation(len(places)):
            file, group = places[place]
            for table in log.tables(file, [group]):
                rows = log.batch(table).of_part(TRAIN)
                if len(rows.parts):
                    yield encode(rows, schema, label=log.files.label)

    def _batch(self, columns: Columns) -> tuple[tuple[Inputs, Tensor], float]:
        # With several processes each takes its share, weighted so that the gradients add up.
        share, weight = process_share(
            np.arange(len(columns["label"])), rank=rank(), world=world_size()
        )
        columns = {name: values[share] for name, values in columns.items()}
        rows = RankingRows.of(columns, person=columns["user"]).to(self.device)
        return rows.batch(torch.arange(len(share), device=self.device)), weight


def _draw(
    buffer: list[Columns], rows: int, generator: np.random.Generator
) -> tuple[Columns, list[Columns]]:
    """Draw rows at random out of a buffer; return them and the rest."""
    joined = {name: np.concatenate([part[name] for part in buffer]) for name in buffer[0]}
    total = len(joined["label"])
    drawn = generator.choice(total, rows, replace=False)
    # Remaining rows from the end fill the holes, so that a draw costs the batch, not the buffer.
    remaining = total - rows
    stays = np.ones(total, dtype=bool)
    stays[drawn] = False
    tail = remaining + np.flatnonzero(stays[remaining:])
    holes = drawn[drawn < remaining]
    batch = {name: values[drawn] for name, values in joined.items()}
    for values in joined.values():
        values[holes] = values[tail]
    return batch, [{name: values[:remaining] for name, values in joined.items()}]


def _check_streamable(config: RankingDataConfig, label: Label) -> None:
    whole, memory = "needs the whole log at once", "use prepare_ranking_data()"
    problems = []
    if label.sampled:
        problems.append(
            f"--label '{label}' (label=) draws negatives, which {whole}: stream logs that have a "
            f"label, or {memory}"
        )
    if config.split != "random":
        problems.append(f"--split {config.split} (split=) {whole}: random")
    if config.history:
        problems.append(f"history= {whole}: give 0, or {memory}")
    if problems:
        raise UsageError("; ".join(problems))
