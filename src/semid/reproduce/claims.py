"""A claim of a paper, what decides it, and the verdict: holds, does not show, opposite, not run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from semid.reproduce.paired import Difference, paired_difference

__all__ = ["Claim", "Comparison", "Judgement", "Row", "Rows", "judge", "spread", "within"]

Row = Mapping[str, Any]
Verdict = Literal["holds", "does not show", "opposite", "not run"]


@dataclass(frozen=True)
class Claim:
    """What a paper says.

    Attributes:
        id: anchor.
        where: section, table or figure.
        sentence: the claim in short.
        test: what decides it here, in words.
        rule: ``all``: it holds if every comparison is in its favor, for claims that say so;
            ``most``: more than half in its favor and none against.
        equal_terms: False for a comparison that gives one side more than the other.
    """

    id: str
    where: str
    sentence: str
    test: str
    rule: Literal["all", "most"] = "all"
    equal_terms: bool = True


@dataclass(frozen=True)
class Comparison:
    """One comparison; a positive difference is in the claim's favor.

    Attributes:
        name: of what, on which data.
        difference: with its interval; None where it was not run.
        digits: decimals worth showing.
    """

    name: str
    difference: Difference | None
    digits: int = 4

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
        d = self.difference
        if d is None:
            return f"{self.name}: not run"
        if math.isnan(d.low):
            return f"{self.name}: {d.mean:+.{self.digits}f} (one seed: no interval)"
        return f"{self.name}: {d.mean:+.{self.digits}f} " + (
            f"[{d.low:+.{self.digits}f}, {d.high:+.{self.digits}f}]"
        )


@dataclass(frozen=True)
class Judgement:
    """A claim and what the runs say of it.

    Attributes:
        claim: the claim.
        verdict: in a word.
        comparisons: what decided it.
        note: what a reader must know besides.
    """

    claim: Claim
    verdict: Verdict
    comparisons: tuple[Comparison, ...]
    note: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """How many comparisons are in favor, against, open and not run."""
        missing = sum(c.difference is None for c in self.comparisons)
        favor = sum(c.favor for c in self.comparisons)
        against = sum(c.against for c in self.comparisons)
        rest = len(self.comparisons) - missing - favor - against
        return {"favor": favor, "against": against, "open": rest, "not run": missing}

    @property
    def lines(self) -> list[str]:
        """One line a comparison, those not run in one."""
        found = [str(c) for c in self.comparisons if c.difference is not None]
        gone = [c.name for c in self.comparisons if c.difference is None]
        if len(gone) > 1:
            return [*found, f"not run: {len(gone)} comparisons, the first of {gone[0]}"]
        return [*found, *(f"{name}: not run" for name in gone)]


def judge(claim: Claim, comparisons: Sequence[Comparison], *, note: str = "") -> Judgement:
    """Give the verdict on a claim.

    ``opposite`` needs more than half of the comparisons run against the claim and none in its
    favor. Whatever is neither this nor holds by the claim's rule *does not show*: that is no proof
    of the contrary.

    Args:
        claim: the claim.
        comparisons: everything that its words cover; those not run are counted, not guessed.
        note: for the reader.
    """
    judged = Judgement(claim, "not run", tuple(comparisons), note)
    counts = judged.counts
    ran = len(comparisons) - counts["not run"]
    if not ran:
        return judged
    favor, against = counts["favor"], counts["against"]
    enough = favor == ran if claim.rule == "all" else favor > ran / 2 and not against
    verdict: Verdict = "does not show"
    if enough:
        verdict = "holds"
    elif against > ran / 2 and not favor:
        verdict = "opposite"
    return Judgement(claim, verdict, tuple(comparisons), note)


class Rows:
    """Rows of a ledger, looked up by what they are.

    Args:
        rows: of one paper.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def where(self, **wanted: Any) -> list[Row]:
        """Return the rows that have these values; a key a row lacks counts as empty."""
        return [r for r in self.rows if all(r.get(k, "") == v for k, v in wanted.items())]

    def by_seed(self, read: Callable[[Row], float | None], **wanted: Any) -> dict[int, float]:
        """Return a figure by seed; rows without it are left out."""
        found = {}
        for row in self.where(**wanted):
            value = read(row)
            if value is not None:
                found[int(row["seed"])] = float(value)
        return found

    def values(self, read: Callable[[Row], float | None], **wanted: Any) -> list[float]:
        """Return a figure of every seed, in the order of the seeds."""
        return [value for _, value in sorted(self.by_seed(read, **wanted).items())]

    def names(self, key: str, **wanted: Any) -> list[Any]:
        """Return the values of a key in order of appearance."""
        return list(dict.fromkeys(r[key] for r in self.where(**wanted) if key in r))

    def difference(
        self,
        read: Callable[[Row], float | None],
        a: Mapping[str, Any],
        b: Mapping[str, Any],
        *,
        read_b: Callable[[Row], float | None] | None = None,
    ) -> Difference | None:
        """Return the paired difference of a figure over the seeds that both sides have."""
        left, right = self.by_seed(read, **a), self.by_seed(read_b or read, **b)
        seeds = sorted(set(left) & set(right))
        if not seeds:
            return None
        return paired_difference([left[s] for s in seeds], [right[s] for s in seeds])


def within(found: Difference | None, margin: float) -> Difference | None:
    """Turn a difference into the claim that it is smaller than a margin, either way.

    Positive where the whole interval lies within the margin, negative where it lies outside.
    """
    if found is None:
        return None
    if math.isnan(found.low):
        return Difference(margin - abs(found.mean), math.nan, math.nan, found.pairs)
    ends = (abs(found.low), abs(found.high))
    nearest = 0.0 if found.low <= 0 <= found.high else min(ends)
    return Difference(margin - abs(found.mean), margin - max(ends), margin - nearest, found.pairs)


def spread(values: Sequence[float], *, digits: int = 4) -> str:
    """Write mean and standard deviation; one value alone; a dash for none."""
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
