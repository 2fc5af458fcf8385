"""Claims of a paper as data, and the evaluator that decides each of them from the rows of a ledger.

A claim is its words, the comparisons that its words cover, and the rule that turns them into a
verdict. A comparison is a difference of one metric between two selections of rows, paired over
seeds, on every data set of the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from semid.errors import UsageError

Row = Mapping[str, Any]
Metric = Callable[[Row], float | None]
"""Reads one number from a row; None where the row lacks it."""
Verdict = Literal["holds", "does not show", "opposite", "not run"]


class Rows:
    """Rows of one paper's ledger, looked up by what they are."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def main(self) -> Rows:
        """Return the rows of the main protocol; variants decide no claim."""
        return Rows([row for row in self.rows if not row.get("variant")])

    def where(self, **selection: Any) -> list[Row]:
        """Return the rows that have these values; a key that a row lacks counts as empty."""
        return [r for r in self.rows if all(r.get(k, "") == v for k, v in selection.items())]

    def by_seed(self, metric: Metric, **selection: Any) -> dict[int, float]:
        """Return a metric by seed; rows without it are left out."""
        values = [(int(row["seed"]), metric(row)) for row in self.where(**selection)]
        return {seed: float(value) for seed, value in values if value is not None}

    def values(self, metric: Metric, **selection: Any) -> list[float]:
        """Return a metric of every seed, in the order of the seeds."""
        return [value for _, value in sorted(self.by_seed(metric, **selection).items())]

    def names(self, key: str, **selection: Any) -> list[Any]:
        """Return the values of a key in order of appearance."""
        return list(dict.fromkeys(r[key] for r in self.where(**selection) if key in r))

    def difference(
        self,
        metric: Metric,
        a: Mapping[str, Any],
        b: Mapping[str, Any],
        *,
        metric_b: Metric | None = None,
    ) -> Difference | None:
        """Return the paired difference of a metric over the seeds that both selections have."""
        left, right = self.by_seed(metric, **a), self.by_seed(metric_b or metric, **b)
        seeds = sorted(set(left) & set(right))
        if not seeds:
            return None
        return paired_difference([left[s] for s in seeds], [right[s] for s in seeds])


def _dig(document: Any, path: Sequence[Any]) -> Any:
    """Follow keys and positions into a document; None where a step leads nowhere."""
    for step in path:
        try:
            # Position -1 is the last; a position beyond either end is a missing value.
            document = document[step if isinstance(document, Mapping) else int(step)]
        except (TypeError, ValueError, LookupError):  # None, or no such key or position
            return None
    return document


def metric(path: str) -> Metric:
    """Return the metric at a path into a row: ``-keys.joined.by.dots@noise scale``."""
    # A minus turns the sign, so that higher is better; ``@`` picks the value of one noise scale.
    keys, _, scale = path.removeprefix("-").partition("@")
    *parents, last = keys.split(".")
    sign = -1.0 if path.startswith("-") else 1.0

    def read(row: Row) -> float | None:
        parent = _dig(row, parents)
        value = _dig(parent, [last])
        if scale and value is not None:
            scales = parent["scale"]
            value = value[scales.index(float(scale))] if float(scale) in scales else None
        return None if value is None else sign * float(value)

    return read


def inside(path: Sequence[Any], metric: Metric) -> Metric:
    """Return a metric of the part of a row at a path."""

    def read(row: Row) -> float | None:
        part = _dig(row, path)
        return metric(part) if part else None

    return read


def relative_change(metric: Metric, base: Metric) -> Metric:
    """Return ``metric / base - 1``."""

    def read(row: Row) -> float | None:
        value, reference = metric(row), base(row)
        return None if value is None or not reference else value / reference - 1.0

    return read


@dataclass(frozen=True)
class Comparison:
    """One comparison on one data set; a positive difference is in the claim's favor."""

    name: str
    difference: Difference | None  # None where it was not run
    digits: int = 4  # decimals to show

    @property
    def favor(self) -> bool:
        """Whether the interval lies above 0."""
        return self.difference is not None and self.difference.low > 0

    @property
    def against(self) -> bool:
        """Whether the interval lies below 0."""
        return self.difference is not None and self.difference.high < 0

    def __str__(self) -> str:
        """Write name, mean and interval."""
        d, form = self.difference, f"+.{self.digits}f"
        if d is None:
            return f"{self.name}: not run"
        if math.isnan(d.low):
            return f"{self.name}: {d.mean:{form}} (one seed: no interval)"
        return f"{self.name}: {d.mean:{form}} [{d.low:{form}}, {d.high:{form}}]"


