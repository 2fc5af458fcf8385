"""Reconstruction errors of a pass, and which rows the fit held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.ids import held_out_mask
from semid.data.source import EmbeddingSource
from semid.report.measure import CataloguePass
from semid.tokenizers.base import HELD_OUT_SALT, Tokenizer

__all__ = ["held_out_rows", "reconstruction_figures"]

Mask = npt.NDArray[np.bool_]


def held_out_rows(tok: Tokenizer, source: EmbeddingSource) -> tuple[Mask | None, str]:
    """Find the rows the fit held out, where these look like the rows it was given.

    Returns:
        ``(items,)`` mask, or None where it is unknown; and a sentence.
    """
    mask = held_out_mask(source.ids, tok.validation_fraction, salt=HELD_OUT_SALT)
    fit = tok.report
    if fit is None or (fit.items, fit.held_out_items) != (len(mask), int(mask.sum())):
        return None, (
            "These are not the rows the model was fitted on (or they carry other ids), so errors "
            "are of all rows together"
        )
    if not mask.any():
        return mask, "The fit held no rows out, so every error here is on rows it has seen"
    return mask, (
        f"{int(mask.sum()):,} of {len(mask):,} items were held out of the fit; their error is the "
        "one to believe"
    )


def reconstruction_figures(
    tok: Tokenizer, seen: CataloguePass, held_out: Mask | None
) -> dict[str, Any]:
    """Errors of the whole code in the input space, and level by level in the latent space.

    The relative error of some rows is their summed squared error over their summed squared distance
    to the mean of all rows; None where all of them lie at the mean. Groups: ``all`` and, where the
    rows are those of the fit, ``training`` and ``held_out``.
    """
    groups: dict[str, Mask | slice] = {"all": slice(None)}
    spreads = {"all": seen.latent.spread_about(seen.latent)}
    if held_out is not None:
        of_held_out = seen.held_out_latent.spread_about(seen.latent)
        groups |= {"training": ~held_out, "held_out": held_out}
        spreads |= {"training": spreads["all"] - of_held_out, "held_out": of_held_out}
    relative = seen.health.relative_errors
    return {
        "space": "decoder(codes)",
        "mse_per_element": float(seen.errors.mean(dtype=np.float64)) / tok.dim,
        "normalized_squared_error": seen.normalized / seen.items,
        "mean_cosine": seen.cosine / seen.items,
        "relative_error": relative,
        "per_level_kind": "prefix" if tok.hierarchical else "alone",
        "per_level": [
            {
                "level": level,
                **{
                    name: float(seen.remaining[level][groups[name]].sum(dtype=np.float64))
                    / spreads[name]
                    if spreads[name] > 0
                    else None
                    for name in relative
                },
            }
            for level in range(tok.levels)
        ],
        "variance": float(seen.health.inputs.variances.sum()),
        "latent_variance": seen.latent.variance,
    }
