"""Passes of K-means with bounds equal full searches bit for bit, whatever moves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from semid.quantization import nearest
from semid.quantization.blocks import ArrayBlocks
from semid.quantization.engine import bounded
from semid.quantization.engine.bounded import RowBounds
from semid.quantization.kmeans import KMeansOptions, kmeans
from semid.quantization.nearest import AssignmentMemory, assign, index_codebook
from semid.quantization.product import fit_product, part_slices, part_statistics

Array = npt.NDArray[np.float32]


def search(x: Array, codewords: Array) -> tuple[npt.NDArray[np.int64], Array]:
    return assign(x, index_codebook(codewords), threads=1)


def lloyd(x: Array, codewords: Array, passes: int) -> Iterator[Array]:
    """Yield the codewords of each of some plain Lloyd passes."""
    for _ in range(passes):
        yield codewords
        labels, distances = search(x, codewords)
        total = part_statistics(x, labels, distances, len(codewords))
        used = total.counts > 0
        codewords = codewords.copy()
        codewords[used] = (total.sums[used] / total.counts[used, None]).astype(np.float32)


def check(x: Array, codebooks: Iterator[Array] | list[Array], threads: int = 1) -> list[float]:
    """Compare every pass with a full search; return the shares of groups searched."""
    bounds, shares = None, []
    for codewords in codebooks:
        labels, distances = search(x, codewords)
        if bounds is None:
            bounds = RowBounds(x, np.zeros(len(x), np.int64), codewords)
        found, keys = bounds.search(codewords, threads=threads)
        np.testing.assert_array_equal(found, labels)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(keys.astype(np.float32), distances)
        shares.append(bounds.searched)
    return shares


def sample(rng: np.random.Generator, rows: int, dim: int) -> Array:
    """Rows in loose clusters, on a mean far from 0."""
    centers = rng.normal(size=(40, dim)) * 2
    x = centers[rng.integers(0, 40, rows)] + rng.normal(size=(rows, dim)) + 3
    return x.astype(np.float32)


@pytest.mark.parametrize(("dim", "codes"), [(1, 64), (6, 256), (24, 100), (33, 257), (64, 1024),
                                             (150, 64), (300, 2000)])  # fmt: skip
def test_passes_equal_full_passes(dim: int, codes: int) -> None:
    rng = np.random.default_rng(dim)
    x = sample(rng, 3000, dim)
    shares = check(x, lloyd(x, x[rng.choice(3000, codes, replace=False)], 8))
    assert shares[0] >= 1
    assert shares[-1] < 0.8  # and bounds have spared some


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    rng = np.random.default_rng(0)
    x = sample(rng, 9001, 6)
    check(x, lloyd(x, x[:128].copy(), 5), threads=threads)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e17, 1e30])
def test_jumps_and_scales(scale: float) -> None:
    rng = np.random.default_rng(1)
    x = (sample(rng, 2000, 8) * scale).astype(np.float32)
    books = [x[rng.choice(2000, 64, replace=False)] for _ in range(3)]  # every codeword moves far
    small = books[-1] + (rng.normal(size=(64, 8)) * 1e-3 * scale).astype(np.float32)
    shrunk = (books[0] * np.float32(1e-4)).astype(np.float32)
    grown = (books[0] * np.float32(100)).astype(np.float32)
    with np.errstate(over="ignore"):
        check(x, [*books, small, shrunk, grown, books[0]])


def test_ties_and_copies_go_to_the_lowest_codeword() -> None:
    rng = np.random.default_rng(2)
    x = rng.integers(0, 4, (3000, 5)).astype(np.float32)  # a lattice: most rows have ties
    book = np.unique(x, axis=0)[::9][:80].copy()
    step = rng.integers(-1, 2, book.shape).astype(np.float32)
    copies = book.copy()
    copies[40:] = book[7]  # clusters that died on one place, then come back
    mirrored = book[::-1].copy()
    check(x, [book, book + step, copies, copies, book, mirrored, book])


def test_far_rows_and_columns_without_values() -> None:
    rng = np.random.default_rng(3)
    x = sample(rng, 2000, 12)
    x[:, 3] = 0
    x[5] = 1e18
    x[6] = -3e37
    x[7:40] = x[7]
    check(x, lloyd(x, x[100:164].copy(), 4))


def test_bounds_without_moves_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    x = sample(rng, 3000, 6)
    arrange = RowBounds._arrange

    def unmoved(self: RowBounds, codewords: Array) -> float:
        radius = arrange(self, codewords)
        self.moves[:] = 0
        return radius

    monkeypatch.setattr(RowBounds, "_arrange", unmoved)
    with pytest.raises(AssertionError):
        check(x, lloyd(x, x[:128].copy(), 8))


@pytest.mark.parametrize("weighted", [False, True])
def test_fits_are_the_same_with_and_without(
    monkeypatch: pytest.MonkeyPatch, weighted: bool
) -> None:
    rng = np.random.default_rng(5)
    x = sample(rng, 4000, 80)
    x[:300] = x[0]
    weights = rng.integers(0, 3, 4000).astype(np.float64) if weighted else None
    options = KMeansOptions(max_iter=8, n_init=2, n_local_trials=1)
    # Codewords far from all rows die in the first pass and are put on rows again.
    start = np.concatenate([x[300:400], x[:28] + np.float32(500)])

    def fits(threads: int) -> list[Array]:
        single = kmeans(ArrayBlocks(x), 128, seed=1, options=options, weights=weights, init=start,
                        threads=threads)  # fmt: skip
        slices = part_slices(80, 3)
        books, _ = fit_product(ArrayBlocks(x), slices, [64, 128, 200], seed=1, options=options,
                               weights=weights, threads=threads)  # fmt: skip
        return [single.centroids, single.labels, *books]

    used: list[float] = []
    run = RowBounds.search

    def counted(self: RowBounds, codewords: Array, *, threads: int | None) -> object:
        result = run(self, codewords, threads=threads)
        used.append(self.searched)
        return result

    monkeypatch.setattr(RowBounds, "search", counted)
    with_bounds = [fits(threads) for threads in (1, 2, 3)]
    assert len(used) > 30
    monkeypatch.setattr(bounded, "suits", lambda *shape: False)
    used.clear()
    full = fits(1)
    assert not used
    for each in with_bounds:
        for mine, other in zip(each, full, strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(("cost", "passes"), [(1.3, 4), (1.6, 2), (2.5, 0)])
def test_memory_ends_and_useless_bounds_are_dropped(
    monkeypatch: pytest.MonkeyPatch, cost: float, passes: int
) -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(2000, 8)).astype(np.float32)
    monkeypatch.setattr(nearest, "_relative_cost", lambda *_: cost)
    fewer = AssignmentMemory(bounded.size(x, 64))
    memory = AssignmentMemory()
    searches: list[bool] = []
    for _ in range(12):
        # New codewords at every pass: bounds exclude nothing.
        codebook = index_codebook(rng.normal(size=(64, 8)).astype(np.float32))
        for name in ("first", "second"):
            labels = fewer.assign(name, x, codebook, threads=1)[1]
            np.testing.assert_array_equal(labels, assign(x, codebook, threads=1)[0])
        bounds = memory._bounds.get("rows")
        memory.assign("rows", x, codebook, threads=1)
        searches.append(bounds is not None and memory._bounds["rows"] is bounds)
    assert fewer._bounds["second"] is None
    # Bounds end when they have cost a full pass more than they spared.
    assert searches == [False] + [True] * passes + [False] * (11 - passes)


def test_views_of_rows_take_no_memory() -> None:
    x = np.zeros((2000, 8), np.float32)
    assert bounded.size(x, 64) - bounded.size(x[:], 64) == x.nbytes


def test_the_cost_of_a_pass_is_measured_without_a_trace() -> None:
    rng = np.random.default_rng(7)
    x = sample(rng, 2000, 70)
    bounds = RowBounds(x, np.zeros(2000, np.int64), x[:64])
    places, lower = bounds.places.copy(), bounds.lower.copy()
    assert nearest._relative_cost(bounds, index_codebook(x[:64])) > 0
    np.testing.assert_array_equal(bounds.places, places)
    np.testing.assert_array_equal(bounds.lower, lower)
