"""Runs over several processes, in order; one that fails or dies leaves the others alone."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from semid.errors import UsageError
from semid.progress import Progress
from semid.reproduce.ledger import Ledger, origin

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run."""

    key: str  # hash of everything that decides it
    title: str  # for people
    spec: Mapping[str, Any]  # what tells it from others, JSON-able; goes into its row
    settings: str = ""  # hash of what it shares with others of its data set and protocol


Runner = Callable[[Job], dict[str, Any]]
"""Returns the figures of a job, JSON-able; pickled into every process, so it opens data late."""


@dataclass
class _Worker:
    """A process and the job that it last began."""

    process: Any
    pipe: Any
    job: str | None = None


def run_jobs(
    jobs: Sequence[Job],
    runner: Runner,
    folder: Path,
    *,
    processes: int = 1,
    threads: int | None = None,
    progress: Progress,
    task: str = "reproduce",
) -> dict[str, str]:
    """Run what has no line in the ledger yet.

    Returns title -> what went wrong, for runs that failed; they are tried again by the next call.
    """
    if processes < 1:
        raise UsageError(f"--processes {processes}: give at least 1")
    titles = {job.key: job.title for job in jobs}
    done = Ledger(folder).keys() & set(titles)
    open_jobs = [job for job in jobs if job.key not in done]
    progress.start(task, total=len(jobs))
    progress.step(len(done))
    failed: dict[str, str] = {}

    def report(kind: str, key: str, note: str) -> None:
        if kind == "failed":
            failed[titles[key]] = note
            logger.warning("%s failed: %s", titles[key], note)
        if kind != "begun":
            progress.step(1, run=titles[key])

    if processes == 1 or len(open_jobs) < 2:
        _work(runner, open_jobs, folder, threads, report)
    else:
        share = threads or max(1, (os.cpu_count() or 1) // processes)
        _spread(runner, open_jobs, folder, min(processes, len(open_jobs)), share, report)
    return failed


def _work(
    runner: Runner,
    jobs: Sequence[Job],
    folder: Path,
    threads: int | None,
    report: Callable[[str, str, str], None],
) -> None:
    """Claim and run jobs one after the other."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    ledger = Ledger(folder)
    try:
        for job in jobs:
            with ledger.claim(job.key) as claimed:
                if not claimed:  # done meanwhile, or under way in another process
                    continue
                report("begun", job.key, "")
                try:
                    figures = runner(job)
                except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
                    report("failed", job.key, f"{type(error).__name__}: {error}")
                    continue
                shared = {"key": job.key, "settings": job.settings, **job.spec}
                ledger.add({**shared, **figures, **origin()})
                report("done", job.key, "")
    finally:
        torch.set_num_threads(before)


def _child(
    runner: Runner, jobs: Sequence[Job], folder: Path, threads: int, pipe: connection.Connection
) -> None:
    """Work in another process, which reports through the pipe."""
    _work(runner, jobs, folder, threads, lambda *event: pipe.send(event))
    pipe.close()


def _spread(
    runner: Runner,
    jobs: Sequence[Job],
    folder: Path,
    processes: int,
    threads: int,
    report: Callable[[str, str, str], None],
) -> None:
    """Keep so many processes at work until all jobs are done, claimed elsewhere or failed."""
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    failed_keys: set[str] = set()

    def begin() -> _Worker:
        receiver, sender = context.Pipe(duplex=False)
        remaining = [job for job in jobs if job.key not in failed_keys]
        process = context.Process(
            target=_child, args=(runner, remaining, folder, threads, sender), daemon=True
        )
        process.start()
        sender.close()
        return _Worker(process, receiver)

    workers = [begin() for _ in range(processes)]
    try:
        while workers:
            ready = connection.wait([worker.pipe for worker in workers])
            for worker in [worker for worker in workers if worker.pipe in ready]:
                try:
                    kind, key, note = worker.pipe.recv()
                except (EOFError, OSError):  # it has ended, or it died
                    worker.process.join()
                    workers.remove(worker)
                    code = worker.process.exitcode
                    if code and worker.job is None:
                        # It died before its first run, and so would another in its place.
                        logger.warning("a process ended with %s before it ran", code)
                    elif code:
                        failed_keys.add(str(worker.job))
                        report("failed", str(worker.job), f"the process ended with code {code}")
                        workers.append(begin())
                    continue
                worker.job = key if kind == "begun" else None
                if kind == "failed":
                    failed_keys.add(key)
                report(kind, key, note)
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()
