"""How many items share an id, exact copies of an input counted apart; capacity by segment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError
from semid.health._counters import (
    bucket_keys,
    check_codes,
    pack_bits,
    require_same_sizes,
)
from semid.results import Result


@dataclass(frozen=True)
class Collisions(Result):
    """How items fall into buckets; a bucket is all items of one whole id.

    "Collision rate" means two things in the literature; both have a field of their own here.
    """

    renamed: ClassVar[dict[str, str]] = {
        "shared_share": "colliding_item_rate",
        "shared_share_distinct": "colliding_item_rate_distinct",
    }

    items: int  # number of items
    unique_ids: int  # number of different ids
    collision_rate: float  # ``1 - unique_ids / items``
    colliding_item_rate: float  # share of the items whose id at least one other item has
    largest_bucket: int  # items in the fullest bucket
    # bucket size -> number of buckets of that size, by size
    histogram: Mapping[int, int] = field(repr=False)
    # different (id, input) pairs, so that exact copies of an input count once. This field and the
    # following ones are None without hashes of the inputs
    distinct_items: int | None = None
    # rows that are exact copies of an earlier row; they collide whatever the tokenizer
    duplicate_items: int | None = None
    collision_rate_distinct: float | None = None  # ``1 - unique_ids / distinct_items``
    # share of the distinct items that share their id with a different input
    colliding_item_rate_distinct: float | None = None
    # different inputs in the bucket that holds most of them
    largest_bucket_distinct: int | None = None


def _run_lengths(ordered: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the lengths of the runs of equal values in a sorted array."""
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    return np.diff(np.append(starts, len(ordered)))


def _distinct_sizes(
    keys: npt.NDArray[np.uint64], groups: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], int]:
    """Return how many different inputs each bucket holds, and how many items are copies."""
    ordered = np.sort(groups)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return _run_lengths(np.sort(keys)), 0
    # Only the few items whose input occurs twice are sorted by bucket and input.
    place = np.minimum(np.searchsorted(repeated, groups), len(repeated) - 1)
    candidates = np.flatnonzero(repeated[place] == groups)
    candidates = candidates[np.lexsort((groups[candidates], keys[candidates]))]
    key, group = keys[candidates], groups[candidates]
    is_copy = (key[1:] == key[:-1]) & (group[1:] == group[:-1])
    # The first of several copies stays, so no bucket becomes empty.
    distinct = np.ones(len(keys), bool)
    distinct[candidates[1:][is_copy]] = False
    return _run_lengths(np.sort(keys[distinct])), len(candidates) - len(repeated)


def _bucket_rates(histogram: Mapping[int, int]) -> tuple[int, int, float, float, int]:
    """Return items, ids, ``1 - ids/items``, share of colliding items, and the largest bucket."""
    ids = sum(histogram.values())
    items = sum(size * count for size, count in histogram.items())
    colliding = items - histogram.get(1, 0)
    return items, ids, (items - ids) / items, colliding / items, max(histogram)


def _histogram(sizes: npt.NDArray[np.int64]) -> dict[int, int]:
    counts = np.bincount(sizes)
    return {int(size): int(counts[size]) for size in np.flatnonzero(counts)}


def collisions(
    codes: npt.ArrayLike, *, duplicate_groups: npt.ArrayLike | None = None
) -> Collisions:
    """Count how many items share their id.

    Args:
        codes: integers ``(items, levels)``.
        duplicate_groups: one integer per item, equal exactly for items whose inputs are exact
            copies, such as `row_hashes` of the embeddings; copies are then counted apart.

    Returns:
        A `Collisions`.

    Raises:
        InputError: bad codes, or groups of another length than the codes.

    Cost: a sort of the items; 8 bytes per item beside the codes for ids of up to 64 bits.
    """
    keys = bucket_keys(codes)
    histogram = _histogram(_run_lengths(np.sort(keys)))
    # Every rate follows from how many buckets there are of each size.
    rates = _bucket_rates(histogram)
    if duplicate_groups is None:
        return Collisions(*rates, histogram)
    groups = np.asarray(duplicate_groups)
    if groups.shape != (len(keys),) or not np.issubdtype(groups.dtype, np.integer):
        raise InputError(
            f"duplicate_groups have shape {groups.shape} and dtype {groups.dtype}; one integer "
            f"for each of the {len(keys)} items is needed"
        )
    distinct_sizes, copies = _distinct_sizes(keys, groups.astype(np.uint64))
    distinct = _bucket_rates(_histogram(distinct_sizes))
    return Collisions(*rates, histogram, distinct[0], copies, *distinct[2:])


