"""The numbers of a diagnosis by name: what may predict how good recommendations will be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.diagnostics.overlap import REPORT_SCALE
from semid.diagnostics.pairs import Estimate, Proportion, item_pairs
from semid.diagnostics.retrieval import neighbor_ranks
from semid.diagnostics.spaces import sample_rows
from semid.quantization.nearest import index_database, top_k
from semid.report.results import Diagnosis, PairResults

FLIP_SCALE = 0.2
NEIGHBORS = 10
CUTOFF = 50

Read = Callable[[Diagnosis], float | None]


def _levels(read: Callable[[Any], float], part: str, combine: Callable[[Any], float]) -> Read:
    """Return a number over the levels of a part of the diagnosis; None where it has none."""

    def value(d: Diagnosis) -> float | None:
        values = [read(level) for level in getattr(d, part)]
        return float(combine(values)) if values else None

    return value


def _flips(space: str, whole: bool) -> Read:
    """Return the share of ids, or the mean share of codes, that change at `FLIP_SCALE`."""

    def value(d: Diagnosis) -> float | None:
        if d.flips is None:
            return None
        response = d.flips.input if space == "input" else d.flips.innermost
        point = next(p for p in response.flips.points if p.scale == FLIP_SCALE)
        return point.prefix[-1].value if whole else fmean(code.value for code in point.code)

    return value


def _margins(d: Diagnosis) -> float | None:
    if d.flips is None:
        return None
    points = d.flips.innermost.margins.points
    return fmean(next(p for p in points if p.scale == FLIP_SCALE).code)


def _geometry(name: str) -> Read:
    def value(d: Diagnosis) -> float | None:
        spaces = () if d.geometry is None else d.geometry.spaces
        return next((getattr(s, name) for s in spaces if s.name == "decoder(codes)"), None)

    return value


def _pairs(read: Callable[[PairResults], Estimate | Proportion | float | None]) -> Read:
    """Return a number of the test users' pairs."""

    def value(d: Diagnosis) -> float | None:
        measured = None if d.behavior is None else d.behavior.measured
        result = None if measured is None else read(measured)
        return result if isinstance(result, float | None) else result.value

    return value


def _at_cutoff(rates: Mapping[int, Estimate | None]) -> Estimate | None:
    """Return the rate at `CUTOFF`, or at the largest K of a small pool."""
    return rates.get(CUTOFF, rates[max(rates)])


def _matches(depth: int) -> Read:
    """Return how much more often consecutive items share their first codes than random ones."""

    def gap(measured: PairResults) -> float | None:
        rows = measured.aucs.matches
        if depth > len(rows):
            return None
        row = rows[depth - 1]
        return row.prefix_positive - row.prefix_negative

    return _pairs(gap)


NUMBERS: dict[str, Read] = {
    "bits per id": lambda d: sum(math.log2(k) for k in d.model.codebook_sizes),
    "used bits": _levels(lambda u: math.log2(u.perplexity), "usage", sum),
    "least perplexity": _levels(lambda u: u.perplexity / u.codebook_size, "usage", min),
    "Gini of codes": _levels(lambda u: u.gini, "usage", fmean),
    "dead codes": _levels(lambda u: u.dead / u.codebook_size, "usage", fmean),
    "largest code": _levels(lambda u: u.largest_share, "usage", max),
    "collision rate": lambda d: d.verdict.collisions.collision_rate,
    "colliding items": lambda d: d.verdict.collisions.colliding_item_rate,
    "largest bucket": lambda d: d.verdict.collisions.largest_bucket / d.data.items,
    "overlap R": _levels(lambda o: o.at(REPORT_SCALE).rate, "overlap", fmean),
    "worst overlap R": _levels(lambda o: o.at(REPORT_SCALE).rate, "overlap", max),
    "floor of R": _levels(lambda o: o.at(REPORT_SCALE).collision_probability, "overlap", fmean),
    "geometry part of R": _levels(lambda o: o.at(1.0).geometry_share, "overlap", max),
    "effective bits": _levels(
        lambda o: math.log2(o.at(REPORT_SCALE).effective_size), "overlap", sum
    ),
    "least K_eff": _levels(
        lambda o: o.at(REPORT_SCALE).effective_size / o.codebook_size, "overlap", min
    ),
    "margin proxy": _margins,
    "flips of ids, input": _flips("input", whole=True),
    "flips of codes, input": _flips("input", whole=False),
    "flips of ids, latent": _flips("latent", whole=True),
    "relative error": lambda d: d.reconstruction.relative_error["all"],
    "held-out error": lambda d: d.reconstruction.relative_error.get("held_out"),
    "cosine": lambda d: d.reconstruction.mean_cosine,
    "effective rank": _geometry("effective_rank"),
    "participation ratio": _geometry("participation_ratio"),
    "retention": _pairs(lambda m: _at_cutoff(m.retrieval.retention[0].above_chance)),
    "hit rate, decoded": _pairs(lambda m: _at_cutoff(m.retrieval.hit_rates[1].rates)),
    "hit rate, ids": _pairs(lambda m: _at_cutoff(m.discrete.depths[-1].rates)),
    "exact AUC": _pairs(lambda m: m.aucs.exact),
    "weighted AUC": _pairs(lambda m: m.aucs.aucs["weighted"]),
    "equality AUC": _pairs(lambda m: m.aucs.aucs["weighted_equality"]),
    "decoded AUC": _pairs(lambda m: m.aucs.aucs["embedding: decoder(codes)"]),
    "behavior alignment, depth 1": _matches(1),
    "behavior alignment, depth 2": _matches(2),
    "behavior alignment, depth 3": _matches(3),
}
"""Name of a number -> its value in a diagnosis, None where it was not measured."""

KEPT_NEIGHBORS = "neighbors kept"
"""A number that needs the rows: see `kept_neighbors`."""

NOISE = {name for name in NUMBERS if name.startswith(("flips", "margin"))}
"""Numbers that need an encoder: codes without one have none."""


def intrinsic_numbers(diagnosis: Diagnosis) -> dict[str, float | None]:
    """Return every number of a diagnosis that has a value, by name."""
    return {name: read(diagnosis) for name, read in NUMBERS.items()}


def kept_neighbors(
    rows: npt.NDArray[np.float32], decoded: npt.NDArray[np.float32], *, sample: int, seed: int
) -> float:
    """Return the share of an item's nearest neighbors that are so after quantization too.

    Args:
        rows: embeddings ``(items, dim)``.
        decoded: what their codes decode to ``(items, dim)``.
        sample: items whose `NEIGHBORS` nearest, by cosine, are compared.
        seed: of the sample and of the order of ties.

    Cost: two searches of the sample among all items.
    """
    queries = sample_rows(len(rows), sample, seed=seed)
    near = min(NEIGHBORS, len(rows) - 1)
    search = index_database(torch.from_numpy(np.ascontiguousarray(rows)), metric="cosine")
    exclude = torch.from_numpy(np.asarray(queries, np.int64))
    nearest = top_k(torch.from_numpy(rows[queries]), search, near, exclude=exclude).indices.numpy()
    pairs = item_pairs(np.repeat(queries, near), nearest.reshape(-1), pool=len(rows))
    ranks = neighbor_ranks(decoded, pairs, depth=near, seed=seed)
    return float((ranks < near).mean())
