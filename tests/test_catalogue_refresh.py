"""Refreshes keep what can be kept; drift tells a moved catalogue from a resampled one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import semid
from catalogue_cases import drawn_tokenizer, rows
from semid.catalogue.drift import drift
from semid.catalogue.matching import churn, match_codes
from semid.catalogue.refresh import refresh
from semid.catalogue.uniqueness import make_unique
from semid.data.ids import ItemIds, held_out_mask
from semid.errors import FingerprintError, InputError, UsageError
from semid.quantization.kmeans import KMeansOptions
from semid.tokenizers.stored import HELD_OUT_SALT


def names(picked):
    return ItemIds([f"i{n}" for n in picked])


@pytest.fixture(scope="module")
def later(clustered):
    """The same rows, but the last third has moved: a refit has something to do."""
    moved = clustered.copy()
    moved[800:] = 1.5 * moved[800:] + 2.0
    return moved


@pytest.fixture(scope="module")
def first(clustered):
    """A model of 800 of the 1,200 items, and their published ids."""
    tokenizer = semid.RQKMeans(
        levels=2, codebook_size=16, threads=1, kmeans=KMeansOptions(max_iter=10)
    )
    tokenizer.fit(clustered[:800], ids=names(range(800)))
    return tokenizer, tokenizer.encode(clustered[:800], ids=names(range(800)))


@pytest.mark.parametrize("weighted", [False, True])
def test_matching_keeps_the_most_items(weighted):
    generator = np.random.default_rng(0)
    old, new = generator.integers(0, 7, (2, 300))
    weights = generator.integers(1, 9, 300).astype(float) if weighted else None
    a, b = generator.normal(size=(2, 7, 3)).astype("f4")
    numbers = match_codes(old, new, a, b, weights=weights)
    assert sorted(numbers) == list(range(7))
    mass = np.ones(300) if weights is None else weights
    together = np.zeros((7, 7))
    np.add.at(together, (new, old), mass)
    r, c = linear_sum_assignment(-together)
    assert mass[numbers[new] == old].sum() == together[r, c].sum()


def test_dead_codes_are_matched_by_distance():
    book = rows(6, dim=3)
    order = np.random.default_rng(1).permutation(6)
    numbers = match_codes(np.zeros(0, int), np.zeros(0, int), book, book[order])
    assert np.array_equal(numbers, order)
    # One item that counts 0.5 stays at code 0; the other codes are matched by distance.
    order[np.flatnonzero(order == 0)], order[0] = order[0], 0
    one = np.zeros(1, int)
    numbers = match_codes(one, one, book, book[order], weights=np.array([0.5]))
    assert np.array_equal(numbers, order)
    with pytest.raises(UsageError, match="codebook sizes"):
        match_codes(np.zeros(0, int), np.zeros(0, int), book, book[:4])


def test_no_distance_outweighs_an_item():
    """Every code keeps its one item, though all codewords have moved to another's place."""
    book, codes = 100 * rows(8, dim=3), np.arange(8)
    for weights in (None, np.full(8, 0.01)):
        numbers = match_codes(codes, codes, book, np.roll(book, 1, axis=0), weights=weights)
        assert np.array_equal(numbers, codes)


def test_renumbering_changes_names_only_and_can_be_undone():
    tokenizer, x = drawn_tokenizer(sizes=(8, 8)), rows(200)
    generator = np.random.default_rng(0)
    other = tokenizer.renumbered([generator.permutation(8) for _ in range(2)])
    before, after = tokenizer.encode(x).codes, other.encode(x).codes
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(tokenizer.decode(before), other.decode(after))
    numbers = [
        match_codes(before[:, n], after[:, n], tokenizer.codebooks[n], other.codebooks[n])
        for n in range(2)
    ]
    back = other.renumbered(numbers)
    assert back.codebook_fingerprint == tokenizer.codebook_fingerprint


def test_churn_equals_counting():
    old = np.array([[1, 1], [1, 2], [3, 3], [4, 4]])
    new = np.array([[1, 1], [1, 9], [9, 3], [4, 4]])
    found = churn(old, new, weights=np.array([1.0, 2.0, 5.0, 0.0]))
    assert found.moved == 2
    assert found.level == (0.25, 0.25)
    assert found.prefix == (0.25, 0.5)
    assert found.weighted_level == pytest.approx((5 / 8, 2 / 8))
    assert found.weighted_prefix == pytest.approx((5 / 8, 7 / 8))
    third = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0]])
    deep = churn(np.zeros((3, 3), int), third, weights=np.zeros(3))
    assert (deep.moved, deep.prefix) == (2, pytest.approx((1 / 3, 1 / 3, 2 / 3)))
    assert deep.to_dict()["share"] == deep.share == pytest.approx(2 / 3)
    assert deep.weighted_level == deep.weighted_prefix == (0.0, 0.0, 0.0)
    assert churn(old[:0], new[:0]).level == (0.0, 0.0)
    with pytest.raises(InputError, match="shapes"):
        churn(old, new[:2])
    with pytest.raises(InputError, match="shapes"):
        churn(old[0], new[0])


