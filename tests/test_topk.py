"""top_k returns the brute-force list for every metric, route and number of threads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.errors import UsageError
from semid.quantization.nearest import index_database, top_k

METRIC_NAMES = ["cosine", "ip", "l2"]
ROUTE_NAMES = ["int8", "int16", "bf16", "fp32"]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def goodness(queries: F32, database: F32, metric: str) -> F64:
    """Every score in float64, larger is better."""
    q, d = queries.astype(np.float64), database.astype(np.float64)
    if metric == "l2":
        return -np.stack([((row - d) ** 2).sum(1) for row in q])
    if metric == "cosine":
        lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in (q, d)]
        q, d = (part / np.where(n > 0, n, 1) for part, n in zip((q, d), lengths, strict=True))
    return q @ d.T


def check(
    queries: F32, database: F32, k: int, metric: str, route: str, exclude: object = None
) -> None:
    left_out = None if exclude is None else torch.from_numpy(np.asarray(exclude))
    found = top_k(
        torch.from_numpy(queries), torch.from_numpy(database), k, metric=metric,
        exclude=left_out, route=route, threads=2,
    )  # fmt: skip
    truth = goodness(queries, database, metric)
    if exclude is not None:
        for row, entry in enumerate(np.asarray(exclude)):
            if entry >= 0:
                truth[row, entry] = -np.inf
    expected = -np.sort(-truth, axis=1)[:, :k]
    indices = found.indices.numpy()
    size = np.abs(truth[np.isfinite(truth)]).max() + 1e-300
    np.testing.assert_allclose(
        np.take_along_axis(truth, indices, axis=1), expected, rtol=1e-12, atol=1e-12 * size
    )
    sign = -1.0 if metric == "l2" else 1.0
    np.testing.assert_allclose(found.scores.numpy(), sign * expected, rtol=3e-7, atol=1e-12 * size)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("metric", METRIC_NAMES)
@pytest.mark.parametrize("route", ROUTE_NAMES)
@pytest.mark.parametrize("k", [1, 7, 200])
def test_lists_equal_brute_force(metric: str, route: str, k: int) -> None:
    rng = np.random.default_rng(11)
    database = (rng.normal(size=(1500, 48)) * np.arange(1, 49) ** -0.7 + 0.1).astype(np.float32)
    queries = database[:60] + 0.1 * rng.normal(size=(60, 48)).astype(np.float32)
    queries *= np.logspace(-10, 10, 60, dtype=np.float32)[:, None] if metric != "l2" else 1
    check(queries, database, k, metric, route)


@pytest.mark.parametrize("metric", METRIC_NAMES)
@pytest.mark.parametrize("route", ROUTE_NAMES)
def test_k_500_and_the_query_itself_left_out(metric: str, route: str) -> None:
    rng = np.random.default_rng(12)
    database = rng.normal(size=(2000, 32)).astype(np.float32)
    exclude = np.arange(40)
    exclude[7] = -1
    check(database[:40], database, 500, metric, route, exclude)


@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_the_whole_database_with_duplicates_and_zeros(metric: str) -> None:
    rng = np.random.default_rng(13)
    database = rng.integers(-1, 2, size=(300, 4)).astype(np.float32)
    for route in ROUTE_NAMES:
        check(database[:20], database, 300, metric, route)
        check(database[:20], database, 299, metric, route, np.arange(20))


@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_ties_stand_in_index_order_on_every_route(metric: str) -> None:
    database = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    for route in ROUTE_NAMES:
        found = top_k(torch.tensor([[1.0, 0.0]]), database, 5, metric=metric, route=route)
        assert found.indices.tolist() == [[1, 3, 4, 0, 2]]
        some = top_k(torch.tensor([[1.0, 0.0]]), database, 2, metric=metric, route=route)
        assert some.indices.tolist() == [[1, 3]]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    entries=st.integers(1, 900),
    dim=st.integers(1, 70),
    share=st.floats(0, 1),
    grid=st.booleans(),
    metric=st.sampled_from(METRIC_NAMES),
    route=st.sampled_from(ROUTE_NAMES),
    scale=st.sampled_from([1e-15, 1.0, 1e15]),
)
def test_any_problem_equals_brute_force_and_float32_screening(
    seed: int, entries: int, dim: int, share: float, grid: bool, metric: str, route: str,
    scale: float,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    database, queries = rng.normal(size=(entries, dim)), rng.normal(size=(5, dim))
    if grid:
        database, queries = np.round(database), np.round(queries)
    database, queries = (
        part.astype(np.float32) * np.float32(scale) for part in (database, queries)
    )
    k = max(1, round(share * min(entries, 500)))
    check(queries, database, k, metric, route)
    lists = [
        top_k(torch.from_numpy(queries), torch.from_numpy(database), k, metric=metric, route=r)
        for r in (route, "fp32")
    ]
    assert torch.equal(lists[0].indices, lists[1].indices)
    assert torch.equal(lists[0].scores, lists[1].scores)


def test_blocks_of_queries_and_a_prepared_database_change_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    database = torch.randn(700, 20, generator=generator)
    queries = torch.randn(1500, 20, generator=generator)
    whole = top_k(queries, database, 9, threads=2)
    ready = index_database(database)
    parts = [top_k(part, ready, 9, threads=1) for part in queries.split(401)]
    assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))
    assert torch.equal(whole.scores, torch.cat([part.scores for part in parts]))


def test_not_finite_queries_neither_crash_nor_disturb_the_others() -> None:
    generator = torch.Generator().manual_seed(4)
    database, queries = torch.randn(300, 8, generator=generator), torch.ones(4, 8)
    queries[1, 3], queries[2, 0] = float("nan"), float("inf")
    for metric in METRIC_NAMES:
        found = top_k(queries, database, 5, metric=metric)
        alone = top_k(queries[[0, 3]], database, 5, metric=metric)
        assert torch.equal(found.indices[[0, 3]], alone.indices)
        assert ((found.indices >= 0) & (found.indices < 300)).all()


def test_wrong_arguments_are_refused() -> None:
    queries, database = torch.zeros(3, 4), torch.ones(6, 4)
    with pytest.raises(UsageError, match="k=7 is out of range"):
        top_k(queries, database, 7)
    with pytest.raises(UsageError, match="k=6 is out of range"):
        top_k(queries, database, 6, exclude=torch.arange(3))
    with pytest.raises(UsageError, match="k=501"):
        top_k(queries, torch.ones(600, 4), 501)
    with pytest.raises(UsageError, match="metric='dot'"):
        top_k(queries, database, 1, metric="dot")
    with pytest.raises(UsageError, match="prepared for 'l2'"):
        top_k(queries, index_database(database, metric="l2"), 1, metric="ip")
    with pytest.raises(UsageError, match="4 columns and the database 5"):
        top_k(queries, torch.ones(6, 5), 1)
    with pytest.raises(UsageError, match="rows 0 to 5"):
        top_k(queries, database, 1, exclude=torch.tensor([0, 6, 0]))
    with pytest.raises(UsageError, match="one integer index"):
        top_k(queries, database, 1, exclude=torch.tensor([0.0, 1.0, 2.0]))
