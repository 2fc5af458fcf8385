"""Pairs of related items, the ground truth of retrieval; intervals and rank correlations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError
from semid.results import Result
from semid.seeds import numpy_generator

CONFIDENCE = 0.95
"""Coverage of all intervals."""

_REMEMBERED = 4_000_000  # draws of clusters that are kept for the next estimate: 32 MB

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairCounts(Result):
    """How many pairs a result is about."""

    pool: int  # items in the pool
    pairs: int  # number of pairs
    queries: int  # number of different query items
    clusters: int  # users, or query items where there are no users; intervals are taken over these
    by_user: bool  # whether ``clusters`` are users
    unknown: int  # pairs left out because an item is not in the pool
    same: int  # pairs left out because both items are the same


@dataclass(frozen=True)
class ItemPairs:
    """Pairs (a, b): from item a, item b should be found."""

    queries: Rows = field(repr=False, compare=False)  # row of a in the pool, int64 ``(pairs,)``
    # row of b, never equal to a's: the query is no candidate of its own
    targets: Rows = field(repr=False, compare=False)
    # user of each pair, whom intervals are taken over; without users, the row of a
    users: Rows = field(repr=False, compare=False)
    pool: int  # this and the others are those of `PairCounts`
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


def require_pool(name: str, rows: npt.NDArray[Any], pairs: ItemPairs) -> None:
    """Raise `InputError` where there is not one row per item of the pool."""
    if len(rows) != pairs.pool:
        raise InputError(f"{name} holds {len(rows)} items, the pool {pairs.pool}; give the same")


def item_pairs(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    pool: int,
    users: npt.ArrayLike | None = None,
) -> ItemPairs:
    """Return pairs of rows of the pool, and counts of what was left out.

    ``first`` and ``second`` ``(pairs,)`` are the rows of query and target items, -1 outside the
    pool; ``users`` are integers, and without them intervals are taken over query items. Raises
    `InputError` where no pair is left.
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


@dataclass(frozen=True)
class Estimate(Result):
    """A number with the ends of its percentile bootstrap interval.

    These are None where there is no interval: one cluster, or none asked for.
    """

    value: float
    low: float | None = None
    high: float | None = None
    # value of every draw ``(replicates,)``; equal clusters and seeds are drawn alike, so that the
    # draws of two models differ by what the models differ
    draws: Floats | None = field(default=None, repr=False, compare=False)


def cluster_sums(clusters: npt.NDArray[Any], values: Floats) -> Floats:
    """Add up ``values`` (rows, sums) by cluster ``(rows,)``: ``(clusters, sums)``, sorted."""
    inverse = np.unique(clusters, return_inverse=True)[1]
    return np.stack([np.bincount(inverse, weights=column) for column in values.T], axis=1)


def row_groups(values: npt.NDArray[Any]) -> Floats:
    """Add up values ``(rows,)`` in at most 2,000 groups of rows: ``(groups, 1)``.

    Intervals over rows draw groups, so that their cost does not grow with the rows.
    """
    return cluster_sums(np.arange(len(values)) % 2000, values.astype(np.float64)[:, None])


