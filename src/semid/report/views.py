"""The views of a comparison: which figures answer which question, and which way is good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from semid.report.diagnosis import Diagnosis

__all__ = [
    "AGREEMENT_SCALE",
    "METRICS",
    "VIEWS",
    "Metric",
    "leads",
    "relation_metrics",
    "values_of",
]

AGREEMENT_SCALE = 0.1
"""Noise at which flips are ranked against what is said to predict them."""

VIEWS = {
    "robustness": "Symbolic robustness",
    "reconstruction": "Reconstruction",
    "matching": "Soft matching",
    "geometry": "Geometry",
    "usage": "Usage and collisions",
}


@dataclass(frozen=True)
class Metric:
    """One figure that models are compared by.

    Attributes:
        key: fixed name, for programs.
        view: key of `VIEWS`.
        name: what it is called.
        better: ``neither`` where a good value is no merit by itself, such as few collisions.
        kind: how it is written.
        lead: whether it stands for its view.
        read: takes it from a diagnosis; None where it was not measured.
    """

    key: str
    view: str
    name: str
    better: Literal["lower", "higher", "neither"]
    kind: str
    lead: bool
    read: Callable[[Diagnosis], float | None]


class _Row(Protocol):
    @property
    def lead(self) -> bool: ...


Row = TypeVar("Row", bound=_Row)


def leads(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that stand for their views."""
    return [row for row in rows if row.lead]


def values_of(
    metric: Metric, diagnoses: Sequence[Diagnosis], *, held_out: bool
) -> tuple[float | None, ...]:
    """Read a metric from every diagnosis; reconstruction on held-out items where all have some."""
    if metric.key == "relative_error":
        group = "held_out" if held_out else "all"
        return tuple(d.reconstruction["relative_error"][group] for d in diagnoses)
    return tuple(metric.read(d) for d in diagnoses)


def _flips(space: str, scale: float, *, whole: bool) -> Callable[[Diagnosis], float | None]:
    def read(d: Diagnosis) -> float | None:
        if d.flips is None:
            return None
        flips = d.flips[space if space in d.flips else "input"]["flips"]
        point = next(p for p in flips["points"] if p["scale"] == scale)
        if whole:
            return float(point["prefix"][-1]["value"])
        shares = [level["value"] for level in point["code"]]
        return float(sum(shares) / len(shares))

    return read


def _measured(d: Diagnosis) -> dict[str, Any] | None:
    return None if d.behavior is None else d.behavior["measured"]


def _at_50(rates: dict[str, Any]) -> dict[str, Any] | None:
    """Return the estimate at K = 50, or at the largest K there is in a small pool."""
    chosen = rates.get("50", rates[max(rates, key=int)])
    return None if chosen is None else dict(chosen)


def relation_metrics(diagnoses: Sequence[Diagnosis]) -> list[Metric]:
    """Return what models are compared by on each kind of known relation that was measured."""
    kinds = dict.fromkeys(kind for d in diagnoses for kind in d.relations or {})
    found = []
    for kind in kinds:
        said = kind.replace("_", " ")
        found += [
            Metric(
                f"weighted_auc_{kind}",
                "matching",
                f"weighted AUC of the codes, {said}",
                "higher",
                "number",
                False,
                _relation(kind, lambda m: m["aucs"]["aucs"]["weighted"]),
            ),
            Metric(
                f"discrete_hits_{kind}",
                "matching",
                f"HR@50 by the ids alone, {said}",
                "higher",
                "share",
                False,
                _relation(kind, lambda m: _at_50(m["discrete"]["depths"][-1]["rates"])),
            ),
        ]
    return found


def _relation(
    kind: str, read: Callable[[Any], dict[str, Any] | None]
) -> Callable[[Diagnosis], float | None]:
    def value(d: Diagnosis) -> float | None:
        measured = (d.relations or {}).get(kind)
        found = None if measured is None else read(measured)
        return None if found is None else float(found["value"])

    return value


def _retention(d: Diagnosis) -> float | None:
    measured = _measured(d)
    if measured is None:
        return None
    found = _at_50(measured["retrieval"]["retention"][0]["above_chance"])
    return None if found is None else float(found["value"])


