"""Residual quantization: each level quantizes the residual of the levels before it.

Fitting level by level (DRQ §4.2), greedy and beam encoding, decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.blocks import MEMORY_BYTES, Blocks
from semid.quantization.engine.keys import resolve_children, scan_children
from semid.quantization.engine.table import aligned, float32_rows, padded
from semid.quantization.engine.vector import SCAN
from semid.quantization.kmeans import (
    KMeansOptions,
    KMeansResult,
    KMeansState,
    draw_sample,
    kmeans,
    sampled,
)
from semid.quantization.nearest import THREADED_WORK, IndexedCodebook, assign, nearest_m
from semid.quantization.sharding import ShardedMatrix, as_sharded
from semid.quantization.threads import map_blocks, one_blas_thread
from semid.seeds import child_seed

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LevelFit:
    """How one level's K-means ended."""

    inertia: float  # sum of squared residual norms after this level, over the training rows
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
        squared = np.einsum("nd,nd->n", residual, residual, dtype=np.float64)
        return cls(codes, np.sqrt(squared).astype(np.float32))


def fit_residual(
    blocks: Blocks | ShardedMatrix,
    codebook_sizes: Sequence[int],
    *,
    seed: int,
    options: KMeansOptions | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    init: Sequence[Array] | None = None,
    threads: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    done: Sequence[tuple[Array, Labels, LevelFit]] = (),
    state: KMeansState | None = None,
    on_iteration: Callable[[int, KMeansState], None] | None = None,
    on_level: Callable[[int, KMeansResult], None] | None = None,
) -> tuple[list[Array], list[LevelFit]]:
    """Fit one codebook ``(codes, dim)`` per level by K-means on the residual of those before."""
    options = options or KMeansOptions()
    rows = as_sharded(blocks, weights=weights, threads=threads, memory_bytes=memory_bytes)
    # All levels train on one sample, large enough for the largest codebook.
    sample = draw_sample(rows, max(codebook_sizes), seed=seed, options=options)
    train = rows
    if sample is not None:
        train = sampled(rows, sample, threads=threads)
    codebooks: list[Array] = []
    fits: list[LevelFit] = []
    for codebook, labels, fit in done:  # levels of the run that is continued
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
            on_iteration=None if on_iteration is None else partial(on_iteration, level),
        )
        codebooks.append(result.centroids)
        fits.append(LevelFit.of(result))
        if on_level is not None:
            on_level(level, result)
        if level + 1 < len(codebook_sizes):
            train.subtract_codewords(result.centroids, result.labels)
    if sample is None or not options.full_pass:
        return codebooks, fits
    # One Lloyd iteration of every level over all rows, each on the residual of the refined ones.
    for level, codebook in enumerate(codebooks):
        result = kmeans(
            rows,
            len(codebook),
            seed=0,  # unused: it starts from `init`
            options=KMeansOptions(max_iter=1),
            init=codebook,
            threads=threads,
        )
        codebooks[level] = result.centroids
        if level + 1 < len(codebooks):
            rows.subtract_codewords(result.centroids, result.labels)
    return codebooks, fits


def encode_residual(
    block: Array,
    codebooks: Sequence[IndexedCodebook],
    *,
    beam_width: int = 1,
    threads: int | None = None,
) -> ResidualCodes:
    """Quantize rows ``(n, dim)`` level by level, each by itself; ties go to the lowest code."""
    if beam_width > 1 and len(block):
        codes, residual = _encode_beam(block, codebooks, beam_width, threads)
    else:
        codes, residual = np.empty((len(block), len(codebooks)), dtype=np.int64), block
        for level, codebook in enumerate(codebooks):
            codes[:, level], _ = assign(residual, codebook, threads=threads)
            residual = residual - codebook.codewords.numpy()[codes[:, level]]
    return ResidualCodes.of(codes, residual)


def dequantize(codes: npt.NDArray[np.integer], codebooks: Sequence[Array]) -> Array:
    """Sum the codewords of each row's codes ``(n, levels)``, in level order: ``(n, dim)``."""
    total = np.zeros((len(codes), codebooks[0].shape[1]), dtype=np.float32)
    for level, codebook in enumerate(codebooks):
        total += codebook[codes[:, level]]
    return total


# Beam encoding: the partial codes with the smallest residuals are kept after every level --------

# A beam holds `width` residuals per row: fewer rows at once keep that within tens of megabytes.
BEAM_ROWS = 4096
# Rows that a thread scans at once: their products with 4096 codewords are 4 MB.
SCAN_ROWS = 256
# Most memory for products between codebooks. Three levels of 4096 take 200 MB.
PRODUCT_BYTES = 1 << 28
# Outside these lengths of rows and codewords, squares or their rounding leave float32's range.
LENGTHS = (1e-12, 1e12)


