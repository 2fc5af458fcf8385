"""What models are compared by: the metrics of each view, read from a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from semid.diagnostics.overlap import REPORT_SCALE
from semid.diagnostics.pairs import Estimate
from semid.report.results import Diagnosis, NoiseResponse, PairResults

__all__ = ["LEADS", "METRICS", "VIEWS", "Metric", "relation_metrics"]

VIEWS = {
    "robustness": "Symbolic robustness",
    "reconstruction": "Reconstruction",
    "matching": "Soft matching",
    "geometry": "Geometry",
    "usage": "Usage and collisions",
}


@dataclass(frozen=True)
class Metric:
    """One metric that models are compared by.

    Attributes:
        key: fixed name, for programs.
        view: key of `VIEWS`.
        name: what it is called.
        better: ``neither`` where a good value is no merit by itself, such as few collisions.
        kind: how it is written.
        read: returns its value of a diagnosis; None where it was not measured.
    """

    key: str
    view: str
    name: str
    better: Literal["lower", "higher", "neither"]
    kind: Literal["share", "number", "count"]
    read: Callable[[Diagnosis], float | None]


def _flipped(response: NoiseResponse, scale: float) -> tuple[float, float]:
    """Return the share of ids that change, and the mean share of codes that do."""
    point = next(p for p in response.flips.points if p.scale == scale)
    return point.prefix[-1].value, sum(code.value for code in point.code) / len(point.code)


def _at_50(rates: Mapping[int, Estimate | None]) -> float | None:
    """Return the value at K = 50, or at the largest K there is in a small pool."""
    estimate = rates.get(50, rates[max(rates)])
    return None if estimate is None else estimate.value


def _of_behavior(
    read: Callable[[PairResults], float | None],
) -> Callable[[Diagnosis], float | None]:
    def value(d: Diagnosis) -> float | None:
        measured = None if d.behavior is None else d.behavior.measured
        return None if measured is None else read(measured)

    return value


def _of_relation(
    kind: str, read: Callable[[PairResults], float | None]
) -> Callable[[Diagnosis], float | None]:
    def value(d: Diagnosis) -> float | None:
        measured = (d.relations or {}).get(kind)
        return None if measured is None else read(measured)

    return value


def _weighted_auc(measured: PairResults) -> float | None:
    return measured.aucs.aucs["weighted"].value


def _discrete_hits(measured: PairResults) -> float | None:
    return _at_50(measured.discrete.depths[-1].rates)


def _retention(measured: PairResults) -> float | None:
    return _at_50(measured.retrieval.retention[0].above_chance)


def _input_flips(d: Diagnosis) -> float | None:
    return None if d.flips is None else _flipped(d.flips.input, 0.2)[0]


def _code_flips(d: Diagnosis) -> float | None:
    return None if d.flips is None else _flipped(d.flips.input, 0.2)[1]


def _latent_flips(d: Diagnosis) -> float | None:
    return None if d.flips is None else _flipped(d.flips.innermost, 0.2)[0]


def _effective_rank(d: Diagnosis) -> float | None:
    spaces = () if d.geometry is None else d.geometry.spaces
    return next((s.effective_rank for s in spaces if s.name == "decoder(codes)"), None)


def _least_effective(d: Diagnosis) -> float | None:
    shares = [o.at(REPORT_SCALE).effective_size / o.codebook_size for o in d.overlap]
    return min(shares, default=None)


def _geometry_share(d: Diagnosis) -> float | None:
    return max((o.at(1.0).geometry_share for o in d.overlap), default=None)


def _least_perplexity(d: Diagnosis) -> float | None:
    return min(u.perplexity / u.codebook_size for u in d.usage)


def _relative_error(d: Diagnosis) -> float | None:
    return d.reconstruction.relative_error["all"]


def _mean_cosine(d: Diagnosis) -> float | None:
    return d.reconstruction.mean_cosine


def _dead_codes(d: Diagnosis) -> float | None:
    return float(sum(u.dead for u in d.usage))


def _collision_rate(d: Diagnosis) -> float | None:
    return d.verdict.collisions.collision_rate


def _colliding_items(d: Diagnosis) -> float | None:
    return d.verdict.collisions.colliding_item_rate


METRICS = (
    Metric(
        "id_flips", "robustness", "ids that flip at input noise 0.2", "lower", "share", _input_flips
    ),
    Metric(
        "code_flips",
        "robustness",
        "codes that flip at input noise 0.2, mean",
        "lower",
        "share",
        _code_flips,
    ),
    Metric(
        "latent_flips",
        "robustness",
        "ids that flip at latent noise 0.2",
        "lower",
        "share",
        _latent_flips,
    ),
    Metric(
        "relative_error", "reconstruction", "relative error", "lower", "number", _relative_error
    ),
    Metric("cosine", "reconstruction", "mean cosine, all items", "higher", "number", _mean_cosine),
    Metric(
        "weighted_auc",
        "matching",
        "weighted AUC of the codes",
        "higher",
        "number",
        _of_behavior(_weighted_auc),
    ),
    Metric(
        "retention", "matching", "retention at 50", "higher", "number", _of_behavior(_retention)
    ),
    Metric(
        "discrete_hits",
        "matching",
        "HR@50 by the ids alone",
        "higher",
        "share",
        _of_behavior(_discrete_hits),
    ),
    Metric(
        "effective_rank",
        "geometry",
        "effective rank of decoder(codes)",
        "higher",
        "number",
        _effective_rank,
    ),
    Metric(
        "least_effective",
        "geometry",
        "least effective size at noise 0.1, share of K",
        "higher",
        "share",
        _least_effective,
    ),
    Metric(
        "geometry_share",
        "geometry",
        "geometry's share of R at noise 1, worst level",
        "lower",
        "share",
        _geometry_share,
    ),
    Metric(
        "least_perplexity",
        "usage",
        "least perplexity of a level, share of K",
        "neither",
        "share",
        _least_perplexity,
    ),
    Metric("dead", "usage", "dead codes, all levels", "neither", "count", _dead_codes),
    Metric(
        "collision_rate",
        "usage",
        "collision rate, 1 - unique/N",
        "neither",
        "share",
        _collision_rate,
    ),
    Metric("colliding_item_rate", "usage", "colliding items", "neither", "share", _colliding_items),
)
LEADS = ("id_flips", "relative_error", "weighted_auc", "effective_rank")
"""The metrics that stand for their views in the trade-offs."""


def relation_metrics(diagnoses: Sequence[Diagnosis]) -> Iterator[Metric]:
    """Yield what models are compared by on each kind of known relation that was measured."""
    for kind in dict.fromkeys(kind for d in diagnoses for kind in d.relations or {}):
        words = kind.replace("_", " ")
        yield Metric(
            f"weighted_auc_{kind}",
            "matching",
            f"weighted AUC of the codes, {words}",
            "higher",
            "number",
            _of_relation(kind, _weighted_auc),
        )
        yield Metric(
            f"discrete_hits_{kind}",
            "matching",
            f"HR@50 by the ids alone, {words}",
            "higher",
            "share",
            _of_relation(kind, _discrete_hits),
        )
