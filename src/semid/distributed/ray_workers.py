"""Ray's cluster and actors: connect, check capacity, run workers, replace those that end."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from semid.errors import InputError, UsageError, import_extra
from semid.options import Options, option

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
    retries: int = option(3, ge=0, help="Times a step whose worker ended is done again.")
    # Longer than a busy machine takes to start a process that imports torch.
    wait_seconds: int = option(
        120,
        ge=1,
        le=86_400,
        name="--wait-seconds",
        help="Seconds to wait for a free CPU slot when no worker is left.",
    )


def import_ray() -> Any:
    """Import Ray, which is an extra, with its usage statistics off unless they were asked for."""
    # Read when Ray starts: no default sends statistics about a run elsewhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return import_extra("ray", extra="ray", purpose="--engine ray")


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


class Actors:
    """Actors that hold workers: started, asked and ended here.

    ``living`` are those that answered and have not been seen to end; ``lost`` counts the others.
    """

    def __init__(self, ray: Any, options: RayOptions) -> None:
        self.ray, self.options = ray, options
        self.living: list[Any] = []
        self.lost = 0
        errors = ray.exceptions
        # What the end of a process or of a machine raises: of the call itself, of one that it
        # waited for, or of an answer that lay on that machine.
        self.losses: tuple[type[Exception], ...] = (
            errors.RayActorError,
            errors.ObjectLostError,
            errors.NodeDiedError,
            errors.WorkerCrashedError,
        )
        # Ray restarts nothing by itself: a new actor has to be told what the old one knew.
        slots = {"num_cpus": options.cpus_per_worker, "max_restarts": 0, "max_task_retries": 0}
        self._kind = ray.remote(**slots)(_Host)
        self._all: list[Any] = []

    def begin(self) -> Any:
        """Return a new actor, which starts when a CPU slot is free for it."""
        self._all.append(self._kind.remote())
        return self._all[-1]

    def answering(self, actors: Sequence[Any], *, seconds: float | None = None) -> list[Any]:
        """Return the actors that answer within a time, in their order; others are ended."""
        calls = {actor.process_id.remote(): actor for actor in actors}
        ready, _ = self.ray.wait(list(calls), num_returns=len(calls), timeout=seconds)
        for ref, actor in calls.items():
            try:
                if ref in ready:
                    self.ray.get(ref)
                    continue
            except self.losses:
                pass
            self.end(actor, lost=actor in self.living)
        return [actor for actor in actors if actor in self._all]

    def end(self, actor: Any, *, lost: bool = False) -> None:
        """Forget an actor, and end it if it has not ended."""
        if actor in self._all:
            self._all.remove(actor)
            self.ray.kill(actor)
            self.lost += lost
        if actor in self.living:
            self.living.remove(actor)

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

    def gave_up(self, what: str, times: int, error: Exception) -> InputError:
        """Return the error for a step whose workers end again and again."""
        return InputError(
            f"{what} lost its worker {times} times ({_first_line(error)}); it is probably out of "
            "memory: use more --workers on more machines, then --resume"
        )

    def none_left(self, error: Exception | None) -> InputError:
        """Return the error for a run without workers."""
        ended = f" (the last ended: {_first_line(error).rstrip('.')})" if error else ""
        return InputError(
            f"no worker is left{ended}, and none could start within {self.options.wait_seconds} "
            "s (--wait-seconds); free CPU slots or add a machine, then --resume"
        )

    def close(self) -> None:
        """End the actors and give their CPU slots back."""
        for actor in list(self._all):
            self.end(actor)


class WorkerPool(Actors):
    """Workers with a place and a state each, in actors; one that is lost is made again.

    ``make`` makes the worker object of a place, inside its actor; ``restore`` returns the calls
    that bring a new worker of a place to where the old one was. A new worker is put into a new
    actor, or where no CPU slot is free into one that has a worker already.
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
        super().__init__(ray, options)
        self.make, self.size, self.retries, self.restore = make, size, options.retries, restore
        # A machine may be lost before its actor starts: the others take its places.
        self.actors: list[Any] = []
        deadline = time.monotonic() + options.wait_seconds
        new = [self.begin() for _ in range(size)]
        self.living = self.answering(new, seconds=options.wait_seconds)
        if not self.living:
            self._find_actor(deadline, None)
        self.actors = [self.living[place % len(self.living)] for place in range(size)]
        calls = [actor.make.remote(make, place) for place, actor in enumerate(self.actors)]
        for place, ref in enumerate(calls):
            try:
                self.get(ref)
            except self.losses as error:
                self.replace_worker(place, 0, error)

    def start(self, place: int, method: str, *arguments: Any) -> Any:
        """Call a method of a worker; return the reference to its answer."""
        return self.actors[place].call.remote(place, method, *arguments)

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
                except self.losses as error:
                    self.replace_worker(place, attempt, error)
                    name, args = calls[place]
                    ref = self.start(place, name, *args)
        return answers

    def ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker and return the answers in the order of their places."""
        answers = self.ask(dict.fromkeys(range(self.size), (method, arguments)))
        return [answers[place] for place in range(self.size)]

    def replace_worker(self, place: int, attempt: int, error: Exception) -> None:
        """Make a worker again whose actor has ended, and bring it to where it was."""
        self.end(self.actors[place], lost=True)
        if attempt >= self.retries:
            raise self.gave_up(f"shard {place}", attempt + 1, error) from None
        actor = self._find_actor(time.monotonic() + self.options.wait_seconds, error)
        logger.warning(
            "the worker of shard %d ended (%s); it is made again, %d of %d workers live",
            *(place, _first_line(error), len(self.living), self.size),
        )
        self.actors[place] = actor
        try:
            self.get(actor.make.remote(self.make, place))
            # The new worker repeats the calls that the old one's state came from.
            for method, arguments in self.restore(place):
                self.get(self.start(place, method, *arguments))
        except self.losses as again:
            self.replace_worker(place, attempt + 1, again)

    def _find_actor(self, deadline: float, error: Exception | None) -> Any:
        """Return a new actor, or the one with the fewest workers."""
        while (actor := self._new_actor(deadline) or self._least_loaded()) is None:
            if time.monotonic() >= deadline:
                raise self.none_left(error) from None
            time.sleep(1)  # an actor that was sent to a machine that Ray has not missed yet ends
        return actor

    def _new_actor(self, deadline: float) -> Any:
        """Return a new actor, or None if none starts."""
        # With others left to take the work, only a slot that is free is worth waiting for. That of
        # a process that has just ended becomes free a moment later.
        for _ in range(FREED_SECONDS * 10 if self.living else 0):
            if self.ray.available_resources().get("CPU", 0) >= self.options.cpus_per_worker:
                break
            time.sleep(0.1)
        else:
            if self.living:
                return None
        seconds = max(deadline - time.monotonic(), 0)
        started = self.answering([self.begin()], seconds=seconds)
        self.living += started
        return started[0] if started else None

    def _least_loaded(self) -> Any:
        """Return the actor with the fewest workers of those that live, or None."""
        # Several may have ended with one machine: ask before another one's work is put there.
        self.living = self.answering(self.living)
        return min(self.living, key=self.actors.count, default=None)

    def ended(self) -> list[int]:
        """Return the places whose worker has ended."""
        self.living = self.answering(self.living)
        return [place for place, actor in enumerate(self.actors) if actor not in self.living]

    def process_ids(self) -> list[int]:
        """Return the process id of each worker."""
        return [int(pid) for pid in self.ray.get([a.process_id.remote() for a in self.actors])]


class _Host:
    """An actor's body: worker objects by their places, and calls to them."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)  # workers cut work into blocks for plain threads themselves
        self.workers: dict[int, Any] = {}

    def make(self, make: Callable[[int], Any], place: int) -> None:
        """Make the worker of a place."""
        self.workers[place] = make(place)

    def call(self, place: int, method: str, *arguments: Any) -> Any:
        """Call a method of a worker."""
        return getattr(self.workers[place], method)(*arguments)

    def pieces(self, place: int, method: str, size: int) -> Any:
        """Call a method that answers in ``size`` pieces, each of which is kept as its own."""
        pieces = getattr(self.workers[place], method)(size)
        return tuple(pieces) if size > 1 else pieces[0]

    def process_id(self) -> int:
        """Return the process's id."""
        return os.getpid()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
