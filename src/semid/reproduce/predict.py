"""Which numbers predict recommendations: what its page needs beside ``papers/predict.toml``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from html import escape
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from semid.health import EVIDENCE_FILE
from semid.report.numbers import KEPT_NEIGHBORS, NUMBERS
from semid.reproduce.claims import Comparison, Row, Rows, Statement, metric, pool
from semid.reproduce.intervals import mean_difference
from semid.reproduce.ledger import RUNS_FILE, read_runs
from semid.reproduce.papers import Line, Paper, average
from semid.reproduce.prediction import (
    GAPS,
    MIN_TOKENIZERS,
    LeftOut,
    Panel,
    Panels,
    bootstrap_correlations,
    mean_correlation,
    rank_correlation,
    ranked_pairs,
    share_right,
    sign_of,
    try_left_out,
)

ALL_NUMBERS = (*NUMBERS, KEPT_NEIGHBORS)
BITS, COLLISIONS = "bits per id", "colliding items"
DRAWS = 400
ENOUGH_SETS, ENOUGH_TOKENIZERS = 3, 12
"""Fewer data sets, or fitted tokenizers on one of them, decide nothing."""


class Outcome(NamedTuple):
    """What numbers should predict: a path into the rows of a recommender."""

    model: str
    path: str


OUTCOMES = {
    "next item": Outcome("composed", "metrics.ndcg_10"),
    "ranking": Outcome("dcnv2", "metrics.auc"),
    "Recall@10": Outcome("composed", "metrics.recall_10"),
    "head": Outcome("composed", "slices.head.ndcg_10"),
    "tail": Outcome("composed", "slices.tail.ndcg_10"),
    "cold": Outcome("composed", "slices.cold.ndcg_10"),
    "ids shared": Outcome("composed, ids shared", "metrics.ndcg_10"),
    "generative": Outcome("generative", "metrics.ndcg_10"),
    "ranking, unseen items": Outcome("dcnv2", "slices.cold.auc"),
}
"""Name of an outcome -> where it is. The first two have a table of their own."""
MAIN = ("next item", "ranking")


def cell(name: str) -> dict[str, Any]:
    """Select the runs of a name: ``model on tokenizer``."""
    model, _, tokenizer = name.partition(" on ")
    return {"model": model, "tokenizer": tokenizer}


# Panels ------------------------------------------------------------------------------------------


def is_fitted(row: Row) -> bool:
    """Whether a row is of a tokenizer that was fitted on its items, and of no control."""
    return not row.get("control")


def has_usual_bits(row: Row) -> bool:
    """Whether a row is of a fitted tokenizer that spends about 24 bits per id."""
    return is_fitted(row) and 23.5 <= (row["numbers"].get(BITS) or 0) <= 24.5


def make_panels(
    rows: Rows,
    outcome: Outcome,
    keep: Callable[[Row], bool] = is_fitted,
    *,
    seed: int | None = None,
) -> dict[str, Panel]:
    """Return the panel of each data set with an outcome of enough tokenizers; one seed, or all."""
    read = metric(outcome.path)
    panels = {}
    for data in rows.names("data", model=outcome.model):
        runs: dict[str, list[Row]] = {}
        for row in rows.where(data=data, model=outcome.model):
            if keep(row) and read(row) is not None and seed in (None, row["seed"]):
                runs.setdefault(row["tokenizer"], []).append(row)
        if len(runs) < MIN_TOKENIZERS:
            continue
        numbers = {
            name: np.array(
                [_mean(row["numbers"].get(name) for row in group) for group in runs.values()]
            )
            for name in ALL_NUMBERS
        }
        grouped = outcome.path == "metrics.ndcg_10"
        first = next(iter(runs.values()))[0].get("user_groups") if grouped else None
        panels[data] = Panel(
            tuple(runs),
            numbers,
            np.array([_mean(map(read, group)) for group in runs.values()]),
            None
            if first is None
            else np.array(
                [
                    np.mean([row["user_groups"]["ndcg_10"] for row in group], axis=0)
                    for group in runs.values()
                ]
            ),
            None if first is None else np.array(first["users"], float),
        )
    return panels


def _mean(values: Any) -> float:
    known = [value for value in values if value is not None]
    return average(known) if known else np.nan


def judged_numbers(panels: Panels) -> list[str]:
    """Return the numbers that have a correlation, the strongest first."""
    strength = {name: mean_correlation(panels, name) for name in ALL_NUMBERS}
    known = [name for name, value in strength.items() if value is not None]
    return sorted(known, key=lambda name: -abs(strength[name] or 0.0))


def is_enough(panels: Panels) -> bool:
    """Whether there are enough runs for a claim."""
    return len(panels) >= ENOUGH_SETS and all(
        len(panel.names) >= ENOUGH_TOKENIZERS for panel in panels.values()
    )


# Claims ------------------------------------------------------------------------------------------


def ranks(
    rows: Rows, sets: Sequence[str], *, outcome: str, numbers: Sequence[str]
) -> Iterator[Statement]:
    """Yield a statement per number: its rank correlation, over seeds and data sets.

    A name with a minus is of a number that is better when lower.
    """
    at = OUTCOMES[outcome]
    by_seed = {seed: make_panels(rows, at, seed=seed) for seed in sorted(rows.names("seed"))}
    for name in numbers:
        sign, number = (-1.0, name[1:]) if name.startswith("-") else (1.0, name)
        values: dict[str, dict[int, float]] = {}
        comparisons = []
        for data in sets:
            values[data] = {}
            for seed, panels in by_seed.items():
                panel = panels.get(data)
                value = None
                if panel is not None:
                    value = rank_correlation(panel.numbers[number], panel.outcome)
                if value is not None:
                    values[data][seed] = sign * value
            runs = list(values[data].values())
            comparisons.append(
                Comparison(
                    f"{data}: {name}",
                    mean_difference(runs) if runs else None,
                    rows.lacking(data=data, model=at.model),
                )
            )
        yield pool(f"{name}, {outcome}", values, comparisons, digits=2)


# Tables ------------------------------------------------------------------------------------------


def run_lines(rows: Rows) -> list[Line]:
    """Return a line per recommender and tokenizer."""
    return [
        Line(f"{model} on {name}", {"model": model, "tokenizer": name})
        for model in rows.names("model")
        for name in rows.names("tokenizer", model=model)
    ]


def _number(value: float | None, form: str = "+.2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def share_right_of(panels: Panels, number: str) -> float | None:
    """Return the share of pairs that a number ranks right where others gave its sign."""
    right = []
    for data, panel in panels.items():
        sign = sign_of({name: each for name, each in panels.items() if name != data}, number)
        if sign is not None:
            pairs = ranked_pairs(sign * panel.numbers[number], panel.outcome)
            right += [good for _, good in pairs]
    return fmean(right) if right else None


def number_table(outcome: str) -> Callable[[Rows], list[list[str]]]:
    """Return what makes the table of an outcome: a line per number, the strongest first."""

    def lines(rows: Rows) -> list[list[str]]:
        at = OUTCOMES[outcome]
        panels = make_panels(rows, at)
        equal, everything = (
            make_panels(rows, at, keep) for keep in (has_usual_bits, lambda row: True)
        )
        numbers = judged_numbers(panels)
        intervals = bootstrap_correlations(panels, numbers, draws=DRAWS, seed=0)
        table = []
        for name in numbers:
            interval = intervals[name]
            others = [each for each in (BITS, COLLISIONS) if each != name]
            count = min(int((~np.isnan(p.numbers[name])).sum()) for p in panels.values())
            table.append(
                [
                    name,
                    f"{len(panels)} x {count}",
                    _number(mean_correlation(panels, name)),
                    "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}",
                    *(
                        "" if name == each else _number(mean_correlation(panels, name, [each]))
                        for each in (BITS, COLLISIONS)
                    ),
                    _number(mean_correlation(panels, name, others)),
                    _number(mean_correlation(equal, name)),
                    _number(mean_correlation(everything, name)),
                    _number(share_right_of(panels, name), ".0%"),
                ]
            )
        return table

    return lines


def outcome_table(rows: Rows) -> list[list[str]]:
    """Write each number's correlation with every outcome, in the order of the first."""
    by_outcome = {name: make_panels(rows, at) for name, at in OUTCOMES.items()}
    return [
        [name, *(_number(mean_correlation(panels, name)) for panels in by_outcome.values())]
        for name in judged_numbers(by_outcome["next item"])
    ]


