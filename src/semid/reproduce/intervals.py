"""Paired differences of runs with the same seeds, and Student's intervals of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from semid.errors import UsageError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference and its interval of 95 %."""

    mean: float
    low: float  # NaN with one pair
    high: float
    pairs: int  # values behind the mean

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def at(self, confidence: float) -> Difference:
        """Return the same mean with Student's interval of another confidence."""
        if self.pairs < 2:
            return self
        wide, usual = (
            student_quantile(0.5 + share / 2, self.pairs - 1) for share in (confidence, CONFIDENCE)
        )
        half = (self.high - self.low) / 2 * wide / usual
        return Difference(self.mean, self.mean - half, self.mean + half, self.pairs)

    def __str__(self) -> str:
        """Return the mean, the interval and, if it holds 0, that no difference is seen."""
        if math.isnan(self.low):
            return f"{self.mean:+.4f}"
        note = "" if self.shown else " (no difference seen)"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{note}"


def mean_difference(differences: Sequence[float]) -> Difference:
    """Return the mean of at least one difference with Student's interval of 95 %."""
    values = np.asarray(differences, dtype=np.float64)
    mean, pairs = float(values.mean()), len(values)
    if pairs < 2:
        return Difference(mean, math.nan, math.nan, pairs)
    half = student_quantile(0.5 + CONFIDENCE / 2, pairs - 1)
    half *= float(values.std(ddof=1)) / math.sqrt(pairs)
    return Difference(mean, mean - half, mean + half, pairs)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Return the mean of ``a - b`` with Student's interval of 95 %."""
    if len(a) != len(b) or not len(a):
        raise UsageError(
            f"{len(a)} and {len(b)} values cannot be paired; give one of each per seed"
        )
    return mean_difference([x - y for x, y in zip(a, b, strict=True)])


def within(difference: Difference | None, margin: float) -> Difference | None:
    """Turn a difference into the claim that it is smaller than a margin, either way."""
    if difference is None:
        return None
    # Positive where the whole interval lies within the margin, negative where it lies outside.
    low, high = difference.low, difference.high
    distance = margin - abs(difference.mean)
    # The interval of |difference| runs from its end nearest to 0 (0 itself where the interval
    # holds 0) to the farthest; taken from the margin, the farthest becomes the lower end.
    # With one seed both ends are NaN, and stay so.
    nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    farthest = max(abs(low), abs(high))
    return Difference(distance, margin - farthest, margin - nearest, difference.pairs)


@cache
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
