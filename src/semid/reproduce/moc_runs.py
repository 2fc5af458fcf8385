"""The runs behind the MoC paper's tables and figures: codes, ranking models, their embeddings."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from semid.data.tables import open_table
from semid.errors import InteractionsError
from semid.progress import QuietProgress
from semid.recommenders.ranking.analysis import CodeAnalysis, analyze_codes
from semid.recommenders.ranking.builder import RankingData, RankingDataConfig
from semid.recommenders.ranking.data import prepare_ranking_data
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.splits import Label
from semid.recommenders.ranking.training import rank_options
from semid.reproduce.datasets import Opened, open_all, open_data
from semid.reproduce.ledger import Ledger, digest
from semid.reproduce.pool import Job
from semid.reproduce.ranking_grid import MethodCodes, TokenizerCache, train_cell
from semid.reproduce.recipe import DataSet, MocRecipe, Stage, Variant
from semid.reproduce.reconstruction_probe import probe_reconstruction

MOST_SINGULAR_VALUES = 96
PREPARED = 4
"""Data sets that a process keeps: with several processes each meets all of them in turn."""
ONCE = {"none": 0, "vqvae": 1}
"""Methods without a scale of their own, and the M that their rows say."""


def moc_jobs(
    recipe: MocRecipe, data: Path | None, folder: Path
) -> tuple[list[Job], dict[str, str]]:
    """List the runs in the order of the recipe's stages, each seed by seed, every run once.

    Returns the jobs, and what cannot be run -> why.
    """
    opened, absent = open_all(recipe.data, data, Ledger(folder))
    variants = {v.name: v for v in recipe.variants}
    jobs = []
    for cell in moc_cells(recipe):
        name = cell["data"]
        if name not in opened:
            continue
        why = _unfit(opened[name], variants.get(cell["variant"]))
        if why is not None:
            absent[f"{name}, {cell['variant'] or 'main protocol'}"] = why
            continue
        jobs.append(_job(recipe, cell, opened[name].digest))
    return jobs, absent


def moc_cells(recipe: MocRecipe) -> list[dict[str, Any]]:
    """List every run of a recipe once, in the order of its stages, without opening any data."""
    specs: dict[str, dict[str, Any]] = {}
    for stage in recipe.stages:
        for seed in range(stage.seeds or recipe.seeds):
            for d in recipe.data:
                if stage.data and d.name not in stage.data:
                    continue
                for spec in _cells(recipe, stage, d, seed):
                    cell = specs.setdefault(digest(spec), {**spec, "analyze": False})
                    cell["analyze"] |= seed < stage.analyze and spec["method"] not in _BLANK
    return list(specs.values())


_BLANK = ("none", "random", "widened")


def _cells(recipe: MocRecipe, stage: Stage, data: DataSet, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what a stage runs of one data set and seed."""
    shared = {
        "paper": recipe.paper,
        "quick": recipe.quick,
        "data": data.name,
        "variant": stage.variant,
        "run": stage.kind,
        "seed": seed,
    }
    for method in stage.methods:
        scales = (ONCE[method],) if method in ONCE else stage.scales
        if stage.kind == "kept":
            for scale in scales:
                yield {**shared, "model": "", "method": method, "scale": scale, "fusion": False}
            continue
        for model in stage.models:
            for scale in scales:
                for fusion in stage.fusion:
                    cell = {
                        **shared,
                        "model": model,
                        "method": method,
                        "scale": scale,
                        "fusion": fusion,
                    }
                    if not stage.parts:
                        yield cell
                    if "alone" in stage.parts:
                        yield from ({**cell, "part": f"alone {n + 1}"} for n in range(scale))
                    if "first" in stage.parts:
                        yield from ({**cell, "part": f"first {n}"} for n in range(1, scale))


def _job(recipe: MocRecipe, spec: Mapping[str, Any], files: str) -> Job:
    data = next(d for d in recipe.data if d.name == spec["data"])
    variant = next((v for v in recipe.variants if v.name == spec["variant"]), None)
    shared = {
        "paper": recipe.paper,
        "revision": recipe.revision,
        "quick": recipe.quick,
        "files": files,
        "data": asdict(data),
        "variant": None if variant is None else asdict(variant),
        "width": recipe.width,
        "fusion_rank": recipe.fusion_rank,
        "model": recipe.model,
        "training": recipe.training,
        "tokenizer": recipe.tokenizer,
    }
    probe = {"kept": recipe.kept} if spec["run"] == "kept" else {}
    return Job(digest([shared, probe, spec]), moc_title(spec), dict(spec), settings=digest(shared))


def moc_title(spec: Mapping[str, Any]) -> str:
    """Name a run for people."""
    protocol = f"{spec['variant']}, " if spec["variant"] else ""
    part = f" {spec['part']}" if "part" in spec else ""
    fusion = " + fusion" if spec["fusion"] else ""
    what = spec["model"] or "information kept"
    return (
        f"{spec['data']}, {protocol}{what} {spec['method']} {spec['scale']}x{part}{fusion}, "
        f"seed {spec['seed']}"
    )


@cache
def _columns(path: Path) -> tuple[str, ...]:
    """Return the columns of a log."""
    return tuple(open_table(path, error=InteractionsError).names)


def _unfit(opened: Opened, variant: Variant | None) -> str | None:
    """Say why a protocol cannot be had of a log: it lacks ratings, or an order."""
    data, path = opened.spec, opened.interactions
    label = Label.parse((variant.label if variant else "") or data.label)
    columns = _columns(path)
    if label.column and label.column not in columns:
        return f"'{path.name}' of {data.name} has no column '{label.column}' for '{label}'"
    ordered = {"position", "timestamp"} & set(columns)
    if variant is not None and variant.split != "random" and not ordered:
        return f"'{path.name}' of {data.name} has no order for split={variant.split}"
    return None


