"""Metrics against brute force, mutual information against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.errors import InputError, UsageError
from semid.recommenders.ranking.analysis import (
    adjusted_mutual_information,
    normalized_mutual_information,
)
from semid.recommenders.ranking.metrics import (
    auc,
    auc_by_user,
    auc_difference,
    auc_error,
    average_ranks,
    calibration,
    log_loss,
    measure,
    sigmoid,
    slice_masks,
)
from semid.reproduce.intervals import paired_difference, student_quantile


def brute_auc(labels, scores):
    wins = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean(wins)) if wins else math.nan


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=2, max_size=40))
def test_auc_with_ties_is_the_share_of_pairs_in_order(rows):
    labels = np.array([r[0] for r in rows], dtype=np.float32)
    scores = np.array([r[1] for r in rows], dtype=np.float32)
    assert auc(labels, scores) == pytest.approx(brute_auc(labels, scores), nan_ok=True)


def test_auc_agrees_with_sklearn_and_ranks_with_scipy():
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    labels = (generator.random(5000) < 0.3).astype(np.float32)
    scores = np.round(generator.normal(size=5000) + labels, 1).astype(np.float32)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert np.array_equal(average_ranks(scores), rankdata(scores))


def test_the_error_of_the_auc_is_its_spread_over_samples():
    generator = np.random.default_rng(1)

    def sample():
        labels = np.repeat([1.0, 0.0], 150)
        return labels, generator.normal(size=300) + labels

    drawn = [sample() for _ in range(300)]
    spread = np.std([auc(*s) for s in drawn])
    stated = np.mean([auc_error(*s) for s in drawn])
    assert stated == pytest.approx(spread, rel=0.15)
    assert math.isnan(auc_error(np.array([1.0, 0.0, 0.0]), np.array([1.0, 2.0, 3.0])))


def test_the_error_of_a_difference_is_that_of_delong():
    generator = np.random.default_rng(3)
    labels = (generator.random(300) < 0.4).astype(np.float32)
    first = (labels + generator.normal(size=300)).round(1)  # with ties
    second = (first + 0.5 * generator.normal(size=300)).round(1)
    # One minus one half at ties, per pair of a positive and a negative row, and their means.
    variance = 0.0
    for axis in (1, 0):
        means = []
        for scores in (first, second):
            apart = scores[labels == 1][:, None] - scores[labels == 0]
            means.append(((apart > 0) + 0.5 * (apart == 0)).mean(axis))
        covariance = np.cov(means)
        variance += (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / len(means[0])
    difference, error = auc_difference(labels, first, second)
    assert difference == pytest.approx(brute_auc(labels, first) - brute_auc(labels, second))
    assert error == pytest.approx(math.sqrt(variance))
    assert error < auc_error(labels, first)
    assert auc_difference(labels, first, 2 * first) == (0.0, 0.0)
    assert math.isnan(auc_difference(labels[:1], first[:1], second[:1])[1])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=40
    )
)
def test_auc_by_user_is_the_mean_of_each_users(rows):
    users = np.array([r[0] for r in rows])
    labels = np.array([r[1] for r in rows], dtype=np.float32)
    scores = np.array([r[2] for r in rows], dtype=np.float32)
    each, weight = [], []
    for user in np.unique(users):
        own = users == user
        if 0 < labels[own].sum() < own.sum():
            each.append(brute_auc(labels[own], scores[own]))
            weight.append(own.sum())
    mean, weighted, counted = auc_by_user(labels, scores, users)
    assert counted == len(each)
    if each:
        assert mean == pytest.approx(np.mean(each))
        assert weighted == pytest.approx(np.average(each, weights=weight))
    else:
        assert math.isnan(mean)


def test_log_loss_and_calibration():
    from sklearn.metrics import log_loss as sklearn_loss

    generator = np.random.default_rng(2)
    logits = generator.normal(size=4000).astype(np.float32) * 3
    labels = (generator.random(4000) < sigmoid(logits)).astype(np.float32)
    assert log_loss(labels, logits) == pytest.approx(
        sklearn_loss(labels, sigmoid(logits)), rel=1e-6
    )
    ratio, error = calibration(labels, sigmoid(logits))
    assert ratio == pytest.approx(1, abs=0.03)
    assert error < 0.03
    ratio, error = calibration(labels, sigmoid(logits + 1))
    assert ratio > 1.1
    assert error > 0.1
    assert log_loss(np.array([1.0]), np.array([-800.0])) == pytest.approx(800)


def test_figures_of_one_class_are_none_in_a_report():
    found = measure(
        np.ones(3), np.zeros(3, np.float32), users=np.arange(3), popularity=np.ones(3)
    ).to_dict()
    assert found["auc"] is None
    assert found["rows"] == 3


def test_bad_scores_are_refused():
    with pytest.raises(InputError, match="1 scores are not finite"):
        auc(np.array([0.0, 1.0]), np.array([0.0, np.nan]))
    with pytest.raises(InputError, match="one of each per row"):
        auc(np.zeros(2), np.zeros(3))


def test_slices():
    interactions = np.array([0, 0, 3, 50, 20, 12, 11])
    masks = slice_masks(np.array([1, 2, 3, 4, 5, 6, 0]), interactions)
    assert masks["unseen"].tolist() == [True, False, False, False, False, False, True]
    assert masks["few"].tolist() == [False, True, False, False, False, False, False]
    assert masks["head"].tolist() == [False, False, True, False, False, False, False]
    seen = masks["head"] | masks["mid"] | masks["tail"]
    assert np.array_equal(seen, ~masks["unseen"])


def test_mutual_information_agrees_with_sklearn():
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    generator = np.random.default_rng(4)
    for clusters, classes, rows in ((1, 1, 5), (1, 2, 9), (7, 2, 200), (20, 5, 300), (60, 2, 60)):
        a = generator.integers(0, clusters, rows)
        b = (a + generator.integers(0, 2, rows)) % classes
        assert normalized_mutual_information(a, b) == pytest.approx(
            normalized_mutual_info_score(a, b), abs=1e-9
        )
        assert adjusted_mutual_information(a, b) == pytest.approx(
            adjusted_mutual_info_score(a, b), abs=1e-9
        )


def test_paired_differences():
    from scipy import stats

    for freedom in (1, 2, 3, 4, 5, 9, 30):
        for share in (0.9, 0.975, 0.995):
            assert student_quantile(share, freedom) == pytest.approx(
                stats.t.ppf(share, freedom), rel=1e-6
            )
    a, b = [0.81, 0.82, 0.80, 0.83, 0.82], [0.80, 0.80, 0.79, 0.81, 0.81]
    found = paired_difference(a, b)
    test = stats.ttest_rel(a, b).confidence_interval()
    assert (found.low, found.high) == pytest.approx((test.low, test.high))
    assert found.shown
    assert "no difference seen" in str(paired_difference([1.0, 2.0], [2.0, 1.0]))
    assert math.isnan(paired_difference([1.0], [0.5]).low)
    with pytest.raises(UsageError, match="cannot be paired"):
        paired_difference([1.0], [])
