"""Experiments as lists of runs, and runs over several processes; one that dies fails alone."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semid.errors import UsageError
from semid.progress import Progress
from semid.reproduce.datasets import Opened, missing_files, open_data
from semid.reproduce.ledger import Ledger, digest, origin
from semid.reproduce.recipe import DataSet

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


class Experiment:
    """The runs of one paper's recipe; a runner of its jobs, pickled into every process."""

    def __init__(self, recipe: Any, data: Path | None, folder: Path) -> None:
        # Folder of data sets (None where all are synthetic) and folder of the ledger.
        self.recipe, self.data, self.folder = recipe, data, folder
        self.data_sets: dict[str, DataSet] = {one.name: one for one in recipe.data}

    def cells(self) -> list[dict[str, Any]]:
        """List every run of the recipe once, in order, without opening any data.

        Here stage by stage, seed by seed, as `stage_cells` has them.
        """
        cells: dict[str, dict[str, Any]] = {}
        for stage in self.recipe.stages:
            for seed in range(stage.seeds or self.recipe.seeds):
                for data in stage.data or self.data_sets:
                    common = {"paper": self.recipe.paper, "quick": self.recipe.quick, "data": data}
                    for choices in self.stage_cells(stage, data, seed):
                        cell = {**common, **choices, "seed": seed}
                        cells.setdefault(digest(cell), cell)
        return list(cells.values())

    def stage_cells(self, stage: Any, data: str, seed: int) -> Iterable[dict[str, Any]]:
        """Yield what a stage runs on a data set with a seed."""
        raise NotImplementedError

    def title(self, cell: Mapping[str, Any]) -> str:
        """Name a run for people."""
        raise NotImplementedError

    def identity(self, cell: Mapping[str, Any], files: str) -> list[Any]:
        """Return all that decides a run, first what it shares with others of its protocol."""
        raise NotImplementedError

    def __call__(self, job: Job) -> dict[str, Any]:
        """Return the figures of a job, JSON-able."""
        raise NotImplementedError

    def in_order(self, cells: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        """Sort the runs, the most informative first."""
        return cells

    def obstacle(self, opened: Opened, cell: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return what of a data set cannot be run, and why."""
        return None

    def open(self, name: str) -> Opened:
        """Open a data set."""
        return open_data(self.data_sets[name], self.data, Ledger(self.folder))

    def jobs(self) -> tuple[list[Job], dict[str, str]]:
        """Return the jobs, and what cannot be run -> why."""
        absent = {
            name: why
            for name, one in self.data_sets.items()
            if (why := missing_files(one, self.data))
        }
        # A run is known by its settings and the bytes of its data; what shares the first part of
        # the settings is shown together on the page.
        opened = {name: self.open(name) for name in self.data_sets if name not in absent}
        jobs = []
        for cell in self.in_order([c for c in self.cells() if c["data"] in opened]):
            data = opened[cell["data"]]
            if obstacle := self.obstacle(data, cell):
                absent.update([obstacle])
                continue
            identity = self.identity(cell, data.digest)
            title, settings = self.title(cell), digest(identity[0])
            jobs.append(Job(digest(identity), title, cell, settings=settings))
        return jobs, absent


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
    """Run what has no line in the ledger yet; return title -> what went wrong, to try again."""
    if processes < 1:
        raise UsageError(f"--processes {processes}: give at least 1")
    done = Ledger(folder).keys()
    open_jobs = [job for job in jobs if job.key not in done]
    progress.start(task, total=len(jobs))
    progress.step(len(jobs) - len(open_jobs))
    failed: dict[str, str] = {}

    def report(job: Job, outcome: str, note: str) -> None:
        if outcome == "failed":
            failed[job.title] = note
            logger.warning("%s failed: %s", job.title, note)
        if outcome != "elsewhere":
            progress.step(1, run=job.title)

    # One process runs in place, so that its errors and interrupts are those of the caller.
    if processes == 1 or len(open_jobs) < 2:
        import torch

        before, ledger = torch.get_num_threads(), Ledger(folder)
        torch.set_num_threads(threads or before)
        try:
            for job in open_jobs:
                report(job, *_run(runner, job, ledger))
        finally:
            torch.set_num_threads(before)
    else:
        share = threads or max(1, (os.cpu_count() or 1) // processes)
        _spread(runner, open_jobs, folder, min(processes, len(open_jobs)), share, report)
    return failed


def _run(runner: Runner, job: Job, ledger: Ledger) -> tuple[str, str]:
    """Claim and run a job; return "done", "failed" or "elsewhere", and what went wrong."""
    with ledger.claim(job.key) as claimed:
        if not claimed:  # done meanwhile, or under way in another process
            return "elsewhere", ""
        try:
            figures = runner(job)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            return "failed", f"{type(error).__name__}: {error}"
        shared = {"key": job.key, "settings": job.settings, **job.spec}
        ledger.add({**shared, **figures, **origin()})
        return "done", ""


def _serve(runner: Runner, folder: Path, threads: int, pipe: Any) -> None:
    """Run the jobs that arrive through a pipe, in another process, until it is closed."""
    import torch

    torch.set_num_threads(threads)
    ledger = Ledger(folder)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(_run(runner, pipe.recv(), ledger))


def _spread(
    runner: Runner,
    jobs: Sequence[Job],
    folder: Path,
    processes: int,
    threads: int,
    report: Callable[[Job, str, str], None],
) -> None:
    """Run jobs in several processes; one that dies fails its job and is replaced."""
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    queue, lock, stopped = deque(jobs), threading.Lock(), threading.Event()
    started: list[Any] = []

    def next_job() -> Job | None:
        with lock:
            return queue.popleft() if queue else None

    def drive() -> None:
        """Feed one process after the other with jobs, from a thread of this process."""
        while queue:
            pipe, other = context.Pipe()
            arguments = (runner, folder, threads, other)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            started.append(process)
            other.close()  # so that the end of the process is the end of the pipe
            try:
                pipe.recv()
            except (EOFError, OSError):
                # It died before its first run, and so would another in its place.
                process.join()
                if not stopped.is_set():
                    logger.warning("a process ended with %s before it ran", process.exitcode)
                return
            # The process keeps data and tokenizers between jobs; only one that died is replaced.
            while process.is_alive() and (job := next_job()) is not None:
                try:
                    pipe.send(job)
                    outcome, note = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    outcome, note = "failed", f"the process ended with code {process.exitcode}"
                if stopped.is_set():
                    return
                with lock:
                    report(job, outcome, note)
            pipe.close()
            process.join()

    with ThreadPoolExecutor(processes) as drivers:
        try:
            for driver in [drivers.submit(drive) for _ in range(processes)]:
                driver.result()
        finally:
            # After an interrupt the drivers find no more jobs, and their processes ended.
            stopped.set()
            queue.clear()
            for process in started:
                process.terminate()
