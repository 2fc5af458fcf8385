"""How many threads to use, and how to run blocks of rows on them.

Work over rows is cut into blocks that plain threads take in turn, each with one BLAS thread: a
parallel region inside a block would meet a barrier for every product, which on a busy machine
costs more than it brings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from semid.errors import UsageError

Block = TypeVar("Block")
Result = TypeVar("Result")


def _read_numbers(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []


def _quota(numerator: str, denominator: str) -> float | None:
    try:
        quota, period = int(numerator), int(denominator)
    except ValueError:  # cgroup v2 writes "max" for no limit
        return None
    return quota / period if quota > 0 and period > 0 else None


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> float | None:
    """Read the CPU quota of the control group this process runs in."""
    limits: list[float] = []
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    for line in [*lines, "0::/", "1:cpu:/"]:  # a container may see only its own root
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        unified = parts[1] == ""
        if not unified and "cpu" not in parts[1].split(","):
            continue
        base = root if unified else root / "cpu"
        group = base / parts[2].strip("/")
        while True:
            if unified:
                words = _read_numbers(group / "cpu.max")
            else:
                words = _read_numbers(group / "cpu.cfs_quota_us")
                words += _read_numbers(group / "cpu.cfs_period_us")
            limit = _quota(words[0], words[1]) if len(words) == 2 else None
            if limit is not None:
                limits.append(limit)
            if group in (base, group.parent):
                break
            group = group.parent
    return min(limits) if limits else None


def default_threads() -> int:
    """Count the threads that can really run at once: CPU affinity, then the cgroup's quota.

    Returns:
        At least 1. A quota of 2.5 CPUs gives 2: a third thread would be throttled half the time.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    limit = cgroup_limit()
    return max(1, cpus if limit is None else min(cpus, int(limit)))


def resolve_threads(threads: int | None) -> int:
    """Turn the user's ``threads`` into a number.

    Returns at least 1.
    """
    if threads is None:
        return default_threads()
    if threads < 1:
        raise UsageError(f"threads={threads} must be at least 1, or None for all available threads")
    return threads


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run the body with one BLAS thread in the calling thread, then restore the caller's count.

    torch keeps a count per thread and one global count that new threads start from;
    `torch.set_num_threads` writes both, so restoring in the calling thread restores both.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
            count, thread_name_prefix="semid", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(work, blocks))
