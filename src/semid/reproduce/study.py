"""A reproduction as a whole: what there is to run, how long it takes, running it, its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semid.errors import UsageError, check_choice
from semid.progress import Progress, QuietProgress
from semid.reproduce.drq_runs import DrqRunner, drq_jobs
from semid.reproduce.ledger import RUNS_FILE, median, read_runs
from semid.reproduce.moc_runs import MocRunner, cell_title, moc_jobs, recipe_cells
from semid.reproduce.page import Page, make_page, write_page
from semid.reproduce.pool import Job, Runner, run_jobs
from semid.reproduce.recipe import DrqRecipe, MocRecipe, read_experiment

__all__ = ["PAPERS", "Estimate", "Study", "page_from"]

PAPERS = ("drq", "moc")


@dataclass(frozen=True)
class Estimate:
    """What is left to do.

    Attributes:
        runs: all runs asked for.
        done: those with a row.
        seconds: of one process for the others, from the rows there are; None without any.
        guessed: runs left whose like has not run, taken at the median of all.
    """

    runs: int
    done: int
    seconds: float | None
    guessed: int


class Study:
    """One paper's runs in a folder.

    Args:
        recipe: name of a packaged recipe or a TOML file.
        data: folder of data sets; None where all are synthetic.
        output: ``OUTPUT/<paper>/runs.jsonl`` is the ledger.
        only: words that a run's title must contain, all of them; empty keeps all.

    Raises:
        UsageError: a recipe or option that is not allowed, or nothing is left to run.
    """

    def __init__(
        self,
        recipe: str | Path,
        *,
        data: Path | None = None,
        output: Path,
        only: Sequence[str] = (),
    ) -> None:
        self.recipe: DrqRecipe | MocRecipe = read_experiment(recipe)
        self.paper = self.recipe.paper
        self.folder = output / self.paper
        self.jobs: list[Job]
        self.runner: Runner
        if isinstance(self.recipe, DrqRecipe):
            self.jobs, self.absent = drq_jobs(self.recipe, data, self.folder)
            self.runner = DrqRunner(self.recipe, data, self.folder)
        else:
            self.jobs, self.absent = moc_jobs(self.recipe, data, self.folder)
            self.runner = MocRunner(self.recipe, data, self.folder)
        self.chosen = [job for job in self.jobs if all(word in job.title for word in only)]
        if not self.chosen:
            why = "; ".join(self.absent.values()) or f"no run's title has {' and '.join(only)}"
            raise UsageError(f"nothing to run: {why}")

    def rows(self) -> list[dict[str, Any]]:
        """Read the finished runs."""
        return read_runs(self.folder / RUNS_FILE)

    def estimate(self) -> Estimate:
        """Say what is left, and how long it takes by the runs that are done."""
        rows = self.rows()
        done = {row["key"] for row in rows}
        left = [job for job in self.chosen if job.key not in done]
        known: dict[tuple[Any, ...], list[float]] = {}
        for row in rows:
            for like in _likes(row):
                known.setdefault(like, []).append(float(row["seconds"]))
        seconds, guessed = 0.0, 0
        for job in left:
            likes = [like for like in _likes(job.spec) if like in known]
            if likes:
                seconds += median(known[likes[0]])
            guessed += len(likes) < 2
        return Estimate(
            len(self.chosen), len(self.chosen) - len(left), seconds if rows else None, guessed
        )

    def run(
        self,
        *,
        processes: int = 1,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, str]:
        """Run what is missing; see `semid.reproduce.pool.run_jobs`."""
        return run_jobs(
            self.chosen,
            self.runner,
            self.folder,
            processes=processes,
            threads=threads,
            progress=progress or QuietProgress(),
            task=f"reproduce {self.paper}",
        )

    def page(self) -> Page:
        """Make the page of what has run, with a list of what has not."""
        rows = self.rows()
        done = {row["key"] for row in rows}
        missing = [job.title for job in self.jobs if job.key not in done]
        return make_page(self.paper, rows, missing=missing, absent=self.absent)

    def write(self) -> list[Path]:
        """Write the page beside the ledger."""
        return write_page(self.page(), self.folder, self.paper)


def _likes(spec: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return what a run resembles, the closest first."""
    close = ("data", "run", "tokenizer", "model", "scale")
    far = ("run", "tokenizer", "model")
    return [
        ("close", *(spec.get(name) for name in close)),
        ("far", *(spec.get(name) for name in far)),
        ("any",),
    ]


def page_from(paper: str, results: Path, output: Path, *, publish: bool = False) -> list[Path]:
    """Write a page from a committed ledger alone; no data and no training.

    Args:
        paper: ``drq`` or ``moc``.
        results: folder with ``<paper>/runs.jsonl``.
        output: folder for ``<paper>.md`` and ``<paper>.html``.
        publish: for documentation: refuses rows of ``--quick``.

    Raises:
        UsageError: no such ledger.
        InputError: see `semid.reproduce.page.make_page`.
    """
    check_choice("paper", paper, PAPERS)
    ledger = results / paper / RUNS_FILE
    if not ledger.is_file():
        raise UsageError(
            f"--from '{results}' holds no {paper}/{RUNS_FILE}; give the folder that 'semid "
            f"reproduce {paper} --output' wrote"
        )
    rows = read_runs(ledger)
    quick = bool(rows) and all(row.get("quick") for row in rows)
    missing = _unrun(read_experiment(f"{paper}-quick" if quick else paper), rows)
    page = make_page(paper, rows, missing=missing, publish=publish)
    return write_page(page, output, paper)


def _unrun(recipe: DrqRecipe | MocRecipe, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the cells of a recipe that no row has, without opening any data."""
    if isinstance(recipe, DrqRecipe):
        names = ("data", "tokenizer", "variant", "seed")
        wanted = [
            (d.name, t.name, t.variant, seed)
            for d in recipe.data
            for t in recipe.tokenizers
            if not t.data or d.name in t.data
            for seed in range(d.seeds or recipe.seeds)
        ]
        done = {tuple(row.get(name) for name in names) for row in rows}
        return [
            f"{data}, {name}{f' ({variant})' if variant else ''}, seed {seed}"
            for data, name, variant, seed in wanted
            if (data, name, variant, seed) not in done
        ]
    parts = ("data", "variant", "run", "model", "method", "scale", "fusion", "part", "seed")
    there = {tuple(row.get(name, "") for name in parts) for row in rows}
    return [
        cell_title(cell)
        for cell in recipe_cells(recipe)
        if tuple(cell.get(name, "") for name in parts) not in there
    ]
