"""The code tree as flat columns: every prefix with its size and metrics, its items a range.

Items are sorted by their codes, so the items of a prefix lie side by side and a node needs only
where they begin and how many they are. Parallel codebooks have a tree of depth one each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Tree", "build_tree"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tree:
    """Prefixes in order of depth, then of their parent, then the fullest first.

    Attributes:
        level: the level of the first codes: 0, or the codebook of a parallel tokenizer.
        order: ``(items,)`` row numbers sorted by codes; nodes count places in it.
        parent: ``(nodes,)`` node of the shorter prefix, -1 for the first level.
        depth: ``(nodes,)`` from 1.
        code: ``(nodes,)`` last code of the prefix.
        first: ``(nodes,)`` place of its first item in ``order``.
        items: ``(nodes,)`` items under it.
        metrics: name -> ``(nodes,)`` value.
        left_out: prefixes beyond the budget, which the tree does not hold.
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
        """Return ``(items,)`` the node of each row at a depth; -1 where the tree holds none."""
        found = np.full(len(self.order), -1, dtype=np.int64)
        for node in np.flatnonzero(self.depth == depth):
            start = self.first[node]
            found[self.order[start : start + self.items[node]]] = node
        return found


def build_tree(
    codes: npt.NDArray[Any],
    *,
    level: int = 0,
    depths: int | None = None,
    values: Mapping[str, npt.ArrayLike] | None = None,
    most_nodes: int = 40_000,
) -> Tree:
    """Build the tree of prefixes.

    Args:
        codes: ``(items, levels)`` integers.
        level: first level of the prefixes.
        depths: longest prefix; None goes to the last level.
        values: name -> ``(items,)`` values, averaged over the items of each prefix.
        most_nodes: budget; each depth keeps its fullest prefixes while it lasts. A prefix with a
            single item is never split, since its one continuation says nothing.

    Returns:
        The `Tree`. ``metrics`` also holds ``unique``: different ids an item.

    Cost: a sort of the items a depth.
    """
    chosen = codes[:, level:] if depths is None else codes[:, level : level + depths]
    whole = np.concatenate([chosen, codes], axis=1)  # parallel: equal codes ordered by the rest
    order = np.lexsort(whole.T[::-1]).astype(np.int64)
    new_id = np.ones(len(order), dtype=bool)
    new_id[1:] = (whole[order][1:] != whole[order][:-1]).any(axis=1)
    sums = {"unique": _cumulated(new_id)}
    for name, value in (values or {}).items():
        sums[name] = _cumulated(np.asarray(value, dtype=np.float64)[order])
    parts = _grow(chosen[order], most_nodes)
    first, items = parts["first"], parts["items"]
    metrics = {name: (total[first + items] - total[first]) / items for name, total in sums.items()}
    return Tree(
        level=level,
        order=order,
        parent=parts["parent"],
        depth=parts["depth"],
        code=parts["code"],
        first=first,
        items=items,
        metrics=metrics,
        left_out=int(parts["left_out"][0]),
    )


def _cumulated(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _grow(codes: npt.NDArray[Any], most_nodes: int) -> dict[str, Ints]:
    """Split level by level: a prefix ends where its code or its parent changes."""
    count = len(codes)
    node_of = np.zeros(count, dtype=np.int64)  # the node of each place; -1 once not split
    columns: dict[str, list[Ints]] = {
        name: [] for name in ("parent", "depth", "code", "first", "items")
    }
    made, left_out = 0, 0
    for depth in range(codes.shape[1]):
        column = codes[:, depth].astype(np.int64)
        new = np.ones(count, dtype=bool)
        new[1:] = (column[1:] != column[:-1]) | (node_of[1:] != node_of[:-1])
        first = np.flatnonzero(new)
        items = np.diff(np.append(first, count))
        alive = node_of[first] >= 0
        first, items = first[alive], items[alive]
        kept = _fullest(items, most_nodes - made)
        left_out += len(items) - len(kept)
        first, items = first[kept], items[kept]
        parent = node_of[first] if depth else np.full(len(first), -1, dtype=np.int64)
        by = np.lexsort((first, -items, parent))
        first, items, parent = first[by], items[by], parent[by]
        columns["parent"].append(parent)
        columns["depth"].append(np.full(len(first), depth + 1, dtype=np.int64))
        columns["code"].append(column[first])
        columns["first"].append(first)
        columns["items"].append(items)
        node_of = np.full(count, -1, dtype=np.int64)
        for node, (start, size) in enumerate(zip(first.tolist(), items.tolist(), strict=True)):
            if size > 1:
                node_of[start : start + size] = made + node
        made += len(first)
    result = {name: np.concatenate(parts) for name, parts in columns.items()}
    result["left_out"] = np.array([left_out])
    return result


def _fullest(items: Ints, budget: int) -> Ints:
    """Return the places of the ``budget`` largest, the earlier first among equals."""
    if len(items) <= budget:
        return np.arange(len(items))
    return np.sort(np.argsort(-items, kind="stable")[: max(budget, 0)])
