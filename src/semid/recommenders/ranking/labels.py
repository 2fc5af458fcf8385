"""What counts as a click: a threshold on a column, or every interaction against drawn negatives."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semid.errors import InteractionsError, UsageError, check_choice
from semid.seeds import numpy_generator

__all__ = ["DISTRIBUTIONS", "Label", "draw_negatives"]

DISTRIBUTIONS = ("uniform", "popularity")
ROUNDS = 50
"""Draws a negative gets before it is given up: a user then has nearly every item of the pool."""

MAX_NEGATIVES = 1_000
"""Most negatives per positive; all of them are held in memory."""

_THRESHOLD = re.compile(r"\s*(\w+)\s*(>=|>)\s*(-?[0-9]+(?:\.[0-9]+)?)\s*")
_SAMPLED = re.compile(r"\s*sampled\(\s*(\w+)\s*(?:,\s*([0-9]+)\s*)?\)\s*")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Label:
    """How rows get their label.

    Attributes:
        column: the column that is compared with ``threshold``; empty for sampled negatives.
        threshold: what it is compared with.
        strict: whether the column has to exceed the threshold (``>``) or reach it (``>=``).
        distribution: which items negatives are drawn from, ``uniform`` or ``popularity``
            (in proportion to their training interactions); empty for a column.
        negatives: negatives a positive.
    """

    column: str = ""
    threshold: float = 0.0
    strict: bool = False
    distribution: str = ""
    negatives: int = 0

    @classmethod
    def parse(cls, text: str) -> Label:
        """Read ``rating>=8``, ``rating>3``, ``click>=1`` or ``sampled(uniform,1)``.

        Raises:
            UsageError: it is none of these.
        """
        found = _THRESHOLD.fullmatch(text)
        if found:
            return cls(column=found[1], threshold=float(found[3]), strict=found[2] == ">")
        found = _SAMPLED.fullmatch(text)
        if not found:
            raise UsageError(
                f"--label '{text}' (label=) is neither COLUMN>=NUMBER, COLUMN>NUMBER nor "
                "sampled(uniform,k) or sampled(popularity,k)"
            )
        check_choice("--label sampled", found[1], DISTRIBUTIONS)
        count = int((found[2] or "1").lstrip("0")[:9] or 0)
        if not 1 <= count <= MAX_NEGATIVES:
            raise UsageError(
                f"--label '{text}' (label=) says how many negatives are drawn for each positive; "
                f"give 1 to {MAX_NEGATIVES}"
            )
        return cls(distribution=found[1], negatives=count)

    @property
    def sampled(self) -> bool:
        """Whether negatives are drawn."""
        return bool(self.distribution)

    def __str__(self) -> str:
        """Write it as `parse` reads it."""
        if self.sampled:
            return f"sampled({self.distribution},{self.negatives})"
        return f"{self.column}{'>' if self.strict else '>='}{self.threshold:g}"

    def of(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Label the values ``(rows,)`` of the column.

        Raises:
            InteractionsError: values are missing, or all rows get one label.
        """
        missing = ~np.isfinite(values)
        if missing.any():
            raise InteractionsError(
                f"column '{self.column}' holds {int(missing.sum())} rows without a number (first: "
                f"row {int(np.argmax(missing))}), which have no label under '{self}'; drop them"
            )
        positive = values > self.threshold if self.strict else values >= self.threshold
        if len(values) and positive.all() != positive.any():
            return positive
        which = "positive" if positive.any() else "negative"
        low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
        raise InteractionsError(
            f"every row is {which} under --label '{self}' (column '{self.column}' runs from "
            f"{low:g} to {high:g}); choose another threshold, or sampled(uniform,1)"
        )


def draw_negatives(
    users: Ints,
    *,
    taken: tuple[Ints, Ints],
    pool: Ints,
    weights: Ints | None,
    items: int,
    seed: int,
    name: str,
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Draw an item for each row that its user has not taken.

    Args:
        users: ``(rows,)`` the user of each row.
        taken: users and items ``(pairs,)`` of what must not be drawn.
        pool: ``(pool,)`` items to draw from.
        weights: ``(pool,)`` non-negative; None draws evenly.
        items: number of items, above every item.
        seed: any integer.
        name: which draw this is; another name draws independently.

    Returns:
        Items ``(rows,)`` and a mask of the rows that found one.

    Cost: one sort of the pairs, then a binary search a draw.
    """
    keys = np.unique(taken[0] * items + taken[1])
    generator = numpy_generator(seed, "negatives", name)
    share = None if weights is None else np.cumsum(weights, dtype=np.float64)
    drawn = np.zeros(len(users), dtype=np.int64)
    open_ = np.arange(len(users))
    for _ in range(ROUNDS):
        if not len(open_):
            break
        if share is None:
            chosen = pool[generator.integers(0, len(pool), len(open_))]
        else:
            at = np.searchsorted(share, generator.random(len(open_)) * share[-1], side="right")
            chosen = pool[np.minimum(at, len(pool) - 1)]
        drawn[open_] = chosen
        wanted = users[open_] * items + chosen
        at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        open_ = open_[keys[at] == wanted] if len(keys) else open_[:0]
    found = np.ones(len(users), dtype=bool)
    found[open_] = False
    return drawn, found
