"""Product quantization: a codebook for each part of the columns, fitted in joint passes.

K-means of all parts runs side by side (Jégou et al. 2011): one pass over the rows assigns and sums
every part, so that rows that do not fit in memory are read once per iteration, not once per part.
`semid.quantization.rotation` turns the columns first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.lazy import kernel
from semid.quantization.blocks import (
    ArrayBlocks,
    Blocks,
    Node,
    Statistics,
    StatisticsList,
    TreeSum,
)
from semid.quantization.kmeans import (
    KMeansOptions,
    draw_sample,
    has_converged,
    sampled,
)
from semid.quantization.nearest import (
    IndexedCodebook,
    assign,
    index_codebook,
)
from semid.quantization.residual import ResidualCodes
from semid.quantization.seeding import kmeans_plus_plus
from semid.quantization.sharding import Shard, ShardedMatrix, as_sharded
from semid.quantization.threads import map_blocks
from semid.seeds import numpy_generator

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Slices = Sequence[slice]

SEED_ROWS_PER_CODE = 16
"""Rows per codeword that the seeding sees: Lloyd's iterations over all rows come after it."""
SEQUENTIAL_PAIRS = 1 << 22
"""Rows times codewords up to which the seeding draws one center after another."""
SMALL_ROWS = 4096
"""Rows below which threads cost more than they bring."""


def part_slices(dim: int, parts: int) -> tuple[slice, ...]:
    """Cut ``dim`` columns into parts side by side; the first ``dim % parts`` are one wider."""
    width, wider = divmod(dim, parts)
    ends = [(part + 1) * width + min(part + 1, wider) for part in range(parts)]
    return tuple(slice(a, b) for a, b in zip([0, *ends], ends, strict=False))


@dataclass(frozen=True)
class PartFit:
    """How K-means of one part ended.

    Attributes:
        inertia: weighted sum of squared distances in the last iteration, before its update.
        iterations: Lloyd iterations of the best restart.
        converged: whether the tolerance was met before the iterations ran out.
        distinct: codewords that could be told apart; the others are copies of the first.
    """

    inertia: float
    iterations: int
    converged: bool
    distinct: int


@dataclass
class ProductState:
    """Progress of a run; enough to continue it to the same result.

    Attributes:
        restart: number of the current restart.
        iteration: finished iterations of it.
        books: one ``(codes, width)`` array per part; empty before the seeding.
        inertia: of each part, the inertia of every iteration.
        best_books: of the best finished restart, part by part.
        best_inertia: their histories.
    """

    restart: int = 0
    iteration: int = 0
    books: list[Array] = field(default_factory=list)
    inertia: list[list[float]] = field(default_factory=list)
    best_books: list[Array] = field(default_factory=list)
    best_inertia: list[list[float]] = field(default_factory=list)


