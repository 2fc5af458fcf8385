"""Pairs of related items within a pool: the ground truth of retrieval and matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.errors import InputError
from semid.results import Result

__all__ = ["ItemPairs", "PairCounts", "item_pairs", "pairs_by_id"]

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairCounts(Result):
    """How many pairs a result is about.

    Attributes:
        pool: items in the pool.
        pairs: number of pairs.
        queries: number of different query items.
        clusters: users, or query items where there are no users; intervals are taken over these.
        by_user: whether ``clusters`` are users.
        unknown: pairs left out because an item is not in the pool.
        same: pairs left out because both items are the same.
    """

    pool: int
    pairs: int
    queries: int
    clusters: int
    by_user: bool
    unknown: int
    same: int


@dataclass(frozen=True)
class ItemPairs:
    """Pairs (a, b): from item a, item b should be found.

    Attributes:
        queries: row of a in the pool, int64 ``(pairs,)``.
        targets: row of b in the pool, int64 ``(pairs,)``; never equal to a's.
        users: who made the pair, int64 ``(pairs,)``; where there are no users, the row of a.
            Intervals are taken over these.
        pool: items in the pool.
        unknown: pairs left out because an item is not in the pool.
        same: pairs left out because a = b: the query is no candidate of its own.
        by_user: whether ``users`` are users.
    """

    queries: Rows = field(repr=False, compare=False)
    targets: Rows = field(repr=False, compare=False)
    users: Rows = field(repr=False, compare=False)
    pool: int
    unknown: int
    same: int
    by_user: bool

    def __len__(self) -> int:
        return len(self.queries)

    def counts(self) -> PairCounts:
        """Return the counts, for the record of a result."""
        return PairCounts(
            pool=self.pool,
            pairs=len(self),
            queries=len(np.unique(self.queries)),
            clusters=len(np.unique(self.users)),
            by_user=self.by_user,
            unknown=self.unknown,
            same=self.same,
        )


def item_pairs(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    pool: int,
    users: npt.ArrayLike | None = None,
) -> ItemPairs:
    """Make pairs from rows of the pool, such as consecutive items of held-out users.

    Args:
        first: row of each query item, ``(pairs,)``; -1 where it is not in the pool.
        second: row of each target item, the same.
        pool: items in the pool; rows are 0 to ``pool - 1``.
        users: integer user of each pair; None takes intervals over query items instead.

    Returns:
        An `ItemPairs` that counts what was left out.

    Raises:
        InputError: lengths differ, rows out of range, or no pair is left.
    """
    a, b = np.asarray(first), np.asarray(second)
    owners = a if users is None else np.asarray(users)
    for name, array in (("first", a), ("second", b), ("users", owners)):
        if array.shape != (len(a),) or not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"{name} has shape {array.shape} and dtype {array.dtype}; one integer a pair is "
                "needed in each of first, second and users"
            )
    if len(a) and (min(a.min(), b.min()) < -1 or max(a.max(), b.max()) >= pool):
        raise InputError(
            f"rows run from {min(a.min(), b.min())} to {max(a.max(), b.max())}; allowed are 0 to "
            f"{pool - 1}, and -1 for items outside the pool"
        )
    known = (a >= 0) & (b >= 0)
    keep = known & (a != b)
    if not keep.any():
        raise InputError(
            f"no pair is left of {len(a)}: {int((~known).sum())} have an item outside the pool of "
            f"{pool}, {int((known & (a == b)).sum())} pair an item with itself; check that the "
            "interactions and the items share their ids"
        )
    return ItemPairs(
        queries=a[keep].astype(np.int64),
        targets=b[keep].astype(np.int64),
        users=owners[keep].astype(np.int64),
        pool=pool,
        unknown=int((~known).sum()),
        same=int((known & (a == b)).sum()),
        by_user=users is not None,
    )


def pairs_by_id(
    pool_ids: Sequence[Any] | npt.NDArray[Any],
    first: Sequence[Any] | npt.NDArray[Any],
    second: Sequence[Any] | npt.NDArray[Any],
    *,
    users: npt.ArrayLike | None = None,
) -> ItemPairs:
    """Make pairs from item ids, such as an external table of related items.

    Args:
        pool_ids: id of every pool row, ``(pool,)``, unique.
        first: id of each query item, ``(pairs,)``.
        second: id of each target item, ``(pairs,)``.
        users: see `item_pairs`.

    Returns:
        An `ItemPairs`; direction is kept as given, ids outside the pool are counted.

    Raises:
        InputError: pool ids that repeat; see `item_pairs` for the rest.
    """
    rows = {item: row for row, item in enumerate(np.asarray(pool_ids).tolist())}
    if len(rows) != len(pool_ids):
        raise InputError(f"pool_ids holds {len(pool_ids) - len(rows)} repeated ids; give each once")
    a = np.array([rows.get(item, -1) for item in np.asarray(first).tolist()], np.int64)
    b = np.array([rows.get(item, -1) for item in np.asarray(second).tolist()], np.int64)
    return item_pairs(a, b, pool=len(rows), users=users)
