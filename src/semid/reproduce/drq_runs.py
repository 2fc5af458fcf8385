"""The runs behind the DRQ paper's tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.ids import hash_strings, share_mask
from semid.data.interactions import TRAIN, Interactions, split_users
from semid.data.source import EmbeddingSource
from semid.diagnostics.overlap import LevelOverlap
from semid.diagnostics.pairs import Estimate, ItemPairs
from semid.diagnostics.spaces import reconstruction
from semid.options import argument_types
from semid.output import atomic_file
from semid.report.behavior import Pool, behavior_pairs, choose_cutoffs, measure_pairs, relations
from semid.report.diagnose import diagnose
from semid.report.results import Diagnosis, Flips
from semid.reproduce.datasets import Opened
from semid.reproduce.ledger import Ledger, digest
from semid.reproduce.plain import PlainRQVAE
from semid.reproduce.pool import Experiment, Job
from semid.reproduce.recipe import PLAIN_RQVAE, DataSet, DrqRecipe, FittedSpec
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.factory import TOKENIZERS, make_tokenizer
from semid.tokenizers.heads import DecodeHead

EVALUATION_SEED = 0
"""Of noise, subsets, negatives, ties and bootstrap: the same for every tokenizer and seed."""

Array = npt.NDArray[np.float32]


class DrqExperiment(Experiment):
    """Fits each tokenizer for each seed on each data set, and measures all its views."""

    recipe: DrqRecipe

    def __init__(self, recipe: DrqRecipe, data: Path | None, folder: Path) -> None:
        super().__init__(recipe, data, folder)
        # One at a time: they are large.
        self._opened: dict[str, tuple[Opened, Interactions | None]] = {}

    def cells(self) -> list[dict[str, Any]]:
        """List every run, data set by data set."""
        recipe = self.recipe
        return [
            {
                "paper": recipe.paper,
                "quick": recipe.quick,
                "data": data.name,
                "tokenizer": row.name,
                "variant": row.variant,
                "seed": seed,
            }
            for data in recipe.data
            for row in recipe.tokenizers
            if not row.data or data.name in row.data
            for seed in range(data.seeds or recipe.seeds)
        ]

    def title(self, cell: Mapping[str, Any]) -> str:
        """Name a run for people."""
        variant = f" ({cell['variant']})" if cell["variant"] else ""
        return f"{cell['data']}, {cell['tokenizer']}{variant}, seed {cell['seed']}"

    def in_order(self, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Put the paper's rows first, smaller codebooks before larger ones, seed by seed."""
        sizes = {name: data.codebook_size for name, data in self.data_sets.items()}
        # The sort keeps the order of data sets and rows among equals.
        return sorted(cells, key=lambda c: (bool(c["variant"]), sizes[c["data"]], c["seed"]))

    def _row(self, cell: Mapping[str, Any]) -> FittedSpec:
        # A tokenizer may have other options on another data set.
        key = (cell["tokenizer"], cell["variant"])
        return next(
            row
            for row in self.recipe.tokenizers
            if (row.name, row.variant) == key and (not row.data or cell["data"] in row.data)
        )

    def identity(self, cell: Mapping[str, Any], files: str) -> list[Any]:
        """Return the settings that a run shares with others, and its own."""
        data, row = self.data_sets[cell["data"]], self._row(cell)
        names = ("paper", "revision", "quick", "levels", "geometry_sample", "flip_sample")
        # The number of seeds is no setting: more seeds only add runs.
        shared = {
            **{name: getattr(self.recipe, name) for name in (*names, "replicates", "neural")},
            "files": files,
            "codebook_size": data.codebook_size,
            "logs": data.logs,
            **data.later_options,
        }
        # Keys of committed runs are hashes of this spelling.
        single = {**cell, "kind": row.kind, "options": row.options, "behaviour": row.behavior}
        if row.users < 1:
            single["users"] = row.users
        return [shared, single]

    def tokenizer(self, row: FittedSpec, data: DataSet, *, seed: int) -> Tokenizer:
        """Return the unfitted tokenizer of a row of the tables."""
        # All networks get the same width and length of training, so that none has an advantage.
        neural = {} if row.kind == "rqkmeans" else self.recipe.neural
        codes = {"levels": self.recipe.levels, "codebook_size": data.codebook_size}
        if row.kind == PLAIN_RQVAE:
            return PlainRQVAE(**{**codes, "seed": seed, **neural, **row.options})
        if "codebook_size" not in argument_types(TOKENIZERS.load(row.kind)):
            codes = {}  # grids and pipelines say it in options of their own
        return make_tokenizer(row.kind, {**codes, "seed": seed, **neural, **row.options})

    def __call__(self, job: Job) -> dict[str, Any]:
        """Fit, diagnose and sum up."""
        recipe, row = self.recipe, self._row(job.spec)
        data = self.data_sets[job.spec["data"]]
        if data.name not in self._opened:
            current = self.open(data.name)
            self._opened = {data.name: (current, current.log())}
        opened, log = self._opened[data.name]
        began, cpu = time.perf_counter(), time.process_time()
        tok = self.tokenizer(row, data, seed=int(job.spec["seed"]))
        seen = training_share(log, row.users) if log is not None and row.behavior else None
        tok.fit(opened.embeddings, interactions=seen)
        fitted = time.process_time() - cpu
        # Every view of the paper, measured with one seed whatever the seed of the fit.
        diagnosis = diagnose(
            tok,
            opened.embeddings,
            seed=EVALUATION_SEED,
            geometry_sample=recipe.geometry_sample,
            flip_sample=recipe.flip_sample,
            explorer=False,
        )
        figures = _figures(diagnosis)
        figures["decoder(z)"] = _continuous(tok, opened.embeddings)
        if log is not None:
            head = None
            if recipe.behavior_head and log.has_order:
                target = self._behavior_space(opened, log, seed=int(job.spec["seed"]))
                head = DecodeHead.fit(tok.encode(opened.embeddings), target)
            figures |= _behavior(tok, opened, log, head, replicates=recipe.replicates)
        return {
            "kind": row.kind,
            "items": len(opened.embeddings),
            "levels": tok.levels,
            "codebook_size": data.codebook_size,
            "latent": tok.latent_dim,
            **figures,
            "protocol": _protocol(tok, data, log),
            "fit_cpu_seconds": round(fitted, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _behavior_space(self, opened: Opened, log: Interactions, *, seed: int) -> Array:
        """Return directions ``(items, latent)`` of the contrastive encoder of a data set and seed.

        The same for every tokenizer, so that heads into it differ by the codes alone.
        """
        ties = () if log.ties == "file" else (log.ties,)  # names of before stay
        name = f"behavior-{digest([opened.digest, self.recipe.neural, seed, *ties])}"
        path = self.folder / "spaces" / f"{name}.npy"
        ledger = Ledger(self.folder)
        with ledger.lock(name):  # whoever comes first fits it; the others wait and read
            if not path.exists():
                arguments = {"levels": 1, "codebook_size": 2, "contrastive_weight": 1.0}
                encoder = make_tokenizer(
                    "drqvae", {**arguments, "seed": seed, **self.recipe.neural}
                )
                encoder.fit(opened.embeddings, interactions=log)
                latents = encoder.latent(opened.embeddings)
                lengths = np.linalg.norm(latents, axis=1, keepdims=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path, mark=False) as work, work.open("wb") as file:
                    np.save(file, latents / np.maximum(lengths, 1e-12))
        directions: Array = np.load(path)
        return directions


def training_share(log: Interactions, share: float) -> Interactions:
    """Return a log with a share of its training users, drawn by a hash, and with all others."""
    drawn = share_mask(hash_strings(log.user_ids, salt="share of the log"), 0.0, share)
    return log.where((drawn | (split_users(log.user_ids) != TRAIN))[log.users])


def _protocol(tok: Tokenizer, data: DataSet, log: Interactions | None) -> str:
    parts = [
        f"levels={tok.levels} codebook_size={data.codebook_size}",
        f"latent={tok.latent_dim}",
        f"held_out={tok.validation_fraction:g} of the items",
        f"evaluation_seed={EVALUATION_SEED}",
    ]
    if log is not None and log.has_order:
        where = f" of {', '.join(data.logs)}" if data.logs else ""
        where += "" if data.ties == "file" else ", ties shuffled"
        parts.append(f"behavior: consecutive items of a tenth of the users{where}")
    if tok.report is not None and "protocol" in tok.report.details:
        parts.append(str(tok.report.details["protocol"]))
    return "; ".join(parts)


GEOMETRY = (
    "participation_ratio",
    "effective_rank",
    "top_share",
    "mean_abs_cosine",
    "mean_abs_cosine_centered",
    "dim",
)
USAGE = ("perplexity", "active", "dead", "gini", "largest_share")
COLLISIONS = ("collision_rate", "unique_ids", "colliding_item_rate", "largest_bucket")


def _fields(result: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(result, name) for name in names}


def _figures(d: Diagnosis) -> dict[str, Any]:
    """Return what tables and claims need of a diagnosis."""
    errors, geometry = d.reconstruction, d.geometry
    return {
        "verdict": d.verdict.level,
        "geometry": geometry and {each.name: _fields(each, GEOMETRY) for each in geometry.spaces},
        "overlap": [_overlap(level) for level in d.overlap],
        "flips": d.flips and _flips(d.flips),
        "usage": [_fields(level, USAGE) for level in d.usage],
        "collisions": _fields(d.verdict.collisions, COLLISIONS),
        "decoder(codes)": {
            "mse": errors.mse_per_element,
            "normalized_squared_error": errors.normalized_squared_error,
            "cosine": errors.mean_cosine,
            "relative_error": errors.relative_error["all"],
            "relative_error_held_out": errors.relative_error.get("held_out"),
        },
    }


def _overlap(level: LevelOverlap) -> dict[str, Any]:
    points = level.points
    return {
        "scale": [p.scale for p in points],
        "rate": [p.rate for p in points],
        "collision_probability": points[0].collision_probability,
        "effective_size": [p.effective_size for p in points],
        "geometry_scale": level.geometry_scale,
    }


def _flips(flips: Flips) -> dict[str, Any]:
    """Return shares by scale: of every level's code and of whole ids, with the margin proxy."""
    by_space: dict[str, Any] = {"latent_is_input": flips.latent_is_input}
    for space, response in (("input", flips.input), ("latent", flips.latent)):
        if response is not None:
            points = response.flips.points
            by_space[space] = {
                "scale": [p.scale for p in points],
                "code": [[level.value for level in p.code] for p in points],
                "id": [p.prefix[-1].value for p in points],
                "margins": [list(p.code) for p in response.margins.points],
            }
    return by_space


def _values(estimates: Mapping[Any, Estimate | None]) -> dict[str, float | None]:
    return {str(key): None if e is None else e.value for key, e in estimates.items()}


def _intervals(estimates: Mapping[Any, Estimate | None]) -> dict[str, Any]:
    return {str(key): None if e is None else [e.low, e.high] for key, e in estimates.items()}


def _reconstructed(tok: Tokenizer, rows: Array) -> Array:
    """Return what the decoder makes of the latents themselves; without a decoder, the rows."""
    return tok.decode_latent(tok.latent(rows)) if tok.has_decoder else rows


def _continuous(tok: Tokenizer, source: EmbeddingSource) -> dict[str, Any]:
    """Measure decoder(z): what is lost before anything is quantized."""
    rows = source.rows(np.arange(len(source)))
    errors = reconstruction(rows, _reconstructed(tok, rows), name="decoder(z)")
    return {
        "mse": errors.mse,
        "normalized_squared_error": errors.normalized_error,
        "cosine": errors.cosine,
        "relative_error": errors.relative_error,
    }


def _behavior(
    tok: Tokenizer,
    opened: Opened,
    log: Interactions,
    head: DecodeHead | None,
    *,
    replicates: int,
) -> dict[str, Any]:
    """Measure retrieval and AUCs on the test users, and on relations where there are any.

    The figures of the users are None where the log has no order.
    """
    source = opened.pool(log)
    pairs, behavior, notes = behavior_pairs(log, source.ids)
    if pairs is None:
        return {"behavior": None}
    # Retrieval searches all items, so all of them are in memory, in each space once.
    rows = source.rows(np.arange(len(source)))
    codes = tok.encode(source).codes
    spaces = {
        "original": rows,
        "decoder(codes)": tok.decode(codes),
        "decoder(z)": _reconstructed(tok, rows),
    }
    if tok.has_decoder:  # else the sum of codewords is what the codes decode to
        spaces["latent(codes)"] = tok.quantize(codes)
    if head is not None:
        spaces["behavior head(codes)"] = head.predict(codes)
    if tok.decodes_behavior:
        spaces["decode_behavior(codes)"] = tok.decode_behavior(codes)
    pool = Pool(codes, tok.codebooks, spaces, hierarchical=tok.hierarchical)
    cutoffs, more = choose_cutoffs(None, len(source))

    def measure(pairs: ItemPairs, notes: Sequence[str]) -> dict[str, Any]:
        results = measure_pairs(
            pairs, pool, cutoffs=cutoffs, seed=EVALUATION_SEED, replicates=replicates, threads=None
        )
        retentions = results.retrieval.retention
        return {
            "pool": len(source),
            "test_users": behavior.test_users,
            "pairs": results.pairs.to_dict(),
            "cutoffs": list(cutoffs),
            "hit_rates": {each.name: _values(each.rates) for each in results.retrieval.hit_rates},
            "retention": {each.name: _values(each.above_chance) for each in retentions},
            "retention_interval": {each.name: _intervals(each.above_chance) for each in retentions},
            "discrete": _values(results.discrete.depths[-1].rates),
            "aucs": _values(results.aucs.aucs),
            "auc_intervals": _intervals(results.aucs.aucs),
            "notes": list(notes),
        }

    figures: dict[str, Any] = {"behavior": measure(pairs, [*notes, *more])}
    if opened.relations is not None:
        kinds, unknown = relations(opened.relations, source.ids)
        figures["relations"] = {kind: measure(each, unknown) for kind, each in kinds.items()}
    return figures
