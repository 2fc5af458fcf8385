"""Several tokenizers side by side: ranks and trade-offs by view, never one score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from semid.data.embeddings import open_embeddings
from semid.data.interactions import read_interactions
from semid.diagnostics.overlap import REPORT_SCALE
from semid.diagnostics.pairs import Estimate, Proportion, differ
from semid.errors import UsageError
from semid.health import read_evidence
from semid.report.diagnose import diagnose
from semid.report.figure import DECLARATIONS
from semid.report.measure import agreement_with_proxies
from semid.report.results import (
    ComparedAgreement,
    Comparison,
    Diagnosis,
    MetricRow,
    NoiseResponse,
    PairResults,
)
from semid.tokenizers.base import Tokenizer

VERDICTS: dict[str, tuple[str, str]] = {
    level: (texts["word"], texts["sentence"]) for level, texts in DECLARATIONS["verdicts"].items()
}
"""Level of a verdict -> word and sentence."""

VIEWS: dict[str, str] = DECLARATIONS["views"]
"""Key of a view -> its title."""

Value = float | Estimate | Proportion
"""A value that is exact on these items, or one with an interval."""

Read = Callable[[Diagnosis], Value | None]
"""Returns the value of a metric, None where it was not measured."""


def _flips(response: NoiseResponse) -> tuple[Proportion, Estimate]:
    """Return the share of ids that change at noise 0.2, and the mean share of codes that do."""
    point = next(p for p in response.flips.points if p.scale == 0.2)
    # The levels share their items, so the mean of the intervals covers the mean.
    value, low, high = (
        fmean(getattr(code, end) for code in point.code) for end in ("value", "low", "high")
    )
    return point.prefix[-1], Estimate(value, low, high)


def _at_50(rates: Mapping[int, Estimate | None]) -> Estimate | None:
    """Return the value at K = 50, or at the largest K there is in a small pool."""
    return rates.get(50, rates[max(rates)])


_PAIR_READERS: dict[str, Callable[[PairResults], Estimate | None]] = {
    "weighted_auc": lambda measured: measured.aucs.aucs["weighted"],
    "retention": lambda measured: _at_50(measured.retrieval.retention[0].above_chance),
    "discrete_hits": lambda measured: _at_50(measured.discrete.depths[-1].rates),
}


def _of_pairs(key: str, relation: str | None = None) -> Read:
    """Return a metric of the test users' pairs, or of a kind of known relation."""

    def value(d: Diagnosis) -> Estimate | None:
        if relation is not None:
            measured = (d.relations or {}).get(relation)
        else:
            measured = None if d.behavior is None else d.behavior.measured
        return None if measured is None else _PAIR_READERS[key](measured)

    return value


def _effective_rank(d: Diagnosis) -> Value | None:
    spaces = () if d.geometry is None else d.geometry.spaces
    if d.geometry is not None and d.geometry.effective_rank is not None:
        return d.geometry.effective_rank
    return next((s.effective_rank for s in spaces if s.name == "decoder(codes)"), None)


def _least_effective(d: Diagnosis) -> float | None:
    shares = [o.at(REPORT_SCALE).effective_size / o.codebook_size for o in d.overlap]
    return min(shares, default=None)


_READ: dict[str, Read] = {
    "id_flips": lambda d: None if d.flips is None else _flips(d.flips.input)[0],
    "code_flips": lambda d: None if d.flips is None else _flips(d.flips.input)[1],
    "latent_flips": lambda d: None if d.flips is None else _flips(d.flips.innermost)[0],
    "relative_error": lambda d: d.reconstruction.relative_error["all"],
    "cosine": lambda d: d.reconstruction.mean_cosine,
    **{key: _of_pairs(key) for key in _PAIR_READERS},
    "effective_rank": _effective_rank,
    "least_effective": _least_effective,
    "geometry_share": lambda d: max((o.at(1.0).geometry_share for o in d.overlap), default=None),
    "least_perplexity": lambda d: min(u.perplexity / u.codebook_size for u in d.usage),
    "dead": lambda d: float(sum(u.dead for u in d.usage)),
    "collision_rate": lambda d: d.verdict.collisions.collision_rate,
    "colliding_item_rate": lambda d: d.verdict.collisions.colliding_item_rate,
}
METRICS = {
    key: (MetricRow(key=key, **{"lead": False, **texts}, values=(), ranks=()), _READ[key])
    for key, texts in DECLARATIONS["metrics"].items()
}
"""What models are compared by: a row of the table without values, and the value of a diagnosis."""


