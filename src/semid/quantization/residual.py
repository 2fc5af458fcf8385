"""Residual quantization: what a level leaves is what the next one quantizes.

Tensors in, tensors out: fitting level by level (DRQ §4.2), greedy and beam encoding, decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from semid.quantization.beam import encode_beam
from semid.quantization.blocks import Blocks
from semid.quantization.kmeans import (
    KMeansOptions,
    KMeansResult,
    KMeansState,
    draw_sample,
    kmeans,
    sampled,
)
from semid.quantization.nearest import IndexedCodebook, assign
from semid.quantization.sharding import ShardedMatrix, as_sharded
from semid.seeds import child_seed

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LevelFit:
    """How one level's K-means ended.

    Attributes:
        inertia: sum of squared residual norms after this level, over the training rows.
        iterations: Lloyd iterations of the kept restart.
        converged: whether the tolerance was met before the iterations ran out.
        distinct: codewords that could be told apart.
    """

    inertia: float
    iterations: int
    converged: bool
    distinct: int


@dataclass(frozen=True)
class ResidualCodes:
    """Codes of a block.

    Attributes:
        codes: ``(n, levels)`` int64.
        residual_norms: ``(n,)`` float32, length of what the last level leaves.
    """

    codes: npt.NDArray[np.int64]
    residual_norms: Array


def fit_residual(
    blocks: Blocks | ShardedMatrix,
    codebook_sizes: Sequence[int],
    *,
    seed: int,
    options: KMeansOptions | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    init: Sequence[Array] | None = None,
    threads: int | None = None,
    memory_bytes: int = 1 << 30,
    done: Sequence[tuple[Array, npt.NDArray[np.int64], LevelFit]] = (),
    state: KMeansState | None = None,
    on_iteration: Callable[[int, KMeansState], None] | None = None,
    on_level: Callable[[int, KMeansResult], None] | None = None,
) -> tuple[list[Array], list[LevelFit]]:
    """Fit one codebook a level by K-means on what the levels before leave.

    Shapes: ``blocks`` (items, dim), ``weights`` (items,), returns (codes, dim).
    """
    options = options or KMeansOptions()
    rows = as_sharded(blocks, weights=weights, threads=threads, memory_bytes=memory_bytes)
    chosen = draw_sample(rows, max(codebook_sizes), seed=seed, options=options)
    train = rows
    if chosen is not None:
        train = sampled(rows, chosen, threads=threads, memory_bytes=memory_bytes)
    codebooks: list[Array] = []
    fits: list[LevelFit] = []
    for codebook, labels, fit in done:
        train.subtract_codewords(codebook, labels)
        codebooks.append(codebook)
        fits.append(fit)
    resumed = len(codebooks)  # the caller may append to `done` as levels finish
    for level in range(resumed, len(codebook_sizes)):
        result = kmeans(
            train,
            codebook_sizes[level],
            seed=child_seed(seed, "level", level),
            options=replace(options, sample_per_code=None),
            init=None if init is None else init[level],
            threads=threads,
            state=state if level == resumed else None,
            on_iteration=None if on_iteration is None else _at_level(on_iteration, level),
        )
        codebooks.append(result.centroids)
        fits.append(
            LevelFit(result.inertia, len(result.history), result.converged, result.distinct)
        )
        if on_level is not None:
            on_level(level, result)
        if level + 1 < len(codebook_sizes):
            train.subtract_codewords(result.centroids, result.labels)
    if chosen is not None and options.full_pass:
        codebooks = _refine(rows, codebooks, threads)
    return codebooks, fits


def _refine(rows: ShardedMatrix, codebooks: list[Array], threads: int | None) -> list[Array]:
    """One Lloyd iteration of every level over all rows, each on what the refined ones leave."""
    refined: list[Array] = []
    for codebook in codebooks:
        result = kmeans(
            rows,
            len(codebook),
            seed=0,  # unused: it starts from `init`
            options=KMeansOptions(max_iter=1),
            init=codebook,
            threads=threads,
        )
        refined.append(result.centroids)
        if len(refined) < len(codebooks):
            rows.subtract_codewords(result.centroids, result.labels)
    return refined


def _at_level(
    callback: Callable[[int, KMeansState], None], level: int
) -> Callable[[KMeansState], None]:
    return lambda state: callback(level, state)


def encode_residual(
    block: Array,
    codebooks: Sequence[IndexedCodebook],
    *,
    beam_width: int = 1,
    threads: int | None = None,
) -> ResidualCodes:
    """Quantize rows level by level.

    Returns `ResidualCodes`. Each row's codes depend on that row alone. Ties go to the lowest code.

    Shapes: ``block`` (n, dim).
    """
    if beam_width > 1 and len(block):
        beam, residual = encode_beam(block, codebooks, beam_width, threads)
        return ResidualCodes(beam, _norms(residual))
    codes = np.empty((len(block), len(codebooks)), dtype=np.int64)
    residual = block
    for level, codebook in enumerate(codebooks):
        codes[:, level], _ = assign(residual, codebook, threads=threads)
        residual = residual - codebook.codewords.numpy()[codes[:, level]]
    return ResidualCodes(codes, _norms(residual))


def _norms(rows: Array) -> Array:
    squared = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    norms: Array = np.sqrt(squared).astype(np.float32)
    return norms


def dequantize(
    codes: npt.NDArray[np.integer], codebooks: Sequence[Array], *, levels: int | None = None
) -> Array:
    """Sum the codewords of each row's codes.

    Returns ``(n, dim)`` float32, added in level order.

    Shapes: ``codes`` (n, levels), ``codebooks`` (codes, dim).
    """
    total = np.zeros((len(codes), codebooks[0].shape[1]), dtype=np.float32)
    for level, codebook in list(enumerate(codebooks))[:levels]:
        total += codebook[codes[:, level]]
    return total
