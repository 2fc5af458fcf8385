"""Several next-item models by several seeds on one log: a resumable comparison."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semid.codes import SemanticIds
from semid.diagnostics.pairs import Estimate
from semid.output import atomic_file, atomic_folder
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.recommenders.retrieval import MODELS
from semid.recommenders.retrieval.data import RetrievalData
from semid.recommenders.retrieval.metrics import RetrievalResults, estimates
from semid.recommenders.retrieval.retriever import Retriever
from semid.recommenders.retrieval.training import TRAINING, train_retriever
from semid.report.pages import table
from semid.report.retrieval import RetrievalEntry
from semid.reproduce.ranking_grid import read_results
from semid.runs import remove_state_folder
from semid.training.options import TrainOptions

RESULTS_FILE = "results.jsonl"
COMPARISON_FILES = (RESULTS_FILE, "tables.md", "report.html", "users/", "models/", "states/")
BASELINE = "sasrec"
"""Model that the others are compared with, if it is among them."""

TABLE = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr")


@dataclass(frozen=True)
class RetrievalRun:
    """One trained and tested model.

    Attributes:
        model: its name.
        seed: its seed.
        results: on the test items; ``per_user`` holds the values of each user.
        seconds: wall time of training and evaluation.
        cpu_seconds: CPU time of this process.
        epochs: epochs trained; 0 for models without training.
    """

    model: str
    seed: int
    results: RetrievalResults
    seconds: float
    cpu_seconds: float
    epochs: int

    @classmethod
    def of(cls, retriever: Retriever) -> RetrievalRun:
        """Return a retriever that was just trained as the only run."""
        report = retriever.report
        return cls(
            model=retriever.model,
            seed=report["seed"],
            results=retriever.results["test"],
            seconds=report["seconds"],
            cpu_seconds=report["cpu_seconds"],
            epochs=report.get("training", {}).get("epochs", 0),
        )


@with_progress
def compare_retrievers(
    data: RetrievalData,
    folder: str | os.PathLike[str],
    *,
    models: Sequence[str],
    seeds: int = 1,
    ids: SemanticIds | None = None,
    options: Mapping[str, Any] | None = None,
    training: TrainOptions | Mapping[str, Any] | None = None,
    device: str = "auto",
    progress: ProgressArgument = None,
) -> list[RetrievalRun]:
    """Train the missing models, and return the runs of all of them.

    Args:
        data: the split log; its items have what the models need.
        folder: where results are appended and models saved; it may hold those of a run before.
        models: names of models; those without training run once.
        seeds: number of seeds, from 0.
        ids: the Semantic IDs that ``data`` was made with.
        options: options by name; each model takes those that it has.
        training: training options, the same for all.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: callback that receives progress events.
    """
    folder = Path(folder)
    if not folder.exists():
        with atomic_folder(folder, grows=COMPARISON_FILES):
            pass
    for name in ("users", "models", "states"):
        (folder / name).mkdir(exist_ok=True)
    # Results are appended as they come, so a stopped comparison goes on behind the last one.
    conduct = TrainOptions.of(training, defaults=TRAINING)
    done = {row["run"]: row for row in read_results(folder / RESULTS_FILE)}
    # Seed by seed, so that what is stopped holds complete comparisons.
    runs = []
    for seed in range(seeds):
        for model in models:
            kind = MODELS.load(model)
            if seed and not kind.trains:
                continue
            # Options are for whoever has them: --width for transformers, --decay for text-knn.
            fields = kind.options.of(None).to_dict()
            model_options = {k: value for k, value in (options or {}).items() if k in fields}
            # A run is named by a hash of all that it depends on.
            document = [model, seed, model_options, conduct.to_dict(), data.protocol, data.digest]
            key = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
            if key not in done:
                retriever = train_retriever(
                    data,
                    ids=ids if "codes" in kind.needs else None,
                    model=model,
                    options=model_options,
                    training=conduct,
                    seed=seed,
                    device=device,
                    checkpoint=folder / "states" / key,
                    resume=True,
                    progress=progress or QuietProgress(),
                )
                remove_state_folder(folder / "states" / key)
                retriever.save(folder / "models" / f"{model}-{seed}", overwrite=True)
                results = retriever.results["test"]
                # Each user's values stand beside the means, for differences over the same users.
                np.savez(folder / "users" / f"{key}.npz", **results.per_user)
                trained = retriever.report.get("training", {})
                done[key] = {
                    "run": key,
                    "model": model,
                    "seed": seed,
                    "options": model_options,
                    "results": results.to_dict(),
                    "validation": retriever.report["validation"]["metrics"]["ndcg@10"]["value"],
                    "epochs": trained.get("epochs", 0),
                    "best_epoch": trained.get("best_epoch", 0),
                    "seconds": retriever.report["seconds"],
                    "cpu_seconds": retriever.report["cpu_seconds"],
                }
                with (folder / RESULTS_FILE).open("a", encoding="utf8") as file:
                    file.write(json.dumps(done[key]) + "\n")
            runs.append(_read_run(folder, done[key]))
    return runs


def _read_run(folder: Path, row: Mapping[str, Any]) -> RetrievalRun:
    """Return a run of the results file with the values of its users."""
    with np.load(folder / "users" / f"{row['run']}.npz") as arrays:
        per_user = {name: arrays[name] for name in arrays}
    results = RetrievalResults.from_dict(row["results"])
    results = RetrievalResults(**{**vars(results), "per_user": per_user})
    names = ("model", "seed", "seconds", "cpu_seconds", "epochs")
    return RetrievalRun(results=results, **{name: row[name] for name in names})


def load_models(folder: str | os.PathLike[str], runs: Sequence[RetrievalRun]) -> list[Retriever]:
    """Return the saved model of the first seed of each model."""
    first = {run.model: run.seed for run in reversed(runs)}
    place = Path(folder) / "models"
    names = dict.fromkeys(run.model for run in runs)
    return [Retriever.load(place / f"{name}-{first[name]}") for name in names]


def by_model(runs: Sequence[RetrievalRun]) -> dict[str, list[RetrievalRun]]:
    """Return the runs of each model, in the order of the models."""
    grouped: dict[str, list[RetrievalRun]] = {}
    for run in runs:
        grouped.setdefault(run.model, []).append(run)
    return grouped


def mean_by_user(runs: Sequence[RetrievalRun], metric: str) -> Any:
    """Return each user's mean of a metric ``(users,)`` over the seeds of a model."""
    return np.mean([run.results.per_user[metric] for run in runs], axis=0)