def _discrete(d: Diagnosis) -> float | None:
    measured = _measured(d)
    if measured is None:
        return None
    found = _at_50(measured["discrete"]["depths"][-1]["rates"])
    return None if found is None else float(found["value"])


def _auc(name: str) -> Callable[[Diagnosis], float | None]:
    def read(d: Diagnosis) -> float | None:
        measured = _measured(d)
        return None if measured is None else float(measured["aucs"]["aucs"][name]["value"])

    return read


def _space(name: str, key: str) -> Callable[[Diagnosis], float | None]:
    def read(d: Diagnosis) -> float | None:
        if d.geometry is None:
            return None
        return float(next(s for s in d.geometry["spaces"] if s["name"] == name)[key])

    return read


def _least_effective(d: Diagnosis) -> float | None:
    shares = [
        next(p for p in level["points"] if p["scale"] == AGREEMENT_SCALE)["effective_size"]
        / level["codebook_size"]
        for level in d.overlap
    ]
    return min(shares) if shares else None


def _geometry_share(d: Diagnosis) -> float | None:
    shares = [
        next(p for p in level["points"] if p["scale"] == 1.0)["geometry_share"]
        for level in d.overlap
    ]
    return max(shares) if shares else None


METRICS = (
    Metric(
        "id_flips",
        "robustness",
        "ids that flip at input noise 0.2",
        "lower",
        "share",
        True,
        _flips("input", 0.2, whole=True),
    ),
    Metric(
        "code_flips",
        "robustness",
        "codes that flip at input noise 0.2, mean",
        "lower",
        "share",
        False,
        _flips("input", 0.2, whole=False),
    ),
    Metric(
        "latent_flips",
        "robustness",
        "ids that flip at latent noise 0.2",
        "lower",
        "share",
        False,
        _flips("latent", 0.2, whole=True),
    ),
    Metric(
        "relative_error",
        "reconstruction",
        "relative error",
        "lower",
        "number",
        True,
        lambda d: d.reconstruction["relative_error"]["all"],
    ),
    Metric(
        "cosine",
        "reconstruction",
        "mean cosine, all items",
        "higher",
        "number",
        False,
        lambda d: float(d.reconstruction["mean_cosine"]),
    ),
    Metric(
        "weighted_auc",
        "matching",
        "weighted AUC of the codes",
        "higher",
        "number",
        True,
        _auc("weighted"),
    ),
    Metric("retention", "matching", "retention at 50", "higher", "number", False, _retention),
    Metric(
        "discrete_hits", "matching", "HR@50 by the ids alone", "higher", "share", False, _discrete
    ),
    Metric(
        "effective_rank",
        "geometry",
        "effective rank of decoder(codes)",
        "higher",
        "number",
        True,
        _space("decoder(codes)", "effective_rank"),
    ),
    Metric(
        "least_effective",
        "geometry",
        "least effective size at noise 0.1, share of K",
        "higher",
        "share",
        False,
        _least_effective,
    ),
    Metric(
        "geometry_share",
        "geometry",
        "geometry's share of R at noise 1, worst level",
        "lower",
        "share",
        False,
        _geometry_share,
    ),
    Metric(
        "least_perplexity",
        "usage",
        "least perplexity of a level, share of K",
        "neither",
        "share",
        False,
        lambda d: min(u["perplexity"] / u["codebook_size"] for u in d.usage),
    ),
    Metric(
        "dead",
        "usage",
        "dead codes, all levels",
        "neither",
        "count",
        False,
        lambda d: float(sum(u["dead"] for u in d.usage)),
    ),
    Metric(
        "collision_rate",
        "usage",
        "collision rate, 1 - unique/N",
        "neither",
        "share",
        False,
        lambda d: d.verdict.collisions.collision_rate,
    ),
    Metric(
        "colliding_item_rate",
        "usage",
        "items not alone",
        "neither",
        "share",
        False,
        lambda d: d.verdict.collisions.colliding_item_rate,
    ),
)
