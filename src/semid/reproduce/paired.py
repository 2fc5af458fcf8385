"""Paired differences of runs with the same seeds, with Student's intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semid.errors import UsageError


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its interval."""

    mean: float
    low: float  # NaN with one pair
    high: float
    pairs: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Return the mean, the interval and, if it holds 0, that no difference is seen."""
        if math.isnan(self.low):
            return f"{self.mean:+.4f}"
        note = "" if self.shown else " (no difference seen)"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{note}"


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95
) -> Difference:
    """Return the mean of ``a - b`` with Student's interval."""
    if len(a) != len(b) or not len(a):
        raise UsageError(
            f"{len(a)} and {len(b)} values cannot be paired; give one of each per seed"
        )
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mean, pairs = float(differences.mean()), len(differences)
    if pairs < 2:
        return Difference(mean, math.nan, math.nan, pairs)
    half = student_quantile((1 + confidence) / 2, pairs - 1)
    half *= float(differences.std(ddof=1)) / math.sqrt(pairs)
    return Difference(mean, mean - half, mean + half, pairs)


def student_quantile(share: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution for a share in (0.5, 1), by bisection."""
    if not 0.5 < share < 1 or freedom < 1:
        raise UsageError(f"share={share}, freedom={freedom}: 0.5 < share < 1 and freedom >= 1")
    # Double the upper end until it is beyond the quantile, then halve the bracket.
    low, high = 0.0, 1.0
    while _student(high, freedom) < share:
        high *= 2
    for _ in range(200):
        midpoint = (low + high) / 2
        low, high = (midpoint, high) if _student(midpoint, freedom) < share else (low, midpoint)
    return (low + high) / 2


def _student(t: float, freedom: int) -> float:
    """Distribution function for t >= 0, by the finite sums for whole degrees of freedom."""
    # With t = sqrt(n) tan(angle) the integral of the density is a finite sum of powers of the
    # cosine: odd n begins with the angle itself, even n with the sine.
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle) ** 2
    if freedom % 2:
        term = total = math.cos(angle) if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine * (k - 1) / k
            total += term
        inside = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine * (k - 1) / k
            total += term
        inside = math.sin(angle) * total
    return 0.5 + inside / 2
