"""Codes as arrays: checks, one number per id, hashes of inputs and of ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.errors import InputError, UsageError

_HASH_ROWS = 512  # rows hashed at once: 512 x 256 float32 is half a MB and stays in the cache
_PACK_ROWS = 65_536


def sizes_per_level(codebook_sizes: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """Return one codebook size per level from one size or a sequence of them."""
    if isinstance(codebook_sizes, (int, np.integer)):
        sizes = (int(codebook_sizes),) * levels
    else:
        sizes = tuple(int(size) for size in codebook_sizes)
    if len(sizes) != levels:
        raise UsageError(f"codebook_sizes has {len(sizes)} entries, but the codes {levels} levels")
    if any(size < 1 for size in sizes):
        raise UsageError(f"codebook_sizes={list(sizes)}: every codebook size must be at least 1")
    return sizes


def check_codes(
    codes: npt.ArrayLike, codebook_sizes: int | Sequence[int] | None = None
) -> npt.NDArray[np.integer[Any]]:
    """Return an array after checking that it holds codes; it is not copied.

    Shapes: ``codes`` (items, levels).
    """
    array = np.asarray(codes)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] == 0:
        raise InputError(
            f"codes have shape {array.shape}; (items, levels) with at least one item and one "
            "level is needed; give a single level as codes[:, None]"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"codes have dtype {array.dtype}; an integer dtype is needed")
    sizes = None if codebook_sizes is None else sizes_per_level(codebook_sizes, array.shape[1])
    problems = []
    for level in range(array.shape[1]):
        low, high = int(array[:, level].min()), int(array[:, level].max())
        top = None if sizes is None else sizes[level]
        if low < 0 or (top is not None and high >= top):
            allowed = "at least 0" if top is None else f"0 to {top - 1}"
            problems.append(f"level {level} holds codes {low} to {high}; allowed: {allowed}")
    if problems:
        raise InputError(problems)
    return array


def pack_bits(columns: npt.NDArray[Any], bits: Sequence[int]) -> npt.NDArray[np.uint64]:
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
    """Return a number for every item; two are equal exactly when the ids are equal.

    Ids of up to 64 bits are packed, wider ids are ranked in steps; nothing is hashed. Keys sort
    as the ids do (first level first). Keys of different calls are not comparable.

    Cost: one pass up to 64 bits, a sort of the items for every further 64 less log2(items) bits.

    Shapes: ``codes`` (items, levels), returns (items,).
    """
    array = check_codes(codes)
    bits = [max(int(array[:, level].max()).bit_length(), 1) for level in range(array.shape[1])]
    key = np.zeros(len(array), np.uint64)
    used = start = 0
    while start < len(bits):
        # Take as many further levels as fit into the 64 bits beside the key so far.
        stop = start
        while stop < len(bits) and used + sum(bits[start : stop + 1]) <= 64:
            stop += 1
        # If not one level fits, the rank of the key replaces it: equal keys stay equal, the order
        # stays, and only log2(items) bits are used.
        if stop == start:
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
            key |= pack_bits(array[:, start:stop], bits[start:stop])
        else:
            key = pack_bits(array[:, :stop], bits[:stop])
        used, start = used + width, stop
    return key


def row_hashes(block: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each row's content, which finds exact copies of an input.

    Rows are compared as float32 with -0 equal to 0, so a float16 and a float32 copy of a vector
    agree. The hash depends on the row alone, not on its block. Among 15 million different rows,
    two are equal with a probability of about 1e-5.

    Shapes: ``block`` (batch, dim), returns (batch,).
    """
    array = np.asarray(block)
    if array.ndim != 2:
        raise InputError(f"rows to hash have shape {array.shape}; (batch, dim) is needed")
    result = np.empty(len(array), np.uint64)
    dim, words = array.shape[1], (array.shape[1] + 1) // 2
    weights = np.random.Generator(np.random.PCG64(0x5EED)).integers(
        0, 2**64, size=words, dtype=np.uint64
    ) | np.uint64(1)
    # One odd random weight per 64-bit word of a row; the hash is the weighted sum of the words,
    # mixed once more. Buffers are small enough to stay in the cache.
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
        # A multiplication spreads low bits upward and the shifts spread high bits downward.
        total ^= total >> np.uint64(31)
        total *= np.uint64(0xD6E8FEB86659FD93)
        result[start : start + len(rows)] = total ^ (total >> np.uint64(32))
    return result


def part_of(words: npt.NDArray[np.uint64], parts: int) -> npt.NDArray[np.int64]:
    """Return a part for each id by a hash of its packed ``words`` (items, n): ``(items,)``."""
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
