"""The runs behind the DRQ paper's tables: fit a tokenizer, measure all its views, keep figures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.interactions import Interactions
from semid.data.source import EmbeddingSource
from semid.diagnostics.overlap import LevelOverlap
from semid.diagnostics.pairs import Estimate
from semid.diagnostics.spaces import reconstruction
from semid.report.behavior import Pool, behavior_pairs, choose_cutoffs, measure_pairs
from semid.report.diagnose import diagnose
from semid.report.results import Diagnosis, Flips
from semid.reproduce.datasets import Opened, open_all, open_data
from semid.reproduce.ledger import Ledger, digest
from semid.reproduce.pool import Job
from semid.reproduce.recipe import DataSet, DrqRecipe, TokenizerSpec
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.factory import make_tokenizer

EVALUATION_SEED = 0
"""Of noise, subsets, negatives, ties and bootstrap: the same for every tokenizer and seed."""

Array = npt.NDArray[np.float32]


def drq_cells(recipe: DrqRecipe) -> list[dict[str, Any]]:
    """List every run of a recipe, data set by data set, without opening any data."""
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


def drq_title(spec: Mapping[str, Any]) -> str:
    """Name a run for people."""
    variant = f" ({spec['variant']})" if spec["variant"] else ""
    return f"{spec['data']}, {spec['tokenizer']}{variant}, seed {spec['seed']}"


def drq_jobs(
    recipe: DrqRecipe, data: Path | None, folder: Path
) -> tuple[list[Job], dict[str, str]]:
    """List the runs, the most informative first.

    The paper's five rows on every data set, seed by seed, smaller codebooks first; then variants.

    Returns the jobs, and data set -> why it cannot be run.
    """
    opened, absent = open_all(recipe.data, data, Ledger(folder))
    cells = [cell for cell in drq_cells(recipe) if cell["data"] in opened]
    sizes = {d.name: d.codebook_size for d in recipe.data}
    # The sort keeps the order of data sets and rows among equals.
    cells.sort(key=lambda cell: (bool(cell["variant"]), sizes[cell["data"]], cell["seed"]))
    return [_job(recipe, cell, opened[cell["data"]].digest) for cell in cells], absent


def _parts(recipe: DrqRecipe, spec: Mapping[str, Any]) -> tuple[DataSet, TokenizerSpec]:
    """Return the data set and the row of a run."""
    data = next(d for d in recipe.data if d.name == spec["data"])
    row = (spec["tokenizer"], spec["variant"])
    return data, next(t for t in recipe.tokenizers if (t.name, t.variant) == row)


def _job(recipe: DrqRecipe, spec: dict[str, Any], files: str) -> Job:
    data, row = _parts(recipe, spec)
    shared = {
        "paper": recipe.paper,
        "revision": recipe.revision,
        "quick": recipe.quick,
        "files": files,
        "codebook_size": data.codebook_size,
        "logs": data.logs,
        "levels": recipe.levels,
        "geometry_sample": recipe.geometry_sample,
        "flip_sample": recipe.flip_sample,
        "replicates": recipe.replicates,
        "neural": recipe.neural,
    }
    single = {**spec, "kind": row.kind, "options": row.options, "behavior": row.behavior}
    return Job(digest([shared, single]), drq_title(spec), spec, settings=digest(shared))


@dataclass
class DrqRunner:
    """Runs jobs of `drq_jobs`.

    Args:
        recipe: what to run.
        data: folder of data sets.
        folder: of the ledger.
    """

    recipe: DrqRecipe
    data: Path | None
    folder: Path
    _opened: dict[str, tuple[Opened, Interactions | None]] = field(default_factory=dict)

    def __call__(self, job: Job) -> dict[str, Any]:
        """Fit, diagnose and sum up."""
        data, row = _parts(self.recipe, job.spec)
        if data.name not in self._opened:
            current = open_data(data, self.data, Ledger(self.folder))
            self._opened = {data.name: (current, current.log())}  # one at a time: they are large
        opened, log = self._opened[data.name]
        began, cpu = time.perf_counter(), time.process_time()
        neural = {} if row.kind == "rqkmeans" else self.recipe.neural
        tok = make_tokenizer(
            row.kind,
            {
                "levels": self.recipe.levels,
                "codebook_size": data.codebook_size,
                "seed": int(job.spec["seed"]),
                **neural,
                **row.options,
            },
        )
        tok.fit(opened.embeddings, interactions=log if row.behavior else None)
        fitted = time.process_time() - cpu
        diagnosis = diagnose(
            tok,
            opened.embeddings,
            seed=EVALUATION_SEED,
            geometry_sample=self.recipe.geometry_sample,
            flip_sample=self.recipe.flip_sample,
            explorer=False,
        )
        figures = _figures(diagnosis)
        figures["decoder(z)"] = _continuous(tok, opened.embeddings)
        if log is not None:
            figures["behavior"] = _behavior(
                tok, opened.pool(log), log, replicates=self.recipe.replicates
            )
        return {
            "kind": row.kind,
            "items": len(opened.embeddings),
            "levels": tok.levels,
            "codebook_size": data.codebook_size,
            "latent": int(tok.codebooks[0].shape[1]),
            **figures,
            "protocol": _protocol(tok, data, log),
            "fit_cpu_seconds": round(fitted, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }


def _protocol(tok: Tokenizer, data: DataSet, log: Interactions | None) -> str:
    report = tok.report
    parts = [
        f"levels={tok.levels} codebook_size={data.codebook_size}",
        f"latent={tok.codebooks[0].shape[1]}",
        f"held_out={tok.validation_fraction:g} of the items",
        f"evaluation_seed={EVALUATION_SEED}",
    ]
    if log is not None:
        where = f" of {', '.join(data.logs)}" if data.logs else ""
        parts.append(f"behavior: consecutive items of a tenth of the users{where}")
    if report is not None and "protocol" in report.details:
        parts.append(str(report.details["protocol"]))
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
    geometry = None
    if d.geometry is not None:
        geometry = {space.name: _fields(space, GEOMETRY) for space in d.geometry.spaces}
    errors = d.reconstruction
    return {
        "verdict": d.verdict.level,
        "geometry": geometry,
        "overlap": [_overlap(level) for level in d.overlap],
        "flips": None if d.flips is None else _flips(d.flips),
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
        "geometry_scale": next((p.scale for p in points if not p.usage_only), None),
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
    found = reconstruction(rows, _reconstructed(tok, rows), name="decoder(z)")
    return {
        "mse": found.mse,
        "normalized_squared_error": found.normalized_error,
        "cosine": found.cosine,
        "relative_error": found.relative_error,
    }


def _behavior(
    tok: Tokenizer, source: EmbeddingSource, log: Interactions, *, replicates: int
) -> dict[str, Any] | None:
    """Measure retrieval and AUCs on the test users; None where the log has no order."""
    pairs, behavior, notes = behavior_pairs(log, source.ids)
    if pairs is None:
        return None
    rows = source.rows(np.arange(len(source)))
    codes = tok.encode(source).codes
    spaces = {
        "original": rows,
        "decoder(codes)": tok.decode(codes),
        "decoder(z)": _reconstructed(tok, rows),
    }
    if tok.decodes_behavior:
        spaces["decode_behavior(codes)"] = tok.decode_behavior(codes)
    pool = Pool(codes, tok.codebooks, spaces, hierarchical=tok.hierarchical)
    cutoffs, more = choose_cutoffs(None, len(source))
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
        "notes": [*notes, *more],
    }
