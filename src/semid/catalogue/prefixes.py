"""A trie of ids in flat arrays: which items share a prefix, and which codes may follow it.

The trie is stored as compressed sparse rows over all levels. Nodes are numbered level by level in
the order of their prefixes, from the root 0. Each other node is the end of one edge, and edges are
sorted by (parent, code), so a code is found by one binary search in ``parent * width + code``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from semid.codes import SemanticIds
from semid.errors import InputError, UsageError
from semid.health import check_codes

Ints = npt.NDArray[np.int64]

BUCKET_ORDERS = ("popularity", "embedding", "random")
"""Orders of the items that share an id."""


class PrefixChildren(NamedTuple):
    """What follows a prefix.

    Attributes:
        codes: ``(children,)`` codes, ascending.
        starts: ``(children,)`` first position of each child's items in `PrefixIndex.rows`.
        items: ``(children,)`` number of items of each child.
    """

    codes: Ints
    starts: Ints
    items: Ints


@dataclass(frozen=True, eq=False, repr=False)
class PrefixIndex:
    """Items by prefix; create it with `PrefixIndex.build`.

    Attributes:
        sizes: number of codes per level, in the order of the trie.
        order: level of the ids at each depth of the trie.
        child_codes: ``(edges,)`` code of each edge; edge e ends in node e + 1.
        child_starts: ``(nodes + 1,)`` first edge of each node; leaves have none.
        keys: ``(edges,)`` ascending ``parent * width + code``, where width is the largest size.
        depth_starts: ``(levels + 2,)`` first node of each depth, and the number of nodes.
        rows: ``(items,)`` item rows, sorted by their codes, ascending inside a bucket.
        row_starts: ``(leaves + 1,)`` first position of each leaf in ``rows``.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    child_codes: Ints
    child_starts: Ints
    keys: Ints
    depth_starts: Ints
    rows: Ints
    row_starts: Ints

    @classmethod
    def build(
        cls,
        ids: SemanticIds | npt.ArrayLike,
        *,
        sizes: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> PrefixIndex:
        """Sort a catalogue's codes into a trie.

        Args:
            ids: `SemanticIds`, or integers ``(items, levels)``, in any row order; equal ids share
                a leaf.
            sizes: codes per level; by default those of the ids, or the largest code plus 1.
            order: levels in the order in which they are generated, for parallel codes, whose order
                is free. By default first to last.

        Raises:
            InputError: if the codes are not ``(items, levels)`` integers within ``sizes``.
            UsageError: if ``order`` is not a permutation of the levels.

        Cost: a sort of the items; memory 24 bytes per node and 8 per item.
        """
        codes: npt.NDArray[Any]
        if isinstance(ids, SemanticIds):
            sizes = ids.info.codebook_sizes if sizes is None else sizes
            codes = ids.codes
        else:
            codes = check_codes(ids)
        levels = codes.shape[1]
        depths = tuple(range(levels)) if order is None else tuple(int(level) for level in order)
        if sorted(depths) != list(range(levels)):
            raise UsageError(
                f"order={list(depths)} is not a permutation of the {levels} levels 0 to "
                f"{levels - 1}"
            )
        if sizes is None:
            sizes = [int(largest) + 1 for largest in codes.max(axis=0)]
        check_codes(codes, sizes)
        ordered = codes[:, depths]
        rows = np.lexsort(ordered.T[::-1]).astype(np.int64)
        return cls(
            sizes=tuple(int(sizes[level]) for level in depths),
            order=depths,
            rows=rows,
            **_build_nodes(ordered[rows], max(int(size) for size in sizes)),
        )

    @property
    def levels(self) -> int:
        """Codes per id."""
        return len(self.sizes)

    @property
    def nodes(self) -> int:
        """Number of prefixes in the trie, including the empty one."""
        return len(self.child_starts) - 1

    @property
    def unique_ids(self) -> int:
        """Number of distinct ids."""
        return len(self.row_starts) - 1

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.rows)

    def __repr__(self) -> str:
        sizes = " x ".join(f"{size:,}" for size in self.sizes)
        return f"PrefixIndex({len(self):,} items, {self.unique_ids:,} ids, {sizes} codes)"

    def find(self, prefixes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Find the nodes of prefixes.

        Args:
            prefixes: codes ``(depth,)`` of one prefix or ``(batch, depth)`` of many, in the order
                of the trie; any integers.

        Returns:
            The node, or ``(batch,)`` int64 nodes; -1 for a prefix that no item has.

        Raises:
            UsageError: if prefixes are longer than an id or not integers.

        Cost: ``O(depth log edges)`` per prefix.
        """
        batch, single = self._checked(prefixes)
        nodes = np.zeros(len(batch), np.int64)
        for depth in range(batch.shape[1]):
            nodes = self.step(nodes, batch[:, depth])
        return nodes[0] if single else nodes

    def step(self, nodes: npt.ArrayLike, codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the children of nodes along codes, all ``(batch,)``; -1 where there is none."""
        parent, code = np.asarray(nodes, np.int64), np.asarray(codes, np.int64)
        width = max(self.sizes)
        key = parent * width + code
        edge = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        # A code outside the level would give the key of another parent.
        exists = (parent >= 0) & (code >= 0) & (code < width) & (self.keys[edge] == key)
        return np.where(exists, edge + 1, -1)

    def next_codes(self, prefix: npt.ArrayLike = ()) -> npt.NDArray[np.int64]:
        """Return the codes that may follow a prefix, ascending; none if unknown or a whole id."""
        node = self._node(prefix)
        if node < 0:
            return np.zeros(0, np.int64)
        return self.child_codes[self.child_starts[node] : self.child_starts[node + 1]]

    def allowed(self, prefixes: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which codes may follow each of many prefixes of one length.

        Args:
            prefixes: ``(batch, depth)`` codes, depth below the number of levels.

        Returns:
            ``(batch, codes)`` bool over the codes of the next level.
        """
        batch, _ = self._checked(prefixes)
        if batch.shape[1] >= self.levels:
            raise UsageError(f"prefixes of {batch.shape[1]} codes are whole ids; nothing follows")
        nodes = self.find(batch)
        # The children of all nodes, listed one node after another: `row` says whose each is.
        mask = np.zeros((len(batch), self.sizes[batch.shape[1]]), dtype=bool)
        starts = self.child_starts[nodes]
        counts = np.where(nodes >= 0, self.child_starts[nodes + 1] - starts, 0)
        row = np.repeat(np.arange(len(batch)), counts)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        mask[row, self.child_codes[np.repeat(starts, counts) + offset]] = True
        return mask

    def items(self, prefix: npt.ArrayLike = ()) -> npt.NDArray[np.int64]:
        """Return the rows of the items with a prefix, ascending."""
        start, stop = self.row_range(prefix)
        return np.sort(self.rows[start:stop])

    def count(self, prefix: npt.ArrayLike = ()) -> int:
        """Return the number of items with a prefix; ``O(levels)`` after `find`."""
        start, stop = self.row_range(prefix)
        return stop - start

    def row_range(self, prefix: npt.ArrayLike = ()) -> tuple[int, int]:
        """Return where in `rows` the items with a prefix lie: first, and one past the last."""
        node = self._node(prefix)
        if node < 0:
            return 0, 0
        start, stop = self._row_ranges(np.array([node]), np.size(prefix))
        return int(start[0]), int(stop[0])

    def children(self, prefix: npt.ArrayLike = ()) -> PrefixChildren:
        """Return the codes that may follow a prefix, ascending, each with its items."""
        codes, node = self.next_codes(prefix), self._node(prefix)
        nodes = 1 + np.arange(self.child_starts[node], self.child_starts[node] + len(codes))
        starts, stops = self._row_ranges(nodes, np.size(prefix) + 1)
        return PrefixChildren(codes, starts, stops - starts)

    def contains(self, codes: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return for each whole id ``(batch, levels)`` whether an item has it."""
        return self.leaves(codes) >= 0

    def leaves(self, codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the number in `row_starts` of each whole id ``(batch, levels)``; -1 if unknown.

        Raises:
            UsageError: if the rows have not one code per level.
        """
        batch, _ = self._checked(codes)
        if batch.shape[1] != self.levels:
            raise UsageError(f"ids have {self.levels} codes, these rows {batch.shape[1]}")
        nodes = self.find(batch)
        return np.where(nodes < 0, -1, nodes - self.depth_starts[self.levels])

    def _node(self, prefix: npt.ArrayLike) -> int:
        return int(self.find(np.asarray(prefix, dtype=np.int64).reshape(-1)))

    def _row_ranges(self, nodes: Ints, depth: int) -> tuple[Ints, Ints]:
        """Return the ranges in `rows` of the items below nodes ``(n,)`` of one depth."""
        # Rows are sorted by codes: the items lie between the leftmost and the rightmost leaf.
        first = last = nodes
        for _ in range(depth, self.levels):
            first, last = self.child_starts[first] + 1, self.child_starts[last + 1]
        leaf = self.depth_starts[self.levels]
        return self.row_starts[first - leaf], self.row_starts[last - leaf + 1]

    def _checked(self, prefixes: npt.ArrayLike) -> tuple[Ints, bool]:
        """Return prefixes as ``(batch, depth)``, and whether it was a single one."""
        array: npt.NDArray[Any] = np.asarray(prefixes)
        if array.size == 0:
            array = array.astype(np.int64)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise UsageError(
                f"prefixes have shape {array.shape} and type {array.dtype}; give integers (depth,) "
                "or (batch, depth)"
            )
        if array.shape[-1] > self.levels:
            raise UsageError(f"prefix has {array.shape[-1]} codes, ids have {self.levels} levels")
        return np.atleast_2d(array.astype(np.int64)), array.ndim == 1


def _build_nodes(codes: npt.NDArray[Any], width: int) -> dict[str, Ints]:
    """Build the arrays of the trie from sorted codes ``(items, levels)``."""
    items, levels = codes.shape
    if items == 0:
        raise InputError("there are no items to index; give at least one")
    starts_prefix = np.zeros(items, dtype=bool)
    starts_prefix[0] = True
    parent = np.zeros(items, np.int64)  # node of each row's prefix at the depth above
    edge_codes, edge_parents, depth_starts = [], [], [0, 1]
    for level in range(levels):
        # Rows are sorted, so a new node begins where the prefix differs from that of the row above:
        # where it differed a level higher, or where this code differs.
        starts_prefix = starts_prefix.copy()
        starts_prefix[1:] |= codes[1:, level] != codes[:-1, level]
        first = np.flatnonzero(starts_prefix)
        edge_codes.append(codes[first, level].astype(np.int64))
        edge_parents.append(parent[first])
        parent = np.cumsum(starts_prefix) - 1 + depth_starts[-1]
        depth_starts.append(depth_starts[-1] + len(first))
    parents, children = np.concatenate(edge_parents), np.concatenate(edge_codes)
    return {
        "child_codes": children,
        "child_starts": np.searchsorted(parents, np.arange(depth_starts[-1] + 1)).astype(np.int64),
        "keys": parents * width + children,
        "depth_starts": np.array(depth_starts, np.int64),
        "row_starts": np.append(np.flatnonzero(starts_prefix), items).astype(np.int64),
    }
