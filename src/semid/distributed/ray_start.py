"""Meet a Ray cluster, or start one on this machine, and refuse what would hang or break later."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

from semid.errors import InputError, MissingExtraError, UsageError
from semid.options import Options, option

__all__ = ["RayOptions", "check_slots", "check_store", "connect", "import_ray"]

logger = logging.getLogger(__name__)

# What has just ended gives its slots back a moment later.
FREED_SECONDS = 10

MAX_WORKERS = 100_000


@dataclass(frozen=True, kw_only=True)
class RayOptions(Options):
    """How work is laid out on Ray.

    Attributes:
        workers: actors; None takes one for every ``cpus_per_worker`` of the cluster.
        cpus_per_worker: CPU slots, and threads, of an actor; at least 1.
        address: a cluster's address, for example ``auto``; None meets the cluster named by
            ``RAY_ADDRESS``, else starts one on this machine.
        store_bytes: object store of a cluster that is started here.
        retries: how often a worker's work is begun again after its end, before the run gives up.
    """

    workers: int | None = option(None, ge=1, le=MAX_WORKERS, name="--workers (workers=)")
    cpus_per_worker: int = option(
        1, ge=1, le=MAX_WORKERS, name="--cpus-per-worker (cpus_per_worker=)"
    )
    address: str | None = None
    # Ray starts no smaller object store.
    store_bytes: int = option(
        512 * 1024**2, ge=75 * 1024**2, le=2**50, name="--store-bytes (store_bytes=)"
    )
    retries: int = option(3, ge=0)


def import_ray() -> Any:
    """Import Ray, which is an extra, with its usage statistics off unless they were asked for.

    Raises:
        MissingExtraError: it is not installed; with the command that installs it.
    """
    # Read when Ray starts: nothing about a catalogue leaves the house because of a default.
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
        own = {} if address else {"object_store_memory": options.store_bytes}
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **own,
        )
    return ray


def check_slots(ray: Any, options: RayOptions, *, readers: int = 0) -> int:
    """Return the number of workers to start, all of which find room.

    Actors that find no free CPU slot wait for one for ever, and so does everything behind them.

    Args:
        ray: what `connect` gave.
        options: workers and CPUs of each.
        readers: CPU slots that must stay free for tasks that feed the workers.

    Raises:
        UsageError: they do not fit, with the numbers that would.
    """
    total = int(ray.cluster_resources().get("CPU", 0))
    most = (total - readers) // options.cpus_per_worker
    wanted = max(most, 1) if options.workers is None else options.workers
    for _ in range(FREED_SECONDS * 10):
        free = int(ray.available_resources().get("CPU", 0))
        room = (free - readers) // options.cpus_per_worker
        if room >= wanted:
            return wanted
        if wanted > most:
            break  # no end of other work would make room
        time.sleep(0.1)
    if options.workers is None and room >= 1:
        return room
    kept = f" and leave {readers} for the tasks that read" if readers else ""
    if room < 1:
        raise UsageError(
            f"a worker with {options.cpus_per_worker} CPUs does not fit: the cluster has {free} of "
            f"{total} CPU slots free{kept and ', and ' + str(readers) + ' must stay for reading'}, "
            "so it would wait for ever; free some, add a machine, or lower --cpus-per-worker "
            "(cpus_per_worker)"
        )
    raise UsageError(
        f"{wanted} workers with {options.cpus_per_worker} CPUs each would take "
        f"{wanted * options.cpus_per_worker} CPU slots{kept}, but the cluster has {free} of "
        f"{total} free, so some would wait for ever; give --workers {room} (workers={room}), or "
        "add machines"
    )


def check_store(ray: Any, needed: int, *, what: str) -> None:
    """Refuse an object store that could not hold what is passed around at one time.

    Args:
        ray: what `connect` gave.
        needed: bytes.
        what: what they are, in words.

    Raises:
        InputError: it is too small, with the size that is enough.
    """
    store = int(ray.cluster_resources().get("object_store_memory", 0))
    if store < needed:
        enough = 1 << (needed - 1).bit_length()
        raise InputError(
            f"Ray's object store holds {store / 1e6:,.0f} MB, and {what} take "
            f"{needed / 1e6:,.0f} MB at one time; start Ray with a larger one: "
            f"ray start --object-store-memory={enough} (--store-bytes {enough} for a cluster that "
            "semid starts), or use fewer --workers or a smaller --codebook-size"
        )
