"""Rows in fixed global blocks, and sums over them: the only view of data that the numerics need.

Work is cut into blocks of `BLOCK_ROWS` rows counted from row 0. Sums are taken a block at a time
in float64. Floating-point addition is not associative, so a sum depends on where its brackets are.
Here a binary tree over the block numbers places them: node ``(height, index)`` is the sum of the
blocks from ``index * 2**height`` up to the next node of that height. Whoever holds consecutive
blocks can add up whole nodes alone and pass on the few that remain, so that threads, processes and
memory limits cannot change a result. Up to three blocks this is plain addition in block order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from semid.errors import UsageError
from semid.lazy import is_imported, kernel
from semid.quantization.threads import map_blocks

Array = npt.NDArray[np.float32]
BLOCK_ROWS = 65_536
# Rows that are read again and again are held in memory up to this size.
MEMORY_BYTES = 1 << 30

# Numbers from which on a kernel that makes no copy of the subtracted rows is worth its import.
FUSED_SIZE = 1 << 19

# Views on rows --------------------------------------------------------------------------------


class Blocks(Protocol):
    """What can be clustered: ``(items, dim)`` float32 rows, in order by block or at random."""

    @property
    def dim(self) -> int:
        """Width of a row."""
        ...

    def __len__(self) -> int: ...

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, rows)`` in order; every block but the last has ``size`` rows."""
        ...

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``indices``, in that order."""
        ...


class RowTransform(Protocol):
    """What maps each row by itself."""

    def view(self, blocks: Blocks) -> Blocks:
        """Return a view of mapped rows."""
        ...


class ArrayBlocks:
    """Blocks over a matrix ``(items, dim)`` in memory; other types become float32 by block."""

    def __init__(self, matrix: npt.NDArray[np.floating]) -> None:
        self.matrix, self.dim = matrix, int(matrix.shape[1])

    def __len__(self) -> int:
        return len(self.matrix)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, rows)`` in order."""
        for start in range(0, len(self.matrix), size):
            yield start, np.ascontiguousarray(self.matrix[start : start + size], dtype=np.float32)

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``indices``."""
        return np.ascontiguousarray(self.matrix[indices], dtype=np.float32)


class WritableBlocks(ArrayBlocks):
    """A float32 matrix ``(items, dim)`` that nobody else reads: residuals can replace its rows.

    A view of the residuals would be held beside it: at a million rows a gigabyte more.
    """


class RowView:
    """Rows computed as they are read: ``function(base rows, their numbers)``, ``dim`` wide.

    Each row must depend on its base row and its number alone.
    """

    def __init__(
        self,
        base: Blocks,
        function: Callable[[Array, slice | npt.NDArray[np.int64]], Array],
        dim: int,
    ) -> None:
        self.base, self.function, self.dim = base, function, dim

    def __len__(self) -> int:
        return len(self.base)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, rows)`` in order."""
        for start, block in self.base.blocks(size):
            yield start, self.function(block, slice(start, start + len(block)))

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``indices``."""
        return self.function(self.base.rows(indices), indices)


def map_rows(base: Blocks, function: Callable[[Array], Array], dim: int) -> RowView:
    """Return a view after a function of each row by itself, from ``(n, base.dim)`` to ``dim``."""
    return RowView(base, lambda rows, _: function(rows), dim)


def first_columns(base: Blocks, count: int) -> RowView:
    """Return a view of the first ``count`` columns."""
    return map_rows(base, lambda rows: np.ascontiguousarray(rows[:, :count]), count)


def residuals(
    base: Blocks, labels: Sequence[npt.NDArray[np.integer]], codebooks: Sequence[Array]
) -> RowView:
    """Return a view of what earlier levels leave of each row.

    Shapes: ``labels`` (items,) and ``codebooks`` (codes, dim) float32, one of each per level.
    """
    levels = list(zip(labels, codebooks, strict=True))

    def subtract_codewords(rows: Array, at: slice | npt.NDArray[np.int64]) -> Array:
        for codes, codebook in levels:  # in level order: float32 differences depend on it
            rows = subtract_rows(rows, codebook, codes[at])
        return rows

    return RowView(base, subtract_codewords, base.dim)


def subtract_rows(rows: Array, table: Array, places: npt.NDArray[np.integer]) -> Array:
    """Return ``rows - table[places]``: rows (n, dim), table (codes, dim), places (n,)."""
    out = np.empty_like(rows)
    if rows.size < FUSED_SIZE or not is_imported("numba"):
        np.subtract(rows, table[places], out=out)
    else:
        # Places of one type, for which one kernel is compiled.
        _subtract_rows(rows, table, np.ascontiguousarray(places, dtype=np.int64), out)
    return out


@kernel()
def _subtract_rows(
    rows: np.ndarray, table: np.ndarray, places: np.ndarray, out: np.ndarray
) -> None:
    for i in range(rows.shape[0]):
        row, entry, result = rows[i], table[places[i]], out[i]
        for d in range(rows.shape[1]):
            result[d] = row[d] - entry[d]


class Preprocess:
    """Row-wise preparation of vectors, saved with a model and undone where it can be.

    Args:
        mean: ``(dim,)`` mean of the training rows to subtract; None leaves rows as they are.
        normalize: scale each (centered) row to unit length; zero rows stay zero.
        padding: columns of zeros to append, in which codewords hold their offsets.
    """

    def __init__(
        self, *, mean: Array | None = None, normalize: bool = False, padding: int = 0
    ) -> None:
        self.mean, self.normalize, self.padding = mean, normalize, padding

    @classmethod
    def fit(cls, blocks: Blocks, *, center: bool, normalize: bool) -> Preprocess:
        """Fit on training rows: one pass when ``center`` is set, none otherwise."""
        mean = mean_row(moments(blocks)).astype(np.float32) if center else None
        return cls(mean=mean, normalize=normalize)

    def view(self, blocks: Blocks) -> Blocks:
        """Return a view of preprocessed rows; the rows themselves where nothing changes them."""
        if self.mean is None and not self.normalize:
            return blocks
        return map_rows(blocks, self.apply, blocks.dim)

    def apply(self, block: Array) -> Array:
        """Preprocess rows ``(n, dim)``; each row's result depends on that row alone."""
        if self.mean is not None:
            block = block - self.mean
        if self.normalize:
            norms = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
            norms[norms == 0] = 1.0
            block = (block / norms[:, None]).astype(np.float32)
        return np.pad(block, ((0, 0), (0, self.padding))) if self.padding else block

    def invert(self, block: Array) -> Array:
        """Undo the centering; lengths lost to ``normalize`` are not restored."""
        block = block[:, : block.shape[1] - self.padding]
        return block if self.mean is None else block + self.mean


