"""Flip rates: how often codes change under noise, measured and predicted from margins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from semid.diagnostics.overlap import NOISE_SCALES
from semid.diagnostics.pairs import Proportion, proportion
from semid.diagnostics.spaces import Matrix, as_block, as_matrix, latent_std, row_blocks
from semid.errors import InputError, UsageError
from semid.quantization.nearest import IndexedCodebook, index_codebook, nearest_m
from semid.results import Result
from semid.seeds import numpy_generator

Float = npt.NDArray[np.float32]
Space = Literal["input", "latent"]
Encode = Callable[[Float], Any]
"""Rows ``(batch, dim)`` float32 to codes ``(batch, levels)``, array or tensor."""


@dataclass(frozen=True)
class _NoisePoint(Result):
    """Shares of the items that change at one noise scale."""

    scale: float
    noise: float

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
    """Expected flips at one noise scale.

    Attributes:
        scale: noise as a multiple of the standard deviation of the space it is put on.
        noise: its standard deviation per dimension.
        code: per level, share of the items whose code at that level changes.
        prefix: per level, share of the items whose codes up to that level change anywhere.
    """

    code: tuple[float, ...]
    prefix: tuple[float, ...]


@dataclass(frozen=True)
class FlipRates(Result):
    """Measured flip rates over a sweep of noise scales.

    Attributes:
        space: space the noise was put on.
        unit: standard deviation that the scales multiply.
        items: items encoded.
        seed: of the noise.
        confidence: coverage of the intervals.
        points: one per scale.
    """

    space: Space
    unit: float
    items: int
    seed: int
    confidence: float
    points: tuple[FlipPoint, ...]


def _encoded(encode: Callable[[Float], Any], rows: Float, *, codes: bool) -> npt.NDArray[Any]:
    """Encode rows to codes, or to latents, and check these."""
    encoded = encode(rows)
    tensor = isinstance(encoded, torch.Tensor)
    array = encoded.detach().cpu().numpy() if tensor else np.asarray(encoded)
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
    confidence: float = 0.95,
) -> FlipRates:
    """Add Gaussian noise, encode again, and count the codes that change.

    Noise on the input compares tokenizers of different latent width fairly; noise on the latent
    is what the overlap rate is about. All scales use the same draws, scaled, so that a sweep is
    smooth.

    Args:
        rows: ``(items, dim)``, inputs or latents by ``space``; a random subset for speed.
        encode: rows of that space to codes. Called on blocks; a row's codes must not depend on
            its block.
        space: ``"input"`` or ``"latent"``, for the record.
        scales: noise as multiples of ``unit``, not negative.
        unit: standard deviation that the scales multiply; None measures the rows' by
            `latent_std`.
        seed: of the noise.
        confidence: coverage of the intervals.

    Raises:
        InputError: bad rows, or codes of a wrong shape.
        UsageError: scales that are empty or negative.

    Cost: ``1 + scales`` encodings of all rows.

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
        return tuple(proportion(int(c), len(array), confidence=confidence) for c in counts)

    points = tuple(
        FlipPoint(float(scale), float(scale * std), shares(code[i]), shares(prefix[i]))
        for i, scale in enumerate(scales)
    )
    return FlipRates(space, float(std), len(array), seed, confidence, points)


# The margin proxy: flip rates in closed form, from distances to the nearest cell walls --------

_ROWS = 2048  # rows per block; rows x 9 walls x latent floats are gathered at once


