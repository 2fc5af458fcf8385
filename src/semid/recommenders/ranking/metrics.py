"""How good scores are: exact AUC with its error, log loss, calibration, AUC by user."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.errors import InputError

Floats = npt.NDArray[np.floating[Any]]


def average_ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the rank of each value ``(n,)``, from 1; equal values share the mean of theirs."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    # Runs of equal values hold the ranks start + 1 to end, whose mean is (start + 1 + end) / 2.
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.concatenate([starts[1:], [len(values)]])
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return ranks


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
    """Return the area under the ROC curve, NaN with one class; ties count one half.

    The share of pairs of a positive and a negative row in the right order, from labels 0 or 1 and
    finite scores, each ``(rows,)``. Costs one sort.

    Raises:
        InputError: shapes differ, or a score is not finite.
    """
    positive = _positive(labels, scores)
    count = int(positive.sum())
    other = len(positive) - count
    if not count or not other:
        return math.nan
    # Mann-Whitney: the rank sum of the positives, less its smallest value, counts the pairs.
    total = average_ranks(scores)[positive].sum()
    return float((total - count * (count + 1) / 2) / (count * other))


def auc_error(labels: npt.NDArray[Any], scores: Floats) -> float:
    """Return the standard error of the AUC over test rows (DeLong et al. 1988), from ranks.

    It says how far the AUC of another test sample of this size would lie; differences of two models
    on the same rows vary much less. NaN with fewer than two rows of a class.
    """
    positive = _positive(labels, scores)
    count = int(positive.sum())
    other = len(positive) - count
    if count < 2 or other < 2:
        return math.nan
    # A rank among all rows less the rank within the own class counts the rows of the other class
    # below: DeLong's structural components, whose variances add up.
    ranks = average_ranks(scores)
    above = (ranks[positive] - average_ranks(scores[positive])) / other
    below = 1 - (ranks[~positive] - average_ranks(scores[~positive])) / count
    return math.sqrt(above.var(ddof=1) / count + below.var(ddof=1) / other)


def auc_by_user(
    labels: npt.NDArray[Any], scores: Floats, users: npt.NDArray[Any]
) -> tuple[float, float, int]:
    """Return the mean AUC per user, the mean weighted by rows, and the number of users.

    Users without rows of both labels are left out. All arguments are ``(rows,)``.

    Cost: two sorts, no loop over users.
    """
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


@dataclass(frozen=True)
class Calibration:
    """Predicted probabilities against observed labels."""

    ratio: float  # mean prediction over mean label; 1 is calibrated overall
    error: float  # mean over bins of equally many rows of ``|mean prediction - mean label|`` (ECE)
    predicted: tuple[float, ...]  # mean prediction of each bin
    observed: tuple[float, ...]  # mean label of each bin


def calibration(labels: npt.NDArray[Any], probabilities: Floats, *, bins: int = 20) -> Calibration:
    """Compare probabilities ``(rows,)`` with labels, overall and in bins of equally many rows."""
    positive = _positive(labels, probabilities).astype(np.float64)
    # Bins of equally many rows, by predicted probability; the error weighs them by their rows.
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, max(1, min(bins, len(order))))
    predicted = np.array([probabilities[part].mean(dtype=np.float64) for part in parts])
    observed = np.array([positive[part].mean() for part in parts])
    weight = np.array([len(part) for part in parts]) / len(order)
    base = positive.mean()
    return Calibration(
        ratio=float(probabilities.mean(dtype=np.float64) / base) if base else math.nan,
        error=float((weight * np.abs(predicted - observed)).sum()),
        predicted=tuple(predicted.tolist()),
        observed=tuple(observed.tolist()),
    )


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
    user_auc, user_auc_weighted, user_count = auc_by_user(labels, logits, users)
    fit = calibration(labels, sigmoid(logits))
    return Metrics(
        rows=len(labels),
        positives=int((labels > 0.5).sum()),
        auc=auc(labels, logits),
        auc_error=auc_error(labels, logits),
        log_loss=log_loss(labels, logits),
        user_auc=user_auc,
        user_auc_weighted=user_auc_weighted,
        users=user_count,
        calibration_ratio=fit.ratio,
        calibration_error=fit.error,
        popularity_auc=auc(labels, popularity.astype(np.float64)),
    )
