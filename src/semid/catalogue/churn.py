"""How many items change their ids between two generations, by level, by prefix, by popularity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.ids import ItemIds
from semid.data.interactions import Interactions
from semid.errors import InputError

__all__ = ["Churn", "churn", "item_counts"]


@dataclass(frozen=True)
class Churn:
    """Shares of the shared items; weighted ones count an item by its popularity.

    Attributes:
        items: items in both generations.
        moved: items whose id changed.
        level: share whose code at each level changed.
        prefix: share whose prefix of 1, 2, ... codes changed; the last is the whole id.
        weighted_level: the same by weight; None without weights.
        weighted_prefix: the same by weight; None without weights.
    """

    items: int
    moved: int
    level: tuple[float, ...]
    prefix: tuple[float, ...]
    weighted_level: tuple[float, ...] | None = None
    weighted_prefix: tuple[float, ...] | None = None

    @property
    def share(self) -> float:
        """Share of the items whose id changed."""
        return self.prefix[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {**self.__dict__, "share": self.share}


def churn(
    old: npt.NDArray[np.integer[Any]],
    new: npt.NDArray[np.integer[Any]],
    *,
    weights: npt.NDArray[np.float64] | None = None,
) -> Churn:
    """Compare the codes of the same items in two generations.

    Args:
        old: ``(items, levels)``.
        new: ``(items, levels)``.
        weights: ``(items,)`` popularity, not negative; None gives no weighted shares. If all are
            zero the weighted shares are 0.

    Raises:
        InputError: if the shapes differ.
    """
    if old.shape != new.shape or old.ndim != 2:
        raise InputError(f"codes have shapes {old.shape} and {new.shape}; give (items, levels)")
    changed = old != new
    by_prefix = np.logical_or.accumulate(changed, axis=1)
    mass = None if weights is None else weights / max(float(weights.sum()), 1e-300)

    def shares(table: npt.NDArray[np.bool_], by: Any) -> tuple[float, ...]:
        if not len(table):
            return tuple(0.0 for _ in range(table.shape[1]))
        found: list[float] = (table.mean(axis=0) if by is None else by @ table).tolist()
        return tuple(found)

    return Churn(
        items=len(old),
        moved=int(by_prefix[:, -1].sum()),
        level=shares(changed, None),
        prefix=shares(by_prefix, None),
        weighted_level=None if mass is None else shares(changed, mass),
        weighted_prefix=None if mass is None else shares(by_prefix, mass),
    )


def item_counts(log: Interactions, items: ItemIds) -> npt.NDArray[np.float64]:
    """Count each item's interactions: its popularity, ``(items,)`` float64.

    Raises:
        InteractionsError: if not one item of the log is in the catalogue.
    """
    rows = log.catalogue_rows(items)
    counts = np.bincount(log.items, minlength=len(rows))
    result = np.zeros(len(items))
    result[rows[rows >= 0]] = counts[rows >= 0]
    return result
