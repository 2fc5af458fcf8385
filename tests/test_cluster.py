"""Several Ray nodes on one machine that are lost at random moments of fits and encodes.

Each run must end in bounded time: with the results of one machine, or with an error that says to
resume, after which a resumed run ends with these results.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import semid
from distributed_cases import many_rows, write_folder
from semid.distributed.encode_folder import encode_folder
from semid.distributed.ray_fit import fit_on_ray
from semid.distributed.ray_workers import RayOptions, import_ray
from semid.distributed.units import Catalogue
from semid.errors import InputError
from semid.progress import QuietProgress
from semid.quantization.kmeans import KMeansOptions

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

NODES = 3  # with a CPU slot each, beside a head without one
BOUND = 400  # seconds in which a run has to end, on a machine with other work
RUNS = 8  # of a kind, with or without room: 32 in all


class Nodes:
    """A cluster whose nodes can be lost and come back."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # A node is missed after three seconds; by default after fifteen.
        checks = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        head = {"num_cpus": 0, "_system_config": checks, "object_store_memory": 100_000_000}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers: list[Any] = []
        self.fill()
        ray.init(address=self.cluster.address, log_to_driver=False)

    def fill(self) -> None:
        """Add nodes until all are there, and wait until their slots are free."""
        while len(self.workers) < NODES:
            node = self.cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
            self.workers.append(node)
        if ray.is_initialized():
            wait_for(lambda: ray.available_resources().get("CPU", 0) == NODES)

    def lose(self, count: int, generator: random.Random) -> None:
        """End some nodes as a machine that fails: no process says goodbye."""
        for node in generator.sample(self.workers, count):
            self.workers.remove(node)
            self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the cluster did not get there"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    import_ray()
    paths = Path(__file__).parent, Path(semid.__file__).parents[1]
    changes = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # or they wait for every other process
        "RAY_memory_monitor_refresh_ms": "0",  # other programs may fill the memory
        "RAY_raylet_start_wait_time_s": "300",  # and the processor
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    cluster = Nodes()
    yield cluster
    cluster.close()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


class Work:
    """A fit and an encode, and what one machine makes of them."""

    def __init__(self, folder: Path) -> None:
        rows = many_rows(200_000)
        self.items = write_folder(folder / "items", rows, row_group=10_000)
        self.local = self.tokenizer().fit(self.items)
        self.local.save(folder / "model")
        self.ids = self.local.encode(self.items).to_arrow()
        self.folder = folder

    def tokenizer(self) -> semid.RQKMeans:
        kmeans = KMeansOptions(max_iter=8, tol=0)
        return semid.RQKMeans(levels=2, codebook_size=8, threads=1, kmeans=kmeans)

    def fit(
        self, name: str, options: RayOptions, *, resume: bool = False, progress: Any = False
    ) -> int:
        """Fit on the cluster; return the number of workers that were lost."""
        fitted = self.tokenizer()
        state = self.folder / f"{name}.partial"
        done = fit_on_ray(
            *(fitted, Catalogue.open(self.items)),
            options=options,
            checkpoint=state,
            resume=resume,
            progress=progress,
        )
        assert fitted.weights_fingerprint == self.local.weights_fingerprint
        assert fitted.report.health.collisions == self.local.report.health.collisions
        assert fitted.report.health.usage == self.local.report.health.usage
        assert fitted.report.details == self.local.report.details
        return done.lost

    def encode(
        self, name: str, options: RayOptions, *, resume: bool = False, progress: Any = False
    ) -> int:
        """Encode on the cluster; return the number of workers that were lost."""
        output = self.folder / name
        done = encode_folder(
            *(self.folder / "model", self.items, output),
            engine=options,
            unit_rows=10_000,
            resume=resume,
            progress=progress,
        )
        # No row is lost or doubled, and all are in their order.
        assert pq.read_table(output).equals(self.ids)
        assert not (self.folder / f"{name}.partial").exists()
        return done.lost


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    return Work(tmp_path_factory.mktemp("cluster"))


def bounded(function: Callable[[], int]) -> int | InputError:
    """Return what a function returns, or its error for users; it has to end within `BOUND`."""
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(BOUND)
    assert outcome, f"the run did not end within {BOUND} s"
    if isinstance(outcome[0], BaseException) and not isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


class FirstStep(QuietProgress):
    """Notes when workers have begun to give results."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.at = time.monotonic()

    def step(self, done: int = 1, **fields: Any) -> None:
        if not self.began.is_set():
            self.at = time.monotonic()
            self.began.set()


DURATIONS: dict[tuple[str, bool, bool], float] = {}
"""Seconds of the shortest run of a kind, within which nodes are lost."""


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("room", [True, False], ids=["room", "full"])
@pytest.mark.parametrize("kind", ["fit", "encode"])
def test_lost_nodes_cost_no_row_and_no_bit(nodes, work, kind, room, run):
    # Without room every slot has a worker, so that one that is lost can start nowhere else.
    options = RayOptions(workers=NODES - 1 if room else NODES, wait_seconds=60)
    name = f"{kind}-{'room' if room else 'full'}-{run}"
    generator = random.Random(name)
    # The last run loses every node and cannot go on.
    count = NODES if run == RUNS - 1 else generator.randint(1, NODES - 1)
    do = getattr(work, kind)
    # Starting takes most of a run: every other run loses nodes after the first results.
    late = run % 2 == 1
    lost = False

    def lose() -> None:
        nonlocal lost
        if late:
            progress.began.wait(BOUND)
        if not done.wait(delay):
            lost = True
            nodes.lose(count, generator)

    for attempt in itertools.count():  # again if the run ended before nodes were lost
        nodes.fill()
        target = f"{name}-{attempt}"
        longest = DURATIONS.get((kind, room, late), BOUND)
        delay = generator.uniform(0, longest)
        progress, done = FirstStep(), threading.Event()
        thread = threading.Thread(target=lose)
        thread.start()
        started = time.monotonic()
        outcome = bounded(partial(do, target, options, progress=progress))
        seconds = time.monotonic() - started
        progress.began.set()
        done.set()
        thread.join()
        if lost:
            break
        assert outcome == 0
        since = progress.at if late else started
        DURATIONS[kind, room, late] = min(time.monotonic() - since, longest)
    ended, message = "equal", ""
    if isinstance(outcome, InputError):
        ended, message = "resumed", str(outcome)
        assert "--resume" in str(outcome)
        nodes.fill()
        # Nodes that have just come take longer to start workers.
        again = RayOptions(workers=options.workers, wait_seconds=300)
        outcome = bounded(lambda: do(target, again, resume=True))
    assert isinstance(outcome, int)
    print(  # noqa: T201 - the counts that the documentation states
        f"\n{name}: {count} of {NODES} nodes lost {delay:.1f} s after the "
        f"{'first results' if late else 'start'}, {ended} after "
        f"{seconds:.1f} s, {outcome} workers made again {message}"
    )
