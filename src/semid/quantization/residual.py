"""Residual quantization: each level quantizes the residual of the levels before it.

Fitting level by level (DRQ §4.2), greedy and beam encoding, decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from semid.errors import UsageError
from semid.quantization.balance import BalanceOptions, balance_level
from semid.quantization.beam import encode_rows, partial_residuals
from semid.quantization.blocks import MEMORY_BYTES, Blocks
from semid.quantization.engine.plain import lengths
from semid.quantization.kmeans import (
    KMeansOptions,
    KMeansResult,
    KMeansState,
    draw_sample,
    kmeans,
    sampled,
)
from semid.quantization.nearest import IndexedCodebook
from semid.quantization.sharding import LocalShardPool, ShardedMatrix, as_sharded
from semid.seeds import child_seed

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LevelFit:
    """How one level's K-means ended."""

    # Sum of squared residual norms after this level, over the training rows; with a training beam
    # the weighted sum over all partial codes.
    inertia: float
    iterations: int  # Lloyd iterations of the best restart
    converged: bool  # whether the tolerance was met before the iterations ran out
    distinct: int  # codewords that could be told apart

    @classmethod
    def of(cls, result: KMeansResult) -> LevelFit:
        """Return what a level's result says of it."""
        return cls(result.inertia, len(result.history), result.converged, result.distinct)


@dataclass(frozen=True)
class ResidualCodes:
    """Codes of a block."""

    codes: Labels  # (n, levels) int64
    residual_norms: Array  # (n,) float32, length of the residual after the last level

    @classmethod
    def of(cls, codes: Labels, residual: Array) -> ResidualCodes:
        """Return codes with the lengths of the residuals ``(n, dim)``, summed in float64."""
        return cls(codes, lengths(residual).astype(np.float32))


def fit_residual(
    blocks: Blocks | ShardedMatrix,
    codebook_sizes: Sequence[int],
    *,
    seed: int,
    options: KMeansOptions | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    init: Sequence[Array] | None = None,
    beam_width: int = 1,
    balance: BalanceOptions | None = None,
    threads: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    done: Sequence[tuple[Array, Labels, LevelFit]] = (),
    state: KMeansState | None = None,
    on_iteration: Callable[[int, KMeansState], None] | None = None,
    on_level: Callable[[int, KMeansResult], None] | None = None,
) -> tuple[list[Array], list[LevelFit]]:
    """Fit one codebook ``(codes, dim)`` per level by K-means on the residual of those before.

    A ``beam_width`` above 1 fits each level on the residuals of all partial codes that a beam of
    this width keeps of every row, as many times the rows, which then have to lie in this process.
    Partial codes that are worse than the best one of their row count less
    (`semid.quantization.beam.PARTIAL_POWER`).

    With ``balance`` a codebook has one more column, the square roots of its offsets (see
    `semid.quantization.balance`); the rows then have to lie in this process, too.
    """
    options = options or KMeansOptions()
    rows = as_sharded(blocks, weights=weights, threads=threads, memory_bytes=memory_bytes)
    # All levels train on one sample, large enough for the largest codebook.
    sample = draw_sample(rows, max(codebook_sizes), seed=seed, options=options)
    train = rows
    if sample is not None:
        train = sampled(rows, sample, threads=threads)
    codebooks: list[Array] = []
    fits: list[LevelFit] = []
    partials = partial(
        partial_residuals, width=beam_width, threads=threads, memory_bytes=memory_bytes
    )
    for codebook, labels, fit in done:  # levels of the run that is continued
        codebooks.append(codebook)
        fits.append(fit)
        if beam_width == 1 and len(codebooks) < len(codebook_sizes):
            train.subtract_codewords(codebook[:, : train.dim], labels)
    resumed = len(codebooks)  # the caller may append to `done` as levels finish
    for level in range(resumed, len(codebook_sizes)):
        result = kmeans(
            train if beam_width == 1 else partials(train, codebooks),
            codebook_sizes[level],
            seed=child_seed(seed, "level", level),
            options=replace(options, sample_per_code=None),
            init=None if init is None else init[level],
            threads=threads,
            state=state if level == resumed else None,
            on_iteration=None if on_iteration is None else partial(on_iteration, level),
        )
        if balance is not None:
            result = _balanced(train, result, balance, threads)
        codebooks.append(result.centroids)
        fits.append(LevelFit.of(result))
        if beam_width > 1:  # labels of partial codes, which are found again from the codebooks
            result = replace(result, labels=np.empty(0, np.int64))
        if on_level is not None:
            on_level(level, result)
        if beam_width == 1 and level + 1 < len(codebook_sizes):
            train.subtract_codewords(result.centroids[:, : train.dim], result.labels)
    if sample is None or not options.full_pass:
        return codebooks, fits
    # One Lloyd iteration of every level over all rows, each on the residual of the refined ones.
    for level, codebook in enumerate(codebooks):
        result = kmeans(
            rows if beam_width == 1 else partials(rows, codebooks[:level]),
            len(codebook),
            seed=0,  # unused: it starts from `init`
            options=KMeansOptions(max_iter=1),
            init=codebook,
            threads=threads,
        )
        codebooks[level] = result.centroids
        if beam_width == 1 and level + 1 < len(codebooks):
            rows.subtract_codewords(result.centroids, result.labels)
    return codebooks, fits


def _balanced(
    rows: ShardedMatrix, result: KMeansResult, options: BalanceOptions, threads: int | None
) -> KMeansResult:
    """Return the result of K-means after balancing."""
    if not isinstance(rows.pool, LocalShardPool):
        raise UsageError(
            "balanced codebooks need all rows in one process; leave balance out, or fit with "
            "--engine local and without torchrun"
        )
    level = balance_level(
        rows.pool.shard.view,
        result.centroids,
        options=options,
        weights=rows.weights,
        threads=threads,
    )
    return replace(result, centroids=level.codebook, labels=level.labels)


def encode_residual(
    block: Array,
    codebooks: Sequence[IndexedCodebook],
    *,
    beam_width: int = 1,
    threads: int | None = None,
) -> ResidualCodes:
    """Quantize rows ``(n, dim)`` level by level, each by itself; ties go to the lowest code."""
    return ResidualCodes(*encode_rows(block, codebooks, beam_width, threads))


def dequantize(codes: npt.NDArray[np.integer], codebooks: Sequence[Array]) -> Array:
    """Sum the codewords of each row's codes ``(n, levels)``, in level order: ``(n, dim)``."""
    total = np.zeros((len(codes), codebooks[0].shape[1]), dtype=np.float32)
    for level, codebook in enumerate(codebooks):
        total += codebook[codes[:, level]]
    return total
