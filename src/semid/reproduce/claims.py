"""Claims of a paper as data, and the evaluator that decides each of them from the rows of a ledger.

A claim says one thing or several (`Statement`), each about all data sets that its words cover. A
statement is a difference that should be positive: of one metric between two selections of rows,
paired over seeds (`Contrast`), on every data set and, where its words cover several, with every
ranking model.

The rule of the verdicts, and why its error rate does not depend on the number of comparisons:

1. A data set gives one value, the mean over seeds, models and fusion: these share its split and its
   tokenizers, so only data sets are independent of each other.
2. A statement is judged by one interval, Student's over the values of its data sets: the random
   effects estimate with equal weights. It covers differences between data sets and noise of seeds,
   and its level of 95 % holds for unequal variances too (Bakirov and Szekely 2006; Ibragimov and
   Mueller 2010). Weights by variances that three seeds estimate would not keep it.
3. A claim holds if the intervals of all its statements lie above 0: at most 2.5 % of false claims
   do, however many statements they have (intersection-union test).
4. A claim is contradicted if the interval of some statement lies below 0 at Bonferroni's level for
   the number of statements, the first step of Holm: at most 2.5 % of true claims are.
5. A claim is judged when every run that its words cover is there; before that it is incomplete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from semid.reproduce.intervals import CONFIDENCE, Difference, mean_difference, within

Row = Mapping[str, Any]
Metric = Callable[[Row], float | None]
"""Reads one number from a row; None where the row lacks it."""
Verdict = Literal["holds", "contradicted", "does not show", "incomplete", "not run"]


class Rows:
    """Rows of one paper's ledger, looked up by what they are."""

    def __init__(self, rows: Sequence[Row], missing: Sequence[Row] = ()) -> None:
        # ``missing`` are the cells of the recipe that have no row yet.
        self.rows, self.missing = list(rows), list(missing)

    def protocol(self, variant: str = "") -> Rows:
        """Return the rows of a variant, by default of the main protocol."""
        rows, missing = (
            [row for row in part if row.get("variant", "") == variant]
            for part in (self.rows, self.missing)
        )
        return Rows(rows, missing)

    def where(self, **selection: Any) -> list[Row]:
        """Return the rows that have these values; a key that a row lacks counts as empty."""
        return _matching(self.rows, selection)

    def lacking(self, **selection: Any) -> int:
        """Return how many runs of the recipe with these values have no row yet."""
        return len(_matching(self.missing, selection))

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

    def planned(self, key: str, **selection: Any) -> list[Any]:
        """Return the values of a key in the rows, then those of runs that are missing."""
        cells = _matching([*self.rows, *self.missing], selection)
        return list(dict.fromkeys(cell[key] for cell in cells if key in cell))

    def differences(
        self,
        metric: Metric,
        a: Mapping[str, Any],
        b: Mapping[str, Any],
        *,
        metric_b: Metric | None = None,
    ) -> dict[int, float]:
        """Return the difference of a metric by seed, of the seeds that both selections have."""
        left, right = self.by_seed(metric, **a), self.by_seed(metric_b or metric, **b)
        return {seed: left[seed] - right[seed] for seed in sorted(set(left) & set(right))}

    def difference(
        self, metric: Metric, a: Mapping[str, Any], b: Mapping[str, Any]
    ) -> Difference | None:
        """Return the mean paired difference of a metric over the seeds that both have."""
        values = self.differences(metric, a, b)
        return mean_difference(list(values.values())) if values else None


def _matching(rows: Sequence[Row], selection: Mapping[str, Any]) -> list[Row]:
    return [r for r in rows if all(r.get(k, "") == v for k, v in selection.items())]


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
    """Return the metric at a path into a row: ``-keys.joined.by.dots@noise scale``.

    ``log2`` before the path takes the logarithm: what grows with the size of a codebook can be
    compared between data sets in bits alone.
    """
    if path.startswith("log2 "):
        value_of = metric(path.removeprefix("log2 "))
        return lambda row: math.log2(v) if (v := value_of(row)) is not None and v > 0 else None
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


# What a claim compares -------------------------------------------------------------------------


def interval_text(difference: Difference, digits: int) -> str:
    """Write mean and interval."""
    form = f"+.{digits}f"
    if math.isnan(difference.low):
        return f"{difference.mean:{form}}"
    return f"{difference.mean:{form}} [{difference.low:{form}}, {difference.high:{form}}]"


@dataclass(frozen=True)
class Comparison:
    """One comparison on one data set; a positive difference is in the claim's favor."""

    name: str
    difference: Difference | None  # over seeds; None where it was not run
    missing: int = 0  # runs of the recipe that it still lacks

    @property
    def complete(self) -> bool:
        """Whether all of its runs are there."""
        return self.difference is not None and not self.missing


@dataclass(frozen=True)
class Contrast:
    """A difference that a claim predicts to be positive, on whatever data set."""

    name: str
    metric: Metric
    # Selections of the rows that should be higher, and of the others.
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    metric_b: Metric | None = None  # of the others; None takes ``metric``
    model: str = ""  # ranking model, part of the comparison's name

    def compare(
        self, rows: Rows, data: str, margin: float | None = None
    ) -> tuple[Comparison, dict[int, float]]:
        """Return the comparison on one data set, and its difference by seed."""
        on = {"data": data, "model": self.model} if self.model else {"data": data}
        a, b = {**on, **self.a}, {**on, **self.b}
        values = rows.differences(self.metric, a, b, metric_b=self.metric_b)
        difference = mean_difference(list(values.values())) if values else None
        if margin is not None:
            difference = within(difference, margin)
        missing = rows.lacking(**a) + (rows.lacking(**b) if a != b else 0)
        return Comparison(f"{', '.join(on.values())}: {self.name}", difference, missing), values


