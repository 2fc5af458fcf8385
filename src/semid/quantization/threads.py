"""How many threads to use, and how to run blocks of rows on them.

Work over rows is cut into blocks that plain threads take in turn, each with one BLAS thread: a
parallel region inside a block would meet a barrier for every product, which on a busy machine
costs more than it brings.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from semid.errors import UsageError
from semid.lazy import is_imported, torch

THREADED_WORK = 20_000_000
"""Multiply-adds below which starting threads costs more than they bring."""

Block = TypeVar("Block")
Result = TypeVar("Result")


def _read(*files: Path) -> str:
    """Return the text of files, empty where one cannot be read."""
    try:
        return " ".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError):
        return ""


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> float | None:
    """Read the CPU quota of the control group this process runs in."""
    limits: list[float] = []
    lines = _read(proc / "self" / "cgroup").splitlines()
    for line in [*lines, "0::/", "1:cpu:/"]:  # a container may see only its own root
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        group = base / path.strip("/")
        # A quota of any group above limits this one too.
        for folder in [group, *group.parents]:
            if controllers:
                words = _read(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us").split()
            else:
                words = _read(folder / "cpu.max").split()
            with contextlib.suppress(ValueError):  # "max", or no file: no limit
                quota, period = map(int, words)
                if quota > 0 and period > 0:
                    limits.append(quota / period)
            if folder == base:
                break
    return min(limits, default=None)


def default_threads() -> int:
    """Count the threads that can really run at once: CPU affinity, then the cgroup's quota.

    At least 1. A quota of 2.5 CPUs gives 2: a third thread would be throttled half the time.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    limit = cgroup_limit()
    return max(1, cpus if limit is None else min(cpus, int(limit)))


def resolve_threads(threads: int | None) -> int:
    """Turn the user's ``threads`` into a number of at least 1."""
    if threads is None:
        return default_threads()
    if threads < 1:
        raise UsageError(f"threads={threads} must be at least 1, or None for all available threads")
    return threads


@functools.cache
def _blas() -> Any:
    """Return what sets the threads of numpy's BLAS; torch's has functions of its own."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


_bodies = threading.Lock()
_running, _before = 0, contextlib.ExitStack()  # bodies that run now, and what puts the count back


@contextlib.contextmanager
def one_numpy_thread() -> Iterator[None]:
    """Run the body with one BLAS thread in numpy; its count is one for the whole process.

    Threads of small products wait for each other in loops: where something else runs on the CPUs,
    or a container has fewer than the machine, they take many times as long as one.
    """
    global _running
    with _bodies:  # the first body sets the count, the last one puts it back
        if not _running:
            _before.enter_context(_blas().limit(limits=1))
        _running += 1
    try:
        yield
    finally:
        with _bodies:
            _running -= 1
            if not _running:
                _before.close()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run the body with one BLAS thread of torch in this thread, then restore the caller's count.

    torch keeps a count per thread and one global count that new threads start from;
    `torch.set_num_threads` writes both, so restoring in the calling thread restores both.
    """
    before = torch.get_num_threads() if is_imported("torch") else 1
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_thread() -> None:
    if is_imported("torch"):
        torch.set_num_threads(1)


def map_blocks(
    work: Callable[[Block], Result], blocks: Sequence[Block], *, threads: int | None = None
) -> list[Result]:
    """Apply ``work`` to every block over plain threads with one BLAS thread each.

    Returns the results in the order of ``blocks``, whatever order they were made in.
    """
    count = min(resolve_threads(threads), len(blocks))
    with one_blas_thread():
        if count <= 1:
            return [work(block) for block in blocks]
        with ThreadPoolExecutor(
            count, thread_name_prefix="semid", initializer=_start_thread
        ) as pool:
            return list(pool.map(work, blocks))
