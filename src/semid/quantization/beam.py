"""Beams over residual levels: the partial codes with the smallest residuals are kept per level.

Encoding takes the best code of the last level. Training fits a level on what all partial codes
leave of the rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.errors import UsageError
from semid.lazy import torch
from semid.quantization import engine
from semid.quantization.blocks import BLOCK_ROWS, Blocks, read_ahead, subtract_rows
from semid.quantization.engine.plain import SCAN, float32_rows, padded
from semid.quantization.nearest import THREADED_WORK, IndexedCodebook, index_codebook, nearest_m
from semid.quantization.sharding import LocalShardPool, ShardedMatrix, as_sharded
from semid.quantization.threads import map_blocks, one_blas_thread

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

# A beam holds `width` residuals per row: fewer rows at once keep that within tens of megabytes.
BEAM_ROWS = 4096
# Rows that a thread scans at once, and most products of them with codewords: 4 MB.
SCAN_ROWS, SCAN_SCORES = 1024, 1 << 20
# Most memory for products between codebooks. Three levels of 4096 take 200 MB.
PRODUCT_BYTES = 1 << 28
# In training a partial code has the weight (e1 / e)^3, with e its squared residual and e1 that of
# the best one of its row. faiss gives all the same weight, which spoils data with clear clusters:
# there the second best code is far off, and no final code comes from it. Held-out errors with
# powers 0, 2, 4, 8, and without a beam in training: on the 128 leading components of Beauty at beam
# 5 and 3 x 128 codes .441, .426, .426, .433 and .434; at 3 x 512 .332, .330, .331, .335 and .342;
# on 30 clear clusters .264, .164, .143, .146 and .146.
PARTIAL_POWER = 3
# Most codewords of a first level that is scanned; larger ones are quicker to search.
FIRST_SCANNED = 1024
# Outside these lengths of rows and codewords, squares or their rounding leave float32's range.
LENGTHS = (1e-12, 1e12)


@dataclass(frozen=True)
class _Partials:
    """Partial codes of some rows, best first."""

    codes: Labels  # (n, partials, levels so far)
    distances: Array  # (n, partials), the squared lengths of what they leave of the rows

    def extend(self, parents: Labels, labels: Labels, distances: Array) -> _Partials:
        """Return the children ``labels`` ``(n, children)`` of the partial codes ``parents``."""
        at = np.arange(len(labels))[:, None]
        codes = np.concatenate([self.codes[at, parents], labels[:, :, None]], axis=2)
        return _Partials(codes, distances)


def encode_beam(
    block: Array, codebooks: Sequence[IndexedCodebook], width: int, threads: int | None
) -> tuple[Labels, Array]:
    """Return codes ``(n, levels)`` and residuals ``(n, dim)`` of a beam search.

    Cost: with at least as many rows as a codebook has codewords, ``n x codewords x dim`` products
    per level, and ``width`` sums of as many numbers as there are codewords per row. Otherwise a
    search of each level for every partial code.
    """
    # Of the last level the best alone.
    beams = _beams(block, codebooks, width, 1, threads)
    codes = np.concatenate([beam.codes[:, 0] for beam in beams])
    return codes, _subtract_codewords(block, codes, [book.codewords for book in codebooks])


def _subtract_codewords(
    rows: Array, codes: npt.NDArray[np.integer], codebooks: Sequence[Array]
) -> Array:
    """Return what codes ``(n, levels)`` leave of rows ``(n, dim)``, level by level."""
    for codebook, labels in zip(codebooks, codes.T, strict=False):
        rows = subtract_rows(rows, codebook, labels)
    return rows


def _beams(
    block: Array,
    codebooks: Sequence[IndexedCodebook],
    width: int,
    last: int,
    threads: int | None,
) -> Iterator[_Partials]:
    """Yield the ``last`` best codes that a beam of ``width`` finds, a few rows at a time."""
    products = _level_products(codebooks, len(block))
    for start in range(0, len(block), BEAM_ROWS):
        rows = block[start : start + BEAM_ROWS]
        # Products are scanned only where float32 holds them.
        longest = float(np.abs(rows).max(initial=0.0)) * math.sqrt(rows.shape[1])
        scanned = bool(products) and longest < LENGTHS[1]
        # A beam starts with the empty code.
        beam = _Partials(
            np.empty((len(rows), 1, 0), np.int64), np.zeros((len(rows), 1), np.float32)
        )
        keep = [width] * (len(codebooks) - 1) + [last]
        searched = len(codebooks)
        if scanned:
            searched = int(len(codebooks[0]) > FIRST_SCANNED)
        for level in range(searched):
            beam = _search_level(rows, beam, codebooks[: level + 1], keep[level], threads)
        yield _scan_levels(rows, beam, products[searched:], keep[searched:], threads)


def _search_level(
    rows: Array,
    beam: _Partials,
    codebooks: Sequence[IndexedCodebook],
    width: int,
    threads: int | None,
) -> _Partials:
    """Search the last of the levels for the nearest codewords of every partial code's residual."""
    *earlier, codebook = codebooks
    items, partials, dim = *beam.distances.shape, rows.shape[1]
    children = min(width, len(codebook))
    small = items * partials * dim * len(codebook) < THREADED_WORK
    search = partial(nearest_m, codebook=codebook, m=children, threads=1 if small else threads)
    books = [book.codewords for book in earlier]
    parents = np.repeat(rows, partials, axis=0)
    lines = beam.codes.reshape(items * partials, len(books))
    residuals = torch.from_numpy(_subtract_codewords(parents, lines, books))
    residuals = residuals.reshape(items, partials, dim)
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
    )


