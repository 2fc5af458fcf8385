"""nearest and nearest_m return the brute-force answer on every route, blocking and thread count."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.errors import EmbeddingError, UsageError
from semid.quantization.nearest import index_codebook, nearest, nearest_m

ROUTE_NAMES = ["auto", "int8", "int16", "bf16", "fp32"]
F32 = npt.NDArray[np.float32]


def squared(x: F32, codebook: F32) -> npt.NDArray[np.float64]:
    """Brute force in float64, by differences: the oracle."""
    wide, code = x.astype(np.float64), codebook.astype(np.float64)
    return np.stack([((row - code) ** 2).sum(1) for row in wide])


def check(x: F32, codebook: F32, route: str, **options: object) -> None:
    """Compare labels and distances with the oracle, up to the rounding of float64 itself."""
    found = nearest(torch.from_numpy(x), torch.from_numpy(codebook), route=route, **options)
    truth = squared(x, codebook)
    labels = found.labels.numpy()
    chosen = truth[np.arange(len(x)), labels]
    tolerance = 1e-13 * truth.min(1)
    assert (chosen <= truth.min(1) + tolerance).all()
    first = (truth <= truth.min(1, keepdims=True)).argmax(1)
    clear = np.partition(truth, 1, axis=1)[:, 1] > truth.min(1) + 2 * tolerance
    assert (labels == first)[clear].all()
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found.distances.numpy(), truth.min(1).astype(np.float32), 2e-7)


def clustered(rng: np.random.Generator, n: int, codes: int, dim: int) -> tuple[F32, F32]:
    centers = rng.normal(size=(codes, dim)).astype(np.float32)
    x = centers[rng.integers(codes, size=n)] + 0.05 * rng.normal(size=(n, dim))
    return x.astype(np.float32), centers


def cases() -> dict[str, tuple[F32, F32]]:
    rng = np.random.default_rng(7)

    def normal(n: int, dim: int) -> F32:
        return rng.normal(size=(n, dim)).astype(np.float32)

    x, codebook = normal(300, 40), normal(700, 40)
    anisotropic = (np.arange(1, 41) ** -1.5).astype(np.float32)
    lattice = rng.integers(-1, 2, size=(300, 6)).astype(np.float32)
    mixed = x * np.logspace(-12, 12, 300, dtype=np.float32)[:, None]
    return {
        "random": (x, codebook),
        "clustered": clustered(rng, 300, 130, 64),
        "anisotropic": (x * anisotropic, codebook * anisotropic),
        "huge": (x * np.float32(1e18), codebook * np.float32(1e18)),
        "largest": (x * np.float32(5e37), codebook * np.float32(5e37)),
        "tiny": (x * np.float32(1e-20), codebook * np.float32(1e-20)),
        "denormal": (x * np.float32(1e-42), codebook * np.float32(1e-42)),
        "mixed lengths": (mixed, codebook),
        "far from the origin": (x + np.float32(1000), codebook + np.float32(1000)),
        "far queries": (x + np.float32(1e6), codebook),
        "one outlier codeword": (x, np.concatenate([codebook, codebook[:1] * np.float32(1e6)])),
        "lattice ties": (lattice, np.unique(lattice, axis=0)),
        "duplicates": (x, codebook[rng.integers(0, 20, size=700)]),
        "near duplicates": (x[:20], x[:1] + np.float32(1e-6) * normal(900, 40)),
        "constant": (np.ones((50, 8), np.float32), np.ones((300, 8), np.float32)),
        "zeros": (np.zeros((5, 3), np.float32), np.zeros((4, 3), np.float32)),
        "two codes": (x, codebook[:2]),
        "one column": (normal(200, 1), normal(90, 1)),
        "queries are codewords": (codebook[:300].copy(), codebook),
        "odd width": (normal(70, 67), normal(129, 67)),
    }


CASES = cases()


@pytest.mark.parametrize("route", ROUTE_NAMES)
@pytest.mark.parametrize("case", CASES)
def test_fixed_cases_equal_brute_force(case: str, route: str) -> None:
    x, codebook = CASES[case]
    check(x, codebook, route)


@pytest.mark.parametrize("case", CASES)
def test_routes_threads_and_chunks_agree_to_the_bit(case: str) -> None:
    x, codebook = (torch.from_numpy(part) for part in CASES[case])
    reference = nearest(x, codebook, route="fp32", threads=1)
    ready = index_codebook(codebook)
    for route in ROUTE_NAMES:
        for threads, chunk in ((1, 37), (2, 512), (3, 1)):
            parts = [
                nearest(part, ready, route=route, threads=threads)
                for part in x[: 40 if chunk == 1 else None].split(chunk)
            ]
            labels = torch.cat([part.labels for part in parts])
            distances = torch.cat([part.distances for part in parts])
            assert torch.equal(labels, reference.labels[: len(labels)])
            assert torch.equal(distances, reference.distances[: len(labels)])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 70),
    codes=st.integers(2, 300),
    dim=st.integers(1, 130),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e10, 1e30]),
    shift=st.sampled_from([0.0, 1.0, 100.0]),
    grid=st.booleans(),
    route=st.sampled_from(ROUTE_NAMES),
)
def test_any_problem_equals_brute_force(
    seed: int, n: int, codes: int, dim: int, scale: float, shift: float, grid: bool, route: str
) -> None:
    rng = np.random.default_rng(seed)
    x, codebook = rng.normal(size=(n, dim)) + shift, rng.normal(size=(codes, dim)) + shift
    if grid:  # many exact ties
        x, codebook = np.round(x), np.round(codebook)
    check((x * scale).astype(np.float32), (codebook * scale).astype(np.float32), route)


@pytest.mark.parametrize("route", ROUTE_NAMES)
def test_many_blocks_on_threads(route: str) -> None:
    rng = np.random.default_rng(3)
    x, codebook = clustered(rng, 2500, 300, 24)
    check(x, codebook, route, threads=2)


@pytest.mark.parametrize("route", ROUTE_NAMES)
def test_ties_go_to_the_lowest_index(route: str) -> None:
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    found = nearest(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -0.0]]), codebook, route=route)
    assert found.labels.tolist() == [1, 1, 1]
    assert found.distances.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_taken_at_their_exact_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, 24, generator=generator).to(dtype)
    codebook = torch.randn(90, 24, generator=generator).to(dtype)
    assert torch.equal(
        nearest(x, codebook).labels, nearest(x.float(), codebook.float(), route="fp32").labels
    )


def test_not_finite_rows_neither_crash_nor_disturb_the_others() -> None:
    rng = np.random.default_rng(5)
    x, codebook = clustered(rng, 60, 80, 20)
    bad = x.copy()
    bad[3, 2], bad[40, 0], bad[41] = np.nan, np.inf, -np.inf
    for route in ROUTE_NAMES:
        found = nearest(torch.from_numpy(bad), torch.from_numpy(codebook), route=route)
        clean = nearest(torch.from_numpy(x), torch.from_numpy(codebook), route=route)
        rest = np.setdiff1d(np.arange(60), [3, 40, 41])
        assert torch.equal(found.labels[rest], clean.labels[rest])
        assert not torch.isfinite(found.distances[[3, 40, 41]]).any()
        assert ((found.labels >= 0) & (found.labels < 80)).all()


def test_empty_x_gives_empty_results() -> None:
    found = nearest(torch.empty(0, 4), torch.ones(3, 4))
    assert found.labels.shape == (0,)
    assert found.labels.dtype == torch.int64
    assert found.distances.dtype == torch.float32


def test_strided_and_read_only_input() -> None:
    rng = np.random.default_rng(5)
    wide = rng.normal(size=(50, 40)).astype(np.float32)
    x = torch.from_numpy(wide)[::2, ::2]
    codebook = torch.from_numpy(rng.normal(size=(20, 30)).astype(np.float32)).T
    expected = squared(wide[::2, ::2], codebook.numpy()).argmin(1)
    assert nearest(x, codebook).labels.tolist() == expected.tolist()


def test_a_prepared_codebook_does_not_follow_later_changes() -> None:
    codebook = torch.tensor([[0.0], [1.0]])
    ready = index_codebook(codebook)
    codebook += 100
    assert nearest(torch.tensor([[0.9]]), ready).labels.tolist() == [1]


def test_the_callers_torch_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    nearest(torch.zeros(3, 2), torch.ones(2, 2), threads=2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("route", ROUTE_NAMES)
@pytest.mark.parametrize("case", CASES)
def test_nearest_m_lists_the_m_nearest_in_order(case: str, route: str) -> None:
    x, codebook = CASES[case]
    m = min(9, len(codebook))
    found = nearest_m(torch.from_numpy(x), torch.from_numpy(codebook), m, route=route)
    truth = squared(x, codebook)
    expected = np.sort(truth, axis=1)[:, :m]
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found.distances.numpy(), expected.astype(np.float32), 2e-7)
    labels = found.labels.numpy()
    np.testing.assert_allclose(np.take_along_axis(truth, labels, axis=1), expected, 1e-13)
    assert (np.sort(labels, axis=1)[:, 1:] > np.sort(labels, axis=1)[:, :-1]).all()
    reference = nearest_m(torch.from_numpy(x), torch.from_numpy(codebook), m, route="fp32")
    assert torch.equal(found.labels, reference.labels)
    one = nearest(torch.from_numpy(x), torch.from_numpy(codebook), route=route)
    assert torch.equal(one.labels, found.labels[:, 0])
    assert torch.equal(one.distances, found.distances[:, 0])


def test_nearest_m_orders_ties_by_index() -> None:
    codebook = torch.tensor([[1.0], [-1.0], [3.0], [1.0], [-1.0]])
    found = nearest_m(torch.tensor([[0.0]]), codebook, 5)
    assert found.labels.tolist() == [[0, 1, 3, 4, 2]]


def test_wrong_arguments_are_refused() -> None:
    x, codebook = torch.zeros(3, 4), torch.zeros(2, 4)
    with pytest.raises(UsageError, match="3 columns and the codebook 4"):
        nearest(torch.zeros(3, 3), codebook)
    with pytest.raises(UsageError, match="float64"):
        nearest(x.double(), codebook)
    with pytest.raises(UsageError, match="shape"):
        nearest(x[0], codebook)
    with pytest.raises(UsageError, match="empty"):
        nearest(x, codebook[:0])
    with pytest.raises(UsageError, match="route='int4'"):
        nearest(x, codebook, route="int4")
    with pytest.raises(UsageError, match="threads=0"):
        nearest(x, codebook, threads=0)
    with pytest.raises(UsageError, match="m=3 is out of range"):
        nearest_m(x, codebook, 3)
    with pytest.raises(UsageError, match=r"within has shape \(1, 1\)"):
        nearest_m(x, codebook, 1, within=torch.ones(1, 1))
    with pytest.raises(EmbeddingError, match="1 of 2 rows"):
        nearest(x, torch.tensor([[0.0] * 4, [float("nan")] * 4]))
