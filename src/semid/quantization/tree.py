"""Sums over blocks in the order of one fixed binary tree, whoever takes them.

Floating-point addition is not associative, so a sum depends on where its brackets stand. Here they
stand where a binary tree over the block numbers puts them: node ``(height, index)`` is the sum of
the blocks ``index * 2**height`` up to the next node of that height. Somebody who holds blocks in a
row can add up whole nodes by himself and hand on the few that are left, and the total comes out the
same to the last bit however the blocks were shared out. Up to three blocks this is plain addition
in block order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from semid.errors import UsageError

__all__ = ["Node", "TreeSum", "cut_blocks", "merge_nodes"]


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
        """Return the sum of all blocks, which were all added from block 0 on.

        Raises:
            UsageError: nothing was added.
        """
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

    Args:
        blocks: number of blocks, at least 0.
        shards: ranges wanted, at least 1.

    Returns:
        ``(first, past the last)`` of each range, in order; ranges are empty where there are fewer
        blocks than shards.
    """
    step = 1
    while step * 2 * shards * 16 <= blocks:
        step *= 2
    edges = [min(blocks, round(blocks * shard / shards / step) * step) for shard in range(shards)]
    edges.append(blocks)
    return [(edges[i], edges[i + 1]) for i in range(shards)]
