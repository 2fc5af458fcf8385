"""Which items lie under a prefix, and which codes may follow it: one sorted trie in flat arrays.

The trie is compressed sparse rows over all levels at once. Nodes are numbered level by level in the
order of their prefixes, the root is 0; every node but the root is the end of one edge, and edges
are sorted by (parent, code). Looking a code up is one binary search in ``parent * codes + code``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.codes import SemanticIds
from semid.errors import InputError, UsageError
from semid.health import check_codes

__all__ = ["PrefixIndex"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PrefixIndex:
    """Items by prefix. Made by `PrefixIndex.build`.

    Attributes:
        sizes: codes of each level, in the order the trie is walked.
        order: which level of the ids each depth of the trie takes.
        child_codes: ``(edges,)`` code of each edge; edge e ends in node e + 1.
        child_starts: ``(nodes + 1,)`` first edge of each node; leaves have none.
        keys: ``(edges,)`` rising ``parent * largest size + code``.
        depth_starts: ``(levels + 2,)`` first node of each depth, and the number of nodes.
        rows: ``(items,)`` item rows, sorted by their codes, rising inside a bucket.
        row_starts: ``(leaves + 1,)`` first place of each leaf in ``rows``.
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
            ids: `SemanticIds`, or integers ``(items, levels)``, in any row order; equal ids are
                one leaf with several items.
            sizes: codes of each level; by default what the ids say, or the largest code and one.
            order: the levels in the order in which they are generated, for parallel codes, whose
                order is free. By default first to last.

        Raises:
            InputError: if the codes are not ``(items, levels)`` integers within ``sizes``.
            UsageError: if ``order`` is not a permutation of the levels.

        Cost: a sort of the items; memory 24 bytes a node and 8 an item.
        """
        codes: npt.NDArray[Any]
        if isinstance(ids, SemanticIds):
            sizes = ids.info.codebook_sizes if sizes is None else sizes
            codes = ids.codes
        else:
            codes = check_codes(ids)
        levels = codes.shape[1]
        turn = tuple(range(levels)) if order is None else tuple(int(level) for level in order)
        if sorted(turn) != list(range(levels)):
            raise UsageError(
                f"order={list(turn)} is not a permutation of the {levels} levels 0 to {levels - 1}"
            )
        if sizes is None:
            sizes = [int(top) + 1 for top in codes.max(axis=0)]
        check_codes(codes, sizes)
        walked = codes[:, turn]
        rows = np.lexsort(walked.T[::-1]).astype(np.int64)
        return cls(
            sizes=tuple(int(sizes[level]) for level in turn),
            order=turn,
            rows=rows,
            **_nodes(walked[rows], max(int(size) for size in sizes)),
        )

    @property
    def levels(self) -> int:
        """Codes of an id."""
        return len(self.sizes)

    @property
    def nodes(self) -> int:
        """Prefixes in the trie, the empty one included."""
        return len(self.child_starts) - 1

    @property
    def unique_ids(self) -> int:
        """Distinct ids."""
        return len(self.row_starts) - 1

    def __len__(self) -> int:
        """Count the items."""
        return len(self.rows)

    def find(self, prefixes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Walk the trie.

        Args:
            prefixes: ``(depth,)`` codes of one prefix or ``(batch, depth)`` of many, in the order
                of the trie; any integers.

        Returns:
            The node, or ``(batch,)`` int64 nodes; -1 for a prefix that no item has.

        Raises:
            UsageError: if prefixes are longer than an id or not integers.

        Cost: ``O(depth log edges)`` a prefix.
        """
        wanted, single = self._prefixes(prefixes)
        node = np.zeros(len(wanted), np.int64)
        for depth in range(wanted.shape[1]):
            node = self.step(node, wanted[:, depth])
        return node[0] if single else node

    def step(self, nodes: npt.ArrayLike, codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Go from nodes along codes, both ``(batch,)``: the next nodes, -1 where there is none."""
        at, code = np.asarray(nodes, np.int64), np.asarray(codes, np.int64)
        width = max(self.sizes)
        key = at * width + code
        edge = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        known = (at >= 0) & (code >= 0) & (code < width) & (self.keys[edge] == key)
        return np.where(known, edge + 1, -1)

    def next_codes(self, prefix: npt.ArrayLike = ()) -> npt.NDArray[np.int64]:
        """Return the codes that may follow one prefix, rising; none for an unknown or whole id."""
        node = int(self.find(np.asarray(prefix, dtype=np.int64).reshape(-1)))
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
        wanted, _ = self._prefixes(prefixes)
        if wanted.shape[1] >= self.levels:
            raise UsageError(f"prefixes of {wanted.shape[1]} codes are whole ids; nothing follows")
        nodes = self.find(wanted)
        mask = np.zeros((len(wanted), self.sizes[wanted.shape[1]]), dtype=bool)
        starts = self.child_starts[nodes]
        counts = np.where(nodes >= 0, self.child_starts[nodes + 1] - starts, 0)
        row = np.repeat(np.arange(len(wanted)), counts)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        mask[row, self.child_codes[np.repeat(starts, counts) + offset]] = True
        return mask

    def items(self, prefix: npt.ArrayLike = ()) -> npt.NDArray[np.int64]:
        """Return the rows of the items under one prefix, rising. Cost: a sort of the answer."""
        start, stop = self._span(int(self.find(np.asarray(prefix, dtype=np.int64).reshape(-1))))
        return np.sort(self.rows[start:stop])

    def count(self, prefix: npt.ArrayLike = ()) -> int:
        """Count the items under one prefix; ``O(levels)`` after `find`."""
        start, stop = self._span(int(self.find(np.asarray(prefix, dtype=np.int64).reshape(-1))))
        return stop - start

    def contains(self, codes: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return for each whole id ``(batch, levels)`` whether an item has it."""
        wanted, _ = self._prefixes(codes)
        if wanted.shape[1] != self.levels:
            raise UsageError(f"ids have {self.levels} codes, these rows {wanted.shape[1]}")
        return self.find(wanted) >= 0

    def _span(self, node: int) -> tuple[int, int]:
        """First and last place in `rows` of the items under a node."""
        if node < 0:
            return 0, 0
        first, last = node, node
        while first < self.depth_starts[self.levels]:  # down the leftmost and rightmost branch
            first, last = self.child_starts[first] + 1, self.child_starts[last + 1]
        leaf = self.depth_starts[self.levels]
        return int(self.row_starts[first - leaf]), int(self.row_starts[last - leaf + 1])

    def _prefixes(self, given: npt.ArrayLike) -> tuple[Ints, bool]:
        array: npt.NDArray[Any] = np.asarray(given)
        if array.size == 0:
            array = array.astype(np.int64)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise UsageError(
                f"prefixes have shape {array.shape} and type {array.dtype}; give integers (depth,) "
                "or (batch, depth)"
            )
        if array.shape[-1] > self.levels:
            raise UsageError(f"prefix has {array.shape[-1]} codes, ids have {self.levels} levels")
        wide = array.astype(np.int64)
        return (wide[None], True) if wide.ndim == 1 else (wide, False)


def _nodes(walked: npt.NDArray[Any], width: int) -> dict[str, Ints]:
    """Build the arrays from codes ``(items, levels)`` in sorted order."""
    items, levels = walked.shape
    if items == 0:
        raise InputError("there are no items to index; give at least one")
    opens = np.zeros(items, dtype=bool)  # rows at which a new prefix begins
    opens[0] = True
    parent = np.zeros(items, np.int64)
    codes, parents, depth_starts = [], [], [0, 1]
    for level in range(levels):
        opens = opens.copy()
        opens[1:] |= walked[1:, level] != walked[:-1, level]
        first = np.flatnonzero(opens)
        codes.append(walked[first, level].astype(np.int64))
        parents.append(parent[first])
        parent = np.cumsum(opens) - 1 + depth_starts[-1]
        depth_starts.append(depth_starts[-1] + len(first))
    above, below = np.concatenate(parents), np.concatenate(codes)
    return {
        "child_codes": below,
        "child_starts": np.searchsorted(above, np.arange(depth_starts[-1] + 1)).astype(np.int64),
        "keys": above * width + below,
        "depth_starts": np.array(depth_starts, np.int64),
        "row_starts": np.append(np.flatnonzero(opens), items).astype(np.int64),
    }