@dataclass(frozen=True)
class MarginProxy(Result):
    """Margin proxy over a sweep of noise scales.

    Attributes:
        space: space the noise is put on.
        unit: standard deviation that the scales multiply.
        items: items averaged over.
        neighbors: cell walls per item and level.
        points: one per scale.
    """

    space: Space
    unit: float
    items: int
    neighbors: int
    points: tuple[MarginPoint, ...]


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
        self.table: IndexedCodebook = index_codebook(torch.from_numpy(self.codewords))
        images = [self.codewords]
        if factors is not None:
            images = [self.codewords @ factor[columns] for factor in factors]
        self.images = [torch.from_numpy(np.ascontiguousarray(image)) for image in images]

    def ratios(
        self, residuals: Float, neighbors: int, noises: Sequence[float] | None, threads: int | None
    ) -> tuple[list[torch.Tensor], Float]:
        """Return ``d_j / s_j`` per noise, ``(batch, neighbors)``, and the nearest codewords."""
        m = min(neighbors + 1, len(self.codewords))
        labels, distances = nearest_m(torch.from_numpy(residuals), self.table, m, threads=threads)
        nearest = self.codewords[labels[:, 0].numpy()]
        if m == 1:  # a single codeword has no walls
            walls = torch.full((len(residuals), 1), torch.inf, dtype=torch.float64)
            return [walls] * len(noises if noises is not None else self.images), nearest
        # The wall between c_1 and c_j is their bisector. (|r - c_j|^2 - |r - c_1|^2) / 2 is the
        # distance of r to it, times |c_j - c_1|.
        rise = (distances[:, 1:].double() - distances[:, :1].double()) / 2
        # Standard deviation of the noise across the wall, times |c_j - c_1| as well, so that the
        # quotient below is the distance in units of the noise.
        lengths = []
        for image in self.images:
            step = image[labels[:, 1:]] - image[labels[:, :1]]
            lengths.append(torch.linalg.vector_norm(step, dim=2).double())
        # Equal codewords are no wall: the noise never chooses between them.
        ratios = [torch.where(length > 0, rise / length, torch.inf) for length in lengths]
        if noises is not None:
            ratios = [ratios[0] / noise for noise in noises]
        return ratios, nearest


def _proxy(
    space: Space,
    unit: float,
    latents: npt.NDArray[Any],
    codebooks: Sequence[Matrix],
    factors: Sequence[Float] | None,
    *,
    scales: Sequence[float],
    hierarchical: bool,
    slices: Sequence[slice] | None,
    neighbors: int,
    threads: int | None,
) -> MarginProxy:
    """Average the flip probabilities over the latents, by code and by prefix."""
    whole = range(latents.shape[1])
    parts = [slice(None)] * len(codebooks) if slices is None else slices
    levels = []
    for i, (codebook, part) in enumerate(zip(codebooks, parts, strict=True)):
        levels.append(_Walls(as_matrix(codebook, f"codebook {i}"), part, factors))
        width, expected = levels[-1].codewords.shape[1], len(whole[part])
        if width != expected:
            raise InputError(f"codebook {i} is {width} wide, the latents {expected}")
    noises = [scale * unit for scale in scales]
    code = np.zeros((len(noises), len(levels)))
    prefix = np.zeros_like(code)
    for rows in row_blocks(len(latents), _ROWS):
        block = residuals = as_block(latents, rows)
        # Per noise: log of the probability that no code so far has changed.
        stays = [torch.zeros(len(residuals), dtype=torch.float64) for _ in noises]
        for i, level in enumerate(levels):
            if not hierarchical:
                residuals = np.ascontiguousarray(block[:, level.columns])
            isotropic = noises if factors is None else None
            ratios, quantized = level.ratios(residuals, neighbors, isotropic, threads)
            for s, ratio in enumerate(ratios):
                # log of the probability that no wall is crossed, walls taken as independent.
                stay = torch.special.log_ndtr(ratio).sum(1)
                stays[s] = stays[s] + stay
                code[s, i] += float(-torch.expm1(stay).sum())
                prefix[s, i] += float(-torch.expm1(stays[s]).sum())
            if hierarchical:
                residuals = residuals - quantized
    items = len(latents)
    points = tuple(
        MarginPoint(float(scale), float(noise), tuple(codes), tuple(prefixes))
        for scale, noise, codes, prefixes in zip(
            scales, noises, (code / items).tolist(), (prefix / items).tolist(), strict=True
        )
    )
    return MarginProxy(space, float(unit), items, neighbors, points)


def _check(scales: Sequence[float], neighbors: int, codebooks: Sequence[Matrix]) -> None:
    if not scales or min(scales) <= 0 or neighbors < 1 or not codebooks:
        raise UsageError(
            f"scales={list(scales)}, neighbors={neighbors}, {len(codebooks)} codebooks: positive "
            "scales, at least one neighbor and at least one codebook are needed"
        )