def in_memory(blocks: Blocks, *, limit_bytes: int = MEMORY_BYTES) -> Blocks:
    """Read ``blocks`` into one float32 matrix if it fits ``limit_bytes``; results are the same."""
    if isinstance(blocks, ArrayBlocks) or len(blocks) * blocks.dim * 4 > limit_bytes:
        return blocks
    matrix = np.empty((len(blocks), blocks.dim), dtype=np.float32)
    for start, block in blocks.blocks():
        matrix[start : start + len(block)] = block
    return ArrayBlocks(matrix)


def prefetched(blocks: Iterator[tuple[int, Array]]) -> Iterator[tuple[int, Array]]:
    """Read one block ahead in a thread, so that disk and decoding overlap with arithmetic."""
    with ThreadPoolExecutor(1, thread_name_prefix="semid-prefetch") as reader:
        ahead = reader.submit(next, blocks, None)
        while (item := ahead.result()) is not None:
            ahead = reader.submit(next, blocks, None)
            yield item


def read_ahead(blocks: Blocks) -> Iterator[tuple[int, Array]]:
    """Read blocks in order, ahead of their use unless they already lie in memory."""
    return blocks.blocks() if isinstance(blocks, ArrayBlocks) else prefetched(blocks.blocks())


# Sums over blocks -----------------------------------------------------------------------------


class Addable(Protocol):
    """What can be summed."""

    def add_(self, other: Self) -> None:
        """Add ``other``, which stands to the right, in place."""
        ...


T = TypeVar("T", bound=Addable)


@dataclass
class Node(Generic[T]):
    """The sum ``value`` of the ``2**height`` blocks from ``index * 2**height`` on."""

    height: int
    index: int
    value: T


