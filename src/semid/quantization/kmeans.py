"""K-means over blocks: k-means++ seeding, full-data Lloyd, empty clusters re-seeded.

Everything that grows with the data happens in two functions: `assign` (labels and distances of a
block) and `statistics` (its sums). A memory map, several processes or a cluster are the same two
functions over other blocks, their results added in the order of one fixed tree. What is here sees
all rows through `semid.quantization.sharding.ShardedMatrix` and does not know where they lie.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from semid.errors import UsageError
from semid.options import Options, option
from semid.quantization.blocks import Blocks, Statistics, WritableBlocks
from semid.quantization.seeding import kmeans_plus_plus
from semid.quantization.sharding import ShardedMatrix, as_sharded
from semid.seeds import numpy_generator

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# A re-seeded centroid gets at least its own row, so one round nearly always fills all of them.
RESEED_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class KMeansOptions(Options):
    """How K-means is run.

    Of ``n_init`` seedings the run whose last iteration has the lowest inertia is the result. A
    sample is drawn without replacement. Fewer ``n_local_trials`` are faster and seed worse; 1 is
    plain k-means++ (``benchmarks/kmeans.py`` measures 2).
    """

    max_iter: int = option(25, ge=1, help="Maximum number of Lloyd iterations per level.")
    tol: float = option(
        1e-4, ge=0, lt=1, help="Stop when an iteration lowers the inertia by less than this share."
    )
    n_init: int = option(1, ge=1, help="Number of seedings per level; the best one is kept.")
    sample_per_code: int | None = option(
        None, ge=1, help="Train on at most this many rows per codeword; by default on all rows."
    )
    full_pass: bool = option(
        True, help="After training on a sample, run one iteration over all rows."
    )
    n_local_trials: int = option(
        4, ge=1, le=1024, help="Candidates per center in the k-means++ seeding."
    )


@dataclass
class KMeansState:
    """Progress of a run; enough to continue it to the same result."""

    restart: int  # number of the current restart
    iteration: int  # finished Lloyd iterations of it
    centroids: Array  # (codes, dim) after those iterations; empty before the seeding
    inertia: list[float] = field(default_factory=list)  # of each iteration's assignment
    # Of the best finished restart; empty before the first ends.
    best_centroids: Array = field(default_factory=lambda: np.empty((0, 0), np.float32))
    best_inertia: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class KMeansResult:
    """A finished run."""

    centroids: Array  # (codes, dim); codewords past `distinct` are copies of codeword 0
    # (items,) nearest centroid of each row; empty for rows in other processes, which keep theirs.
    labels: npt.NDArray[np.int64]
    inertia: float  # weighted sum of squared distances to it
    history: tuple[float, ...]  # inertia of each Lloyd iteration of the best restart
    distinct: int  # codewords that could be told apart: fewer if the data hold fewer distinct rows
    converged: bool  # whether the tolerance was met before `max_iter` was reached


def kmeans(
    blocks: Blocks | ShardedMatrix,
    codes: int,
    *,
    seed: int,
    options: KMeansOptions | None = None,
    weights: Doubles | None = None,
    init: Array | None = None,
    threads: int | None = None,
    state: KMeansState | None = None,
    on_iteration: Callable[[KMeansState], None] | None = None,
) -> KMeansResult:
    """Cluster rows by Lloyd's algorithm.

    The result depends on the data, ``seed`` and ``options`` alone, not on threads, memory or the
    processes that hold the rows. It is the restart with the lowest inertia.

    Args:
        blocks: ``(items, dim)`` finite rows; or a `ShardedMatrix`, which has its own weights and
            threads.
        codes: number of centroids, at least 1.
        seed: any integer.
        options: iterations, tolerance, seedings, sampling.
        weights: ``(items,)`` non-negative weights, for example popularity; None counts rows once.
        init: ``(codes, dim)`` centroids to start from instead of k-means++ (one restart).
        threads: number of CPU threads; None uses all available.
        state: continue from here; the outcome is that of the uninterrupted run.
        on_iteration: called after every Lloyd iteration; may save the state or raise to stop.

    Raises:
        UsageError: if ``codes`` or the shape of ``init`` or ``weights`` does not fit.

    Cost: per iteration O(items codes dim) time in one pass over the blocks; memory
    O(items + codes dim log(items)) beyond the blocks themselves, and up to half a gigabyte of what
    passes remember of rows (`AssignmentMemory`). Source: Lloyd 1982; DRQ §4.2.
    """
    options = options or KMeansOptions()
    _check(blocks, codes, weights, init)
    # 1. Whatever holds the rows is seen as shards; a sample is brought into this process.
    rows = as_sharded(blocks, weights=weights, threads=threads)
    sample = draw_sample(rows, codes, seed=seed, options=options)
    train = rows if sample is None else sampled(rows, sample, threads=threads)
    run = state or KMeansState(0, 0, np.empty((0, rows.dim), np.float32))
    # 2. Seed and iterate `n_init` times, and remember the run that ends with the least inertia.
    while run.restart < options.n_init:
        # A resumed run has its centroids. A seeding draws from a generator of its own number, so
        # that it is the same whether or not the runs before it were interrupted.
        if len(run.centroids) == 0 and init is not None:
            run.centroids = init
        elif len(run.centroids) == 0:
            run.centroids = kmeans_plus_plus(
                train,
                codes,
                generator=numpy_generator(seed, "seeding", run.restart),
                threads=threads,
                n_local_trials=options.n_local_trials,
            )
        _lloyd(train, run, options, on_iteration)
        if not run.best_inertia or run.inertia[-1] < run.best_inertia[-1]:
            run.best_centroids, run.best_inertia = run.centroids, run.inertia
        run.restart += 1
        run.iteration, run.inertia = 0, []
        run.centroids = np.empty((0, rows.dim), np.float32)
        if init is not None:
            break
    centroids, history = run.best_centroids, run.best_inertia
    if sample is not None and options.full_pass:
        # 3. One Lloyd step over all rows: an unbiased mean per centroid at the cost of one pass.
        centroids = _update(rows, rows.assign(centroids), centroids)
    # 4. Labels belong to the last centroids, not to those before the last update.
    centroids, inertia = _label(rows, centroids)
    # 5. Seeding stops at the number of distinct rows; copies of codeword 0 fill the rest. Ties go
    # to the lowest code, so a copy is never assigned.
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
        labels=rows.labels(),
        inertia=inertia,
        history=tuple(history),
        distinct=distinct,
        converged=has_converged(history, options.tol),
    )


def _check(
    blocks: Blocks | ShardedMatrix, codes: int, weights: Doubles | None, init: Array | None
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
    blocks: Blocks | ShardedMatrix, codes: int, *, seed: int, options: KMeansOptions
) -> npt.NDArray[np.int64] | None:
    """Draw the rising row numbers ``(n,)`` to train on; None for all rows."""
    size = (options.sample_per_code or len(blocks)) * codes
    if size >= len(blocks):
        return None
    generator = numpy_generator(seed, "sample")
    numbers = generator.choice(len(blocks), size, replace=False, shuffle=False)
    return np.sort(numbers).astype(np.int64)  # rising, so that they are read in order


def sampled(
    rows: ShardedMatrix, sample: npt.NDArray[np.int64], *, threads: int | None
) -> ShardedMatrix:
    """Bring a sample's rows, and their weights, into this process."""
    weights = None if rows.weights is None else rows.weights[sample]
    return as_sharded(WritableBlocks(rows.rows(sample)), weights=weights, threads=threads)


