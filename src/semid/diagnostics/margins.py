"""The margin proxy: flip rates in closed form from distances to the nearest cell walls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.diagnostics.arrays import Matrix, as_block, as_matrix, row_blocks
from semid.diagnostics.flips import Space
from semid.diagnostics.overlap import NOISE_SCALES, latent_std
from semid.errors import InputError, UsageError
from semid.quantization.nearest import IndexedCodebook, index_codebook, nearest_m
from semid.results import Result
from semid.seeds import numpy_generator

_ROWS = 2048  # rows per block; rows x 9 walls x latent floats are gathered at once

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MarginPoint(Result):
    """Proxy at one noise scale.

    Attributes:
        scale: noise as a multiple of the standard deviation of the space it is put on.
        noise: its standard deviation per dimension.
        code: per level, expected share of items whose code changes.
        prefix: per level, expected share of items whose codes up to it change anywhere.
    """

    scale: float
    noise: float
    code: tuple[float, ...]
    prefix: tuple[float, ...]

    def shares(self, hierarchical: bool) -> tuple[float, ...]:
        """Return the shares per level, as `FlipPoint.shares`."""
        return self.prefix if hierarchical else self.code


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

    def __init__(self, codebook: npt.NDArray[Any], factors: Sequence[Float] | None) -> None:
        self.codewords = np.ascontiguousarray(codebook, dtype=np.float32)
        self.table: IndexedCodebook = index_codebook(torch.from_numpy(self.codewords))
        images = [self.codewords] if factors is None else [self.codewords @ f for f in factors]
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
    latents: npt.NDArray[Any],
    codebooks: Sequence[Matrix],
    *,
    noises: Sequence[float],
    factors: Sequence[Float] | None,
    hierarchical: bool,
    neighbors: int,
    threads: int | None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Average the flip probabilities: ``(scales, levels)`` by code and by prefix."""
    levels = [_Walls(as_matrix(c, f"codebook {i}"), factors) for i, c in enumerate(codebooks)]
    for i, level in enumerate(levels):
        if level.codewords.shape[1] != latents.shape[1]:
            raise InputError(
                f"codebook {i} is {level.codewords.shape[1]} wide, the latents {latents.shape[1]}"
            )
    code = np.zeros((len(noises), len(levels)))
    prefix = np.zeros_like(code)
    for rows in row_blocks(len(latents), _ROWS):
        # Per noise: log of the probability that no code so far has changed.
        residuals = as_block(latents, rows)
        stays = [torch.zeros(len(residuals), dtype=torch.float64) for _ in noises]
        for i, level in enumerate(levels):
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
    return code / len(latents), prefix / len(latents)


def _check(scales: Sequence[float], neighbors: int, codebooks: Sequence[Matrix]) -> None:
    if not scales or min(scales) <= 0 or neighbors < 1 or not codebooks:
        raise UsageError(
            f"scales={list(scales)}, neighbors={neighbors}, {len(codebooks)} codebooks: positive "
            "scales, at least one neighbor and at least one codebook are needed"
        )


def _result(
    space: Space,
    unit: float,
    items: int,
    neighbors: int,
    scales: Sequence[float],
    sums: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
) -> MarginProxy:
    code, prefix = sums
    points = tuple(
        MarginPoint(
            float(scale), float(scale * unit), tuple(code[i].tolist()), tuple(prefix[i].tolist())
        )
        for i, scale in enumerate(scales)
    )
    return MarginProxy(space, float(unit), items, neighbors, points)


def margin_proxy(
    latents: Matrix,
    codebooks: Sequence[Matrix],
    *,
    scales: Sequence[float] = NOISE_SCALES,
    unit: float | None = None,
    hierarchical: bool = True,
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
        codebooks: one ``(codes, latent)`` array per level.
        scales: noise as multiples of ``unit``, positive.
        unit: the latent standard deviation; None measures it by `latent_std`.
        hierarchical: levels quantize residuals; False for parallel codebooks of one latent.
        neighbors: walls per item and level.
        threads: number of CPU threads; the result does not depend on it.

    Returns:
        A `MarginProxy`.

    Raises:
        InputError: shapes that do not fit, values that are not finite.
        UsageError: scales, neighbors or codebooks out of range.

    Cost: one nearest-codeword search of all rows per level.

    Source: ours.
    """
    _check(scales, neighbors, codebooks)
    array = as_matrix(latents, "latents")
    std = latent_std(array) if unit is None else unit
    sums = _proxy(
        array,
        codebooks,
        noises=[scale * std for scale in scales],
        factors=None,
        hierarchical=hierarchical,
        neighbors=neighbors,
        threads=threads,
    )
    return _result("latent", std, len(array), neighbors, scales, sums)


def _noise_factor(displacements: npt.NDArray[np.float64], draws: int) -> Float:
    """Return F with ``F F^T`` the covariance, from the sum of outer products."""
    # Rounding leaves eigenvalues slightly below 0 where the encoder ignores a direction.
    values, vectors = np.linalg.eigh(displacements / draws)
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
        codebooks: see `margin_proxy`.
        scales: noise as multiples of ``unit``, positive.
        unit: the input's standard deviation; None measures it by `latent_std`.
        hierarchical: see `margin_proxy`.
        neighbors: see `margin_proxy`.
        seed: of the draws.
        threads: see `margin_proxy`.

    Returns:
        A `MarginProxy`.

    Raises:
        InputError: shapes that do not fit, values that are not finite.
        UsageError: scales, neighbors or codebooks out of range.

    Cost: ``1 + scales`` passes of the encoder and one nearest-codeword search per level.

    Source: ours.
    """
    _check(scales, neighbors, codebooks)
    array = as_matrix(inputs, "inputs")
    std = latent_std(array) if unit is None else unit
    latents: list[Float] = []
    outer: list[npt.NDArray[np.float64]] = []
    for index, rows in enumerate(row_blocks(len(array))):
        block = as_block(array, rows)
        clean = _latents(encode_latent, block)
        latents.append(clean)
        draws = numpy_generator(seed, "margins", index).standard_normal(block.shape, np.float32)
        # The same draws at every scale, as in `flip_rates`: the sweep is smooth.
        for i, scale in enumerate(scales):
            moved = _latents(encode_latent, block + np.float32(scale * std) * draws)
            step = moved.astype(np.float64) - clean
            if index == 0:
                outer.append(step.T @ step)
            else:
                outer[i] += step.T @ step
    sums = _proxy(
        np.concatenate(latents),
        codebooks,
        noises=[scale * std for scale in scales],
        factors=[_noise_factor(total, len(array)) for total in outer],
        hierarchical=hierarchical,
        neighbors=neighbors,
        threads=threads,
    )
    return _result("input", std, len(array), neighbors, scales, sums)


def _latents(encode_latent: Callable[[Float], Any], rows: Float) -> Float:
    """Encode rows to latents and check these."""
    latents = encode_latent(rows)
    tensor = isinstance(latents, torch.Tensor)
    array = latents.detach().cpu().numpy() if tensor else np.asarray(latents)
    if array.ndim != 2 or len(array) != len(rows):
        raise InputError(
            f"encode_latent returned shape {array.shape} for {len(rows)} rows; (batch, latent) "
            "is needed"
        )
    return np.ascontiguousarray(array, dtype=np.float32)