_NUMBER_OF = {
    "id_flips": "flips of ids, input",
    "code_flips": "flips of codes, input",
    "latent_flips": "flips of ids, latent",
    "relative_error": "relative error",
    "cosine": "cosine",
    "weighted_auc": "weighted AUC",
    "retention": "retention",
    "discrete_hits": "hit rate, ids",
    "effective_rank": "effective rank",
    "least_effective": "least K_eff",
    "geometry_share": "geometry part of R",
    "least_perplexity": "least perplexity",
    "dead": "dead codes",
    "collision_rate": "collision rate",
    "colliding_item_rate": "colliding items",
}
"""Key of a metric -> the number of `semid.report.numbers` whose power to predict is known."""


def relation_metrics(diagnoses: Sequence[Diagnosis]) -> Iterator[tuple[MetricRow, Read]]:
    """Yield what models are compared by on each kind of known relation that was measured."""
    for kind in dict.fromkeys(kind for d in diagnoses for kind in d.relations or {}):
        for row, _ in (METRICS["weighted_auc"], METRICS["discrete_hits"]):
            name = f"{row.name}, {kind.replace('_', ' ')}"
            row_of_kind = replace(row, key=f"{row.key}_{kind}", name=name, lead=False)
            yield row_of_kind, _of_pairs(row.key, kind)


def compare(
    models: Mapping[str, Tokenizer],
    x: Any,
    *,
    interactions: Any = None,
    ids: Any = None,
    **options: Any,
) -> Comparison:
    """Diagnose several tokenizers under one protocol and set them side by side.

    All see the same items, noise, subsets, test users, pairs and negatives. Each view has metrics
    with ranks of their own; there is no total, because the views trade off against each other. A
    model ranks behind those that are better by more than the 95 % interval of the difference.

    Args:
        models: name -> fitted tokenizer, at least two, all of one input width.
        x: embeddings, as in `diagnose`.
        interactions: without them the view of soft matching is empty.
        ids: item ids.
        options: ``items``, ``relations`` and ``progress`` of `diagnose`, and its options.

    Returns:
        A `Comparison`; ``.write("compare.html")`` makes the page.

    Raises:
        UsageError: fewer than two models.
        SemidError: as `diagnose`.

    Cost: one `diagnose` per model.
    """
    if len(models) < 2:
        raise UsageError(f"{len(models)} model given; give at least two to compare")
    # Opened and read once, for all models.
    source = open_embeddings(x, ids=ids)
    log = None if interactions is None else read_interactions(interactions)
    return side_by_side(
        {
            name: diagnose(tok, source, interactions=log, explorer=False, **options)
            for name, tok in models.items()
        }
    )


def side_by_side(diagnoses: Mapping[str, Diagnosis]) -> Comparison:
    """Set diagnoses of the same catalogue side by side."""
    each = list(diagnoses.values())
    all_held_out = all("held_out" in d.reconstruction.relative_error for d in each)
    rows = []
    for row, read in (*METRICS.values(), *relation_metrics(each)):
        values: tuple[Value | None, ...] = tuple(read(d) for d in each)
        if row.key == "relative_error" and all_held_out:
            errors = (d.reconstruction for d in each)
            values = tuple(e.held_out or e.relative_error["held_out"] for e in errors)
        if any(value is not None for value in values):
            rows.append(_with_values(row, values))
    # One lead metric stands for each view where views are traded off.
    leads = [row for row in rows if row.lead]
    dominated = _dominated(tuple(diagnoses), leads)
    return Comparison(
        names=tuple(diagnoses),
        metrics=tuple(sorted(rows, key=_precedence)),
        dominated=dominated,
        agreement=_agreement(each),
        findings=_findings(diagnoses, leads, dominated),
        notes=_notes(diagnoses, all_held_out),
        diagnoses=dict(diagnoses),
    )


def _precedence(row: MetricRow) -> float:
    """Order numbers that predict before the others, where that is known; else as declared."""
    predictor = read_evidence().numbers.get(_NUMBER_OF.get(row.key, ""))
    return -predictor.pairs_right if predictor is not None and predictor.predicts else 0.0


def _with_values(row: MetricRow, measured: Sequence[Value | None]) -> MetricRow:
    """Return the row with values, their intervals, and ranks."""
    each = [Estimate(value) if isinstance(value, float) else value for value in measured]
    sign = 1.0 if row.better == "lower" else -1.0
    ranks: list[int | None] = [None] * len(each)
    for place, value in enumerate(each) if row.better != "neither" else ():
        if value is not None:
            known = [other for other in each if other is not None]
            better = [o for o in known if sign * o.value < sign * value.value and differ(o, value)]
            ranks[place] = 1 + len(better)
    return replace(
        row,
        values=tuple(None if v is None else v.value for v in each),
        ranks=tuple(ranks),
        intervals=tuple(
            None if v is None or v.low is None or v.high is None else (v.low, v.high) for v in each
        ),
    )


