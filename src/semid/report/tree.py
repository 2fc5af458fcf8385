"""The code tree as flat columns: every prefix with its size, its metrics and its range of items.

Items are sorted by their codes, so the items of a prefix are contiguous and a node stores only
the position of the first one and their number. Parallel codebooks have one tree of depth one each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tree:
    """Prefixes in order of depth, then of their parent, then the fullest first.

    Attributes:
        level: level of the first codes: 0, or the codebook of a parallel tokenizer.
        order: ``(items,)`` row numbers sorted by codes.
        parent: ``(nodes,)`` node of the shorter prefix, -1 for the first level.
        depth: ``(nodes,)`` from 1.
        code: ``(nodes,)`` last code of the prefix.
        first: ``(nodes,)`` position of its first item in ``order``.
        items: ``(nodes,)`` number of its items.
        metrics: name -> ``(nodes,)`` value.
        left_out: number of prefixes beyond the budget, which are not in the tree.
    """

    level: int
    order: Ints
    parent: Ints
    depth: Ints
    code: Ints
    first: Ints
    items: Ints
    metrics: dict[str, npt.NDArray[np.float64]]
    left_out: int

    def groups(self, depth: int) -> Ints:
        """Return ``(items,)`` the node of each row at a depth; -1 where there is none."""
        nodes = np.full(len(self.order), -1, dtype=np.int64)
        for node in np.flatnonzero(self.depth == depth):
            start = self.first[node]
            nodes[self.order[start : start + self.items[node]]] = node
        return nodes


def build_tree(
    codes: npt.NDArray[Any],
    *,
    level: int = 0,
    depths: int | None = None,
    values: Mapping[str, npt.ArrayLike] | None = None,
    most_nodes: int = 40_000,
) -> Tree:
    """Build the tree of prefixes.

    Returns the `Tree`. ``metrics`` also holds ``unique``: different ids per item.

    Cost: a sort of the items per depth.

    Shapes: ``codes`` (items, levels), ``values`` (items,).
    """
    prefix_codes = codes[:, level:] if depths is None else codes[:, level : level + depths]
    # Sort by the codes of the prefixes and then by the whole id. The tree of a parallel codebook
    # sees one code, but items of one whole id must be contiguous to be counted once.
    sort_keys = np.concatenate([prefix_codes, codes], axis=1)
    order = np.lexsort(sort_keys.T[::-1]).astype(np.int64)
    is_new_id = np.ones(len(order), dtype=bool)
    is_new_id[1:] = (sort_keys[order][1:] != sort_keys[order][:-1]).any(axis=1)
    # The items of a node are a range of this order, so its sum of anything is the difference of
    # two cumulative sums.
    sums = {"unique": _cumulative(is_new_id)}
    for name, value in (values or {}).items():
        sums[name] = _cumulative(np.asarray(value, dtype=np.float64)[order])
    columns, left_out = _grow(prefix_codes[order], most_nodes)
    first, items = columns["first"], columns["items"]
    metrics = {name: (total[first + items] - total[first]) / items for name, total in sums.items()}
    return Tree(level=level, order=order, metrics=metrics, left_out=left_out, **columns)


def _cumulative(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _grow(codes: npt.NDArray[Any], most_nodes: int) -> tuple[dict[str, Ints], int]:
    """Split sorted codes depth by depth; return the columns of the nodes and how many are missing.

    Shapes: ``codes`` (items, depths).
    """
    count = len(codes)
    # Node of each position at the depth before; -1 where it must not be split further.
    node_of = np.zeros(count, dtype=np.int64)
    columns: dict[str, list[Ints]] = {
        name: [] for name in ("parent", "depth", "code", "first", "items")
    }
    nodes, left_out = 0, 0
    for depth in range(codes.shape[1]):
        # Codes are sorted, so a prefix is a run: it begins where its last code or its parent
        # changes, and it ends where the next one begins.
        column = codes[:, depth].astype(np.int64)
        begins = np.ones(count, dtype=bool)
        begins[1:] = (column[1:] != column[:-1]) | (node_of[1:] != node_of[:-1])
        first = np.flatnonzero(begins)
        items = np.diff(np.append(first, count))
        # Runs below a node that is missing or has a single item are no nodes.
        has_parent = node_of[first] >= 0
        first, items = first[has_parent], items[has_parent]
        within_budget = _fullest(items, most_nodes - nodes)
        left_out += len(items) - len(within_budget)
        first, items = first[within_budget], items[within_budget]
        parent = node_of[first] if depth else np.full(len(first), -1, dtype=np.int64)
        # Children of one parent are contiguous, the fullest first: the order the page draws.
        order = np.lexsort((first, -items, parent))
        first, items, parent = first[order], items[order], parent[order]
        columns["parent"].append(parent)
        columns["depth"].append(np.full(len(first), depth + 1, dtype=np.int64))
        columns["code"].append(column[first])
        columns["first"].append(first)
        columns["items"].append(items)
        # Only nodes with several items are split at the next depth.
        node_of = np.full(count, -1, dtype=np.int64)
        for node, (start, size) in enumerate(zip(first.tolist(), items.tolist(), strict=True)):
            if size > 1:
                node_of[start : start + size] = nodes + node
        nodes += len(first)
    return {name: np.concatenate(parts) for name, parts in columns.items()}, left_out


def _fullest(items: Ints, budget: int) -> Ints:
    """Return the positions of the ``budget`` largest, the earlier first among equals."""
    if len(items) <= budget:
        return np.arange(len(items))
    return np.sort(np.argsort(-items, kind="stable")[: max(budget, 0)])
