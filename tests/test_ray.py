"""The engine: codes equal to the bit, workers that end, and what would hang or break refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from distributed_cases import many_rows, write_folder
from semid.distributed.encode_folder import EncodeWorker, encode_folder
from semid.distributed.ray_fit import fit_on_ray
from semid.distributed.ray_shards import RayShardPool
from semid.distributed.ray_workers import (
    RayOptions,
    check_slots,
    check_store,
    import_ray,
)
from semid.distributed.units import Catalogue
from semid.errors import EmbeddingError, InputError, UsageError
from semid.filesystems import Folder
from semid.quantization.kmeans import KMeansOptions
from semid.tokenizers.factory import make_tokenizer

PLUGIN = Path(__file__).parent / "plugin"

ray = pytest.importorskip("ray")

# Ray opens sockets and files that Python closes when it ends.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Start one cluster of two CPU slots; actors find the tests' helpers and plugin by name."""
    import_ray()
    paths = Path(__file__).parent, PLUGIN, Path(semid.__file__).parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    os.environ.setdefault("RAY_worker_niceness", "0")  # or they wait for every other process
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80_000_000,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
    del os.environ["PYTHONPATH"]


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return many_rows()


@pytest.fixture(scope="module")
def items(rows, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("ray") / "items", rows, row_group=30_000)


def tokenizer(**options: object) -> semid.RQKMeans:
    return semid.RQKMeans(
        levels=2, codebook_size=6, threads=1, kmeans=KMeansOptions(max_iter=1), **options
    )


@pytest.fixture(scope="module")
def local(items) -> semid.RQKMeans:
    return tokenizer(center=True).fit(items)


def check_same(fitted: semid.RQKMeans, local: semid.RQKMeans) -> None:
    assert fitted.codebook_fingerprint == local.codebook_fingerprint
    assert fitted.weights_fingerprint == local.weights_fingerprint
    assert fitted.report is not None
    assert local.report is not None
    assert fitted.report.details == local.report.details
    assert fitted.report.held_out_items == local.report.held_out_items
    ours, theirs = fitted.report.health, local.report.health
    assert ours.collisions == theirs.collisions
    assert ours.usage == theirs.usage
    assert ours.validation_error == pytest.approx(theirs.validation_error, rel=1e-12)


def test_fit_and_encode_equal_local_ones(cluster, items, local, tmp_path):
    fitted = tokenizer(center=True)
    done = fit_on_ray(fitted, Catalogue.open(items), options=RayOptions(workers=2))
    check_same(fitted, local)
    # Shards are cut between blocks: none holds more than its share, and a block.
    assert done.workers == 2
    assert min(done.rows) > 0
    assert max(done.rows) <= sum(done.rows) / 2 + 65_536
    assert done.passed["assign"] > 0
    fitted.save(tmp_path / "model")
    for attempt in range(3):
        run = encode_folder(
            tmp_path / "model",
            items,
            tmp_path / "ids",
            engine=RayOptions(workers=2),
            unit_rows=30_000,
            overwrite=attempt > 0,
        )
        assert pq.read_table(tmp_path / "ids").equals(local.encode(items).to_arrow())
        # Nobody waits for a worker that starts late on a busy machine: it may find nothing left.
        if len(run.by_process) == 2:
            break
    assert len(run.by_process) == 2
    assert os.getpid() not in run.by_process
    # Each began with one unit, so neither can have had all the others and that one too.
    assert max(run.by_process.values()) <= len(local.encode(items)) - 10_000


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (semid.OPQ, {"n_codebooks": 2, "rotation_iter": 1}),
        (semid.RQGMM, {"levels": 2, "max_em_iter": 2}),
    ],
)
def test_other_codebooks_equal_local_ones(cluster, items, kind, settings):
    settings = {"codebook_size": 6, "center": True, **settings}
    models = [kind(threads=1, kmeans={"max_iter": 1}, **settings) for _ in range(2)]
    done = fit_on_ray(models[0], Catalogue.open(items), options=RayOptions(workers=2))
    models[1].fit(items)
    assert done.passed["run"] > 0
    assert models[0].weights_fingerprint == models[1].weights_fingerprint
    levels = [model.report.details["levels"] for model in models]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("kind", ["lloyd", "lloyd-product"])
def test_a_tokenizer_of_another_package_encodes_alike(
    cluster, clustered, tmp_path, monkeypatch, kind
):
    monkeypatch.syspath_prepend(PLUGIN)
    fitted = make_tokenizer(kind, {"levels": 2, "codebook_size": 8}).fit(clustered)
    fitted.save(tmp_path / "model")
    source = write_folder(tmp_path / "items", clustered)
    output = str(tmp_path / "ids")
    flags = ["--engine", "ray", "--workers", "2", "-q"]
    assert run("encode", tmp_path / "model", source, "-o", output, *flags) == 0
    assert pq.read_table(output).equals(fitted.encode(source).to_arrow())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same(cluster, items, local, clustered, tmp_path, workers):
    fitted = tokenizer(center=True)
    fit_on_ray(fitted, Catalogue.open(items), options=RayOptions(workers=workers))
    check_same(fitted, local)
    network = semid.RQPVAE(
        levels=2,
        codebook_size=8,
        network={"hidden": [16], "latent": 8, "pretrain_epochs": 0},
        training={"epochs": 1, "batch_size": 256},
    ).fit(clustered)
    source = write_folder(tmp_path / "items", clustered)
    for kind in (network, semid.RQKMeans(levels=2, codebook_size=8).fit(clustered)):
        kind.save(tmp_path / kind.kind)
        output = tmp_path / f"{kind.kind}-ids"
        options = RayOptions(workers=workers)
        encode_folder(tmp_path / kind.kind, source, output, engine=options, unit_rows=150)
        assert pq.read_table(output).equals(kind.encode(source).to_arrow())


