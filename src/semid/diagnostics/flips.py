"""Measured flip rates: how often codes change under noise, and what ranks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from semid.diagnostics.arrays import Matrix, as_block, as_matrix, row_blocks
from semid.diagnostics.overlap import NOISE_SCALES, latent_std
from semid.errors import InputError, UsageError
from semid.results import Result
from semid.seeds import numpy_generator

Space = Literal["input", "latent"]
Encode = Callable[[npt.NDArray[np.float32]], Any]
"""Rows ``(batch, dim)`` float32 to codes ``(batch, levels)``, array or tensor."""


@dataclass(frozen=True)
class Proportion(Result):
    """A share with its binomial confidence interval (Wilson).

    Attributes:
        value: share in [0, 1].
        low: lower end of the interval.
        high: upper end.
        trials: number of trials.
    """

    value: float
    low: float
    high: float
    trials: int


def proportion(successes: int, trials: int, *, confidence: float = 0.95) -> Proportion:
    """Return a share with its Wilson interval, which stays inside [0, 1] at the ends.

    Args:
        successes: 0 to ``trials``.
        trials: at least 1.
        confidence: coverage, between 0 and 1.

    Raises:
        UsageError: arguments out of range.
    """
    if not 0 <= successes <= trials or trials < 1 or not 0 < confidence < 1:
        raise UsageError(
            f"successes={successes}, trials={trials}, confidence={confidence}: 0 <= successes <= "
            "trials, trials >= 1 and 0 < confidence < 1 are needed"
        )
    # Wilson: the shares p from which the observed one is within z standard errors of p itself.
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials)
    half *= math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(center - half, 0.0)
    high = 1.0 if successes == trials else min(center + half, 1.0)
    return Proportion(share, low, high, trials)


@dataclass(frozen=True)
class FlipPoint(Result):
    """Flips at one noise scale.

    Attributes:
        scale: noise as a multiple of the standard deviation of the space it is put on.
        noise: its standard deviation per dimension.
        code: per level, share of the items whose code at that level changes.
        prefix: per level, share of the items whose codes up to that level change anywhere.
    """

    scale: float
    noise: float
    code: tuple[Proportion, ...]
    prefix: tuple[Proportion, ...]

    def shares(self, hierarchical: bool) -> tuple[Proportion, ...]:
        """Return the shares per level: by prefix, or by code alone for parallel codebooks."""
        return self.prefix if hierarchical else self.code


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


def _codes(encode: Encode, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Encode rows and check the codes."""
    codes = encode(rows)
    array = codes.detach().cpu().numpy() if isinstance(codes, torch.Tensor) else np.asarray(codes)
    if array.ndim != 2 or len(array) != len(rows) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"encode returned shape {array.shape} and dtype {array.dtype} for {len(rows)} rows; "
            "integer codes (batch, levels) are needed"
        )
    return array.astype(np.int64)


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

    Returns:
        A `FlipRates`.

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
        before = _codes(encode, block)
        if code is None:
            code = np.zeros((len(scales), before.shape[1]), np.int64)
            prefix = np.zeros_like(code)
        draws = numpy_generator(seed, "flips", index).standard_normal(block.shape, np.float32)
        for i, scale in enumerate(scales):
            # A prefix changes where any code up to its end does.
            changed = _codes(encode, block + np.float32(scale * std) * draws) != before
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


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ranks with ties sharing their mean."""
    inverse, counts = np.unique(values, return_inverse=True, return_counts=True)[1:]
    # Equal values have the ranks last - count + 1 to last, whose mean they share.
    last = np.cumsum(counts)
    mean: npt.NDArray[np.float64] = (last - (counts - 1) / 2.0)[inverse]
    return mean


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float | None:
    """Return Spearman's rank correlation, ties sharing their mean rank.

    Args:
        first: numbers ``(n,)``.
        second: numbers ``(n,)``.

    Returns:
        Between -1 and 1; None with fewer than two pairs or where one side is constant.

    Raises:
        InputError: the lengths differ.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"values to correlate have shapes {a.shape} and {b.shape}; (n,) twice")
    if len(a) < 2:
        return None
    # Pearson's correlation of the ranks, centered at their mean (n + 1) / 2.
    a, b = _ranks(a) - (len(a) + 1) / 2, _ranks(b) - (len(b) + 1) / 2
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip(a @ b / scale, -1.0, 1.0)) if scale > 0 else None


def rank_agreement(
    flips: npt.ArrayLike,
    proxies: Mapping[str, npt.ArrayLike],
    *,
    levels: npt.ArrayLike | None = None,
) -> dict[str, dict[str, float | None]]:
    """Return how well each proxy ranks measured flip rates over tokenizers and levels.

    Args:
        flips: measured flip rates at one scale, ``(rows,)``, one row per tokenizer and level.
        proxies: name -> values on the same rows, such as the overlap rate, its geometry penalty,
            and the margin proxy.
        levels: the level of each row; if given, correlations inside each level are added.

    Returns:
        Proxy -> ``{"all": rho, "level 0": rho, ...}``; None where it is not defined.

    Raises:
        InputError: lengths differ.
    """
    measured = np.asarray(flips, np.float64)
    groups = {"all": np.ones(len(measured), bool)}
    if levels is not None:
        level = np.asarray(levels)
        groups |= {f"level {v}": level == v for v in np.unique(level).tolist()}
    result: dict[str, dict[str, float | None]] = {}
    for name, values in proxies.items():
        column = np.asarray(values, np.float64)
        if column.shape != measured.shape or any(
            g.shape != measured.shape for g in groups.values()
        ):
            raise InputError(
                f"proxy '{name}' has shape {column.shape}, flips {measured.shape}; one value per "
                "row is needed on both sides, and one level per row"
            )
        result[name] = {g: spearman(measured[rows], column[rows]) for g, rows in groups.items()}
    return result
