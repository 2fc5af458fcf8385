"""Joint refinement, least-squares tables and prices against dense twins and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import semid
from semid.data.ids import held_out_mask
from semid.errors import FingerprintError, InputError, UsageError
from semid.quantization import least_squares, refine
from semid.quantization.blocks import ArrayBlocks
from semid.quantization.least_squares import NormalEquations, fit_tables
from semid.quantization.nearest import assign, index_codebook
from semid.quantization.refine import (
    ColumnGroup,
    RefineOptions,
    add_penalties,
    balance_penalties,
    pad_columns,
    refine_residual,
)
from semid.quantization.residual import encode_residual, fit_residual
from semid.tokenizers.stored import HELD_OUT_SALT


def one_hot(codes: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.concatenate([np.eye(size)[codes[:, i]] for i, size in enumerate(sizes)], axis=1)


@pytest.fixture(params=[0, 1024], ids=["gradients", "elimination"])
def solver(request, monkeypatch):
    """Solve by conjugate gradients, or small systems by elimination."""
    monkeypatch.setattr(least_squares, "MAX_DENSE", request.param)


@pytest.mark.parametrize("weighted", [False, True])
def test_tables_equal_those_of_the_dense_equations(solver, weighted):
    generator = np.random.default_rng(0)
    sizes, width = [5, 7, 4], 3
    codes = np.stack([generator.integers(0, size, 200) for size in sizes], axis=1)
    targets = generator.normal(size=(200, width)) + 2.0
    weights = generator.random(200) if weighted else None
    equations = NormalEquations(sizes, width)
    for start in (0, 90):  # in two blocks, as they come
        stop = 90 if not start else 200
        mass = None if weights is None else weights[start:stop]
        equations.add_(codes[start:stop], targets[start:stop], mass)
    start = [np.zeros((size, width)) for size in sizes]
    found = np.concatenate(equations.solve(ridge=2.0, start=start, threads=1))
    hot, mass = one_hot(codes, sizes), np.ones(200) if weights is None else weights
    mean = np.average(targets, axis=0, weights=mass)
    left = hot.T @ (mass[:, None] * hot) + 2.0 * np.eye(sum(sizes))
    expected = np.linalg.solve(left, hot.T @ (mass[:, None] * (targets - mean)))
    expected[: sizes[0]] += mean
    assert np.allclose(found, expected, atol=1e-6)


def test_fewer_levels_columns_and_threads_solve_the_same_system(solver):
    generator = np.random.default_rng(1)
    sizes = [6, 6, 6]
    codes = generator.integers(0, 5, (300, 3))  # code 5 is never used
    targets = generator.normal(size=(300, 4))
    equations = NormalEquations(sizes, 4)
    equations.add_(codes, targets)
    start = [generator.normal(size=(6, 2)) for _ in sizes]
    some = equations.solve(ridge=1.0, start=start, columns=slice(1, 3), levels=2, threads=1)
    again = equations.solve(ridge=1.0, start=start, columns=slice(1, 3), levels=2, threads=3)
    assert len(some) == 2
    assert all(np.array_equal(a, b) for a, b in zip(some, again, strict=True))
    alone = NormalEquations(sizes[:2], 2)
    alone.add_(codes[:, :2], targets[:, 1:3])
    zeros = [np.zeros((6, 2))] * 2
    for a, b in zip(some, alone.solve(ridge=1.0, start=zeros), strict=True):
        assert np.allclose(a[:5], b[:5], atol=1e-6)
    assert np.array_equal(some[1][5], start[1][5])  # no items: it stays


def fitted(x: np.ndarray) -> list[np.ndarray]:
    books, _ = fit_residual(ArrayBlocks(x), [16, 16, 16], seed=0, threads=1)
    return books


def error(x: np.ndarray, books: list[np.ndarray], beam: int) -> float:
    ready = [index_codebook(torch.from_numpy(book)) for book in books]
    norms = encode_residual(x, ready, beam_width=beam, threads=1).residual_norms
    return float(np.square(norms, dtype=np.float64).mean())


def test_refinement_lowers_the_error_of_items_it_does_not_see(clustered):
    train, judged, unseen = clustered[:800], clustered[800:1000], clustered[1000:]
    books = fitted(train)
    options = RefineOptions(beam_width=4, annealing_rounds=0)
    refined, rounds = refine_residual(
        ArrayBlocks(train), books, held_out=ArrayBlocks(judged), options=options, threads=1
    )
    assert rounds
    assert [one.error for one in rounds] == sorted((one.error for one in rounds), reverse=True)
    assert rounds[-1].error == pytest.approx(error(judged, refined, 4))
    assert rounds[0].before == pytest.approx(error(judged, books, 4))
    assert error(unseen, refined, 4) < error(unseen, books, 4)
    more, _ = refine_residual(
        ArrayBlocks(train), books, held_out=ArrayBlocks(judged), options=options, threads=3
    )
    assert all(np.array_equal(a, b) for a, b in zip(refined, more, strict=True))


def test_annealing_leaves_the_nearest_optimum():
    generator = np.random.default_rng(8)
    sums = sum(generator.normal(size=(16, 12))[generator.integers(0, 16, 1800)] for _ in range(3))
    rows = (sums + 0.2 * generator.normal(size=(1800, 12))).astype(np.float32)
    train, judged, unseen = rows[:1200], rows[1200:1500], rows[1500:]
    books = fitted(train)

    def refined(**options):
        return refine_residual(
            ArrayBlocks(train), books, held_out=ArrayBlocks(judged),
            options=RefineOptions(beam_width=4, **options), threads=1,
        )  # fmt: skip

    plain, before = refined(annealing_rounds=0)
    annealed, rounds = refined()
    assert rounds[: len(before)] == before
    assert len(rounds) >= len(before) + RefineOptions().annealing_rounds
    assert rounds[-1].error == pytest.approx(error(judged, annealed, 4))
    assert error(train, annealed, 4) < 0.98 * error(train, plain, 4)
    assert error(unseen, annealed, 4) < 0.98 * error(unseen, plain, 4)
    again, _ = refined()
    assert all(np.array_equal(a, b) for a, b in zip(annealed, again, strict=True))
    lost, rounds = refined(temperature=1000.0, annealing_rounds=2)  # worse, so not kept
    assert rounds == before
    assert all(np.array_equal(a, b) for a, b in zip(lost, plain, strict=True))


def test_columns_outside_the_parts_stay(clustered):
    books = fitted(clustered)
    parts = [ColumnGroup(slice(0, 10), 3), ColumnGroup(slice(10, 20), 1)]
    refined, rounds = refine_residual(
        ArrayBlocks(clustered), books, groups=parts, options=RefineOptions(rounds=1), threads=1
    )
    assert rounds
    assert all(np.array_equal(a[:, 20:], b[:, 20:]) for a, b in zip(refined, books, strict=True))
    assert not np.array_equal(refined[0][:, 10:20], books[0][:, 10:20])
    for level in (1, 2):
        assert np.array_equal(refined[level][:, 10:20], books[level][:, 10:20])
        assert not np.array_equal(refined[level][:, :10], books[level][:, :10])


def test_no_rounds_change_nothing_and_wrong_options_are_refused(clustered):
    books = fitted(clustered)
    same, rounds = refine_residual(
        ArrayBlocks(clustered), books, options=RefineOptions(rounds=0), threads=1
    )
    assert not rounds
    assert all(np.array_equal(a, b) for a, b in zip(same, books, strict=True))
    with pytest.raises(UsageError, match=r"rounds=-1.*beam_width=0.*ridges=\(\)"):
        RefineOptions(rounds=-1, beam_width=0, ridges=())
    with pytest.raises(UsageError, match=r"annealing_rounds=-1.*temperature=nan"):
        RefineOptions(annealing_rounds=-1, temperature=float("nan"))


@pytest.mark.parametrize(
    "kind",
    [
        lambda: semid.RQKMeans(codebook_size=16),
        lambda: semid.DRQVAE(
            codebook_size=16, network={"hidden": (32,), "latent": 8}, training={"epochs": 4}
        ),
    ],
    ids=["rqkmeans", "drqvae"],
)
def test_a_fitted_tokenizer_is_refined_as_a_copy(kind, clustered, tmp_path):
    plain = kind().fit(clustered)
    before = plain.weights_fingerprint
    options = RefineOptions(rounds=2, beam_width=4)
    refined = semid.refine(plain, clustered, options=options)
    assert plain.weights_fingerprint == before
    assert refined.codebook_fingerprint != plain.codebook_fingerprint
    assert refined.beam_width == 4
    figures = refined.report.details["refine"][0]
    assert figures["error"] < figures["before"]
    refined.save(tmp_path / "refined")
    loaded = semid.load(tmp_path / "refined")
    assert np.array_equal(loaded.encode(clustered).codes, refined.encode(clustered).codes)


def test_a_weight_counts_a_row_so_often_and_in_the_noise_too(clustered):
    train, judged = clustered[:900], clustered[900:]
    books, times = fitted(train), np.tile([1, 3], 450)
    options = RefineOptions(rounds=2, annealing_rounds=3, beam_width=2)
    by_weight, by_count = (
        refine_residual(
            ArrayBlocks(rows), books, held_out=ArrayBlocks(judged), options=options, **how
        )
        for rows, how in (
            (train, {"weights": times.astype(np.float64)}),
            (np.repeat(train, times, axis=0), {}),
        )
    )
    assert [r.error for r in by_weight[1]] == pytest.approx([r.error for r in by_count[1]])
    for a, b in zip(by_weight[0], by_count[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        lambda: semid.RQKMeans(codebook_size=16),
        lambda: semid.BARQ(codebook_size=16, behavior_weight=0.0, refine={"rounds": 0}),
    ],
    ids=["rqkmeans", "barq"],
)
def test_items_without_weight_have_no_say_in_a_refinement(kind, clustered):
    plain = kind().fit(clustered)
    held = held_out_mask(semid.open_embeddings(clustered).ids, 0.05, salt=HELD_OUT_SALT)
    silent = ~held & (np.arange(len(clustered)) % 3 == 0)
    other = np.where(silent[:, None], clustered[::-1] + 1, clustered)
    options = RefineOptions(rounds=2, annealing_rounds=2, beam_width=2)
    first, second = (
        semid.refine(plain, rows, weights=~silent, options=options) for rows in (clustered, other)
    )
    assert first.weights_fingerprint == second.weights_fingerprint
    whole = semid.refine(plain, clustered, options=options)
    assert first.codebook_fingerprint != whole.codebook_fingerprint
    only_held = held.astype(float)
    for wrong, why in (
        ([1.0], r"shape \(1,\)"),
        (np.where(silent, -1.0, 1.0), r"weights\[\d+\] is -1"),
        ("popularity", "weights holds no numbers"),
        (only_held, "training items are 0"),
    ):
        with pytest.raises(UsageError, match=why):
            semid.refine(plain, clustered, weights=wrong)
        with pytest.raises(UsageError, match=why):
            kind().fit(clustered, weights=wrong)


def test_parallel_codebooks_are_not_refined(clustered):
    small = {"hidden": (8,), "latent": 4, "pretrain_epochs": 0}
    mixture = semid.MoCVAE(codebook_size=8, network=small, training={"epochs": 1}).fit(clustered)
    with pytest.raises(UsageError, match="parallel"):
        semid.refine(mixture, clustered)


def test_a_head_predicts_another_space_and_changes_no_code(clustered, tmp_path):
    generator = np.random.default_rng(3)
    other = np.tanh(clustered @ generator.normal(size=(24, 6)).astype(np.float32))
    tokenizer = semid.RQKMeans(codebook_size=16).fit(clustered)
    ids = tokenizer.encode(clustered)
    head = semid.DecodeHead.fit(ids, other)
    assert head.error is not None
    assert 0 < head.error < 0.6  # against 1 of the mean
    predicted = head.predict(ids)
    spread = np.square(other - other.mean(axis=0)).sum()
    assert np.square(predicted - other).sum() / spread < head.error  # most items were fitted to
    head.save(tmp_path / "head")
    assert np.array_equal(semid.load(tmp_path / "head").predict(ids.codes), predicted)
    again = semid.RQKMeans(codebook_size=16, seed=1).fit(clustered).encode(clustered)
    with pytest.raises(FingerprintError, match="another codebook"):
        head.predict(again)
    with pytest.raises(InputError, match=r"1199 targets for 1200 items"):
        semid.DecodeHead.fit(ids, other[:-1])
    with pytest.raises(InputError, match="outside"):
        head.predict(np.array([[0, 0, 16]]))
    with pytest.raises(UsageError, match="ridges"):
        semid.DecodeHead.fit(ids, other, ridges=[0.0])


def test_a_head_into_the_input_decodes_no_worse_than_the_codebooks(clustered):
    tokenizer = semid.RQKMeans(codebook_size=16, validation_fraction=0).fit(clustered)
    ids = tokenizer.encode(clustered)
    head = semid.DecodeHead.fit(ids, clustered, ridges=[1e-6], validation_fraction=0)
    ours = np.square(head.predict(ids) - clustered, dtype=np.float64).sum()
    assert ours < np.square(tokenizer.decode(ids) - clustered, dtype=np.float64).sum()


def test_prices_are_one_more_coordinate():
    generator = np.random.default_rng(5)
    rows = generator.normal(size=(500, 4)).astype(np.float32)
    words = generator.normal(size=(9, 4)).astype(np.float32)
    prices = generator.random(9)
    labels, distances = assign(pad_columns(rows, 1), add_penalties(words, prices))
    wide = np.square(rows[:, None].astype(np.float64) - words).sum(axis=2) + prices
    assert np.array_equal(labels, wide.argmin(axis=1))
    assert np.allclose(distances, wide.min(axis=1), rtol=1e-5)


def test_prices_even_out_usage_within_their_bound():
    generator = np.random.default_rng(6)
    rows = np.concatenate(
        [generator.normal(size=(3000, 4)), 3.0 + 0.3 * generator.normal(size=(100, 4))]
    ).astype(np.float32)
    words = np.concatenate([rows[:8], rows[-8:]])
    plain, squared = assign(rows, words)
    limit = 0.5
    (prices,) = balance_penalties(ArrayBlocks(rows), [words], strength=limit, threads=1)
    assert prices.min() == 0
    assert prices.max() <= limit * squared.mean(dtype=np.float64) * (1 + 1e-6)
    labels, _ = assign(pad_columns(rows, 1), add_penalties(words, prices))
    paid = np.square(rows.astype(np.float64) - words[labels]).sum(axis=1)
    assert (paid <= squared + prices.max() + 1e-4).all()

    def entropy(codes: np.ndarray) -> float:
        share = np.bincount(codes, minlength=16) / len(codes)
        share = share[share > 0]
        return float(-(share * np.log(share)).sum())

    assert entropy(labels) > entropy(plain) + 0.05
    assert not balance_penalties(ArrayBlocks(rows), [words], strength=0)[0].any()
    with pytest.raises(UsageError, match="strength=-1"):
        balance_penalties(ArrayBlocks(rows), [words], strength=-1)


@pytest.mark.parametrize("kept", [1, 5])
def test_judged_items_that_are_all_alike_have_no_relative_error(kept):
    generator = np.random.default_rng(9)
    codes, targets = generator.integers(0, 5, (60, 2)), generator.normal(size=(60, 3)) + 7
    alike = (codes[:kept], np.repeat(targets[:1], kept, axis=0).astype(np.float32))
    found = fit_tables(
        [(codes, targets)], [5, 5], 3, held_out=lambda: [alike], ridges=(0.1, 1.0), threads=1
    )
    assert found.error is None


def test_a_weight_of_a_table_counts_an_item_so_often():
    generator = np.random.default_rng(8)
    codes, targets = generator.integers(0, 5, (300, 2)), generator.normal(size=(300, 3))
    weights = generator.integers(0, 4, 300)
    judged = [(codes[:40], targets[:40].astype(np.float32))]

    def tables(blocks, mass=None):
        return fit_tables(
            blocks, [5, 5], 3, held_out=lambda: judged, ridges=(0.5, 2.0), weights=mass, threads=1
        )

    halves = [(codes[:130], targets[:130]), (codes[130:], targets[130:])]
    weighted = tables(halves, weights.astype(np.float64))
    often = np.repeat(np.arange(300), weights)
    repeated = tables([(codes[often], targets[often])])
    assert weighted.ridge == repeated.ridge
    assert np.allclose(weighted.tables, repeated.tables, atol=1e-6)
    assert not np.allclose(weighted.tables, tables(halves).tables, atol=1e-3)


def with_outliers() -> np.ndarray:
    """Rows (1800, 12): sums of three codewords, of which a few are far out."""
    generator = np.random.default_rng(8)
    sums = sum(generator.normal(size=(16, 12))[generator.integers(0, 16, 1800)] for _ in range(3))
    rows = sums + 0.2 * generator.normal(size=(1800, 12))
    rows[::30] *= 3.0
    return rows.astype(np.float32)


def usage_entropy(x: np.ndarray, books: list[np.ndarray]) -> float:
    codes = encode_residual(x, [index_codebook(book) for book in books], beam_width=8).codes
    total = 0.0
    for column, book in zip(codes.T, books, strict=True):
        shares = np.bincount(column, minlength=len(book)) / len(x)
        total -= float((shares[shares > 0] * np.log(shares[shares > 0])).sum())
    return total


def test_codewords_of_few_outliers_are_moved_to_where_many_items_are(monkeypatch):
    x = with_outliers()
    train, held_out = ArrayBlocks(x[:1200]), ArrayBlocks(x[1200:])
    books = fitted(x[:1200])
    even = {}
    for share in (0.0, refine.MOVE_BELOW):
        monkeypatch.setattr(refine, "MOVE_BELOW", share)
        refined, _ = refine_residual(train, books, held_out=held_out, threads=1)
        assert error(x[1200:], refined, 8) <= error(x[1200:], books, 8)
        even[share] = usage_entropy(x, refined)
    assert even[0.2] > even[0.0] + 0.05


def test_only_fitted_columns_of_rare_codewords_move_and_one_beside_each_frequent_one():
    generator = np.random.default_rng(3)
    book = np.concatenate([10.0 * generator.normal(size=(6, 2)), np.arange(6.0)[:, None]], axis=1)
    books = [book.astype(np.float32), book.astype(np.float32)]
    rows = ArrayBlocks(books[0])
    options, groups = RefineOptions(), [ColumnGroup(slice(0, 2), 2)]
    refiner = refine._Refiner(rows, rows, groups, options, None, 1, None)
    # Level 1: codewords 0 and 4 are rare, and only codeword 2 is frequent enough to be split, so
    # the rarer one moves. Level 2: none is rare.
    counts = [np.array([1.0, 12.0, 40.0, 12.0, 0.0, 12.0]), np.full(6, 13.0)]
    moved = refiner._move_rare(books, counts, np.full(3, 1e-3), generator)
    assert np.array_equal(moved[1], books[1])
    changed = np.flatnonzero((moved[0] != books[0]).any(axis=1))
    assert changed.tolist() == [4]
    assert np.allclose(moved[0][4, :2], books[0][2, :2], atol=0.01)
    assert not np.array_equal(moved[0][4, :2], books[0][2, :2])
    assert moved[0][4, 2] == books[0][4, 2]
