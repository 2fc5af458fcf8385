"""Unique ids from the model's own codewords: the next-nearest free codes of the last level.

Items that share all codes but the last compete for the last level's codewords. Each such group is
an assignment problem of its own, solved exactly: the sum of extra squared distances is the least
that any placement of these items has, given the prefixes and the published codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.assignment import assign_rows
from semid.catalogue.buckets import bucket_sizes, canonical_order, group_numbers, group_starts
from semid.data.embeddings import EmbeddingSource
from semid.data.ids import ItemIds
from semid.progress import Progress
from semid.tokenizers.base import Tokenizer

__all__ = ["Placed", "last_level_inputs", "reassign_codes"]

# Rows whose embeddings are held at once; a single larger group is read whole.
CHUNK_ROWS = 262_144

Codes = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Placed:
    """Where items went.

    Attributes:
        codes: ``(items, levels)`` int64 published codes.
        unplaced: ``(items,)`` bool, new items that found every place taken; they keep the model's
            code and share it.
        extra: ``(items,)`` float64, squared distance to the last codeword beyond the nearest one's,
            in the quantized space.
    """

    codes: npt.NDArray[np.int64]
    unplaced: npt.NDArray[np.bool_]
    extra: npt.NDArray[np.float64]


def last_level_inputs(
    tokenizer: Tokenizer, latent: npt.NDArray[np.float32], codes: Codes
) -> npt.NDArray[np.float32]:
    """Return what the last level quantizes ``(n, latent)``.

    For residual tokenizers what the levels before leave; for parallel ones the latent itself, of
    which every codebook picks its own nearest codeword.
    """
    if not tokenizer.hierarchical:
        return latent
    left = latent
    for level, book in enumerate(tokenizer.codebooks[:-1]):
        left = left - book[codes[:, level]]
    return left


def reassign_codes(
    tokenizer: Tokenizer,
    source: EmbeddingSource,
    rows: npt.NDArray[np.int64],
    encoded: Codes,
    norms: npt.NDArray[np.float32],
    items: ItemIds,
    *,
    capacity: int = 1,
    published: npt.NDArray[np.bool_] | None = None,
    codes: Codes | None = None,
    progress: Progress,
) -> Placed:
    """Give items that share an id the nearest free codes of the last level.

    Args:
        tokenizer: the model that encoded the items.
        source: embeddings.
        rows: ``(items,)`` row of each item in ``source``.
        encoded: ``(items, levels)`` codes of the model.
        norms: ``(items,)`` residual norms of those codes.
        items: item ids.
        capacity: items an id may have.
        published: ``(items,)`` rows that keep ``codes`` as they are; None has none.
        codes: ``(items, levels)`` published codes; others are ignored.
        progress: told about placed items.

    Returns:
        `Placed`. Exact within every group, and independent of the order of the rows.

    Cost: groups in which an id holds more than ``capacity`` items: their embeddings are read once,
    ``O(n codes latent)`` for the distances of n items, then `assign_rows`. Memory: 8 n codes bytes
    for the largest group.
    """
    settled = np.array(encoded, dtype=np.int64)
    fixed = np.zeros(len(settled), bool) if published is None else published
    if codes is not None:
        settled[fixed] = codes[fixed]
    extra = np.zeros(len(settled))
    unplaced = np.zeros(len(settled), bool)
    groups = group_numbers(settled[:, :-1])
    crowded = np.zeros(int(groups.max()) + 1 if len(groups) else 0, bool)
    crowded[groups[(bucket_sizes(group_numbers(settled)) > capacity) & ~fixed]] = True
    books = tokenizer.codebooks
    squares = np.einsum("kd,kd->k", books[-1], books[-1], dtype=np.float64)
    words = books[-1].astype(np.float64).T
    taken = _published_codes(settled, groups, fixed & crowded[groups])
    competing = np.flatnonzero(crowded[groups] & ~fixed)
    order = competing[canonical_order(groups[competing], norms[competing], items.take(competing))]
    progress.start("place", total=len(order))
    for chunk, bounds in _chunks(order, groups):
        latent = tokenizer.latent(source.rows(rows[chunk]))
        inputs = last_level_inputs(tokenizer, latent, settled[chunk]).astype(np.float64)
        for start, stop in pairwise(bounds):
            members = chunk[start:stop]
            own = settled[members, -1]
            # |r - c|^2 without |r|^2, which is the same for every candidate of a row.
            distance = squares - 2.0 * (inputs[start:stop] @ words)
            cost = np.maximum(distance - distance[np.arange(len(members)), own][:, None], 0.0)
            room = np.full(len(squares), capacity)
            np.subtract.at(room, taken.get(int(groups[members[0]]), _NOBODY), 1)
            found = assign_rows(cost, np.maximum(room, 0))
            placed = found >= 0
            settled[members[placed], -1] = found[placed]
            extra[members[placed]] = cost[placed, found[placed]]
            unplaced[members[~placed]] = True
        progress.step(len(chunk))
    return Placed(settled, unplaced, extra)


_NOBODY = np.zeros(0, np.int64)


def _published_codes(
    settled: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], rows: npt.NDArray[np.bool_]
) -> dict[int, npt.NDArray[np.int64]]:
    """Collect the last codes that published items hold in each crowded group."""
    order = np.flatnonzero(rows)
    order = order[np.argsort(groups[order], kind="stable")]
    starts = group_starts(groups[order])
    return {
        int(groups[order[start]]): settled[order[start:stop], -1]
        for start, stop in pairwise(starts)
    }


def _chunks(
    order: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Cut ordered rows into chunks of whole groups, with the bounds of the groups inside."""
    starts = group_starts(groups[order])
    first = 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + CHUNK_ROWS, side="right")) - 1
        last = max(last, first + 1)
        yield order[starts[first] : starts[last]], starts[first : last + 1] - starts[first]
        first = last