def part_of(words: npt.NDArray[np.uint64], parts: int) -> npt.NDArray[np.int64]:
    """Return a part for each id by a hash of its packed ``words`` (items, n): ``(items,)``."""
    if parts < 1:
        raise UsageError(f"parts={parts}: give at least 1")
    state = np.zeros(len(words), np.uint64)
    for column in words.T:  # SplitMix64's finaliser, word after word
        state += column + np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(30)
        state *= np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
        state *= np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state % np.uint64(parts)).astype(np.int64)


class CollisionCounter:
    """Collects codes and, optionally, hashes of the inputs, block by block or shard by shard.

    Holds the packed id of every item (8 bytes per item for up to 64 bits) and its hash (8 more).
    Where that is too much for one machine, several machines collect some of the items each,
    `split` distributes the ids so that equal ids meet in one part, one counter per part counts
    them, and `merge_collisions` adds up the results.

    Args:
        codebook_sizes: K of each level, ``(levels,)``.
    """

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self._bits = [max((size - 1).bit_length(), 1) for size in self.codebook_sizes]
        # Levels are packed into as few 64-bit words as possible; each span shares one word.
        self._spans: list[slice] = []
        start = 0
        for level in range(len(self._bits)):
            if sum(self._bits[start : level + 1]) > 64:
                self._spans.append(slice(start, level))
                start = level
        self._spans.append(slice(start, len(self._bits)))
        # Words of the ids ``(batch, words)`` and groups ``(batch,)`` of each block.
        self._blocks: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64] | None]] = []

    def update(
        self, codes: npt.ArrayLike, *, duplicate_groups: npt.ArrayLike | None = None
    ) -> None:
        """Add a block of codes ``(batch, levels)`` with, optionally, their `row_hashes`."""
        block = check_codes(codes, self.codebook_sizes)
        groups = None if duplicate_groups is None else np.asarray(duplicate_groups, np.uint64)
        if groups is not None and groups.shape != (len(block),):
            raise InputError(
                f"duplicate_groups have shape {groups.shape}; ({len(block)},) is needed"
            )
        words = np.stack([pack_bits(block[:, s], self._bits[s]) for s in self._spans], axis=1)
        self._blocks.append((words, groups))

    def merge(self, other: CollisionCounter) -> None:
        """Add what another counter over the same codebooks has collected."""
        require_same_sizes(self.codebook_sizes, other.codebook_sizes)
        self._blocks += other._blocks

    def __len__(self) -> int:
        """Count the items collected."""
        return sum(len(words) for words, _ in self._blocks)

    def split(self, parts: int) -> list[CollisionCounter]:
        """Distribute copies of the items over ``parts`` counters by their id.

        Equal ids are in the same part, whichever counter they come from.
        """
        counters = [CollisionCounter(self.codebook_sizes) for _ in range(parts)]
        for words, groups in self._blocks:
            owner = part_of(words, parts)
            for part, counter in enumerate(counters):
                rows = owner == part
                if rows.any():
                    block = words[rows], None if groups is None else groups[rows]
                    counter._blocks.append(block)
        return counters

    def result(self) -> Collisions:
        """Return the `Collisions` of everything collected so far.

        Raises:
            InputError: nothing was collected, or only some blocks have hashes.
        """
        if not self._blocks:
            raise InputError("no codes were counted yet; call update first")
        words, groups = self._joined()
        return collisions(words, duplicate_groups=groups)

    def _joined(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64] | None]:
        """Return columns that are equal exactly for equal ids, and the groups."""
        groups = [g for _, g in self._blocks if g is not None]
        if groups and len(groups) != len(self._blocks):
            raise InputError(
                f"{len(groups)} of {len(self._blocks)} blocks have duplicate_groups; give them "
                "with every block or with none"
            )
        words = np.concatenate([w for w, _ in self._blocks])
        if words.shape[1] > 1:
            # One column per word; its ranks are equal exactly where the words are.
            ranks = [np.unique(column, return_inverse=True)[1] for column in words.T]
            words = np.stack([rank.astype(np.uint64) for rank in ranks], axis=1)
        return words, np.concatenate(groups) if groups else None


