"""A resumable grid of ranking runs: methods by scales by models by fusion by seeds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from semid.codes import MAX_LEVELS, CodesInfo, SemanticIds, code_dtype
from semid.data.source import EmbeddingSource
from semid.documents import code_span
from semid.errors import IdsError, UsageError, check_choice
from semid.options import Options, option
from semid.output import atomic_folder
from semid.progress import Progress, ProgressArgument, QuietProgress, with_progress
from semid.recommenders.ranking import MODELS
from semid.recommenders.ranking.builder import RankingData
from semid.recommenders.ranking.features import CodeFeatures
from semid.recommenders.ranking.metrics import reliance
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.ranker import Ranker
from semid.recommenders.ranking.training import (
    data_digest,
    rank_options,
    train_ranker,
    training_device,
)
from semid.reproduce import GRID_METHODS, METHODS, check_grid_inputs
from semid.reproduce.claims import Row, Rows
from semid.reproduce.ledger import digest, origin
from semid.reproduce.papers import average, spread
from semid.tokenizers.encoding import rows_digest
from semid.tokenizers.factory import make_tokenizer
from semid.training.options import TrainOptions

RESULTS_FILE = "results.jsonl"
GRID_FILES = (RESULTS_FILE, "tables.md", "tokenizers/")

# The tokenizer behind a method that is not called like one.
_FITTED = {"me": "vqvae", "moc": "mocvae", "shuffled": "mocvae"}


@dataclass(frozen=True)
class MethodCodes:
    """Codes of one method and how they are used; None without codes."""

    ids: SemanticIds | None
    features: CodeFeatures | None


@dataclass
class TokenizerCache:
    """Fits each tokenizer once, on training items alone, and stores it on disk."""

    folder: Path
    source: EmbeddingSource
    data: RankingData
    codebook_size: int = 256
    seed: int = 0  # also that of random codes
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of the tokenizers

    def method(self, name: str, scale: int, *, progress: Progress) -> MethodCodes:
        """Return the codes of a method of `METHODS`, M codes per item, and their features."""
        check_choice("--methods", name, METHODS)
        if name == "none":
            return MethodCodes(None, None)
        if name in ("random", "widened"):
            ids = self._placeholder(scale)
            return MethodCodes(ids, CodeFeatures(mode="parallel", control=name, seed=self.seed))
        # MoC codes are parallel codebooks; RQ-VAE and the like have a table per level.
        kind = _FITTED.get(name, name)
        if name == "me":
            ids = self._fitted(kind, 1, progress)
            return MethodCodes(ids, CodeFeatures(mode="multi", scale=scale))
        ids = self._fitted(kind, scale, progress)
        mode = "parallel" if kind in ("mocvae", "vqvae") else "levels"
        control = "shuffled" if name == "shuffled" else "none"
        return MethodCodes(ids, CodeFeatures(mode=mode, control=control, seed=self.seed))

    def _placeholder(self, scale: int) -> SemanticIds:
        """Return codes of which only the shape is used."""
        items = self.data.schema.items.ids
        sizes = (self.codebook_size,) * scale
        info = CodesInfo(
            tokenizer="none",
            codebook_sizes=sizes,
            hierarchical=False,
            codebook_fingerprint="0" * 64,
            weights_fingerprint="0" * 64,
        )
        codes = np.zeros((len(items), scale), dtype=code_dtype(sizes))
        return SemanticIds(items, codes, np.zeros(len(items), np.float32), info)

    def _fitted(self, kind: str, scale: int, progress: Progress) -> SemanticIds:
        # The ids are written last: a fit that was stopped has none and is repeated.
        folder = self.folder / f"{kind}-{scale}x"
        file = self.folder / f"{kind}-{scale}x.parquet"
        if file.exists():
            return SemanticIds.read(file)
        values: dict[str, Any] = {"codebook_size": self.codebook_size, "seed": self.seed}
        if kind != "vqvae":
            values["levels"] = scale
        elif scale != 1:
            raise UsageError("vqvae has one code per item: take it at --scales 1, or me or moc")
        tokenizer = make_tokenizer(kind, {**values, **self.options})
        tokenizer.fit(
            self.source.subset(self._train_rows()),
            interactions=self.data.training_log if tokenizer.needs_behavior else None,
            progress=progress,
        )
        tokenizer.save(folder, overwrite=True)
        ids = tokenizer.encode(self.source, progress=progress)
        ids.write(file)
        return ids

    def _train_rows(self) -> np.ndarray:
        trained = self.data.schema.items.ids.take(np.flatnonzero(self.data.interactions[1:]))
        # Items that training never sees must not shape the codebooks either.
        rows = self.source.ids.index_of(trained.strings())
        known = np.sort(rows[rows >= 0])
        if not len(known):
            raise IdsError(
                f"none of the {len(trained)} training items has an embedding: they are called like "
                f"{trained.example}, the embeddings' like {self.source.ids.example}; check --items"
            )
        return known


@dataclass(frozen=True, kw_only=True)
class Grid(Options):
    """Options of a grid; all methods share the split, and all runs the seeds from 0."""

    methods: tuple[str, ...] = option(
        ("none", "me", "rqvae", "moc"),
        choices=GRID_METHODS,
        name="--methods",
        help="Methods: none, ids, random, shuffled, widened, me, moc, or tokenizers.",
    )
    scales: tuple[int, ...] = option(
        (1, 2, 3, 7), ge=1, le=MAX_LEVELS, help="Numbers of codes per item."
    )
    models: tuple[str, ...] = option(
        tuple(sorted(MODELS)), choices=sorted(MODELS), name="--models", help="Ranking models."
    )
    fusion: tuple[bool, ...] = option(
        (True, False), help="Mixture-of-Codes fusion: on, off or both."
    )
    seeds: int = option(5, ge=1, le=10_000, help="Number of seeds.")
    codebook_size: int = option(256, ge=2, le=2**32, help="Codewords per level.")
    config: RankerConfig = option(default_factory=RankerConfig, help="Architecture.")
    training: TrainOptions = option(
        default_factory=lambda: rank_options(None), help="Training options."
    )
    tokenizer: Mapping[str, Any] = option(
        default_factory=dict, help="Further arguments of the tokenizers."
    )

    def _problems(self) -> list[str]:
        if not (self.methods and self.scales and self.models and self.fusion):
            return ["every axis of a grid needs a value: methods, scales, models, fusion"]
        return []

    def runs(self, levels: int = 0) -> Iterator[Run]:
        """Yield every run, seed by seed, so that a stopped grid has complete comparisons."""
        scales = {"none": (0,), "ids": (levels,)}  # the ids that are given have so many codes
        for seed in range(self.seeds):
            for model in self.models:
                for method in self.methods:
                    for scale in scales.get(method, self.scales):
                        for fusion in self.fusion:
                            yield Run(model, method, scale, fusion, seed)


@dataclass(frozen=True)
class Run:
    """One run of the grid; ``scale`` is M, 0 without codes."""

    model: str
    method: str
    scale: int
    fusion: bool
    seed: int

    def __str__(self) -> str:
        """Return the run's name for a progress bar."""
        scale = f" {self.scale}x" if self.scale else ""
        fusion = " + fusion" if self.fusion else ""
        return f"{self.model} {self.method}{scale}{fusion}, seed {self.seed}"


