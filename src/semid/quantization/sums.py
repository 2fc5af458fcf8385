"""Sums over blocks, equal to the last bit however the blocks are distributed.

Floating-point addition is not associative, so a sum depends on where its brackets are. Here a
binary tree over the block numbers places them: node ``(height, index)`` is the sum of the blocks
from ``index * 2**height`` up to the next node of that height. Whoever holds consecutive blocks can
add up whole nodes alone and pass on the few that are left. Up to three blocks this is plain
addition in block order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from semid.errors import UsageError
from semid.quantization.threads import map_blocks


class Addable(Protocol):
    """What can be summed."""

    def add_(self, other: Self) -> None:
        """Add ``other``, which stands to the right, in place."""
        ...


T = TypeVar("T", bound=Addable)


@dataclass
class Node(Generic[T]):
    """A whole node of the tree.

    Attributes:
        height: it covers ``2**height`` blocks.
        index: the first of them is ``index * 2**height``.
        value: their sum.
    """

    height: int
    index: int
    value: T


class TreeSum(Generic[T]):
    """Adds blocks that come in order; holds O(log blocks) partial sums.

    Values handed over are changed in place.
    """

    def __init__(self) -> None:
        self.nodes: list[Node[T]] = []

    def add(self, block: int, value: T) -> None:
        """Add block number ``block``, the one after the last."""
        self.push(Node(0, block, value))

    def push(self, node: Node[T]) -> None:
        """Add a node that starts where the last one ended, then every parent that is whole."""
        while self.nodes:
            left = self.nodes[-1]
            if left.height != node.height or left.index % 2 or node.index != left.index + 1:
                break
            self.nodes.pop()
            left.value.add_(node.value)
            node = Node(left.height + 1, left.index // 2, left.value)
        self.nodes.append(node)

    def total(self) -> T:
        """Return the sum of all blocks, which were all added from block 0 on."""
        if not self.nodes:
            raise UsageError("no blocks were added; add at least one")
        # A parent whose right half lies past the last block is what there is of it: the smallest
        # nodes, which stand last, are added up first.
        value = self.nodes[-1].value
        for node in reversed(self.nodes[:-1]):
            node.value.add_(value)
            value = node.value
        return value


def merge_nodes(parts: Iterable[Sequence[Node[T]]]) -> list[Node[T]]:
    """Join the nodes of neighbors, left to right, and add up what became whole (in place)."""
    tree: TreeSum[T] = TreeSum()
    for nodes in parts:
        for node in nodes:
            tree.push(node)
    return tree.nodes


def cut_blocks(blocks: int, shards: int) -> list[tuple[int, int]]:
    """Cut ``blocks`` into ``shards`` ranges of nearly equal length that hold few whole nodes.

    Cuts stand at multiples of a power of two of at most a sixteenth of a share, so no share
    exceeds the mean by more than an eighth of it, or by one block where shares are smaller than 16
    blocks.

    Shapes: returns (first, past the last).
    """
    step = 1
    while step * 2 * shards * 16 <= blocks:
        step *= 2
    edges = [min(blocks, round(blocks * shard / shards / step) * step) for shard in range(shards)]
    edges.append(blocks)
    return [(edges[i], edges[i + 1]) for i in range(shards)]


@dataclass
class Statistics:
    """What a block (or several, added in block order) contributes to an update.

    Attributes:
        sums: ``(codes, dim)`` float64, weighted sum of the rows assigned to each codeword.
        counts: ``(codes,)`` float64, their total weight.
        inertia: weighted sum of squared distances.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]
    inertia: float

    @classmethod
    def zeros(cls, codes: int, dim: int) -> Statistics:
        """Return the neutral element of `add_`."""
        return cls(np.zeros((codes, dim)), np.zeros(codes), 0.0)

    def add_(self, other: Statistics) -> None:
        """Add another block's statistics in place; call in block order."""
        self.sums += other.sums
        self.counts += other.counts
        self.inertia += other.inertia


@numba.njit(nogil=True, cache=True)
def _group(labels: npt.NDArray[np.int64], codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Counting sort: row numbers by code, rows in order inside a code."""
    starts = np.zeros(codes + 1, dtype=np.int64)
    for label in labels:
        starts[label + 1] += 1
    for code in range(codes):
        starts[code + 1] += starts[code]
    cursor = starts[:-1].copy()
    order = np.empty(len(labels), dtype=np.int64)
    for row in range(len(labels)):
        order[cursor[labels[row]]] = row
        cursor[labels[row]] += 1
    return order, starts


@numba.njit(nogil=True, cache=True)
def _sum_codes(
    x: np.ndarray,
    weights: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
    first: int,
    last: int,
) -> None:
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
    block: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    distances: npt.NDArray[np.float32],
    *,
    codes: int,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int = 1,
) -> Statistics:
    """Sum a block's rows by label.

    Threads share out codewords, not rows, so every sum is taken in row order whatever their
    number.

    Returns the block's `Statistics`. Time O(n dim), memory O(codes dim).

    Shapes: ``block`` (n, dim), ``labels`` (n,), ``distances`` (n,), ``weights`` (n,).
    """
    result = Statistics.zeros(codes, block.shape[1])
    order, starts = _group(labels, codes)
    by_row = np.empty(0) if weights is None else weights
    if threads <= 1 or len(block) < 4096:
        _sum_codes(block, by_row, order, starts, result.sums, result.counts, 0, codes)
    else:
        cuts = np.searchsorted(starts, np.linspace(0, len(block), threads + 1)[1:-1])
        bounds = [0, *np.clip(cuts, 0, codes).tolist(), codes]
        map_blocks(
            lambda span: _sum_codes(
                block, by_row, order, starts, result.sums, result.counts, *span
            ),
            list(itertools.pairwise(bounds)),
            threads=threads,
        )
    squared = distances.astype(np.float64)
    result.inertia = float((squared if weights is None else squared * weights).sum())
    return result
