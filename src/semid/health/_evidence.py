"""How well numbers of Semantic IDs predict recommendations, as the committed runs measured it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from semid.results import Result

EVIDENCE_FILE = Path(__file__).with_name("evidence.json")
"""Written from the ledger of ``semid reproduce predict`` by ``make results``."""


@dataclass(frozen=True)
class Predictor(Result):
    """How a number ranks fitted tokenizers by the quality of recommendations."""

    correlation: float  # rank correlation, mean over data sets; negative where lower is better
    low: float  # 95 % interval over tokenizers and users
    high: float
    pairs_right: float  # share of pairs of tokenizers ranked right where others gave the sign

    @property
    def predicts(self) -> bool:
        """Whether the interval excludes 0, and more pairs than half are ranked right."""
        return (self.low > 0 or self.high < 0) and self.pairs_right > 0.5


@dataclass(frozen=True)
class Evidence(Result):
    """What is known about one outcome."""

    data_sets: tuple[str, ...] = ()
    tokenizers: int = 0  # fitted ones, on the data set with the fewest
    enough: bool = False  # whether that is enough for a claim; else ``numbers`` is empty
    numbers: Mapping[str, Predictor] = field(default_factory=dict)

    def best(self, names: Sequence[str]) -> str | None:
        """Return which of some numbers ranks most pairs right; None where none predicts."""
        known = [name for name in names if name in self.numbers and self.numbers[name].predicts]
        return max(known, key=lambda name: self.numbers[name].pairs_right, default=None)

    def sentences(self, names: Sequence[str]) -> list[str]:
        """Say which of some numbers predict, the best first, and which do not; none if unknown."""
        known = {name: self.numbers[name] for name in names if name in self.numbers}
        if not self.enough or not known:
            return []
        ordered = sorted(known, key=lambda name: -known[name].pairs_right)
        good = [
            f"{name} ({'higher' if known[name].correlation > 0 else 'lower'} is better) in "
            f"{known[name].pairs_right:.0%}"
            for name in ordered
            if known[name].predicts
        ]
        rest = [name for name in ordered if not known[name].predicts]
        about = f"{len(self.data_sets)} data sets, {self.tokenizers} tokenizers"
        lines = []
        if good:
            lines.append(
                "Pairs of tokenizers ranked right by next-item quality, on data sets that did not "
                f"decide how: {'; '.join(good)} ({about})"
            )
        if rest:
            lines.append(f"Not shown to predict it: {'; '.join(rest)}")
        return lines


@cache
def read_evidence(outcome: str = "next item") -> Evidence:
    """Return what the committed runs say about an outcome: ``next item`` or ``ranking``."""
    document: dict[str, Any] = json.loads(EVIDENCE_FILE.read_text(encoding="utf8"))
    return Evidence.from_dict(document[outcome])
