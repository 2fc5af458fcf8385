"""A reproduction as a whole: what there is to run, how long it takes, running it, its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from semid.errors import UsageError, check_choice
from semid.progress import Progress, QuietProgress
from semid.reproduce import PAPERS
from semid.reproduce.drq_runs import DrqExperiment
from semid.reproduce.ledger import RUNS_FILE, origin, read_runs
from semid.reproduce.moc_runs import MocExperiment
from semid.reproduce.page import Page, make_page, write_page
from semid.reproduce.pool import Experiment, run_jobs
from semid.reproduce.predict_runs import PredictExperiment
from semid.reproduce.recipe import read_experiment
from semid.reproduce.retrieval_runs import RetrievalExperiment

EXPERIMENTS: dict[str, type[Experiment]] = {
    "drq": DrqExperiment,
    "moc": MocExperiment,
    "behavior": DrqExperiment,
    "retrieval": RetrievalExperiment,
    "predict": PredictExperiment,
}


@dataclass(frozen=True)
class Estimate:
    """What is left to do."""

    runs: int  # all runs asked for
    done: int  # those with a row
    seconds: float | None  # of one process for the others, by the rows there are
    guessed: int  # runs left whose like has not run, taken at the median of all
    machine: str  # kind of machine whose runs it is judged by


class Study:
    """One paper's runs in a folder: ``OUTPUT/<paper>/runs.jsonl`` is the ledger."""

    def __init__(
        self,
        recipe: str | Path,
        *,
        data: Path | None = None,
        output: Path,
        only: Sequence[str] = (),
    ) -> None:
        self.recipe = read_experiment(recipe)
        self.paper = self.recipe.paper
        self.folder = output / self.paper
        self.experiment = EXPERIMENTS[self.paper](self.recipe, data, self.folder)
        self.jobs, self.absent = self.experiment.jobs()
        # ``only`` are words that a run's title must contain, all of them; empty keeps all.
        self.selected = [job for job in self.jobs if all(word in job.title for word in only)]
        if not self.selected:
            why = "; ".join(self.absent.values()) or f"no run's title has {' and '.join(only)}"
            raise UsageError(f"nothing to run: {why}")

    def rows(self) -> list[dict[str, Any]]:
        """Read the finished runs."""
        return read_runs(self.folder / RUNS_FILE)

    def estimate(self) -> Estimate:
        """Say what is left, and how long it takes by the runs that are done."""
        rows = self.rows()
        done = {row["key"] for row in rows}
        missing = [job for job in self.selected if job.key not in done]
        # A GPU is many times as fast: runs of machines like this one count, if there are any.
        here = origin()["machine"]["gpu"] is not None
        alike = [row for row in rows if bool((row.get("machine") or {}).get("gpu")) == here]
        kind = ("with a GPU" if here else "without a GPU") if alike else "of another kind"
        durations: dict[tuple[Any, ...], list[float]] = {}
        for row in alike or rows:
            for group in _groups(row):
                durations.setdefault(group, []).append(float(row["seconds"]))
        # A run left takes as long as the median of the runs most like it.
        seconds, guessed = 0.0, 0
        for job in missing:
            groups = [group for group in _groups(job.spec) if group in durations]
            if groups:
                seconds += median(durations[groups[0]])
            guessed += len(groups) < 2
        count = len(self.selected)
        time = seconds if rows else None
        return Estimate(count, count - len(missing), time, guessed, kind)

    def run(
        self,
        *,
        processes: int = 1,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, str]:
        """Run what is missing; see `semid.reproduce.pool.run_jobs`."""
        return run_jobs(
            self.selected,
            self.experiment,
            self.folder,
            processes=processes,
            threads=threads,
            progress=progress or QuietProgress(),
            task=f"reproduce {self.paper}",
        )

    def page(self) -> Page:
        """Make the page of what has run, with a list of what has not."""
        # Data that are absent here are part of what the claims cover.
        absent = [cell for cell in self.experiment.cells() if cell["data"] in self.absent]
        return make_page(
            self.paper,
            self.rows(),
            cells=[*(job.spec for job in self.jobs), *absent],
            title=self.experiment.title,
            absent=self.absent,
        )

    def write(self) -> list[Path]:
        """Write the page beside the ledger."""
        return write_page(self.page(), self.folder, self.paper)


def _groups(spec: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return the groups of similar runs that a run belongs to, the most similar first."""
    close, far = ("data", "run", "tokenizer", "model", "scale"), ("run", "tokenizer", "model")
    return [(len(names), *map(spec.get, names)) for names in (close, far, ())]


def page_from(paper: str, results: Path, output: Path, *, publish: bool = False) -> list[Path]:
    """Write a page from a committed ledger alone; no data and no training."""
    check_choice("paper", paper, PAPERS)
    ledger = results / paper / RUNS_FILE
    if not ledger.is_file():
        raise UsageError(
            f"--from '{results}' holds no {paper}/{RUNS_FILE}; give the folder that 'semid "
            f"reproduce {paper} --output' wrote"
        )
    rows = read_runs(ledger)
    # Which recipe it was shows what has not run; the ledger alone knows only what has.
    quick = bool(rows) and all(row.get("quick") for row in rows)
    recipe = read_experiment(f"{paper}-quick" if quick else paper)
    runs = EXPERIMENTS[paper](recipe, None, results / paper)
    page = make_page(paper, rows, cells=runs.cells(), title=runs.title, publish=publish)
    return write_page(page, output, paper)
