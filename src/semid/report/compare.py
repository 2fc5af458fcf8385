"""Several tokenizers side by side: ranks and trade-offs by view, never one score."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from semid.data.embeddings import open_embeddings
from semid.data.interactions import read_interactions
from semid.diagnostics.flips import rank_agreement
from semid.errors import UsageError
from semid.progress import Progress
from semid.report.diagnose import diagnose
from semid.report.diagnosis import Diagnosis, write_text
from semid.report.prose import VERDICTS
from semid.report.views import AGREEMENT_SCALE, METRICS, VIEWS, leads, relation_metrics, values_of
from semid.tokenizers.base import Tokenizer

__all__ = ["Comparison", "MetricRow", "compare"]


@dataclass(frozen=True)
class MetricRow:
    """One metric over all models.

    Attributes:
        key: fixed name, for programs.
        view: which question it answers.
        name: what it is called.
        better: which way is good, or ``neither`` where more is not better by itself.
        kind: how it is written: ``share``, ``number`` or ``count``.
        lead: whether it stands for its view in the trade-offs.
        values: one a model; None where it was not measured.
        ranks: one a model, 1 the best, equals sharing; None where unranked.
    """

    key: str
    view: str
    name: str
    better: Literal["lower", "higher", "neither"]
    kind: str
    lead: bool
    values: tuple[float | None, ...]
    ranks: tuple[int | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {**self.__dict__, "values": list(self.values), "ranks": list(self.ranks)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models side by side on one catalogue.

    Attributes:
        names: of the models.
        diagnoses: one a model.
        metrics: every metric with its ranks.
        dominated: model -> models that are at least as good in every view's lead metric and
            better in one. A model that nobody dominates is a sensible choice for somebody.
        agreement: rank correlation of the measured flips with the overlap rate, its geometry part
            and the margin proxy, over models and levels at one noise.
        findings: what stands out, in sentences.
        notes: what the reader must know, in sentences.
    """

    names: tuple[str, ...]
    diagnoses: tuple[Diagnosis, ...] = field(repr=False)
    metrics: tuple[MetricRow, ...] = field(repr=False)
    dominated: Mapping[str, tuple[str, ...]]
    agreement: Mapping[str, Any]
    findings: tuple[str, ...]
    notes: tuple[str, ...]

    def metric(self, key: str) -> MetricRow:
        """Return a metric by its key.

        Raises:
            UsageError: no such metric.
        """
        for row in self.metrics:
            if row.key == key:
                return row
        raise UsageError(f"no metric '{key}'; there are {', '.join(m.key for m in self.metrics)}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict of the comparison and of each diagnosis."""
        return {
            "names": list(self.names),
            "metrics": [row.to_dict() for row in self.metrics],
            "dominated": {name: list(by) for name, by in self.dominated.items()},
            "agreement": dict(self.agreement),
            "findings": list(self.findings),
            "notes": list(self.notes),
            "diagnoses": {
                name: diagnosis.to_dict()
                for name, diagnosis in zip(self.names, self.diagnoses, strict=True)
            },
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """Return the comparison as Markdown."""
        from semid.report.compare_page import comparison_markdown

        return comparison_markdown(self)

    def to_html(self) -> str:
        """Return the comparison as one HTML page that needs no network."""
        from semid.report.compare_page import comparison_page

        return comparison_page(self)

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write ``.html``, ``.json`` or ``.md``, as `Diagnosis.write` does."""
        makers = {".html": self.to_html, ".json": self.to_json, ".md": self.to_markdown}
        return write_text(path, makers, overwrite=overwrite)


def compare(
    models: Mapping[str, Tokenizer],
    x: Any,
    *,
    interactions: Any = None,
    ids: Any = None,
    relations: Any = None,
    seed: int = 0,
    flip_sample: int = 5_000,
    geometry_sample: int = 20_000,
    cutoffs: Sequence[int] | None = None,
    replicates: int = 1000,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Diagnose several tokenizers under one protocol and set them side by side.

    All see the same items, noise, subsets, test users, pairs and negatives. Each view has metrics
    with ranks of their own; there is no total, because the views trade off against each other.

    Args:
        models: name -> fitted tokenizer, at least two, all of one input width.
        x: embeddings, see `diagnose`.
        interactions: see `diagnose`; without them the view of soft matching is empty.
        ids: see `diagnose`.
        relations: see `diagnose`.
        seed: see `diagnose`.
        flip_sample: see `diagnose`.
        geometry_sample: see `diagnose`.
        cutoffs: see `diagnose`.
        replicates: see `diagnose`.
        threads: see `diagnose`.
        progress: see `diagnose`.

    Returns:
        A `Comparison`; ``.write("compare.html")`` makes the page.

    Raises:
        UsageError: fewer than two models.
        SemidError: as `diagnose`.

    Cost: one `diagnose` a model.
    """
    if len(models) < 2:
        raise UsageError(f"{len(models)} model given; give at least two to compare")
    source = open_embeddings(x, ids=ids)
    logs = None if interactions is None else read_interactions(interactions)
    diagnoses = tuple(
        diagnose(
            tok,
            source,
            interactions=logs,
            relations=relations,
            seed=seed,
            flip_sample=flip_sample,
            geometry_sample=geometry_sample,
            cutoffs=cutoffs,
            replicates=replicates,
            explorer=False,
            threads=threads,
            progress=progress,
        )
        for tok in models.values()
    )
    return side_by_side(tuple(models), diagnoses)


def side_by_side(names: tuple[str, ...], diagnoses: tuple[Diagnosis, ...]) -> Comparison:
    """Set diagnoses of the same catalogue side by side."""
    shared_held_out = all("held_out" in d.reconstruction["relative_error"] for d in diagnoses)
    rows = []
    for metric in (*METRICS, *relation_metrics(diagnoses)):
        values = values_of(metric, diagnoses, held_out=shared_held_out)
        if any(value is not None for value in values):
            rows.append(
                MetricRow(
                    metric.key,
                    metric.view,
                    metric.name,
                    metric.better,
                    metric.kind,
                    metric.lead,
                    values,
                    _ranks(values, metric.better),
                )
            )
    metrics = tuple(rows)
    dominated = _dominated(names, leads(metrics))
    return Comparison(
        names=names,
        diagnoses=diagnoses,
        metrics=metrics,
        dominated=dominated,
        agreement=_agreement(diagnoses),
        findings=_findings(names, diagnoses, metrics, dominated),
        notes=_notes(names, diagnoses, shared_held_out),
    )


def _ranks(values: tuple[float | None, ...], better: str) -> tuple[int | None, ...]:
    if better == "neither":
        return (None,) * len(values)
    sign = 1.0 if better == "lower" else -1.0
    known = [sign * value for value in values if value is not None]
    return tuple(
        None if value is None else 1 + sum(other < sign * value for other in known)
        for value in values
    )


def _dominated(names: tuple[str, ...], rows: Sequence[MetricRow]) -> dict[str, tuple[str, ...]]:
    """Find who is beaten: others no worse in any lead metric and better in one."""
    ranked = [row.ranks for row in rows if None not in row.ranks]
    table = np.array(ranked, dtype=np.int64).reshape(len(ranked), len(names)).T
    return {
        name: tuple(
            other
            for j, other in enumerate(names)
            if j != i and (table[j] <= table[i]).all() and (table[j] < table[i]).any()
        )
        for i, name in enumerate(names)
    }


def _agreement(diagnoses: tuple[Diagnosis, ...]) -> dict[str, Any]:
    """Rank flips of every model and level against the three proxies, at one noise."""
    columns: dict[str, list[float]] = {"flips": [], "overlap": [], "geometry": [], "margins": []}
    levels = []
    for d in diagnoses:
        if d.flips is None or not d.overlap:
            continue
        measured = d.flips.get("latent", d.flips["input"])
        flips, margins = (
            next(p for p in measured[name]["points"] if p["scale"] == AGREEMENT_SCALE)
            for name in ("flips", "margins")
        )
        for level in d.overlap:
            point = next(p for p in level["points"] if p["scale"] == AGREEMENT_SCALE)
            columns["flips"].append(flips["code"][level["level"]]["value"])
            columns["overlap"].append(point["rate"])
            columns["geometry"].append(point["geometry"])
            columns["margins"].append(margins["code"][level["level"]])
            levels.append(level["level"])
    found = rank_agreement(
        columns.pop("flips"), {key: np.array(value) for key, value in columns.items()}
    )
    return {
        "scale": AGREEMENT_SCALE,
        "rows": len(levels),
        **{key: value["all"] for key, value in found.items()},
    }


def _findings(
    names: tuple[str, ...],
    diagnoses: tuple[Diagnosis, ...],
    metrics: tuple[MetricRow, ...],
    dominated: Mapping[str, tuple[str, ...]],
) -> tuple[str, ...]:
    """Say what stands out: verdicts, the best of each view, who is dominated."""
    found = [
        f"{name} is {VERDICTS[d.verdict.level][0].lower()}: {d.verdict.findings[0].what}"
        for name, d in zip(names, diagnoses, strict=True)
        if not d.healthy
    ]
    for row in leads(metrics):
        best = [name for name, rank in zip(names, row.ranks, strict=True) if rank == 1]
        verb = "lead" if len(best) > 1 else "leads"
        found.append(f"{_listed(best)} {verb} in {VIEWS[row.view].lower()} ({row.name})")
    beaten = {name: by for name, by in dominated.items() if by}
    found += [
        f"{name} is dominated: {_listed(list(by))} {'are' if len(by) > 1 else 'is'} at least as "
        "good in every view and better in one"
        for name, by in beaten.items()
    ]
    free = [name for name in names if name not in beaten]
    if len(free) > 1:
        found.append(
            f"{_listed(free)} trade off against each other; which to take depends on the view "
            "that matters most to you"
        )
    return tuple(found)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _notes(
    names: tuple[str, ...], diagnoses: tuple[Diagnosis, ...], held_out: bool
) -> tuple[str, ...]:
    said: dict[str, list[str]] = {}
    for name, d in zip(names, diagnoses, strict=True):
        for note in d.notes:
            said.setdefault(note, []).append(name)
    notes = [
        note if len(of) == len(names) else f"{_listed(of)}: {note}" for note, of in said.items()
    ]
    notes.append(
        "Reconstruction is compared on held-out items"
        if held_out
        else "Reconstruction is compared on all items, since not every model held items out of "
        "this catalogue"
    )
    bits = {sum(float(np.log2(k)) for k in d.model["codebook_sizes"]) for d in diagnoses}
    if len(bits) > 1:
        notes.append(
            "The models spend different numbers of bits an id "
            f"({', '.join(f'{value:g}' for value in sorted(bits))}), which by itself moves "
            "reconstruction, collisions and flips"
        )
    return tuple(notes)
