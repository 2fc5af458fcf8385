"""Logs larger than memory: Parquet read in row groups through a shuffle buffer, epoch by epoch."""

from __future__ import annotations

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
from semid.data.ids import hash_strings
from semid.data.parquet_files import ParquetFiles
from semid.errors import InteractionsError, UsageError
from semid.filesystems import open_parquet
from semid.recommenders.ranking.data import RankingDataConfig
from semid.recommenders.ranking.labels import Label
from semid.recommenders.ranking.rows import RankingRows
from semid.recommenders.ranking.schema import Inputs, Schema
from semid.recommenders.ranking.splits import PARTS
from semid.recommenders.ranking.streamscan import Scan, scan_log
from semid.recommenders.ranking.vocabulary import as_text
from semid.seeds import numpy_generator
from semid.training.batches import own_share
from semid.training.distributed import rank, world_size

__all__ = ["BUFFER_ROWS", "RankingStream", "StreamBatches"]

BUFFER_ROWS = 1 << 20
"""Rows of the shuffle buffer."""

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class RankingStream:
    """A log on disk whose training rows are read anew every epoch.

    Use `prepare_ranking_data` where the log fits in memory. Validation and test rows are held in
    memory: for a very large log give them small ``fractions``.

    Attributes:
        schema: vocabularies of the training rows.
        parts: rows by part but ``train``.
        interactions: ``(items + 1,)`` training rows of each catalogue row.
        positives: ``(items + 1,)`` positive ones among them.
        protocol: as in `RankingData`.
        train_rows: training rows of an epoch.
        log_digest: SHA-256 of what was read of the log, for a resume.
        scan: what the first pass found.
        buffer_rows: rows of the shuffle buffer.
    """

    schema: Schema
    parts: dict[str, RankingRows]
    interactions: npt.NDArray[np.int64]
    positives: npt.NDArray[np.int64]
    protocol: str
    train_rows: int
    log_digest: str
    scan: Scan
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
            user_column: the users of the log.
            item_column: the items of the log.
            id_column: the item ids of ``items``.
            buffer_rows: rows of the shuffle buffer: the larger, the better mixed.

        Raises:
            UsageError: an option that needs the whole log at once.
            InteractionsError: no rows, labels of one class, or a part without rows.
            InputError: columns of a wrong type, NaN in a dense column.
        """
        config = config or RankingDataConfig(label="label>=1")
        label = Label.parse(config.label)
        _streamable(config, label)
        files = ParquetFiles.open(path, error=InteractionsError)
        flags = {
            user_column: "--user-column (user_column=)",
            item_column: "--item-column (item_column=)",
            label.column: "--label (label=)",
            **dict.fromkeys(config.categorical, "--categorical (categorical=)"),
            **dict.fromkeys(config.dense, "--dense (dense=)"),
        }
        wanted = [user_column, item_column, label.column, *config.categorical, *config.dense]
        for name in wanted:
            names = list(files.schemas[0].names)
            require_column(name, names, label=files.label, flag=flags[name])
        scan = Scan(
            files=files,
            columns=tuple(wanted),
            user=user_column,
            item=item_column,
            label=label,
            config=config,
        )
        found = scan_log(scan, items, id_column)
        parts = {}
        for number, table in found.held.items():
            columns = encode(table, scan, found.schema)
            if columns["label"].min() == columns["label"].max():
                raise InteractionsError(
                    f"every row of the part {PARTS[number]} has one label under --label '{label}'; "
                    "give more interactions or another threshold"
                )
            parts[PARTS[number]] = _rows(columns, table, scan)
        return cls(
            found.schema,
            parts,
            found.interactions,
            found.positives,
            found.protocol,
            found.train_rows,
            found.log_digest,
            scan,
            buffer_rows,
        )

    def batches_of(self, batch_size: int, *, seed: int, device: torch.device) -> StreamBatches:
        """Return training batches for the loop."""
        return StreamBatches(self, batch_size=batch_size, seed=seed, device=device)


class StreamBatches:
    """Batches of a log on disk.

    Row groups come in a random order an epoch and pass through a buffer: every row that leaves it
    is a random one of those inside. A run that is resumed midway reads up to where it was.

    Args:
        stream: the log.
        batch_size: rows a step.
        seed: decides the order.
        device: where batches go.
    """

    def __init__(
        self, stream: RankingStream, *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self.stream, self.seed, self.device = stream, seed, device
        self.steps_per_epoch = max(1, round(stream.train_rows / batch_size))
        whole, more = divmod(stream.train_rows, self.steps_per_epoch)
        self.sizes = [whole + (step < more) for step in range(self.steps_per_epoch)]

    def batches(self, epoch: int, first: int) -> Iterator[tuple[tuple[Inputs, Tensor], float]]:
        """Yield ``((inputs, labels), weight)`` of an epoch from step ``first`` on."""
        generator = numpy_generator(self.seed, "stream", epoch)
        held: list[Columns] = []
        count, step = 0, 0
        for chunk in self._chunks(generator):
            held.append(chunk)
            count += len(chunk["label"])
            while step < len(self.sizes) and count - self.sizes[step] >= self.stream.buffer_rows:
                batch, held = _draw(held, self.sizes[step], generator)
                count -= self.sizes[step]
                if step >= first:
                    yield self._batch(batch)
                step += 1
        while step < len(self.sizes):
            batch, held = _draw(held, self.sizes[step], generator)
            if step >= first:
                yield self._batch(batch)
            step += 1

    def _chunks(self, generator: np.random.Generator) -> Iterator[Columns]:
        scan, schema = self.stream.scan, self.stream.schema
        places = [
            (file, group)
            for file, groups in enumerate(scan.files.row_groups)
            for group in range(len(groups))
        ]
        for at in generator.permutation(len(places)):
            file, group = places[at]
            with open_parquet(scan.files.paths[file], memory_map=True) as parquet:
                for batch in parquet.iter_batches(
                    columns=list(scan.columns), row_groups=[group], use_threads=False
                ):
                    table = pa.Table.from_batches([batch])
                    chosen = np.flatnonzero(scan.parts(table) == 0)
                    if len(chosen):
                        yield encode(table.take(pa.array(chosen)), scan, schema)

    def _batch(self, columns: Columns) -> tuple[tuple[Inputs, Tensor], float]:
        every = np.arange(len(columns["label"]))
        own, weight = own_share(every, rank=rank(), world=world_size())

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(columns[name][own]).to(self.device)

        item = tensor("item").long()
        inputs = Inputs(
            tensor("user").long(),
            item,
            tensor("context").long(),
            tensor("dense"),
            item.new_zeros((len(item), 0)),
        )
        return (inputs, tensor("label")), weight


def encode(table: pa.Table, scan: Scan, schema: Schema) -> Columns:
    """Look the rows of a table up: arrays ``(rows, ...)`` by name."""
    label = scan.files.label
    context, dense = schema.context_rows(
        {name: table.column(name) for name in (*schema.context, *schema.dense)},
        rows=len(table),
        label=label,
    )
    users = as_text(table.column(scan.user), name=scan.user, label=label)
    items = as_text(table.column(scan.item), name=scan.item, label=label)
    return {
        "user": schema.users.rows(users).astype(np.int32),
        "item": schema.items.rows(items).astype(np.int32),
        "label": scan.labels(table).astype(np.float32),
        "context": context.numpy(),
        "dense": dense.numpy(),
    }


def _rows(columns: Columns, table: pa.Table, scan: Scan) -> RankingRows:
    users = as_text(table.column(scan.user), name=scan.user, label=scan.files.label)
    person = np.unique(hash_strings(users), return_inverse=True)[1].astype(np.int32)
    return RankingRows(
        user=torch.from_numpy(columns["user"]),
        item=torch.from_numpy(columns["item"]),
        label=torch.from_numpy(columns["label"]),
        context=torch.from_numpy(columns["context"]),
        dense=torch.from_numpy(columns["dense"]),
        history=None,
        person=torch.from_numpy(person),
    )


def _draw(
    held: list[Columns], rows: int, generator: np.random.Generator
) -> tuple[Columns, list[Columns]]:
    """Take rows at random out of a buffer; return them and what stays."""
    joined = {name: np.concatenate([part[name] for part in held]) for name in held[0]}
    total = len(joined["label"])
    chosen = generator.choice(total, rows, replace=False)
    # What leaves makes room that rows from the end fill, so that a draw costs the batch.
    kept = total - rows
    stays = np.ones(total, dtype=bool)
    stays[chosen] = False
    tail = kept + np.flatnonzero(stays[kept:])
    holes = chosen[chosen < kept]
    batch = {name: values[chosen] for name, values in joined.items()}
    for values in joined.values():
        values[holes] = values[tail]
    return batch, [{name: values[:kept] for name, values in joined.items()}]


def _streamable(config: RankingDataConfig, label: Label) -> None:
    problems = []
    if label.sampled:
        problems.append(
            f"--label '{label}' (label=) draws negatives, which needs the whole log at once: "
            "stream logs that have a label, or use prepare_ranking_data()"
        )
    if config.split != "random":
        problems.append(f"--split {config.split} (split=) needs the whole log at once: random")
    if config.history:
        problems.append(
            "history= needs the whole log at once: give 0, or use prepare_ranking_data()"
        )
    if problems:
        raise UsageError("; ".join(problems))