def margin_proxy(
    latents: Matrix,
    codebooks: Sequence[Matrix],
    *,
    scales: Sequence[float] = NOISE_SCALES,
    unit: float | None = None,
    hierarchical: bool = True,
    slices: Sequence[slice] | None = None,
    neighbors: int = 9,
    threads: int | None = None,
) -> MarginProxy:
    """Estimate flip rates under latent noise in closed form, without drawing noise.

    Per item and level ``1 - prod_j (1 - Phi(-d_j / s))`` over the next codewords, ``d_j`` the
    distance from the level's residual to the bisector with codeword j; averaged over items. Walls
    are taken as independent and a level's noise as unaffected by flips above it, which tends to
    overestimate where noise is large and dimensions are few.

    Args:
        latents: ``(items, latent)`` before quantization.
        codebooks: one ``(codes, width)`` array per level.
        scales: noise as multiples of ``unit``, positive.
        unit: standard deviation of the space; None measures it by `latent_std`.
        hierarchical: levels quantize residuals; False for parallel codebooks of one latent.
        slices: columns of the latent that each codebook quantizes; None means all of them.
        neighbors: walls per item and level.
        threads: number of CPU threads; the result does not depend on it.

    Raises:
        InputError: shapes that do not fit, values that are not finite.
        UsageError: scales, neighbors or codebooks out of range.

    Cost: one nearest-codeword search of all rows per level.

    Source: ours.
    """
    _check(scales, neighbors, codebooks)
    array = as_matrix(latents, "latents")
    std = latent_std(array) if unit is None else unit
    return _proxy(
        "latent",
        std,
        array,
        codebooks,
        None,
        scales=scales,
        hierarchical=hierarchical,
        slices=slices,
        neighbors=neighbors,
        threads=threads,
    )


def _noise_factor(covariance: npt.NDArray[np.float64]) -> Float:
    """Return F with ``F F^T`` the covariance."""
    # Rounding leaves eigenvalues slightly below 0 where the encoder ignores a direction.
    values, vectors = np.linalg.eigh(covariance)
    factor: Float = (vectors * np.sqrt(np.clip(values, 0.0, None))).astype(np.float32)
    return factor


def input_margin_proxy(
    inputs: Matrix,
    encode_latent: Callable[[Float], Any],
    codebooks: Sequence[Matrix],
    *,
    scales: Sequence[float] = NOISE_SCALES,
    unit: float | None = None,
    hierarchical: bool = True,
    slices: Sequence[slice] | None = None,
    neighbors: int = 9,
    seed: int = 0,
    threads: int | None = None,
) -> MarginProxy:
    """Estimate flip rates under input noise from the margins in the latent space.

    The encoder turns isotropic input noise into latent noise of some covariance, which is
    measured by one draw per item; for each wall the noise across it counts. Dimensions that the
    encoder only pads change nothing.

    Args:
        inputs: ``(items, dim)``.
        encode_latent: inputs ``(batch, dim)`` float32 to latents ``(batch, latent)``.
        codebooks: this, the other arguments and errors are those of `margin_proxy`.
        scales: noise as multiples of ``unit``.
        unit: standard deviation of the inputs.
        hierarchical: levels quantize residuals.
        slices: columns of the latent that each codebook quantizes.
        neighbors: walls per item and level.
        seed: of the draws.
        threads: number of CPU threads.

    Cost: ``1 + scales`` passes of the encoder and one nearest-codeword search per level.

    Source: ours.
    """
    _check(scales, neighbors, codebooks)
    array = as_matrix(inputs, "inputs")
    std = latent_std(array) if unit is None else unit
    latents: list[Float] = []
    outer: list[Any] = [0.0] * len(scales)  # sums of the outer products of latent steps
    for index, rows in enumerate(row_blocks(len(array))):
        block = as_block(array, rows)
        clean = _encoded(encode_latent, block, codes=False)
        latents.append(clean)
        draws = numpy_generator(seed, "margins", index).standard_normal(block.shape, np.float32)
        # The same draws at every scale, as in `flip_rates`: the sweep is smooth.
        for i, scale in enumerate(scales):
            noisy = block + np.float32(scale * std) * draws
            step = _encoded(encode_latent, noisy, codes=False).astype(np.float64) - clean
            outer[i] = outer[i] + step.T @ step
    return _proxy(
        "input",
        std,
        np.concatenate(latents),
        codebooks,
        [_noise_factor(total / len(array)) for total in outer],
        scales=scales,
        hierarchical=hierarchical,
        slices=slices,
        neighbors=neighbors,
        threads=threads,
    )
