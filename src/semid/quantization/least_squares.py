"""Least squares of all codebooks together, lookup tables, and principal components.

With one-hot rows ``H`` of the codes, the tables ``C`` that bring ``H C`` closest to targets ``Y``
solve ``(H'H + ridge I) C = H'Y`` (additive quantization; `docs/barq.md`). ``H'H`` holds how often
two codes meet: counts on the diagonal blocks, and off them at most one entry per item, kept sparse.
``H`` is never built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

from semid.lazy import kernel, torch
from semid.quantization.blocks import Blocks
from semid.quantization.residual import dequantize
from semid.quantization.threads import (
    THREADED_WORK,
    map_blocks,
    one_blas_thread,
    one_numpy_thread,
)

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Pairs = Iterable[tuple[npt.NDArray[np.integer], Array]]

# Relative residual at which conjugate gradients stop (tables are kept as float32), and the steps
# after which they do anyway.
TOLERANCE = 1e-7
MAX_CG_STEPS = 500
# Codewords of all levels up to which elimination takes less time than conjugate gradients: a fourth
# of it on Beauty at 3 x 256.
MAX_DENSE = 1024
# Rows turned into float64 at a time.
CHUNK_ROWS = 8192


class NormalEquations:
    """Sums over items that decide the least-squares tables; blocks are added in order.

    Memory: ``O(sum(sizes) width)`` and at most one entry per item for each pair of levels.
    """

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        self.sizes, self.width = tuple(sizes), width
        self.items = 0.0
        self.total = np.zeros(width)
        self.counts = [np.zeros(size) for size in sizes]
        self.sums = [np.zeros((size, width)) for size in sizes]
        self._pairs: dict[tuple[int, int], tuple[Ints, Doubles]] = {
            pair: (np.empty(0, np.int64), np.empty(0))
            for pair in combinations(range(len(sizes)), 2)
        }

    def add_(
        self,
        codes: npt.NDArray[np.integer],
        targets: npt.NDArray[np.floating],
        weights: Doubles | None = None,
    ) -> None:
        """Add a block: ``codes`` (n, levels), ``targets`` (n, width), ``weights`` (n,)."""
        mass = np.ones(len(codes)) if weights is None else weights
        weighted = np.asarray(targets, dtype=np.float64) * mass[:, None]
        self.items += float(mass.sum())
        self.total += weighted.sum(axis=0)
        for level, size in enumerate(self.sizes):
            level_codes = np.ascontiguousarray(codes[:, level], dtype=np.int64)
            self.counts[level] += np.bincount(level_codes, weights=mass, minlength=size)
            _add_rows(self.sums[level], level_codes, weighted)
        for (i, j), (keys, masses) in self._pairs.items():
            # A pair of codes is one integer key; equal keys of earlier blocks are added up.
            pair = codes[:, i].astype(np.int64) * self.sizes[j] + codes[:, j].astype(np.int64)
            merged, where = np.unique(np.concatenate([keys, pair]), return_inverse=True)
            mass_of = np.bincount(where, weights=np.concatenate([masses, mass])).astype(np.float64)
            self._pairs[i, j] = (merged, mass_of)

    def solve(
        self,
        *,
        ridge: float,
        start: Sequence[npt.NDArray[np.floating]],
        columns: slice = slice(None),
        levels: int | None = None,
        threads: int | None = None,
    ) -> list[Doubles]:
        """Return the tables ``(codes, columns)`` that fit best, by conjugate gradients.

        A codeword without items stays as in ``start`` ``(codes, columns)``. Cost: O(pairs of codes
        that meet x columns) per step.
        """
        depth = len(self.sizes) if levels is None else levels
        mean = self.total[columns] / max(self.items, 1.0)
        offsets = np.cumsum([0, *self.sizes[:depth]])
        diagonal = np.concatenate(self.counts[:depth])
        sums = np.concatenate([table[:, columns] for table in self.sums[:depth]])
        # The mean of the targets is subtracted first and added to the first table at the end, so
        # that the ridge draws codewords towards "no effect" and never the whole towards zero.
        right = sums - diagonal[:, None] * mean
        rows = self._rows(depth, offsets)
        begin = np.concatenate([np.asarray(table, dtype=np.float64) for table in start[:depth]])
        begin[: self.sizes[0]] -= mean
        # Nothing is known of codewords without items: they are left out, and stay as they were.
        empty = diagonal == 0
        if len(diagonal) <= MAX_DENSE:
            solved = _solve_dense(rows, diagonal + ridge, right)
        else:
            system = _System(rows, diagonal + ridge, threads)
            solved = system.solve(right, np.where(empty[:, None], 0.0, begin))
        solved[: self.sizes[0]] += mean
        begin[: self.sizes[0]] += mean
        solved[empty] = begin[empty]
        return [solved[a:b] for a, b in pairwise(offsets.tolist())]

    def _rows(self, depth: int, offsets: Ints) -> tuple[Ints, Ints, Doubles]:
        """Return the blocks off the diagonal as one matrix in compressed rows."""
        blocks = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
        for (i, j), (keys, masses) in self._pairs.items():
            if j < depth:
                first, second = np.divmod(keys, self.sizes[j])
                first, second = first + offsets[i], second + offsets[j]
                # The matrix is symmetric: both halves.
                blocks += [(first, second, masses), (second, first, masses)]
        row, column, value = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        # Compressed rows: entries sorted by row, and where each row starts.
        order = np.lexsort((column, row))
        counts = np.bincount(row, minlength=int(offsets[-1]))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return starts, column[order], value[order]


def _solve_dense(rows: tuple[Ints, Ints, Doubles], diagonal: Doubles, right: Doubles) -> Doubles:
    """Solve for all columns of ``right`` by elimination; ``rows`` as in `_System`."""
    starts, columns, values = rows
    matrix = np.diag(diagonal)
    matrix[np.repeat(np.arange(len(diagonal)), np.diff(starts)), columns] = values
    with one_numpy_thread():  # another number of threads may add in another order
        return np.asarray(np.linalg.solve(matrix, right), dtype=np.float64)


class _System:
    """A symmetric positive system, its diagonal dense and the rest in compressed rows."""

    def __init__(
        self, rows: tuple[Ints, Ints, Doubles], diagonal: Doubles, threads: int | None
    ) -> None:
        self.starts, self.columns, self.values = rows
        self.diagonal, self.threads = diagonal[:, None], threads

    def apply(self, x: Doubles) -> Doubles:
        """Return the matrix times ``x``; threads share out rows."""
        out = self.diagonal * x
        if len(self.values) * x.shape[1] < THREADED_WORK:
            _multiply(self.starts, self.columns, self.values, x, out, 0, len(x))
            return out
        cuts = np.linspace(0, len(x), 17).astype(np.int64).tolist()
        map_blocks(
            lambda span: _multiply(self.starts, self.columns, self.values, x, out, *span),
            list(pairwise(cuts)),
            threads=self.threads,
        )
        return out

    def solve(self, right: Doubles, x: Doubles) -> Doubles:
        """Return the solution for every column of ``right``, by conjugate gradients from ``x``."""
        # Every column is a system of its own with the same matrix; all take their steps together.
        # The diagonal is the preconditioner: most of the matrix lies there, as two codes meet in
        # few items, so few steps are needed.
        goal = TOLERANCE**2 * np.maximum(np.einsum("nd,nd->d", right, right), 1e-300)
        residual = right - self.apply(x)
        scaled = residual / self.diagonal
        direction = scaled.copy()
        power = np.einsum("nd,nd->d", residual, scaled)
        for _ in range(MAX_CG_STEPS):
            if (np.einsum("nd,nd->d", residual, residual) <= goal).all():
                break
            image = self.apply(direction)
            along = np.einsum("nd,nd->d", direction, image)
            # The step that minimizes the error along the direction; 0 once a column has converged.
            step = np.divide(power, along, out=np.zeros_like(power), where=along > 0)
            x = x + step * direction
            residual = residual - step * image
            scaled = residual / self.diagonal
            # The next direction is conjugate to all earlier ones (Hestenes & Stiefel 1952).
            before, power = power, np.einsum("nd,nd->d", residual, scaled)
            share = np.divide(power, before, out=np.zeros_like(power), where=before > 0)
            direction = scaled + share * direction
        return x


@kernel()
def _add_rows(table: np.ndarray, codes: np.ndarray, rows: np.ndarray) -> None:
    for row in range(len(codes)):
        total = table[codes[row]]
        for d in range(rows.shape[1]):
            total[d] += rows[row, d]


@kernel()
def _multiply(
    starts: np.ndarray, columns: np.ndarray, values: np.ndarray, x: np.ndarray, out: np.ndarray,
    first: int, last: int,
) -> None:  # fmt: skip
    for row in range(first, last):
        total = out[row]
        for place in range(starts[row], starts[row + 1]):
            value, other = values[place], x[columns[place]]
            for d in range(x.shape[1]):
                total[d] += value * other[d]


def compile_tables() -> None:
    """Compile, or fetch, the kernels of this module."""
    rows = np.eye(2)
    _add_rows(rows.copy(), np.zeros(2, np.int64), rows)
    _System((np.zeros(3, np.int64), np.zeros(0, np.int64), np.zeros(0)), np.ones(2), 1).apply(rows)


@dataclass(frozen=True)
class Tables:
    """Least-squares tables."""

    tables: tuple[Array, ...]  # one (codes, width) float32 per level
    ridge: float  # the ridge that was chosen
    error: float | None  # sum |y - f|^2 / sum |y - mean|^2 on held-out items; None without any


def fit_tables(
    blocks: Pairs,
    sizes: Sequence[int],
    width: int,
    *,
    held_out: Callable[[], Pairs] | None,
    ridges: Sequence[float],
    weights: Doubles | None = None,
    threads: int | None = None,
) -> Tables:
    """Fit tables whose rows, summed by codes, predict targets, with the best ridge.

    That is the ridge of least error on the held-out items, or the middle one without any.
    ``blocks`` are pairs of codes (n, levels) and targets (n, width).
    """
    equations = NormalEquations(sizes, width)
    at = 0
    for codes, targets in blocks:
        equations.add_(codes, targets, None if weights is None else weights[at : at + len(codes)])
        at += len(codes)
    start = [np.zeros((size, width)) for size in sizes]
    start[0] += equations.total / max(equations.items, 1.0)
    candidates = sorted(ridges)
    if held_out is None:
        candidates = [candidates[len(candidates) // 2]]
    best: Tables | None = None
    least = np.inf
    # The equations are summed once; every ridge solves them again.
    for ridge in candidates:
        solved = equations.solve(ridge=ridge, start=start, threads=threads)
        tables = tuple(table.astype(np.float32) for table in solved)
        if held_out is None:
            return Tables(tables, float(ridge), None)
        loss, spread = squared_errors(held_out(), tables, width)
        if loss < least:
            best, least = Tables(tables, float(ridge), loss / spread if spread > 0 else None), loss
    assert best is not None
    return best


def squared_errors(blocks: Pairs, tables: Sequence[Array], width: int) -> tuple[float, float]:
    """Return the squared error of tables, and the targets' squares about their mean.

    The second is 0 where it is no more than rounding, as for a single item.
    """
    count, loss, squares, total = 0, 0.0, 0.0, np.zeros(width)
    for codes, targets in blocks:
        count += len(targets)
        loss += float(np.square(targets - dequantize(codes, tables), dtype=np.float64).sum())
        squares += float(np.square(targets, dtype=np.float64).sum())
        total += targets.sum(axis=0, dtype=np.float64)
    spread = squares - float(total @ total) / max(count, 1)
    return loss, spread if spread > 1e-12 * squares else 0.0


def leading_components(blocks: Blocks, mean: Doubles, *, share: float) -> Array:
    """Return the fewest principal components ``(dim, components)`` with a share of the variance.

    Cost: a pass with items x dim^2 products in float64, and an eigendecomposition.
    """
    scatter = torch.zeros((blocks.dim, blocks.dim), dtype=torch.float64)
    with one_blas_thread():  # another number of threads may add in another order
        for _, block in blocks.blocks(CHUNK_ROWS):
            centered = torch.from_numpy(block - mean)
            scatter += centered.T @ centered
        variances, vectors = (each.numpy() for each in torch.linalg.eigh(scatter))
    variances, vectors = np.maximum(variances[::-1], 0.0), vectors[:, ::-1]  # largest first
    cumulative = np.cumsum(variances)
    count = 1 + int(np.searchsorted(cumulative[:-1], share * cumulative[-1]))
    components = vectors[:, :count]
    # An eigenvector's sign is arbitrary: make its largest element positive.
    largest = np.abs(components).argmax(axis=0)
    signs = np.where(components[largest, np.arange(count)] < 0, -1.0, 1.0)
    return np.ascontiguousarray(components * signs, dtype=np.float32)
