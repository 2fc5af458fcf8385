"""Who gets how much room in the id space, counted in parts that can be added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError
from semid.health._collisions import CollisionCounter, bucket_keys

__all__ = ["Capacity", "CapacityCounter", "merge_capacities"]


@dataclass(frozen=True)
class Capacity:
    """Room in the id space by segment of the items, for example by popularity.

    Attributes:
        ids: different ids in all.
        histograms: for each segment, bucket size -> items of the segment in buckets of that size.
    """

    ids: int
    histograms: tuple[dict[int, int], ...]

    @property
    def items(self) -> tuple[int, ...]:
        """Items of each segment."""
        return tuple(sum(found.values()) for found in self.histograms)

    @property
    def capacity_shares(self) -> tuple[float, ...]:
        """Share of all ids that each segment holds; an id that several hold is divided evenly."""
        return tuple(
            sum(items / size for size, items in sorted(found.items())) / self.ids
            for found in self.histograms
        )

    @property
    def shared_shares(self) -> tuple[float, ...]:
        """Share of each segment's items whose id another item has; 0 for an empty segment."""
        return tuple(
            sum(items for size, items in found.items() if size > 1) / max(sum(found.values()), 1)
            for found in self.histograms
        )


class CapacityCounter:
    """Collects codes and segments block by block; `split` and `merge_capacities` as for collisions.

    Args:
        codebook_sizes: K of each level, ``(levels,)``.
        segments: number of segments, at least 1.
    """

    def __init__(self, codebook_sizes: Sequence[int], segments: int) -> None:
        if segments < 1:
            raise UsageError(f"segments={segments}: give at least 1")
        self.segments = segments
        self._ids = CollisionCounter(codebook_sizes)

    def __len__(self) -> int:
        """Count the items collected."""
        return len(self._ids)

    def update(self, codes: npt.ArrayLike, segments: npt.ArrayLike) -> None:
        """Add a block of codes ``(batch, levels)`` and the segment of each item ``(batch,)``.

        Raises:
            InputError: bad codes, or segments of another length or out of range.
        """
        numbers = np.asarray(segments)
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < self.segments):
            raise InputError(
                f"segments run from {numbers.min()} to {numbers.max()}; they are 0 to "
                f"{self.segments - 1}"
            )
        self._ids.update(codes, duplicate_groups=numbers)

    def merge(self, other: CapacityCounter) -> None:
        """Add what another counter over the same codebooks and segments has collected."""
        if other.segments != self.segments:
            raise UsageError(
                f"counters over {self.segments} and {other.segments} segments cannot be merged"
            )
        self._ids.merge(other._ids)

    def split(self, parts: int) -> list[CapacityCounter]:
        """Share the items out by their id, see `CollisionCounter.split`."""
        found = []
        for ids in self._ids.split(parts):
            counter = CapacityCounter(self._ids.codebook_sizes, self.segments)
            counter._ids = ids
            found.append(counter)
        return found

    def result(self) -> Capacity:
        """Return the `Capacity` of everything collected so far; empty if that is nothing."""
        words, segments = self._ids.collected()
        if not len(words):
            return Capacity(0, tuple({} for _ in range(self.segments)))
        _, groups, counts = np.unique(bucket_keys(words), return_inverse=True, return_counts=True)
        sizes = counts[groups]
        histograms = []
        for segment in range(self.segments):
            found, items = np.unique(sizes[segments == segment], return_counts=True)
            histograms.append(dict(zip(found.tolist(), items.tolist(), strict=True)))
        return Capacity(len(counts), tuple(histograms))


def merge_capacities(parts: Sequence[Capacity]) -> Capacity:
    """Add up what was counted in parts that have no id in common.

    Raises:
        InputError: no parts, or parts of different segments.
    """
    if len({len(part.histograms) for part in parts}) != 1:
        raise InputError("give at least one part, and parts over the same segments")
    histograms: list[dict[int, int]] = [{} for _ in parts[0].histograms]
    for part in parts:
        for whole, found in zip(histograms, part.histograms, strict=True):
            for size, items in found.items():
                whole[size] = whole.get(size, 0) + items
    return Capacity(sum(part.ids for part in parts), tuple(histograms))
