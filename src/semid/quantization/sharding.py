"""K-means over rows that lie in shards: in this process, in several, or on other machines.

A `Shard` holds consecutive blocks and remembers what K-means knows of their rows. A `ShardPool`
carries calls to shards and brings the answers back in their order. `ShardedMatrix` is what K-means
works on: it adds up the answers in an order that does not depend on the number of shards. Calls
and answers are small (centroids, sums, row numbers, a few rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import UsageError
from semid.quantization.blocks import (
    BLOCK_ROWS,
    Blocks,
    Preprocess,
    PreprocessedBlocks,
    ResidualBlocks,
    WritableBlocks,
    in_memory,
    read_ahead,
)
from semid.quantization.nearest import assign, index_codebook
from semid.quantization.sums import Node, Statistics, TreeSum, merge_nodes, statistics
from semid.quantization.threads import default_threads

Array = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


class Shard:
    """Rows of consecutive blocks. Row numbers and block numbers count from the first of all rows.

    Args:
        blocks: ``(rows, dim)``; `subtract_codewords` writes to `WritableBlocks` in place.
        first_row: number of the first of them among all rows, a multiple of `BLOCK_ROWS`.
        weights: ``(rows,)`` non-negative weights of its rows; None counts rows once.
        threads: plain threads; None takes what the machine allows.
        memory_bytes: rows are held as float32 up to this size, and read again at every pass above
            it; the results are the same.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        first_row: int = 0,
        weights: npt.NDArray[np.float64] | None = None,
        threads: int | None = None,
        memory_bytes: int = 0,
    ) -> None:
        if first_row % BLOCK_ROWS:
            raise UsageError(f"first_row={first_row} is not a multiple of {BLOCK_ROWS}")
        self.base = blocks
        self.first_row = first_row
        self.weights = weights
        self.threads = threads or default_threads()
        self.memory_bytes = memory_bytes
        self.reset_levels()

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.base)

    # The view: what earlier levels leave ------------------------------------------------------

    def preprocess(self, preprocess: Preprocess) -> None:
        """See every row through ``preprocess`` from now on."""
        if not preprocess.identity:
            self.base = PreprocessedBlocks(self.base, preprocess)
        self.reset_levels()

    def reset_levels(self) -> None:
        """Forget all levels: the view is the rows themselves again."""
        self._labels: list[Numbers] = []
        self._books: list[Array] = []
        self._look()

    def subtract_codewords(self, codebook: Array, labels: Numbers | None = None) -> None:
        """Replace the view by what ``codebook`` leaves of it.

        Args:
            codebook: ``(codes, dim)``.
            labels: ``(rows,)`` the chosen codes; None takes each row's nearest codeword, which the
                last pass may know already.
        """
        if labels is None:
            known = self._passed is not None and np.array_equal(
                self._passed, codebook[: len(self._passed)]
            )
            if not known or not self._copies(codebook):
                self.assign(codebook)
            labels = self.labels
        if isinstance(self.base, WritableBlocks):
            self.base.subtract_(codebook, labels)
            self._look()
            return
        self._labels.append(labels)
        self._books.append(codebook)
        self._look()

    def _copies(self, codebook: Array) -> bool:
        """Whether what the codebook has beyond the last pass's centroids are copies of its first.

        Ties go to the lowest code, so such copies are never chosen.
        """
        assert self._passed is not None
        extra = codebook[len(self._passed) :]
        return bool((extra == codebook[:1]).all())

    def _look(self) -> None:
        self._view: Blocks | None = None
        self._passed: Array | None = None
        self.labels: Numbers = np.empty(0, np.int64)
        self._distances: Array = np.empty(0, np.float32)
        self._closest: Array = np.empty(0, np.float32)

    @property
    def view(self) -> Blocks:
        """The rows as the next level sees them; read into memory by the first who asks."""
        if self._view is None:
            self._view = in_memory(self._unread(), limit_bytes=self.memory_bytes)
        return self._view

    def _unread(self) -> Blocks:
        return ResidualBlocks(self.base, self._labels, self._books) if self._books else self.base

    def rows(self, numbers: Numbers) -> Array:
        """Return the rows ``(n, dim)`` of the view, which is not read into memory for them."""
        view = self._unread() if self._view is None else self._view
        return view.rows(numbers - self.first_row)

    # Sums ------------------------------------------------------------------------------------

    def moments(self) -> list[Node[Statistics]]:
        """Sum all rows of the view, and their squares: one code that holds every row once."""
        tree: TreeSum[Statistics] = TreeSum()
        for start, block in read_ahead(self.view):
            squares = float(np.einsum("nd,nd->", block, block, dtype=np.float64))
            sums = block.sum(axis=0, dtype=np.float64)[None]
            tree.add(self._block(start), Statistics(sums, np.array([float(len(block))]), squares))
        return tree.nodes

    def assign(self, centroids: Array) -> list[Node[Statistics]]:
        """Give every row its nearest centroid, remember it, and sum the rows of each."""
        self.labels = np.empty(len(self), dtype=np.int64)
        self._distances = np.empty(len(self), dtype=np.float32)
        self._passed = centroids
        prepared = index_codebook(torch.from_numpy(centroids))
        tree: TreeSum[Statistics] = TreeSum()
        for start, block in read_ahead(self.view):
            span = slice(start, start + len(block))
            self.labels[span], self._distances[span] = assign(block, prepared, threads=self.threads)
            found = statistics(
                block,
                self.labels[span],
                self._distances[span],
                codes=len(centroids),
                weights=None if self.weights is None else self.weights[span],
                threads=self.threads,
            )
            tree.add(self._block(start), found)
        return tree.nodes

    def _block(self, start: int) -> int:
        return (self.first_row + start) // BLOCK_ROWS

    def farthest(self, count: int) -> tuple[Numbers, npt.NDArray[np.floating]]:
        """Return up to ``count`` rows with the largest loss in the last pass, and the losses.

        The largest first, equal losses in row order; rows without loss are left out.
        """
        loss = self._distances if self.weights is None else self._distances * self.weights
        if count < len(loss):
            edge = np.partition(loss, len(loss) - count)[len(loss) - count]
            beyond = np.flatnonzero(loss > edge)
            level = np.flatnonzero(loss == edge)[: count - len(beyond)]
            chosen = np.concatenate([beyond, level])
        else:
            chosen = np.arange(len(loss))
        chosen = chosen[loss[chosen] > 0]
        chosen = chosen[np.lexsort((chosen, -loss[chosen]))]
        return chosen.astype(np.int64) + self.first_row, loss[chosen]

    # Seeding ---------------------------------------------------------------------------------

    def start_seeding(self) -> npt.NDArray[np.float64]:
        """Forget all centers; return each block's mass when every row counts by its weight."""
        self._closest = np.empty(0, np.float32)
        return np.array([_running_sum(self._mass(start)) for start in self._starts()])

    def update_nearest_center(self, fresh: Array) -> npt.NDArray[np.float64]:
        """Add centers ``(n, dim)``; return each block's weighted sum of squared distances."""
        if not len(self._closest):
            self._closest = np.full(len(self), np.inf, dtype=np.float32)
        masses = []
        prepared = index_codebook(torch.from_numpy(fresh))
        for start, block in read_ahead(self.view):
            nearest = self._closest[start : start + len(block)]
            _, distances = assign(block, prepared, threads=self.threads)
            np.minimum(nearest, distances, out=nearest)
            masses.append(_running_sum(self._mass(start)))
        return np.array(masses)

    def _starts(self) -> range:
        return range(0, len(self), BLOCK_ROWS)

    def _mass(self, start: int) -> npt.NDArray[np.float64]:
        """Return the mass of each row of the block at ``start``."""
        span = slice(start, min(start + BLOCK_ROWS, len(self)))
        weights = None if self.weights is None else self.weights[span]
        if not len(self._closest):
            return np.ones(span.stop - start) if weights is None else weights.astype(np.float64)
        mass = self._closest[span].astype(np.float64)
        return mass if weights is None else mass * weights

    def locate(self, targets: Mapping[int, Sequence[float]]) -> dict[int, Numbers]:
        """Find the row at which a block's running mass passes each target.

        Args:
            targets: block number -> masses counted from the block's first row.

        Returns:
            Block number -> row numbers, one a target.
        """
        found = {}
        for block, wanted in targets.items():
            part = self._mass(block * BLOCK_ROWS - self.first_row)
            place = np.searchsorted(np.cumsum(part), np.asarray(wanted), side="right")
            # Rounding may point past the end or at a row of no mass: the last row that has some.
            last = int(np.flatnonzero(part)[-1]) if part.any() else 0
            found[block] = (block * BLOCK_ROWS + np.minimum(place, last)).astype(np.int64)
        return found

    def center_distances(self, numbers: Numbers) -> Array:
        """Return the rows' squared distances to the nearest center so far, ``(n,)``."""
        return self._closest[numbers - self.first_row]