def _lloyd(
    train: ShardedMatrix,
    run: KMeansState,
    options: KMeansOptions,
    on_iteration: Callable[[KMeansState], None] | None,
) -> None:
    """Iterate ``run`` in place until it converges or its iterations run out."""
    while run.iteration < options.max_iter and not has_converged(run.inertia, options.tol):
        total = train.assign(run.centroids)
        run.centroids = _update(train, total, run.centroids)
        run.inertia.append(total.inertia)
        run.iteration += 1
        if on_iteration is not None:
            on_iteration(run)


def has_converged(inertia: list[float], tol: float) -> bool:
    """Whether the last iteration improved too little; depends on the history alone."""
    if len(inertia) < 2:
        return bool(inertia) and inertia[-1] == 0.0
    return inertia[-2] - inertia[-1] <= tol * inertia[-2]


def _update(rows: ShardedMatrix, total: Statistics, centroids: Array) -> Array:
    """Move centroids to the means of their rows; re-seed the empty ones."""
    counts = total.counts
    occupied = counts > 0
    moved = centroids.copy()
    # The mean minimizes the weighted sum of squared distances to the rows of a centroid.
    moved[occupied] = (total.sums[occupied] / counts[occupied, None]).astype(np.float32)
    return _reseed(rows, moved, np.flatnonzero(~occupied))


def _reseed(rows: ShardedMatrix, centroids: Array, empty: npt.NDArray[np.int64]) -> Array:
    """Put each empty centroid on one of the rows with the largest residuals, all distinct."""
    if len(empty) == 0:
        return centroids
    # A centroid on a row removes that row's loss, so the rows with the largest loss lower the
    # inertia most. Twice as many as needed, since duplicates among them are used once.
    farthest = rows.rows(rows.farthest(2 * len(empty)))
    _, first = np.unique(farthest, axis=0, return_index=True)
    farthest = farthest[np.sort(first)][: len(empty)]
    centroids[empty[: len(farthest)]] = farthest
    return centroids


def _label(rows: ShardedMatrix, centroids: Array) -> tuple[Array, float]:
    """Label all rows; centroids the last update left empty are re-seeded, the others stay."""
    total = rows.assign(centroids)
    for _ in range(RESEED_ROUNDS):
        empty = np.flatnonzero(total.counts == 0)
        if len(empty) == 0:
            break
        reseeded = _reseed(rows, centroids.copy(), empty)
        if np.array_equal(reseeded, centroids):
            break  # no row has any loss left to give
        centroids = reseeded
        total = rows.assign(centroids)
    return centroids, total.inertia
