"""Pairs of related items, the ground truth of all retrieval, and intervals over their users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError
from semid.results import Result
from semid.seeds import numpy_generator

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairCounts(Result):
    """How many pairs a result is about.

    Attributes:
        pool: items in the pool.
        pairs: number of pairs.
        queries: number of different query items.
        clusters: users, or query items where there are no users; intervals are taken over these.
        by_user: whether ``clusters`` are users.
        unknown: pairs left out because an item is not in the pool.
        same: pairs left out because both items are the same.
    """

    pool: int
    pairs: int
    queries: int
    clusters: int
    by_user: bool
    unknown: int
    same: int


@dataclass(frozen=True)
class ItemPairs:
    """Pairs (a, b): from item a, item b should be found.

    Attributes:
        queries: row of a in the pool, int64 ``(pairs,)``.
        targets: row of b in the pool, int64 ``(pairs,)``; never equal to a's.
        users: user of each pair, int64 ``(pairs,)``; where there are no users, the row of a.
            Intervals are taken over these.
        pool: items in the pool.
        unknown: pairs left out because an item is not in the pool.
        same: pairs left out because a = b: the query is no candidate of its own.
        by_user: whether ``users`` are users.
    """

    queries: Rows = field(repr=False, compare=False)
    targets: Rows = field(repr=False, compare=False)
    users: Rows = field(repr=False, compare=False)
    pool: int
    unknown: int
    same: int
    by_user: bool

    def __len__(self) -> int:
        return len(self.queries)

    def counts(self) -> PairCounts:
        """Return the counts, for the record of a result."""
        return PairCounts(
            pool=self.pool,
            pairs=len(self),
            queries=len(np.unique(self.queries)),
            clusters=len(np.unique(self.users)),
            by_user=self.by_user,
            unknown=self.unknown,
            same=self.same,
        )


def item_pairs(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    pool: int,
    users: npt.ArrayLike | None = None,
) -> ItemPairs:
    """Return pairs of rows of the pool, such as consecutive items of held-out users.

    Args:
        first: row of each query item, ``(pairs,)``; -1 where it is not in the pool.
        second: row of each target item, the same.
        pool: items in the pool; rows are 0 to ``pool - 1``.
        users: integer user of each pair; None takes intervals over query items instead.

    Returns:
        An `ItemPairs` that counts what was left out.

    Raises:
        InputError: lengths differ, rows out of range, or no pair is left.
    """
    a, b = np.asarray(first), np.asarray(second)
    clusters = a if users is None else np.asarray(users)
    for name, array in (("first", a), ("second", b), ("users", clusters)):
        if array.shape != (len(a),) or not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"{name} has shape {array.shape} and dtype {array.dtype}; one integer per pair is "
                "needed in each of first, second and users"
            )
    if len(a) and (min(a.min(), b.min()) < -1 or max(a.max(), b.max()) >= pool):
        raise InputError(
            f"rows run from {min(a.min(), b.min())} to {max(a.max(), b.max())}; allowed are 0 to "
            f"{pool - 1}, and -1 for items outside the pool"
        )
    known = (a >= 0) & (b >= 0)
    usable = known & (a != b)
    if not usable.any():
        raise InputError(
            f"no pair is left of {len(a)}: {int((~known).sum())} have an item outside the pool of "
            f"{pool}, {int((known & (a == b)).sum())} pair an item with itself; check that the "
            "interactions and the items share their ids"
        )
    return ItemPairs(
        queries=a[usable].astype(np.int64),
        targets=b[usable].astype(np.int64),
        users=clusters[usable].astype(np.int64),
        pool=pool,
        unknown=int((~known).sum()),
        same=int((known & (a == b)).sum()),
        by_user=users is not None,
    )


def pairs_by_id(
    pool_ids: Sequence[Any] | npt.NDArray[Any],
    first: Sequence[Any] | npt.NDArray[Any],
    second: Sequence[Any] | npt.NDArray[Any],
    *,
    users: npt.ArrayLike | None = None,
) -> ItemPairs:
    """Return pairs of item ids, such as those of a table of related items.

    Args:
        pool_ids: id of every pool row, ``(pool,)``, unique.
        first: id of each query item, ``(pairs,)``.
        second: id of each target item, ``(pairs,)``.
        users: see `item_pairs`.

    Returns:
        An `ItemPairs` in the given direction; ids outside the pool are counted.

    Raises:
        InputError: pool ids that repeat; see `item_pairs` for the rest.
    """
    rows = {item: row for row, item in enumerate(np.asarray(pool_ids).tolist())}
    if len(rows) != len(pool_ids):
        raise InputError(f"pool_ids holds {len(pool_ids) - len(rows)} repeated ids; give each once")
    a = np.array([rows.get(item, -1) for item in np.asarray(first).tolist()], np.int64)
    b = np.array([rows.get(item, -1) for item in np.asarray(second).tolist()], np.int64)
    return item_pairs(a, b, pool=len(rows), users=users)


@dataclass(frozen=True)
class Estimate(Result):
    """A number with a percentile bootstrap interval.

    Attributes:
        value: the estimate on the data as they are.
        low: lower end; None where there is no interval (one cluster, or none asked for).
        high: upper end, the same.
    """

    value: float
    low: float | None = None
    high: float | None = None


def cluster_sums(clusters: npt.NDArray[Any], values: Floats) -> Floats:
    """Add up ``values`` (rows, sums) by cluster ``(rows,)``: ``(clusters, sums)``, sorted."""
    inverse = np.unique(clusters, return_inverse=True)[1]
    return np.stack([np.bincount(inverse, weights=column) for column in values.T], axis=1)


def bootstrap(
    sums: Floats,
    statistic: Callable[[Floats], Floats],
    *,
    replicates: int,
    confidence: float,
    seed: int,
) -> tuple[Estimate, ...]:
    """Estimate functions of totals with percentile intervals over clusters.

    Whole users are drawn, since the pairs of one user depend on each other.

    Args:
        sums: each cluster's share in the totals, ``(clusters, sums)``.
        statistic: totals ``(batch, sums)`` to values ``(batch, values)``; NaN where undefined.
        replicates: draws of as many clusters as there are; 0 gives no intervals.
        confidence: coverage, between 0 and 1.
        seed: of the draws.

    Returns:
        One `Estimate` per value; replicates whose value is NaN are left out of its interval.

    Raises:
        UsageError: replicates or confidence out of range.
    """
    if replicates < 0 or not 0 < confidence < 1:
        raise UsageError(
            f"replicates={replicates} and confidence={confidence}: replicates must not be "
            "negative and 0 < confidence < 1"
        )
    point = statistic(sums.sum(0, keepdims=True))[0]
    clusters = len(sums)
    if clusters < 2 or replicates == 0:
        return tuple(Estimate(float(value)) for value in point)
    rng = numpy_generator(seed, "bootstrap")
    totals = np.empty((replicates, sums.shape[1]))
    for replicate in range(replicates):
        # How often each cluster is drawn; the totals are linear in these weights.
        weights = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)
        totals[replicate] = weights @ sums
    # One call for all draws; a ratio whose denominator was 0 in a draw is NaN and left out.
    drawn = statistic(totals)
    result = []
    for value, column in zip(point, drawn.T, strict=True):
        usable = column[np.isfinite(column)]
        if not len(usable):
            result.append(Estimate(float(value)))
            continue
        low, high = np.quantile(usable, [(1 - confidence) / 2, (1 + confidence) / 2])
        result.append(Estimate(float(value), float(low), float(high)))
    return tuple(result)