def test_alignment_saves_ids_at_the_same_quality(first, later):
    tokenizer, published = first
    fingerprint = tokenizer.codebook_fingerprint
    result = refresh(
        tokenizer, published, later, ids=names(range(1200)), compare=True,
        popularity=np.arange(1200.0),
    )  # fmt: skip
    report = result.report
    assert tokenizer.codebook_fingerprint == fingerprint
    assert (report.new, report.removed, report.churn.items) == (400, 0, 800)
    assert (report.budget, report.held_back) == (None, 0)
    aligned, fresh = report.generation("refreshed"), report.generation("fresh")
    assert aligned.churn.share < 0.5 * fresh.churn.share
    assert report.generation("fresh, matched").churn.share <= fresh.churn.share
    assert aligned.error < report.generation("previous").error
    assert aligned.error < 1.1 * fresh.error
    # The figures are what they say: counted again from the outcome.
    codes = result.ids.codes
    assert np.array_equal(codes, result.tokenizer.encode(later).codes)
    assert report.churn.moved == (codes[:800] != published.codes).any(1).sum()
    left = later - result.tokenizer.decode(codes)
    spread = ((later - later.mean(0)) ** 2).sum()
    assert aligned.error == pytest.approx((left**2).sum() / spread, rel=1e-4)
    assert report.churn.weighted_prefix is not None
    held = held_out_mask(names(range(1200)), tokenizer.validation_fraction, salt=HELD_OUT_SALT)
    expected = (left[held] ** 2).sum() / ((later - later.mean(0))[held] ** 2).sum()
    assert aligned.held_out_error == pytest.approx(expected, rel=1e-4)
    assert "ids changed" in report.summary()
    assert f"held out {aligned.held_out_error:.4f}" in report.summary()


@pytest.mark.parametrize("method", ["none", "append", "reassign"])
def test_a_budget_holds_and_published_ids_stay(first, clustered, later, method):
    tokenizer, plain = first
    published = make_unique(
        plain, method=method, tokenizer=tokenizer, embeddings=clustered[:800],
        embedding_ids=names(range(800)),
    ).ids  # fmt: skip
    kept = np.arange(100, 1200)  # a hundred items are gone, four hundred new
    result = refresh(tokenizer, published, later[kept], ids=names(kept), max_churn=0.02)
    report = result.report
    assert (report.new, report.removed) == (400, 100)
    assert report.budget == 14
    assert report.churn.moved <= 14
    assert report.held_back > 0
    same = (result.ids.codes[:700] == published.codes[100:]).all(1)
    assert same.sum() >= 700 - 14
    assert np.array_equal(result.ids.encoded, result.tokenizer.encode(later[kept]).codes)
    # Keeping ids is paid for in distortion, and the report says how much.
    assert report.generation("published").error > report.generation("refreshed").error
    if method == "append":
        assert len(np.unique(result.ids.codes, axis=0)) == 1100
    frozen = refresh(tokenizer, published, later[kept], ids=names(kept), max_churn=0.0)
    assert frozen.report.churn.moved == 0
    free = refresh(tokenizer, published, later[kept], ids=names(kept), max_churn=1.0)
    assert (free.report.budget, free.report.held_back) == (700, 0)


def test_wrong_refreshes_are_refused(first, clustered):
    tokenizer, published = first
    with pytest.raises(UsageError, match="max_churn=2"):
        refresh(tokenizer, published, clustered, max_churn=2)
    with pytest.raises(UsageError, match=r"popularity has shape \(1,\)"):
        refresh(tokenizer, published, clustered, popularity=[1.0])
    with pytest.raises(InputError, match="none of the 1200 items was published"):
        refresh(tokenizer, published, clustered)
    with pytest.raises(FingerprintError):
        refresh(drawn_tokenizer(dim=24, sizes=(16, 16)), published, clustered)


def test_drift_is_silent_on_a_resample_and_speaks_of_a_shift(first, clustered):
    tokenizer, _ = first
    same = drift(tokenizer, clustered[:800], clustered[:800])
    assert same.verdict == "none"
    assert same.changed == 0
    assert all(level.total_variation == level.jensen_shannon == 0 for level in same.levels)
    alike = drift(
        tokenizer, clustered[:600], clustered[600:800],
        before_ids=names(range(600)), after_ids=names(range(600, 800)),
    )  # fmt: skip
    assert alike.shared == 0
    assert alike.levels[0].excess < 0.1
    shifted = drift(
        tokenizer, clustered[:800], clustered[:200] + 1.0,
        before_ids=names(range(800)), after_ids=names(range(1000, 1200)),
    )  # fmt: skip
    assert shifted.verdict == "refresh"
    assert shifted.error_after > shifted.error_before
    assert shifted.novel_new > 0.1
    assert len(shifted.reasons) >= 2
    assert "refresh" in shifted.summary()
    with pytest.raises(InputError, match="no rows"):
        drift(tokenizer, clustered[:800], clustered[:0])


