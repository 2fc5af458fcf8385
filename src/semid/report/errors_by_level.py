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
        ``(items,)`` mask, or None where it is unknown or nothing was held out; and a sentence.
    """
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


def reconstruction_figures(
    tok: Tokenizer, seen: CataloguePass, held_out: Mask | None
) -> dict[str, Any]:
    """Errors of the whole code in the input space, and level by level in the latent space.

    Relative errors are over the variance of all rows given; None where all rows are equal.
    """
    groups: dict[str, Mask | slice] = {"all": slice(None)}
    if held_out is not None:
        groups |= {"training": ~held_out, "held_out": held_out}
    spread, latent_spread = seen.input.variance, seen.latent.variance

    def relative(values: npt.NDArray[np.float32], by: float) -> dict[str, float | None]:
        return {
            name: float(values[rows].mean(dtype=np.float64)) / by if by > 0 else None
            for name, rows in groups.items()
        }

    return {
        "space": "decoder(codes)",
        "mse_per_element": float(seen.errors.mean(dtype=np.float64)) / tok.dim,
        "normalized_squared_error": seen.normalized / seen.items,
        "mean_cosine": seen.cosine / seen.items,
        "relative_error": relative(seen.errors, spread),
        "per_level_kind": "prefix" if tok.hierarchical else "alone",
        "per_level": [
            {"level": level, **relative(seen.remaining[level], latent_spread)}
            for level in range(tok.levels)
        ],
        "variance": spread,
        "latent_variance": latent_spread,
    }
