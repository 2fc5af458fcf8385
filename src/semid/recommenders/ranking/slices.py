"""The same figures for the items that matter apart: unseen, rarely shown, head and tail."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from semid.diagnostics.popularity import SEGMENTS, popularity_segments
from semid.recommenders.ranking.metrics import Metrics, measure

__all__ = ["FEW", "SLICES", "measure_slices", "slice_masks"]

FEW = 10
"""An item with 1 to so many training interactions has few impressions."""

SLICES = ("unseen", "few", *SEGMENTS[:3])


def slice_masks(
    items: npt.NDArray[np.int64], interactions: npt.NDArray[np.int64], *, few: int = FEW
) -> dict[str, npt.NDArray[np.bool_]]:
    """Sort rows by their item.

    Args:
        items: ``(rows,)`` catalogue rows.
        interactions: ``(items + 1,)`` training interactions of each; row 0 is the unknown item.
        few: most interactions of an item with few.

    Returns:
        A mask ``(rows,)`` by name: ``unseen`` (no training interaction), ``few``, and ``head``,
        ``mid``, ``tail`` of the seen items (10, 40 and 50 % of them, by interactions).
    """
    counts = interactions[items]
    segment = popularity_segments(interactions)[items]
    masks = {"unseen": counts == 0, "few": (counts >= 1) & (counts <= few)}
    for number, name in enumerate(SEGMENTS[:3]):
        masks[name] = segment == number
    return masks


def measure_slices(
    labels: npt.NDArray[Any],
    logits: npt.NDArray[np.floating[Any]],
    *,
    users: npt.NDArray[Any],
    items: npt.NDArray[np.int64],
    interactions: npt.NDArray[np.int64],
    positives: npt.NDArray[np.int64],
    few: int = FEW,
) -> dict[str, Metrics]:
    """Measure every slice that holds rows; arguments as for `measure` and `slice_masks`."""
    found = {}
    for name, mask in slice_masks(items, interactions, few=few).items():
        if mask.any():
            found[name] = measure(
                labels[mask],
                logits[mask],
                users=users[mask],
                popularity=positives[items[mask]],
            )
    return found