def fit_product(
    blocks: Blocks | ShardedMatrix,
    slices: Slices,
    codebook_sizes: Sequence[int],
    *,
    seed: int,
    options: KMeansOptions,
    weights: Doubles | None = None,
    init: Sequence[Array] | None = None,
    threads: int | None = None,
    memory_bytes: int = 1 << 30,
    state: ProductState | None = None,
    on_iteration: Callable[[ProductState], None] | None = None,
) -> tuple[list[Array], list[PartFit]]:
    """Fit one codebook per part of the columns by K-means, all parts in the same passes.

    Rows are held in memory up to ``memory_bytes`` and read again in every pass above it; the
    results are the same. A `ShardedMatrix` brings its own weights and threads. ``init`` holds
    codebooks to start from instead of k-means++ (one restart).

    Shapes: ``blocks`` (items, dim), ``weights`` (items,), returns ``(codes, width)`` per part.

    Cost: O(items codes dim) per iteration for all parts together, in one pass over the rows; later
    passes skip most codewords, for which up to half a gigabyte is kept (`AssignmentMemory`).
    """
    everything = as_sharded(blocks, weights=weights, threads=threads, memory_bytes=memory_bytes)
    sample = draw_sample(everything, max(codebook_sizes), seed=seed, options=options)
    rows = everything if sample is None else sampled(everything, sample, threads=threads)
    run = state or ProductState()
    parts = range(len(slices))
    while run.restart < options.n_init:
        if not run.books:
            run.books = list(init or seed_parts(
                rows, slices, codebook_sizes, seed=seed, restart=run.restart,
                trials=options.n_local_trials, threads=threads,
            ))  # fmt: skip
            run.inertia = [[] for _ in parts]
        while run.iteration < options.max_iter:
            # A part that has converged waits for the others.
            active = [i for i in parts if not has_converged(run.inertia[i], options.tol)]
            if not active:
                break
            _iterate(rows, slices, run, active)
            run.iteration += 1
            if on_iteration is not None:
                on_iteration(run)
        # Parts do not depend on each other, so each keeps the best of its own restarts.
        if not run.best_books:
            run.best_books, run.best_inertia = run.books, run.inertia
        else:
            for i in parts:
                if run.inertia[i][-1] < run.best_inertia[i][-1]:
                    run.best_books[i], run.best_inertia[i] = run.books[i], run.inertia[i]
        run.restart += 1
        run.iteration, run.books, run.inertia = 0, [], []
        if init is not None:
            break
    final = ProductState(books=list(run.best_books), inertia=[list(h) for h in run.best_inertia])
    if sample is not None and options.full_pass:
        # One iteration over all rows: an unbiased mean per codeword at the cost of one pass.
        _iterate(everything, slices, final, list(parts))
    fits = []
    for i in parts:
        distinct = len(np.unique(final.books[i], axis=0))
        if distinct < codebook_sizes[i]:
            logger.warning(
                "codebook %d: only %d of %d codewords differ, because the rows have no more values "
                "in its columns; %d codes stay dead (fewer codebooks or a smaller codebook_size "
                "avoid that)",
                i + 1, distinct, codebook_sizes[i], codebook_sizes[i] - distinct,
            )  # fmt: skip
        fits.append(
            PartFit(
                final.inertia[i][-1],
                len(run.best_inertia[i]),
                has_converged(run.best_inertia[i], options.tol),
                distinct,
            )
        )
    return final.books, fits


def seed_parts(
    rows: ShardedMatrix,
    slices: Slices,
    codebook_sizes: Sequence[int],
    *,
    seed: int,
    restart: int,
    trials: int,
    threads: int | None,
    transform: Callable[[Array], Array] | None = None,
) -> list[Array]:
    """Seed every part by k-means++ on the columns of one sample of the rows, transformed.

    Where a part has fewer distinct rows than codewords, copies of the first codeword fill the rest:
    ties go to the lowest code, so they get no rows.
    """
    count = min(len(rows), SEED_ROWS_PER_CODE * max(codebook_sizes))
    numbers = np.arange(len(rows))
    if count < len(rows):
        generator = numpy_generator(seed, "seeding rows", restart)
        numbers = np.sort(generator.choice(len(rows), count, replace=False, shuffle=False))
    sample = rows.rows(numbers)
    if transform is not None:
        sample = transform(sample)
    mass = None if rows.weights is None else rows.weights[numbers]
    if mass is not None and not mass.any():
        mass = None  # the sample missed all rows that count; any rows do to start from

    def work(part: int) -> Array:
        codes, columns = codebook_sizes[part], np.ascontiguousarray(sample[:, slices[part]])
        generator = numpy_generator(seed, "seeding", restart, part)
        if codes * len(columns) <= SEQUENTIAL_PAIRS:
            draws = generator.random((codes, trials))
            weights = np.ones(len(columns)) if mass is None else mass
            drawn = draw_centers(np.ascontiguousarray(columns.T), weights, draws)
            centers = columns[drawn[drawn >= 0]]
        else:
            centers = kmeans_plus_plus(
                ArrayBlocks(columns), codes, generator=generator, weights=mass, threads=1,
                n_local_trials=trials,
            )  # fmt: skip
        return np.concatenate([centers, np.repeat(centers[:1], codes - len(centers), axis=0)])

    return map_blocks(work, range(len(slices)), threads=threads)


