"""K-means: against oracles, and independent of threads, chunking and memory."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from semid.errors import UsageError
from semid.quantization.blocks import (
    ArrayBlocks,
    Preprocess,
    Statistics,
    in_memory,
    map_rows,
    prefetched,
    residuals,
    statistics,
)
from semid.quantization.kmeans import KMeansOptions, KMeansState, kmeans
from semid.quantization.seeding import kmeans_plus_plus


def brute_inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    wide, words = x.astype(np.float64), centroids.astype(np.float64)
    return float(((wide[:, None] - words[None]) ** 2).sum(2).min(1).sum())


def test_inertia_and_labels_equal_brute_force(clustered):
    result = kmeans(ArrayBlocks(clustered), 30, seed=0)
    distances = ((clustered[:, None].astype(np.float64) - result.centroids[None]) ** 2).sum(2)
    assert np.array_equal(result.labels, distances.argmin(1))
    assert result.inertia == pytest.approx(brute_inertia(clustered, result.centroids), rel=1e-5)


def test_lloyd_equals_scikit_learn_from_the_same_start(clustered):
    init = clustered[:25].copy()
    ours = kmeans(
        ArrayBlocks(clustered),
        25,
        seed=0,
        init=init,
        options=KMeansOptions(max_iter=100, tol=0.0),
    )
    theirs = KMeans(25, init=init, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(clustered)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-3)


def test_every_iteration_lowers_the_inertia(clustered):
    result = kmeans(ArrayBlocks(clustered), 40, seed=3)
    assert len(result.history) > 2
    assert all(b <= a for a, b in itertools.pairwise(result.history))
    assert result.inertia <= result.history[-1]


def test_planted_clusters_are_found(clustered):
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(12, 8)) * 50
    x = (centers[np.arange(600) % 12] + generator.normal(size=(600, 8))).astype(np.float32)
    labels = kmeans(ArrayBlocks(x), 12, seed=1).labels
    assert len({(int(a), i % 12) for i, a in enumerate(labels)}) == 12


def test_weights_equal_repeated_rows(clustered):
    weights = np.random.default_rng(1).integers(0, 4, len(clustered)).astype(np.float64)
    init = clustered[weights > 0][:20].copy()
    options = KMeansOptions(max_iter=15, tol=0.0)
    weighted = kmeans(
        ArrayBlocks(clustered), 20, seed=0, init=init, weights=weights, options=options
    )
    repeated = np.repeat(clustered, weights.astype(int), axis=0)
    plain = kmeans(ArrayBlocks(repeated), 20, seed=0, init=init, options=options)
    assert weighted.inertia == pytest.approx(plain.inertia, rel=1e-5)
    np.testing.assert_allclose(weighted.centroids, plain.centroids, atol=1e-4)


def test_threads_and_memory_change_nothing(clustered, monkeypatch):
    monkeypatch.setattr("semid.quantization.nearest.THREADED_WORK", 0)
    monkeypatch.setattr("semid.quantization.seeding.THREADED_WORK", 0)
    runs = [kmeans(ArrayBlocks(clustered), 30, seed=5, threads=threads) for threads in (1, 2, 3)]
    view = map_rows(ArrayBlocks(clustered), lambda x: x, clustered.shape[1])  # read block by block
    runs.append(kmeans(view, 30, seed=5))
    for run in runs[1:]:
        assert np.array_equal(run.centroids, runs[0].centroids)
        assert np.array_equal(run.labels, runs[0].labels)
        assert run.inertia == runs[0].inertia


def test_empty_clusters_are_seeded_again(clustered):
    init = np.concatenate([clustered[:10], np.full((10, 24), 1e3, np.float32)])
    result = kmeans(ArrayBlocks(clustered), 20, seed=0, init=init)
    assert len(np.unique(result.labels)) == 20
    assert result.distinct == 20


def test_empty_clusters_move_to_rows_that_differ():
    """Of A, A, B, B, the farthest rows, two empty clusters take one A and one B."""
    near = np.random.default_rng(0).normal(size=(50, 2))
    rows = np.concatenate([near, [[90, 0]] * 2, [[0, 80]] * 2]).astype(np.float32)
    init = np.array([[0, 0], [1e4, 0], [1e4, 1]], dtype=np.float32)
    first: list[np.ndarray] = []
    kmeans(
        ArrayBlocks(rows),
        3,
        seed=0,
        init=init,
        options=KMeansOptions(max_iter=1),
        on_iteration=lambda state: first.append(state.centroids.copy()),
    )
    assert first[0][1:].tolist() == [[90, 0], [0, 80]]


def test_fewer_distinct_rows_than_codes_leaves_dead_codes(caplog):
    x = np.repeat(np.eye(6, dtype=np.float32), 5, axis=0)
    result = kmeans(ArrayBlocks(x), 9, seed=0)
    assert result.distinct == 6
    assert result.inertia == 0.0
    assert len(np.unique(result.labels)) == 6
    assert result.labels.max() < 6
    assert result.centroids.shape == (9, 6)
    assert "3 codes stay dead" in caplog.text


def test_more_trials_seed_better(clustered):
    def mean(trials):
        options = KMeansOptions(max_iter=1, n_local_trials=trials)
        runs = [kmeans(ArrayBlocks(clustered), 30, seed=s, options=options) for s in range(10)]
        return np.mean([run.history[-1] for run in runs])

    assert mean(4) < mean(1)


def test_more_restarts_are_never_worse(clustered):
    histories = [
        kmeans(ArrayBlocks(clustered), 30, seed=2, options=KMeansOptions(n_init=r)).history[-1]
        for r in (1, 2, 4)
    ]
    assert histories[0] >= histories[1] >= histories[2]


def test_continuing_from_any_state_gives_the_same(clustered):
    options = KMeansOptions(n_init=2)
    states: list[KMeansState] = []

    def keep(state: KMeansState) -> None:
        states.append(
            KMeansState(
                state.restart,
                state.iteration,
                state.centroids.copy(),
                list(state.inertia),
                state.best_centroids.copy(),
                list(state.best_inertia),
            )
        )

    whole = kmeans(ArrayBlocks(clustered), 30, seed=4, options=options, on_iteration=keep)
    for state in states[:: max(1, len(states) // 6)]:
        again = kmeans(ArrayBlocks(clustered), 30, seed=4, options=options, state=state)
        assert np.array_equal(again.centroids, whole.centroids)
        assert again.history == whole.history


def test_sample_then_full_pass_uses_all_rows(clustered):
    options = KMeansOptions(sample_per_code=10)
    sampled = kmeans(
        ArrayBlocks(clustered),
        20,
        seed=0,
        options=KMeansOptions(sample_per_code=10, full_pass=False),
    )
    passed = kmeans(ArrayBlocks(clustered), 20, seed=0, options=options)
    every = kmeans(ArrayBlocks(clustered), 20, seed=0)
    assert len(sampled.labels) == len(clustered)
    assert passed.inertia < sampled.inertia
    assert every.inertia < sampled.inertia


@pytest.mark.parametrize("sampled", [False, True])
def test_greedy_seeding_beats_plain_on_average(clustered, monkeypatch, sampled):
    if sampled:  # centers from a part of the rows, as for large data
        monkeypatch.setattr("semid.quantization.seeding.SAMPLE_LEAST", len(clustered) // 4)
        monkeypatch.setattr("semid.quantization.seeding.SAMPLE_PER_CODE", 2)
        monkeypatch.setattr("semid.quantization.seeding.GAIN_LEAST", len(clustered) // 8)
        monkeypatch.setattr("semid.quantization.seeding.GAIN_PER_CODE", 1)

    def start(trials: int) -> float:
        return float(
            np.mean(
                [
                    brute_inertia(
                        clustered,
                        kmeans_plus_plus(
                            ArrayBlocks(clustered),
                            40,
                            generator=np.random.default_rng(seed),
                            n_local_trials=trials,
                        ),
                    )
                    for seed in range(8)
                ]
            )
        )

    assert start(4) < start(1)


def test_seeding_from_a_sample_finds_rows_that_the_sample_missed(monkeypatch):
    monkeypatch.setattr("semid.quantization.seeding.SAMPLE_LEAST", 50)
    rare = np.random.default_rng(0).normal(size=(9, 4))
    rows = np.concatenate([np.zeros((5000, 4)), rare]).astype(np.float32)
    found = kmeans_plus_plus(ArrayBlocks(rows), 20, generator=np.random.default_rng(1))
    assert len(found) == len(np.unique(found, axis=0)) == 10


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_seeding_draws_no_row_twice_and_none_without_weight(scale):
    generator = np.random.default_rng(0)
    rows = np.repeat(generator.normal(size=(300, 8)) * scale + scale, 2, axis=0).astype(np.float32)
    weights = (np.arange(600) < 500).astype(np.float64)
    found = kmeans_plus_plus(
        ArrayBlocks(rows), 400, generator=np.random.default_rng(1), weights=weights
    )
    assert len(found) == 250
    assert {row.tobytes() for row in found} == {row.tobytes() for row in rows[:500]}


def test_copies_count_as_often_as_they_stand():
    """Ten copies of a row and ten other rows: half the runs draw the copies first."""
    rows = np.eye(11, dtype=np.float32)[[0] * 10 + list(range(1, 11))]
    first = [
        kmeans_plus_plus(ArrayBlocks(rows), 1, generator=np.random.default_rng(seed))[0, 0]
        for seed in range(400)
    ]
    assert 0.4 < np.mean(first) < 0.6


def test_plain_seeding_draws_from_the_sequential_distribution():
    """Two centers on a line of five points: compare with the exact k-means++ probabilities."""
    x = np.array([[0.0], [1.0], [2.0], [4.0], [8.0]], dtype=np.float32)
    squared = (x - x.T).astype(np.float64) ** 2
    exact = (squared / squared.sum(1, keepdims=True)) / 5
    counts = np.zeros((5, 5))
    places = {float(value): i for i, value in enumerate(x[:, 0])}
    rounds = 1000
    for seed in range(rounds):
        found = kmeans_plus_plus(
            ArrayBlocks(x), 2, generator=np.random.default_rng(seed), n_local_trials=1
        )
        counts[places[float(found[0, 0])], places[float(found[1, 0])]] += 1
    error = np.abs(counts / rounds - exact)
    assert (error <= 4.5 * np.sqrt(exact * (1 - exact) / rounds) + 1e-12).all()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 400),
    codes=st.integers(1, 9),
    threads=st.integers(1, 3),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_statistics_equal_numpy(rows, codes, threads, weighted, seed):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 5)).astype(np.float32)
    labels = generator.integers(0, codes, rows)
    distances = generator.random(rows).astype(np.float32)
    weights = generator.random(rows) if weighted else None
    mass = np.ones(rows) if weights is None else weights
    found = statistics(x, labels, distances, codes=codes, weights=weights, threads=threads)
    sums = np.zeros((codes, 5))
    np.add.at(sums, labels, x.astype(np.float64) * mass[:, None])
    np.testing.assert_allclose(found.sums, sums, atol=1e-9)
    np.testing.assert_allclose(found.counts, np.bincount(labels, mass, codes), atol=1e-12)
    assert found.inertia == pytest.approx(float(distances.astype(np.float64) @ mass))


def test_statistics_do_not_depend_on_threads():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(9000, 7)).astype(np.float32)
    labels = generator.integers(0, 50, 9000)
    zeros = np.zeros(9000, np.float32)
    single = statistics(x, labels, zeros, codes=50, threads=1)
    for threads in (2, 5):
        many = statistics(x, labels, zeros, codes=50, threads=threads)
        assert np.array_equal(single.sums, many.sums)
        assert np.array_equal(single.counts, many.counts)


def test_adding_statistics():
    total = Statistics(np.zeros((2, 3)), np.zeros(2), 0.0)
    total.add_(Statistics(np.ones((2, 3)), np.array([1.0, 2.0]), 5.0))
    total.add_(Statistics(np.ones((2, 3)), np.array([1.0, 0.0]), 1.0))
    assert total.sums.tolist() == [[2.0] * 3] * 2
    assert total.counts.tolist() == [2.0, 2.0]
    assert total.inertia == 6.0


@pytest.mark.parametrize(
    "change",
    [
        {"max_iter": 0},
        {"tol": 1.0},
        {"tol": -0.1},
        {"n_init": 0},
        {"n_local_trials": 0},
        {"sample_per_code": 0},
    ],
)
def test_options_out_of_range(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        KMeansOptions(**change)


def test_the_ends_of_the_options_ranges_are_allowed(clustered):
    options = KMeansOptions(max_iter=1, tol=0.0, n_init=1, n_local_trials=1, sample_per_code=1)
    result = kmeans(ArrayBlocks(clustered), 1, seed=0, options=options, weights=None)
    assert len(result.history) == 1
    np.testing.assert_allclose(result.centroids[0], clustered.mean(0), atol=1e-5)
    some = np.zeros(len(clustered))
    some[3] = 1.0  # weights of 0 are allowed
    heavy = kmeans(ArrayBlocks(clustered), 1, seed=0, weights=some)
    np.testing.assert_allclose(heavy.centroids[0], clustered[3])
    assert len(kmeans(ArrayBlocks(clustered[:1]), 1, seed=0).labels) == 1


def test_bad_arguments(clustered):
    data = ArrayBlocks(clustered)
    with pytest.raises(UsageError, match="codes=0"):
        kmeans(data, 0, seed=0)
    with pytest.raises(UsageError, match="no rows"):
        kmeans(ArrayBlocks(clustered[:0]), 3, seed=0)
    with pytest.raises(UsageError, match="init has shape"):
        kmeans(data, 3, seed=0, init=clustered[:2])
    with pytest.raises(UsageError, match="weights have shape"):
        kmeans(data, 3, seed=0, weights=np.ones(3))
    with pytest.raises(UsageError, match="not negative"):
        kmeans(data, 3, seed=0, weights=-np.ones(len(clustered)))


def test_residual_view_in_blocks_equals_rows(clustered):
    books = [clustered[:4], clustered[4:8] * 0.1]
    labels = [np.arange(1200) % 4, np.arange(1200) % 3]
    view = residuals(ArrayBlocks(clustered), labels, books)
    whole = np.concatenate([block for _, block in view.blocks(100)])
    expected = clustered - books[0][labels[0]] - books[1][labels[1]]
    assert np.array_equal(whole, expected)
    picks = np.array([5, 1199, 5, 0])
    assert np.array_equal(view.rows(picks), expected[picks])
    held = in_memory(view, limit_bytes=1 << 30)
    assert isinstance(held, ArrayBlocks)
    assert np.array_equal(held.matrix, expected)
    assert in_memory(view, limit_bytes=10) is view


def test_preprocess(clustered):
    fitted = Preprocess.fit(ArrayBlocks(clustered), center=True, normalize=True)
    done = fitted.apply(clustered)
    np.testing.assert_allclose(np.linalg.norm(done, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(fitted.mean, clustered.mean(0, dtype=np.float64), rtol=1e-4)
    assert np.array_equal(fitted.apply(clustered[3:4]), done[3:4])
    zero = Preprocess(normalize=True).apply(np.zeros((2, 3), np.float32))
    assert not zero.any()


def test_reading_ahead_keeps_order_and_errors():
    items = [(i, np.full((1, 1), i, np.float32)) for i in range(20)]
    assert [start for start, _ in prefetched(iter(items))] == list(range(20))

    def broken():
        yield items[0]
        raise ValueError("disk on fire")

    seen = []
    with pytest.raises(ValueError, match="disk on fire"):
        for start, _ in prefetched(broken()):
            seen.append(start)
    assert seen == [0]

    closed = []

    def watched():
        try:
            yield from items
        finally:
            closed.append(True)

    reader = prefetched(watched())
    next(reader)
    reader.close()
    assert all("semid-prefetch" not in thread.name for thread in threading.enumerate())
