"""A run of consecutive blocks and what K-means remembers of their rows: the side of the worker.

Every method takes and gives small things (centroids, sums, row numbers, a few rows), so a shard can
stand in this process, in another one or on another machine. `semid.quantization.rows` is the other
side, which talks to any number of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import UsageError
from semid.quantization.assign import assign
from semid.quantization.blocks import (
    BLOCK_ROWS,
    Blocks,
    OwnedBlocks,
    PreparedBlocks,
    Preprocess,
    ResidualBlocks,
    in_memory,
    read_ahead,
)
from semid.quantization.nearest import prepare
from semid.quantization.statistics import Statistics, statistics
from semid.quantization.threads import default_threads
from semid.quantization.tree import Node, TreeSum

__all__ = ["Shard"]

Array = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class Shard:
    """Rows of consecutive blocks. Row numbers and block numbers count from the first of all rows.

    Args:
        blocks: its rows, ``(rows, dim)``; `OwnedBlocks` are changed by `descend` for good.
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
        self.restart()

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.base)

    # The view: what earlier levels leave ------------------------------------------------------

    def prepare(self, preprocess: Preprocess) -> None:
        """See every row through ``preprocess`` from now on."""
        if not preprocess.identity:
            self.base = PreparedBlocks(self.base, preprocess)
        self.restart()

    def restart(self) -> None:
        """Forget all levels: the view is the rows themselves again."""
        self._labels: list[Rows] = []
        self._books: list[Array] = []
        self._look()

    def descend(self, codebook: Array, labels: Rows | None = None) -> None:
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
        if isinstance(self.base, OwnedBlocks):
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
        self.labels: Rows = np.empty(0, np.int64)
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

    def rows(self, numbers: Rows) -> Array:
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
        prepared = prepare(torch.from_numpy(centroids))
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

    def farthest(self, count: int) -> tuple[Rows, npt.NDArray[np.floating]]:
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

    def lower(self, fresh: Array) -> npt.NDArray[np.float64]:
        """Add centers ``(n, dim)``; return each block's weighted sum of squared distances."""
        if not len(self._closest):
            self._closest = np.full(len(self), np.inf, dtype=np.float32)
        masses = []
        prepared = prepare(torch.from_numpy(fresh))
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

    def pick(self, targets: Mapping[int, Sequence[float]]) -> dict[int, Rows]:
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

    def closest(self, numbers: Rows) -> Array:
        """Return the rows' squared distances to the nearest center so far, ``(n,)``."""
        return self._closest[numbers - self.first_row]


def _running_sum(mass: npt.NDArray[np.float64]) -> float:
    """Sum a block's masses, in the order in which `numpy.add.reduceat` sums a part."""
    return float(np.add.reduceat(mass, [0])[0])
