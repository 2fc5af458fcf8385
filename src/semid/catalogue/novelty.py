"""Whether the codebooks cover an item: its residual norm against the training distribution's.

The reference are the items that the fit held out, where there are enough of them: codewords sit
closer to the rows they were trained on, so training rows would call too many new items novel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from semid.codes import SemanticIds
from semid.data.ids import held_out_mask
from semid.errors import UsageError
from semid.tokenizers.base import HELD_OUT_SALT, Tokenizer

__all__ = ["LEAST_REFERENCE", "NOVEL", "norm_quantiles", "novelty"]

NOVEL = 0.99
"""An item is flagged beyond this share of the reference: one in a hundred of a like catalogue."""

LEAST_REFERENCE = 200
"""Held-out items below which all items are the reference: two would lie beyond `NOVEL`."""

STEPS = 201


def norm_quantiles(ids: SemanticIds, tokenizer: Tokenizer) -> tuple[float, ...]:
    """Return the reference that new items are judged against.

    Args:
        ids: the catalogue that the tokenizer was fitted on; if they carry a reference from an
            earlier addition, that is returned, so that it does not move as items come in.
        tokenizer: says which items it held out.

    Returns:
        201 residual norms at even steps from the smallest to the largest.

    Raises:
        UsageError: if no residual norm is known.
    """
    if ids.info.norm_quantiles is not None:
        return ids.info.norm_quantiles
    held = held_out_mask(ids.items, tokenizer.validation_fraction, salt=HELD_OUT_SALT)
    norms = ids.residual_norms
    if held.sum() >= LEAST_REFERENCE:
        norms = norms[held]
    norms = norms[np.isfinite(norms)]
    if len(norms) == 0:
        raise UsageError(
            "the catalogue knows no residual norms, so novelty cannot be judged; encode it with "
            "'semid encode' instead of importing it"
        )
    return tuple(np.quantile(norms.astype(np.float64), np.linspace(0, 1, STEPS)).tolist())


def novelty(
    norms: npt.NDArray[np.float32], quantiles: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """Return for each residual norm the share of the reference that lies below it.

    Args:
        norms: ``(items,)``.
        quantiles: from `norm_quantiles`.

    Returns:
        ``(items,)`` float64 in [0, 1], interpolated between the quantiles; 1 is beyond everything
        in the reference.
    """
    grid = np.linspace(0, 1, len(quantiles))
    points = np.asarray(quantiles)
    # Where quantiles repeat, the highest share counts: as many lie at or below.
    last = np.append(points[1:] != points[:-1], True)
    found: npt.NDArray[np.float64] = np.interp(
        norms.astype(np.float64), points[last], grid[last], left=0.0, right=1.0
    )
    return found
