"""Rows in memory: one part of the data, its histories, and training batches cut from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.recommenders.ranking.schema import Inputs
from semid.training.batches import epoch_batches, process_share, steps_per_epoch
from semid.training.distributed import rank, world_size


@dataclass(frozen=True)
class HistoryIndex:
    """The items that each row's user interacted with before it, as spans of one array."""

    items: Tensor  # ``(events,)`` int32 catalogue rows, oldest first within a history
    spans: Tensor  # ``(rows, 2)`` int64 begin and end (exclusive) of each row's history
    length: int  # largest number of items of a history

    def of(self, rows: Tensor) -> Tensor:
        """Return ``(n, length)`` catalogue rows, newest first, padded with 0."""
        span = self.spans[rows]
        # Count back from the end; what lies before the begin belongs to somebody else and becomes
        # padding.
        positions = span[:, 1:] - 1 - torch.arange(self.length, device=span.device)
        if not len(self.items):
            return torch.zeros_like(positions)
        return torch.where(positions >= span[:, :1], self.items[positions.clamp(min=0)].long(), 0)

    def to(self, device: torch.device) -> HistoryIndex:
        """Move the tensors."""
        return HistoryIndex(self.items.to(device), self.spans.to(device), self.length)


@dataclass(frozen=True)
class RankingRows:
    """Rows of one part."""

    user: Tensor  # ``(rows,)`` int32 rows of the user vocabulary
    item: Tensor  # ``(rows,)`` int32 rows of the catalogue
    label: Tensor  # ``(rows,)`` float32, 0 or 1
    context: Tensor  # ``(rows, columns)`` int32
    dense: Tensor  # ``(rows, columns)`` float32
    history: HistoryIndex | None  # histories, or None
    # ``(rows,)`` int32 numbers that distinguish users, also those that training did not see; for
    # metrics per user
    person: Tensor

    @classmethod
    def of(
        cls,
        columns: Mapping[str, npt.NDArray[Any]],
        *,
        person: npt.NDArray[np.integer[Any]],
        history: HistoryIndex | None = None,
    ) -> RankingRows:
        """Make rows from the arrays ``user``, ``item``, ``label``, ``context`` and ``dense``."""
        return cls(
            **{name: torch.from_numpy(values) for name, values in columns.items()},
            history=history,
            person=torch.from_numpy(person.astype(np.int32)),
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.label)

    def batch(self, rows: Tensor) -> tuple[Inputs, Tensor]:
        """Return the inputs and labels of ``rows`` (n,)."""
        item = self.item[rows].long()
        history = item.new_zeros((len(item), 0)) if self.history is None else self.history.of(rows)
        inputs = Inputs(
            self.user[rows].long(), item, self.context[rows].long(), self.dense[rows], history
        )
        return inputs, self.label[rows]

    def blocks(self, size: int) -> Iterator[Inputs]:
        """Yield the inputs of all rows in order, ``size`` rows at a time."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield self.batch(torch.arange(start, stop, device=self.label.device))[0]

    def to(self, device: torch.device) -> RankingRows:
        """Move every tensor."""
        if self.label.device == device:
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self,
            **{name: value.to(device) for name, value in values.items() if value is not None},
        )


class BatchSource(Protocol):
    """Where training batches come from."""

    steps_per_epoch: int  # batches per epoch

    def batches(self, epoch: int, first: int) -> Iterator[tuple[tuple[Inputs, Tensor], float]]:
        """Yield ``((inputs, labels), weight)`` of an epoch from step ``first`` on."""
        ...


class MemoryBatches:
    """Batches of rows in memory: a permutation per epoch, one gather per column."""

    def __init__(self, rows: RankingRows, *, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = steps_per_epoch(len(rows), batch_size)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[tuple[Inputs, Tensor], float]]:
        """Yield ``((inputs, labels), weight)`` of an epoch from step ``first`` on."""
        # The order is a function of seed and epoch; every process takes its share of each batch.
        batches = epoch_batches(len(self.rows), self.batch_size, seed=self.seed, epoch=epoch)
        device = self.rows.label.device
        for batch in batches[first:]:
            share, weight = process_share(batch, rank=rank(), world=world_size())
            yield self.rows.batch(torch.from_numpy(share).to(device)), weight