def _running_sum(mass: npt.NDArray[np.float64]) -> float:
    """Sum a block's masses, in the order in which `numpy.add.reduceat` sums a part."""
    return float(np.add.reduceat(mass, [0])[0])


class ShardPool(Protocol):
    """Shards and a way to call them.

    Attributes:
        spans: ``(first row, past the last)`` of each shard, in order, cut between blocks.
    """

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
        return {place: getattr(self.shard, method)(*given) for place, given in arguments.items()}

    def call_all(self, method: str, *arguments: Any) -> list[Node[Statistics]]:
        """Call the method."""
        return merge_nodes([getattr(self.shard, method)(*arguments)])


class ShardedMatrix:
    """All rows that are clustered.

    Args:
        pool: the shards that hold them.
        dim: width of a row.
        weights: ``(items,)`` weights, which the shards know too; None counts rows once.
    """

    def __init__(
        self, pool: ShardPool, *, dim: int, weights: npt.NDArray[np.float64] | None = None
    ) -> None:
        self.pool = pool
        self.dim = dim
        self.weights = weights
        self._lasts = np.array([last for _, last in pool.spans], dtype=np.int64)

    def __len__(self) -> int:
        """Count the rows."""
        return int(self._lasts[-1])

    def _everyone(self, method: str, *arguments: Any) -> list[Any]:
        places = range(len(self.pool.spans))
        found = self.pool.call(method, dict.fromkeys(places, arguments))
        return [found[place] for place in places]

    def _owners(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._lasts, rows, side="right")

    def _scattered(self, method: str, numbers: npt.NDArray[np.int64]) -> list[tuple[Any, Any]]:
        """Ask each shard about its own rows; return places in ``numbers`` and answers."""
        owners = self._owners(numbers)
        places = {int(owner): np.flatnonzero(owners == owner) for owner in np.unique(owners)}
        found = self.pool.call(method, {o: (numbers[at],) for o, at in places.items()})
        return [(places[owner], found[owner]) for owner in places]

    def rows(self, numbers: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``numbers`` ``(n, dim)``, in that order."""
        result = np.empty((len(numbers), self.dim), dtype=np.float32)
        for start in range(0, len(numbers), BLOCK_ROWS):  # a sample is never held twice
            wanted = numbers[start : start + BLOCK_ROWS]
            for at, part in self._scattered("rows", wanted):
                result[start + at] = part
        return result

    def mean(self) -> npt.NDArray[np.float64]:
        """Return the mean row ``(dim,)``."""
        tree: TreeSum[Statistics] = TreeSum()
        tree.nodes = self.pool.call_all("moments")
        total = tree.total()
        mean: npt.NDArray[np.float64] = total.sums[0] / total.counts[0]
        return mean

    def preprocess(self, preprocess: Preprocess) -> None:
        """See every row through ``preprocess`` from now on."""
        self._everyone("preprocess", preprocess)

    def reset_levels(self) -> None:
        """Forget all levels."""
        self._everyone("reset_levels")

    def subtract_codewords(
        self, codebook: Array, labels: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Replace all rows by what ``codebook`` leaves of them, see `Shard.subtract_codewords`."""
        if labels is None or not len(labels):
            self._everyone("subtract_codewords", codebook)
            return
        spans = enumerate(self.pool.spans)
        self.pool.call("subtract_codewords", {i: (codebook, labels[a:b]) for i, (a, b) in spans})

    def assign(self, centroids: Array) -> Statistics:
        """Give every row its nearest centroid; return the sums over all rows."""
        tree: TreeSum[Statistics] = TreeSum()
        tree.nodes = self.pool.call_all("assign", centroids)
        return tree.total()

    def labels(self) -> npt.NDArray[np.int64]:
        """Return the labels of the last pass, or none at all where they lie in other processes."""
        pool = self.pool
        return pool.shard.labels if isinstance(pool, LocalShardPool) else np.empty(0, np.int64)

    def farthest(self, count: int) -> npt.NDArray[np.int64]:
        """Return up to ``count`` rows with the largest loss in the last pass, largest first."""
        found = self._everyone("farthest", count)
        numbers = np.concatenate([rows for rows, _ in found])
        loss = np.concatenate([losses for _, losses in found])
        return numbers[np.lexsort((numbers, -loss))][:count]

    def start_seeding(self) -> npt.NDArray[np.float64]:
        """Forget all centers; return the mass of each block ``(blocks,)``."""
        return np.concatenate(self._everyone("start_seeding"))

    def update_nearest_center(self, fresh: Array) -> npt.NDArray[np.float64]:
        """Add centers; return the mass of each block ``(blocks,)``."""
        return np.concatenate(self._everyone("update_nearest_center", fresh))

    def draw(
        self, masses: npt.NDArray[np.float64], size: int, generator: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Draw row numbers independently, in proportion to their mass."""
        total = np.cumsum(masses)
        targets = generator.random(size) * total[-1]
        chosen = np.minimum(np.searchsorted(total, targets, side="right"), len(total) - 1)
        inside = targets - (total[chosen] - masses[chosen])
        asked: dict[int, tuple[dict[int, list[float]]]] = {}
        for block in np.unique(chosen).tolist():
            owner = int(self._owners(np.array([block * BLOCK_ROWS]))[0])
            asked.setdefault(owner, ({},))[0][block] = inside[chosen == block].tolist()
        drawn = np.empty(size, dtype=np.int64)
        for found in self.pool.call("locate", asked).values():
            for block, rows in found.items():
                drawn[chosen == block] = rows
        return drawn

    def center_distances(self, numbers: npt.NDArray[np.int64]) -> Array:
        """Return squared distances ``(n,)`` to the nearest center so far."""
        result = np.empty(len(numbers), dtype=np.float32)
        for at, part in self._scattered("center_distances", numbers):
            result[at] = part
        return result


def as_sharded(
    blocks: Blocks | ShardedMatrix,
    *,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    memory_bytes: int = 0,
) -> ShardedMatrix:
    """Return rows of this process as a `ShardedMatrix`, which is returned unchanged.

    Shapes: ``blocks`` (items, dim), ``weights`` (items,).
    """
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
    if isinstance(value, Statistics):
        return payload_bytes((value.sums, value.counts)) + 8
    if isinstance(value, Mapping):
        return sum(payload_bytes(part) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(payload_bytes(part) for part in value)
    return 8 if isinstance(value, float | int) else 0