def _draws(clusters: int, replicates: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Draw clusters with replacement; yield how often each is drawn ``(clusters,)``."""
    rng = numpy_generator(seed, "bootstrap")
    for _ in range(replicates):
        yield np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)


@functools.lru_cache(maxsize=2)  # users, and groups of rows
def _remembered_draws(clusters: int, replicates: int, seed: int) -> Floats:
    """Return the draws as ``(replicates, clusters)``: a report estimates dozens of numbers."""
    return np.array(list(_draws(clusters, replicates, seed)), dtype=np.float64)


def bootstrap(
    sums: Floats,
    statistic: Callable[[Floats], Floats],
    *,
    replicates: int,
    seed: int,
    confidence: float = CONFIDENCE,
) -> tuple[Estimate, ...]:
    """Estimate functions of totals with percentile intervals over clusters.

    Whole users are drawn, since the pairs of one user depend on each other. ``statistic`` maps
    totals ``(batch, sums)`` to values ``(batch, values)``; draws whose value is NaN are left out
    of its interval. ``sums`` (clusters, sums) are each cluster's share in the totals.
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
    # The totals are linear in how often each cluster is drawn.
    few = clusters * replicates <= _REMEMBERED
    draws = _remembered_draws if few else _draws
    totals = np.array([weights @ sums for weights in draws(clusters, replicates, seed)])
    # One call for all draws; a ratio whose denominator was 0 in a draw is NaN and left out.
    drawn = statistic(totals)
    result = []
    for value, column in zip(point, drawn.T, strict=True):
        usable = column[np.isfinite(column)]
        if not len(usable):
            result.append(Estimate(float(value)))
            continue
        low, high = np.quantile(usable, [(1 - confidence) / 2, (1 + confidence) / 2])
        result.append(Estimate(float(value), float(low), float(high), column))
    return tuple(result)


def differ(a: Estimate | Proportion, b: Estimate | Proportion) -> bool:
    """Return whether the 95 % interval of the difference of two values excludes 0.

    It is taken over paired draws where both have them. Else the intervals are combined as if they
    were independent, which is wider for models that were measured on the same items. Values without
    intervals differ where they are not equal.
    """
    first, second = getattr(a, "draws", None), getattr(b, "draws", None)
    if first is not None and second is not None and len(first) == len(second):
        drawn = first - second
        tail = (1 - CONFIDENCE) / 2
        low, high = np.nanquantile(drawn, [tail, 1 - tail])
        return bool(low > 0 or high < 0)
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return a.value != b.value
    if a.value < b.value:
        a, b = b, a
    # Newcombe 1998, method 10: the ends that face each other, as legs of a right triangle.
    return a.value - b.value > math.hypot(a.value - a.low, b.high - b.value)  # type: ignore[operator]


@dataclass(frozen=True)
class Proportion(Result):
    """A share in [0, 1] of ``trials``, with the ends of its confidence interval (Wilson)."""

    value: float
    low: float
    high: float
    trials: int


def proportion(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> Proportion:
    """Return a share with its Wilson interval of coverage ``confidence``, inside [0, 1]."""
    if not 0 <= successes <= trials or trials < 1 or not 0 < confidence < 1:
        raise UsageError(
            f"successes={successes}, trials={trials}, confidence={confidence}: 0 <= successes <= "
            "trials, trials >= 1 and 0 < confidence < 1 are needed"
        )
    # Wilson: the shares p from which the observed one is within z standard errors of p itself.
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials)
    half *= math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(center - half, 0.0)
    high = 1.0 if successes == trials else min(center + half, 1.0)
    return Proportion(share, low, high, trials)


def average_ranks(values: npt.NDArray[Any]) -> Floats:
    """Return the rank of each value ``(n,)``, from 1; equal values share the mean of theirs."""
    inverse, counts = np.unique(values, return_inverse=True, return_counts=True)[1:]
    # Equal values have the ranks last - count + 1 to last, whose mean they share.
    mean: Floats = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
    return mean


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float | None:
    """Return Spearman's rank correlation of two ``(n,)``, ties sharing their mean rank.

    None with fewer than two pairs or where one side is constant.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"values to correlate have shapes {a.shape} and {b.shape}; (n,) twice")
    if len(a) < 2:
        return None
    # Pearson's correlation of the ranks, centered at their mean (n + 1) / 2.
    a, b = (average_ranks(each) - (len(a) + 1) / 2 for each in (a, b))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip(a @ b / scale, -1.0, 1.0)) if scale > 0 else None


def rank_agreement(
    flips: npt.ArrayLike, proxies: Mapping[str, npt.ArrayLike]
) -> dict[str, float | None]:
    """Return how well each proxy ranks measured flip rates over tokenizers and levels.

    ``flips`` and the proxies, such as the overlap rate and the margin proxy, are ``(rows,)`` at one
    scale, one row per tokenizer and level. None where the correlation is not defined.
    """
    measured = np.asarray(flips, np.float64)
    for name, values in proxies.items():
        if np.shape(values) != measured.shape:
            raise InputError(
                f"proxy '{name}' has shape {np.shape(values)}, flips {measured.shape}; one value "
                "per row is needed on both sides"
            )
    return {name: spearman(measured, values) for name, values in proxies.items()}