@dataclass
class MocRunner:
    """Runs jobs of `moc_jobs`.

    Args:
        recipe: what to run.
        data: folder of data sets.
        folder: of the ledger; tokenizers are kept below it.
    """

    recipe: MocRecipe
    data: Path | None
    folder: Path
    _prepared: dict[tuple[str, str], tuple[Opened, RankingData]] = field(default_factory=dict)

    def __call__(self, job: Job) -> dict[str, Any]:
        """Fit the codes unless they are there, train, measure."""
        spec = job.spec
        opened, rows = self._rows(str(spec["data"]), str(spec["variant"]))
        coded = self._coded(job, opened, rows)
        if spec["run"] == "kept":
            return self._kept(job, opened, rows, coded)
        ranker, figures = train_cell(
            rows,
            coded,
            config=RankerConfig(
                model=str(spec["model"]),
                width=self.recipe.width,
                fusion=bool(spec["fusion"]),
                fusion_rank=self.recipe.fusion_rank,
                options=_tuples(self.recipe.model),
            ),
            training=rank_options(self.recipe.training),
            seed=int(spec["seed"]),
        )
        figures["protocol"] += f" width={self.recipe.width} tokenizer_seed=seed"
        figures["rows"] = {name: len(part) for name, part in rows.parts.items()}
        if spec["analyze"]:
            test = rows.parts["test"]
            figures["analysis"] = _thinned(analyze_codes(ranker.network, test))
            if spec["fusion"]:
                fused = analyze_codes(ranker.network, test, fused=True)
                figures["analysis_fused"] = _thinned(fused)
        return figures

    def _rows(self, name: str, variant: str) -> tuple[Opened, RankingData]:
        """Prepare a data set under a protocol; the last `PREPARED` are kept."""
        if (name, variant) not in self._prepared:
            data = next(d for d in self.recipe.data if d.name == name)
            other = next((v for v in self.recipe.variants if v.name == variant), None)
            opened = open_data(data, self.data, Ledger(self.folder))
            rows = prepare_ranking_data(
                opened.interactions,
                items=opened.items,
                config=RankingDataConfig(
                    label=(other.label if other else "") or data.label,
                    split=other.split if other else "random",
                    item_columns=data.item_columns,
                ),
            )
            while len(self._prepared) >= PREPARED:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[name, variant] = (opened, rows)
        return self._prepared[name, variant]

    def _coded(self, job: Job, opened: Opened, rows: RankingData) -> MethodCodes:
        """Return codes and how they are used, with a tokenizer of this seed."""
        spec = job.spec
        seed, method, scale = int(spec["seed"]), str(spec["method"]), int(spec["scale"])
        place = self.folder / "tokenizers" / job.settings / f"seed-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        maker = TokenizerCache(
            place,
            opened.embeddings,
            rows,
            codebook_size=opened.spec.codebook_size,
            seed=seed,
            options=self.recipe.tokenizer,
        )
        # Whoever comes first fits it; the others wait and read.
        fitted = {"me": "vqvae", "shuffled": "moc"}.get(method, method)
        width = 1 if fitted == "vqvae" else scale
        with Ledger(self.folder).lock(f"tokenizer-{job.settings}-{seed}-{fitted}-{width}"):
            coded = maker.method(method, scale, progress=QuietProgress())
        part = re.fullmatch(r"(alone|first) (\d+)", str(spec.get("part", "")))
        if part and coded.features is not None:
            number = int(part[2])
            chosen = {"levels": (number - 1,)} if part[1] == "alone" else {"scale": number}
            coded = MethodCodes(coded.ids, replace(coded.features, **chosen))
        return coded

    def _kept(
        self, job: Job, opened: Opened, rows: RankingData, coded: MethodCodes
    ) -> dict[str, Any]:
        """Rebuild item embeddings from embeddings of their codes."""
        began, cpu = time.perf_counter(), time.process_time()
        ids = coded.ids
        if ids is None:
            raise InteractionsError("method 'none' has no codes to rebuild embeddings from")
        at = opened.embeddings.ids.index_of(ids.items.strings())
        result = probe_reconstruction(
            opened.embeddings.rows(np.asarray(at, np.int64)),
            ids,
            features=coded.features,
            width=self.recipe.width,
            training=self.recipe.kept,
            seed=int(job.spec["seed"]),
        )
        return {
            "kept": result.to_dict(),
            "protocol": f"width={self.recipe.width} two-layer perceptron of 512, "
            f"{result.held_out} of {result.items + result.held_out} items held out",
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _thinned(analysis: CodeAnalysis) -> dict[str, Any]:
    """Keep an analysis small: spectra at chosen ranks, three figures a point."""

    def points(found: Any) -> list[dict[str, Any]]:
        return [
            {"clusters": p.clusters, "nmi": p.nmi, "ami": p.ami, "by_chance": p.shuffled_nmi}
            for p in found
        ]

    values = analysis.singular_values
    ranks = np.arange(1, len(values) + 1)
    if len(ranks) > MOST_SINGULAR_VALUES:
        ranks = np.unique(np.linspace(1, len(values), MOST_SINGULAR_VALUES).round().astype(int))
    return {
        "rows": analysis.rows,
        "sweep": points(analysis.sweep),
        "first": points(analysis.first),
        "levels": points(analysis.levels),
        "codes": points(analysis.codes),
        "spectrum": {
            "rank": ranks.tolist(),
            "value": values[ranks - 1].tolist(),
            "dimensions": len(values),
            "above": int((values > 1e-3 * values[0]).sum()),
        },
        "correlation": analysis.correlation.tolist(),
        "cka": analysis.cka.tolist(),
    }