@kernel()
def draw_centers(x: Array, weights: Doubles, draws: Doubles) -> npt.NDArray[np.int64]:
    """Draw centers among the columns of ``x`` by greedy k-means++ (Arthur & Vassilvitskii 2007).

    Of the candidates of one draw ``(centers, trials)``, the one that lowers the weighted sum of
    squared distances most is the next center. Returns row numbers ``(centers,)``, -1 once every row
    is a center. In small samples this is quicker than rounds of many candidates.

    Shapes: ``x`` (width, n), so that the sums of many points lie side by side in vector registers;
    ``weights`` (n,).
    """
    width, rows = x.shape
    centers = np.full(len(draws), -1, np.int64)
    nearest = np.full(rows, np.inf)
    trial, best = np.empty(rows), np.empty(rows)
    running = np.empty(rows)
    for c in range(len(draws)):
        total = 0.0
        for i in range(rows):
            # The first center is drawn by weight, the next ones by weighted squared distance (D^2).
            total += weights[i] if c == 0 else weights[i] * nearest[i]
            running[i] = total
        if not total > 0.0:
            break
        lowest, chosen = np.inf, -1
        for t in range(draws.shape[1]):
            # The first row at which the running sum passes the target; one of no mass never is.
            row = np.searchsorted(running, draws[c, t] * total, side="right")
            row = min(row, rows - 1)
            while row > 0 and running[row] == running[row - 1]:
                row -= 1
            trial[:] = 0.0
            for d in range(width):
                center = np.float64(x[d, row])
                for i in range(rows):
                    difference = np.float64(x[d, i]) - center
                    trial[i] += difference * difference
            potential = 0.0
            for i in range(rows):
                trial[i] = min(trial[i], nearest[i])
                potential += weights[i] * trial[i]
            if potential < lowest:
                lowest, chosen = potential, row
                # The buffers change places, so the best distances are kept without a copy.
                trial, best = best, trial
        nearest, best = best, nearest
        centers[c] = chosen
    return centers


def _iterate(rows: ShardedMatrix, slices: Slices, run: ProductState, active: Sequence[int]) -> None:
    """Run one Lloyd iteration of the parts ``active``, in place."""
    totals = rows.sum(assign_parts, slices, run.books, active).parts
    before = list(run.books)
    run.books = move_codewords(run.books, active, totals)
    empty: dict[int, npt.NDArray[np.int64]] = {}
    for part, total in zip(active, totals, strict=True):
        run.inertia[part] = [*run.inertia[part], total.inertia]
        # With inertia 0 every row lies on its codeword: no place is better for an empty one.
        if total.inertia > 0 and not total.counts.all():
            empty[part] = np.flatnonzero(total.counts == 0)
    if empty:
        _reseed(rows, slices, before, run.books, empty)


def move_codewords(
    books: Sequence[Array], active: Sequence[int], totals: Sequence[Statistics]
) -> list[Array]:
    """Return the codebooks with the codewords of some parts at the means of their rows."""
    moved = list(books)
    for part, total in zip(active, totals, strict=True):
        occupied = total.counts > 0
        book = books[part].copy()
        # The mean minimizes the weighted sum of squared distances to the rows of a codeword.
        book[occupied] = (total.sums[occupied] / total.counts[occupied, None]).astype(np.float32)
        moved[part] = book
    return moved


def assign_parts(
    shard: Shard, slices: Slices, books: Sequence[Array], active: Sequence[int]
) -> list[Node[StatisticsList]]:
    """Assign a shard's rows to the codewords of some parts in one pass; sum the rows of each."""
    tables = index_parts(books, active)
    # Block sums are added along one fixed tree, so shards, memory and threads change no bit.
    tree: TreeSum[StatisticsList] = TreeSum()
    for number, span, block in shard.numbered_blocks():
        weights = None if shard.weights is None else shard.weights[span]

        def work(part: int) -> Statistics:
            name = (part, span.start)  # noqa: B023
            columns, labels, distances = shard.memory.assign(
                name, block[:, slices[part]], tables[part], threads=1  # noqa: B023
            )  # fmt: skip
            return part_statistics(columns, labels, distances, len(tables[part]), weights)  # noqa: B023

        tree.add(number, StatisticsList(map_blocks(work, list(tables), threads=shard.threads)))
    return tree.nodes


def index_parts(books: Sequence[Array], active: Sequence[int]) -> dict[int, IndexedCodebook]:
    """Return the codebooks of some parts, ready for a search."""
    return {part: index_codebook(books[part]) for part in active}


