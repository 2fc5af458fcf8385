"""Rows of one part in memory, as the columns that batches are cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from semid.recommenders.ranking.schema import Inputs

__all__ = ["GivenHistory", "History", "HistoryIndex", "RankingRows"]


class History(Protocol):
    """What each row's user took before it."""

    def of(self, rows: Tensor) -> Tensor:
        """Return ``(n, length)`` catalogue rows, newest first, padded with 0."""
        ...

    def to(self, device: torch.device) -> History:
        """Move the tensors."""
        ...


@dataclass(frozen=True)
class GivenHistory:
    """Histories that are written out.

    Attributes:
        items: ``(rows, length)`` int64 catalogue rows, newest first, padded with 0.
    """

    items: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """Return ``(n, length)`` catalogue rows, newest first, padded with 0."""
        return self.items[rows]

    def to(self, device: torch.device) -> GivenHistory:
        """Move the tensor."""
        return GivenHistory(self.items.to(device))


@dataclass(frozen=True)
class HistoryIndex:
    """Every user's training items in order, and how far each row may look back in them.

    Attributes:
        items: ``(events,)`` int32 rows of the catalogue, user by user, oldest first.
        spans: ``(rows, 2)`` int64: the first event of the row's user, and the end (exclusive) of
            those before the row.
        length: most items of a history.
    """

    items: Tensor
    spans: Tensor
    length: int

    def of(self, rows: Tensor) -> Tensor:
        """Return ``(n, length)`` catalogue rows, newest first, padded with 0."""
        span = self.spans[rows]
        at = span[:, 1:] - 1 - torch.arange(self.length, device=span.device)
        found = self.items[at.clamp(min=0)] if len(self.items) else torch.zeros_like(at)
        return torch.where(at >= span[:, :1], found.long(), 0)

    def to(self, device: torch.device) -> HistoryIndex:
        """Move the tensors."""
        return HistoryIndex(self.items.to(device), self.spans.to(device), self.length)


@dataclass(frozen=True)
class RankingRows:
    """Rows of one part.

    Attributes:
        user: ``(rows,)`` int32 rows of the user vocabulary.
        item: ``(rows,)`` int32 rows of the catalogue.
        label: ``(rows,)`` float32, 0 or 1.
        context: ``(rows, columns)`` int32.
        dense: ``(rows, columns)`` float32.
        history: histories, or None.
        person: ``(rows,)`` int32 numbers that tell users apart, also those that training did not
            see; for figures by user.
    """

    user: Tensor
    item: Tensor
    label: Tensor
    context: Tensor
    dense: Tensor
    history: History | None
    person: Tensor

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.label)

    def batch(self, rows: Tensor) -> tuple[Inputs, Tensor]:
        """Return the inputs and labels of ``rows`` (n,)."""
        item = self.item[rows].long()
        history = item.new_zeros((len(item), 0)) if self.history is None else self.history.of(rows)
        return (
            Inputs(
                self.user[rows].long(),
                item,
                self.context[rows].long(),
                self.dense[rows],
                history,
            ),
            self.label[rows],
        )

    def to(self, device: torch.device) -> RankingRows:
        """Move every tensor."""
        if self.label.device == device:
            return self
        return RankingRows(
            self.user.to(device),
            self.item.to(device),
            self.label.to(device),
            self.context.to(device),
            self.dense.to(device),
            None if self.history is None else self.history.to(device),
            self.person.to(device),
        )
