"""Flip rates: how often codes change under noise, measured and predicted from margins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from semid.diagnostics.overlap import NOISE_SCALES
from semid.diagnostics.pairs import CONFIDENCE, Proportion, proportion
from semid.diagnostics.spaces import (
    Matrix,
    as_block,
    as_matrix,
    latent_std,
    nearest_entries,
    row_blocks,
)
from semid.errors import InputError, UsageError
from semid.lazy import is_tensor, kernel
from semid.quantization.nearest import index_codebook
from semid.results import Result
from semid.seeds import numpy_generator

Float = npt.NDArray[np.float32]
Space = Literal["input", "latent"]
Encode = Callable[[Float], Any]
"""Rows ``(batch, dim)`` float32 to codes ``(batch, levels)``, array or tensor."""


@dataclass(frozen=True)
class _NoisePoint(Result):
    """Shares of the items that change at one noise scale."""

    scale: float  # noise as a multiple of the standard deviation of the space it is put on
    noise: float  # its standard deviation per dimension

    def shares(self, hierarchical: bool) -> tuple[Any, ...]:
        """Return the shares per level: by prefix, or by code alone for parallel codebooks."""
        shares: tuple[Any, ...] = getattr(self, "prefix" if hierarchical else "code")
        return shares


@dataclass(frozen=True)
class FlipPoint(_NoisePoint):
    """Measured flips at one noise scale; the fields are those of `MarginPoint`."""

    code: tuple[Proportion, ...]
    prefix: tuple[Proportion, ...]


@dataclass(frozen=True)
class MarginPoint(_NoisePoint):
    """Expected flips at one noise scale."""

    code: tuple[float, ...]  # per level, share of the items whose code at that level changes
    # per level, share of the items whose codes up to that level change anywhere
    prefix: tuple[float, ...]


@dataclass(frozen=True)
class FlipRates(Result):
    """Measured flip rates over a sweep of noise scales."""

    space: Space  # space the noise was put on
    unit: float  # standard deviation that the scales multiply
    items: int  # items encoded
    seed: int  # of the noise
    confidence: float  # coverage of the intervals
    points: tuple[FlipPoint, ...]  # one per scale


def _encoded(encode: Callable[[Float], Any], rows: Float, *, codes: bool) -> npt.NDArray[Any]:
    """Encode rows to codes, or to latents, and check these."""
    encoded = encode(rows)
    array = encoded.detach().cpu().numpy() if is_tensor(encoded) else np.asarray(encoded)
    integers = np.issubdtype(array.dtype, np.integer)
    if array.ndim != 2 or len(array) != len(rows) or (codes and not integers):
        name, expected = (
            ("encode", "integer codes (batch, levels) are needed")
            if codes
            else ("encode_latent", "(batch, latent) is needed")
        )
        raise InputError(
            f"{name} returned shape {array.shape} and dtype {array.dtype} for {len(rows)} rows; "
            f"{expected}"
        )
    return np.ascontiguousarray(array, dtype=np.int64 if codes else np.float32)


def flip_rates(
    rows: Matrix,
    encode: Encode,
    *,
    space: Space,
    scales: Sequence[float] = NOISE_SCALES,
    unit: float | None = None,
    seed: int = 0,
) -> FlipRates:
    """Add Gaussian noise, encode again, and count the codes that change.

    Noise on the input compares tokenizers of different latent width fairly; noise on the latent
    is what the overlap rate is about.

    Args:
        rows: ``(items, dim)``, inputs or latents by ``space``; a random subset for speed.
        encode: rows of that space to codes. Called on blocks; a row's codes must not depend on
            its block.
        space: ``"input"`` or ``"latent"``, for the record.
        scales: noise as multiples of ``unit``, not negative.
        unit: standard deviation that the scales multiply; None takes `latent_std` of the rows.
        seed: of the noise.

    Raises `InputError` for bad rows or codes of a wrong shape. Cost: ``1 + scales`` encodings.

    Source: ours; the quantity that DRQ eq. 1 is often read as.
    """
    array = as_matrix(rows, "rows")
    if not scales or min(scales) < 0:
        raise UsageError(f"scales={list(scales)}: at least one, none negative, is needed")
    std = latent_std(array) if unit is None else unit
    code: npt.NDArray[np.int64] | None = None
    for index, part in enumerate(row_blocks(len(array))):
        block = as_block(array, part)
        before = _encoded(encode, block, codes=True)
        if code is None:
            code = np.zeros((len(scales), before.shape[1]), np.int64)
            prefix = np.zeros_like(code)
        draws = numpy_generator(seed, "flips", index).standard_normal(block.shape, np.float32)
        for i, scale in enumerate(scales):
            # A prefix changes where any code up to its end does.
            noisy = block + np.float32(scale * std) * draws
            changed = _encoded(encode, noisy, codes=True) != before
            code[i] += changed.sum(0)
            prefix[i] += np.logical_or.accumulate(changed, axis=1).sum(0)
    assert code is not None  # as_matrix raises for empty arrays

    def shares(counts: npt.NDArray[np.int64]) -> tuple[Proportion, ...]:
        return tuple(proportion(int(c), len(array)) for c in counts)

    points = tuple(
        FlipPoint(float(scale), float(scale * std), shares(code[i]), shares(prefix[i]))
        for i, scale in enumerate(scales)
    )
    return FlipRates(space, float(std), len(array), seed, CONFIDENCE, points)


# The margin proxy: flip rates in closed form, from distances to the nearest cell walls --------


@dataclass(frozen=True)
class MarginProxy(Result):
    """Margin proxy over a sweep of noise scales."""

    space: Space  # space the noise is put on
    unit: float  # standard deviation that the scales multiply
    items: int  # items averaged over
    neighbors: int  # cell walls per item and level
    points: tuple[MarginPoint, ...]  # one per scale


@kernel(fastmath={"reassoc", "contract"})
def _stay_logs(
    images: Float,
    labels: npt.NDArray[np.int64],
    distances: npt.NDArray[np.float64],
    noises: npt.NDArray[np.float64],
    out: npt.NDArray[np.float64],
) -> None:
    """Add the log of the probability that a row crosses no wall to ``out`` (noises, rows).

    ``images`` (1 or noises, codes, width) are codewords in units of the noise less its factor in
    ``noises``; the others, (rows, codewords), are the nearest codewords of each row.
    """
    count = len(images)
    for i in range(len(labels)):
        first = labels[i, 0]
        for j in range(1, labels.shape[1]):
            other = labels[i, j]
            # The wall between c_1 and c_j is their bisector. (|r - c_j|^2 - |r - c_1|^2) / 2 is the
            # distance of r to it, times |c_j - c_1|.
            rise = (distances[i, j] - distances[i, 0]) / 2.0
            for image in range(count):
                # Standard deviation of the noise across the wall, times |c_j - c_1| as well.
                square = 0.0
                for d in range(images.shape[2]):
                    step = np.float64(images[image, other, d]) - np.float64(images[image, first, d])
                    square += step * step
                if square == 0.0:  # equal codewords: the noise never chooses between them
                    continue
                for s in range(image, len(out), count):
                    ratio = rise / (math.sqrt(square) * noises[s])
                    out[s, i] += math.log1p(-0.5 * math.erfc(ratio * math.sqrt(0.5)))


class _Walls:
    """One level's codewords, and their images under each noise's linear map.

    The noise ``F e`` with ``e ~ N(0, I)`` moves a row along ``c_j - c_1`` with standard deviation
    ``|F^T (c_j - c_1)| / |c_j - c_1|``; isotropic noise has ``F = s I``.
    """

    def __init__(
        self, codebook: npt.NDArray[Any], columns: slice, factors: Sequence[Float] | None
    ) -> None:
        self.columns = columns  # of the latent, which the codewords stand for
        self.codewords = np.ascontiguousarray(codebook, dtype=np.float32)
        self.table = index_codebook(self.codewords).full_table()
        self.images = self.codewords[None]
        if factors is not None:
            self.images = np.stack([self.codewords @ factor[columns] for factor in factors])

    def stays(
        self,
        residuals: Float,
        neighbors: int,
        noises: npt.NDArray[np.float64],
        threads: int | None,
    ) -> tuple[npt.NDArray[np.float64], Float]:
        """Return each row's log-probability to stay in its cell ``(noises, rows)``, and that cell.

        Walls are taken as independent.
        """
        m = min(neighbors + 1, len(self.codewords))
        labels, distances = nearest_entries(residuals, self.table, m, threads=threads)
        stays = np.zeros((len(noises), len(residuals)))
        _stay_logs(self.images, labels, distances, noises, stays)
        return stays, self.codewords[labels[:, 0]]


def margin_proxy(
    rows: Matrix,
    codebooks: Sequence[Matrix],
    *,
    encode_latent: Callable[[Float], Any] | None = None,
    scales: Sequence[float] = NOISE_SCALES,
    unit: float | None = None,
    hierarchical: bool = True,
    slices: Sequence[slice] | None = None,
    neighbors: int = 9,
    seed: int = 0,
    threads: int | None = None,
) -> MarginProxy:
    """Estimate flip rates in closed form, from the distances of latents to cell walls.

    Per item and level ``1 - prod_j (1 - Phi(-d_j / s_j))`` over the next codewords, ``d_j`` the
    distance from the level's residual to the bisector with codeword j and ``s_j`` the noise across
    it; averaged over items. Walls are taken as independent and a level's noise as unaffected by
    flips above it, which tends to overestimate where noise is large and dimensions are few.

    Noise on inputs becomes, through the encoder, latent noise of some covariance, which is measured
    by one draw per item. Dimensions that the encoder only pads change nothing.

    Args:
        rows: latents ``(items, latent)`` before quantization, or inputs ``(items, dim)``.
        codebooks: one ``(codes, latent)`` array per level.
        encode_latent: inputs ``(batch, dim)`` float32 to latents; None for rows that are latents.
        scales: noise on the rows as multiples of ``unit``, positive.
        unit: standard deviation of the rows; None measures it by `latent_std`.
        hierarchical: levels quantize residuals; False for parallel codebooks of one latent.
        slices: columns of the latent that each codebook quantizes; None is all, for every one.
        neighbors: walls per item and level.
        seed: of the draws of input noise.
        threads: number of CPU threads; the result does not depend on it.

    Cost: one nearest-codeword search of all rows per level; with an encoder ``1 + scales`` passes.

    Source: ours.
    """
    if not scales or min(scales) <= 0 or neighbors < 1 or not codebooks:
        raise UsageError(
            f"scales={list(scales)}, neighbors={neighbors}, {len(codebooks)} codebooks: positive "
            "scales, at least one neighbor and at least one codebook are needed"
        )
    latents = array = as_matrix(rows, "latents" if encode_latent is None else "inputs")
    std = latent_std(array) if unit is None else unit
    noises = [scale * std for scale in scales]
    factors = None
    if encode_latent is not None:
        latents, factors = _latent_noise(array, encode_latent, noises, seed)
    parts = [slice(None)] * len(codebooks) if slices is None else slices
    levels = []
    for i, (codebook, part) in enumerate(zip(codebooks, parts, strict=True)):
        levels.append(_Walls(as_matrix(codebook, f"codebook {i}"), part, factors))
        width, expected = levels[-1].codewords.shape[1], len(range(latents.shape[1])[part])
        if width != expected:
            raise InputError(f"codebook {i} is {width} wide, the latents {expected}")
    code = np.zeros((len(noises), len(levels)))
    prefix = np.zeros_like(code)
    # Images under a noise's own map have its size in them.
    units = np.array(noises) if factors is None else np.ones(len(noises))
    for batch in row_blocks(len(latents)):
        block = residuals = as_block(latents, batch)
        # Per noise and row: log of the probability that no code so far has changed.
        whole = np.zeros((len(noises), len(residuals)))
        for i, level in enumerate(levels):
            if not hierarchical:
                residuals = np.ascontiguousarray(block[:, level.columns])
            stays, quantized = level.stays(residuals, neighbors, units, threads)
            whole += stays
            code[:, i] -= np.expm1(stays).sum(1)
            prefix[:, i] -= np.expm1(whole).sum(1)
            if hierarchical:
                residuals = residuals - quantized
    items = len(latents)
    shares = zip((code / items).tolist(), (prefix / items).tolist(), strict=True)
    points = tuple(
        MarginPoint(float(scale), float(noise), tuple(codes), tuple(prefixes))
        for scale, noise, (codes, prefixes) in zip(scales, noises, shares, strict=True)
    )
    space: Space = "latent" if encode_latent is None else "input"
    return MarginProxy(space, float(std), items, neighbors, points)


def _latent_noise(
    inputs: npt.NDArray[Any],
    encode_latent: Callable[[Float], Any],
    noises: Sequence[float],
    seed: int,
) -> tuple[Float, list[Float]]:
    """Return the latents, and per noise on the inputs F with ``F F^T`` the latent covariance."""
    latents: list[Float] = []
    outer: list[Any] = [0.0] * len(noises)  # sums of the outer products of latent steps
    for index, rows in enumerate(row_blocks(len(inputs))):
        block = as_block(inputs, rows)
        clean = _encoded(encode_latent, block, codes=False)
        latents.append(clean)
        draws = numpy_generator(seed, "margins", index).standard_normal(block.shape, np.float32)
        # The same draws at every scale, as in `flip_rates`: the sweep is smooth.
        for i, noise in enumerate(noises):
            noisy = block + np.float32(noise) * draws
            step = _encoded(encode_latent, noisy, codes=False).astype(np.float64) - clean
            outer[i] = outer[i] + step.T @ step
    factors = []
    for total in outer:
        # Rounding leaves eigenvalues slightly below 0 where the encoder ignores a direction.
        values, vectors = np.linalg.eigh(total / len(inputs))
        factors.append((vectors * np.sqrt(np.clip(values, 0.0, None))).astype(np.float32))
    return np.concatenate(latents), factors
