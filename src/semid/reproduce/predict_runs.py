"""Numbers of Semantic IDs beside outcomes of recommenders: the runs behind the page on prediction.

A run is one recommender on the codes of one tokenizer. Its row holds every number of the codes, so
that the ledger alone is enough for the analysis. Neither fit nor numbers see the items that test.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from semid.catalogue.uniqueness import make_unique
from semid.codes import SemanticIds
from semid.data.embeddings import open_embeddings
from semid.data.ids import hash_strings
from semid.data.interactions import Interactions, read_interactions
from semid.data.source import EmbeddingSource
from semid.options import argument_types
from semid.output import atomic_file
from semid.recommenders.ranking.builder import RankingData, RankingDataConfig
from semid.recommenders.ranking.data import prepare_ranking_data
from semid.recommenders.ranking.features import CodeFeatures
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.training import rank_options
from semid.recommenders.retrieval import MODELS
from semid.recommenders.retrieval.data import RetrievalData, prepare_retrieval_data
from semid.recommenders.retrieval.training import train_retriever
from semid.report.audit import category_codes, category_paths
from semid.report.diagnose import diagnose
from semid.report.numbers import KEPT_NEIGHBORS, NOISE, intrinsic_numbers, kept_neighbors
from semid.reproduce.datasets import Opened
from semid.reproduce.ledger import Ledger, digest
from semid.reproduce.pool import Experiment, Job
from semid.reproduce.ranking_grid import MethodCodes, train_cell
from semid.reproduce.recipe import CandidateSpec, PredictRecipe, PredictStage
from semid.runs import remove_state_folder
from semid.seeds import numpy_generator
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import EncodedBlock
from semid.tokenizers.factory import TOKENIZERS, make_tokenizer
from semid.tokenizers.from_arrays import Codebooks
from semid.tokenizers.refining import refine
from semid.tokenizers.rqkmeans import RQKMeans

EVALUATION_SEED = 0
"""Of samples, noise, negatives and ties of the numbers: the same for every tokenizer and seed."""

USER_GROUPS = 64
"""Groups of users, by a hash of their id, whose means a row holds: they stand for users in a
bootstrap, since rows with a value per user would be too large."""

RETRIEVAL_SLICES = {"head": "head items", "tail": "tail items", "cold": "unseen items"}
RANKING_SLICES = {"head": "head", "tail": "tail", "cold": "unseen"}

Codes = npt.NDArray[np.int64]


class GivenCodes(Codebooks):
    """Codes that no encoder chose; the codeword of a code is the mean of what its items leave.

    Rows are known by their place, so a source must have the items in the order of the codes.
    """

    kind: ClassVar[str] = "given"

    @classmethod
    def of(cls, codes: Codes, sizes: tuple[int, ...], source: EmbeddingSource) -> GivenCodes:
        """Return a tokenizer of codes ``(items, levels)``."""
        rows = source.rows(np.arange(len(source)))
        mean = rows.mean(0)
        residual, tensors = rows - mean, {"preprocess.mean": mean}
        for level, size in enumerate(sizes):
            counts = np.bincount(codes[:, level], minlength=size)[:, None]
            book = np.zeros((size, source.dim), np.float32)
            np.add.at(book, codes[:, level], residual)
            book /= np.maximum(counts, 1)
            residual = residual - book[codes[:, level]]
            tensors[f"codebooks.{level}"] = book
        tokenizer = cls(
            levels=len(sizes), codebook_size=list(sizes), center=True, validation_fraction=0.0
        )
        tokenizer._dim = source.dim
        tokenizer._set_tensors(tensors)
        tokenizer.given = codes, np.linalg.norm(residual, axis=1).astype(np.float32)
        return tokenizer

    given: tuple[Codes, npt.NDArray[np.float32]]

    def encode_blocks(
        self, source: EmbeddingSource, *, beam_width: int | None = None, first: int = 0
    ) -> Iterator[EncodedBlock]:
        """Yield the given codes of each block."""
        codes, norms = self.given
        for start, x in source.blocks(first=first):
            span = slice(start, start + len(x))
            yield EncodedBlock(start, x, codes[span], norms[span])


def unfitted(recipe: PredictRecipe, spec: CandidateSpec, size: int, seed: int) -> Tokenizer:
    """Return the tokenizer that a recipe asks for, of codebooks of ``size`` unless it says so."""
    kind = argument_types(TOKENIZERS.load(spec.kind))
    # Grids say their size in options of their own.
    values = {"codebook_size": size, **recipe.neural, "seed": seed}
    shared = {key: value for key, value in values.items() if key in kind}
    return make_tokenizer(spec.kind, {**shared, **spec.options})


class PredictExperiment(Experiment):
    """Trains every recommender on the codes of every tokenizer."""

    recipe: PredictRecipe

    def __init__(self, recipe: PredictRecipe, data: Path | None, folder: Path) -> None:
        super().__init__(recipe, data, folder)
        self.tokenizers = {one.name: one for one in recipe.tokenizers}
        self.models = {one.name: one for one in recipe.models}
        # One data set at a time: they are large.
        self._logs: dict[str, tuple[RetrievalData, Interactions]] = {}
        self._ranking: dict[str, RankingData] = {}

    def stage_cells(self, stage: PredictStage, data: str, seed: int) -> Iterator[dict[str, Any]]:
        """Yield every recommender on the codes of every tokenizer."""
        for name in stage.tokenizers or self.tokenizers:
            if not self.tokenizers[name].data or data in self.tokenizers[name].data:
                for model in stage.models:
                    yield {"tokenizer": name, "model": model}

    def title(self, cell: Mapping[str, Any]) -> str:
        """Name a run for people."""
        return f"{cell['data']}, {cell['model']} on {cell['tokenizer']}, seed {cell['seed']}"

    def identity(self, cell: Mapping[str, Any], files: str) -> list[Any]:
        """Return the settings that a run shares with others, and its own."""
        data = self.data_sets[cell["data"]]
        names = ("paper", "revision", "quick", "cold_items", "geometry_sample", "flip_sample")
        shared = {
            **{name: getattr(self.recipe, name) for name in (*names, "neural")},
            "files": files,
            "codebook_size": data.codebook_size,
            "item_columns": data.item_columns,
            "label": data.label,
            **data.later_options,
        }
        tokenizer, model = self.tokenizers[cell["tokenizer"]], self.models[cell["model"]]
        return [shared, {**cell, "ids": tokenizer.to_dict(), "recommender": model.to_dict()}]

    def __call__(self, job: Job) -> dict[str, Any]:
        """Make the codes and their numbers unless they are there; train and test."""
        spec, opened = job.spec, self.open(str(job.spec["data"]))
        began, cpu = time.perf_counter(), time.process_time()
        tokenizer = self.tokenizers[str(spec["tokenizer"])]
        ids, measured = self._coded(opened, tokenizer, int(spec["seed"]), job.settings)
        prepared = time.process_time() - cpu
        retrieves = self.models[str(spec["model"])].kind in MODELS
        outcome = self._retrieve(job, opened, ids) if retrieves else self._rank(job, opened, ids)
        return {
            "items": len(ids),
            "levels": ids.levels,
            "control": tokenizer.control,
            "behavior": tokenizer.behavior,
            **measured,
            **outcome,
            "ids_cpu_seconds": round(prepared, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }

    # Codes and numbers -------------------------------------------------------------------------

    def _log(self, opened: Opened) -> tuple[RetrievalData, Interactions]:
        """Return the split log, and the training histories that tokenizers and numbers may see."""
        name = opened.spec.name
        if name not in self._logs:
            data = prepare_retrieval_data(
                opened.interactions,
                catalogue=opened.embeddings.ids,
                ties=opened.spec.ties,
                cold_items=self.recipe.cold_items,
            )
            self._logs = {name: (data, read_interactions(data.training_log()))}
        return self._logs[name]

    def _coded(
        self, opened: Opened, spec: CandidateSpec, seed: int, settings: str
    ) -> tuple[SemanticIds, dict[str, Any]]:
        """Return codes of a tokenizer of this seed, and their numbers; runs share them."""
        name = digest([settings, spec.to_dict(), seed])
        place = self.folder / "tokenizers" / f"{name}.parquet"
        figures = place.with_suffix(".json")
        place.parent.mkdir(parents=True, exist_ok=True)
        with Ledger(self.folder).lock(f"ids-{name}"):  # whoever comes first; the others wait
            if not figures.exists():  # written last: what was stopped before it is repeated
                cpu = time.process_time()
                source = opened.embeddings
                if spec.control == "shuffled":  # what a fit on the wrong rows would see
                    order = numpy_generator(seed, "shuffled").permutation(len(source))
                    source = open_embeddings(source.rows(order), ids=source.ids)
                tokenizer = self._tokenizer(opened, spec, source, seed)
                place.unlink(missing_ok=True)
                tokenizer.encode(source).write(place)
                fitted = time.process_time() - cpu
                measured = {
                    "numbers": self._numbers(opened, spec, tokenizer, source),
                    "fit_cpu_seconds": round(fitted, 1),
                }
                with atomic_file(figures, mark=False) as work:
                    work.write_text(json.dumps(measured), encoding="utf8")
        return SemanticIds.read(place), json.loads(figures.read_text(encoding="utf8"))

    def _tokenizer(
        self, opened: Opened, spec: CandidateSpec, source: EmbeddingSource, seed: int
    ) -> Tokenizer:
        """Return a fitted tokenizer, or codes that need no fit."""
        size = opened.spec.codebook_size
        values = {"codebook_size": size, **spec.options}
        if spec.control in ("random", "hash", "category"):
            levels, size = int(values.get("levels", 3)), int(values["codebook_size"])
            codes = numpy_generator(seed, "random codes").integers(0, size, (len(source), levels))
            if spec.control == "hash":
                strings = source.ids.strings()
                hashes = [hash_strings(strings, salt=f"{seed} {n}") for n in range(levels)]
                codes = (np.stack(hashes, axis=1) % np.uint64(size)).astype(np.int64)
            if spec.control == "category":
                # The first category is that of the whole set; the last code stays random.
                paths = category_paths(opened.items, source.ids, None, [])
                codes = category_codes([path[1:levels] for path in paths], codes)
            sizes = tuple(max(size, int(column.max()) + 1) for column in codes.T)
            return GivenCodes.of(codes, sizes, source)
        log = self._log(opened)[1] if spec.behavior else None
        tokenizer = unfitted(self.recipe, spec, size, seed)
        tokenizer.fit(source, interactions=log)
        if spec.refined:
            assert isinstance(tokenizer, RQKMeans)
            tokenizer = refine(tokenizer, source)
        return tokenizer

    def _numbers(
        self, opened: Opened, spec: CandidateSpec, tokenizer: Tokenizer, source: EmbeddingSource
    ) -> dict[str, float | None]:
        diagnosis = diagnose(
            tokenizer,
            source,
            interactions=self._log(opened)[1],
            seed=EVALUATION_SEED,
            geometry_sample=self.recipe.geometry_sample,
            flip_sample=self.recipe.flip_sample,
            replicates=0,
            explorer=False,
        )
        numbers = intrinsic_numbers(diagnosis)
        rows = source.rows(np.arange(len(source)))
        numbers[KEPT_NEIGHBORS] = kept_neighbors(
            rows,
            tokenizer.decode(tokenizer.encode(source)),
            sample=self.recipe.flip_sample,
            seed=EVALUATION_SEED,
        )
        if isinstance(tokenizer, GivenCodes):  # no encoder, so nothing flips
            numbers |= dict.fromkeys(NOISE)
        return numbers

    # Outcomes ----------------------------------------------------------------------------------

    def _retrieve(self, job: Job, opened: Opened, ids: SemanticIds) -> dict[str, Any]:
        model, seed = self.models[str(job.spec["model"])], int(job.spec["seed"])
        ids = make_unique(ids, method=model.unique).ids
        data = prepare_retrieval_data(
            opened.interactions,
            ids=ids,
            ties=opened.spec.ties,
            cold_items=self.recipe.cold_items,
        )
        states = self.folder / "states" / job.key
        retriever = train_retriever(
            data,
            ids=ids,
            model=model.kind,
            options=model.options,
            training=model.training,
            seed=seed,
            checkpoint=states,
            resume=True,
        )
        remove_state_folder(states)
        results = retriever.results["test"]
        ndcg = results.per_user["ndcg@10"]
        groups = hash_strings(data.sequences.user_ids, salt="user groups") % USER_GROUPS
        groups = groups.astype(np.int64)
        return {
            "metrics": {
                "ndcg_10": results.metrics["ndcg@10"].value,
                "recall_10": results.metrics["recall@10"].value,
            },
            "slices": {
                name: {
                    "users": part.users,
                    "ndcg_10": part.metrics["ndcg@10"].value,
                    "recall_10": part.metrics["recall@10"].value,
                }
                for name, key in RETRIEVAL_SLICES.items()
                if (part := results.slices.get(key)) is not None
            },
            "user_groups": {
                "users": np.bincount(groups, minlength=USER_GROUPS).tolist(),
                "ndcg_10": np.bincount(groups, ndcg, USER_GROUPS).tolist(),
            },
            "curve": [row.get("score") for row in retriever.report["training"]["history"]],
            "protocol": results.protocol,
            "parameters": retriever.report["parameters"],
        }

    def _rank(self, job: Job, opened: Opened, ids: SemanticIds) -> dict[str, Any]:
        model = self.models[str(job.spec["model"])]
        if opened.spec.name not in self._ranking:
            rows = prepare_ranking_data(
                opened.interactions,
                items=opened.items,
                ties=opened.spec.ties,
                config=RankingDataConfig(
                    label=opened.spec.label,
                    split="leave-last-out",
                    item_columns=opened.spec.item_columns,
                ),
            )
            self._ranking = {opened.spec.name: rows}
        features = CodeFeatures(mode="levels" if ids.info.hierarchical else "parallel")
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in model.options.items()}
        _, figures = train_cell(
            self._ranking[opened.spec.name],
            MethodCodes(ids, features),
            config=RankerConfig(model=model.kind, options=options),
            training=rank_options(model.training),
            seed=int(job.spec["seed"]),
        )
        slices = figures["slices"]
        return {
            "metrics": {"auc": figures["auc"]},
            "slices": {
                name: {"auc": slices[key]} for name, key in RANKING_SLICES.items() if key in slices
            },
            "protocol": figures["protocol"],
            "parameters": figures["parameters"],
        }
