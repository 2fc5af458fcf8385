"""What the runs of all papers share: their data sets, their order and what identifies each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from semid.reproduce.datasets import Opened, missing_files, open_data
from semid.reproduce.ledger import Ledger, digest
from semid.reproduce.pool import Job
from semid.reproduce.recipe import DataSet


class Experiment:
    """The runs of one paper's recipe; a runner of its jobs, pickled into every process."""

    def __init__(self, recipe: Any, data: Path | None, folder: Path) -> None:
        # Folder of data sets (None where all are synthetic) and folder of the ledger.
        self.recipe, self.data, self.folder = recipe, data, folder
        self.data_sets: dict[str, DataSet] = {one.name: one for one in recipe.data}

    def cells(self) -> list[dict[str, Any]]:
        """List every run of the recipe once, in order, without opening any data."""
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
