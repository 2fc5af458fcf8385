"""How popular and rare items share the id space: collisions and capacity by segment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError
from semid.health import bucket_keys, check_codes, usage_from_counts
from semid.results import Result

SEGMENTS = ("head", "mid", "tail", "unseen")


@dataclass(frozen=True)
class PopularitySegment(Result):
    """Collisions and capacity of the items of one popularity segment."""

    renamed: ClassVar[dict[str, str]] = {"shared_share": "colliding_item_rate"}

    name: str  # ``head``, ``mid``, ``tail``, or ``unseen`` for items without interactions
    items: int  # number of its items
    interactions: int  # number of their interactions
    interaction_share: float  # the same as a share of all
    unique_ids: int  # different ids they hold
    collision_rate: float  # ``1 - unique_ids / items`` inside the segment
    colliding_item_rate: float  # share of its items that share their id with any other item
    shared_with_head: float  # share of its items that share their id with another item of the head
    mean_bucket: float  # mean number of items in the bucket of an item of the segment
    # share of all ids that the segment holds; an id of several items is divided evenly among them
    capacity_share: float
    perplexity: tuple[float, ...]  # per level, ``exp(H)`` of the segment's code frequencies


@dataclass(frozen=True)
class PopularityHealth(Result):
    """Collisions and capacity by popularity."""

    head: float  # share of the items with interactions that make the head
    mid: float  # share that makes the mid
    segments: tuple[PopularitySegment, ...]  # those with items, most popular first
    interactions_in_shared_ids: float  # share of all interactions with items that share their id


def popularity_segments(
    counts: npt.ArrayLike, *, head: float = 0.1, mid: float = 0.4
) -> npt.NDArray[np.int64]:
    """Assign items to head, mid, tail and unseen (0 to 3, int64) by their interactions.

    ``head`` and ``mid`` are shares of the items with interactions; the rest is the tail. Items
    with equal counts ``(items,)`` are in one segment, the more popular of those they would be
    split over: the order of the items decides nothing.
    """
    array = np.asarray(counts)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or (array < 0).any():
        raise InputError(
            f"interaction counts have shape {array.shape} and dtype {array.dtype}; one "
            "non-negative integer per item is needed"
        )
    if not 0 < head < 1 or mid < 0 or head + mid > 1:
        raise UsageError(f"head={head}, mid={mid}: 0 < head, 0 <= mid and head + mid <= 1 needed")
    ranked = np.sort(array[array > 0])[::-1]
    if not len(ranked):
        raise InputError("no item has an interaction, so there is no popularity")

    # The least count inside each segment, were it cut by rank alone.
    def least(share: float) -> int:
        # 0.2 + 0.4 is a little over 0.6: round before counting an item more for it.
        return int(ranked[max(math.ceil(round(share * len(ranked), 6)), 1) - 1])

    head_least, mid_least = least(head), least(head + mid)
    # From the least popular to the most: each line overwrites those that belong further up.
    segment = np.full(len(array), 3, np.int64)
    segment[array > 0] = 2
    segment[(array >= mid_least) & (array > 0)] = 1
    segment[(array >= head_least) & (array > 0)] = 0
    return segment


def popularity_health(
    codes: npt.ArrayLike,
    counts: npt.ArrayLike,
    *,
    head: float = 0.1,
    mid: float = 0.4,
) -> PopularityHealth:
    """Measure collisions and capacity of popular and rare items separately.

    Codes are integers ``(items, levels)``, counts interactions ``(items,)``; ``head`` and ``mid``
    are those of `popularity_segments`. Cost: a sort of the items.
    """
    array, popularity = check_codes(codes), np.asarray(counts)
    segment = popularity_segments(popularity, head=head, mid=mid)
    if len(segment) != len(array):
        raise InputError(f"codes hold {len(array)} items and counts {len(segment)}")
    # Bucket of each item, size of each bucket, and how many other head items share the item's id.
    bucket = np.unique(bucket_keys(array), return_inverse=True)[1]
    sizes = np.bincount(bucket)
    heads = np.bincount(bucket[segment == 0], minlength=len(sizes))
    other_heads = heads[bucket] - (segment == 0)
    total = int(popularity.sum())
    segments = []
    for number, name in enumerate(SEGMENTS):
        rows = np.flatnonzero(segment == number)
        if not len(rows):
            continue
        buckets = bucket[rows]
        unique = len(np.unique(buckets))
        interactions = int(popularity[rows].sum())
        perplexity = tuple(
            usage_from_counts(np.bincount(array[rows, level])).perplexity
            for level in range(array.shape[1])
        )
        segments.append(
            PopularitySegment(
                name=name,
                items=len(rows),
                interactions=interactions,
                interaction_share=interactions / total,
                unique_ids=unique,
                collision_rate=1 - unique / len(rows),
                colliding_item_rate=float((sizes[buckets] > 1).mean()),
                shared_with_head=float((other_heads[rows] > 0).mean()),
                mean_bucket=float(sizes[buckets].mean()),
                capacity_share=float((1.0 / sizes[buckets]).sum() / len(sizes)),
                perplexity=perplexity,
            )
        )
    shared = float(popularity[sizes[bucket] > 1].sum() / total)
    return PopularityHealth(head, mid, tuple(segments), shared)