def part_statistics(
    x: Array,
    labels: npt.NDArray[np.int64],
    distances: Array,
    codes: int,
    weights: Doubles | None = None,
) -> Statistics:
    """Return what `semid.quantization.blocks.statistics` returns, bit for bit.

    Sums of narrow rows stay in cache, so rows are added to them as they come, without sorting.

    Shapes: ``x`` (n, width), the others (n,).
    """
    sums, counts = np.zeros((codes, x.shape[1])), np.zeros(codes)
    _sum_rows(x, np.empty(0) if weights is None else weights, labels, sums, counts)
    squared = distances.astype(np.float64)
    return Statistics(
        sums, counts, float((squared if weights is None else squared * weights).sum())
    )


@kernel()
def _sum_rows(x: Any, weights: Any, labels: Any, sums: Any, counts: Any) -> None:
    weighted = len(weights) > 0
    for row in range(len(labels)):
        total = sums[labels[row]]
        weight = weights[row] if weighted else 1.0
        counts[labels[row]] += weight
        for d in range(x.shape[1]):
            total[d] += weight * np.float64(x[row, d])


def _reseed(
    rows: ShardedMatrix,
    slices: Slices,
    before: Sequence[Array],
    books: list[Array],
    empty: dict[int, npt.NDArray[np.int64]],
) -> None:
    """Put empty codewords on the rows with the largest loss, all distinct; one pass for all parts.

    ``before`` are the codebooks by which the losses are counted.
    """
    counts = {part: len(codes) for part, codes in empty.items()}
    shards = rows.run(farthest_parts, slices, [before[part] for part in counts], counts)
    for at, (part, codes) in enumerate(empty.items()):
        losses, values = (np.concatenate(each) for each in zip(*(s[at] for s in shards)))  # noqa: B905
        farthest = _largest(losses, values, len(codes))[1]
        books[part] = books[part].copy()
        books[part][codes[: len(farthest)]] = farthest


def farthest_parts(
    shard: Shard, slices: Slices, books: Sequence[Array], counts: dict[int, int]
) -> list[tuple[Doubles, Array]]:
    """Return losses and columns of a shard's rows of largest loss, for each part in ``counts``."""
    tables = [index_codebook(book) for book in books]
    best = [(np.empty(0), np.empty((0, book.shape[1]), np.float32)) for book in books]
    for _, span, block in shard.numbered_blocks():
        for at, (part, count) in enumerate(counts.items()):
            columns = np.ascontiguousarray(block[:, slices[part]])
            loss = assign(columns, tables[at], threads=1)[1].astype(np.float64)
            if shard.weights is not None:
                loss *= shard.weights[span]
            losses, values = np.concatenate([best[at][0], loss]), [best[at][1], columns]
            best[at] = _largest(losses, np.concatenate(values), count)
    return best


def _largest(losses: Doubles, values: Array, count: int) -> tuple[Doubles, Array]:
    """Return the ``count`` distinct rows of largest loss above 0, ties in row order."""
    order = np.lexsort((np.arange(len(losses)), -losses))
    order = order[losses[order] > 0]
    # Equal columns would be one codeword. Where copies leave too few, further rows are looked at.
    for size in (4 * count, len(order)):
        _, first = np.unique(values[order[:size]], axis=0, return_index=True)
        if len(first) >= count:
            break
    order = order[np.sort(first)[:count]]
    return losses[order], values[order]


def encode_product(
    block: Array, slices: Slices, tables: Sequence[IndexedCodebook], *, threads: int | None = None
) -> ResidualCodes:
    """Give rows ``(n, dim)`` the nearest codeword of each part, ties to the lowest code."""

    def work(part: int) -> tuple[npt.NDArray[np.int64], Array]:
        return assign(np.ascontiguousarray(block[:, slices[part]]), tables[part], threads=1)

    small = len(block) < SMALL_ROWS
    parts = map_blocks(work, range(len(slices)), threads=1 if small else threads)
    squared = np.zeros(len(block))
    # The parts are orthogonal: their squared distances add up to that of the whole row.
    for _, distances in parts:
        squared += distances
    codes = np.stack([labels for labels, _ in parts], axis=1)
    return ResidualCodes(codes, np.sqrt(squared).astype(np.float32))
