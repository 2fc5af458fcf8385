"""How items with equal codes get different ids: an appended token, or free codes of the last level.

Both methods work bucket by bucket in an order that does not depend on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from semid.catalogue.assignment import assign_rows
from semid.codes import SemanticIds
from semid.data.blocks import squared_norms
from semid.data.ids import ItemIds
from semid.data.source import EmbeddingSource
from semid.health import bucket_keys
from semid.progress import Progress
from semid.tokenizers.base import Tokenizer

# Lets buckets grow without a new vocabulary; the usual size of a codebook.
MIN_TOKENS = 256
# Rows whose embeddings are in memory at once; a larger group is read whole.
CHUNK_ROWS = 262_144

Codes = npt.NDArray[np.integer[Any]]
Rows = npt.NDArray[np.int64]


def group_numbers(codes: Codes) -> Rows:
    """Number the bucket of each row: ``(items,)`` int64 from 0, in the order of the codes.

    Without columns, all rows are in bucket 0. Cost: a sort of the items.
    """
    if len(codes) == 0 or codes.shape[1] == 0:
        return np.zeros(len(codes), np.int64)
    return np.unique(bucket_keys(codes), return_inverse=True)[1].astype(np.int64)


def bucket_sizes(groups: Rows) -> Rows:
    """Return the size of each row's bucket: ``(items,)`` int64."""
    return np.bincount(groups)[groups] if len(groups) else np.zeros(0, np.int64)


def group_starts(ordered: Rows) -> Rows:
    """Return where each run of equal numbers starts, then the length: ``(groups + 1,)`` int64."""
    edges = np.flatnonzero(np.diff(ordered)) + 1
    return np.concatenate([[0], edges, [len(ordered)]]) if len(ordered) else np.zeros(1, np.int64)


def canonical_order(groups: Rows, norms: npt.NDArray[np.float32], items: ItemIds) -> Rows:
    """Order rows by bucket, then residual norm, then item id: ``(items,)`` int64 row numbers.

    Ids are compared as strings, so that their type and the row order do not matter. Unknown norms
    (NaN) come last in their bucket.
    """
    order = np.lexsort((norms, groups))
    known = np.nan_to_num(norms[order], nan=np.inf)
    tied = (groups[order][1:] == groups[order][:-1]) & (known[1:] == known[:-1])
    if not tied.any():
        return order
    # Strings are sorted only for rows that tie. These rows fill the same places as before, each
    # run of them in the order of its ids.
    in_tie = np.zeros(len(order), dtype=bool)
    in_tie[1:] |= tied
    in_tie[:-1] |= tied
    rows = order[in_tie]
    rank = np.empty(len(rows), np.int64)
    rank[pc.sort_indices(items.take(rows).strings()).to_numpy()] = np.arange(len(rows))
    order[in_tie] = rows[np.lexsort((rank, known[in_tie], groups[rows]))]
    return order


def append_tokens(
    codes: Codes,
    norms: npt.NDArray[np.float32],
    items: ItemIds,
    *,
    published: npt.NDArray[np.bool_] | None = None,
    tokens: Codes | None = None,
) -> Rows:
    """Number the items of each bucket in canonical order: ``(items,)`` int64 (TIGER, section 3.1).

    ``published`` are the rows ``(items,)`` whose ``tokens`` are fixed. New rows continue after the
    highest published token of their bucket, so the token of a removed item is not used again while
    a later one exists.
    """
    groups = group_numbers(codes)
    result = np.zeros(len(codes), np.int64)
    # base: first free token of each bucket.
    base = np.zeros(int(groups.max()) + 1 if len(groups) else 0, np.int64)
    new = np.arange(len(codes))
    if published is not None and tokens is not None:
        result[published] = tokens[published]
        np.maximum.at(base, groups[published], result[published] + 1)
        new = np.flatnonzero(~published)
    order = new[canonical_order(groups[new], norms[new], items.take(new))]
    # The position of a row in its bucket is its place in the order minus that of the first row.
    starts = group_starts(groups[order])
    position = np.arange(len(order)) - np.repeat(starts[:-1], np.diff(starts))
    result[order] = base[groups[order]] + position
    return result


def token_count(tokens: Rows) -> int:
    """Return how many tokens to reserve: 256, or the next power of two that holds them all."""
    needed = int(tokens.max()) + 1 if len(tokens) else 1
    return max(MIN_TOKENS, 1 << (needed - 1).bit_length())


def last_level_inputs(
    tokenizer: Tokenizer, latent: npt.NDArray[np.float32], codes: Codes
) -> npt.NDArray[np.float32]:
    """Return the vectors ``(n, width)`` that the last level quantizes."""
    # In parallel tokenizers each codebook quantizes the latent vector itself, or its columns of it.
    if not tokenizer.hierarchical:
        return latent[:, tokenizer.latent_slices[-1]]
    residual = latent
    for level, codebook in enumerate(tokenizer.codebooks[:-1]):
        residual = residual - codebook[codes[:, level]]
    return residual


