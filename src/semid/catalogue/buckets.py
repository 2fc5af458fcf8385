"""Buckets of equal codes, counted and ordered so that nothing depends on the order of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from semid.data.ids import ItemIds
from semid.health import bucket_keys

__all__ = ["bucket_sizes", "canonical_order", "group_numbers", "group_starts"]


def group_numbers(codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Number each row's bucket: ``(items,)`` int64 from 0, in the order of the codes.

    With no column at all, every row is in bucket 0. Cost: a sort of the items.
    """
    if len(codes) == 0 or codes.shape[1] == 0:
        return np.zeros(len(codes), np.int64)
    numbers: npt.NDArray[np.int64] = np.unique(bucket_keys(codes), return_inverse=True)[1]
    return numbers.astype(np.int64)


def bucket_sizes(groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each row how many rows share its bucket: ``(items,)`` int64."""
    if len(groups) == 0:
        return np.zeros(0, np.int64)
    return np.bincount(groups)[groups]


def group_starts(ordered: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where each run of equal numbers starts, and the end: ``(groups + 1,)`` int64."""
    edges = np.flatnonzero(np.diff(ordered)) + 1
    return np.concatenate([[0], edges, [len(ordered)]]) if len(ordered) else np.zeros(1, np.int64)


def canonical_order(
    groups: npt.NDArray[np.int64], norms: npt.NDArray[np.float32], items: ItemIds
) -> npt.NDArray[np.int64]:
    """Order rows by bucket, then residual norm (closest to the centroid first), then item id.

    Ids are compared as strings, so the order is the same whatever type or row order they come in.
    Norms that are not known (NaN) come last in their bucket.

    Returns:
        ``(items,)`` int64 row numbers. Cost: a sort of the items, and one of their ids where norms
        tie inside a bucket.
    """
    order = np.lexsort((norms, groups))
    known = np.nan_to_num(norms[order], nan=np.inf)
    tied = (groups[order][1:] == groups[order][:-1]) & (known[1:] == known[:-1])
    if not tied.any():
        return order
    involved = np.zeros(len(order), dtype=bool)
    involved[1:] |= tied
    involved[:-1] |= tied
    rows = order[involved]
    names = items.take(rows).strings()
    rank = np.empty(len(rows), np.int64)
    rank[pc.sort_indices(names).to_numpy()] = np.arange(len(rows))
    again = np.lexsort((rank, known[involved], groups[rows]))
    # The tied rows fill the same places, each run of them in the order of their ids.
    order[involved] = rows[again]
    return order
