"""Bootstrap intervals over users: whole users are drawn, since one user's pairs hang together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.errors import UsageError
from semid.results import Result
from semid.seeds import numpy_generator

__all__ = ["Estimate", "bootstrap", "cluster_sums"]

Floats = npt.NDArray[np.float64]


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
    """Add up the rows of each cluster.

    Args:
        clusters: cluster of each row, ``(rows,)``.
        values: ``(rows, sums)``.

    Returns:
        float64 ``(clusters, sums)``, clusters in sorted order.
    """
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
    """Estimate functions of totals with intervals over clusters.

    Args:
        sums: each cluster's share in the totals, ``(clusters, sums)``.
        statistic: totals ``(batch, sums)`` to values ``(batch, values)``; a value may be NaN
            where it is not defined.
        replicates: draws of as many clusters as there are, with replacement; 0 gives no
            intervals.
        confidence: coverage, between 0 and 1.
        seed: of the draws.

    Returns:
        One `Estimate` a value; replicates whose value is NaN are left out of its interval.

    Raises:
        UsageError: replicates or confidence out of range.

    Cost: ``replicates * clusters * sums``.
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
        weights = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)
        totals[replicate] = weights @ sums
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