def _dominated(names: tuple[str, ...], leads: Sequence[MetricRow]) -> dict[str, tuple[str, ...]]:
    """Return for each model the others that are no worse in any lead metric and better in one."""
    ranked = [row.ranks for row in leads if None not in row.ranks]
    # Metrics that were not measured for every model decide nothing.
    ranks = np.array(ranked, dtype=np.int64).reshape(len(ranked), len(names)).T
    return {
        name: tuple(
            other
            for j, other in enumerate(names)
            if j != i and (ranks[j] <= ranks[i]).all() and (ranks[j] < ranks[i]).any()
        )
        for i, name in enumerate(names)
    }


def _agreement(diagnoses: Sequence[Diagnosis]) -> ComparedAgreement:
    """Rank flips of the models of a level against the three proxies, at one noise.

    Levels are kept apart and their correlations averaged: flips and overlap both rise with the
    level, so that pooled over levels a proxy looks right which ranks the models the wrong way.
    """
    points = []
    for d in diagnoses:
        if d.flips is not None:
            response = d.flips.innermost
            flips = next(p for p in response.flips.points if p.scale == REPORT_SCALE)
            margins = next(p for p in response.margins.points if p.scale == REPORT_SCALE)
            points.append((flips, margins, d.overlap))
    levels = range(min((len(overlaps) for *_, overlaps in points), default=0))
    within = [
        agreement_with_proxies([(f, m, [overlaps[level]]) for f, m, overlaps in points])
        for level in levels
    ]

    def mean(values: Iterable[float | None]) -> float | None:
        defined = [value for value in values if value is not None]
        return fmean(defined) if defined else None

    return ComparedAgreement(
        scale=REPORT_SCALE,
        rows=len(points),
        overlap=mean(one.overlap for one in within),
        geometry=mean(one.geometry for one in within),
        margins=mean(one.margins for one in within),
    )


def _findings(
    diagnoses: Mapping[str, Diagnosis],
    leads: Sequence[MetricRow],
    dominated: Mapping[str, tuple[str, ...]],
) -> tuple[str, ...]:
    """Say what stands out: verdicts, the best of each view, who is dominated."""
    findings = [
        f"{name} is {VERDICTS[d.verdict.level][0].lower()}: {d.verdict.findings[0].what}"
        for name, d in diagnoses.items()
        if not d.healthy
    ]
    for row in leads:
        best = {
            name: value
            for name, value, rank in zip(diagnoses, row.values, row.ranks, strict=True)
            if rank == 1
        }
        view = f"{VIEWS[row.view].lower()} ({row.name})"
        why = "equal" if len(set(best.values())) == 1 else "within the interval of the difference"
        if len(best) == 1:
            findings.append(f"{_listed(list(best))} leads in {view}")
        elif len(best) == len(diagnoses):
            findings.append(f"no model leads in {view}: the values are {why}")
        else:
            findings.append(f"{_listed(list(best))} lead in {view}; their values are {why}")
    # Dominance counts the lead metric of each view alone, so no view outweighs another.
    beaten = {name: by for name, by in dominated.items() if by}
    findings += [
        f"{name} is dominated: {_listed(by)} {'are' if len(by) > 1 else 'is'} at least as "
        "good in every view and better in one"
        for name, by in beaten.items()
    ]
    free = [name for name in diagnoses if name not in beaten]
    if len(free) > 1:
        findings.append(
            f"{_listed(free)} trade off against each other; which to take depends on the view "
            "that matters most to you"
        )
    return tuple(findings)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _notes(diagnoses: Mapping[str, Diagnosis], all_held_out: bool) -> tuple[str, ...]:
    # A note that all models share is written once.
    models: dict[str, list[str]] = {}
    for name, d in diagnoses.items():
        for note in d.notes:
            models.setdefault(note, []).append(name)
    notes = [
        note if len(names) == len(diagnoses) else f"{_listed(names)}: {note}"
        for note, names in models.items()
    ]
    notes.append(
        "Reconstruction is compared on held-out items"
        if all_held_out
        else "Reconstruction is compared on all items, since not every model held items out of "
        "this catalogue"
    )
    notes += read_evidence().sentences(tuple(_NUMBER_OF.values()))
    # Models of different capacity are compared, but not silently.
    bits = {sum(float(np.log2(k)) for k in d.model.codebook_sizes) for d in diagnoses.values()}
    if len(bits) > 1:
        notes.append(
            "The models spend different numbers of bits per id "
            f"({', '.join(f'{value:g}' for value in sorted(bits))}), which by itself moves "
            "reconstruction, collisions and flips"
        )
    return tuple(notes)