@dataclass(frozen=True)
class Statement:
    """One thing that a claim says, with its comparisons and the estimate over data sets."""

    name: str
    comparisons: tuple[Comparison, ...]
    pooled: Difference | None  # None where nothing was run
    margin: float | None = None  # the claim is that the difference is smaller, either way
    digits: int = 4  # decimals to show
    confidence: float = CONFIDENCE

    @property
    def complete(self) -> bool:
        """Whether all that its words cover has run."""
        return all(c.complete for c in self.comparisons)

    def estimate(self, statements: int = 1) -> Difference | None:
        """Return the estimate, at Bonferroni's level where it is one of several statements."""
        if self.pooled is None:
            return None
        at = self.pooled.at(1 - (1 - self.confidence) / statements)
        return at if self.margin is None else within(at, self.margin)

    def __str__(self) -> str:
        """Write name, estimate and interval."""
        estimate = self.estimate()
        text = "not run" if estimate is None else interval_text(estimate, self.digits)
        return f"{self.name}: {text}"


def pool(
    name: str,
    values: Mapping[str, Mapping[int, float]],
    comparisons: Sequence[Comparison],
    **options: Any,
) -> Statement:
    """Return a statement from its differences by data set and seed.

    The interval is Student's over the means of data sets; over seeds where it is about one alone.
    """
    by_set = [list(of_seeds.values()) for of_seeds in values.values() if of_seeds]
    differences = by_set[0] if len(values) == 1 and by_set else [fmean(each) for each in by_set]
    pooled = mean_difference(differences) if differences else None
    return Statement(name, tuple(comparisons), pooled, **options)


@dataclass(frozen=True)
class Family:
    """Contrasts that are averaged within a data set (models, fusion): one statement."""

    name: str
    contrasts: tuple[Contrast, ...]
    margin: float | None = None
    digits: int = 4

    def state(self, rows: Rows, sets: Sequence[str], confidence: float = CONFIDENCE) -> Statement:
        """Return the statement from the rows of these data sets."""
        comparisons: list[Comparison] = []
        values: dict[str, dict[int, float]] = {}
        for data in sets:
            results = [contrast.compare(rows, data, self.margin) for contrast in self.contrasts]
            comparisons += [comparison for comparison, _ in results]
            # What has not run is missing in the mean too; the statement is incomplete then.
            ran = [by_seed for _, by_seed in results if by_seed]
            seeds = set.intersection(*map(set, ran)) if ran else set()
            values[data] = {seed: fmean(each[seed] for each in ran) for seed in sorted(seeds)}
        options = {"margin": self.margin, "digits": self.digits, "confidence": confidence}
        return pool(self.name, values, comparisons, **options)


Statements = Callable[[Rows, Sequence[str]], Sequence[Statement]]
"""Statements that need code, from the rows and the names of the data sets."""


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what decides it."""

    id: str  # anchor on the page
    where: str  # section, table or figure of the paper
    sentence: str  # the claim in short
    test: str  # what decides it here, in words
    families: Sequence[Family | Statements] = field(default=(), repr=False)  # what it says
    equal_terms: bool = True  # False where one side gets more than the other
    note: str = ""  # what a reader must know besides
    data: Sequence[str] = ()  # data sets that its words name; empty for all
    variant: str = ""  # protocol whose runs decide it


@dataclass(frozen=True)
class ClaimResult:
    """A claim, the verdict on it, and the statements that decided it."""

    claim: Claim
    verdict: Verdict
    statements: tuple[Statement, ...]

    @property
    def comparisons(self) -> list[Comparison]:
        """Every comparison of every statement."""
        return [c for one in self.statements for c in one.comparisons]

    @property
    def evidence(self) -> str:
        """The estimate of the only statement, or how many lie on either side of 0."""
        estimates = [e for one in self.statements if (e := one.estimate()) is not None]
        if len(self.statements) == 1:
            return "".join(interval_text(e, self.statements[0].digits) for e in estimates)
        above, below = sum(e.low > 0 for e in estimates), sum(e.high < 0 for e in estimates)
        return f"{above} above 0, {below} below, of {len(self.statements)}"


def decide(claim: Claim, statements: Sequence[Statement]) -> ClaimResult:
    """Give the verdict on a claim; *does not show* is no proof of the contrary."""
    count = len(statements)

    def above(one: Statement) -> bool:
        estimate = one.estimate()
        return estimate is not None and estimate.low > 0

    def below(one: Statement) -> bool:
        estimate = one.estimate(count)
        return estimate is not None and estimate.high < 0

    verdict: Verdict = "does not show"
    if all(one.pooled is None for one in statements):
        verdict = "not run"
    elif not all(one.complete for one in statements):
        verdict = "incomplete"
    elif all(map(above, statements)):
        verdict = "holds"
    elif any(map(below, statements)):
        verdict = "contradicted"
    return ClaimResult(claim, verdict, tuple(statements))


def evaluate(claims: Callable[[Rows], Sequence[Claim]], rows: Rows) -> list[ClaimResult]:
    """Decide every claim of a paper from the rows of a ledger and what of the recipe they lack."""
    results = []
    for one in claims(rows.protocol()):
        part = rows.protocol(one.variant)
        covered = list(one.data or part.planned("data") or ["any data set"])
        statements: list[Statement] = []
        for family in one.families:
            if isinstance(family, Family):
                statements.append(family.state(part, covered))
            else:
                statements += family(part, covered)
        results.append(decide(one, statements))
    return results
