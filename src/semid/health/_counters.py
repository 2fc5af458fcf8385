"""Codes and rows in blocks: checks, one number per id, hashes, usage, and squared errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError
from semid.results import Result

Floats = npt.NDArray[np.float64]

ENERGY_TIMES_MEDIAN = 100.0
"""Rows (in half octaves) and columns stand out above this multiple of the median variance."""

_HASH_ROWS = 512  # rows hashed at once: 512 x 256 float32 is half a MB and stays in the cache
_PACK_ROWS = 65_536
_CHUNK_ROWS = 4096  # 4096 x 384 float64 is 12 MB; a block of 65,536 rows would be 200


# Codes and rows as numbers -------------------------------------------------------------------


def sizes_per_level(codebook_sizes: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """Return one codebook size per level from one size or a sequence of them."""
    if isinstance(codebook_sizes, (int, np.integer)):
        sizes = (int(codebook_sizes),) * levels
    else:
        sizes = tuple(int(size) for size in codebook_sizes)
    if len(sizes) != levels:
        raise UsageError(f"codebook_sizes has {len(sizes)} entries, but the codes {levels} levels")
    if any(size < 1 for size in sizes):
        raise UsageError(f"codebook_sizes={list(sizes)}: every codebook size must be at least 1")
    return sizes


def require_same_sizes(first: Sequence[int], second: Sequence[int]) -> None:
    """Raise `UsageError` where counters that are merged count codes of different codebooks."""
    if first != second:
        raise UsageError(
            f"counters over codebooks of sizes {list(first)} and {list(second)} cannot be merged"
        )


def check_codes(
    codes: npt.ArrayLike, codebook_sizes: int | Sequence[int] | None = None
) -> npt.NDArray[np.integer[Any]]:
    """Return ``codes`` (items, levels) as an array that holds codes; it is not copied."""
    array = np.asarray(codes)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] == 0:
        raise InputError(
            f"codes have shape {array.shape}; (items, levels) with at least one item and one "
            "level is needed; give a single level as codes[:, None]"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"codes have dtype {array.dtype}; an integer dtype is needed")
    levels = array.shape[1]
    sizes = (None,) * levels if codebook_sizes is None else sizes_per_level(codebook_sizes, levels)
    problems = []
    for level, size in enumerate(sizes):
        low, high = int(array[:, level].min()), int(array[:, level].max())
        if low < 0 or (size is not None and high >= size):
            allowed = "at least 0" if size is None else f"0 to {size - 1}"
            problems.append(f"level {level} holds codes {low} to {high}; allowed: {allowed}")
    if problems:
        raise InputError(problems)
    return array


def pack_bits(columns: npt.NDArray[Any], bits: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Pack columns of ``bits`` bits each into one uint64, first column highest."""
    packed = np.empty(len(columns), np.uint64)
    for start in range(0, len(columns), _PACK_ROWS):
        block = columns[start : start + _PACK_ROWS]
        key = np.zeros(len(block), np.uint64)
        for level, width in enumerate(bits):
            key <<= np.uint64(width)
            key |= block[:, level].astype(np.uint64)
        packed[start : start + len(block)] = key
    return packed