def test_drift_figures_equal_their_definitions(first, clustered, later):
    tokenizer, _ = first
    found = drift(
        tokenizer, clustered[:700], later[500:],
        before_ids=names(range(700)), after_ids=names(range(500, 1200)),
    )  # fmt: skip
    parts = [clustered[:700], later[500:]]
    encoded = [tokenizer.encode(part) for part in parts]
    squares = [(e.residual_norms.astype(float) ** 2).mean() for e in encoded]
    spread = ((parts[0] - parts[0].mean(0)) ** 2).sum(1).mean()
    assert found.error_before == pytest.approx(squares[0] / spread, rel=1e-4)
    assert found.error_after == pytest.approx(squares[1] / spread, rel=1e-4)
    assert (found.items_before, found.items_after, found.shared) == (700, 700, 200)
    same = encoded[0].codes[500:] == encoded[1].codes[:200]
    assert found.changed == (~same).any(1).mean()
    quantiles = np.quantile(encoded[1].residual_norms, [0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    assert found.norm_quantiles_after == pytest.approx(quantiles, rel=1e-5)
    counts = np.bincount(encoded[1].codes[:, 0], minlength=16)
    assert found.levels[0].dead_after == (counts == 0).sum()
    p = counts[counts > 0] / 700
    assert found.levels[0].perplexity_after == pytest.approx(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize(
    ("error", "excess", "novel_new", "novel", "verdict"),
    [
        (1.09, 0.09, 0.02, 0.9, "none"),  # of all items, novelty does not count where some are new
        (1.11, 0.0, 0.0, 0.0, "watch"),
        (1.24, 0.0, 0.0, 0.0, "watch"),
        (1.26, 0.0, 0.0, 0.0, "refresh"),
        (1.0, 0.11, 0.0, 0.0, "watch"),
        (1.0, 0.24, 0.0, 0.0, "watch"),
        (1.0, 0.26, 0.0, 0.0, "refresh"),
        (1.0, 0.0, 0.04, 0.0, "watch"),
        (1.0, 0.0, 0.09, 0.0, "watch"),
        (1.0, 0.0, 0.11, 0.0, "refresh"),
        (1.0, 0.0, None, 0.04, "watch"),
        (1.0, 0.0, None, 0.11, "refresh"),
    ],
)
def test_drift_is_judged_at_its_thresholds(error, excess, novel_new, novel, verdict):
    from semid.catalogue.drift import LevelDrift, _verdict

    calm = LevelDrift(0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0, 0)
    moved = LevelDrift(1, excess, 0.0, excess, 0.0, 1.0, 1.0, 1.0, 1.0, 0, 0)
    result, reasons = _verdict((calm, moved), [0.5, 0.5 * error], novel_new, novel)
    assert result == verdict
    assert len(reasons) == (verdict != "none")
    if excess > 0.1:
        assert reasons[0].startswith(f"level 2: {excess:.1%}")


def test_usage_figures_equal_their_definitions(first, clustered):
    tokenizer, _ = first
    found = drift(tokenizer, clustered[:700], clustered[500:])
    for level in range(2):
        p, q = (
            np.bincount(tokenizer.encode(part).codes[:, level], minlength=16) / len(part)
            for part in (clustered[:700], clustered[500:])
        )
        assert found.levels[level].total_variation == pytest.approx(np.abs(p - q).sum() / 2)
        m = (p + q) / 2
        parts = [np.where(r > 0, r * np.log2(np.where(r > 0, r, 1) / m), 0).sum() for r in (p, q)]
        assert found.levels[level].jensen_shannon == pytest.approx(sum(parts) / 2, abs=1e-9)


@pytest.mark.parametrize("shared", [0, 300])
def test_the_shift_expected_by_chance_is_that_of_two_samples(shared):
    from semid.catalogue.drift import _level
    from semid.health import usage_from_counts

    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.full(32, 2.0))
    found = []
    for _ in range(200):
        both = generator.multinomial(shared, p)
        a, b = (
            usage_from_counts(both + generator.multinomial(n - shared, p), level=0)
            for n in (2000, 500)
        )
        found.append(_level(a, b, 1.0, 1.0, shared=shared))
    measured = np.mean([level.total_variation for level in found])
    assert np.mean([level.expected for level in found]) == pytest.approx(measured, rel=0.04)