@dataclass(frozen=True)
class _Partials:
    """Partial codes of some rows, best first."""

    codes: Labels  # (n, partials, levels so far)
    residuals: Array  # (n, partials, dim)
    distances: Array  # (n, partials), the residuals' squared lengths

    def extend(self, parents: Labels, labels: Labels, distances: Array, book: Array) -> _Partials:
        """Return the children ``labels`` ``(n, children)`` of the partial codes ``parents``."""
        at = np.arange(len(labels))[:, None]
        codes = np.concatenate([self.codes[at, parents], labels[:, :, None]], axis=2)
        return _Partials(codes, self.residuals[at, parents] - book[labels], distances)


def _encode_beam(
    block: Array, codebooks: Sequence[IndexedCodebook], width: int, threads: int | None
) -> tuple[Labels, Array]:
    """Return codes ``(n, levels)`` and residuals ``(n, dim)`` of a beam search.

    Cost: with at least as many rows as a codebook has codewords, ``n x codewords x dim`` products
    per level, and ``width`` sums of as many numbers as there are codewords per row. Otherwise a
    search of each level for every partial code.
    """
    products = _level_products(codebooks, len(block))
    codes, residuals = [], []
    for start in range(0, len(block), BEAM_ROWS):
        # A beam starts with the empty code, whose residual is the row itself.
        rows = block[start : start + BEAM_ROWS]
        # Products are scanned only where float32 holds them.
        longest = float(np.abs(rows).max(initial=0.0)) * math.sqrt(rows.shape[1])
        scanned = bool(products) and longest < LENGTHS[1]
        none = np.empty((len(rows), 1, 0), np.int64)
        beam = _Partials(none, rows[:, None], np.empty((len(rows), 1), np.float32))
        for level, codebook in enumerate(codebooks):
            keep = width if level + 1 < len(codebooks) else 1  # the last level's best alone
            if scanned and level:
                beam = _scan_level(rows, beam, products[level - 1], keep, threads)
            else:
                beam = _search_level(beam, codebook, keep, threads)
        codes.append(np.ascontiguousarray(beam.codes[:, 0]))
        residuals.append(beam.residuals[:, 0])
    return np.concatenate(codes), np.concatenate(residuals)


def _search_level(
    beam: _Partials, codebook: IndexedCodebook, width: int, threads: int | None
) -> _Partials:
    """Search the level for the nearest codewords of every partial code's residual."""
    items, partials, dim = beam.residuals.shape
    children = min(width, len(codebook))
    small = beam.residuals.size * len(codebook) < THREADED_WORK
    search = partial(nearest_m, codebook=codebook, m=children, threads=1 if small else threads)
    residuals = torch.from_numpy(beam.residuals)
    best = search(residuals[:, 0])
    labels, distances = best.labels.numpy(), best.distances.numpy()
    if partials > 1:
        # The best partial code has `children` of its own, so others matter only below the last.
        last = best.distances[:, -1] if children == width else torch.full((items,), torch.inf)
        others = residuals[:, 1:].reshape(-1, dim)
        rest = search(others, within=last.repeat_interleave(partials - 1))
        labels = np.hstack([labels, rest.labels.numpy().reshape(items, -1)])
        distances = np.hstack([distances, rest.distances.numpy().reshape(items, -1)])
    # Stable: equal distances keep the better parent, then the lower code.
    order = np.argsort(distances, axis=1, kind="stable")[:, :width]
    return beam.extend(
        order // children,
        np.take_along_axis(labels, order, axis=1),
        np.take_along_axis(distances, order, axis=1),
        codebook.codewords.numpy(),
    )


@dataclass(frozen=True)
class _LevelProducts:
    """A level's codewords ``c`` and their products with those ``b`` of the levels before.

    The residual of a partial code is ``r = x - sum b``, so half of ``|r|^2 - |r - c|^2`` is
    ``x.c - |c|^2 / 2 - sum b.c``: one product per row and codeword, whatever the number of partial
    codes, and sums of numbers that are known.
    """

    codewords: Array  # (codes, dim)
    padded: Array  # the same with the columns that canonical keys need
    transposed: torch.Tensor  # (dim, columns) the same transposed, with zero columns at the end
    bias: torch.Tensor  # (columns,) minus half their squares, minus infinity at the end
    products: Array  # (codes before, columns)
    first: Labels  # row of `products` at which each level before starts
    center: Array  # (dim,) subtracted from rows and from the first codebook
    reach: float  # longest codeword of this level
    before: float  # sum over the levels before of their longest codeword

    def margins(self, lengths: npt.NDArray[np.float64]) -> Array:
        """Return how far apart two scores of a row of this length may be by rounding alone."""
        dim = self.codewords.shape[1]
        whole = lengths + self.before + self.reach
        # Sums of `dim` products and half a square, in any order; then the few sums of scores, the
        # rounding of residuals and of the float32 distances in which ties are told.
        bound = (dim + 32) * 2.0**-23 * whole * self.reach
        bound += (8 + 2 * len(self.first)) * 2.0**-23 * whole * whole
        return np.asarray(2.0 * bound, dtype=np.float32)


