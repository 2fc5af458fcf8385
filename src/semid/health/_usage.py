"""How evenly each level uses its codebook: perplexity, active and dead codes, Gini."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError

__all__ = ["LevelUsage", "UsageCounter", "check_codes", "usage", "usage_from_counts"]


@dataclass(frozen=True)
class LevelUsage:
    """Usage of one level's codebook.

    Attributes:
        level: level, counted from 0.
        codebook_size: K, codewords in the codebook.
        items: items counted.
        perplexity: ``exp(H)`` of the code frequencies, H in nats; between 1 and ``active``.
        active: codes with at least one item.
        dead: codes with none, ``codebook_size - active``.
        gini: Gini coefficient of the frequencies over all K codes, zeros included; 0 is even
            use, ``1 - 1/K`` is everything in one code.
        largest_share: share of the items that the most used code holds.
        floor: distribution floor ``sum_i p_i^2``, the overlap rate that no geometry can lower
            (DRQ eq. 1); ``1 / floor <= perplexity``.
        counts: items per code, int64 ``(codes,)``.
    """

    level: int
    codebook_size: int
    items: int
    perplexity: float
    active: int
    dead: int
    gini: float
    largest_share: float
    floor: float
    counts: npt.NDArray[np.int64] = field(repr=False, compare=False)

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Share of the items that hold each code, float64 ``(codes,)``."""
        return self.counts / self.items

    def to_dict(self, *, counts: bool = False) -> dict[str, Any]:
        """Return a JSON-able dict; ``counts=True`` adds the items per code."""
        result: dict[str, Any] = {
            "level": self.level,
            "codebook_size": self.codebook_size,
            "items": self.items,
            "perplexity": self.perplexity,
            "active": self.active,
            "dead": self.dead,
            "gini": self.gini,
            "largest_share": self.largest_share,
            "floor": self.floor,
        }
        if counts:
            result["counts"] = self.counts.tolist()
        return result


def _sizes(codebook_sizes: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """Return one codebook size a level from one size or a sequence of them."""
    if isinstance(codebook_sizes, (int, np.integer)):
        sizes = (int(codebook_sizes),) * levels
    else:
        sizes = tuple(int(size) for size in codebook_sizes)
    if len(sizes) != levels:
        raise UsageError(f"codebook_sizes has {len(sizes)} entries, but the codes {levels} levels")
    if any(size < 1 for size in sizes):
        raise UsageError(f"codebook_sizes={list(sizes)}: every codebook size must be at least 1")
    return sizes


def check_codes(
    codes: npt.ArrayLike, codebook_sizes: int | Sequence[int] | None = None
) -> npt.NDArray[np.integer[Any]]:
    """Check that an array is codes and return it, unchanged and not copied.

    Args:
        codes: integers ``(items, levels)``, each in ``[0, K)`` of its level.
        codebook_sizes: K for every level or one a level; None checks only the lower end.

    Raises:
        InputError: not an integer ``(items, levels)`` array with at least one row and one level,
            or codes out of range; every bad level is named.
    """
    array = np.asarray(codes)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] == 0:
        raise InputError(
            f"codes have shape {array.shape}; (items, levels) with at least one item and one "
            "level is needed; give a single level as codes[:, None]"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"codes have dtype {array.dtype}; an integer dtype is needed")
    sizes = None if codebook_sizes is None else _sizes(codebook_sizes, array.shape[1])
    problems = []
    for level in range(array.shape[1]):
        low, high = int(array[:, level].min()), int(array[:, level].max())
        top = None if sizes is None else sizes[level]
        if low < 0 or (top is not None and high >= top):
            allowed = "at least 0" if top is None else f"0 to {top - 1}"
            problems.append(f"level {level} holds codes {low} to {high}; allowed: {allowed}")
    if problems:
        raise InputError(problems)
    return array


def usage_from_counts(counts: npt.ArrayLike, *, level: int = 0) -> LevelUsage:
    """Summarize how evenly one codebook is used.

    Args:
        counts: items per code, non-negative integers ``(codes,)``, not all zero.
        level: the level's number, for the record.

    Raises:
        InputError: the counts are empty, negative or all zero.
    """
    array = np.asarray(counts, dtype=np.int64)
    if array.ndim != 1 or array.size == 0 or array.min() < 0 or not array.any():
        raise InputError(
            f"counts of shape {array.shape} cannot be summarized: one non-negative integer a code "
            "and at least one item are needed"
        )
    items, size = int(array.sum()), len(array)
    used = np.sort(array[array > 0])
    active = len(used)
    share = used / items
    perplexity = float(np.exp(-(share * np.log(share)).sum()))
    # Ranks run over all K codes; the dead ones come first and add nothing to the sum.
    ranks = np.arange(size - active + 1, size + 1, dtype=np.float64)
    gini = 2.0 * float(ranks @ share) / size - (size + 1) / size
    return LevelUsage(
        level=level,
        codebook_size=size,
        items=items,
        perplexity=min(max(perplexity, 1.0), float(active)),
        active=active,
        dead=size - active,
        gini=max(gini, 0.0),
        largest_share=int(used[-1]) / items,
        floor=float((share**2).sum()),
        counts=array,
    )


class UsageCounter:
    """Counts codes block by block, on one machine or many, and summarizes them at the end.

    Args:
        codebook_sizes: K of each level, ``(levels,)``.
    """

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        self.codebook_sizes = _sizes(codebook_sizes, len(codebook_sizes))
        self._counts = [np.zeros(size, np.int64) for size in self.codebook_sizes]

    def update(self, codes: npt.ArrayLike) -> None:
        """Add a block of codes ``(batch, levels)``."""
        block = check_codes(codes, self.codebook_sizes)
        for level, counts in enumerate(self._counts):
            counts += np.bincount(block[:, level], minlength=len(counts))

    def merge(self, other: UsageCounter) -> None:
        """Add what another counter over the same codebooks has counted."""
        if other.codebook_sizes != self.codebook_sizes:
            raise UsageError(
                f"counters over codebooks of sizes {list(self.codebook_sizes)} and "
                f"{list(other.codebook_sizes)} cannot be merged"
            )
        # New arrays: what came from another process may lie in memory that is not to be written to.
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]

    def result(self) -> tuple[LevelUsage, ...]:
        """Return one `LevelUsage` a level for everything counted so far.

        Raises:
            InputError: nothing was counted yet.
        """
        return tuple(
            usage_from_counts(counts.copy(), level=level)
            for level, counts in enumerate(self._counts)
        )


def usage(codes: npt.ArrayLike, codebook_sizes: int | Sequence[int]) -> tuple[LevelUsage, ...]:
    """Measure how evenly each level's codebook is used.

    Args:
        codes: integers ``(items, levels)``.
        codebook_sizes: K for every level, or one a level.

    Returns:
        One `LevelUsage` a level.

    Raises:
        InputError: the codes are not integers ``(items, levels)`` within their codebooks.

    Cost: one pass, ``O(items * levels + K log K)``.

    Source: DRQ section 5.4 (perplexity, active codes, Gini) and eq. 11 (floor).
    """
    array = np.asarray(codes)
    counter = UsageCounter(_sizes(codebook_sizes, check_codes(array).shape[1]))
    counter.update(array)
    return counter.result()