def reassign_codes(
    tokenizer: Tokenizer,
    source: EmbeddingSource,
    rows: Rows,
    plain: SemanticIds,
    *,
    capacity: int,
    published: npt.NDArray[np.bool_],
    codes: Codes | None,
    progress: Progress,
) -> tuple[Rows, npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Give items that share an id the nearest free codes of the last level.

    Items that share all codes but the last compete for the codewords of the last level. Each such
    group is an assignment problem of its own, so the sum of extra squared distances is the least
    possible, given the prefixes and the published codes.

    Returns codes ``(items, levels)``; a mask ``(items,)`` of new items without a free code, which
    keep the model's; and ``(items,)`` float64 squared distances to the last codeword beyond the
    nearest one, in the quantized space.

    ``plain`` holds the model's codes ``(items, levels)``, ``rows`` the row of each item in the
    source. ``published`` rows keep ``codes``; ``capacity`` is the number of items per id.

    Cost: only groups with an id above capacity: one read of their embeddings,
    ``O(n codes latent)`` for the distances of n items, then `assign_rows`. Memory: 8 n codes bytes
    for the largest group.
    """
    result = np.array(plain.codes, dtype=np.int64)
    if codes is not None:
        result[published] = codes[published]
    extra = np.zeros(len(result))
    unplaced = np.zeros(len(result), bool)

    # 1. Find the groups (prefixes without the last code) in which an id is above capacity. The
    #    other groups stay as the model encoded them.
    groups = group_numbers(result[:, :-1])
    crowded = np.zeros(int(groups.max()) + 1 if len(groups) else 0, bool)
    crowded[groups[(bucket_sizes(group_numbers(result)) > capacity) & ~published]] = True
    published_codes = _published_last_codes(result, groups, published & crowded[groups])

    # 2. Order their new items canonically: among placements of equal cost the assignment depends
    #    on the order, and so the result does not depend on the order of the rows.
    competing = np.flatnonzero(crowded[groups] & ~published)
    norms, items = plain.residual_norms[competing], plain.items.take(competing)
    order = competing[canonical_order(groups[competing], norms, items)]

    codebook = tokenizer.codebooks[-1]
    codeword_norms = squared_norms(codebook)
    transposed = codebook.astype(np.float64).T
    progress.start("place", total=len(order))
    for chunk, bounds in _group_chunks(order, groups):
        latent = tokenizer.latent(source.rows(rows[chunk]))
        inputs = last_level_inputs(tokenizer, latent, result[chunk]).astype(np.float64)
        for start, stop in pairwise(bounds):
            members = chunk[start:stop]
            # 3. Costs are squared distances beyond that of the item's own code. |r|^2 is left out
            #    of |r - c|^2 because it is the same for all candidates of a row.
            distance = codeword_norms - 2.0 * (inputs[start:stop] @ transposed)
            nearest = distance[np.arange(len(members)), result[members, -1]]
            cost = np.maximum(distance - nearest[:, None], 0.0)
            # 4. Codes of published items are occupied before the new ones are assigned.
            places = np.full(len(codebook), capacity)
            occupied = published_codes.get(int(groups[members[0]]))
            if occupied is not None:
                np.subtract.at(places, occupied, 1)
            labels = assign_rows(cost, np.maximum(places, 0))
            placed = labels >= 0
            result[members[placed], -1] = labels[placed]
            extra[members[placed]] = cost[placed, labels[placed]]
            unplaced[members[~placed]] = True
        progress.step(len(chunk))
    return result, unplaced, extra


def _published_last_codes(
    codes: npt.NDArray[np.int64], groups: Rows, mask: npt.NDArray[np.bool_]
) -> dict[int, Rows]:
    """Collect the last codes of the masked rows by group."""
    order = np.flatnonzero(mask)
    order = order[np.argsort(groups[order], kind="stable")]
    return {
        int(groups[order[start]]): codes[order[start:stop], -1]
        for start, stop in pairwise(group_starts(groups[order]))
    }


def _group_chunks(order: Rows, groups: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Split ordered rows into chunks of whole groups, with the bounds of the groups inside."""
    starts = group_starts(groups[order])
    first = 0
    while first < len(starts) - 1:
        # As many whole groups as fit, and one where even the next group alone does not.
        last = int(np.searchsorted(starts, starts[first] + CHUNK_ROWS, side="right")) - 1
        last = max(last, first + 1)
        yield order[starts[first] : starts[last]], starts[first : last + 1] - starts[first]
        first = last