@lru_cache(maxsize=4)
def trials(rows: Rows, outcome: str) -> dict[str, list[LeftOut]]:
    """Return the data sets left out in turn, for the best number and the best pair of numbers."""
    panels = make_panels(rows, OUTCOMES[outcome])
    if len(panels) < 2:
        return {}
    return {
        "best number": try_left_out(panels, [(name,) for name in ALL_NUMBERS]),
        "best pair of numbers": try_left_out(panels, list(combinations(ALL_NUMBERS, 2))),
    }


def trial_table(rows: Rows) -> list[list[str]]:
    """Write what was chosen on the other data sets, and how it ranks on the one left out."""
    return [
        [
            f"{outcome}, {rule}, {trial.data} left out",
            " and ".join(f"{'-' if s < 0 else ''}{name}" for name, s in trial.signs.items()),
            _number(trial.correlation),
            _number(share_right([trial]), ".0%"),
            str(len(trial.pairs)),
        ]
        for outcome in MAIN
        for rule, found in trials(rows, outcome).items()
        for trial in found
    ]


def gap_table(rows: Rows) -> list[list[str]]:
    """Write the share of pairs ranked right by how far apart the outcomes are."""
    return [
        [
            f"{outcome}, {rule}",
            _number(share_right(found), ".0%"),
            *(_number(share_right(found, low, high), ".0%") for low, high in pairwise(GAPS)),
        ]
        for outcome in MAIN
        for rule, found in trials(rows, outcome).items()
    ]