def merge_collisions(parts: Sequence[Collisions]) -> Collisions:
    """Add up results of parts that have no id in common.

    Exact for everything that is counted by id. ``duplicate_items`` is exact where equal inputs
    have equal ids, as after every encoder. Copies that a later step gave different ids are in
    different parts and count there as different inputs.

    Args:
        parts: results of the counters that `CollisionCounter.split` gave, or of disjoint ids.

    Raises:
        InputError: no parts, or only some of them counted copies.
    """
    if not parts:
        raise InputError("there are no parts to add up; give at least one")
    known = [part for part in parts if part.distinct_items is not None]
    if known and len(known) != len(parts):
        raise InputError(
            f"{len(known)} of {len(parts)} parts know which inputs are copies; give hashes to all "
            "of them or to none"
        )
    histogram = _add_histograms(part.histogram for part in parts)
    rates = _bucket_rates(histogram)
    if not known:
        return Collisions(*rates, histogram)
    distinct = sum(part.distinct_items or 0 for part in parts)
    # A rate times its total gives back the whole number of items it was computed from.
    colliding = sum(
        round((part.colliding_item_rate_distinct or 0.0) * (part.distinct_items or 0))
        for part in parts
    )
    return Collisions(
        *rates,
        histogram,
        distinct_items=distinct,
        duplicate_items=sum(part.duplicate_items or 0 for part in parts),
        collision_rate_distinct=(distinct - rates[1]) / distinct,
        colliding_item_rate_distinct=colliding / distinct,
        largest_bucket_distinct=max(part.largest_bucket_distinct or 0 for part in parts),
    )


def _add_histograms(histograms: Iterable[Mapping[int, int]]) -> dict[int, int]:
    return dict(sorted(sum(map(Counter, histograms), Counter()).items()))


@dataclass(frozen=True)
class Capacity(Result):
    """Shares of the id space by segment of the items, for example by popularity."""

    ids: int  # number of different ids
    # for each segment, bucket size -> items of the segment in buckets of that size
    histograms: tuple[dict[int, int], ...]

    @property
    def items(self) -> tuple[int, ...]:
        """Items of each segment."""
        return tuple(sum(histogram.values()) for histogram in self.histograms)

    @property
    def capacity_shares(self) -> tuple[float, ...]:
        """Share of all ids that each segment holds; an id of several items is divided evenly."""
        return tuple(
            sum(items / size for size, items in sorted(histogram.items())) / self.ids
            for histogram in self.histograms
        )

    @property
    def colliding_item_rates(self) -> tuple[float, ...]:
        """Share of each segment's items whose id another item has; 0 for an empty segment."""
        return tuple(
            (items - histogram.get(1, 0)) / max(items, 1)
            for items, histogram in zip(self.items, self.histograms, strict=True)
        )


class CapacityCounter:
    """Collects codes and segments block by block; merged and split as `CollisionCounter`.

    Args:
        codebook_sizes: K of each level, ``(levels,)``.
        segments: number of segments, at least 1.
    """

    def __init__(self, codebook_sizes: Sequence[int], segments: int) -> None:
        if segments < 1:
            raise UsageError(f"segments={segments}: give at least 1")
        self.segments = segments
        # The segment of an item takes the place of the hash of its input.
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
        """Distribute the items by their id, see `CollisionCounter.split`."""
        counters = []
        for ids in self._ids.split(parts):
            counters.append(CapacityCounter(self._ids.codebook_sizes, self.segments))
            counters[-1]._ids = ids
        return counters

    def result(self) -> Capacity:
        """Return the `Capacity` of everything collected so far; empty if that is nothing."""
        if not len(self):
            return Capacity(0, tuple({} for _ in range(self.segments)))
        words, segments = self._ids._joined()
        # Size of each item's bucket over all segments, then a histogram of them per segment.
        _, groups, counts = np.unique(bucket_keys(words), return_inverse=True, return_counts=True)
        sizes = counts[groups]
        histograms = tuple(_histogram(sizes[segments == s]) for s in range(self.segments))
        return Capacity(len(counts), histograms)


def merge_capacities(parts: Sequence[Capacity]) -> Capacity:
    """Add up results of parts that have no id in common.

    Raises:
        InputError: no parts, or parts of different segments.
    """
    if len({len(part.histograms) for part in parts}) != 1:
        raise InputError("give at least one part, and parts over the same segments")
    by_segment = zip(*(part.histograms for part in parts), strict=True)
    histograms = tuple(_add_histograms(histograms) for histograms in by_segment)
    return Capacity(sum(part.ids for part in parts), histograms)
