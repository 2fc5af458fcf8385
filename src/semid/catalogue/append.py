"""Unique ids by one more token: the place of an item inside its bucket (TIGER, §3.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.buckets import canonical_order, group_numbers, group_starts
from semid.data.ids import ItemIds

__all__ = ["append_tokens", "token_alphabet"]

# Room for a bucket to grow without a new vocabulary; the customary size of a codebook.
LEAST_ALPHABET = 256


def append_tokens(
    codes: npt.NDArray[np.integer[Any]],
    norms: npt.NDArray[np.float32],
    items: ItemIds,
    *,
    published: npt.NDArray[np.bool_] | None = None,
    tokens: npt.NDArray[np.integer[Any]] | None = None,
) -> npt.NDArray[np.int64]:
    """Number the items of each bucket, the closest to the centroid first, ties by item id.

    Args:
        codes: ``(items, levels)`` of the model.
        norms: ``(items,)`` residual norms.
        items: their ids.
        published: ``(items,)`` rows whose tokens are fixed; None has none.
        tokens: ``(items,)`` tokens of the published rows; others are ignored.

    Returns:
        ``(items,)`` int64 tokens. New rows go on after the highest published token of their
        bucket, so that the token of an item taken out of the catalogue is not used again while a
        later one is there. Cost: a sort of the items.
    """
    groups = group_numbers(codes)
    result = np.zeros(len(codes), np.int64)
    base = np.zeros(int(groups.max()) + 1 if len(groups) else 0, np.int64)
    new = np.arange(len(codes))
    if published is not None and tokens is not None:
        result[published] = tokens[published]
        np.maximum.at(base, groups[published], result[published] + 1)
        new = np.flatnonzero(~published)
    order = new[canonical_order(groups[new], norms[new], items.take(new))]
    starts = group_starts(groups[order])
    place = np.arange(len(order)) - np.repeat(starts[:-1], np.diff(starts))
    result[order] = base[groups[order]] + place
    return result


def token_alphabet(tokens: npt.NDArray[np.int64]) -> int:
    """Return how many tokens to reserve: 256, or the next power of two that holds them all."""
    needed = int(tokens.max()) + 1 if len(tokens) else 1
    return max(LEAST_ALPHABET, 1 << (needed - 1).bit_length())
