"""Expected overlap rate and effective codebook size over a sweep of noise scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from semid.diagnostics.spaces import Matrix, as_block, as_matrix, row_blocks
from semid.errors import InputError, UsageError
from semid.health import LevelUsage
from semid.lazy import kernel
from semid.quantization.threads import map_blocks
from semid.results import Result

NOISE_SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Noise as multiples of the latent standard deviation."""

REPORT_SCALE = 0.1
"""The noise scale of tables and verdicts."""

GEOMETRY_SHARE = 0.1
"""A geometry penalty below this share of R adds nothing to what usage says."""

_TILE = 512  # codewords; a float32 tile of squared distances is 1 MB and stays in the cache
# exp(-60) = 9e-27: even K^2 such terms for K = 2^32 vanish beside R >= 1/K in float64.
_FARTHEST = 60.0
# exp of less is a denormal number, which costs hundreds of cycles to make.
_LOWEST = -87.0
# Below this share of the squared norms a float32 distance has lost too many digits.
_NEAR = 1e-2


@dataclass(frozen=True)
class OverlapPoint(Result):
    """Overlap of one codebook at one noise scale."""

    derived: ClassVar[tuple[str, ...]] = ("geometry_share", "usage_only")
    renamed: ClassVar[dict[str, str]] = {"floor": "collision_probability"}

    scale: float  # noise as a multiple of the latent standard deviation
    noise: float  # the noise's standard deviation s per dimension, in latent units
    rate: float  # expected overlap rate R, DRQ eq. 1; ``collision_probability + geometry``
    collision_probability: float  # ``sum_i p_i^2``, the distribution floor that usage alone gives
    geometry: float  # geometry penalty ``R - collision_probability``, added by near codewords
    effective_size: float  # effective codebook size ``1 / R``, DRQ eq. 12

    @property
    def usage_size(self) -> float:
        """Effective codebook size by usage alone, ``1 / collision_probability``."""
        return 1.0 / self.collision_probability

    @property
    def geometry_share(self) -> float:
        """Share of R that the geometry penalty makes."""
        return self.geometry / self.rate

    @property
    def usage_only(self) -> bool:
        """Whether this slice shows nothing but usage: geometry is below a tenth of R."""
        return self.geometry_share <= GEOMETRY_SHARE


@dataclass(frozen=True)
class LevelOverlap(Result):
    """Overlap of one level's codebook over the sweep."""

    derived: ClassVar[tuple[str, ...]] = ("geometry_scale",)

    level: int  # level, counted from 0
    codebook_size: int  # K, dead codes included
    active: int  # codes in use; only these enter the sums
    latent_std: float  # the latent standard deviation that the scales multiply
    points: tuple[OverlapPoint, ...]  # one per scale, in the given order

    @property
    def geometry_scale(self) -> float | None:
        """Smallest scale of the sweep whose geometry penalty exceeds a tenth of R, or None."""
        return min((point.scale for point in self.points if not point.usage_only), default=None)

    def at(self, scale: float) -> OverlapPoint:
        """Return the point at a scale of the sweep; UsageError for another scale."""
        for point in self.points:
            if point.scale == scale:
                return point
        listed = ", ".join(f"{point.scale:g}" for point in self.points)
        raise UsageError(f"scale={scale:g} is not in the sweep; it holds {listed}")


@kernel(fastmath={"reassoc", "contract"})
def _weighted_sum(
    kernel: npt.NDArray[np.float32], left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]
) -> float:
    """Return ``left @ kernel @ right``, products and sums in float64."""
    total = 0.0
    for i in range(kernel.shape[0]):
        row = 0.0
        for j in range(kernel.shape[1]):
            row += np.float64(kernel[i, j]) * right[j]
        total += left[i] * row
    return total


