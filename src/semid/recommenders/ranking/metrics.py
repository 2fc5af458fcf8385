"""Metrics of scores (exact AUC with its error, log loss, calibration), and of trained networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.diagnostics.pairs import average_ranks
from semid.diagnostics.popularity import SEGMENTS, popularity_segments
from semid.errors import InputError
from semid.recommenders.ranking.builder import RankingData
from semid.recommenders.ranking.network import RankingNetwork
from semid.recommenders.ranking.schema import Inputs, RankingRows
from semid.seeds import numpy_generator

Floats = npt.NDArray[np.floating[Any]]

EVALUATION_BATCH = 65_536
"""Rows scored at once."""

MAX_FEW_INTERACTIONS = 10
"""Largest number of training interactions of an item in the slice ``few``."""


def _positive(labels: npt.NDArray[Any], scores: Floats) -> npt.NDArray[np.bool_]:
    """Return the mask of positive rows, after a check of shapes and scores."""
    if labels.shape != scores.shape or labels.ndim != 1:
        raise InputError(
            f"labels have shape {labels.shape} and scores {scores.shape}; give one of each per row"
        )
    if not np.isfinite(scores).all():
        raise InputError(f"{int((~np.isfinite(scores)).sum())} scores are not finite")
    positive: npt.NDArray[np.bool_] = labels > 0.5
    return positive


def auc(labels: npt.NDArray[Any], scores: Floats) -> float:
    """Return the area under the ROC curve, NaN with one class; ties count one half."""
    positive = _positive(labels, scores)
    count, other = int(positive.sum()), int((~positive).sum())
    if not count or not other:
        return math.nan
    # Mann-Whitney: the rank sum of the positives, less its smallest value, counts the pairs.
    total = average_ranks(scores)[positive].sum()
    return float((total - count * (count + 1) / 2) / (count * other))


def auc_error(labels: npt.NDArray[Any], scores: Floats) -> float:
    """Return the standard error of the AUC over test rows (DeLong et al. 1988), from ranks.

    NaN with fewer than two rows of a class. Two models on the same rows differ much less, see
    `auc_difference`.
    """
    return _standard_error(*_auc_components(labels, scores))


def auc_difference(labels: npt.NDArray[Any], first: Floats, second: Floats) -> tuple[float, float]:
    """Return by how much the AUC of ``first`` is above that of ``second``, and its error.

    The standard error is over test rows, paired (DeLong et al. 1988): the same rows are easy for
    both. It says nothing about another seed.
    """
    pairs = zip(_auc_components(labels, first), _auc_components(labels, second), strict=True)
    difference = auc(labels, first) - auc(labels, second)
    return difference, _standard_error(*(one - other for one, other in pairs))


def _auc_components(
    labels: npt.NDArray[Any], scores: Floats
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return per positive and per negative row its share of the other class on the right side."""
    positive = _positive(labels, scores)
    count, other = int(positive.sum()), int((~positive).sum())
    # A rank among all rows less the rank within the own class counts the rows of the other class
    # below: DeLong's structural components, whose variances add up.
    ranks = average_ranks(scores)
    above = (ranks[positive] - average_ranks(scores[positive])) / max(other, 1)
    below = 1 - (ranks[~positive] - average_ranks(scores[~positive])) / max(count, 1)
    return above, below


def _standard_error(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> float:
    if min(len(above), len(below)) < 2:
        return math.nan
    return math.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))


def auc_by_user(
    labels: npt.NDArray[Any], scores: Floats, users: npt.NDArray[Any]
) -> tuple[float, float, int]:
    """Return mean AUC per user, mean weighted by rows, and number of users with both labels."""
    positive = _positive(labels, scores)
    # Rows user by user, by score within each; ties are runs of equal user and score.
    order = np.lexsort((scores, users))
    user, score, is_positive = users[order], scores[order], positive[order]
    first = np.concatenate([[True], user[1:] != user[:-1]])
    starts = np.flatnonzero(first)
    number = np.cumsum(first) - 1
    ties = np.flatnonzero(first | np.concatenate([[True], score[1:] != score[:-1]]))
    ends = np.concatenate([ties[1:], [len(user)]])
    # Average ranks over all rows, less the rows of earlier users, are ranks within the user.
    ranks = np.repeat((ties + 1 + ends) / 2, ends - ties) - starts[number]
    rows = np.bincount(number)
    positives = np.bincount(number, weights=is_positive)
    rank_sums = np.bincount(number, weights=ranks * is_positive)
    defined = (positives > 0) & (positives < rows)
    if not defined.any():
        return math.nan, math.nan, 0
    rows, positives, rank_sums = rows[defined], positives[defined], rank_sums[defined]
    aucs = (rank_sums - positives * (positives + 1) / 2) / (positives * (rows - positives))
    return float(aucs.mean()), float(np.average(aucs, weights=rows)), int(defined.sum())


def log_loss(labels: npt.NDArray[Any], logits: Floats) -> float:
    """Return the mean negative log likelihood, in nats, from logits ``(rows,)``."""
    positive = _positive(labels, logits)
    # -log sigmoid(z) = log(1 + exp(-z)), which logaddexp computes without overflow.
    signed = np.where(positive, logits, -logits).astype(np.float64)
    return float(np.logaddexp(0.0, -signed).mean())