def bucket_keys(codes: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return a number for every item ``(items,)``; two are equal exactly when the ids are equal.

    Ids of up to 64 bits are packed, wider ids ``(items, levels)`` are ranked in steps; nothing is
    hashed. Keys sort as the ids do (first level first); those of two calls are not comparable.
    """
    array = check_codes(codes)
    bits = [max(int(array[:, level].max()).bit_length(), 1) for level in range(array.shape[1])]
    key = np.zeros(len(array), np.uint64)
    used = start = 0
    while start < len(bits):
        # Take as many further levels as fit into the 64 bits beside the key so far.
        stop = start
        while stop < len(bits) and used + sum(bits[start : stop + 1]) <= 64:
            stop += 1
        # If not one level fits, the rank of the key replaces it: equal keys stay equal, the order
        # stays, and only log2(items) bits are used.
        if stop == start:
            key = np.unique(key, return_inverse=True)[1].astype(np.uint64)
            used = int(key.max()).bit_length()
            if used + bits[start] > 64:
                raise InputError(
                    f"level {start} holds codes of {bits[start]} bits; at most {64 - used} fit"
                )
            continue
        width = sum(bits[start:stop])
        packed = pack_bits(array[:, start:stop], bits[start:stop])
        key = key << np.uint64(width) | packed if start else packed
        used, start = used + width, stop
    return key


def row_hashes(block: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of the content of each row ``(batch, dim)``, to find exact copies.

    Rows are compared as float32 with -0 equal to 0, so a float16 and a float32 copy of a vector
    agree, whatever their blocks. Among 15 million different rows, two are equal with a
    probability of about 1e-5.
    """
    array = np.asarray(block)
    if array.ndim != 2:
        raise InputError(f"rows to hash have shape {array.shape}; (batch, dim) is needed")
    result = np.empty(len(array), np.uint64)
    dim, words = array.shape[1], (array.shape[1] + 1) // 2
    weights = np.random.Generator(np.random.PCG64(0x5EED)).integers(
        0, 2**64, size=words, dtype=np.uint64
    ) | np.uint64(1)
    # One odd random weight per 64-bit word of a row; the hash is the weighted sum of the words,
    # mixed once more. Buffers are small enough to stay in the cache.
    padded = np.zeros((_HASH_ROWS, 2 * words), np.float32)
    mixed = np.empty((_HASH_ROWS, words), np.uint64)
    for start in range(0, len(array), _HASH_ROWS):
        rows = array[start : start + _HASH_ROWS]
        floats = padded[: len(rows)]
        floats[:, :dim] = rows
        floats[:, dim:] = 0.0  # the mixing of the last block reached the padding
        floats += 0.0  # turns -0 into 0
        # A sum of odd multiples sees only what lies above the lowest set bit of a difference, and
        # short floats end in zeros: fold each word's high bits into its low ones first.
        w = floats.view(np.uint64)
        for shift in (32, 23):
            np.right_shift(w, np.uint64(shift), out=mixed[: len(rows)])
            np.bitwise_xor(w, mixed[: len(rows)], out=w)
        total = np.einsum("ij,j->i", w, weights)
        # A multiplication spreads low bits upward and the shifts spread high bits downward.
        total ^= total >> np.uint64(31)
        total *= np.uint64(0xD6E8FEB86659FD93)
        result[start : start + len(rows)] = total ^ (total >> np.uint64(32))
    return result


# Usage ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelUsage(Result):
    """Usage of one level's codebook."""

    renamed: ClassVar[dict[str, str]] = {"floor": "collision_probability"}

    level: int  # level, counted from 0
    codebook_size: int  # K, codewords in the codebook
    items: int  # items counted
    perplexity: float  # ``exp(H)`` of the code frequencies, H in nats; between 1 and ``active``
    active: int  # codes with at least one item
    dead: int  # codes with none, ``codebook_size - active``
    # Gini coefficient of the frequencies over all K codes, zeros included; 0 is even use,
    # ``1 - 1/K`` is everything in one code
    gini: float
    largest_share: float  # share of the items that the most used code holds
    # ``sum_i p_i^2``, the probability that two random items share the code; no geometry can lower
    # the overlap rate below it (DRQ eq. 1, "distribution floor");
    # ``1 / collision_probability <= perplexity``
    collision_probability: float
    # items per code, int64 ``(codes,)``; empty when read from a document
    counts: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, np.int64), repr=False, compare=False
    )

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Share of the items that hold each code, float64 ``(codes,)``."""
        return self.counts / self.items


def usage_from_counts(counts: npt.ArrayLike, *, level: int = 0) -> LevelUsage:
    """Summarize how evenly one codebook is used, from its items per code ``(codes,)``."""
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
    """Counts codes of codebooks of the given sizes block by block, on one machine or many."""

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
        require_same_sizes(self.codebook_sizes, other.codebook_sizes)
        # New arrays: those from another process may be in read-only memory.
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]

    def result(self) -> tuple[LevelUsage, ...]:
        """Return the usage of each level; InputError before any code was counted."""
        return tuple(
            usage_from_counts(counts.copy(), level=level)
            for level, counts in enumerate(self._counts)
        )


MAX_COUNTED = 2**26
"""Codes per level that `usage` counts: 512 MiB of counts."""


def usage(codes: npt.ArrayLike, codebook_sizes: int | Sequence[int]) -> tuple[LevelUsage, ...]:
    """Measure how evenly each level's codebook is used.

    Args:
        codes: integers ``(items, levels)``.
        codebook_sizes: K for every level, or one per level.

    Returns:
        One `LevelUsage` per level.

    Raises:
        InputError: the codes are not integers ``(items, levels)`` within their codebooks, or a
            codebook is too large to be counted.

    Cost: one pass, ``O(items * levels + K log K)``.

    Source: DRQ section 5.4 (perplexity, active codes, Gini) and eq. 11 (distribution floor).
    """
    array = np.asarray(codes)
    sizes = sizes_per_level(codebook_sizes, check_codes(array).shape[1])
    if max(sizes) > MAX_COUNTED:
        raise InputError(
            f"a level has {max(sizes):,} codes, and usage is counted for at most {MAX_COUNTED:,}: "
            "number the codes of each level from 0"
        )
    counter = UsageCounter(sizes)
    counter.update(array)
    return counter.result()


@dataclass
class ErrorSums:
    """Sums of ``|x - x_hat|^2`` (squared) and of ``|x - mean|^2`` (spread) over the same rows."""

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
    """The rows or columns far above the median in squared distance to the mean."""

    count: int  # number of rows or columns above `ENERGY_TIMES_MEDIAN` times the median
    total: int  # number of all rows or columns
    share: float  # their share of the variance
    # relative error of all others, of rows about their own mean; None where all others are equal
    rest_error: float | None
    columns: tuple[int, ...] = ()  # the columns, largest variance first; empty for rows


@dataclass(frozen=True)
class Inputs:
    """How the variance of the embeddings lies in rows and columns (None where all are equal).

    ``constant`` columns hold one value for all items and have the share ``constant_weight`` in the
    mean squared length; ``width`` is the number of all columns.
    """

    rows: Concentration | None
    columns: Concentration | None
    constant: tuple[int, ...]
    constant_weight: float
    width: int


class EnergyCounter:
    """Adds up blocks of rows about their ``mean`` (dim,) and their reconstructions.

    Memory: a vector per half octave between the nearest and the farthest row.
    """

    def __init__(self, mean: Floats) -> None:
        self.mean = np.asarray(mean, dtype=np.float64)
        self.column_spread = np.zeros(len(self.mean))
        self.column_error = np.zeros(len(self.mean))
        self.low = np.full(len(self.mean), np.inf)
        self.high = np.full(len(self.mean), -np.inf)
        # Half octave -> rows, squared error, squared distance, and the sum of ``x - mean``.
        self._bins: dict[int, Floats] = {}

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
            # Half octaves of the squared distance; rows at the mean itself join the lowest bin.
            sizes = np.floor(2.0 * np.log2(np.maximum(spreads[span], np.finfo(np.float64).tiny)))
            for size in np.unique(sizes):
                rows = sizes == size
                sums = [rows.sum(), errors[span][rows].sum(), spreads[span][rows].sum()]
                self._add_bin(int(size), np.append(sums, centered[rows].sum(axis=0)))
        if len(x):
            self.low = np.minimum(self.low, x.min(axis=0))
            self.high = np.maximum(self.high, x.max(axis=0))
        return spreads, errors

    def _add_bin(self, size: int, sums: Floats) -> None:
        self._bins[size] = self._bins.get(size, 0.0) + sums

    def merge(self, other: EnergyCounter) -> None:
        """Add what another counter about the same mean has counted."""
        self.column_spread = self.column_spread + other.column_spread
        self.column_error = self.column_error + other.column_error
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        for size, sums in other._bins.items():
            self._add_bin(size, sums)

    @property
    def count(self) -> int:
        """Number of rows counted."""
        return int(sum(sums[0] for sums in self._bins.values()))

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
        sizes = np.sort(np.array(list(self._bins), dtype=np.int64))
        bins = np.array([self._bins[int(size)] for size in sizes])
        if not len(bins) or not bins[:, 2].any():
            return None
        median = sizes[np.searchsorted(np.cumsum(bins[:, 0]), bins[:, 0].sum() / 2)]
        # Rows stand out whose half octave begins at `ENERGY_TIMES_MEDIAN` times that of the median.
        # Only sums by half octave are stored, so the split is exact at the edge of a bin.
        few = sizes >= median + math.ceil(2.0 * math.log2(ENERGY_TIMES_MEDIAN))
        far, near = bins[few].sum(axis=0), bins[~few].sum(axis=0)
        rows, squared, spread = near[:3].tolist()
        shift = near[3:]
        # About the mean of the rest: the sum of squares less the square of the shifted mean.
        rest_spread = spread - float(shift @ shift) / max(rows, 1)
        return Concentration(
            count=int(far[0]),
            total=self.count,
            share=float(far[2]) / (float(far[2]) + spread),
            # A difference this small is the rounding error of a spread of 0.
            rest_error=squared / rest_spread if rest_spread > 1e-12 * spread else None,
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
