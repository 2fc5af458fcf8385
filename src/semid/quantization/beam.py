"""Beams over residual levels: the partial codes with the smallest residuals are kept per level.

Encoding takes the best code of the last level. Training fits a level on what all partial codes
leave of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from semid.errors import UsageError
from semid.lazy import torch
from semid.quantization import engine
from semid.quantization.blocks import BLOCK_ROWS, Blocks, read_ahead, subtract_rows
from semid.quantization.engine.plain import lengths, would_suit
from semid.quantization.nearest import IndexedCodebook, assign, index_codebook, nearest_m
from semid.quantization.sharding import LocalShardPool, ShardedMatrix, as_sharded
from semid.quantization.threads import THREADED_WORK, resolve_threads

if TYPE_CHECKING:
    from semid.quantization.engine.levels import LevelCodes, Levels

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

# Rows, for one partial code per thread, that take all levels before the next ones begin: their
# residuals stay in cache, and those of a beam within tens of megabytes.
ROWS = 4096
# Most memory for products between codebooks. Three levels of 4096 take 200 MB, which is worth it
# for beams; a single partial code must find them in cache, and gains nothing at 3 x 1024.
PRODUCT_BYTES, GREEDY_BYTES = 1 << 28, 1 << 23
# In training a partial code has the weight (e1 / e)^3, with e its squared residual and e1 that of
# the best one of its row. faiss gives all the same weight, which spoils data with clear clusters:
# there the second best code is far off, and no final code comes from it. Held-out errors with
# powers 0, 2, 4, 8, and without a beam in training: on the 128 leading components of Beauty at beam
# 5 and 3 x 128 codes .441, .426, .426, .433 and .434; at 3 x 512 .332, .330, .331, .335 and .342;
# on 30 clear clusters .264, .164, .143, .146 and .146.
PARTIAL_POWER = 3


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


def encode_rows(
    block: Array, codebooks: Sequence[IndexedCodebook], width: int, threads: int | None
) -> tuple[Labels, Array]:
    """Return codes ``(n, levels)`` and lengths of residuals ``(n,)`` of a beam of ``width``.

    With a width of 1 each level takes the nearest codeword.

    Cost: with at least as many rows as a codebook has codewords, ``n x codewords x dim`` products
    per level, and ``width`` sums of as many numbers as there are codewords per row. Otherwise a
    search of each level for every partial code.
    """
    keep = [width] * (len(codebooks) - 1) + [1]  # of the last level the best alone
    if levels := _indexed_levels(codebooks, len(block), width):
        beams = engine.levels.search_levels(block, levels, keep, threads=threads)
        return beams.codes[:, 0], beams.lengths
    codes, residual = np.empty((len(block), len(codebooks)), np.int64), block.copy()
    size = ROWS if width > 1 else ROWS * resolve_threads(threads)
    for start in range(0, len(block), size):
        rows, labels = residual[start : start + size], codes[start : start + size]
        if width > 1:
            labels[:] = _search_levels(rows, codebooks, keep, threads).codes[:, 0]
            rows[:] = _subtract_codewords(rows, labels, [book.codewords for book in codebooks])
            continue
        for level, codebook in enumerate(codebooks):
            labels[:, level], _ = assign(rows, codebook, threads=threads)
            rows[:] = subtract_rows(rows, codebook.codewords, labels[:, level])
    return codes, lengths(residual).astype(np.float32)


def _subtract_codewords(
    rows: Array, codes: npt.NDArray[np.integer], codebooks: Sequence[Array]
) -> Array:
    """Return what codes ``(n, levels)`` leave of rows ``(n, dim)``, level by level."""
    for codebook, labels in zip(codebooks, codes.T, strict=False):
        rows = subtract_rows(rows, codebook, labels)
    return rows


def _search_levels(
    rows: Array, codebooks: Sequence[IndexedCodebook], keep: Sequence[int], threads: int | None
) -> _Partials:
    """Search level by level; ``keep`` partial codes after each."""
    # A beam starts with the empty code.
    beam = _Partials(np.empty((len(rows), 1, 0), np.int64), np.zeros((len(rows), 1), np.float32))
    for level, width in enumerate(keep):
        beam = _search_level(rows, beam, codebooks[: level + 1], width, threads)
    return beam


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


def _indexed_levels(codebooks: Sequence[IndexedCodebook], rows: int, width: int) -> Levels | None:
    """Return the products of all levels; None where they would not pay."""
    sizes = [len(book) for book in codebooks]
    if width == 1 and would_suit(rows * sum(book.codewords.size for book in codebooks)):
        return None
    limit = PRODUCT_BYTES if width > 1 else GREEDY_BYTES
    if len(sizes) < 2 or engine.levels.table_bytes(sizes) > limit:
        return None
    # The last codebook holds the products, which belong to these very codebooks, in this order.
    *earlier, last = codebooks
    if last.products is None or last.products[0] != earlier:
        if rows < max(sizes):
            return None
        last.products = (
            earlier,
            engine.levels.index_levels([book.codewords for book in codebooks]),
        )
    levels: Levels = last.products[1]
    # A codeword that repeats another is a child like any, but never the nearest one.
    return levels if (levels.comparable if width > 1 else levels.distinct) else None


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
    codes, weights, keep = [], [], [width] * len(codebooks)
    for _, block in read_ahead(base):
        levels = _indexed_levels(indexed, len(block), width)
        for start in range(0, len(block), ROWS):
            part = block[start : start + ROWS]
            beam: _Partials | LevelCodes
            if levels is None:
                beam = _search_levels(part, indexed, keep, threads)
            else:
                beam = engine.levels.search_levels(part, levels, keep, threads=threads)
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
