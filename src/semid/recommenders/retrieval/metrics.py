"""Metrics of next-item recommendation over the whole catalogue, as expectations over ties.

Items that share an id, or a score, stand in no order. If ``above`` items score higher than the
target and ``ties`` items score the same, the target among them, its rank is uniform in
``above + 1 ... above + ties``. Every metric is the expectation over that rank; the best and the
worst case stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from semid.diagnostics.pairs import Estimate, bootstrap
from semid.results import Result

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

RECALLS = (5, 10, 20, 50)
NDCGS = (5, 10, 20)
LIST = 10
"""Length of the lists whose catalogue coverage is reported."""

LENGTHS = ((1, 4), (5, 9), (10, 19), (20, None))
"""Slices by history length: first and last length of each."""

MISSING = np.iinfo(np.int64).max // 2
"""``above`` of a target that a list does not hold, or that the model cannot score."""


@dataclass(frozen=True)
class Ranks:
    """Where the targets stand: how many items score higher, and how many the same.

    Attributes:
        above: ``(users,)`` int64; `MISSING` for a target that the model does not list.
        ties: ``(users,)`` int64, at least 1: the target counts itself.
    """

    above: Ints
    ties: Ints


def user_metrics(ranks: Ranks, case: str = "expected") -> dict[str, Floats]:
    """Return each metric per user ``(users,)``.

    Args:
        ranks: where the targets stand.
        case: ``expected`` over the order of ties, or the ``best`` or ``worst`` order.
    """
    above, ties = ranks.above, ranks.ties
    if case != "expected":
        above = above if case == "best" else above + ties - 1
        ties = np.ones_like(ties)
    metrics: dict[str, Floats] = {}
    for k in RECALLS:
        # Of the `ties` ranks, those up to k are hits.
        metrics[f"recall@{k}"] = np.clip(k - above, 0, ties) / ties
    # Sums of the discounts of ranks 1 to n: a mean over a range of ranks is one subtraction.
    discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(1, max(NDCGS) + 1) + 1))])
    for k in NDCGS:
        first, last = np.minimum(above, k), np.minimum(above + ties, k)
        metrics[f"ndcg@{k}"] = (discounts[last] - discounts[first]) / ties
    # The mean of 1 / rank over consecutive ranks is a difference of harmonic numbers.
    missing = above >= MISSING
    reachable = np.where(missing, 0, above)
    longest = int((reachable + ties).max(initial=1))
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, longest + 1))])
    reciprocal = (harmonic[reachable + ties] - harmonic[reachable]) / ties
    metrics["mrr"] = np.where(missing, 0.0, reciprocal)
    return metrics


@dataclass(frozen=True)
class Slice(Result):
    """Metrics over some of the users."""

    users: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class RetrievalResults(Result):
    """How well a model recommends each user's next item, among all items.

    Attributes:
        protocol: split, order, candidates and scoring, in one line.
        part: ``validation`` or ``test``.
        users: users evaluated.
        metrics: recall and NDCG at each cutoff, and MRR: expectation over ties with a 95 %
            percentile bootstrap interval over users.
        best: the same figures if every tie were won.
        worst: the same figures if every tie were lost.
        without_history: the figures with the items of a user's history left out of the candidates.
        id_level: hits on the target's id instead of the item; None without codes.
        slices: by popularity of the target, by length of the history, and for targets that training
            never saw; empty slices are left out.
        coverage: share of the catalogue that appears in any user's first `LIST`.
        seconds: duration of the evaluation.
        per_user: metric -> ``(users,)`` expectation for each user, for paired comparisons.
    """

    omit_none: ClassVar[tuple[str, ...]] = ("id_level",)

    protocol: str
    part: str
    users: int
    metrics: Mapping[str, Estimate]
    best: Mapping[str, float]
    worst: Mapping[str, float]
    without_history: Mapping[str, float]
    slices: Mapping[str, Slice]
    coverage: float
    seconds: float
    id_level: Mapping[str, float] | None = None
    per_user: Mapping[str, Any] = field(default_factory=dict, compare=False)


def popularity_slices(counts: Ints, targets: Ints) -> dict[str, npt.NDArray[np.bool_]]:
    """Return masks ``(users,)`` of targets by popularity.

    Head, mid and tail each take a third of all training interactions, from the most popular item
    down; ``unseen`` are items without any.
    """
    order = np.argsort(-counts, kind="stable")
    # The share of interactions before an item decides, so that the head holds at least one item.
    before = (np.cumsum(counts[order]) - counts[order]) / max(int(counts.sum()), 1)
    third = np.empty(len(counts), np.int64)
    third[order] = np.minimum((before * 3).astype(np.int64), 2)
    third[counts == 0] = 3
    names = ("head items", "mid items", "tail items", "unseen items")
    return {name: third[targets] == number for number, name in enumerate(names)}


def length_slices(lengths: Ints) -> dict[str, npt.NDArray[np.bool_]]:
    """Return masks ``(users,)`` of users by the length of their history."""
    return {
        f"histories of {low} to {high}" if high else f"histories of {low} or more": (
            (lengths >= low) & (lengths <= (high or np.inf))
        )
        for low, high in LENGTHS
    }


def estimates(metrics: Mapping[str, Floats], *, replicates: int, seed: int) -> dict[str, Estimate]:
    """Return the mean of each metric with its bootstrap interval over users."""
    values = np.stack(list(metrics.values()), axis=1)
    # Totals over the drawn users; the number of users is a total of its own.
    sums = np.concatenate([values, np.ones((len(values), 1))], axis=1)
    points = bootstrap(
        sums, lambda t: t[:, :-1] / t[:, -1:], replicates=replicates, confidence=0.95, seed=seed
    )
    return dict(zip(metrics, points, strict=True))


def means(metrics: Mapping[str, Floats]) -> dict[str, float]:
    """Return the mean of each metric over users."""
    return {name: float(values.mean()) for name, values in metrics.items()}


def summarize(
    ranks: Ranks,
    *,
    targets: Ints,
    lengths: Ints,
    counts: Ints,
    without_history: Ranks,
    id_ranks: Ranks | None,
    replicates: int = 1000,
    seed: int = 0,
    **about: Any,
) -> RetrievalResults:
    """Turn ranks into results.

    Args:
        ranks: of the targets among all items.
        targets: ``(users,)`` catalogue rows.
        lengths: ``(users,)`` items in each history, before it was cut.
        counts: ``(items,)`` training interactions.
        without_history: ranks among the items that are not in the user's history.
        id_ranks: ranks of the target's id among all ids, or None.
        replicates: bootstrap draws.
        seed: of the draws.
        about: the other fields of `RetrievalResults`.
    """
    # Every figure is a mean over users of the same values, so slices and intervals agree.
    per_user = user_metrics(ranks)
    slices = {}
    for name, mask in {**popularity_slices(counts, targets), **length_slices(lengths)}.items():
        if mask.any():
            part = {metric: values[mask] for metric, values in per_user.items()}
            figures = estimates(part, replicates=replicates, seed=seed)
            slices[name] = Slice(int(mask.sum()), figures)
    return RetrievalResults(
        users=len(targets),
        metrics=estimates(per_user, replicates=replicates, seed=seed),
        best=means(user_metrics(ranks, "best")),
        worst=means(user_metrics(ranks, "worst")),
        without_history=means(user_metrics(without_history)),
        id_level=None if id_ranks is None else means(user_metrics(id_ranks)),
        slices=slices,
        per_user=per_user,
        **about,
    )