class TreeSum(Generic[T]):
    """Adds blocks that come in order, in place; holds O(log blocks) partial sums."""

    def __init__(self, nodes: Iterable[Node[T]] = ()) -> None:
        self.nodes: list[Node[T]] = list(nodes)

    def add(self, block: int, value: T) -> None:
        """Add block number ``block``, the one after the last."""
        self.push(Node(0, block, value))

    def push(self, node: Node[T]) -> None:
        """Add a node that starts where the last one ended, then every parent that is whole."""
        while self.nodes:
            before = self.nodes[-1]
            # Only an even node and the odd one after it have the same parent.
            if before.height != node.height or before.index % 2 or node.index != before.index + 1:
                break
            self.nodes.pop()
            before.value.add_(node.value)
            node = Node(before.height + 1, before.index // 2, before.value)
        self.nodes.append(node)

    def total(self) -> T:
        """Return the sum of all blocks, which were all added from block 0 on."""
        if not self.nodes:
            raise UsageError("no blocks were added; add at least one")
        # Where the last block completes no parent, the tree is the same with the missing right
        # halves left out. The smallest nodes stand last and are the deepest: they are added first.
        value = self.nodes[-1].value
        for node in reversed(self.nodes[:-1]):
            node.value.add_(value)
            value = node.value
        return value


def merge_nodes(parts: Iterable[Sequence[Node[T]]]) -> list[Node[T]]:
    """Join the nodes of neighbors, left to right, and add up what became whole (in place)."""
    tree: TreeSum[T] = TreeSum()
    for node in itertools.chain.from_iterable(parts):
        tree.push(node)
    return tree.nodes


def cut_blocks(blocks: int, shards: int) -> list[tuple[int, int]]:
    """Cut ``blocks`` into ``shards`` ranges of nearly equal length that hold few whole nodes.

    Cuts stand at multiples of a power of two of at most a sixteenth of a share, so no share
    exceeds the mean by more than an eighth of it, or by one block where shares are smaller than 16
    blocks. Returns (first, past the last) of each.
    """
    # The largest power of two that is at most a sixteenth of a share.
    step = 1
    while step * 2 * shards * 16 <= blocks:
        step *= 2
    edges = [min(blocks, round(blocks * shard / shards / step) * step) for shard in range(shards)]
    return list(itertools.pairwise([*edges, blocks]))


@dataclass
class Statistics:
    """What a block (or several, added in block order) contributes to an update."""

    sums: npt.NDArray[np.float64]  # (codes, dim) weighted sum of the rows of each codeword
    counts: npt.NDArray[np.float64]  # (codes,) their total weight
    inertia: float  # weighted sum of squared distances

    def add_(self, other: Statistics) -> None:
        """Add the statistics of the blocks that follow, in place."""
        self.sums += other.sums
        self.counts += other.counts
        self.inertia += other.inertia


@dataclass
class StatisticsList:
    """What a block contributes to several updates, such as those of the parts of a row."""

    parts: list[Statistics]

    def add_(self, other: StatisticsList) -> None:
        """Add the statistics of the blocks that follow, in place."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.add_(theirs)


def moments(blocks: Blocks, *, first_block: int = 0) -> list[Node[Statistics]]:
    """Sum all rows, under one code that holds every row once, and their squared lengths."""
    tree: TreeSum[Statistics] = TreeSum()
    for number, (_, block) in enumerate(read_ahead(blocks), first_block):
        sums = block.sum(axis=0, dtype=np.float64)[None]
        squares = float(np.einsum("nd,nd->", block, block, dtype=np.float64))
        tree.add(number, Statistics(sums, np.array([float(len(block))]), squares))
    return tree.nodes


def mean_row(nodes: list[Node[Statistics]]) -> npt.NDArray[np.float64]:
    """Return the mean row ``(dim,)`` of `moments`."""
    total = TreeSum(nodes).total()
    return np.asarray(total.sums[0] / total.counts[0])


@kernel()
def _group(labels: npt.NDArray[np.int64], codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Counting sort: row numbers by code, rows in order inside a code."""
    starts = np.zeros(codes + 1, dtype=np.int64)
    for label in labels:
        starts[label + 1] += 1
    for code in range(codes):
        starts[code + 1] += starts[code]
    # Place every row at its code's next free place; rows come in order, so order is stable.
    cursor = starts[:-1].copy()
    order = np.empty(len(labels), dtype=np.int64)
    for row in range(len(labels)):
        order[cursor[labels[row]]] = row
        cursor[labels[row]] += 1
    return order, starts


@kernel()
def _sum_codes(
    x: np.ndarray, weights: np.ndarray, order: np.ndarray, starts: np.ndarray, sums: np.ndarray,
    counts: np.ndarray, first: int, last: int,
) -> None:  # fmt: skip
    """Add rows into codewords ``first..last``; one code's rows stay in cache while it is summed."""
    weighted = len(weights) > 0
    for code in range(first, last):
        total = sums[code]
        for place in range(starts[code], starts[code + 1]):
            row = order[place]
            if weighted:
                weight = weights[row]
                counts[code] += weight
                for d in range(x.shape[1]):
                    total[d] += weight * np.float64(x[row, d])
            else:
                for d in range(x.shape[1]):
                    total[d] += np.float64(x[row, d])
        if not weighted:
            counts[code] += starts[code + 1] - starts[code]


def statistics(
    block: Array,
    labels: npt.NDArray[np.int64],
    distances: Array,
    *,
    codes: int,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int = 1,
) -> Statistics:
    """Sum a block's rows ``(n, dim)`` by label. Time O(n dim), memory O(codes dim).

    Threads share out codewords, not rows, so every sum is taken in row order whatever their number.
    """
    sums, counts = np.zeros((codes, block.shape[1])), np.zeros(codes)
    order, starts = _group(labels, codes)
    row_weights = np.empty(0) if weights is None else weights
    bounds = [0, codes]
    if threads > 1 and len(block) >= 4096:
        # Cut between codewords so that every thread gets nearly the same number of rows.
        cuts = np.searchsorted(starts, np.linspace(0, len(block), threads + 1)[1:-1])
        bounds[1:1] = np.clip(cuts, 0, codes).tolist()
    map_blocks(
        lambda span: _sum_codes(block, row_weights, order, starts, sums, counts, *span),
        list(itertools.pairwise(bounds)),
        threads=threads,
    )
    squared = distances.astype(np.float64)
    inertia = float((squared if weights is None else squared * weights).sum())
    return Statistics(sums, counts, inertia)
