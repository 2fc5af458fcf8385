"""`semid.diagnose`: run the diagnostics that fit what was given, and gather the results."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.embeddings import open_embeddings
from semid.data.ids import held_out_mask
from semid.data.source import EmbeddingSource
from semid.diagnostics.overlap import LevelOverlap, overlap_levels
from semid.errors import UsageError
from semid.health import Verdict, verdict
from semid.progress import Progress, QuietProgress
from semid.report.diagnosis import Diagnosis
from semid.report.explorer import MOST_ITEMS, build_explorer, largest_buckets
from semid.report.findings import extra_findings, judge
from semid.report.measure import CataloguePass, measure_catalogue, rank_frequency
from semid.report.texts import load_texts
from semid.tokenizers.base import HELD_OUT_SALT, Tokenizer

__all__ = ["diagnose"]

_log = logging.getLogger(__name__)


def diagnose(
    tok: Tokenizer,
    x: Any,
    *,
    ids: Any = None,
    items: Any = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure whether a tokenizer's codes are good, and say what is wrong.

    Args:
        tok: a fitted tokenizer.
        x: embeddings ``(items, dim)``: anything `semid.open_embeddings` reads.
        ids: item ids for embeddings that have none; a table with titles serves as ``items`` too.
        items: table with ``item_id`` and ``title`` or ``text``, for names in the report.
        seed: draws the samples.
        threads: plain threads; None takes what the machine allows. Results do not depend on it.
        progress: told about every step; silent by default.

    Returns:
        A `Diagnosis`; ``.write("report.html")`` makes the page.

    Raises:
        EmbeddingError: rows of another width than the tokenizer's, or that are not finite.
        UsageError: something that is not a tokenizer, or options that do not fit.

    Memory: about ``30 + 6 levels`` bytes an item, and a few blocks of 65,536 rows.
    """
    if not isinstance(tok, Tokenizer):
        raise UsageError(
            f"tok is a {type(tok).__name__}; give a fitted tokenizer, for example semid.load('model/')"
        )
    steps = progress or QuietProgress()
    source = open_embeddings(x, ids=ids)
    given = items if items is not None else ids
    texts, notes = load_texts(given, source.ids, required=items is not None)
    seen = measure_catalogue(tok, source, steps)
    held_out, held_note = _held_out(tok, source)
    notes.append(held_note)
    steps.start("overlap")
    overlaps = _overlaps(tok, seen, threads)
    reconstruction = _reconstruction(tok, seen, held_out)
    judged = _judge(seen, overlaps, reconstruction)
    steps.start("explorer")
    spread = 2.0 * seen.latent.variance
    relative = seen.errors / seen.input.variance if seen.input.variance > 0 else seen.errors * 0
    explorer = build_explorer(
        seen.codes,
        source.ids,
        texts,
        tok.codebooks,
        hierarchical=tok.hierarchical,
        values={"error": relative},
        item_spread=spread,
        seed=seed,
    )
    return Diagnosis(
        model=_model(tok),
        data={"items": len(source), "dim": source.dim, "label": source.label},
        protocol=_protocol(tok, source, seed),
        verdict=judged,
        usage=tuple({**u.to_dict(), "rank_frequency": rank_frequency(u)} for u in seen.usage),
        reconstruction=reconstruction,
        overlap=tuple(level.to_dict() for level in overlaps),
        buckets=largest_buckets(seen.codes, seen.keys, seen.hashes, source.ids, texts),
        notes=tuple(notes),
        explorer=explorer,
    )


def _model(tok: Tokenizer) -> dict[str, Any]:
    return {
        "kind": tok.kind,
        "name": type(tok).__name__,
        "levels": tok.levels,
        "codebook_sizes": list(tok.codebook_sizes),
        "hierarchical": tok.hierarchical,
        "dim": tok.dim,
        "latent": int(tok.codebooks[0].shape[1]),
        "beam_width": tok.beam_width,
        "settings": tok.settings,
        "codebook_fingerprint": tok.codebook_fingerprint,
        "weights_fingerprint": tok.weights_fingerprint,
    }


def _protocol(tok: Tokenizer, source: EmbeddingSource, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "explorer_items": min(len(source), MOST_ITEMS),
        "held_out": f"fraction {tok.validation_fraction:g} of the items, by a hash of their id "
        f"(salt '{HELD_OUT_SALT}')",
    }


def _held_out(tok: Tokenizer, source: EmbeddingSource) -> tuple[npt.NDArray[np.bool_] | None, str]:
    """Find the rows the fit held out, where these look like the rows it was given."""
    mask = held_out_mask(source.ids, tok.validation_fraction, salt=HELD_OUT_SALT)
    fit = tok.report
    if fit is None or (fit.items, fit.held_out_items) != (len(mask), int(mask.sum())):
        return None, (
            "These are not the rows the model was fitted on (or they carry other ids), so errors "
            "are of all rows together"
        )
    if not mask.any():
        return None, "The fit held no rows out, so every error here is on rows it has seen"
    return mask, (
        f"{int(mask.sum()):,} of {len(mask):,} items were held out of the fit; their error is the "
        "one to believe"
    )


def _overlaps(tok: Tokenizer, seen: CataloguePass, threads: int | None) -> tuple[LevelOverlap, ...]:
    """Sweep the overlap of every level; nothing where all latents are equal."""
    std = float(np.sqrt(seen.latent.variances.mean()))
    if std <= 0:
        return ()
    return overlap_levels(tok.codebooks, seen.usage, latent_std=std, threads=threads)


def _reconstruction(
    tok: Tokenizer, seen: CataloguePass, held_out: npt.NDArray[np.bool_] | None
) -> dict[str, Any]:
    """Errors of the whole code in the input space, and level by level in the latent space."""
    groups: dict[str, npt.NDArray[np.bool_] | slice] = {"all": slice(None)}
    if held_out is not None:
        groups |= {"training": ~held_out, "held_out": held_out}
    spread, latent_spread = seen.input.variance, seen.latent.variance
    relative = {
        name: _ratio(float(seen.errors[rows].mean(dtype=np.float64)), spread)
        for name, rows in groups.items()
    }
    per_level = [
        {
            "level": level,
            **{
                name: _ratio(
                    float(seen.remaining[level][rows].mean(dtype=np.float64)), latent_spread
                )
                for name, rows in groups.items()
            },
        }
        for level in range(tok.levels)
    ]
    return {
        "space": "decoder(codes)",
        "mse_per_element": float(seen.errors.mean(dtype=np.float64)) / tok.dim,
        "normalized_squared_error": seen.normalized / seen.items,
        "mean_cosine": seen.cosine / seen.items,
        "relative_error": relative,
        "per_level_kind": "prefix" if tok.hierarchical else "alone",
        "per_level": per_level,
        "variance": spread,
        "latent_variance": latent_spread,
    }


def _ratio(value: float, by: float) -> float | None:
    return value / by if by > 0 else None


def _judge(
    seen: CataloguePass, overlaps: tuple[LevelOverlap, ...], reconstruction: dict[str, Any]
) -> Verdict:
    relative = reconstruction["relative_error"]
    base = verdict(
        seen.usage,
        seen.collisions,
        training_error=relative.get("training", relative["all"]),
        validation_error=relative.get("held_out"),
        effective_sizes=[level.at(0.1).effective_size for level in overlaps] or None,
    )
    return judge(base, extra_findings(seen.input, seen.latent, overlaps))
