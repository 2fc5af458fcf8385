"""K-means over blocks: k-means++ seeding, full-data Lloyd, empty clusters re-seeded.

Everything that grows with the data happens in two functions: `assign` (labels and distances of a
block) and `statistics` (its sums). A memory map, several processes or a cluster are the same two
functions over other blocks, their results added in block order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import UsageError
from semid.quantization.assign import assign
from semid.quantization.blocks import ArrayBlocks, Blocks, read_ahead
from semid.quantization.nearest import prepare
from semid.quantization.seeding import kmeans_plus_plus
from semid.quantization.statistics import Statistics, statistics
from semid.quantization.threads import default_threads
from semid.seeds import numpy_generator

__all__ = ["KMeansOptions", "KMeansResult", "KMeansState", "assign", "draw_sample", "kmeans"]

logger = logging.getLogger(__name__)

# A re-seeded centroid takes at least its own row, so one round nearly always fills all of them.
RESEED_ROUNDS = 3

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class KMeansOptions:
    """How K-means is run.

    Attributes:
        iterations: most Lloyd iterations a restart, at least 1.
        tolerance: stop when an iteration lowers the inertia by less than this share of it.
        restarts: independent seedings; the one whose last iteration had the lowest inertia
            is kept.
        sample_per_code: train on at most this many rows a codeword, drawn without replacement;
            None trains on all rows.
        full_pass: after training on a sample, one Lloyd iteration over all rows.
    """

    iterations: int = 25
    tolerance: float = 1e-4
    restarts: int = 1
    sample_per_code: int | None = None
    full_pass: bool = True

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UsageError: listing every value out of range.
        """
        problems = []
        if self.iterations < 1:
            problems.append(f"iterations={self.iterations}: give at least 1")
        if not 0 <= self.tolerance < 1:
            problems.append(f"tolerance={self.tolerance}: give a share in [0, 1)")
        if self.restarts < 1:
            problems.append(f"restarts={self.restarts}: give at least 1")
        if self.sample_per_code is not None and self.sample_per_code < 1:
            problems.append(f"sample_per_code={self.sample_per_code}: give at least 1, or None")
        if problems:
            raise UsageError("; ".join(problems))


@dataclass
class KMeansState:
    """Where a run stands; enough to continue it to the same result.

    Attributes:
        restart: number of the current restart.
        iteration: Lloyd iterations done in it.
        centroids: ``(codes, dim)`` float32 after those iterations.
        inertia: inertia of each iteration's assignment.
        best_centroids: of the best finished restart; empty before the first ends.
        best_inertia: its inertia history.
    """

    restart: int
    iteration: int
    centroids: Array
    inertia: list[float] = field(default_factory=list)
    best_centroids: Array = field(default_factory=lambda: np.empty((0, 0), np.float32))
    best_inertia: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class KMeansResult:
    """A finished run.

    Attributes:
        centroids: ``(codes, dim)`` float32; codewords past ``distinct`` are copies of codeword 0.
        labels: ``(items,)`` int64, the nearest centroid of each row.
        inertia: weighted sum of squared distances to it.
        history: inertia of each Lloyd iteration of the kept restart.
        distinct: codewords that could be told apart; fewer than ``codes`` only if the data hold
            fewer distinct rows.
        converged: whether the tolerance was met before ``iterations`` ran out.
    """

    centroids: Array
    labels: npt.NDArray[np.int64]
    inertia: float
    history: tuple[float, ...]
    distinct: int
    converged: bool