@dataclass(frozen=True)
class _LevelProducts:
    """A level's codewords ``c`` and their products with those ``b`` of the levels before.

    The residual of a partial code is ``r = x - sum b``, so half of ``|r|^2 - |r - c|^2`` is
    ``x.c - |c|^2 / 2 - sum b.c``: one product per row and codeword, whatever the number of partial
    codes, and sums of numbers that are known.
    """

    codewords: Array  # (codes, width), with the columns that canonical keys need
    earlier: Array  # (codes before, width), those of the levels before
    # (dim, columns) what rows are multiplied with: codewords, of the first level centered; then 0
    transposed: torch.Tensor
    bias: torch.Tensor  # (columns,) minus half their squares, minus infinity at the end
    products: Array  # (codes before, columns)
    first: Labels  # row of `products` at which each level before starts
    center: Array  # (dim,) subtracted from rows and from the first codebook
    reach: float  # longest codeword of this level
    before: float  # sum over the levels before of their longest codeword

    def margins(self, lengths: npt.NDArray[np.float64]) -> Array:
        """Return how far apart two scores of a row of this length may be by rounding alone."""
        dim = self.transposed.shape[0]
        whole = lengths + self.before + self.reach
        # Sums of `dim` products and half a square, in any order; then the few sums of scores, the
        # rounding of residuals and of the float32 distances in which ties are told.
        bound = (dim + 32) * 2.0**-23 * whole * self.reach
        bound += (8 + 2 * len(self.first)) * 2.0**-23 * whole * whole
        return np.asarray(2.0 * bound, dtype=np.float32)


