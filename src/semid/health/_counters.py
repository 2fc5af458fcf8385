"""Usage of each codebook, and squared errors of rows, counted in blocks that can be merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError
from semid.health._keys import check_codes, sizes_per_level
from semid.health._thresholds import ENERGY_TIMES_MEDIAN
from semid.results import Result

Floats = npt.NDArray[np.float64]

_CHUNK_ROWS = 4096  # 4096 x 384 float64 is 12 MB; a block of 65,536 rows would be 200


@dataclass(frozen=True)
class LevelUsage(Result):
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
        collision_probability: ``sum_i p_i^2``, the probability that two random items share the
            code; no geometry can lower the overlap rate below it (DRQ eq. 1, "distribution
            floor"). ``1 / collision_probability <= perplexity``.
        counts: items per code, int64 ``(codes,)``; empty when read from a document.
    """

    renamed: ClassVar[dict[str, str]] = {"floor": "collision_probability"}

    level: int
    codebook_size: int
    items: int
    perplexity: float
    active: int
    dead: int
    gini: float
    largest_share: float
    collision_probability: float
    counts: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, np.int64), repr=False, compare=False
    )

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Share of the items that hold each code, float64 ``(codes,)``."""
        return self.counts / self.items


def usage_from_counts(counts: npt.ArrayLike, *, level: int = 0) -> LevelUsage:
    """Summarize how evenly one codebook is used.

    Shapes: ``counts`` (codes,).
    """
    array = np.asarray(counts, dtype=np.int64)
    if array.ndim != 1 or array.size == 0 or array.min() < 0 or not array.any():
        raise InputError(
            f"counts of shape {array.shape} cannot be summarized: one non-negative integer per "
            "code and at least one item are needed"
        )
    items, size = int(array.sum()), len(array)
    used = np.sort(array[array > 0])
    active = len(used)
    share = used / items
    # Entropy in nats; the logarithm is taken of used codes only.
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
        collision_probability=float((share**2).sum()),
        counts=array,
    )


class UsageCounter:
    """Counts codes block by block, on one machine or many, and summarizes them at the end.

    Args:
        codebook_sizes: K of each level, ``(levels,)``.
    """

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        self.codebook_sizes = sizes_per_level(codebook_sizes, len(codebook_sizes))
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
        # New arrays: those from another process may be in read-only memory.
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]

    def result(self) -> tuple[LevelUsage, ...]:
        """Return the usage of each level; InputError before any code was counted."""
        return tuple(
            usage_from_counts(counts.copy(), level=level)
            for level, counts in enumerate(self._counts)
        )


def usage(codes: npt.ArrayLike, codebook_sizes: int | Sequence[int]) -> tuple[LevelUsage, ...]:
    """Measure how evenly each level's codebook is used.

    Args:
        codes: integers ``(items, levels)``.
        codebook_sizes: K for every level, or one per level.

    Returns:
        One `LevelUsage` per level.

    Raises:
        InputError: the codes are not integers ``(items, levels)`` within their codebooks.

    Cost: one pass, ``O(items * levels + K log K)``.

    Source: DRQ section 5.4 (perplexity, active codes, Gini) and eq. 11 (distribution floor).
    """
    array = np.asarray(codes)
    counter = UsageCounter(sizes_per_level(codebook_sizes, check_codes(array).shape[1]))
    counter.update(array)
    return counter.result()


@dataclass
class ErrorSums:
    """Squared error and squared distance to the mean, added up over the same rows.

    Attributes:
        rows: rows counted.
        squared: sum of ``|x - x_hat|^2``.
        spread: sum of ``|x - mean|^2``.
    """

    rows: int = 0
    squared: float = 0.0
    spread: float = 0.0

    def add_(self, other: ErrorSums) -> None:
        """Add the sums over other rows."""
        self.rows += other.rows
        self.squared += other.squared
        self.spread += other.spread

    @property
    def relative(self) -> float | None:
        """Relative error; None where all rows lie at the mean."""
        return self.squared / self.spread if self.spread > 0 else None


@dataclass(frozen=True)
class Concentration:
    """The rows or columns far above the median in squared distance to the mean.

    Attributes:
        count: number of rows or columns above `ENERGY_TIMES_MEDIAN` times the median.
        total: number of all rows or columns.
        share: their share of the variance.
        rest_error: relative error of all others, of rows about their own mean; None where all
            others are equal.
        columns: the columns, largest variance first; empty for rows.
    """

    count: int
    total: int
    share: float
    rest_error: float | None
    columns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """How the variance of the embeddings is distributed over rows and columns.

    Attributes:
        rows: concentration of the variance in rows; None where all rows are equal.
        columns: the same in columns.
        constant: columns that hold one value for all items.
        constant_weight: share of these columns in the mean squared length.
        width: number of columns.
    """

    rows: Concentration | None
    columns: Concentration | None
    constant: tuple[int, ...]
    constant_weight: float
    width: int


@dataclass
class _Bin:
    """Rows of about equal squared distance to the mean; ``total`` is the sum of ``x - mean``."""

    sums: ErrorSums
    total: Floats


class EnergyCounter:
    """Adds up blocks of rows and their reconstructions, on one machine or many.

    Memory: two vectors per half octave between the nearest and the farthest row.

    Args:
        mean: ``(dim,)`` the vector that distances are measured from: the mean of all rows.
    """

    def __init__(self, mean: Floats) -> None:
        self.mean = np.asarray(mean, dtype=np.float64)
        self.column_spread = np.zeros(len(self.mean))
        self.column_error = np.zeros(len(self.mean))
        self.low = np.full(len(self.mean), np.inf)
        self.high = np.full(len(self.mean), -np.inf)
        self._bins: dict[int, _Bin] = {}

    def update(
        self, x: npt.NDArray[Any], reconstruction: npt.NDArray[Any]
    ) -> tuple[Floats, Floats]:
        """Count rows ``(n, dim)``; return their squared distance to the mean and squared error."""
        spreads, errors = np.empty(len(x)), np.empty(len(x))
        for start in range(0, len(x), _CHUNK_ROWS):
            span = slice(start, start + _CHUNK_ROWS)
            centered = x[span] - self.mean
            gaps = x[span] - reconstruction[span].astype(np.float64)
            spreads[span] = np.einsum("nd,nd->n", centered, centered)
            errors[span] = np.einsum("nd,nd->n", gaps, gaps)
            self.column_spread += np.einsum("nd,nd->d", centered, centered)
            self.column_error += np.einsum("nd,nd->d", gaps, gaps)
            self._add_bins(centered, spreads[span], errors[span])
        if len(x):
            self.low = np.minimum(self.low, x.min(axis=0))
            self.high = np.maximum(self.high, x.max(axis=0))
        return spreads, errors

    def _add_bins(self, centered: Floats, spreads: Floats, errors: Floats) -> None:
        # Half octaves of the squared distance; rows at the mean itself join the lowest bin.
        sizes = np.floor(2.0 * np.log2(np.maximum(spreads, np.finfo(np.float64).tiny)))
        for size in np.unique(sizes):
            rows = sizes == size
            sums = ErrorSums(int(rows.sum()), float(errors[rows].sum()), float(spreads[rows].sum()))
            self._add_bin(int(size), _Bin(sums, centered[rows].sum(axis=0)))

    def _add_bin(self, size: int, other: _Bin) -> None:
        total = self._bins.setdefault(size, _Bin(ErrorSums(), np.zeros(len(self.mean))))
        total.sums.add_(other.sums)
        total.total = total.total + other.total

    def merge(self, other: EnergyCounter) -> None:
        """Add what another counter about the same mean has counted."""
        self.column_spread = self.column_spread + other.column_spread
        self.column_error = self.column_error + other.column_error
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        for size, each in other._bins.items():
            self._add_bin(size, each)

    @property
    def count(self) -> int:
        """Number of rows counted."""
        return sum(each.sums.rows for each in self._bins.values())

    @property
    def variances(self) -> Floats:
        """Mean squared distance to the mean, column by column ``(dim,)``."""
        return self.column_spread / max(self.count, 1)

    def result(self) -> Inputs:
        """Return the `Inputs` of all rows counted so far."""
        constant = np.flatnonzero(self.low == self.high)
        # The mean squared length is the squared length of the mean plus the variance.
        length = float(self.mean @ self.mean) + float(self.variances.sum())
        weight = float((self.low[constant] ** 2).sum()) / length if length > 0 else 0.0
        return Inputs(
            rows=self._row_concentration(),
            columns=self._column_concentration(),
            constant=tuple(map(int, constant)),
            constant_weight=weight,
            width=len(self.mean),
        )

    def _row_concentration(self) -> Concentration | None:
        bins = sorted(self._bins.items())
        rows = np.array([each.sums.rows for _, each in bins])
        if not bins or not any(each.sums.spread for _, each in bins):
            return None
        median = bins[int(np.searchsorted(np.cumsum(rows), rows.sum() / 2))][0]
        # Rows stand out whose half octave begins at `ENERGY_TIMES_MEDIAN` times that of the median.
        edge = median + math.ceil(2.0 * math.log2(ENERGY_TIMES_MEDIAN))
        # Only sums by half octave are stored, so the split is exact at the edge of a bin.
        few, rest = ErrorSums(), ErrorSums()
        shift = np.zeros(len(self.mean))  # sum of x - mean over the rest
        for size, each in bins:
            if size >= edge:
                few.add_(each.sums)
            else:
                rest.add_(each.sums)
                shift += each.total
        # About the mean of the rest: the sum of squares less the square of the shifted mean.
        rest_spread = rest.spread - float(shift @ shift) / max(rest.rows, 1)
        return Concentration(
            count=few.rows,
            total=self.count,
            share=few.spread / (few.spread + rest.spread),
            # A difference this small is the rounding error of a spread of 0.
            rest_error=rest.squared / rest_spread if rest_spread > 1e-12 * rest.spread else None,
        )

    def _column_concentration(self) -> Concentration | None:
        spread = self.column_spread
        if not spread.any():
            return None
        # The median of columns that vary at all: padding would pull it to 0.
        few = spread > ENERGY_TIMES_MEDIAN * np.median(spread[spread > 0])
        rest = float(spread[~few].sum())
        order = np.argsort(-spread, kind="stable")[: int(few.sum())]
        return Concentration(
            count=len(order),
            total=len(spread),
            share=float(spread[few].sum()) / float(spread.sum()),
            rest_error=float(self.column_error[~few].sum()) / rest if rest > 0 else None,
            columns=tuple(map(int, order)),
        )
