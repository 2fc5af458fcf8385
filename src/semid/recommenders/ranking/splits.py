"""Labels, sampled negatives, and the part of a log that each row belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.ids import hash_strings, mix_hashes, share_mask
from semid.data.interactions import Interactions
from semid.errors import InteractionsError, UsageError, check_choice
from semid.seeds import numpy_generator

SPLITS = ("random", "leave-last-out", "time")
PARTS = ("train", "validation", "test", "cold")
TRAIN, VALIDATION, TEST, COLD = range(4)
COLD_SALT = "cold items"
"""Salt of the hash that holds items out of training."""

DISTRIBUTIONS = ("uniform", "popularity")
MAX_DRAWS = 50
"""Draws per negative; a user without a negative by then has nearly every item of the pool."""

MAX_NEGATIVES = 1_000
"""Largest number of negatives per positive; all of them are held in memory."""

_THRESHOLD = re.compile(r"\s*(\w+)\s*(>=|>)\s*(-?[0-9]+(?:\.[0-9]+)?)\s*")
_SAMPLED = re.compile(r"\s*sampled\(\s*(\w+)\s*(?:,\s*([0-9]+)\s*)?\)\s*")

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Parts = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Label:
    """How rows get their label."""

    column: str = ""  # column that is compared with ``threshold``; empty for sampled negatives
    threshold: float = 0.0  # value the column is compared with
    strict: bool = False  # True for ``>``, False for ``>=``
    # distribution of sampled negatives, ``uniform`` or ``popularity`` (in proportion to training
    # interactions); empty for a threshold
    distribution: str = ""
    negatives: int = 0  # negatives per positive

    @classmethod
    def parse(cls, text: str) -> Label:
        """Read ``rating>=8``, ``rating>3``, ``click>=1`` or ``sampled(uniform,1)``."""
        match = _THRESHOLD.fullmatch(text)
        if match:
            return cls(column=match[1], threshold=float(match[3]), strict=match[2] == ">")
        match = _SAMPLED.fullmatch(text)
        if not match:
            raise UsageError(
                f"--label '{text}' (label=) is neither COLUMN>=NUMBER, COLUMN>NUMBER nor "
                "sampled(uniform,k) or sampled(popularity,k)"
            )
        check_choice("--label sampled", match[1], DISTRIBUTIONS)
        count = int((match[2] or "1").lstrip("0")[:9] or 0)
        if not 1 <= count <= MAX_NEGATIVES:
            raise UsageError(
                f"--label '{text}' (label=) says how many negatives are drawn for each positive; "
                f"give 1 to {MAX_NEGATIVES}"
            )
        return cls(distribution=match[1], negatives=count)

    @property
    def sampled(self) -> bool:
        """Whether negatives are sampled."""
        return bool(self.distribution)

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        if self.sampled:
            return f"sampled({self.distribution},{self.negatives})"
        return f"{self.column}{'>' if self.strict else '>='}{self.threshold:g}"

    def compare(self, values: npt.NDArray[np.floating[Any]]) -> Mask:
        """Return which values ``(rows,)`` of the column are positive."""
        return values > self.threshold if self.strict else values >= self.threshold

    def apply(self, values: npt.NDArray[np.float64]) -> Mask:
        """Label all values ``(rows,)`` of the column."""
        missing = ~np.isfinite(values)
        if missing.any():
            raise InteractionsError(
                f"column '{self.column}' holds {int(missing.sum())} rows without a number (first: "
                f"row {int(np.argmax(missing))}), which have no label under '{self}'; drop them"
            )
        positive = self.compare(values)
        if len(values) and positive.all() != positive.any():
            return positive
        name = "positive" if positive.any() else "negative"
        low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
        raise InteractionsError(
            f"every row is {name} under --label '{self}' (column '{self.column}' runs from "
            f"{low:g} to {high:g}); choose another threshold, or sampled(uniform,1)"
        )


def draw_negatives(
    users: Ints,
    *,
    excluded: tuple[Ints, Ints],
    pool: Ints,
    weights: Ints | None,
    items: int,
    seed: int,
    name: str,
) -> tuple[Ints, Mask]:
    """Draw an item per row that is new to the row's user ``(rows,)``; return items and a mask."""
    # A pair is one integer, so "was it excluded?" is a binary search among sorted integers.
    keys = np.unique(excluded[0] * items + excluded[1])
    generator = numpy_generator(seed, "negatives", name)
    cumulative = None if weights is None else np.cumsum(weights, dtype=np.float64)
    drawn = np.zeros(len(users), dtype=np.int64)
    pending = np.arange(len(users))
    # Rejection sampling: rows whose draw is excluded draw again, so that what remains follows the
    # distribution restricted to the allowed items.
    for _ in range(MAX_DRAWS):
        if not len(pending):
            break
        # By inverse transform: a uniform point falls into an item's stretch of the cumulated
        # weights in proportion to its weight.
        if cumulative is None:
            draws = pool[generator.integers(0, len(pool), len(pending))]
        else:
            points = generator.random(len(pending)) * cumulative[-1]
            positions = np.searchsorted(cumulative, points, side="right")
            draws = pool[np.minimum(positions, len(pool) - 1)]
        drawn[pending] = draws
        candidates = users[pending] * items + draws
        positions = np.minimum(np.searchsorted(keys, candidates), max(len(keys) - 1, 0))
        pending = pending[keys[positions] == candidates] if len(keys) else pending[:0]
    valid = np.ones(len(users), dtype=bool)
    valid[pending] = False
    return drawn, valid


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Return the shares of train, validation and test."""
    shares = tuple(float(share) for share in fractions)
    if len(shares) != 3 or not (min(shares) > 0 and abs(sum(shares) - 1) <= 1e-6):  # NaN fails too
        raise UsageError(
            f"--fractions (fractions=) is {list(shares)}; give three positive "
            "shares that add up to 1, for example 0.8,0.1,0.1"
        )
    return shares[0], shares[1], shares[2]


def split_rows(
    log: Interactions,
    split: str,
    *,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    cold_items: Mask | None = None,
    seed: int = 0,
) -> Parts:
    """Return the part ``(interactions,)`` of each interaction, an index into `PARTS`."""
    check_choice("--split (split=)", split, SPLITS)
    shares = check_fractions(fractions)
    # Cold items leave first, so that the shares are those of the other interactions.
    parts = np.full(len(log), TRAIN, dtype=np.int8)
    cold = np.zeros(len(log), dtype=bool) if cold_items is None else cold_items[log.items]
    parts[cold] = COLD
    rows = np.flatnonzero(~cold)
    if split == "random":
        parts[rows] = _split_randomly(log, rows, shares, seed)
    elif log.order is None:
        raise UsageError(
            f"--split {split} (split=) needs to know what came first, and {log.label} has no "
            "column 'position' or 'timestamp'; name one with --time-column, or take --split random"
        )
    elif split == "time":
        if log.order_column == "position":
            raise UsageError(
                "--split time (split=) needs times that can be compared between users; 'position' "
                "counts within a user: name a time with --time-column"
            )
        parts[rows] = _split_by_time(log.order[rows], shares)
    else:
        ordered = log.by_user()
        parts[ordered] = _leave_last_out(log.users[ordered], parts[ordered])
    for number in (TRAIN, VALIDATION, TEST):
        if not (parts == number).any():
            raise InteractionsError(
                f"--split {split} (split=) of {len(log)} interactions leaves no row for "
                f"{PARTS[number]}; give more interactions or other fractions"
            )
    return parts


def hash_parts(
    users: Any, items: Any, *, fractions: Sequence[float], cold_share: float, seed: int
) -> Parts:
    """Return the part ``(rows,)`` of each row from hashes of its user and item (strings) alone."""
    salt = f"split {seed}"
    pairs = mix_hashes(hash_strings(users, salt=salt), hash_strings(items, salt=salt))
    train, validation, _ = fractions
    parts = np.full(len(pairs), TEST, dtype=np.int8)
    parts[share_mask(pairs, 0.0, train)] = TRAIN
    parts[share_mask(pairs, train, min(train + validation, 1.0))] = VALIDATION
    if cold_share:
        parts[share_mask(hash_strings(items, salt=COLD_SALT), 0.0, cold_share)] = COLD
    return parts


def _split_randomly(log: Interactions, rows: Ints, shares: Sequence[float], seed: int) -> Parts:
    pairs = log.users[rows].astype(np.int64) * len(log.item_ids) + log.items[rows]
    unique, inverse = np.unique(pairs, return_inverse=True)
    # Each distinct pair has a place in a random order, and the order is cut at the shares.
    place = np.empty(len(unique), dtype=np.int64)
    place[numpy_generator(seed, "split").permutation(len(unique))] = np.arange(len(unique))
    cuts = [round(shares[0] * len(unique)), round((shares[0] + shares[1]) * len(unique))]
    return np.searchsorted(cuts, place[inverse], side="right").astype(np.int8)


def _split_by_time(order: npt.NDArray[np.generic], shares: Sequence[float]) -> Parts:
    # Cuts are times, not rows: equal times fall on the same side.
    ranked = np.sort(order)
    last = len(ranked) - 1
    places = [min(round(share * len(ranked)), last) for share in (shares[0], shares[0] + shares[1])]
    return np.searchsorted(ranked[places], order, side="right").astype(np.int8)


def _leave_last_out(users: npt.NDArray[np.int32], parts: Parts) -> Parts:
    """Return the part of each row; rows stand user by user, oldest first, and cold ones stay."""
    rows = np.flatnonzero(parts != COLD)
    counts = np.bincount(users[rows])
    # Each row's distance from the end of its user's interactions.
    from_end = np.cumsum(counts)[users[rows]] - 1 - np.arange(len(rows))
    length = counts[users[rows]]
    parts = parts.copy()
    parts[rows[(from_end == 0) & (length >= 2)]] = TEST
    parts[rows[(from_end == 1) & (length >= 3)]] = VALIDATION
    return parts