def kmeans(
    blocks: Blocks,
    codes: int,
    *,
    seed: int,
    options: KMeansOptions | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    init: Array | None = None,
    threads: int | None = None,
    state: KMeansState | None = None,
    on_iteration: Callable[[KMeansState], None] | None = None,
) -> KMeansResult:
    """Cluster rows by Lloyd's algorithm.

    The result depends on the data, ``seed`` and ``options`` alone, not on threads or memory.

    Args:
        blocks: ``(items, dim)`` finite rows.
        codes: number of centroids, at least 1.
        seed: any integer.
        options: iterations, tolerance, restarts, sampling.
        weights: ``(items,)`` non-negative weights, for example popularity; None counts rows once.
        init: ``(codes, dim)`` centroids to start from instead of k-means++ (one restart).
        threads: plain threads; None takes what the machine allows.
        state: continue from here; the outcome is that of the uninterrupted run.
        on_iteration: called after every Lloyd iteration; may save the state or raise to stop.

    Returns:
        The restart with the lowest inertia, and every row's label under it.

    Raises:
        UsageError: if ``codes`` or the shape of ``init`` or ``weights`` does not fit.

    Cost: per iteration O(items codes dim) time in one pass over the blocks; memory
    O(items + codes dim) beyond the blocks themselves. Source: Lloyd 1982; DRQ §4.2.
    """
    options = options or KMeansOptions()
    _check(blocks, codes, weights, init)
    threads = threads or default_threads()
    chosen = draw_sample(blocks, codes, seed=seed, options=options)
    train = blocks if chosen is None else ArrayBlocks(blocks.rows(chosen))
    train_weights = weights if weights is None or chosen is None else weights[chosen]
    run = state or KMeansState(0, 0, np.empty((0, blocks.dim), np.float32))
    while run.restart < options.restarts:
        if len(run.centroids) == 0:
            generator = numpy_generator(seed, "seeding", run.restart)
            run.centroids = (
                init
                if init is not None
                else kmeans_plus_plus(
                    train, codes, generator=generator, weights=train_weights, threads=threads
                )
            )
        _lloyd(train, run, options, train_weights, threads, on_iteration)
        if not run.best_inertia or run.inertia[-1] < run.best_inertia[-1]:
            run.best_centroids, run.best_inertia = run.centroids, run.inertia
        run.restart += 1
        run.iteration, run.inertia = 0, []
        run.centroids = np.empty((0, blocks.dim), np.float32)
        if init is not None:
            break
    centroids, history = run.best_centroids, run.best_inertia
    if chosen is not None and options.full_pass:
        centroids = _update(blocks, _pass(blocks, centroids, weights, threads), centroids, weights)
    centroids, labelled = _label(blocks, centroids, weights, threads)
    distinct = len(centroids)
    if distinct < codes:
        logger.warning(
            "only %d distinct rows for %d codewords; %d codes stay dead",
            distinct,
            codes,
            codes - distinct,
        )
        centroids = np.concatenate([centroids, np.repeat(centroids[:1], codes - distinct, axis=0)])
    return KMeansResult(
        centroids=centroids,
        labels=labelled.labels,
        inertia=labelled.total.inertia,
        history=tuple(history),
        distinct=distinct,
        converged=_settled(history, options.tolerance),
    )


def _check(
    blocks: Blocks, codes: int, weights: npt.NDArray[np.float64] | None, init: Array | None
) -> None:
    problems = []
    if codes < 1:
        problems.append(f"codes={codes}: give at least 1")
    if len(blocks) == 0:
        problems.append("there are no rows to cluster")
    if weights is not None:
        if weights.shape != (len(blocks),):
            problems.append(f"weights have shape {weights.shape}, rows are ({len(blocks)},)")
        elif not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            problems.append("weights must be finite, not negative, and not all zero")
    if init is not None and init.shape != (codes, blocks.dim):
        problems.append(f"init has shape {init.shape}, expected ({codes}, {blocks.dim})")
    if problems:
        raise UsageError("; ".join(problems))


def draw_sample(
    blocks: Blocks, codes: int, *, seed: int, options: KMeansOptions
) -> npt.NDArray[np.int64] | None:
    """Draw the rows to train on, if a sample was asked for and the data are larger than it.

    Returns:
        ``(n,)`` rising row numbers, or None to train on all rows.
    """
    if options.sample_per_code is None or options.sample_per_code * codes >= len(blocks):
        return None
    size = options.sample_per_code * codes
    generator = numpy_generator(seed, "sample")
    chosen = generator.choice(len(blocks), size, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)


