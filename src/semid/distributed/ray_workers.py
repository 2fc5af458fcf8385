"""Ray's cluster and actors: connect, check capacity, run workers, replace those that end."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from semid.errors import InputError, MissingExtraError, UsageError
from semid.options import Options, option
from semid.quantization.blocks import BLOCK_ROWS, Node, Statistics, TreeSum, merge_nodes
from semid.quantization.sharding import payload_bytes

logger = logging.getLogger(__name__)

FREED_SECONDS = 10
"""Time to wait for slots: work that has just ended gives them back a moment later."""

MAX_WORKERS = 100_000


@dataclass(frozen=True, kw_only=True)
class RayOptions(Options):
    """How work is laid out on Ray.

    ``workers`` None takes one for every ``cpus_per_worker`` of the cluster; ``address`` None takes
    the cluster named by ``RAY_ADDRESS``, else starts one on this machine.
    """

    workers: int | None = option(
        None, ge=1, le=MAX_WORKERS, name="--workers", help="Number of workers."
    )
    cpus_per_worker: int = option(
        1,
        ge=1,
        le=MAX_WORKERS,
        name="--cpus-per-worker",
        help="CPU slots, and threads, of a worker.",
    )
    address: str | None = option(None, help="Address of a Ray cluster; one is started by default.")
    # Ray starts no smaller object store.
    store_bytes: int = option(
        512 * 1024**2,
        ge=75 * 1024**2,
        le=2**50,
        name="--store-bytes",
        help="Object store of a cluster that is started here, in bytes.",
    )
    retries: int = option(3, ge=0, help="Times a worker that ends is replaced.")


def import_ray() -> Any:
    """Import Ray, which is an extra, with its usage statistics off unless they were asked for."""
    # Read when Ray starts: no default sends statistics about a run elsewhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", extra="ray", purpose="--engine ray") from None
    return ray


def connect(options: RayOptions) -> Any:
    """Return Ray, connected; a cluster that is there already is used as it is."""
    ray = import_ray()
    if not ray.is_initialized():
        address = options.address or os.environ.get("RAY_ADDRESS")
        started_here = {} if address else {"object_store_memory": options.store_bytes}
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **started_here,
        )
    return ray


def check_slots(ray: Any, options: RayOptions, *, readers: int = 0) -> int:
    """Return the number of workers to start, all of which find a free slot.

    Actors that find no free CPU slot wait for one for ever, and so does everything behind them.
    """
    total = int(ray.cluster_resources().get("CPU", 0))
    capacity = (total - readers) // options.cpus_per_worker
    requested = max(capacity, 1) if options.workers is None else options.workers
    # Slots of work that has just ended become free a moment later: ask again until they do.
    for _ in range(FREED_SECONDS * 10):
        free = int(ray.available_resources().get("CPU", 0))
        available = (free - readers) // options.cpus_per_worker
        if available >= requested:
            return requested
        if requested > capacity:
            break  # no end of other work would free enough
        time.sleep(0.1)
    if options.workers is None and available >= 1:
        return available
    if available < 1:
        reading = f", and {readers} must stay for reading" if readers else ""
        raise UsageError(
            f"a worker with {options.cpus_per_worker} CPUs does not fit: the cluster has {free} of "
            f"{total} CPU slots free{reading}, so it would wait for ever; free some, add a "
            "machine, or lower --cpus-per-worker (cpus_per_worker)"
        )
    reserved = f" and leave {readers} for the tasks that read" if readers else ""
    raise UsageError(
        f"{requested} workers with {options.cpus_per_worker} CPUs each would take "
        f"{requested * options.cpus_per_worker} CPU slots{reserved}, but the cluster has {free} of "
        f"{total} free, so some would wait for ever; give --workers {available} "
        f"(workers={available}), or add machines"
    )


def check_store(ray: Any, needed: int, *, what: str) -> None:
    """Refuse an object store that could not hold what is passed around at one time."""
    store = int(ray.cluster_resources().get("object_store_memory", 0))
    if store < needed:
        enough = 1 << (needed - 1).bit_length()
        raise InputError(
            f"Ray's object store holds {store / 1e6:,.0f} MB, and {what} take "
            f"{needed / 1e6:,.0f} MB at one time; start Ray with a larger one: "
            f"ray start --object-store-memory={enough} (--store-bytes {enough} for a cluster that "
            "semid starts), or use fewer --workers or a smaller --codebook-size"
        )


_SEEDING = ("start_seeding", "update_nearest_center", "assign")
_LEVELS = ("reset_levels", "subtract_codewords", *_SEEDING)

VOIDS: dict[str, tuple[str, ...]] = {
    "preprocess": _LEVELS,
    "reset_levels": _LEVELS,
    "subtract_codewords": _SEEDING,
    "start_seeding": _SEEDING,
    "update_nearest_center": (),
    "assign": _SEEDING,
}
"""Calls that change what a shard knows -> earlier calls that need not be repeated after them when a
new worker has to be brought to where the old one was."""


class WorkerPool:
    """Actors of one kind; one that ends is replaced, ``options.retries`` times per call.

    ``make`` makes the worker object of a place, inside its actor; ``restore`` returns the calls
    that bring a new worker of a place to where the old one was.
    """

    def __init__(
        self,
        ray: Any,
        make: Callable[[int], Any],
        options: RayOptions,
        *,
        size: int,
        restore: Callable[[int], Sequence[tuple[str, tuple[Any, ...]]]],
    ) -> None:
        self.ray, self.make, self.size, self.retries = ray, make, size, options.retries
        self.restore, self.lost = restore, 0
        # Ray restarts nothing by itself: a new actor has to be told what the old one knew.
        slots = {"num_cpus": options.cpus_per_worker, "max_restarts": 0, "max_task_retries": 0}
        self._kind = ray.remote(**slots)(_Host)
        self.actors = [self._kind.remote(make, place) for place in range(size)]

    def start(self, place: int, method: str, *arguments: Any) -> Any:
        """Call a method of a worker; return the reference to its answer."""
        return self.actors[place].call.remote(method, *arguments)

    def ask(self, calls: Mapping[int, tuple[str, tuple[Any, ...]]]) -> dict[int, Any]:
        """Call methods, wait, and return the answers; a worker that ends is replaced."""
        # All calls are started before the first answer is waited for, so that workers run at once.
        refs = {place: self.start(place, name, *args) for place, (name, args) in calls.items()}
        answers: dict[int, Any] = {}
        for place, ref in refs.items():
            for attempt in range(self.retries + 1):
                try:
                    answers[place] = self.get(ref)
                    break
                except self.ray.exceptions.RayActorError as error:
                    self.replace_worker(place, attempt, error)
                    name, args = calls[place]
                    ref = self.start(place, name, *args)
        return answers

    def ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker and return the answers in the order of their places."""
        answers = self.ask(dict.fromkeys(range(self.size), (method, arguments)))
        return [answers[place] for place in range(self.size)]

    def get(self, ref: Any) -> Any:
        """Wait for an answer; what a worker raised on purpose is raised here as it was."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise cause from None
        except self.ray.exceptions.OutOfMemoryError as error:
            raise InputError(
                f"a worker ran out of memory ({str(error).splitlines()[0]}); use more --workers on "
                "more machines, so that each holds fewer rows"
            ) from None

    def replace_worker(self, place: int, attempt: int, error: Exception) -> None:
        """Put a new worker in the place of one that ended, and bring it to where that one was."""
        self.lost += 1
        if attempt >= self.retries:
            raise InputError(
                f"worker {place} ended {attempt + 1} times in one step ({_first_line(error)}); it "
                "is probably out of memory: use more --workers on more machines, then --resume"
            ) from None
        logger.warning("worker %d ended (%s); it is made again", place, _first_line(error))
        self.actors[place] = self._kind.remote(self.make, place)
        # The new worker repeats the calls that the old one's state came from.
        for method, arguments in self.restore(place):
            self.get(self.start(place, method, *arguments))

    def ended(self) -> list[int]:
        """Return the places whose worker has ended."""
        places = []
        for place, actor in enumerate(self.actors):
            try:
                self.ray.get(actor.process_id.remote())
            except self.ray.exceptions.RayActorError:
                places.append(place)
        return places

    def process_ids(self) -> list[int]:
        """Return the process id of each worker."""
        return [int(pid) for pid in self.ray.get([a.process_id.remote() for a in self.actors])]

    def close(self) -> None:
        """End the workers and give their CPU slots back."""
        for actor in self.actors:
            self.ray.kill(actor)


class _Host:
    """An actor's body: one worker object and calls to it."""

    def __init__(self, make: Callable[[int], Any], place: int) -> None:
        import torch

        torch.set_num_threads(1)  # workers cut work into blocks for plain threads themselves
        self.worker = make(place)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker."""
        return getattr(self.worker, method)(*arguments)

    def pieces(self, method: str, size: int) -> Any:
        """Call a method that answers in ``size`` pieces, each of which is kept as its own."""
        pieces = getattr(self.worker, method)(size)
        return tuple(pieces) if size > 1 else pieces[0]

    def process_id(self) -> int:
        """Return the process's id."""
        return os.getpid()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RayShardPool:
    """The shards of a fit, one per actor (`semid.quantization.sharding.ShardPool`).

    ``sent``, ``received`` and ``passed`` count bytes by method: of arrays that left this process,
    that came back to it, and of sums that went from one worker to another.
    """

    def __init__(
        self, ray: Any, make: Callable[[int], Any], options: RayOptions, *, size: int
    ) -> None:
        self.ray = ray
        self.spans: Sequence[tuple[int, int]] = []
        self.sent, self.received, self.passed = (Counter[str]() for _ in range(3))
        self._loads: list[tuple[Any, ...]] = []
        self._journal: list[tuple[str, dict[int, tuple[Any, ...]]]] = []
        self.pool = WorkerPool(ray, make, options, size=size, restore=self._restore)

    def load(self, loads: Sequence[tuple[Any, ...]], spans: Sequence[tuple[int, int]]) -> None:
        """Give every worker its shard: arguments of `FitWorker.load`, and the rows it holds."""
        self._loads = list(loads)
        self.spans = list(spans)
        self.pool.ask({place: ("load", args) for place, args in enumerate(self._loads)})

    def _restore(self, place: int) -> list[tuple[str, tuple[Any, ...]]]:
        if not self._loads:
            return []
        changes = [(method, *args[place]) for method, args in self._journal if place in args]
        return [("load", self._loads[place]), *(("call", change) for change in changes)]

    def _note(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> None:
        """Remember a call that changes what shards know, and forget those it makes void."""
        if method in VOIDS:
            # A later call of the same effect replaces earlier ones, so a restore repeats few.
            void = VOIDS[method]
            self._journal = [entry for entry in self._journal if entry[0] not in void]
            self._journal.append((method, dict(arguments)))

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a `Shard` method on the shards named; return their answers."""
        self.sent[method] += payload_bytes(arguments)
        answers = self.pool.ask({p: ("call", (method, *args)) for p, args in arguments.items()})
        self._note(method, arguments)
        self.received[method] += payload_bytes(answers)
        return answers

    def call_all(self, method: str, *arguments: Any) -> list[Node[Statistics]]:
        """Call a method that answers in nodes on every shard, and add them up in a tree.

        Neighbors add up their nodes two by two, from worker to worker, so this process receives
        one list of nodes whatever the number of workers.
        """
        everyone = dict.fromkeys(range(self.pool.size), arguments)
        self.sent[method] += payload_bytes(everyone)
        for attempt in range(self.pool.retries + 1):
            try:
                nodes = self.pool.get(self._added(method, arguments))
                break
            except (self.ray.exceptions.RayActorError, self.ray.exceptions.ObjectLostError) as lost:
                # The calls change nothing when they are made twice: all are made again.
                for place in self.pool.ended():
                    self.pool.replace_worker(place, attempt, lost)
                if attempt == self.pool.retries:
                    raise InputError(
                        f"'{method}' lost workers {attempt + 1} times ({_first_line(lost)}); use "
                        "more --workers on more machines, then --resume"
                    ) from None
        self._note(method, everyone)
        self.received[method] += payload_bytes(nodes)
        if nodes:
            self.passed[method] += self._nodes_passed() * payload_bytes(nodes[0])
        # What lies in the object store is not to be written to.
        merged: list[Node[Statistics]] = merge_nodes([copy.deepcopy(nodes)])
        return merged

    def _added(self, method: str, arguments: tuple[Any, ...]) -> Any:
        # Large arguments go into the object store once, not to every worker.
        big = [self.ray.put(value) if payload_bytes(value) else value for value in arguments]
        # (place, reference to its nodes): neighbors are merged in pairs until one is left.
        pool = self.pool
        nodes = [(p, pool.start(p, "call", method, *big)) for p in range(pool.size)]
        while len(nodes) > 1:
            pairs = zip(nodes[::2], nodes[1::2], strict=False)
            merged = [(p, pool.start(p, "merge", a, b)) for (p, a), (_, b) in pairs]
            nodes = merged + nodes[2 * len(merged) :]
        return nodes[0][1]

    def _nodes_passed(self) -> int:
        """Count the nodes that go from worker to worker in one sum; the spans alone decide it."""
        # The tree of each worker without its sums; pairs are merged as in `_added`, and of each
        # pair the right one's nodes travel.
        trees: list[list[Node[_Nothing]]] = []
        for first, last in self.spans:
            tree: TreeSum[_Nothing] = TreeSum()
            for block in range(first // BLOCK_ROWS, -(-last // BLOCK_ROWS)):
                tree.add(block, _Nothing())
            trees.append(tree.nodes)
        passed = 0
        while len(trees) > 1:
            passed += sum(len(nodes) for nodes in trees[1::2])
            trees = [merge_nodes(trees[i : i + 2]) for i in range(0, len(trees), 2)]
        return passed

    def close(self) -> None:
        """End the workers."""
        self.pool.close()


class _Nothing:
    """A sum of which only the place counts."""

    def add_(self, other: _Nothing) -> None:
        """Add nothing."""