def _level_products(codebooks: Sequence[IndexedCodebook], rows: int) -> list[_LevelProducts]:
    """Return the products of all levels; none where they would not pay."""
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
    """Multiply the levels; none where float32 does not hold the products."""
    books = [book.codewords for book in codebooks]
    # Rows and the first codebook are centered: shorter vectors have smaller rounding errors.
    center = books[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    centered = [books[0] - center, *books[1:]]
    # Lengths bound what rounding changes in products and squares.
    longest = [
        float(np.sqrt(np.square(each, dtype=np.float64).sum(axis=1).max())) for each in centered
    ]
    if not LENGTHS[0] < min(longest) <= max(longest) < LENGTHS[1]:
        return []
    none = np.empty((0, books[0].shape[1]), dtype=np.float32)
    wide = [float32_rows(each, name="codebook") for each in (none, *books)]
    levels = []
    for level, codewords in enumerate(centered):
        # Columns are padded for the scan; a bias of minus infinity keeps padding out of the best.
        transposed = np.zeros((codewords.shape[1], padded(len(codewords), SCAN)), dtype=np.float32)
        transposed[:, : len(codewords)] = codewords.T
        bias = np.full(transposed.shape[1], -np.inf, dtype=np.float32)
        bias[: len(codewords)] = -0.5 * np.square(codewords, dtype=np.float64).sum(axis=1)
        rows = torch.from_numpy(np.concatenate([none, *centered[:level]]))
        products = torch.empty((len(rows), transposed.shape[1]), dtype=torch.float32)
        with one_blas_thread():  # products with `out` are float32 under autocast too
            torch.mm(rows, torch.from_numpy(transposed), out=products)
        ends = np.cumsum([0, *map(len, books[:level])])
        levels.append(
            _LevelProducts(
                codewords=wide[level + 1],
                earlier=np.concatenate(wide[: level + 1]),
                transposed=torch.from_numpy(transposed),
                bias=torch.from_numpy(bias),
                products=products.numpy(),
                first=ends[:-1],
                center=center,
                reach=longest[level],
                before=sum(longest[:level]),
            )
        )
    return levels


def _scan_levels(
    rows: Array,
    beam: _Partials,
    levels: Sequence[_LevelProducts],
    keep: Sequence[int],
    threads: int | None,
) -> _Partials:
    """Extend partial codes by ``levels``, a few rows at a time; ``keep`` of them at each level."""
    if not levels:
        return beam

    size = max(1, min(SCAN_ROWS, SCAN_SCORES // max(len(level.bias) for level in levels)))

    def work(start: int) -> _Partials:
        part = slice(start, start + size)
        found = _Partials(beam.codes[part], beam.distances[part])
        x, wide = rows[part] - levels[0].center, float32_rows(rows[part], name="x")
        lengths = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
        for level, width in zip(levels, keep, strict=True):
            found = _scan_level(wide, torch.from_numpy(x), lengths, found, level, width)
        return found

    most = max(len(level.codewords) for level in levels)
    small = rows.size * max(keep) * most < THREADED_WORK
    parts = map_blocks(work, range(0, len(rows), size), threads=1 if small else threads)
    return _Partials(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.distances for part in parts]),
    )


# Fresh memory costs page faults, which for a few rows take longer than their scan.
_buffers = threading.local()


def _buffer(name: str, shape: tuple[int, int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return memory of this thread that is reused by the next call; its contents are undefined."""
    size = shape[0] * shape[1]
    buffer: npt.NDArray[Any] | None = getattr(_buffers, name, None)
    if buffer is None or buffer.size < size:
        buffer = engine.table.aligned((size,), dtype)
        setattr(_buffers, name, buffer)
    return buffer[:size].reshape(shape)


def _scan_level(
    rows: Array,
    centered: torch.Tensor,
    lengths: npt.NDArray[np.float64],
    beam: _Partials,
    level: _LevelProducts,
    width: int,
) -> _Partials:
    """Find the level's best children from products that all partial codes of a row share.

    Shapes: ``rows`` (n, width) padded, ``centered`` (n, dim), ``lengths`` (n,) of the latter.
    """
    count, columns = len(rows), len(level.bias)
    best = min(width, beam.distances.shape[1] * len(level.codewords))
    capacity = 4 * max(best, SCAN) + 2 * SCAN
    lines = beam.codes + level.first
    # One product per row and codeword, whatever the number of partial codes.
    base = _buffer("base", (count, columns), np.float32)
    torch.addmm(level.bias, centered, level.transposed, out=torch.from_numpy(base))
    counts = np.zeros(count, dtype=np.int64)
    candidates = _buffer("candidates", (count, capacity), np.int32)
    # Children that may be among the best by their float32 scores.
    engine.keys.scan_children(
        base, 0.5 * beam.distances, level.products, lines, level.bias.numpy(),
        level.margins(lengths), np.full(count, np.finfo(np.float32).min), counts, candidates,
        _buffer("values", (count, capacity), np.float32), best, np.empty(capacity, np.float32),
        _buffer("scores", (1, columns), np.float32),
    )  # fmt: skip
    parents, labels = np.empty((2, count, best), dtype=np.int64)
    distances = np.empty((count, best), dtype=np.float32)
    # Canonical distances decide among them, so the codes are those of a full search.
    engine.keys.resolve_children(
        rows, level.earlier, lines, level.codewords, columns, counts, candidates, parents, labels,
        distances,
    )  # fmt: skip
    return beam.extend(parents, labels, distances)


# Training with a beam -----------------------------------------------------------------------------


class PartialResiduals:
    """What the partial codes of every row leave of it: ``partials`` rows for each base row.

    Shapes: ``codes`` (items, partials, levels), ``codebooks`` (codes, dim) of these levels.
    """

    def __init__(
        self, base: Blocks, codes: npt.NDArray[np.integer], codebooks: Sequence[Array]
    ) -> None:
        self.base, self.dim, self.partials = base, base.dim, codes.shape[1]
        self.codes, self.codebooks = codes.reshape(-1, codes.shape[2]), list(codebooks)

    def __len__(self) -> int:
        return len(self.codes)

    def _subtract(self, rows: Array, at: npt.NDArray[np.int64]) -> Array:
        """Subtract the codewords of the partial codes ``at`` from copies ``rows`` of their rows."""
        return _subtract_codewords(rows, self.codes[at], self.codebooks)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, rows)`` in order."""
        for start, block in self.base.blocks(size):
            # `size` rows make as many whole blocks as a row has partial codes.
            end = (start + len(block)) * self.partials
            for first in range(start * self.partials, end, size):
                at = np.arange(first, min(first + size, end))
                yield first, self._subtract(block[at // self.partials - start], at)

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``indices``."""
        return self._subtract(self.base.rows(indices // self.partials), indices)


def partial_residuals(
    rows: ShardedMatrix,
    codebooks: Sequence[Array],
    *,
    width: int,
    threads: int | None,
    memory_bytes: int,
) -> ShardedMatrix:
    """Return what a beam of ``width`` over some levels leaves of rows, all of its partial codes."""
    if not codebooks:
        return rows
    if not isinstance(rows.pool, LocalShardPool):
        raise UsageError(
            "training with a beam needs all rows in one process; leave --train-with-beam "
            "(train_with_beam) out, or fit with --engine local and without torchrun"
        )
    base, indexed = rows.pool.shard.base, [index_codebook(book) for book in codebooks]
    codes, weights = [], []
    for _, block in read_ahead(base):
        for beam in _beams(block, indexed, width, width, threads):
            codes.append(beam.codes.astype(np.uint32))
            # Not 0, because weights are ratios of these distances.
            squared = np.maximum(beam.distances.astype(np.float64), np.finfo(np.float32).tiny)
            weights.append((squared[:, :1] / squared) ** PARTIAL_POWER)
    mass = np.concatenate(weights)
    if rows.weights is not None:
        # All partial codes of a row share its item weight.
        mass *= rows.weights[:, None]
    view = PartialResiduals(base, np.concatenate(codes), codebooks)
    return as_sharded(view, weights=mass.ravel(), threads=threads, memory_bytes=memory_bytes)
