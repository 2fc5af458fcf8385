"""The engine's parts: every compiled route, the device search, the bound, routes and threads."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import semid.quantization.engine.search as engine
from semid.quantization.engine import gpu
from semid.quantization.engine.formats import Bfloat16Gemm, QueryBlock
from semid.quantization.engine.gpu import search_device
from semid.quantization.engine.plain import COSINE, INNER, L2, float32_rows
from semid.quantization.engine.search import search
from semid.quantization.engine.table import VectorTable
from semid.quantization.nearest import index_codebook, nearest, top_k
from semid.quantization.threads import (
    cgroup_limit,
    default_threads,
    map_blocks,
)

DATA = Path(os.environ.get("SEMID_DATA", Path(__file__).parents[2] / "shared" / "data"))
# torch's bfloat16 products are slow without the chip's, and right all the same.
AVAILABLE = [
    route
    for route in engine._candidates()
    if route.unavailable() is None or isinstance(route, Bfloat16Gemm)
]
each_route = pytest.mark.parametrize(
    "route", AVAILABLE, ids=[f"{route.name}-{route.library}" for route in AVAILABLE]
)


def problem(n: int = 500, codes: int = 900, dim: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    scale = torch.arange(1, dim + 1) ** -0.6
    codebook = torch.randn(codes, dim, generator=generator) * scale + 0.2
    x = codebook[torch.randint(codes, (n,), generator=generator)]
    return x + 0.3 * scale * torch.randn(n, dim, generator=generator), codebook


@each_route
@pytest.mark.parametrize("dim", [1, 31, 100, 256, 300])
def test_every_implementation_gives_the_same_bits(route: engine.Route, dim: int) -> None:
    x, codebook = problem(150, 700, dim)
    table = VectorTable(codebook, metric=L2, unique=True)
    truth = (x.double()[:, None] - codebook.double()[None]).square().sum(2).argmin(1)
    found = search(x, table, route, threads=1)
    assert found.labels[:, 0].tolist() == truth.tolist()
    reference = search(x, table, AVAILABLE[-1], k=5, threads=1)
    several = search(x, table, route, k=5, threads=2)
    np.testing.assert_array_equal(several.labels, reference.labels)
    np.testing.assert_array_equal(several.keys, reference.keys)
    np.testing.assert_array_equal(found.keys[:, 0], reference.keys[:, 0])


@each_route
def test_a_limit_drops_nothing_that_lies_nearer(route: engine.Route) -> None:
    x, codebook = problem(200, 700, 100)
    table = VectorTable(codebook, metric=L2, unique=False)
    whole = search(x, table, route, k=6, threads=1)
    # From nothing within reach to everything, at a rank that differs by row, and on the edge.
    within = np.ascontiguousarray(whole.keys[np.arange(200), np.arange(200) % 6])
    within[:3] = [0.0, np.inf, np.nan]
    found = search(x, table, route, k=6, within=within, threads=1)
    near = whole.keys < within[:, None]
    near[[1, 2]] = True  # infinity and NaN rule nothing out
    np.testing.assert_array_equal(found.labels[near], whole.labels[near])
    np.testing.assert_array_equal(found.keys[near], whole.keys[near])
    gone = np.isinf(found.keys)
    assert gone.any()
    assert not gone[near].any()
    assert not found.labels[gone].any()
    assert found.measured < whole.measured


@each_route
@pytest.mark.parametrize("metric", [L2, INNER])
def test_every_score_lies_within_the_bound(route: engine.Route, metric: int) -> None:
    x, codebook = problem(64, 200, 100)
    table = VectorTable(codebook, metric=metric, unique=False)
    operand = table.operand("test" + route.name + route.library, route.prepare)
    assert operand is not None
    state = QueryBlock(64, table.rows.shape[1], k=200, best_only=False)  # keeps every score
    state.load(float32_rows(x, name="x"), table)
    route.screen(table, operand, state)
    y, entries = state.y.astype(np.float64), table.scaled[:200].astype(np.float64)
    truth = y @ entries.T - (0.5 * (entries**2).sum(1) if metric == L2 else 0.0)
    lengths = codebook.double().norm(dim=1).numpy() * 2.0**-table.exponent
    assert lengths.max() <= table.reach * (1 + 1e-6)
    for row in range(64):
        assert state.counts[row] >= 200
        kept = state.candidates[row, : state.counts[row]]
        real = kept < 200
        scores = state.scores[row, : len(kept)][real] * state.unit[row] + state.shift[row]
        assert sorted(kept[real]) == list(range(200))
        error = np.abs(scores - truth[row, kept[real]])
        assert (error <= state.bound[row]).all()
        if route.name != "fp32":  # and the bound is not absurdly wide
            assert error.max() > state.bound[row] / 200


@each_route
def test_screening_leaves_few_pairs_to_measure(route: engine.Route) -> None:
    generator = torch.Generator().manual_seed(8)
    x, codebook = (torch.randn(n, 64, generator=generator) for n in (500, 4000))
    found = search(x, VectorTable(codebook, metric=L2, unique=True), route, threads=1)
    assert found.measured < (40 if route.name == "int8" else 4) * 500


REDUCED = {
    "for all": lambda: torch.set_float32_matmul_precision("medium"),
    # Settings of one library, of which PyTorch since 2.9 has several.
    "oneDNN": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "cuBLAS": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("told", REDUCED)
def test_reduced_float32_precision_in_torch_changes_no_label(told) -> None:
    if told != "for all" and None in _settings():
        pytest.skip("this version of torch has one setting for all libraries")
    x, codebook = problem()
    table = VectorTable(codebook, metric=L2, unique=True)
    expected, listed = nearest(x, codebook, route="fp32"), search_device(x, table, k=2)
    REDUCED[told]()
    try:
        settings = _settings()
        found, again = nearest(x, codebook, route="fp32"), search_device(x, table, k=2)
        assert _settings() == settings
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.distances, expected.distances)
    assert np.array_equal(again.labels, listed.labels)


def _settings() -> list[Any]:
    libraries = (torch.backends.cuda, torch.backends.mkldnn)
    matmuls = [getattr(each, "matmul", None) for each in libraries]
    return [getattr(each, "fp32_precision", None) for each in matmuls]


@each_route
def test_lists_of_queries_without_their_targets_are_not_measured(route: engine.Route) -> None:
    """Over two blocks of queries, some without a target; rows of zeros have all entries as ties."""
    x, database = problem(engine.BLOCK + 200, 900, 40)
    x[5] = 0.0
    table = VectorTable(database, metric=COSINE, unique=False)
    full = search(x, table, route, k=20, threads=1)
    generator = np.random.default_rng(0)
    sizes = generator.integers(0, 3, len(x))
    bounds = np.append(0, np.cumsum(sizes))
    targets = generator.integers(0, 900, bounds[-1])
    near = generator.random(bounds[-1]) < 0.3
    query = np.repeat(np.arange(len(x)), sizes)
    targets[near] = full.labels[query[near], generator.integers(0, 20, near.sum())]
    short = search(x, table, route, k=20, targets=(targets, bounds), threads=1)
    listed = np.isfinite(short.keys).all(axis=1)
    np.testing.assert_array_equal(short.labels[listed], full.labels[listed])
    np.testing.assert_array_equal(short.keys[listed], full.keys[listed])
    reached = (full.labels[query] == targets[:, None]).any(axis=1)
    assert listed[query[reached]].all()
    assert np.isinf(short.keys[~listed]).all()
    assert (~listed).sum() > len(x) // 3
    assert short.measured < full.measured


def test_torch_products_still_work_between_searches() -> None:
    """The tile registers are shared with oneDNN, which must find its own configuration."""
    x, codebook = problem()
    a, b = x.to(torch.bfloat16), codebook.to(torch.bfloat16)
    before = a @ b.T
    for _ in range(3):
        nearest(x, codebook, route="int8", threads=1)
        nearest(x, codebook, route="bf16", threads=1)
        assert torch.equal(a @ b.T, before)


def check_device(device: str) -> None:
    """Check labels and keys of the search on a device against the compiled search."""
    x, codebook = problem(300, 400, 75)
    exclude = np.arange(300)
    for metric in (L2, INNER, COSINE):
        table = VectorTable(codebook, metric=metric, unique=metric == L2)
        for k, left_out in ((1, None), (20, None), (20, exclude)):
            expected = search(x, table, AVAILABLE[-1], k=k, exclude=left_out, threads=1)
            found = search_device(x.to(device), table, k=k, exclude=left_out)
            np.testing.assert_array_equal(found.labels, expected.labels)
            np.testing.assert_array_equal(found.keys, expected.keys)
    for factor in (1e-30, 1e18):
        table = VectorTable(codebook * factor, metric=L2, unique=True)
        found = search_device((x * factor).to(device), table)
        expected = search(x * factor, table, AVAILABLE[-1], threads=1)
        np.testing.assert_array_equal(found.keys, expected.keys)
        np.testing.assert_array_equal(found.labels, expected.labels)
    lattice = torch.round(x[:, :3])
    table = VectorTable(torch.unique(lattice, dim=0), metric=L2, unique=True)
    assert (search_device(lattice.to(device), table).keys == 0).all()
    bad = x[:4].clone()
    bad[1, 2], bad[2, 0] = float("nan"), float("inf")
    found = search_device(bad.to(device), VectorTable(codebook, metric=L2, unique=True))
    assert np.isfinite(found.keys[:, 0]).tolist() == [True, False, False, True]


def test_device_search_equals_the_compiled_one() -> None:
    check_device("cpu")
    x, codebook = problem()
    labels = search_device(x, VectorTable(codebook, metric=L2, unique=True)).labels
    assert torch.equal(torch.from_numpy(labels[:, 0]).long(), nearest(x, codebook).labels.long())


def test_the_fused_kernels_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from semid.quantization.engine import fused

    monkeypatch.setattr(gpu, "_route", lambda x, table, copies: "fused")
    lists = gpu._listed
    listed: list[int] = []

    def counted(x: torch.Tensor, *rest: Any) -> Any:
        listed.append(len(x))
        return lists(x, *rest)

    monkeypatch.setattr(gpu, "_listed", counted)
    for n, codes, dim in ((300, 700, 100), (130, 129, 16), (5, 2, 300)):
        x, codebook = problem(n, codes, dim)
        x[1] = 1e9
        x[2, 0] = float("nan")
        table = VectorTable(codebook, metric=L2, unique=True)
        expected = search(x, table, AVAILABLE[-1], threads=1)
        listed.clear()
        found = search_device(x, table)
        np.testing.assert_array_equal(found.labels, expected.labels)
        finite = ~np.isnan(expected.keys)
        np.testing.assert_array_equal(found.keys, np.where(finite, expected.keys, np.inf))
        assert 2 <= sum(listed) < 5 + 0.05 * n  # the others were decided by the kernels
        half, entries, offsets = x[3:].half(), codebook.half(), codebook[:, 0].contiguous()
        best, label, second = fused.best_two(half, entries, offsets)
        truth = (half.double() @ entries.double().T + offsets.double()).topk(2, dim=1)
        assert torch.equal(label, truth.indices[:, 0])
        np.testing.assert_allclose(torch.stack([best, second], 1), truth.values, rtol=1e-5)


@pytest.mark.gpu
def test_cuda_search_equals_the_compiled_one() -> None:
    check_device("cuda")
    x, codebook = problem()
    on_device = nearest(x.cuda(), codebook.cuda())
    assert on_device.labels.is_cuda
    assert torch.equal(on_device.labels.cpu(), nearest(x, codebook).labels)
    lists = top_k(x.cuda(), codebook.cuda(), 30)
    assert torch.equal(lists.indices.cpu(), top_k(x, codebook, 30).indices)


def test_a_route_that_answers_wrongly_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(engine.Float32Gemm):
        name, library = "int8", "broken"

        def screen(self, table: VectorTable, operand: object, state: QueryBlock) -> None:
            super().screen(table, operand, state)  # type: ignore[arg-type]
            state.candidates[:] = 5

    monkeypatch.setattr(engine, "_candidates", lambda: [Wrong(), engine.Float32Gemm()])
    engine._probe_machine.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger=engine.__name__):
            working = engine.working_routes()
        assert [route.library for route in working] == ["torch float32"]
        assert "int8 (broken): left out, its self-test gave a wrong answer" in caplog.text
        x, codebook = problem(20, 30, 8)
        assert torch.equal(
            nearest(x, codebook, route="int8").labels, nearest(x, codebook, route="fp32").labels
        )
    finally:
        engine._probe_machine.cache_clear()


def test_many_queries_probe_once_and_the_choice_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, codebook = problem(engine.MIN_PROBED_QUERIES, 64, 80)
    ready = index_codebook(codebook)
    engine._recent.clear()

    def probes() -> int:
        return sum("for 64 x 80" in line for line in caplog.messages)

    with caplog.at_level(logging.INFO, logger=engine.__name__):
        first = nearest(x, ready, threads=2)
        again = nearest(x, ready, threads=1)
        assert probes() == 1
        for _ in range(engine.REUSED_TABLES):  # tables of the same shape take over the choice
            nearest(x, codebook)
        assert probes() == 1
        nearest(x, codebook)
        assert probes() == 2
    assert torch.equal(first.labels, again.labels)


def test_cgroup_quota_is_read_in_both_versions(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    assert cgroup_limit(root, proc) is None
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/a/b\n0::/x/y\n")
    (root / "x" / "y").mkdir(parents=True)
    (root / "x" / "y" / "cpu.max").write_text("max 100000\n")
    assert cgroup_limit(root, proc) is None
    (root / "x" / "cpu.max").write_text("250000 100000\n")
    assert cgroup_limit(root, proc) == 2.5
    group = root / "cpu" / "a"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("50000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_limit(root, proc) == 0.5
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert cgroup_limit(root, proc) == 2.5
    (proc / "self" / "cgroup").write_text("0::/x:1/y\n")
    (root / "x:1").mkdir()
    (root / "x:1" / "cpu.max").write_text("150000 100000\n")
    assert cgroup_limit(root, proc) == 1.5


def test_default_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semid.quantization.threads.cgroup_limit", lambda: 0.3)
    assert default_threads() == 1


def test_blocks_keep_their_order_and_errors_come_through() -> None:
    assert map_blocks(lambda block: block * 2, range(20), threads=3) == list(range(0, 40, 2))
    with pytest.raises(ZeroDivisionError):
        map_blocks(lambda block: 1 // block, [1, 0, 2], threads=2)


@pytest.mark.skipif(
    not (DATA / "union_catalogue" / "embeddings.f16.npy").exists(),
    reason="needs the union catalogue's embeddings; set SEMID_DATA to the data folder",
)
@each_route
def test_real_embeddings(route: engine.Route) -> None:
    rows = np.load(DATA / "union_catalogue" / "embeddings.f16.npy", mmap_mode="r")
    x = torch.from_numpy(np.array(rows[::400], dtype=np.float32))
    codebook = torch.from_numpy(np.array(rows[7::64], dtype=np.float32))
    table = VectorTable(codebook, metric=L2, unique=True)
    found = search(x, table, route, threads=1)
    entries = codebook.double()
    truth = (x.double() @ entries.T - entries.square().sum(1) / 2).argmax(1)
    distances = [(x.double() - entries[torch.as_tensor(labels)]).square().sum(1)
                 for labels in (found.labels[:, 0], truth)]  # fmt: skip
    assert (distances[0] <= distances[1] * (1 + 1e-14)).all()


NUMPY_THREADS = """
import threading
import numpy
from threadpoolctl import threadpool_info
from semid.quantization.threads import one_numpy_thread

counts, inside, left = [], threading.Event(), threading.Event()

def count():
    counts.extend(each["num_threads"] for each in threadpool_info() if "numpy" in each["filepath"])

def other():
    with one_numpy_thread():
        inside.set()
        left.wait(20)

thread = threading.Thread(target=other)
count()
thread.start()
inside.wait(20)
with one_numpy_thread():
    count()
count()  # the other body still runs
left.set()
thread.join()
count()
print(*counts)
"""


def test_numpy_gets_its_threads_back_after_the_last_of_several_bodies() -> None:
    # In a process of its own: numpy reads its number of threads when it is imported.
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", NUMPY_THREADS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "1", "1", "2"]
