"""The runs behind the MoC paper's tables and figures."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from semid.data.tables import open_table
from semid.errors import InteractionsError
from semid.output import atomic_file
from semid.progress import QuietProgress
from semid.recommenders.ranking.analysis import CodeAnalysis, analyze_codes
from semid.recommenders.ranking.builder import RankingData, RankingDataConfig
from semid.recommenders.ranking.data import prepare_ranking_data
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.ranker import Ranker
from semid.recommenders.ranking.splits import Label
from semid.recommenders.ranking.training import rank_options
from semid.reproduce.datasets import Opened
from semid.reproduce.ledger import RUNS_FILE, Ledger, digest, read_runs
from semid.reproduce.pool import Experiment, Job
from semid.reproduce.ranking_grid import MethodCodes, TokenizerCache, train_cell
from semid.reproduce.recipe import MocRecipe, Stage, Variant
from semid.reproduce.reconstruction_probe import probe_reconstruction

MOST_SINGULAR_VALUES = 96
PREPARED = 4
"""Data sets that a process keeps: with several processes each meets all of them in turn."""
ONCE = {"none": 0, "vqvae": 1}
"""Methods without a scale of their own, and the M that their rows say."""
_BLANK = ("none", "random", "widened")
"""Methods whose codes say nothing of the items: their embeddings are not analyzed."""


@cache
def _columns(path: Path) -> tuple[str, ...]:
    """Return the columns of a log."""
    return tuple(open_table(path, error=InteractionsError).names)


class MocExperiment(Experiment):
    """Trains ranking models on the codes of every method, seed by seed, stage by stage."""

    recipe: MocRecipe

    def __init__(self, recipe: MocRecipe, data: Path | None, folder: Path) -> None:
        super().__init__(recipe, data, folder)
        self.variants = {"": Variant(name=""), **{v.name: v for v in recipe.variants}}
        self._prepared: dict[tuple[str, str], tuple[Opened, RankingData]] = {}

    def cells(self) -> list[dict[str, Any]]:
        """List every run once, in the order of the recipe's stages."""
        # Stages may overlap: a cell belongs to the first that has it, and is analyzed if one asks.
        cells: dict[str, dict[str, Any]] = {}
        for stage in self.recipe.stages:
            for seed in range(stage.seeds or self.recipe.seeds):
                for name in self.data_sets:
                    if stage.data and name not in stage.data:
                        continue
                    for spec in self._stage_cells(stage, name, seed):
                        cell = cells.setdefault(digest(spec), {**spec, "analyze": False})
                        cell["analyze"] |= seed < stage.analyze and spec["method"] not in _BLANK
        return list(cells.values())

    def _stage_cells(self, stage: Stage, data: str, seed: int) -> Iterator[dict[str, Any]]:
        """Yield what a stage runs of one data set and seed."""
        shared = {
            "paper": self.recipe.paper,
            "quick": self.recipe.quick,
            "data": data,
            "variant": stage.variant,
            "run": stage.kind,
            "seed": seed,
        }
        # Item embeddings are rebuilt from codes alone, without a ranking model.
        rebuilds = stage.kind == "kept"
        models, fusions = (("",), (False,)) if rebuilds else (stage.models, stage.fusion)
        for method in stage.methods:
            scales = (ONCE[method],) if method in ONCE else stage.scales
            for model, scale, fusion in product(models, scales, fusions):
                cell = {**shared, "model": model, "method": method}
                cell |= {"scale": scale, "fusion": fusion}
                if rebuilds or not stage.parts:
                    yield cell
                    continue
                if "alone" in stage.parts:
                    yield from ({**cell, "part": f"alone {n + 1}"} for n in range(scale))
                if "first" in stage.parts:
                    yield from ({**cell, "part": f"first {n}"} for n in range(1, scale))

    def title(self, cell: Mapping[str, Any]) -> str:
        """Name a run for people."""
        protocol = f"{cell['variant']}, " if cell["variant"] else ""
        part = f" {cell['part']}" if "part" in cell else ""
        fusion = " + fusion" if cell["fusion"] else ""
        what = cell["model"] or "information kept"
        return (
            f"{cell['data']}, {protocol}{what} {cell['method']} {cell['scale']}x{part}{fusion}, "
            f"seed {cell['seed']}"
        )

    def identity(self, cell: Mapping[str, Any], files: str) -> list[Any]:
        """Return the settings that a run shares with others, and its own."""
        names = ("paper", "revision", "quick", "width", "fusion_rank", "model", "training")
        data = self.data_sets[cell["data"]]
        options = {k: v for k, v in asdict(data).items() if k not in ("ties", "relations")}
        shared = {
            **{name: getattr(self.recipe, name) for name in (*names, "tokenizer")},
            "files": files,
            "data": {**options, **data.later_options},
            "variant": self._spelled_variant(cell["variant"]),
        }
        # Keys of committed runs are hashes of this spelling.
        spelled = {"analyse" if key == "analyze" else key: cell[key] for key in cell}
        return [shared, {"kept": self.recipe.probe} if cell["run"] == "kept" else {}, spelled]

    def _spelled_variant(self, name: str) -> dict[str, Any] | None:
        """Return a variant's options; keys of committed runs lack those that came later."""
        if not name:
            return None
        options = asdict(self.variants[name])
        return {k: v for k, v in options.items() if v or k in ("name", "label", "split")}

    def obstacle(self, opened: Opened, cell: Mapping[str, Any]) -> tuple[str, str] | None:
        """Say why a protocol cannot be had of a log: it lacks ratings, or an order."""
        name, path, variant = cell["data"], opened.interactions, self.variants[cell["variant"]]
        label = Label.parse(variant.label or opened.spec.label)
        columns, why = _columns(path), ""
        if label.column and label.column not in columns:
            why = f"'{path.name}' of {name} has no column '{label.column}' for '{label}'"
        elif variant.split != "random" and not {"position", "timestamp"} & set(columns):
            why = f"'{path.name}' of {name} has no order for split={variant.split}"
        return (f"{name}, {variant.name or 'main protocol'}", why) if why else None

    def __call__(self, job: Job) -> dict[str, Any]:
        """Fit the codes unless they are there, train, measure."""
        spec = job.spec
        opened, rows = self._rows(str(spec["data"]), str(spec["variant"]))
        coded = self._coded(job.settings, spec, opened, rows)
        if spec["run"] == "kept":
            return self._rebuild(job, opened, coded)
        penalty, tried, figures = self._tuned(job, opened, rows)
        if figures is None or spec["analyze"]:
            seed = int(spec["seed"])
            ranker, figures = self._train(spec, rows, coded, seed=seed, penalty=penalty)
        width = self.variants[str(spec["variant"])].width or self.recipe.width
        figures["protocol"] += f" width={width} tokenizer_seed=seed"
        figures["rows"] = {name: len(part) for name, part in rows.parts.items()}
        if tried:
            figures |= {"embedding_penalty": penalty, "tried": tried}
        if spec["analyze"]:
            test = rows.parts["test"]
            figures["analysis"] = _thinned(analyze_codes(ranker.network, test))
            if spec["fusion"]:
                fused = analyze_codes(ranker.network, test, fused=True)
                figures["analysis_fused"] = _thinned(fused)
        return figures

    def _train(
        self,
        spec: Mapping[str, Any],
        rows: RankingData,
        coded: MethodCodes,
        *,
        seed: int,
        penalty: float,
    ) -> tuple[Ranker, dict[str, Any]]:
        variant = self.variants[str(spec["variant"])]
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in self.recipe.model.items()}
        return train_cell(
            rows,
            coded,
            config=RankerConfig(
                model=str(spec["model"]),
                width=variant.width or self.recipe.width,
                fusion=bool(spec["fusion"]),
                fusion_rank=self.recipe.fusion_rank,
                options=options,
                embedding_penalty=penalty,
            ),
            training=rank_options({**self.recipe.training, **variant.training}),
            seed=seed,
        )

    def _tuned(
        self, job: Job, opened: Opened, rows: RankingData
    ) -> tuple[float, list[dict[str, float]], dict[str, Any] | None]:
        """Return a cell's penalty of embeddings, what all that were tried gave, and figures.

        Each method gets the same trials: all penalties with seed 0, of which the best validation
        AUC decides for every seed. Parts of the codes, and fewer codes, take the penalty of the
        variant's largest number. The figures are those of that cell, where it is asked for.
        """
        penalties = self.variants[str(job.spec["variant"])].embedding_penalty
        if not penalties:
            return 0.0, [], None
        names = ("data", "variant", "model", "method", "scale", "fusion")
        whole = {**{name: job.spec[name] for name in names}, "seed": 0}
        if job.spec["method"] not in ONCE:
            alike = [s for s in self.recipe.stages if s.variant == job.spec["variant"]]
            whole["scale"] = max(scale for stage in alike for scale in stage.scales)
        name = digest([job.settings, whole])
        place = self.folder / "tuned" / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        with Ledger(self.folder).lock(f"tuned-{name}"):  # whoever comes first; the others wait
            if not place.exists():
                for row in read_runs(self.folder / RUNS_FILE):  # of a machine before
                    same = row["settings"] == job.settings and "tried" in row
                    if same and all(row[key] == value for key, value in whole.items()):
                        return row["embedding_penalty"], row["tried"], None
                coded = self._coded(job.settings, whole, opened, rows)
                results = [
                    self._train(whole, rows, coded, seed=0, penalty=penalty)[1]
                    for penalty in penalties
                ]
                with atomic_file(place, mark=False) as work:
                    work.write_text(json.dumps(results), encoding="utf8")
        results = json.loads(place.read_text(encoding="utf8"))
        shown = ("validation_auc", "auc", "log_loss")
        tried = [
            {"embedding_penalty": penalty, **{key: result[key] for key in shown}}
            for penalty, result in zip(penalties, results, strict=True)
        ]
        best = max(range(len(tried)), key=lambda n: tried[n]["validation_auc"])
        is_whole = {**job.spec, **whole} == job.spec and not job.spec.get("part")
        return penalties[best], tried, results[best] if is_whole else None

    def _rows(self, name: str, variant: str) -> tuple[Opened, RankingData]:
        """Prepare a data set under a protocol; the last `PREPARED` stay in memory."""
        if (name, variant) not in self._prepared:
            opened, protocol = self.open(name), self.variants[variant]
            rows = prepare_ranking_data(
                opened.interactions,
                items=opened.items,
                ties="file",  # as the paper did
                config=RankingDataConfig(
                    label=protocol.label or opened.spec.label,
                    split=protocol.split,
                    item_columns=opened.spec.item_columns,
                ),
            )
            while len(self._prepared) >= PREPARED:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[name, variant] = (opened, rows)
        return self._prepared[name, variant]

    def _coded(
        self, settings: str, spec: Mapping[str, Any], opened: Opened, rows: RankingData
    ) -> MethodCodes:
        """Return codes and how they are used, with a tokenizer of this seed."""
        seed, method, scale = int(spec["seed"]), str(spec["method"]), int(spec["scale"])
        place = self.folder / "tokenizers" / settings / f"seed-{seed}"
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
        with Ledger(self.folder).lock(f"tokenizer-{settings}-{seed}-{fitted}-{width}"):
            coded = maker.method(method, scale, progress=QuietProgress())
        # A part of the codes: one level alone, or the levels from the first up.
        part = re.fullmatch(r"(alone|first) (\d+)", str(spec.get("part", "")))
        if part and coded.features is not None:
            number = int(part[2])
            levels = {"levels": (number - 1,)} if part[1] == "alone" else {"scale": number}
            coded = MethodCodes(coded.ids, replace(coded.features, **levels))
        return coded

    def _rebuild(self, job: Job, opened: Opened, coded: MethodCodes) -> dict[str, Any]:
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
            training=self.recipe.probe,
            seed=int(job.spec["seed"]),
        )
        return {
            "kept": result.to_dict(),
            "protocol": f"width={self.recipe.width} two-layer perceptron of 512, "
            f"{result.held_out} of {result.items + result.held_out} items held out",
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }


def _thinned(analysis: CodeAnalysis) -> dict[str, Any]:
    """Keep an analysis small: spectra at chosen ranks, three figures a point."""
    points = {
        name: [
            {"clusters": p.clusters, "nmi": p.nmi, "ami": p.ami, "by_chance": p.shuffled_nmi}
            for p in getattr(analysis, name)
        ]
        for name in ("sweep", "first", "levels", "codes")
    }
    # Ranks at even distances, both ends among them.
    values = analysis.singular_values
    ranks = np.arange(1, len(values) + 1)
    if len(ranks) > MOST_SINGULAR_VALUES:
        ranks = np.unique(np.linspace(1, len(values), MOST_SINGULAR_VALUES).round().astype(int))
    return {
        "rows": analysis.rows,
        **points,
        "spectrum": {
            "rank": ranks.tolist(),
            "value": values[ranks - 1].tolist(),
            "dimensions": len(values),
            "above": int((values > 1e-3 * values[0]).sum()),
        },
        "correlation": analysis.correlation.tolist(),
        "cka": analysis.cka.tolist(),
    }