def _lloyd(
    train: Blocks,
    run: KMeansState,
    options: KMeansOptions,
    weights: npt.NDArray[np.float64] | None,
    threads: int,
    on_iteration: Callable[[KMeansState], None] | None,
) -> None:
    """Iterate ``run`` in place until it converges or its iterations run out."""
    while run.iteration < options.iterations:
        if _settled(run.inertia, options.tolerance):
            return
        passed = _pass(train, run.centroids, weights, threads)
        run.centroids = _update(train, passed, run.centroids, weights)
        run.inertia.append(passed.total.inertia)
        run.iteration += 1
        if on_iteration is not None:
            on_iteration(run)


def _settled(inertia: list[float], tolerance: float) -> bool:
    """Whether the last iteration improved too little; depends on the history alone."""
    if len(inertia) < 2:
        return bool(inertia) and inertia[-1] == 0.0
    return inertia[-2] - inertia[-1] <= tolerance * inertia[-2]


@dataclass
class _Pass:
    """One look at all rows under fixed centroids."""

    labels: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    total: Statistics


def _pass(
    blocks: Blocks,
    centroids: Array,
    weights: npt.NDArray[np.float64] | None,
    threads: int,
) -> _Pass:
    """Assign every row and add up the statistics in block order."""
    codes = len(centroids)
    result = _Pass(
        np.empty(len(blocks), dtype=np.int64),
        np.empty(len(blocks), dtype=np.float32),
        Statistics.zeros(codes, blocks.dim),
    )
    prepared = prepare(torch.from_numpy(centroids))
    for start, block in read_ahead(blocks):
        span = slice(start, start + len(block))
        result.labels[span], result.distances[span] = assign(block, prepared, threads=threads)
        result.total.add_(
            statistics(
                block,
                result.labels[span],
                result.distances[span],
                codes=codes,
                weights=None if weights is None else weights[span],
                threads=threads,
            )
        )
    return result


def _update(
    blocks: Blocks, passed: _Pass, centroids: Array, weights: npt.NDArray[np.float64] | None
) -> Array:
    """Move centroids to the means of their rows; re-seed the empty ones."""
    counts = passed.total.counts
    filled = counts > 0
    moved = centroids.copy()
    moved[filled] = (passed.total.sums[filled] / counts[filled, None]).astype(np.float32)
    return _reseed(blocks, passed, moved, np.flatnonzero(~filled), weights)


def _reseed(
    blocks: Blocks,
    passed: _Pass,
    centroids: Array,
    empty: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float64] | None,
) -> Array:
    """Put each empty centroid on one of the rows with the largest residuals, all distinct."""
    if len(empty) == 0:
        return centroids
    loss = passed.distances if weights is None else passed.distances * weights
    # Twice as many as needed, since duplicates among them are used once.
    candidates = min(2 * len(empty), len(loss))
    farthest = np.argpartition(-loss, candidates - 1)[:candidates].astype(np.int64)
    farthest = farthest[np.lexsort((farthest, -loss[farthest]))]
    farthest = farthest[loss[farthest] > 0]
    rows = blocks.rows(farthest)
    _, first = np.unique(rows, axis=0, return_index=True)
    rows = rows[np.sort(first)][: len(empty)]
    centroids[empty[: len(rows)]] = rows
    return centroids


def _label(
    blocks: Blocks, centroids: Array, weights: npt.NDArray[np.float64] | None, threads: int
) -> tuple[Array, _Pass]:
    """Label all rows; centroids the last update left empty are re-seeded, the others stay."""
    passed = _pass(blocks, centroids, weights, threads)
    for _ in range(RESEED_ROUNDS):
        empty = np.flatnonzero(passed.total.counts == 0)
        if len(empty) == 0:
            break
        reseeded = _reseed(blocks, passed, centroids.copy(), empty, weights)
        if np.array_equal(reseeded, centroids):
            break
        centroids = reseeded
        passed = _pass(blocks, centroids, weights, threads)
    return centroids, passed
