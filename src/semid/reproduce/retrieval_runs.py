"""Next-item models on the ids of several tokenizers: the runs behind the page on retrieval."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semid.catalogue.uniqueness import make_unique
from semid.codes import SemanticIds
from semid.diagnostics.pairs import Estimate
from semid.recommenders.retrieval import MODELS
from semid.recommenders.retrieval.data import RetrievalData, pack, prepare_retrieval_data
from semid.recommenders.retrieval.metrics import RetrievalResults, estimates
from semid.recommenders.retrieval.retriever import Retriever
from semid.recommenders.retrieval.training import train_retriever
from semid.reproduce.datasets import Opened
from semid.reproduce.ledger import Ledger, digest
from semid.reproduce.pool import Experiment, Job
from semid.reproduce.recipe import IdsSpec, RetrievalRecipe, RetrievalStage
from semid.reproduce.retrieval_grid import BASELINE
from semid.runs import remove_state_folder
from semid.tokenizers.factory import make_tokenizer

PAIRED = ("recall@10", "ndcg@10")
"""Metrics whose values for each user are kept, for differences over the same users."""

_CASES = ("best", "worst", "without_history")

SEARCHED_USERS = 64
"""Users whose beam search is compared with scores of the whole catalogue."""


class RetrievalExperiment(Experiment):
    """Trains every next-item model on the ids of every tokenizer, in both orders of ties."""

    recipe: RetrievalRecipe

    def __init__(self, recipe: RetrievalRecipe, data: Path | None, folder: Path) -> None:
        super().__init__(recipe, data, folder)
        self.models = {one.name: one for one in recipe.models}
        self.ids = {one.name: one for one in recipe.ids}

    def stage_cells(self, stage: RetrievalStage, data: str, seed: int) -> Iterator[dict[str, Any]]:
        """Yield every model on the ids of every tokenizer, in both orders of ties."""
        for ties in stage.ties:
            for model in stage.models:
                kind = MODELS.load(self.models[model].kind)
                if seed and not kind.trains:
                    continue
                # A model that reads no codes runs once, whatever the ids.
                for name in stage.ids if "codes" in kind.needs else ("",):
                    yield {"ties": ties, "tokenizer": name, "model": model}

    def title(self, cell: Mapping[str, Any]) -> str:
        """Name a run for people."""
        ids = f" on {cell['tokenizer']}" if cell["tokenizer"] else ""
        order = "ties in file order" if cell["ties"] == "file" else "ties shuffled"
        return f"{cell['data']}, {order}, {cell['model']}{ids}, seed {cell['seed']}"

    def identity(self, cell: Mapping[str, Any], files: str) -> list[Any]:
        """Return the settings that a run shares with others, and its own."""
        names = ("paper", "revision", "quick", "training")
        shared = {
            **{name: getattr(self.recipe, name) for name in names},
            "files": files,
            "codebook_size": self.data_sets[cell["data"]].codebook_size,
        }
        model = self.models[cell["model"]]
        own = {**cell, "kind": model.kind, "options": model.options}
        if model.training:  # keys of committed runs have none
            own["training"] = model.training
        if cell["tokenizer"]:
            own["ids"] = self.ids[cell["tokenizer"]].to_dict()
        return [shared, own]

    def __call__(self, job: Job) -> dict[str, Any]:
        """Make the ids unless they are there, train, and test."""
        spec, opened = job.spec, self.open(str(job.spec["data"]))
        model, seed = self.models[str(spec["model"])], int(spec["seed"])
        began, cpu = time.perf_counter(), time.process_time()
        ids, fitted = None, 0.0
        if spec["tokenizer"]:
            ids = self._make_ids(opened, self.ids[str(spec["tokenizer"])], str(spec["ties"]), seed)
            fitted = time.process_time() - cpu
        data = prepare_retrieval_data(
            opened.interactions,
            ids=ids,
            embeddings=opened.embeddings,
            ties=str(spec["ties"]),
        )
        states = self.folder / "states" / job.key
        retriever = train_retriever(
            data,
            ids=ids,
            model=model.kind,
            options=model.options,
            training={**self.recipe.training, **model.training},
            seed=seed,
            checkpoint=states if MODELS.load(model.kind).trains else None,
            resume=True,
        )
        remove_state_folder(states)
        results, report = retriever.results["test"], retriever.report
        trained = report.get("training", {})
        return {
            "kind": model.kind,
            "items": len(data.items),
            "users": results.users,
            "codebook_sizes": list(data.items.sizes),
            "unique_ids": None if ids is None else len(data.items.buckets[0]),
            **_figures(results),
            "validation": report["validation"]["metrics"]["ndcg@10"]["value"],
            "less_control": self._less_control(job, results),
            "beam_agreement": beam_agreement(retriever, data),
            "curve": [row.get("score") for row in trained.get("history", ())],
            "best_epoch": trained.get("best_epoch", 0),
            "epochs": trained.get("epochs", 0),
            "parameters": report["parameters"],
            "protocol": results.protocol,
            "ids_cpu_seconds": round(fitted, 1),
            "train_cpu_seconds": round(report["cpu_seconds"], 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _make_ids(self, opened: Opened, spec: IdsSpec, ties: str, seed: int) -> SemanticIds:
        """Return ids from a tokenizer of this seed; runs share them."""
        size = opened.spec.codebook_size
        options = {"codebook_size": size, **spec.options, "seed": seed}
        # Only ids that learn from behavior depend on the order of the log.
        parts = [opened.digest, spec.kind, options, spec.unique, ties if spec.behavior else ""]
        name = digest(parts)
        place = self.folder / "tokenizers" / f"{name}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        with Ledger(self.folder).lock(f"ids-{name}"):  # whoever comes first; the others wait
            if place.exists():
                return SemanticIds.read(place)
            source, log = opened.embeddings, None
            if spec.behavior:  # from the training histories alone: targets stay unseen
                data = prepare_retrieval_data(opened.interactions, catalogue=source.ids, ties=ties)
                log = data.training_log()
            tokenizer = make_tokenizer(spec.kind, options).fit(source, interactions=log)
            unique = make_unique(
                tokenizer.encode(source),
                method=spec.unique,
                tokenizer=tokenizer,
                embeddings=source,
            )
            unique.ids.write(place)
        return unique.ids

    def _less_control(self, job: Job, results: RetrievalResults) -> dict[str, Any] | None:
        """Return this run less the control of its seed over the same users, with intervals."""
        spec = job.spec
        place = self.folder / "users"
        place.mkdir(exist_ok=True)

        def file(model: str, ids: str) -> Path:
            parts = [job.settings, spec["data"], spec["ties"], model, ids, spec["seed"]]
            return place / f"{digest(parts)}.npz"

        own = {name: results.per_user[name].astype(np.float32) for name in PAIRED}
        np.savez_compressed(file(str(spec["model"]), str(spec["tokenizer"])), **own)
        control = file(BASELINE, "")
        if spec["model"] == BASELINE or not control.exists():
            return None
        with np.load(control) as theirs:
            gaps = {name: own[name].astype(float) - theirs[name] for name in PAIRED}
        differences = estimates(gaps, replicates=1000, seed=0)
        return {_key(name): _interval(estimate) for name, estimate in differences.items()}


@torch.no_grad()
def beam_agreement(retriever: Retriever, data: RetrievalData) -> float | None:
    """Return how much of the exact first ten ids a beam search finds; None without a search.

    Over `SEARCHED_USERS` users at even distances. Cost: all prefixes of the catalogue for each.
    """
    network = retriever.network
    if network.exact:
        return None
    histories, _ = data.histories("test", retriever.options.max_length)  # type: ignore[attr-defined]
    agreements = []
    for user in np.unique(np.linspace(0, len(histories) - 1, SEARCHED_USERS).astype(int)):
        batch = pack([histories[user]])
        searched = network.top(batch, 10)[1][0].tolist()
        exact = network.scores(batch)[0].topk(10).indices.tolist()
        agreements.append(len(set(searched) & set(exact)) / 10)
    return float(np.mean(agreements))


def _interval(estimate: Estimate) -> list[float | None]:
    return [estimate.value, estimate.low, estimate.high]


def _key(metric: str) -> str:
    return metric.replace("@", "_")  # in a path into a row, "@" stands before a noise


def _figures(results: RetrievalResults) -> dict[str, Any]:
    """Return what tables and claims need of the results."""
    slices = {
        name: {"users": part.users, **{_key(m): part.metrics[m].value for m in PAIRED}}
        for name, part in results.slices.items()
    }
    return {
        "metrics": {_key(name): estimate.value for name, estimate in results.metrics.items()},
        "intervals": {_key(name): _interval(results.metrics[name]) for name in PAIRED},
        **{case: {_key(m): getattr(results, case)[m] for m in PAIRED} for case in _CASES},
        "id_level": None if results.id_level is None else results.id_level["recall@10"],
        "slices": slices,
        "coverage": results.coverage,
    }
