"""How many items share their id, with copies in the input told apart from the tokenizer's doing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError
from semid.health._usage import check_codes

__all__ = [
    "CollisionCounter",
    "Collisions",
    "bucket_keys",
    "collisions",
    "merge_collisions",
    "part_of",
    "row_hashes",
]

_HASH_ROWS = 512  # rows hashed at once: 512 x 256 float32 is half a MB and stays in the cache
_PACK_ROWS = 65_536


@dataclass(frozen=True)
class Collisions:
    """How items fall into buckets, a bucket being all items of one whole id.

    "Collision rate" means two things in the literature; both are here under a name of their own.

    Attributes:
        items: items counted.
        unique_ids: different ids among them.
        collision_rate: ``1 - unique_ids / items``.
        shared_share: share of the items whose id at least one other item has.
        largest_bucket: items in the fullest bucket.
        histogram: bucket size -> number of buckets of that size, by size.
        distinct_items: different (id, input) pairs, so exact copies of an input count once; None
            when no input hashes were given, as the following ones.
        duplicate_items: ``items`` less the number of different inputs: rows that are exact
            copies of an earlier row and must collide, whatever the tokenizer.
        collision_rate_distinct: ``1 - unique_ids / distinct_items``, what remains when copies
            count once.
        shared_share_distinct: share of the distinct items that share their id with a
            different input.
        largest_bucket_distinct: different inputs in the bucket that holds most of them.
    """

    items: int
    unique_ids: int
    collision_rate: float
    shared_share: float
    largest_bucket: int
    histogram: Mapping[int, int] = field(repr=False)
    distinct_items: int | None = None
    duplicate_items: int | None = None
    collision_rate_distinct: float | None = None
    shared_share_distinct: float | None = None
    largest_bucket_distinct: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict; histogram keys become strings, as JSON wants them."""
        result = dict(self.__dict__)
        result["histogram"] = {str(size): count for size, count in self.histogram.items()}
        return result