class _Codewords:
    """Active codewords less their mean: distances stay, and float32 loses fewer digits."""

    def __init__(self, codebook: npt.NDArray[Any], share: npt.NDArray[np.float64]) -> None:
        used = np.flatnonzero(share)
        self.share = share[used]
        exact = codebook[used].astype(np.float64)
        exact -= self.share @ exact
        self.exact = exact
        self.rounded = exact.astype(np.float32)
        self.squares = np.einsum("kd,kd->k", exact, exact)

    def __len__(self) -> int:
        return len(self.share)

    def distances_(
        self, a: slice, b: slice, out: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Write squared distances between two ranges to ``out``; to itself a codeword has inf."""
        result = out[: a.stop - a.start, : b.stop - b.start]
        # |x - y|^2 = |x|^2 + |y|^2 - 2 x.y by one float32 matrix product.
        np.matmul(self.rounded[a], self.rounded[b].T, out=result)
        left, right = self.squares[a].astype(np.float32), self.squares[b].astype(np.float32)
        result *= np.float32(-2.0)
        result += left[:, None]
        result += right
        if a == b:
            np.fill_diagonal(result, np.inf)
        # Where codewords nearly coincide that difference has lost its digits, and exactly these
        # pairs make up the overlap: compute such a tile again in float64.
        if result.min() < _NEAR * (left.max() + right.max()):
            squares = self.squares[a, None] + self.squares[None, b]
            squares -= 2.0 * (self.exact[a] @ self.exact[b].T)
            np.maximum(squares, 0.0, out=result, casting="same_kind")
            if a == b:
                np.fill_diagonal(result, np.inf)
        return result


def _band_sums(
    codewords: _Codewords, ranges: Sequence[slice], first: int, noises: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Sum ``p_i p_j exp(-d^2 / 4 s^2)`` over one row of tiles, from the diagonal to the right.

    Distances are computed once for all noises, in two buffers: fresh memory for every tile would
    cost more than the arithmetic.
    """
    buffer, kernel_buffer = np.empty((2, _TILE, _TILE), np.float32)
    sums = np.zeros(len(noises))
    a = ranges[first]
    for b in ranges[first:]:
        distances = codewords.distances_(a, b, buffer)
        kernel = kernel_buffer[: distances.shape[0], : distances.shape[1]]
        least = float(distances.min())
        # The matrix is symmetric: a tile right of the diagonal stands for its mirror image too.
        multiplicity = 1.0 if a == b else 2.0
        for index, noise in enumerate(noises):
            width = 4.0 * noise * noise
            if least / width > _FARTHEST:  # every term of the tile vanishes in float64
                continue
            np.multiply(distances, np.float32(-1.0 / width), out=kernel)
            np.exp(np.maximum(kernel, np.float32(_LOWEST), out=kernel), out=kernel)
            part = _weighted_sum(kernel, codewords.share[a], codewords.share[b])
            sums[index] += multiplicity * part
    return sums


def overlap(
    codebook: Matrix,
    usage: LevelUsage | npt.ArrayLike,
    *,
    latent_std: float,
    scales: Sequence[float] = NOISE_SCALES,
    level: int = 0,
    threads: int | None = None,
) -> LevelOverlap:
    """Measure how strongly a level's codewords overlap under noise, for a sweep of noise scales.

    ``R(s) = sum_ij p_i p_j exp(-|c_i - c_j|^2 / (4 s^2))`` is summed exactly over all pairs of
    active codewords, in float64, without a K x K matrix. R is a proxy and no flip rate: a
    collapsed codebook has R = 1 and never flips (`flip_rates` measures flips).

    Args:
        codebook: codewords ``(codes, latent)``.
        usage: the level's `LevelUsage`, or items per code ``(codes,)``.
        latent_std: the unit of the scales, from `latent_std`.
        scales: noise as multiples of it, positive. The paper's factor is not known; the sweep is
            ours.
        level: number of the level, for the record.
        threads: number of CPU threads; the result does not depend on it.

    Cost: ``K^2 (dim + scales) / 2`` multiplications; memory of one tile per thread.

    Source: DRQ eq. 1 and 10-12.
    """
    counts = usage.counts if isinstance(usage, LevelUsage) else np.asarray(usage)
    array = as_matrix(codebook, "codebook")
    if counts.shape != (len(array),) or counts.min() < 0 or not counts.any():
        raise InputError(
            f"usage counts have shape {counts.shape}; one non-negative count for each of the "
            f"{len(array)} codewords is needed, not all zero"
        )
    if not scales or min(scales) <= 0 or not np.isfinite(latent_std) or latent_std <= 0:
        raise UsageError(
            f"scales={list(scales)} and latent_std={latent_std} must be positive, at least one "
            "scale given"
        )
    as_block(array, slice(0, len(array)))  # raises for NaN
    share = counts / counts.sum()
    codewords = _Codewords(array, share)
    ranges = list(row_blocks(len(codewords), _TILE))
    noises = [scale * latent_std for scale in scales]
    parts = map_blocks(
        lambda first: _band_sums(codewords, ranges, first, noises),
        range(len(ranges)),
        threads=threads,
    )
    # Added up in the order of the bands, so that the sum does not depend on the threads. The
    # diagonal, a codeword with itself, has distance 0 and adds the collision probability.
    geometry = np.sum(parts, axis=0)
    collision_probability = float((codewords.share**2).sum())
    points = []
    for scale, noise, extra in zip(scales, noises, geometry, strict=True):
        rate = min(collision_probability + float(extra), 1.0)
        parts_of_rate = rate, collision_probability, rate - collision_probability
        points.append(OverlapPoint(float(scale), float(noise), *parts_of_rate, 1.0 / rate))
    return LevelOverlap(level, len(array), len(codewords), float(latent_std), tuple(points))


def overlap_levels(
    codebooks: Sequence[Matrix],
    usage: Sequence[LevelUsage],
    *,
    latent_std: float,
    scales: Sequence[float] = NOISE_SCALES,
    threads: int | None = None,
) -> tuple[LevelOverlap, ...]:
    """Measure the `overlap` of every level, with the same ``latent_std`` and scales at each."""
    if len(codebooks) != len(usage):
        raise InputError(f"{len(codebooks)} codebooks and {len(usage)} levels of usage were given")
    return tuple(
        overlap(c, u, latent_std=latent_std, scales=scales, level=level, threads=threads)
        for level, (c, u) in enumerate(zip(codebooks, usage, strict=True))
    )
