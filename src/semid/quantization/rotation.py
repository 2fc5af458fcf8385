"""Rotations before product quantization, so that its parts carry equal shares of the variance.

Optimized product quantization (Ge et al. 2013): principal components, then rotation and codes in
turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.blocks import ArrayBlocks, Blocks, in_memory, map_rows, read_ahead
from semid.quantization.kmeans import KMeansOptions, draw_sample
from semid.quantization.product import SMALL_ROWS, Slices, assign_parts, seed_parts
from semid.quantization.sharding import as_sharded
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


def principal_rotation(blocks: Blocks, slices: Slices, *, weights: Doubles | None) -> Array:
    """Return the rotation ``(dim, dim)`` to principal components, shared out among the parts.

    Cost: one pass; O(items dim^2 + dim^3).
    """
    total, mass = np.zeros(blocks.dim), 0.0
    products = np.zeros((blocks.dim, blocks.dim))
    shift: Doubles | None = None
    for start, block in read_ahead(blocks):
        # The covariance does not depend on the shift; one of the rows keeps the sums small.
        shift = block[0].astype(np.float64) if shift is None else shift
        centered = block - shift  # float64: large means cancel nothing
        weighted = centered
        if weights is not None:
            weighted = centered * weights[start : start + len(block), None]
        products += weighted.T @ centered
        total += weighted.sum(axis=0)
        mass += len(block) if weights is None else float(weights[start : start + len(block)].sum())
    covariance = products / mass - np.outer(total / mass, total / mass)
    values, vectors = np.linalg.eigh(covariance)
    # Rounding may leave eigenvalues slightly below 0.
    order = allocate_eigenvalues(np.maximum(values, 0.0), slices)
    return np.ascontiguousarray(vectors[:, order], dtype=np.float32)


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


def fit_rotation(
    blocks: Blocks,
    slices: Slices,
    codebook_sizes: Sequence[int],
    *,
    rotate: Callable[[Array, Array], Array],
    iterations: int,
    seed: int,
    options: KMeansOptions,
    weights: Doubles | None = None,
    threads: int | None = None,
    memory_bytes: int = 1 << 30,
    state: RotationState | None = None,
    on_iteration: Callable[[RotationState], None] | None = None,
) -> RotationState:
    """Fit the rotation of non-parametric optimized product quantization.

    It starts at `principal_rotation`. Every iteration assigns all rows once, then moves codewords
    to the means of their rows and the rotation to the `procrustes` solution for the codes: both
    lower the error. Returns the rotation, and codebooks for `fit_product` to start from.

    Shapes: ``blocks`` (items, dim), ``weights`` (items,); ``rotate`` maps rows (n, dim) and a
    rotation (dim, dim) to rows.

    Cost: O(items (codes dim + dim^2) + dim^3) per iteration, in one pass. Source: Ge et al. 2013,
    section 4.1; the one Lloyd iteration per rotation is theirs.
    """
    sample = draw_sample(as_sharded(blocks), max(codebook_sizes), seed=seed, options=options)
    if sample is not None:
        blocks = ArrayBlocks(blocks.rows(sample))
        weights = None if weights is None else weights[sample]
    rows = in_memory(blocks, limit_bytes=memory_bytes)
    parts = list(range(len(slices)))
    if state is None:
        rotation = principal_rotation(rows, slices, weights=weights)
        books = seed_parts(
            map_rows(rows, partial(_apply, rotate, rotation), rows.dim), slices, codebook_sizes,
            seed=seed, restart=0, weights=weights, trials=options.n_local_trials, threads=threads,
        )  # fmt: skip
        state = RotationState(0, rotation, books)
    while state.iteration < iterations:
        rotation, books = state.rotation, state.books
        products = np.zeros((rows.dim, rows.dim))

        def add_products(
            start: int,
            block: Array,
            labels: list[npt.NDArray[np.int64]],
            products: Doubles = products,
            books: list[Array] = books,
        ) -> None:
            quantized = np.concatenate(
                [book[codes] for book, codes in zip(books, labels, strict=True)], axis=1
            )
            if weights is not None:
                mass = weights[start : start + len(block), None]
                quantized = (quantized * mass).astype(np.float32)
            # Y^T Q of the block, (dim, dim): Y the rotated rows, Q their weighted codewords.
            products += _cross_products(block, quantized, threads=threads)

        rotated = map_rows(rows, partial(_apply, rotate, rotation), rows.dim)
        totals = assign_parts(
            rotated, slices, books, parts, weights=weights, threads=threads, on_codes=add_products
        )
        moved = []
        for book, total in zip(books, totals, strict=True):
            occupied = total.counts > 0
            new = book.copy()
            new[occupied] = (total.sums[occupied] / total.counts[occupied, None]).astype(np.float32)
            moved.append(new)
        # Rows are X = Y R^T, so that X^T Q = R (Y^T Q).
        state = RotationState(
            state.iteration + 1,
            procrustes(rotation.astype(np.float64) @ products),
            moved,
            [*state.error, float(sum(total.inertia for total in totals))],
        )
        if on_iteration is not None:
            on_iteration(state)
    return state


def _apply(rotate: Callable[[Array, Array], Array], rotation: Array, x: Array) -> Array:
    return rotate(x, rotation)


def _cross_products(a: Array, b: Array, *, threads: int | None) -> Doubles:
    """Return ``a^T b`` ``(dim, dim)``, float32 products of fixed chunks added in float64."""

    def work(start: int) -> Doubles:
        span = slice(start, start + SMALL_ROWS)
        product = torch.from_numpy(a[span]).T @ torch.from_numpy(b[span])
        return product.double().numpy()

    # A few chunks at a time: each result has the size of the product itself.
    starts = range(0, len(a), SMALL_ROWS)
    total = np.zeros((a.shape[1], b.shape[1]))
    for first in range(0, len(starts), 4):
        for product in map_blocks(work, starts[first : first + 4], threads=threads):
            total += product
    return total