def enough_table(rows: Rows) -> list[list[str]]:
    """Say for each outcome how much has run, and whether that decides anything."""
    table = []
    for outcome, at in OUTCOMES.items():
        panels = make_panels(rows, at)
        runs = len(rows.where(model=at.model))
        if runs:
            fitted = ", ".join(f"{data} {len(p.names)}" for data, p in panels.items()) or "none"
            enough = "yes" if is_enough(panels) else "no: decides nothing yet"
            table.append([outcome, str(runs), fitted, enough])
    return table


# What the product reads --------------------------------------------------------------------------


def evidence(rows: Rows) -> dict[str, Any]:
    """Return how well numbers predict, as `semid.report.evidence` reads it.

    An outcome with too few runs for a claim has its counts alone.
    """
    document: dict[str, Any] = {}
    for outcome in MAIN:
        panels = make_panels(rows, OUTCOMES[outcome])
        counts = [len(panel.names) for panel in panels.values()]
        about: dict[str, Any] = {
            "data_sets": list(panels),
            "tokenizers": min(counts, default=0),
            "enough": is_enough(panels),
            "numbers": {},
        }
        if about["enough"]:
            numbers = judged_numbers(panels)
            intervals = bootstrap_correlations(panels, numbers, draws=DRAWS, seed=0)
            for name in numbers:
                value, right = mean_correlation(panels, name), share_right_of(panels, name)
                interval = intervals[name]
                if value is not None and right is not None and interval is not None:
                    about["numbers"][name] = {
                        "correlation": round(value, 3),
                        "low": round(interval[0], 3),
                        "high": round(interval[1], 3),
                        "pairs_right": round(right, 3),
                    }
        document[outcome] = about
    return document


def write_evidence(results: str | Path, path: Path = EVIDENCE_FILE) -> None:
    """Write what the ledger in a folder of results says, for verdicts and comparisons to read."""
    rows = read_runs(Path(results) / "predict" / RUNS_FILE)
    full = [row for row in rows if not row["quick"]]
    path.write_text(json.dumps(evidence(Rows(full)), indent=1) + "\n", encoding="utf8")


# The picture -------------------------------------------------------------------------------------

SHOWN = 15
"""Numbers in the picture, the strongest first."""
_LEFT, _RIGHT, _LINE = 230, 620, 24


def picture(rows: Rows) -> str:
    """Draw the correlations of the strongest numbers with next-item quality as SVG."""
    panels = make_panels(rows, OUTCOMES["next item"])
    numbers = judged_numbers(panels)[:SHOWN]
    if not numbers:
        return ""
    intervals = bootstrap_correlations(panels, numbers, draws=DRAWS, seed=0)

    def x(value: float) -> str:
        return f"{_LEFT + (value + 1) / 2 * (_RIGHT - _LEFT):.1f}"

    height = _LINE * (len(numbers) + 2)
    marks = [
        f'<line x1="{x(value)}" x2="{x(value)}" y1="{_LINE}" y2="{height - _LINE}" '
        f'stroke="#222" opacity="{0.6 if value == 0 else 0.2}"/>'
        f'<text x="{x(value)}" y="{height - 6}" text-anchor="middle">{value:+.1f}</text>'
        for value in (-1.0, -0.5, 0.0, 0.5, 1.0)
    ]
    for place, name in enumerate(numbers):
        y, value, interval = _LINE * (place + 1.5), mean_correlation(panels, name), intervals[name]
        marks.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        if interval is not None:
            low, high = map(x, interval)
            marks.append(
                f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="#4269d0" '
                'stroke-width="2"/>'
            )
        marks.append(f'<circle cx="{x(value or 0.0)}" cy="{y}" r="5" fill="#4269d0"/>')
    title = "Rank correlation with NDCG@10, mean over data sets"
    title += "" if is_enough(panels) else ": too few runs, decides nothing"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" role="img" '
        f'aria-label="{title}" font-family="sans-serif" font-size="13" fill="#222">\n'
        # A page shows it as an image, which does not know the page's colors.
        f'<rect width="640" height="{height}" fill="#fff"/>\n'
        f'<text x="{_LEFT}" y="14">{title}</text>\n' + "\n".join(marks) + "\n</svg>\n"
    )


PREDICT = Paper(
    "predict",
    cell,
    lambda rows: {},
    code={
        "picture": picture,
        "ranks": ranks,
        "runs": run_lines,
        "enough": enough_table,
        "outcomes": outcome_table,
        "left out": trial_table,
        "gaps": gap_table,
        **{f"numbers, {outcome}": number_table(outcome) for outcome in MAIN},
    },
)