def _pack(columns: npt.NDArray[Any], bits: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Pack columns of ``bits`` bits each into one uint64, first column highest."""
    packed = np.empty(len(columns), np.uint64)
    for start in range(0, len(columns), _PACK_ROWS):
        block = columns[start : start + _PACK_ROWS]
        key = np.zeros(len(block), np.uint64)
        for level, width in enumerate(bits):
            key <<= np.uint64(width)
            key |= block[:, level].astype(np.uint64)
        packed[start : start + len(block)] = key
    return packed


def bucket_keys(codes: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Give every item a number that equals another item's exactly when their ids are equal.

    Never a hash: up to 64 bits the id itself is packed, wider ids are ranked in steps. Keys
    order as the ids do (first level first); keys of different calls are not comparable.

    Args:
        codes: non-negative integers ``(items, levels)``.

    Returns:
        uint64 ``(items,)``.

    Raises:
        InputError: the codes are not non-negative integers ``(items, levels)``.

    Cost: one pass up to 64 bits, a sort of the items for every further 64 less log2(items) bits.
    """
    array = check_codes(codes)
    bits = [max(int(array[:, level].max()).bit_length(), 1) for level in range(array.shape[1])]
    key = np.zeros(len(array), np.uint64)
    used = start = 0
    while start < len(bits):
        stop = start
        while stop < len(bits) and used + sum(bits[start : stop + 1]) <= 64:
            stop += 1
        if stop == start:  # no room: replace the key so far by its rank
            key = np.unique(key, return_inverse=True)[1].astype(np.uint64)
            used = int(key.max()).bit_length()
            if used + bits[start] > 64:
                raise InputError(
                    f"level {start} holds codes of {bits[start]} bits; at most {64 - used} fit"
                )
            continue
        width = sum(bits[start:stop])
        if start:
            key <<= np.uint64(width)
            key |= _pack(array[:, start:stop], bits[start:stop])
        else:
            key = _pack(array[:, :stop], bits[:stop])
        used, start = used + width, stop
    return key


def row_hashes(block: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Hash each row's content, so that exact copies of an input can be found while streaming.

    Rows are compared as float32 with -0 equal to 0, so a float16 and a float32 copy of one
    vector agree. The hash of a row depends on nothing but the row: any cutting into blocks gives
    the same. 64 bits: among 15 million different rows a false copy has a chance of about 1e-5.

    Args:
        block: numbers ``(batch, dim)``.

    Returns:
        uint64 ``(batch,)``.

    Raises:
        InputError: the block is not two-dimensional.
    """
    array = np.asarray(block)
    if array.ndim != 2:
        raise InputError(f"rows to hash have shape {array.shape}; (batch, dim) is needed")
    result = np.empty(len(array), np.uint64)
    dim, words = array.shape[1], (array.shape[1] + 1) // 2
    weights = np.random.Generator(np.random.PCG64(0x5EED)).integers(
        0, 2**64, size=words, dtype=np.uint64
    ) | np.uint64(1)
    padded = np.zeros((_HASH_ROWS, 2 * words), np.float32)
    mixed = np.empty((_HASH_ROWS, words), np.uint64)
    for start in range(0, len(array), _HASH_ROWS):
        rows = array[start : start + _HASH_ROWS]
        floats = padded[: len(rows)]
        floats[:, :dim] = rows
        floats[:, dim:] = 0.0  # the mixing of the last block reached the padding
        floats += 0.0  # turns -0 into 0
        # A sum of odd multiples sees only what lies above the lowest set bit of a difference, and
        # short floats end in zeros: fold each word's high bits into its low ones first.
        w = floats.view(np.uint64)
        for shift in (32, 23):
            np.right_shift(w, np.uint64(shift), out=mixed[: len(rows)])
            np.bitwise_xor(w, mixed[: len(rows)], out=w)
        total = np.einsum("ij,j->i", w, weights)
        total ^= total >> np.uint64(31)
        total *= np.uint64(0xD6E8FEB86659FD93)
        result[start : start + len(rows)] = total ^ (total >> np.uint64(32))
    return result


def _run_lengths(ordered: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the lengths of the runs of equal values in a sorted array."""
    last = np.flatnonzero(ordered[1:] != ordered[:-1])  # where every run but the last one ends
    lengths = np.empty(len(last) + 1, np.int64)
    lengths[:-1] = last
    lengths[-1] = len(ordered) - 1
    lengths[1:] -= last
    lengths[0] += 1
    return lengths


def _distinct_sizes(
    keys: npt.NDArray[np.uint64], groups: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], int]:
    """Return how many different inputs each bucket holds, and how many items are copies.

    Only the few items whose input occurs twice are sorted by both keys; a bucket never vanishes,
    since the first of its copies stays.
    """
    ordered = np.sort(groups)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return _run_lengths(np.sort(keys)), 0
    place = np.minimum(np.searchsorted(repeated, groups), len(repeated) - 1)
    candidates = np.flatnonzero(repeated[place] == groups)
    order = np.lexsort((groups[candidates], keys[candidates]))
    candidates = candidates[order]
    same = (keys[candidates][1:] == keys[candidates][:-1]) & (
        groups[candidates][1:] == groups[candidates][:-1]
    )
    kept = np.ones(len(keys), bool)
    kept[candidates[1:][same]] = False
    return _run_lengths(np.sort(keys[kept])), len(candidates) - len(repeated)


def _summary(sizes: npt.NDArray[np.int64]) -> tuple[int, float, float, int]:
    """Return total, ``1 - buckets/total``, the share in shared buckets, and the largest bucket."""
    total = int(sizes.sum())
    shared = int(sizes[sizes > 1].sum())
    return total, (total - len(sizes)) / total, shared / total, int(sizes.max())


def collisions(
    codes: npt.ArrayLike, *, duplicate_groups: npt.ArrayLike | None = None
) -> Collisions:
    """Count how many items share their id.

    Args:
        codes: integers ``(items, levels)``.
        duplicate_groups: one integer an item, equal exactly for items whose inputs are exact
            copies, such as `row_hashes` of the embeddings; copies are then counted apart.

    Returns:
        A `Collisions`.

    Raises:
        InputError: bad codes, or groups of another length than the codes.

    Cost: a sort of the items; 8 bytes an item beside the codes up to 64-bit ids.
    """
    keys = bucket_keys(codes)
    sizes = _run_lengths(np.sort(keys))
    items, rate, shared, largest = _summary(sizes)
    buckets = np.bincount(sizes)
    histogram = {int(size): int(buckets[size]) for size in np.flatnonzero(buckets)}
    if duplicate_groups is None:
        return Collisions(items, len(sizes), rate, shared, largest, histogram)
    groups = np.asarray(duplicate_groups)
    if groups.shape != (items,) or not np.issubdtype(groups.dtype, np.integer):
        raise InputError(
            f"duplicate_groups have shape {groups.shape} and dtype {groups.dtype}; one integer "
            f"for each of the {items} items is needed"
        )
    groups = groups.astype(np.uint64)
    distinct_sizes, copies = _distinct_sizes(keys, groups)
    distinct = _summary(distinct_sizes)
    return Collisions(
        items=items,
        unique_ids=len(sizes),
        collision_rate=rate,
        shared_share=shared,
        largest_bucket=largest,
        histogram=histogram,
        distinct_items=distinct[0],
        duplicate_items=copies,
        collision_rate_distinct=distinct[1],
        shared_share_distinct=distinct[2],
        largest_bucket_distinct=distinct[3],
    )


class CollisionCounter:
    """Collects codes, and input hashes where wanted, block by block or shard by shard.

    Holds the packed id of every item (8 bytes an item up to 64 bits) and its hash (8 more). Where
    that is too much for one machine, each of several takes some of the items, `split` shares their
    ids out so that equal ids meet in one part, a counter a part counts them, and
    `merge_collisions` adds up what they found.

    Args:
        codebook_sizes: K of each level, ``(levels,)``.
    """

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self._bits = [max((size - 1).bit_length(), 1) for size in self.codebook_sizes]
        self._spans: list[slice] = []  # levels that share a 64-bit word
        start = 0
        for level in range(len(self._bits)):
            if sum(self._bits[start : level + 1]) > 64:
                self._spans.append(slice(start, level))
                start = level
        self._spans.append(slice(start, len(self._bits)))
        self._words: list[npt.NDArray[np.uint64]] = []
        self._groups: list[npt.NDArray[np.uint64] | None] = []

    def update(
        self, codes: npt.ArrayLike, *, duplicate_groups: npt.ArrayLike | None = None
    ) -> None:
        """Add a block of codes ``(batch, levels)`` with, optionally, their `row_hashes`."""
        block = check_codes(codes, self.codebook_sizes)
        groups = None if duplicate_groups is None else np.asarray(duplicate_groups, np.uint64)
        if groups is not None and groups.shape != (len(block),):
            raise InputError(
                f"duplicate_groups have shape {groups.shape}; ({len(block)},) is needed"
            )
        self._words.append(
            np.stack([_pack(block[:, s], self._bits[s]) for s in self._spans], axis=1)
        )
        self._groups.append(groups)

    def merge(self, other: CollisionCounter) -> None:
        """Add what another counter over the same codebooks has collected."""
        if other.codebook_sizes != self.codebook_sizes:
            raise UsageError(
                f"counters over codebooks of sizes {list(self.codebook_sizes)} and "
                f"{list(other.codebook_sizes)} cannot be merged"
            )
        self._words += other._words
        self._groups += other._groups

    def __len__(self) -> int:
        """Count the items collected."""
        return sum(len(words) for words in self._words)

    def split(self, parts: int) -> list[CollisionCounter]:
        """Share the items out by their id.

        Args:
            parts: counters wanted, at least 1.

        Returns:
            Counters over the same codebooks; equal ids are in the same one, whichever counter they
            come from. This one stays as it is. Memory: a copy of what it holds.
        """
        found = [CollisionCounter(self.codebook_sizes) for _ in range(parts)]
        for words, groups in zip(self._words, self._groups, strict=True):
            owner = part_of(words, parts)
            for part, counter in enumerate(found):
                own = owner == part
                if own.any():
                    counter._words.append(words[own])
                    counter._groups.append(None if groups is None else groups[own])
        return found

    def result(self) -> Collisions:
        """Return the `Collisions` of everything collected so far.

        Raises:
            InputError: nothing was collected, or only some blocks came with hashes.
        """
        if not self._words:
            raise InputError("no codes were counted yet; call update first")
        words, groups = self._joined()
        return collisions(words, duplicate_groups=groups)

    def collected(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Return what was collected: columns equal exactly for equal ids, and the groups."""
        if not self._words:
            return np.empty((0, 1), np.uint64), np.empty(0, np.uint64)
        words, groups = self._joined()
        return words, np.zeros(len(words), np.uint64) if groups is None else groups

    def _joined(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64] | None]:
        given = [g for g in self._groups if g is not None]
        if given and len(given) != len(self._groups):
            raise InputError(
                f"{len(given)} of {len(self._groups)} blocks came with duplicate_groups; give them "
                "with every block or with none"
            )
        words = np.concatenate(self._words)
        return _dense(words), np.concatenate(given) if given else None


def part_of(words: npt.NDArray[np.uint64], parts: int) -> npt.NDArray[np.int64]:
    """Choose a part for each id, by a hash of its packed ``words`` (items, n): ``(items,)``.

    Raises:
        UsageError: fewer than one part.
    """
    if parts < 1:
        raise UsageError(f"parts={parts}: give at least 1")
    state = np.zeros(len(words), np.uint64)
    for column in words.T:  # SplitMix64's finaliser, word after word
        state += column + np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(30)
        state *= np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
        state *= np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state % np.uint64(parts)).astype(np.int64)


def merge_collisions(parts: Sequence[Collisions]) -> Collisions:
    """Add up what was counted in parts that have no id in common.

    Exact for everything that is counted by id. ``duplicate_items`` is exact where equal inputs
    have equal ids, as after every encoder; copies that a later step gave different ids meet in
    different parts and are counted there as different inputs.

    Args:
        parts: results of the counters that `CollisionCounter.split` gave, or of disjoint ids.

    Raises:
        InputError: no parts, or only some of them counted copies.
    """
    if not parts:
        raise InputError("there are no parts to add up; give at least one")
    known = [part for part in parts if part.distinct_items is not None]
    if known and len(known) != len(parts):
        raise InputError(
            f"{len(known)} of {len(parts)} parts know which inputs are copies; give hashes to all "
            "of them or to none"
        )
    histogram: dict[int, int] = {}
    for part in parts:
        for size, count in part.histogram.items():
            histogram[size] = histogram.get(size, 0) + count
    items, ids = sum(part.items for part in parts), sum(part.unique_ids for part in parts)
    shared = sum(size * count for size, count in histogram.items() if size > 1)
    found = {
        "items": items,
        "unique_ids": ids,
        "collision_rate": (items - ids) / items,
        "shared_share": shared / items,
        "largest_bucket": max(histogram),
        "histogram": dict(sorted(histogram.items())),
    }
    if not known:
        return Collisions(**found)  # type: ignore[arg-type]
    distinct = sum(part.distinct_items or 0 for part in parts)
    # Shares of whole numbers come back as those numbers.
    apart = sum(
        round((part.shared_share_distinct or 0.0) * (part.distinct_items or 0)) for part in parts
    )
    return Collisions(
        **found,  # type: ignore[arg-type]
        distinct_items=distinct,
        duplicate_items=sum(part.duplicate_items or 0 for part in parts),
        collision_rate_distinct=(distinct - ids) / distinct,
        shared_share_distinct=apart / distinct,
        largest_bucket_distinct=max(part.largest_bucket_distinct or 0 for part in parts),
    )


def _dense(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Turn several packed words a row into one column that is equal exactly when they all are."""
    if words.shape[1] == 1:
        return words
    ranks = [np.unique(column, return_inverse=True)[1] for column in words.T]
    return np.stack([rank.astype(np.uint64) for rank in ranks], axis=1)