@dataclass(frozen=True)
class Contrast:
    """A difference that a claim predicts to be positive, on whatever data set."""

    name: str
    metric: Metric
    # Selections of the rows that should be higher, and of the others.
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    metric_b: Metric | None = None  # of the others; None takes ``metric``
    margin: float | None = None  # the claim is that the difference is smaller, either way
    model: str = ""  # ranking model, part of the comparison's name
    digits: int = 4  # decimals to show

    def compare(self, rows: Rows, data: str) -> Comparison:
        """Return the comparison on one data set."""
        on = {"data": data, "model": self.model} if self.model else {"data": data}
        a, b = {**on, **self.a}, {**on, **self.b}
        difference = rows.difference(self.metric, a, b, metric_b=self.metric_b)
        if self.margin is not None:
            difference = within(difference, self.margin)
        return Comparison(f"{', '.join(on.values())}: {self.name}", difference, self.digits)


Family = Sequence[Contrast] | Callable[[Rows, str], Sequence[Comparison]]
"""Comparisons that are made on every data set: contrasts, or a function of rows and data set."""


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what decides it."""

    id: str  # anchor on the page
    where: str  # section, table or figure of the paper
    sentence: str  # the claim in short
    test: str  # what decides it here, in words
    families: Sequence[Family] = field(default=(), repr=False)  # what its words cover
    rule: str = "all"  # one of `RULES`
    equal_terms: bool = True  # False where one side gets more than the other
    note: str = ""  # what a reader must know besides
    data: Sequence[str] = ()  # data sets that its words name; empty for all


RULES: Mapping[str, Callable[[Sequence[Comparison]], bool]] = {
    "all": lambda run: all(c.favor for c in run),
    "most": lambda run: (
        sum(c.favor for c in run) > len(run) / 2 and not any(c.against for c in run)
    ),
}
"""Whether a claim holds, given its comparisons that ran. ``all``: every one in its favor, for
claims that say so. ``most``: more than half in its favor and none against."""


@dataclass(frozen=True)
class ClaimResult:
    """A claim, the verdict on it, and the comparisons that decided it."""

    claim: Claim
    verdict: Verdict
    comparisons: tuple[Comparison, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of comparisons in favor, against, open and not run."""
        counts = {"favor": 0, "against": 0, "open": 0, "not run": 0}
        for c in self.comparisons:
            answer = "favor" if c.favor else "against" if c.against else "open"
            counts["not run" if c.difference is None else answer] += 1
        return counts

    @property
    def lines(self) -> list[str]:
        """One line per comparison, several that were not run in one."""
        lines = [str(c) for c in self.comparisons if c.difference is not None]
        missing = [c for c in self.comparisons if c.difference is None]
        if len(missing) < 2:
            return [*lines, *map(str, missing)]
        return [*lines, f"not run: {len(missing)} comparisons, the first of {missing[0].name}"]


def decide(claim: Claim, comparisons: Sequence[Comparison]) -> ClaimResult:
    """Give the verdict on a claim; *does not show* is no proof of the contrary."""
    run = [c for c in comparisons if c.difference is not None]
    verdict: Verdict = "does not show"
    if not run:
        verdict = "not run"
    elif RULES[claim.rule](run):
        verdict = "holds"
    # More than half against the claim and none in its favor.
    elif sum(c.against for c in run) > len(run) / 2 and not any(c.favor for c in run):
        verdict = "opposite"
    return ClaimResult(claim, verdict, tuple(comparisons))


def evaluate(claims: Callable[[Rows], Sequence[Claim]], rows: Rows) -> list[ClaimResult]:
    """Decide every claim of a paper from the rows of a ledger."""
    main = rows.main()
    sets = main.names("data") or ["any data set"]
    results = []
    for one in claims(main):
        comparisons: list[Comparison] = []
        for family in one.families:
            for data in one.data or sets:
                if callable(family):
                    comparisons += family(main, data)
                else:
                    comparisons += [contrast.compare(main, data) for contrast in family]
        results.append(decide(one, comparisons))
    return results


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


# Paired differences of runs with the same seeds -----------------------------------------------


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


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Return the mean of ``a - b`` with Student's interval of 95 %."""
    if len(a) != len(b) or not len(a):
        raise UsageError(
            f"{len(a)} and {len(b)} values cannot be paired; give one of each per seed"
        )
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mean, pairs = float(differences.mean()), len(differences)
    if pairs < 2:
        return Difference(mean, math.nan, math.nan, pairs)
    half = student_quantile(0.975, pairs - 1)
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