def calibration(
    labels: npt.NDArray[Any], probabilities: Floats, *, bins: int = 20
) -> tuple[float, float]:
    """Return mean probability over mean label, and the calibration error over equal bins."""
    positive = _positive(labels, probabilities).astype(np.float64)
    # Bins by predicted probability. The error (ECE) is the mean of |mean probability - mean label|
    # over the bins, weighed by their rows.
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, max(1, min(bins, len(order))))
    predicted = np.array([probabilities[part].mean(dtype=np.float64) for part in parts])
    observed = np.array([positive[part].mean() for part in parts])
    weight = np.array([len(part) for part in parts]) / len(order)
    base = positive.mean()
    ratio = float(probabilities.mean(dtype=np.float64) / base) if base else math.nan
    return ratio, float((weight * np.abs(predicted - observed)).sum())


def sigmoid(logits: Floats) -> npt.NDArray[np.float64]:
    """Return probabilities of logits ``(rows,)``, float64."""
    wide = logits.astype(np.float64)
    return np.exp(-np.logaddexp(0.0, -wide))


@dataclass(frozen=True)
class Metrics:
    """Metrics of one set of rows."""

    rows: int  # number of rows
    positives: int  # rows with label 1
    auc: float  # AUC over all rows
    auc_error: float  # its standard error over test rows
    log_loss: float  # log loss in nats
    user_auc: float  # mean AUC per user
    user_auc_weighted: float  # the same weighted by rows
    users: int  # users with rows of both labels
    calibration_ratio: float  # mean prediction over mean label
    calibration_error: float  # calibration error over 20 bins of equally many rows
    popularity_auc: float  # AUC of the number of training positives of the row's item

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; what is not defined (NaN) becomes None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def measure(
    labels: npt.NDArray[Any],
    logits: Floats,
    *,
    users: npt.NDArray[Any],
    popularity: npt.NDArray[Any],
) -> Metrics:
    """Measure rows; ``popularity`` ``(rows,)`` counts training positives of the row's item."""
    return Metrics(
        len(labels),
        int((labels > 0.5).sum()),
        auc(labels, logits),
        auc_error(labels, logits),
        log_loss(labels, logits),
        *auc_by_user(labels, logits, users),
        *calibration(labels, sigmoid(logits)),
        auc(labels, popularity.astype(np.float64)),
    )


def apply_in_batches(
    network: RankingNetwork, rows: RankingRows, function: Callable[[Inputs], Tensor]
) -> list[npt.NDArray[np.float32]]:
    """Apply a function to all inputs in evaluation mode; the network's mode is put back."""
    was_training = network.training
    network.eval()
    # The rows may lie on another device than the network; only the batch moves.
    device = next(network.parameters()).device
    with torch.no_grad():
        results = [
            function(inputs.to(device)).cpu().numpy() for inputs in rows.blocks(EVALUATION_BATCH)
        ]
    network.train(was_training)
    return results


def predict_logits(network: RankingNetwork, rows: RankingRows) -> npt.NDArray[np.float32]:
    """Score rows ``(rows,)`` in evaluation mode."""
    logits = apply_in_batches(network, rows, network.logits)
    return np.concatenate(logits) if logits else np.empty(0, np.float32)


def slice_masks(
    items: npt.NDArray[np.int64], interactions: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return a mask ``(rows,)`` per slice of the rows, by the catalogue row of their item."""
    # Unseen items have no training interactions and few at most so many; head, mid and tail are 10,
    # 40 and 50 % of the seen items, by interactions.
    counts = interactions[items]
    segment = popularity_segments(interactions)[items]
    masks = {"unseen": counts == 0, "few": (counts >= 1) & (counts <= MAX_FEW_INTERACTIONS)}
    return masks | {name: segment == number for number, name in enumerate(SEGMENTS[:3])}


def evaluate(network: RankingNetwork, data: RankingData) -> dict[str, Any]:
    """Measure a trained network on every part but training."""
    report: dict[str, Any] = {}
    for name, rows in data.parts.items():
        if name == "train":
            continue
        labels, users = rows.label.cpu().numpy(), rows.person.cpu().numpy()
        items = rows.item.cpu().numpy().astype(np.int64)
        logits, popularity = predict_logits(network, rows), data.positives[items]
        masks = {name: np.ones(len(rows), bool)}
        if name == "test":
            masks |= slice_masks(items, data.interactions)
        measured = {
            key: measure(
                labels[mask], logits[mask], users=users[mask], popularity=popularity[mask]
            ).to_dict()
            for key, mask in masks.items()
            if mask.any()
        }
        report[name] = measured.pop(name)
        if name == "test":
            report["slices"] = measured
    return report


def reliance(network: RankingNetwork, data: RankingData, *, seed: int = 0) -> dict[str, float]:
    """Return how much a trained network relies on its fusion and its codes, on the test part.

    Returns:
        ``auc``; with fusion ``fusion_norm`` (of ``W_down W_up``) and ``auc_without_fusion``, the
        AUC of the same weights without it; with codes ``auc_codes_shuffled``, the AUC of the same
        weights after items swap their codes.
    """
    rows = data.parts["test"]
    labels = rows.label.cpu().numpy()

    def score() -> float:
        return auc(labels, predict_logits(network, rows))

    # The network is changed in place for each score, and put back whatever happens.
    figures = {"auc": score()}
    fusion, table = network.fusion, network.index.code_rows
    try:
        if fusion is not None:
            network.fusion = None
            figures |= {"fusion_norm": fusion.norm(), "auc_without_fusion": score()}
            network.fusion = fusion
        if network.index.slots:
            # Row 0 belongs to items without codes and stays.
            order = 1 + numpy_generator(seed, "shuffled at test").permutation(len(table) - 1)
            shuffled = table[torch.from_numpy(order).to(table.device)]
            network.index.code_rows = torch.cat([table[:1], shuffled])
            figures["auc_codes_shuffled"] = score()
    finally:
        network.fusion, network.index.code_rows = fusion, table
    return figures
