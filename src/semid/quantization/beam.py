"""Beam encoding: the partial codes with the smallest residuals are kept after every level."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.engine.keys import resolve_children, scan_children
from semid.quantization.engine.table import aligned, float32_rows, padded
from semid.quantization.engine.vector import SCAN
from semid.quantization.nearest import THREADED_WORK, IndexedCodebook, nearest_m
from semid.quantization.threads import map_blocks, one_blas_thread

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

# A beam holds `width` residuals a row: fewer rows at once keep that within tens of megabytes.
ROWS = 4096
# Rows a thread takes: their products with 4096 codewords are 4 MB.
CHUNK = 256
# Most memory for products between codebooks. Three levels of 4096 take 200 MB.
PRODUCT_BYTES = 1 << 28
# Outside these lengths of rows and codewords, squares or their rounding leave float32's range.
LENGTHS = (1e-12, 1e12)


def encode_beam(
    block: Array, codebooks: Sequence[IndexedCodebook], width: int, threads: int | None
) -> tuple[Labels, Array]:
    """Encode rows level by level, keeping partial codes.

    Cost: with at least as many rows as a codebook has codewords, ``n x codewords x dim`` products a
    level, and ``width`` sums of as many numbers as there are codewords a row; the products of
    codewords between levels are kept with the last codebook, at most 256 MB. Otherwise a search of
    each level for every partial code.

    Shapes: ``block`` (n, dim), returns (n, levels).
    """
    tables = _tables(codebooks, len(block))
    beams = []
    for start in range(0, len(block), ROWS):
        rows = block[start : start + ROWS]
        scanned = bool(tables) and _fits_float32(rows)
        reach = width if len(codebooks) > 1 else 1
        beams.append(_first_level(rows, codebooks[0], min(reach, len(codebooks[0])), threads))
        for level in range(1, len(codebooks)):
            keep = width if level + 1 < len(codebooks) else 1  # the last level's best alone
            if scanned:
                beams[-1] = _scan_level(rows, beams[-1], tables[level - 1], keep, threads)
            else:
                beams[-1] = _search_level(beams[-1], codebooks[level], keep, threads)
    return (
        np.concatenate([np.ascontiguousarray(beam.codes[:, 0]) for beam in beams]),
        np.concatenate([beam.residuals[:, 0] for beam in beams]),
    )


@dataclass(frozen=True)
class _Partials:
    """Partial codes of some rows, best first.

    Attributes:
        codes: ``(n, partials, levels so far)``.
        residuals: ``(n, partials, dim)`` what they leave.
        distances: ``(n, partials)`` its squared length.
    """

    codes: Labels
    residuals: Array
    distances: Array


def _first_level(
    rows: Array, codebook: IndexedCodebook, reach: int, threads: int | None
) -> _Partials:
    small = rows.size * len(codebook) < THREADED_WORK
    found = nearest_m(torch.from_numpy(rows), codebook, reach, threads=1 if small else threads)
    codes = found.labels.numpy()
    left = rows[:, None] - codebook.codewords.numpy()[codes]
    return _Partials(codes[:, :, None], left, found.distances.numpy())


def _search_level(
    beam: _Partials, codebook: IndexedCodebook, width: int, threads: int | None
) -> _Partials:
    """Search the level for what every partial code leaves."""
    items, partials, dim = beam.residuals.shape
    reach = min(width, len(codebook))
    small = beam.residuals.size * len(codebook) < THREADED_WORK
    search = partial(nearest_m, codebook=codebook, m=reach, threads=1 if small else threads)
    left = torch.from_numpy(beam.residuals)
    best = search(left[:, 0])
    labels, distances = best.labels.numpy(), best.distances.numpy()
    if partials > 1:
        # The best partial code has `reach` children, so others matter only below the last.
        last = best.distances[:, -1] if reach == width else torch.full((items,), torch.inf)
        others = left[:, 1:].reshape(-1, dim)
        rest = search(others, within=last.repeat_interleave(partials - 1))
        labels = np.hstack([labels, rest.labels.numpy().reshape(items, -1)])
        distances = np.hstack([distances, rest.distances.numpy().reshape(items, -1)])
    # Stable: equal distances keep the better parent, then the lower code.
    order = np.argsort(distances, axis=1, kind="stable")[:, :width]
    return _extend(
        beam,
        order // reach,
        np.take_along_axis(labels, order, axis=1),
        np.take_along_axis(distances, order, axis=1),
        codebook.codewords.numpy(),
    )


def _extend(
    beam: _Partials, parents: Labels, labels: Labels, distances: Array, words: Array
) -> _Partials:
    at = np.arange(len(labels))[:, None]
    codes = np.concatenate([beam.codes[at, parents], labels[:, :, None]], axis=2)
    return _Partials(codes, beam.residuals[at, parents] - words[labels], distances)


@dataclass(frozen=True)
class _Table:
    """A level's codewords and their products with those of the levels before.

    Attributes:
        words: ``(codes, dim)`` codewords.
        padded: the same with the columns that canonical keys take.
        turned: ``(dim, columns)`` the same transposed, with zero columns at the end.
        bias: ``(columns,)`` minus half their squares, minus infinity at the end.
        products: ``(codes before, columns)``.
        first: row of ``products`` at which each level before starts.
        center: ``(dim,)`` taken from rows and from the first codebook.
        reach: longest codeword of this level.
        before: sum over the levels before of their longest codeword.
    """

    words: Array
    padded: Array
    turned: torch.Tensor
    bias: torch.Tensor
    products: Array
    first: Labels
    center: Array
    reach: float
    before: float

    def margins(self, lengths: npt.NDArray[np.float64]) -> Array:
        """Return how far apart two scores of a row of this length may be by rounding alone."""
        dim = self.words.shape[1]
        whole = lengths + self.before + self.reach
        # Sums of `dim` products and half a square, in any order; then the few sums of scores, the
        # rounding of residuals and of the float32 distances in which ties are told.
        bound = (dim + 32) * 2.0**-23 * whole * self.reach
        bound += (8 + 2 * len(self.first)) * 2.0**-23 * whole * whole
        return np.asarray(2.0 * bound, dtype=np.float32)


_table_cache: weakref.WeakKeyDictionary[
    IndexedCodebook, tuple[list[weakref.ref[IndexedCodebook]], list[_Table]]
] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _fits_float32(rows: Array) -> bool:
    """Return whether float32 holds products with these rows."""
    longest = float(np.abs(rows).max(initial=0.0)) * math.sqrt(rows.shape[1])
    return longest < LENGTHS[1]


def _tables(codebooks: Sequence[IndexedCodebook], rows: int) -> list[_Table]:
    """Return the tables of the levels after the first; none where they would not pay."""
    sizes = [len(book) for book in codebooks]
    columns = [padded(size, SCAN) for size in sizes]
    needed = sum(4 * sum(sizes[:level]) * columns[level] for level in range(1, len(sizes)))
    # torch may be told to round float32 operands to bfloat16 or TF32 inside its products.
    loose = torch.get_float32_matmul_precision() != "highest"
    if len(sizes) < 2 or needed > PRODUCT_BYTES or loose:
        return []
    with _lock:
        others, tables = _table_cache.get(codebooks[-1], ([], []))
    if [ref() for ref in others] == list(codebooks[:-1]):
        return tables
    if rows < max(sizes):
        return []
    tables = _make_tables(codebooks)
    with _lock:
        _table_cache[codebooks[-1]] = [weakref.ref(book) for book in codebooks[:-1]], tables
    return tables


def _make_tables(codebooks: Sequence[IndexedCodebook]) -> list[_Table]:
    """Make the table of every level after the first; none where float32 does not hold them."""
    words = [book.codewords.numpy() for book in codebooks]
    center = words[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    earlier = [words[0] - center, *words[1:]]
    longest = [
        float(np.sqrt(np.square(each, dtype=np.float64).sum(axis=1).max())) for each in earlier
    ]
    if not LENGTHS[0] < min(longest) <= max(longest) < LENGTHS[1]:
        return []
    tables = []
    for level in range(1, len(words)):
        codewords = words[level]
        turned = np.zeros((codewords.shape[1], padded(len(codewords), SCAN)), dtype=np.float32)
        turned[:, : len(codewords)] = codewords.T
        bias = np.full(turned.shape[1], -np.inf, dtype=np.float32)
        bias[: len(codewords)] = -0.5 * np.square(codewords, dtype=np.float64).sum(axis=1)
        rows = np.concatenate(earlier[:level])
        products = np.empty((len(rows), turned.shape[1]), dtype=np.float32)
        with one_blas_thread():  # products with `out` are float32 under autocast too
            torch.mm(
                torch.from_numpy(rows), torch.from_numpy(turned), out=torch.from_numpy(products)
            )
        tables.append(
            _Table(
                words=codewords,
                padded=float32_rows(codebooks[level].codewords, name="codebook"),
                turned=torch.from_numpy(turned),
                bias=torch.from_numpy(bias),
                products=products,
                first=np.cumsum([0, *(len(each) for each in words[: level - 1])]),
                center=center,
                reach=longest[level],
                before=sum(longest[:level]),
            )
        )
    return tables


def _scan_level(
    rows: Array, beam: _Partials, table: _Table, width: int, threads: int | None
) -> _Partials:
    """Take the level's best children from products that all partial codes of a row share."""
    items, partials, dim = beam.residuals.shape
    columns = len(table.bias)
    best = min(width, partials * len(table.words))
    parents, labels = np.empty((2, items, best), dtype=np.int64)
    distances = np.empty((items, best), dtype=np.float32)

    def work(start: int) -> None:
        part = slice(start, start + CHUNK)
        x = rows[part] - table.center
        base = np.empty((len(x), columns), dtype=np.float32)
        torch.addmm(table.bias, torch.from_numpy(x), table.turned, out=torch.from_numpy(base))
        lengths = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
        count, capacity = len(x), max(8 * SCAN, 4 * best + 2 * SCAN)
        counts = np.zeros(count, dtype=np.int64)
        candidates = np.empty((count, capacity), dtype=np.int32)
        scan_children(
            base,
            0.5 * beam.distances[part],
            table.products,
            beam.codes[part] + table.first,
            table.bias.numpy(),
            table.margins(lengths),
            np.full(count, np.finfo(np.float32).min),
            counts,
            candidates,
            np.empty((count, capacity), dtype=np.float32),
            best,
            np.empty(capacity, dtype=np.float32),
            aligned((1, columns), np.float32),
        )
        left = np.zeros((count * partials, table.padded.shape[1]), dtype=np.float32)
        left[:, :dim] = beam.residuals[part].reshape(-1, dim)
        resolve_children(
            left, table.padded, columns, counts, candidates, parents[part], labels[part],
            distances[part],
        )  # fmt: skip

    small = beam.residuals.size * len(table.words) < THREADED_WORK
    map_blocks(work, range(0, items, CHUNK), threads=1 if small else threads)
    return _extend(beam, parents, labels, distances, table.words)