def read_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a results file, except a last line that was cut short."""
    file, rows = Path(path), []
    for line in file.read_text(encoding="utf8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


@with_progress
def run_grid(
    grid: Grid,
    data: RankingData,
    folder: str | os.PathLike[str],
    *,
    embeddings: EmbeddingSource | None = None,
    ids: SemanticIds | None = None,
    device: str = "auto",
    progress: ProgressArgument = None,
) -> list[dict[str, Any]]:
    """Run the missing runs and return the results of all runs of this grid.

    Tokenizers are fitted on ``embeddings``; ``ids`` are those of the method ``ids``.
    """
    check_grid_inputs(grid.methods, ids=ids is not None, embeddings=embeddings is not None)
    folder = Path(folder)
    if not folder.exists():
        with atomic_folder(folder, grows=GRID_FILES):
            pass
    results = folder / RESULTS_FILE
    # A run is named by a hash of its settings, its data and its place in the grid, so that a
    # results file can hold several grids and a changed grid reuses what is equal.
    settings = _settings(grid, data, embeddings)
    done = {row["run"]: row for row in read_results(results)}
    ids_digest = "" if ids is None else rows_digest([ids.codes], ids.items)
    runs = {
        digest([settings, asdict(run), *([ids_digest] if run.method == "ids" else [])]): run
        for run in grid.runs(0 if ids is None else ids.levels)
    }
    missing = [key for key in runs if key not in done]
    tokenizers = None
    if embeddings is not None:
        place = folder / "tokenizers" / settings[:12]
        place.mkdir(parents=True, exist_ok=True)
        tokenizers = TokenizerCache(
            place, embeddings, data, codebook_size=grid.codebook_size, options=grid.tokenizer
        )
    steps = progress or QuietProgress()
    codes = {("none", 0): MethodCodes(None, None)}
    if ids is not None:
        mode = "levels" if ids.info.hierarchical else "parallel"
        codes["ids", ids.levels] = MethodCodes(ids, CodeFeatures(mode=mode))
    for key in missing:  # tokenizers first: each has a progress bar
        cell = runs[key].method, runs[key].scale
        if cell not in codes and tokenizers is not None:
            codes[cell] = tokenizers.method(*cell, progress=steps)
    steps.start("rank", total=len(runs))
    steps.step(len(runs) - len(missing))
    for key in missing:
        run = runs[key]
        _, figures = train_cell(
            data,
            codes[run.method, run.scale],
            config=replace(grid.config, model=run.model, fusion=run.fusion),
            training=grid.training,
            seed=run.seed,
            device=device,
        )
        named = {"codes": ids.info.label} if run.method == "ids" and ids is not None else {}
        done[key] = {"run": key, **asdict(run), **figures, **named, **origin()}
        with results.open("a", encoding="utf8") as file:
            file.write(json.dumps(done[key]) + "\n")
        steps.step(1, run=str(run), auc=figures["auc"])
    return [done[key] for key in runs]


def _settings(grid: Grid, data: RankingData, embeddings: EmbeddingSource | None) -> str:
    """Hash what all runs share: options, all rows of the data, all embeddings."""
    rows = None
    if embeddings is not None:
        blocks = (block for _, block in embeddings.blocks(copy=False))
        rows = rows_digest(blocks, embeddings.ids)
    # Model and fusion differ between the runs of a grid and are part of each run's own name.
    shared = {k: v for k, v in grid.config.to_dict().items() if k not in ("model", "fusion")}
    document = {
        "protocol": data.protocol,
        "data": data_digest(data),
        "embeddings": rows,
        "architecture": shared,
        "training": vars(grid.training),
        "codebook_size": grid.codebook_size,
        "tokenizer": dict(grid.tokenizer),
    }
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def train_cell(
    data: RankingData,
    codes: MethodCodes,
    *,
    config: RankerConfig,
    training: TrainOptions,
    seed: int,
    device: str = "auto",
) -> tuple[Ranker, dict[str, Any]]:
    """Train one model; return it and JSON-able figures on the test part."""
    # Wall time and CPU time of training and measuring.
    began, cpu = time.perf_counter(), time.process_time()
    ranker = train_ranker(
        data,
        ids=codes.ids,
        features=codes.features,
        config=config,
        training=training,
        seed=seed,
        device=device,
    )
    report = ranker.report
    test = report["test"]
    # Training leaves the network on the CPU; the test part is scored again where it trained.
    ranker.network.to(training_device(device))
    reliances = reliance(ranker.network, data, seed=seed)
    ranker.network.to("cpu")
    names = ("auc", "auc_error", "log_loss", "user_auc", "calibration_error", "popularity_auc")
    training_names = ("best_epoch", "epochs", "stopped_early", "precision")
    return ranker, {
        **{name: test[name] for name in names},
        "validation_auc": report["validation"]["auc"],
        "cold_auc": report.get("cold", {}).get("auc"),
        "slices": {name: s["auc"] for name, s in report["slices"].items()},
        "reliance": reliances,
        **{name: report["training"][name] for name in training_names},
        "parameters": report["parameters"],
        "protocol": data.protocol,
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }


# Tables at the end of a grid ---------------------------------------------------------------------

Pair = tuple[str, Row, Row]


def grid_tables(rows: Sequence[Row]) -> str:
    """Return Markdown: every cell, codes against none and each other, fusion on and off."""
    if not rows:
        return "no runs"
    # A cell is a run without its seed.
    axes = ("model", "method", "scale", "fusion")
    cells = [
        dict(zip(axes, values, strict=True))
        for values in dict.fromkeys(tuple(row[axis] for axis in axes) for row in rows)
    ]
    runs = Rows([dict(row) for row in rows])
    out = [f"Protocol: {code_span(rows[0]['protocol'])}", ""]
    if own := sorted({row["codes"] for row in rows if "codes" in row}):
        out += [f"ids: {', '.join(map(code_span, own))}", ""]
    out += [f"Popularity alone: {rows[0]['popularity_auc']:.4f}", ""]
    out += [
        "| model | method | scale | fusion | seeds | AUC | log loss | unseen items AUC "
        "| codes shuffled at test | fusion taken out at test | norm of W_down W_up |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(cell, runs.where(**cell)) for cell in cells),
    ]
    for title, head, pairs in _comparisons(cells):
        results = [(name, runs.difference(lambda row: row["auc"], a, b)) for name, a, b in pairs]
        lines = [f"| {name} | {result} |" for name, result in results if result is not None]
        if lines:
            out += ["", title, "", f"| {head} | AUC difference |", "|---|---|", *lines]
    out += ["", "Intervals are 95 % of Student's t over seeds, on one split."]
    return "\n".join(out)


def _line(cell: Row, runs: list[Any]) -> str:
    reliances = [(run["reliance"], run["auc"]) for run in runs]
    # Differences to the same weights without codes or without fusion.
    shuffled, without = (
        [figures[name] - auc for figures, auc in reliances if name in figures]
        for name in ("auc_codes_shuffled", "auc_without_fusion")
    )
    norms = [figures["fusion_norm"] for figures, _ in reliances if "fusion_norm" in figures]
    cold = [run["cold_auc"] for run in runs if run["cold_auc"] is not None]
    aucs, losses = ([run[name] for run in runs] for name in ("auc", "log_loss"))
    return (
        f"| {cell['model']} | {cell['method']} | {cell['scale'] or '-'} | {_switch(cell)} "
        f"| {len(runs)} | {spread(aucs)} | {spread(losses)} | {spread(cold)} "
        f"| {_signed(shuffled)} | {_signed(without)} | {spread(norms)} |"
    )


def _comparisons(cells: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[Pair]]]:
    """Yield title, head and the pairs of cells (name, a, b) of each table of differences."""
    coded = [cell for cell in cells if cell["method"] != "none"]
    pairs: list[Pair] = [
        (
            f"{cell['model']}, {cell['method']} {cell['scale']}x, fusion {_switch(cell)}",
            cell,
            {"model": cell["model"], "fusion": cell["fusion"], "method": "none"},
        )
        for cell in coded
    ]
    yield "Codes against none, the same model, fusion and seeds:", "codes - none", pairs
    for first, title in (("moc", "MoC"), ("barq", "BARQ")):
        pairs = [
            (
                f"{cell['model']}, {first} - {cell['method']}, {cell['scale']}x, "
                f"fusion {_switch(cell)}",
                {**cell, "method": first},
                cell,
            )
            for cell in coded
            if cell["method"] != first
        ]
        title = f"{title} against the others, the same model, scale, fusion and seeds:"
        yield title, f"{first} - other", pairs
    pairs = [
        (
            f"{cell['model']}, {cell['method']}" + (f" {cell['scale']}x" if cell["scale"] else ""),
            cell,
            {**cell, "fusion": False},
        )
        for cell in cells
        if cell["fusion"]
    ]
    yield "Fusion on against off:", "fusion on - off", pairs


def _switch(cell: Row) -> str:
    return "on" if cell["fusion"] else "off"


def _signed(values: Sequence[float]) -> str:
    return f"{average(values):+.4f}" if values else "-"
