"""How synthetic users move: mostly within a niche, sometimes next door, now and then far away."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["Steps", "walk"]

_REACH = (0.55, 0.25, 0.12, 0.08)
"""Chances that the next item comes from the same niche, aisle, department, or anywhere."""

_LONGEST = 60
_DAY = 86_400
_FIRST_DAY = 1_420_070_400  # 2015-01-01


class Steps(NamedTuple):
    """Interactions of a block of users, grouped by user, oldest first.

    Attributes:
        user: (n,) user within the block.
        item: (n,) row of the item; no user takes an item twice.
        position: (n,) 0 for a user's oldest.
        timestamp: (n,) Unix seconds, rising within a user.
        rating: (n,) 1 to 5; higher for good items, and closer to home.
    """

    user: np.ndarray
    item: np.ndarray
    position: np.ndarray
    timestamp: np.ndarray
    rating: np.ndarray


def walk(
    niche: np.ndarray,
    weight: np.ndarray,
    quality: np.ndarray,
    widths: tuple[int, ...],
    *,
    unit: int,
) -> Callable[[np.random.Generator], Steps]:
    """Prepare the walk over a catalogue.

    Args:
        niche: (items,) niche of each item, numbered so that neighbors lie side by side.
        weight: (items,) popularity, positive.
        quality: (items,) what is added to every rating of the item.
        widths: niches that each reach spans: niche, aisle, department, all.
        unit: users of a block.

    Returns:
        A function that draws a block of users from a generator. Items are sorted by niche, so that
        each reach is one range of their cumulative popularity: a step costs a binary search.
    """
    order = np.argsort(niche, kind="stable")
    cumulative = np.concatenate([[0.0], np.cumsum(weight[order], dtype=np.float64)])
    sorted_niche = niche[order].astype(np.int64)
    bounds = np.searchsorted(sorted_niche, np.arange(widths[-1] + 1))
    chances = np.cumsum(_REACH)[:-1]

    def draw(rng: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        start, stop = cumulative[bounds[low]], cumulative[bounds[high]]
        at = np.searchsorted(cumulative, start + rng.random(len(low)) * (stop - start), "right")
        # Rounding may touch the end of the range, which belongs to the next one.
        places: np.ndarray = np.clip(at - 1, bounds[low], bounds[high] - 1)
        return places

    def block(rng: np.random.Generator) -> Steps:
        lengths = np.minimum(6 + rng.exponential(6.0, unit).astype(np.int64), _LONGEST)
        taste = rng.normal(3.6, 0.4, unit)
        longest = int(lengths.max())
        places = np.zeros((unit, longest), dtype=np.int64)
        reach = np.zeros((unit, longest), dtype=np.int64)
        span = np.array(widths)
        everywhere = np.zeros(unit, dtype=np.int64)
        places[:, 0] = draw(rng, everywhere, everywhere + span[-1])
        for step in range(1, longest):
            still = np.flatnonzero(lengths > step)
            kind = np.searchsorted(chances, rng.random(len(still)), side="right")
            width = span[kind]
            low = sorted_niche[places[still, step - 1]] // width * width
            places[still, step] = draw(rng, low, np.minimum(low + width, span[-1]))
            reach[still, step] = kind
        gaps = rng.exponential(8.0 * _DAY, (unit, longest)).astype(np.int64) + 1
        gaps[:, 0] = rng.integers(0, 3 * 365 * _DAY, unit)
        times = _FIRST_DAY + np.cumsum(gaps, axis=1)
        inside = np.arange(longest) < lengths[:, None]
        user = np.repeat(np.arange(unit), lengths)
        item = order[places[inside]]
        mood = rng.normal(0.0, 0.7, len(item))
        ratings = taste[user] + 0.5 - 0.3 * reach[inside] + quality[item] + mood
        return _first_of_each(user, item, times[inside], np.clip(np.rint(ratings), 1, 5))

    return block


def _first_of_each(
    user: np.ndarray, item: np.ndarray, times: np.ndarray, ratings: np.ndarray
) -> Steps:
    """Keep a user's first of every item, and number what is left."""
    key = user * (int(item.max()) + 1) + item
    keep = np.sort(np.unique(key, return_index=True)[1])
    user = user[keep]
    starts = np.searchsorted(user, user)
    return Steps(user, item[keep], np.arange(len(user)) - starts, times[keep], ratings[keep])
