"""K-means over rows that lie in shards: in this process, in several, or on other machines.

A `Shard` holds consecutive blocks and remembers what K-means knows of their rows. A `ShardPool`
carries calls to shards and brings the answers back in their order. `ShardedMatrix` is what K-means
works on: it adds up the answers in an order that does not depend on the number of shards. Calls
and answers are small (centroids, sums, row numbers, a few rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from semid.errors import UsageError
from semid.quantization.blocks import (
    BLOCK_ROWS,
    Blocks,
    Node,
    RowTransform,
    Statistics,
    TreeSum,
    WritableBlocks,
    in_memory,
    mean_row,
    merge_nodes,
    moments,
    read_ahead,
    residuals,
    statistics,
)
from semid.quantization.nearest import AssignmentMemory, index_codebook
from semid.quantization.threads import default_threads

Array = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Labels = Numbers | Callable[["Shard"], Numbers] | None


class Shard:
    """Rows of consecutive blocks. Row numbers and block numbers count from the first of all rows.

    `subtract_codewords` writes to `WritableBlocks` in place. ``first_row`` is the number of its
    first row among all rows. Rows are held as float32 up to ``memory_bytes``, and read again at
    every pass above it; the results are the same.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        first_row: int = 0,
        weights: Doubles | None = None,
        threads: int | None = None,
        memory_bytes: int = 0,
    ) -> None:
        if first_row % BLOCK_ROWS:
            raise UsageError(f"first_row={first_row} is not a multiple of {BLOCK_ROWS}")
        self.base, self.first_row, self.weights = blocks, first_row, weights
        self.threads, self.memory_bytes = threads or default_threads(), memory_bytes
        self.reset_levels()

    def __len__(self) -> int:
        return len(self.base)

    # The view: residuals after earlier levels -------------------------------------------------

    def preprocess(self, preprocess: RowTransform) -> None:
        """See every row through ``preprocess`` from now on."""
        self.base = preprocess.view(self.base)
        self.reset_levels()

    def reset_levels(self) -> None:
        """Forget all levels: the view is the rows themselves again."""
        self._level_labels: list[Numbers] = []
        self._codebooks: list[Array] = []
        self._reset_view()

    def _reset_view(self) -> None:
        self._view: Blocks | None = None
        self._last_centroids: Array | None = None
        self.labels: Numbers = np.empty(0, np.int64)
        self._distances: Array = np.empty(0, np.float32)
        self.memory = AssignmentMemory()

    def subtract_codewords(self, codebook: Array, labels: Labels = None) -> None:
        """Replace the view by its residual.

        ``labels`` ``(rows,)`` may be a function of this shard that returns them. None uses each
        row's nearest codeword, which the last pass may know.
        """
        if callable(labels):
            labels = labels(self)
        if labels is None:
            if not self._was_last_pass(codebook):
                self.assign(codebook)
            labels = self.labels
        if isinstance(self.base, WritableBlocks):
            for start in range(0, len(self), BLOCK_ROWS):
                span = slice(start, start + BLOCK_ROWS)
                self.base.matrix[span] -= codebook[labels[span]]
        else:
            self._level_labels.append(labels)
            self._codebooks.append(codebook)
        self._reset_view()

    def _was_last_pass(self, codebook: Array) -> bool:
        """Whether the last pass gave the labels that ``codebook`` gives."""
        last = self._last_centroids
        # Copies of the first codeword may follow: ties go to the lowest code, so they get no rows.
        return (
            last is not None
            and np.array_equal(last, codebook[: len(last)])
            and bool((codebook[len(last) :] == codebook[:1]).all())
        )

    @property
    def view(self) -> Blocks:
        """The rows as the next level sees them; read into memory at the first use."""
        if self._view is None:
            self._view = in_memory(self._unread(), limit_bytes=self.memory_bytes)
        return self._view

    def _unread(self) -> Blocks:
        if not self._codebooks:
            return self.base
        return residuals(self.base, self._level_labels, self._codebooks)

    def rows(self, numbers: Numbers) -> Array:
        """Return the rows ``(n, dim)`` of the view, which is not read into memory for them."""
        view = self._unread() if self._view is None else self._view
        return view.rows(numbers - self.first_row)

    # Sums ------------------------------------------------------------------------------------

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``function(self, *arguments)``; it may read this shard and use its memory."""
        return function(self, *arguments)

    def numbered_blocks(self) -> Iterator[tuple[int, slice, Array]]:
        """Yield the number of each block, its rows' places in this shard, and its rows."""
        for start, block in read_ahead(self.view):
            yield (self.first_row + start) // BLOCK_ROWS, slice(start, start + len(block)), block

    def moments(self) -> list[Node[Statistics]]:
        """Sum all rows of the view; see `semid.quantization.blocks.moments`."""
        return moments(self.view, first_block=self.first_row // BLOCK_ROWS)

    def assign(self, centroids: Array) -> list[Node[Statistics]]:
        """Give every row its nearest centroid, remember it, and sum the rows of each."""
        self.labels = np.empty(len(self), dtype=np.int64)
        self._distances = np.empty(len(self), dtype=np.float32)
        self._last_centroids = centroids
        codebook = index_codebook(centroids)
        tree: TreeSum[Statistics] = TreeSum()
        for start, block in read_ahead(self.view):
            span = slice(start, start + len(block))
            _, self.labels[span], self._distances[span] = self.memory.assign(
                start, block, codebook, threads=self.threads
            )
            sums = statistics(
                block,
                self.labels[span],
                self._distances[span],
                codes=len(centroids),
                weights=None if self.weights is None else self.weights[span],
                threads=self.threads,
            )
            tree.add((self.first_row + start) // BLOCK_ROWS, sums)
        return tree.nodes

    def farthest(self, count: int) -> tuple[Numbers, npt.NDArray[np.floating]]:
        """Return up to ``count`` rows with the largest loss in the last pass, and the losses."""
        loss = self._distances if self.weights is None else self._distances * self.weights
        rows = np.arange(len(loss))
        if count < len(loss):
            # All rows above the count-th largest loss, then as many of those equal to it as fit.
            edge = np.partition(loss, len(loss) - count)[len(loss) - count]
            above = np.flatnonzero(loss > edge)
            rows = np.concatenate([above, np.flatnonzero(loss == edge)[: count - len(above)]])
        # The largest first, equal losses in row order; a row without loss would win nothing.
        rows = rows[loss[rows] > 0]
        rows = rows[np.lexsort((rows, -loss[rows]))]
        return rows.astype(np.int64) + self.first_row, loss[rows]


class ShardPool(Protocol):
    """Shards and a way to call them."""

    # (first row, past the last) of each shard, in order, cut between blocks.
    spans: Sequence[tuple[int, int]]

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a `Shard` method on the shards named; return their answers."""
        ...

    def call_all(self, method: str, *arguments: Any) -> list[Node[Statistics]]:
        """Call a method that answers in nodes on every shard; return all nodes, merged."""
        ...


class LocalShardPool:
    """One shard in this process."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.spans: Sequence[tuple[int, int]] = [(0, len(shard))]

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call the method."""
        return {place: getattr(self.shard, method)(*args) for place, args in arguments.items()}

    def call_all(self, method: str, *arguments: Any) -> list[Node[Statistics]]:
        """Call the method."""
        return merge_nodes([getattr(self.shard, method)(*arguments)])


class ShardedMatrix:
    """All rows ``(items, dim)`` that are clustered; the shards know the ``weights`` too."""

    def __init__(self, pool: ShardPool, *, dim: int, weights: Doubles | None = None) -> None:
        self.pool, self.dim, self.weights = pool, dim, weights
        self._ends = np.array([end for _, end in pool.spans], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _call_each(self, method: str, *arguments: Any) -> list[Any]:
        """Return the answers of all shards, in their order."""
        places = range(len(self.pool.spans))
        answers = self.pool.call(method, dict.fromkeys(places, arguments))
        return [answers[place] for place in places]

    def _gather(self, method: str, numbers: Numbers, result: Array) -> None:
        """Ask each shard about its own rows; write the answers to ``result``, by row."""
        # A row belongs to the first shard that ends after it.
        owners = np.searchsorted(self._ends, numbers, side="right")
        places = {int(owner): np.flatnonzero(owners == owner) for owner in np.unique(owners)}
        answers = self.pool.call(method, {o: (numbers[at],) for o, at in places.items()})
        for owner, at in places.items():
            result[at] = answers[owner]

    def rows(self, numbers: Numbers) -> Array:
        """Return the rows at ``numbers`` ``(n, dim)``, in that order."""
        if len(numbers) <= BLOCK_ROWS and isinstance(self.pool, LocalShardPool):
            return self.pool.shard.rows(numbers)
        result = np.empty((len(numbers), self.dim), dtype=np.float32)
        # Block by block, so that a large sample is never held twice.
        for start in range(0, len(numbers), BLOCK_ROWS):
            span = slice(start, start + BLOCK_ROWS)
            self._gather("rows", numbers[span], result[span])
        return result

    def mean(self) -> Doubles:
        """Return the mean row ``(dim,)``."""
        return mean_row(self.pool.call_all("moments"))

    def variance(self) -> float:
        """Return the mean variance of the columns; weights do not count."""
        total = TreeSum(self.pool.call_all("moments")).total()
        mean = total.sums[0] / total.counts[0]
        squared_distance = total.inertia / float(total.counts[0]) - float(mean @ mean)
        return max(squared_distance, 0.0) / self.dim

    def preprocess(self, preprocess: RowTransform) -> None:
        """See every row through ``preprocess`` from now on."""
        self._call_each("preprocess", preprocess)

    def reset_levels(self) -> None:
        """Forget all levels."""
        self._call_each("reset_levels")

    def subtract_codewords(self, codebook: Array, labels: Labels = None) -> None:
        """Replace all rows by their residuals, see `Shard.subtract_codewords`."""
        if callable(labels):
            self._call_each("subtract_codewords", codebook, labels)
            return
        if labels is None or not len(labels):
            self._call_each("subtract_codewords", codebook)
            return
        spans = enumerate(self.pool.spans)
        self.pool.call("subtract_codewords", {i: (codebook, labels[a:b]) for i, (a, b) in spans})

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what a function of each shard gives, in their order; see `Shard.run`."""
        return self._call_each("run", function, *arguments)

    def sum(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the sum of the nodes that a function of each shard gives; see `Shard.run`."""
        return TreeSum(self.pool.call_all("run", function, *arguments)).total()

    def assign(self, centroids: Array) -> Statistics:
        """Give every row its nearest centroid; return the sums over all rows."""
        return TreeSum(self.pool.call_all("assign", centroids)).total()

    def labels(self) -> Numbers:
        """Return the labels of the last pass, or none at all where they lie in other processes."""
        pool = self.pool
        return pool.shard.labels if isinstance(pool, LocalShardPool) else np.empty(0, np.int64)

    def farthest(self, count: int) -> Numbers:
        """Return up to ``count`` rows with the largest loss in the last pass, largest first."""
        answers = self._call_each("farthest", count)
        numbers, loss = (np.concatenate(parts) for parts in zip(*answers, strict=True))
        # The largest of all are among the largest of each shard.
        return numbers[np.lexsort((numbers, -loss))][:count]


def as_sharded(
    blocks: Blocks | ShardedMatrix,
    *,
    weights: Doubles | None = None,
    threads: int | None = None,
    memory_bytes: int = 0,
) -> ShardedMatrix:
    """Return rows ``(items, dim)`` of this process as a `ShardedMatrix`; one stays as it is."""
    if isinstance(blocks, ShardedMatrix):
        return blocks
    shard = Shard(blocks, weights=weights, threads=threads, memory_bytes=memory_bytes)
    return ShardedMatrix(LocalShardPool(shard), dim=blocks.dim, weights=weights)


def payload_bytes(value: Any) -> int:
    """Count the bytes of all arrays in a question or an answer: what has to travel."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, Node):
        return payload_bytes(value.value)
    if is_dataclass(value):
        value = [getattr(value, each.name) for each in fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(payload_bytes(part) for part in value)
    return 8 if isinstance(value, float | int) else 0