class Stoppable:
    """Make encoders of which the first ends by a signal in its second unit."""

    def __init__(self, job, marker: Path) -> None:
        self.job, self.marker = job, marker

    def __call__(self, place: int) -> EncodeWorker:
        encoder = EncodeWorker(self.job, threads=1)
        real, begun, marker = encoder.encode, [], self.marker

        def encode(unit):
            begun.append(unit)
            if len(begun) == 2 and not marker.exists():
                marker.write_text(str(os.getpid()), encoding="utf8")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(unit)

        encoder.encode = encode  # type: ignore[method-assign]
        return encoder


@pytest.mark.slow
def test_a_killed_actor_costs_no_row(cluster, items, local, tmp_path, monkeypatch):
    local.save(tmp_path / "model")
    marker = tmp_path / "marker"
    monkeypatch.setattr(
        "semid.distributed.encode_folder._make_worker",
        lambda job, threads, place: Stoppable(job, marker)(place),
    )
    run = encode_folder(
        tmp_path / "model",
        items,
        tmp_path / "ids",
        engine=RayOptions(workers=1),
        unit_rows=30_000,
    )
    assert marker.exists()
    assert run.lost == 1
    assert pq.read_table(tmp_path / "ids").equals(local.encode(items).to_arrow())


def test_a_worker_killed_in_a_fit_changes_no_bit(cluster, items, local, monkeypatch):
    killed: list[int] = []
    call_all = RayShardPool.call_all

    def kills(self, method, *arguments):
        if method == "assign" and not killed:
            killed.append(self.pool.process_ids()[1])
            threading.Timer(0.05, os.kill, (killed[0], signal.SIGKILL)).start()
            time.sleep(0.1)
        return call_all(self, method, *arguments)

    monkeypatch.setattr(RayShardPool, "call_all", kills)
    fitted = tokenizer(center=True)
    done = fit_on_ray(fitted, Catalogue.open(items), options=RayOptions(workers=2))
    assert killed
    assert done.lost == 1
    check_same(fitted, local)


def test_actors_that_would_starve_the_readers_are_refused(cluster):
    assert check_slots(ray, RayOptions(workers=1), readers=1) == 1
    assert check_slots(ray, RayOptions()) == 2
    with pytest.raises(UsageError, match=r"leave 1 for the tasks that read.*give --workers 1"):
        check_slots(ray, RayOptions(workers=2), readers=1)
    with pytest.raises(UsageError, match=r"3 workers with 1 CPUs.*give --workers 2"):
        check_slots(ray, RayOptions(workers=3))
    with pytest.raises(UsageError, match=r"3 CPUs does not fit.*lower --cpus-per-worker"):
        check_slots(ray, RayOptions(cpus_per_worker=3))


def test_a_small_object_store_is_refused(cluster, items):
    with pytest.raises(InputError, match=r"holds 80 MB.*--object-store-memory=268435456"):
        check_store(ray, 200_000_000, what="the sums")
    wide = semid.RQKMeans(levels=1, codebook_size=180_000)
    with pytest.raises(InputError, match=r"object store.*the sums of 180000 x 4 codewords"):
        fit_on_ray(wide, Catalogue.open(items), options=RayOptions(workers=1))


@pytest.mark.slow
def test_bad_data_reads_as_without_ray(cluster, tmp_path, clustered):
    bad = clustered.copy()
    bad[7] = np.nan
    source = write_folder(tmp_path / "bad", bad)
    with pytest.raises(EmbeddingError, match=r"holds 1 row with NaN"):
        fit_on_ray(tokenizer(), Catalogue.open(source), options=RayOptions(workers=1))
    few = write_folder(tmp_path / "few", np.repeat(clustered[:4], 10, axis=0))
    with pytest.raises(EmbeddingError, match="4 distinct rows cannot fill codebook_size=6"):
        fit_on_ray(tokenizer(), Catalogue.open(few), options=RayOptions(workers=1))


def test_no_usage_statistics_are_sent(cluster):
    from ray._common.usage import usage_lib

    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not usage_lib.usage_stats_enabled()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "ray", "--log", "jsonl:x", "--threads", "2"], "--log, --threads do not go"),
        (["--engine", "ray", "--on-invalid", "skip"], "--on-invalid do not go"),
        (["--engine", "dask"], "--engine='dask'"),
        (["--ray-address", "auto"], "go with --engine ray"),
    ],
)
def test_flags_of_a_fit_that_do_not_go_together(items, tmp_path, flags, message, capsys):
    assert run("fit", items, "-o", tmp_path / "model", *flags) == 2
    assert message in capsys.readouterr().err


def test_files_that_workers_cannot_see_are_refused(items):
    memory = Folder("memory://semid-ray")
    memory.write("a.parquet", (items / "part-0.parquet").read_bytes())
    with pytest.raises(UsageError, match="a worker cannot see"):
        fit_on_ray(tokenizer(), Catalogue.open("memory://semid-ray"))
    memory.remove()


def test_options_out_of_range_are_refused():
    with pytest.raises(UsageError, match=r"--workers.* is 0;.*--cpus-per-worker.* is 0;"):
        RayOptions(workers=0, cpus_per_worker=0)


def test_without_ray_the_command_to_install_it_is_named():
    script = (
        "import sys; sys.modules['ray'] = None\n"
        "from semid.distributed.ray_workers import import_ray\n"
        "import_ray()"
    )
    failed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "pip install 'semid[ray]'" in failed.stderr
