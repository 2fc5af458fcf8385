"""Controls that need no training: the most popular items, and the nearest by their embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from semid.options import Options, option
from semid.recommenders.retrieval.data import Packed, RetrievalItems
from semid.recommenders.retrieval.networks import NextItemModel


@dataclass(frozen=True, kw_only=True)
class ControlOptions(Options):
    """Options of models without training."""

    max_length: int = option(50, ge=1, le=4096, help="Newest items of a history that are read.")


@dataclass(frozen=True, kw_only=True)
class TextKNNOptions(ControlOptions):
    """Options of `TextKNN`."""

    decay: float = option(
        0.0,
        ge=0,
        le=1,
        help="Weight of an item of the history against the next newer one; 0 reads the last alone.",
    )


class Popularity(NextItemModel):
    """Items by their number of training interactions, the same for every user."""

    options: ClassVar[type[Options]] = ControlOptions
    trains: ClassVar[bool] = False
    scores_unseen: ClassVar[bool] = False

    def __init__(self, items: RetrievalItems, options: ControlOptions) -> None:
        super().__init__(items, by_item=True)
        self.counts = nn.Buffer(torch.from_numpy(items.counts.astype(np.float32)), persistent=False)

    def scores(self, batch: Packed) -> Tensor:
        """Return the counts, for each history."""
        return self.counts.expand(len(batch.places), -1)


class TextKNN(NextItemModel):
    """Items by the cosine of their embedding to the last item, or to a mean of the history."""

    options: ClassVar[type[Options]] = TextKNNOptions
    needs: ClassVar[tuple[str, ...]] = ("vectors",)
    trains: ClassVar[bool] = False

    def __init__(self, items: RetrievalItems, options: TextKNNOptions) -> None:
        super().__init__(items, by_item=True)
        assert items.vectors is not None
        self.decay = options.decay
        unit = functional.normalize(torch.from_numpy(items.vectors), dim=1)
        self.unit = nn.Buffer(unit, persistent=False)

    def scores(self, batch: Packed) -> Tensor:
        """Return the cosines of all items to the mean of each history."""
        segments, positions = batch.segments.flatten(), batch.positions.flatten()
        real = segments > 0
        # Age of a place: how many newer ones its history has.
        owner = segments[real] - 1
        last = torch.zeros(len(batch.places), dtype=torch.long).scatter_reduce(
            0, owner, positions[real], "amax"
        )
        age = (last[owner] - positions[real]).float()
        weights = torch.where(age == 0, 1.0, self.decay**age)
        vectors = self.unit[batch.items.flatten()[real]] * weights[:, None]
        means = torch.zeros(len(batch.places), self.unit.shape[1]).index_add_(0, owner, vectors)
        return functional.normalize(means, dim=1) @ self.unit.T
