"""Rotations before product quantization, so that its parts carry equal shares of the variance.

Optimized product quantization (Ge et al. 2013): principal components, then rotation and codes in
turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from semid.quantization.blocks import Node, Statistics, StatisticsList, TreeSum
from semid.quantization.kmeans import KMeansOptions, draw_sample, sampled
from semid.quantization.nearest import assign
from semid.quantization.product import (
    Slices,
    index_parts,
    move_codewords,
    part_statistics,
    seed_parts,
)
from semid.quantization.sharding import Shard, ShardedMatrix
from semid.quantization.threads import map_blocks

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def allocate_eigenvalues(values: Doubles, slices: Slices) -> npt.NDArray[np.int64]:
    """Share out principal components so that the parts carry nearly equal products of variances.

    Components go in falling order to the part with the smallest product so far that has room.
    Returns ``(dim,)`` which component each column takes. Source: Ge et al. 2013, section 4.2.
    """
    logs = np.log(np.maximum(values, max(float(values.max()), 1e-300) * 1e-12))
    # Products compare only with factors on one side of 1.
    logs = logs - logs.min()
    room = [part.stop - part.start for part in slices]
    totals = np.zeros(len(slices))
    members: list[list[int]] = [[] for _ in slices]
    for component in np.argsort(-values, kind="stable").tolist():
        part = min((i for i in range(len(slices)) if len(members[i]) < room[i]),
                   key=lambda i: (totals[i], i))  # fmt: skip
        members[part].append(component)
        totals[part] += logs[component]
    return np.array([component for part in members for component in part], dtype=np.int64)


def principal_rotation(rows: ShardedMatrix, slices: Slices) -> Array:
    """Return the rotation ``(dim, dim)`` to principal components, shared out among the parts.

    Cost: one pass; O(items dim^2 + dim^3).
    """
    # The covariance does not depend on the shift; one of the rows keeps the sums small.
    total = rows.sum(_sum_products, rows.rows(np.zeros(1, np.int64))[0])
    mass, products, sums = total.counts[0], total.sums[:-1], total.sums[-1]
    covariance = products / mass - np.outer(sums / mass, sums / mass)
    values, vectors = np.linalg.eigh(covariance)
    # Rounding may leave eigenvalues slightly below 0.
    order = allocate_eigenvalues(np.maximum(values, 0.0), slices)
    return np.ascontiguousarray(vectors[:, order], dtype=np.float32)


def _sum_products(shard: Shard, shift: Array) -> list[Node[Statistics]]:
    """Sum ``x^T x`` and, as its last row, ``x`` of the rows of a shard, shifted and weighted."""
    tree: TreeSum[Statistics] = TreeSum()
    for number, span, block in shard.numbered_blocks():
        centered = block - shift.astype(np.float64)  # float64: large means cancel nothing
        weights = np.ones(len(block)) if shard.weights is None else shard.weights[span]
        weighted = centered if shard.weights is None else centered * weights[:, None]
        sums = np.concatenate([weighted.T @ centered, weighted.sum(axis=0)[None]])
        tree.add(number, Statistics(sums, np.array([weights.sum()]), 0.0))
    return tree.nodes


def procrustes(products: Doubles) -> Array:
    """Return the orthogonal R that maximizes ``trace(R^T products)``, for ``products = X^T Q``.

    Then ``|X R - Q|`` is smallest: R = U V^T of the singular value decomposition (Schönemann 1966).
    """
    u, _, vt = np.linalg.svd(products)
    return np.ascontiguousarray(u @ vt, dtype=np.float32)


@dataclass
class RotationState:
    """Progress of `fit_rotation`: finished iterations, rotation, codebooks and errors so far."""

    iteration: int
    rotation: Array
    books: list[Array]
    error: list[float] = field(default_factory=list)


Rotate = Callable[..., Array]
"""``rotate(rows, rotation, threads)``: rows (n, dim) times a rotation, each by itself."""


def fit_rotation(
    rows: ShardedMatrix,
    slices: Slices,
    codebook_sizes: Sequence[int],
    *,
    rotate: Rotate,
    iterations: int,
    seed: int,
    options: KMeansOptions,
    threads: int | None = None,
    state: RotationState | None = None,
    on_iteration: Callable[[RotationState], None] | None = None,
) -> RotationState:
    """Fit the rotation of non-parametric optimized product quantization.

    It starts at `principal_rotation`. Every iteration assigns all rows once, then moves codewords
    to the means of their rows and the rotation to the `procrustes` solution for the codes: both
    lower the error. Returns the rotation, and codebooks for `fit_product` to start from.

    Cost: O(items (codes dim + dim^2) + dim^3) per iteration, in one pass. Source: Ge et al. 2013,
    section 4.1; the one Lloyd iteration per rotation is theirs.
    """
    sample = draw_sample(rows, max(codebook_sizes), seed=seed, options=options)
    if sample is not None:
        rows = sampled(rows, sample, threads=threads)
    if state is None:
        rotation = principal_rotation(rows, slices)
        books = seed_parts(
            rows, slices, codebook_sizes, seed=seed, restart=0, trials=options.n_local_trials,
            threads=threads, transform=lambda x: rotate(x, rotation, threads),
        )  # fmt: skip
        state = RotationState(0, rotation, books)
    while state.iteration < iterations:
        total = rows.sum(_alternate, slices, state.books, state.rotation, rotate)
        *totals, products = total.parts
        # Rows are X = Y R^T, so that X^T Q = R (Y^T Q).
        state = RotationState(
            state.iteration + 1,
            procrustes(state.rotation.astype(np.float64) @ products.sums),
            move_codewords(state.books, range(len(slices)), totals),
            [*state.error, float(sum(part.inertia for part in totals))],
        )
        if on_iteration is not None:
            on_iteration(state)
    return state


def _alternate(
    shard: Shard, slices: Slices, books: Sequence[Array], rotation: Array, rotate: Rotate
) -> list[Node[StatisticsList]]:
    """Assign rotated rows; sum the rows of each codeword and, last, ``Y^T Q`` ``(dim, dim)``.

    Y are the rotated rows and Q their weighted codewords.
    """
    tables = index_parts(books, range(len(slices)))
    tree: TreeSum[StatisticsList] = TreeSum()
    for number, span, block in shard.numbered_blocks():
        rotated = rotate(block, rotation, shard.threads)
        weights = None if shard.weights is None else shard.weights[span]

        def work(part: int) -> Statistics:
            columns = np.ascontiguousarray(rotated[:, slices[part]])  # noqa: B023
            labels, distances = assign(columns, tables[part], threads=1)
            # Sums of whole rows, so that Y^T Q takes a product with codewords, not with rows.
            return part_statistics(rotated, labels, distances, len(books[part]), weights)  # noqa: B023

        totals = map_blocks(work, range(len(slices)), threads=shard.threads)
        products = [
            total.sums.T @ book.astype(np.float64)
            for total, book in zip(totals, books, strict=True)
        ]
        parts = [
            Statistics(total.sums[:, columns].copy(), total.counts, total.inertia)
            for total, columns in zip(totals, slices, strict=True)
        ]
        parts.append(Statistics(np.concatenate(products, axis=1), np.zeros(0), 0.0))
        tree.add(number, StatisticsList(parts))
    return tree.nodes
