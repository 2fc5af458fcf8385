"""A grid of runs, methods by scales by models by fusion by seeds, that can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from semid.data.source import EmbeddingSource
from semid.errors import UsageError, check_choice
from semid.options import Options, option
from semid.output import atomic_folder
from semid.progress import Progress, QuietProgress
from semid.recommenders.ranking.data import RankingData
from semid.recommenders.ranking.evaluation import reliance
from semid.recommenders.ranking.models import MODELS
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.ranker import Ranker
from semid.recommenders.ranking.training import (
    data_digest,
    rank_options,
    train_ranker,
    training_device,
)
from semid.reproduce.ranking_methods import METHODS, Coded, Tokenizers
from semid.tokenizers.context import MAX_LEVELS
from semid.tokenizers.encoding import RowsDigest
from semid.training.options import TrainOptions

__all__ = ["GRID_FILES", "RESULTS_FILE", "Grid", "Run", "read_results", "run_grid", "train_cell"]

RESULTS_FILE = "results.jsonl"
GRID_FILES = (RESULTS_FILE, "tables.md", "tokenizers/")


@dataclass(frozen=True, kw_only=True)
class Grid(Options):
    """What is compared.

    Attributes:
        methods: of `METHODS`.
        scales: M, codes (or embeddings of one code) an item.
        models: of `semid.recommenders.ranking.models.MODELS`.
        fusion: with, without, or both.
        seeds: seeds 0 to this number; all methods share the split.
        codebook_size: codewords a level.
        config: width, rank and options; its model and fusion are the grid's.
        training: how runs are conducted.
        tokenizer: further arguments of the tokenizers.
    """

    methods: tuple[str, ...] = ("none", "me", "rqvae", "moc")
    scales: tuple[int, ...] = option((1, 2, 3, 7), ge=1, le=MAX_LEVELS)
    models: tuple[str, ...] = tuple(sorted(MODELS))
    fusion: tuple[bool, ...] = (True, False)
    seeds: int = option(5, ge=1, le=10_000)
    codebook_size: int = option(256, ge=2, le=2**32)
    config: RankerConfig = field(default_factory=RankerConfig)
    training: TrainOptions = field(default_factory=lambda: rank_options(None))
    tokenizer: Mapping[str, Any] = field(default_factory=dict)

    def _problems(self) -> list[str]:
        for name in self.methods:
            check_choice("--methods", name, METHODS)
        for name in self.models:
            check_choice("--models", name, sorted(MODELS))
        if not (self.methods and self.scales and self.models and self.fusion):
            return ["every axis of a grid needs a value: methods, scales, models, fusion"]
        return []

    def runs(self) -> Iterator[Run]:
        """Yield every run, seed by seed, so that a stopped grid has whole comparisons."""
        for seed in range(self.seeds):
            for model in self.models:
                for method in self.methods:
                    for scale in (0,) if method == "none" else self.scales:
                        for fusion in self.fusion:
                            yield Run(model, method, scale, fusion, seed)


@dataclass(frozen=True)
class Run:
    """One cell of the grid.

    Attributes:
        model: ranking model.
        method: how items get codes.
        scale: M; 0 without codes.
        fusion: MoC fusion before the model.
        seed: of the run.
    """

    model: str
    method: str
    scale: int
    fusion: bool
    seed: int

    def __str__(self) -> str:
        """Name it for a progress bar."""
        scale = f" {self.scale}x" if self.scale else ""
        fusion = " + fusion" if self.fusion else ""
        return f"{self.model} {self.method}{scale}{fusion}, seed {self.seed}"


def read_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a results file; a last line that was cut short is left out."""
    file = Path(path)
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run_grid(
    grid: Grid,
    data: RankingData,
    folder: str | os.PathLike[str],
    *,
    embeddings: EmbeddingSource | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing and return all rows of this grid.

    Args:
        grid: what is compared.
        data: the split, one for all runs.
        folder: holds ``results.jsonl`` (a line a finished run) and ``tokenizers/``; the same call
            continues with the first run that has no line.
        embeddings: of the items, for methods that fit a tokenizer.
        device: as for `train_ranker`.
        progress: told about every run.

    Raises:
        UsageError: a method needs embeddings and there are none.
    """
    place = Path(folder)
    if not place.exists():
        with atomic_folder(place, grows=GRID_FILES):
            pass
    results = place / RESULTS_FILE
    settings = _settings(grid, data, embeddings)
    done = {row["run"]: row for row in read_results(results)}
    wanted = {_key(run, settings): run for run in grid.runs()}
    missing = [key for key in wanted if key not in done]
    maker = None
    if embeddings is not None:
        maker = Tokenizers(
            place / "tokenizers" / settings[:12],
            embeddings,
            data,
            codebook_size=grid.codebook_size,
            options=grid.tokenizer,
        )
        maker.folder.mkdir(parents=True, exist_ok=True)
    elif any(method != "none" for method in grid.methods):
        raise UsageError(
            f"methods {', '.join(m for m in grid.methods if m != 'none')} need --embeddings "
            "(embeddings=)"
        )
    steps = progress or QuietProgress()
    coded: dict[tuple[str, int], Coded] = {}
    for key in missing:  # tokenizers first: each reports a bar of its own
        run = wanted[key]
        if (run.method, run.scale) not in coded:
            coded[run.method, run.scale] = (
                Coded(None, None)
                if maker is None
                else maker.method(run.method, run.scale, progress=steps)
            )
    steps.start("rank", total=len(wanted))
    steps.step(len(wanted) - len(missing))
    for key in missing:
        row = _one(grid, data, wanted[key], coded, device)
        with results.open("a", encoding="utf8") as file:
            file.write(json.dumps({"run": key, **row}) + "\n")
        done[key] = row
        steps.step(1, run=str(wanted[key]), auc=row["auc"])
    return [done[key] for key in wanted]


def _one(
    grid: Grid,
    data: RankingData,
    run: Run,
    coded: Mapping[tuple[str, int], Coded],
    device: str,
) -> dict[str, Any]:
    _, figures = train_cell(
        data,
        coded[run.method, run.scale],
        config=replace(grid.config, model=run.model, fusion=run.fusion),
        training=grid.training,
        seed=run.seed,
        device=device,
    )
    return {**asdict(run), **figures}


def _settings(grid: Grid, data: RankingData, embeddings: EmbeddingSource | None) -> str:
    """Hash everything that all runs share: options, every row of the data, every embedding."""
    document = {
        "protocol": data.protocol,
        "data": data_digest(data),
        "embeddings": None
        if embeddings is None
        else RowsDigest.of((block for _, block in embeddings.blocks(copy=False)), embeddings.ids),
        "architecture": {
            k: v for k, v in grid.config.to_dict().items() if k not in ("model", "fusion")
        },
        "training": vars(grid.training),
        "codebook_size": grid.codebook_size,
        "tokenizer": dict(grid.tokenizer),
    }
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _key(run: Run, settings: str) -> str:
    text = json.dumps([settings, asdict(run)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train_cell(
    data: RankingData,
    coded: Coded,
    *,
    config: RankerConfig,
    training: TrainOptions,
    seed: int,
    device: str = "auto",
) -> tuple[Ranker, dict[str, Any]]:
    """Train one model and gather the figures that tables show.

    Args:
        data: the split.
        coded: codes of the items and how they are used, or none.
        config: model, width, fusion.
        training: how the run is conducted.
        seed: start of the weights, order of the rows, dropout.
        device: as for `semid.train_ranker`.

    Returns:
        The model, and a JSON-able dictionary of its figures on the test part.
    """
    began, cpu = time.perf_counter(), time.process_time()
    ranker = train_ranker(
        data,
        ids=coded.ids,
        features=coded.features,
        config=config,
        training=training,
        seed=seed,
        device=device,
    )
    report = ranker.report
    test = report["test"]
    ranker.network.to(training_device(device))
    relied = reliance(ranker.network, data, seed=seed)
    ranker.network.to("cpu")
    return ranker, {
        "auc": test["auc"],
        "auc_error": test["auc_error"],
        "log_loss": test["log_loss"],
        "user_auc": test["user_auc"],
        "calibration_error": test["calibration_error"],
        "popularity_auc": test["popularity_auc"],
        "validation_auc": report["validation"]["auc"],
        "cold_auc": report.get("cold", {}).get("auc"),
        "slices": {name: s["auc"] for name, s in report["slices"].items()},
        "reliance": relied,
        "best_epoch": report["training"]["best_epoch"],
        "epochs": report["training"]["epochs"],
        "stopped_early": report["training"]["stopped_early"],
        "precision": report["training"]["precision"],
        "parameters": report["parameters"],
        "protocol": data.protocol,
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }
