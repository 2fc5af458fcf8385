"""Two generations of a tokenizer: match codewords by number, count changed ids.

Codewords of a level may be numbered in any way without changing what they encode. Choosing the
numbers by assignment keeps as many published codes as numbering alone can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.assignment import assign_rows
from semid.data.ids import ItemIds
from semid.data.interactions import Interactions
from semid.errors import InputError, UsageError
from semid.results import Result

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Churn(Result):
    """Shares of the items in both generations whose codes changed.

    Attributes:
        items: items in both generations.
        moved: items whose id changed.
        level: share whose code at each level changed.
        prefix: share whose prefix of 1, 2, ... codes changed; the last is the whole id.
        weighted_level: ``level`` with items weighted by popularity; None without weights.
        weighted_prefix: ``prefix`` with items weighted by popularity; None without weights.
    """

    items: int
    moved: int
    level: tuple[float, ...]
    prefix: tuple[float, ...]
    weighted_level: tuple[float, ...] | None = None
    weighted_prefix: tuple[float, ...] | None = None
    derived = ("share",)

    @property
    def share(self) -> float:
        """Share of the items whose id changed."""
        return self.prefix[-1]


def churn(old: Codes, new: Codes, *, weights: npt.NDArray[np.float64] | None = None) -> Churn:
    """Compare the codes ``(items, levels)`` of the same items in two generations.

    ``weights`` is nonnegative popularity ``(items,)``; if all are zero, so are the weighted shares.
    """
    if old.shape != new.shape or old.ndim != 2:
        raise InputError(f"codes have shapes {old.shape} and {new.shape}; give (items, levels)")
    changed = old != new
    by_prefix = np.logical_or.accumulate(changed, axis=1)
    normalized = None if weights is None else weights / max(float(weights.sum()), 1e-300)

    def mean(mask: npt.NDArray[np.bool_]) -> tuple[float, ...]:
        return tuple(mask.mean(axis=0).tolist()) if len(mask) else (0.0,) * mask.shape[1]

    def weighted(mask: npt.NDArray[np.bool_]) -> tuple[float, ...] | None:
        return None if normalized is None else tuple((normalized @ mask).tolist())

    return Churn(
        items=len(old),
        moved=int(by_prefix[:, -1].sum()),
        level=mean(changed),
        prefix=mean(by_prefix),
        weighted_level=weighted(changed),
        weighted_prefix=weighted(by_prefix),
    )


def item_counts(log: Interactions, items: ItemIds) -> npt.NDArray[np.float64]:
    """Return the number of interactions of each item: ``(items,)`` float64."""
    rows = log.catalogue_rows(items)
    counts = np.bincount(log.items, minlength=len(rows))
    result = np.zeros(len(items))
    result[rows[rows >= 0]] = counts[rows >= 0]
    return result


def match_codes(
    old: Codes,
    new: Codes,
    old_codebook: Array,
    new_codebook: Array,
    *,
    weights: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """Match the codewords ``(codes, latent)`` of one level by the items of two generations.

    ``old``, ``new`` and the positive ``weights`` are ``(shared,)``. Returns the number of each new
    codeword, a permutation ``(codes,)``: the largest possible weight of items keeps its code at
    this level. Among equal solutions (above all for dead codes) the sum of squared distances
    between old and new codewords is smallest. Cost: ``O(codes^3)`` at worst.
    """
    if old_codebook.shape != new_codebook.shape:
        raise UsageError(
            f"codebooks have shapes {old_codebook.shape} and {new_codebook.shape}; a refresh keeps "
            "the codebook sizes and the width"
        )
    codes = len(new_codebook)
    # Cost of giving new codeword i the number j: minus the weight of the items that would keep j.
    # weight[new, old]: weight of the items that have these two codes.
    pair = new.astype(np.int64) * codes + old.astype(np.int64)
    weight = np.bincount(pair, weights=weights, minlength=codes * codes).reshape(codes, codes)
    a, b = new_codebook.astype(np.float64), old_codebook.astype(np.float64)
    distance = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * (a @ b.T), 0.0)
    # Distances only break ties: scaled like this, all of them together count less than half of the
    # lightest item.
    largest = max(float(distance.max()), 1e-300)
    lightest = 1.0 if weights is None else float(weight[weight > 0].min(initial=1.0))
    return assign_rows(-weight + distance * (0.5 * lightest / codes / largest))