def _level_products(codebooks: Sequence[IndexedCodebook], rows: int) -> list[_LevelProducts]:
    """Return the products of the levels after the first; none where they would not pay."""
    sizes = [len(book) for book in codebooks]
    columns = [padded(size, SCAN) for size in sizes]
    needed = sum(4 * sum(sizes[:level]) * columns[level] for level in range(1, len(sizes)))
    # torch may be told to round float32 operands to bfloat16 or TF32 inside its products.
    loose = torch.get_float32_matmul_precision() != "highest"
    if len(sizes) < 2 or needed > PRODUCT_BYTES or loose:
        return []
    # The last codebook holds the products, which belong to these very codebooks, in this order.
    *earlier, last = codebooks
    if last.products is not None and last.products[0] == earlier:
        products: list[_LevelProducts] = last.products[1]
        return products
    if rows < max(sizes):
        return []
    products = _multiply_levels(codebooks)
    last.products = (earlier, products)
    return products


def _multiply_levels(codebooks: Sequence[IndexedCodebook]) -> list[_LevelProducts]:
    """Multiply every level after the first; none where float32 does not hold the products."""
    books = [book.codewords.numpy() for book in codebooks]
    # Rows and the first codebook are centered: shorter vectors have smaller rounding errors.
    center = books[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    earlier = [books[0] - center, *books[1:]]
    # Lengths bound what rounding changes in products and squares.
    longest = [
        float(np.sqrt(np.square(each, dtype=np.float64).sum(axis=1).max())) for each in earlier
    ]
    if not LENGTHS[0] < min(longest) <= max(longest) < LENGTHS[1]:
        return []
    levels = []
    for level in range(1, len(books)):
        codewords = books[level]
        transposed = np.zeros((codewords.shape[1], padded(len(codewords), SCAN)), dtype=np.float32)
        transposed[:, : len(codewords)] = codewords.T
        bias = np.full(transposed.shape[1], -np.inf, dtype=np.float32)
        bias[: len(codewords)] = -0.5 * np.square(codewords, dtype=np.float64).sum(axis=1)
        rows = torch.from_numpy(np.concatenate(earlier[:level]))
        products = torch.empty((len(rows), transposed.shape[1]), dtype=torch.float32)
        with one_blas_thread():  # products with `out` are float32 under autocast too
            torch.mm(rows, torch.from_numpy(transposed), out=products)
        levels.append(
            _LevelProducts(
                codewords=codewords,
                padded=float32_rows(codebooks[level].codewords, name="codebook"),
                transposed=torch.from_numpy(transposed),
                bias=torch.from_numpy(bias),
                products=products.numpy(),
                first=np.cumsum([0, *(len(each) for each in books[: level - 1])]),
                center=center,
                reach=longest[level],
                before=sum(longest[:level]),
            )
        )
    return levels


def _scan_level(
    rows: Array, beam: _Partials, level: _LevelProducts, width: int, threads: int | None
) -> _Partials:
    """Find the level's best children from products that all partial codes of a row share."""
    items, partials, dim = beam.residuals.shape
    columns = len(level.bias)
    best = min(width, partials * len(level.codewords))
    parents, labels = np.empty((2, items, best), dtype=np.int64)
    distances = np.empty((items, best), dtype=np.float32)

    def work(start: int) -> None:
        part = slice(start, start + SCAN_ROWS)
        x = rows[part] - level.center
        count, capacity = len(x), max(8 * SCAN, 4 * best + 2 * SCAN)
        # One product per row and codeword, whatever the number of partial codes.
        base = np.empty((count, columns), dtype=np.float32)
        torch.addmm(level.bias, torch.from_numpy(x), level.transposed, out=torch.from_numpy(base))
        lengths = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
        counts = np.zeros(count, dtype=np.int64)
        candidates = np.empty((count, capacity), dtype=np.int32)
        # Children that may be among the best by their float32 scores.
        scan_children(
            base, 0.5 * beam.distances[part], level.products, beam.codes[part] + level.first,
            level.bias.numpy(), level.margins(lengths), np.full(count, np.finfo(np.float32).min),
            counts, candidates, np.empty((count, capacity), dtype=np.float32), best,
            np.empty(capacity, dtype=np.float32), aligned((1, columns), np.float32),
        )  # fmt: skip
        # Canonical distances decide among them, so the codes are those of a full search.
        residuals = np.zeros((count * partials, level.padded.shape[1]), dtype=np.float32)
        residuals[:, :dim] = beam.residuals[part].reshape(-1, dim)
        resolve_children(
            residuals, level.padded, columns, counts, candidates, parents[part], labels[part],
            distances[part],
        )  # fmt: skip

    small = beam.residuals.size * len(level.codewords) < THREADED_WORK
    map_blocks(work, range(0, items, SCAN_ROWS), threads=1 if small else threads)
    return beam.extend(parents, labels, distances, level.codewords)