def differences(runs: Sequence[RetrievalRun], metric: str) -> dict[str, Estimate]:
    """Return each model's difference to the baseline, over the same users.

    The interval is a bootstrap over users of the difference of the means over seeds; without
    `BASELINE` among the models the first one is the baseline.
    """
    # Seeds are averaged first: the interval is over users, of the mean model.
    grouped = by_model(runs)
    baseline = BASELINE if BASELINE in grouped else next(iter(grouped))
    base = mean_by_user(grouped[baseline], metric)
    return {
        model: estimates({metric: mean_by_user(seeds, metric) - base}, replicates=1000, seed=0)[
            metric
        ]
        for model, seeds in grouped.items()
        if model != baseline
    }


def page_entries(
    runs: Sequence[RetrievalRun], retrievers: Sequence[Retriever]
) -> dict[str, RetrievalEntry]:
    """Return what the page shows of each model."""
    shown = differences(runs, "recall@10")
    return {
        model: RetrievalEntry([run.results for run in seeds], shown.get(model), retriever)
        for (model, seeds), retriever in zip(by_model(runs).items(), retrievers, strict=True)
    }


def comparison_tables(runs: Sequence[RetrievalRun]) -> str:
    """Return the comparison in Markdown: metrics, differences and slices."""
    grouped = by_model(runs)
    protocol = runs[0].results.protocol
    lines = [f"Protocol: {protocol}.", ""]
    rows = []
    for model, seeds in grouped.items():
        cells = []
        for metric in TABLE:
            values = [run.results.metrics[metric].value for run in seeds]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        minutes = np.mean([run.cpu_seconds for run in seeds]) / 60
        epochs = np.mean([run.epochs for run in seeds])
        rows.append([model, str(len(seeds)), *cells, f"{epochs:.0f}", f"{minutes:.1f}"])
    columns = ["model", "seeds", *TABLE, "epochs", "CPU min"]
    lines += [table(columns, rows), ""]
    lines += ["Mean over seeds ± standard deviation.", ""]
    if len(grouped) > 1:
        baseline = BASELINE if BASELINE in grouped else next(iter(grouped))
        columns = ["model", "recall@10", "ndcg@10"]
        shown = [differences(runs, metric) for metric in columns[1:]]
        rows = [
            [model, *(_interval(metric[model]) for metric in shown)]
            for model in grouped
            if model != baseline
        ]
        lines += [f"Difference to {baseline} over the same users, 95 % interval:", ""]
        lines += [table(columns, rows), ""]
    names = list(runs[0].results.slices)
    rows = [
        [
            name,
            f"{runs[0].results.slices[name].users:,}",
            *(
                f"{np.mean([r.results.slices[name].metrics['recall@10'].value for r in seeds]):.4f}"
                for seeds in grouped.values()
            ),
        ]
        for name in names
    ]
    lines += ["Recall@10 by slice:", "", table(["slice", "users", *grouped], rows)]
    return "\n".join(lines)


def write_tables(folder: Path, runs: Sequence[RetrievalRun]) -> str:
    """Write ``tables.md`` and return its text."""
    text = comparison_tables(runs)
    with atomic_file(folder / "tables.md", mark=False) as work:
        work.write_text(text + "\n", encoding="utf8")
    return text


def _interval(estimate: Estimate) -> str:
    low, high = estimate.low, estimate.high
    if low is None or high is None:
        return f"{estimate.value:+.4f}"
    note = "" if low > 0 or high < 0 else " (no difference seen)"
    return f"{estimate.value:+.4f} ({low:+.4f} to {high:+.4f}){note}"
