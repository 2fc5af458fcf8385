"""A stable 64-bit hash of id strings: what decides who is held out, today and in five years.

The hash of a string depends on its characters and the salt alone: not on where it stands, what
stands beside it, the process, the machine or a library's version. Adding items therefore never
moves an item from training to validation.

The algorithm, so that it can be repeated elsewhere: FNV-1a with 64 bits (offset basis
``0xcbf29ce484222325``, prime ``0x100000001b3``) over the bytes ``utf8(salt) + 0xFF + utf8(id)``,
followed by MurmurHash3's 64-bit finaliser, which spreads the last characters over all bits (FNV
alone leaves the high bits of short, similar ids alike, and it is the high bits that a threshold
reads). ``0xFF`` occurs in no UTF-8 text, so no salt and id can pose as another pair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from semid.errors import UsageError

__all__ = ["hash_strings", "share_mask"]

_BASIS = 0xCBF29CE484222325
_PRIME = 0x100000001B3
_MASK = 0xFFFFFFFFFFFFFFFF
_BLOCK = 65_536


def hash_strings(strings: Any, *, salt: str = "") -> np.ndarray:
    """Hash every string of an Arrow array.

    Args:
        strings: Arrow array or chunked array (items,) of strings without nulls.
        salt: another salt gives an independent hash.

    Returns:
        Array (items,) of uint64, uniform over the 64 bits. Time grows with the total number of
        characters; extra memory is a few arrays of 65,536 numbers.
    """
    state = np.uint64(_salted_basis(salt))
    chunks = strings.chunks if isinstance(strings, pa.ChunkedArray) else [strings]
    out = np.empty(sum(len(c) for c in chunks), dtype=np.uint64)
    done = 0
    for chunk in chunks:
        for start in range(0, len(chunk), _BLOCK):
            block = chunk.slice(start, _BLOCK)
            out[done : done + len(block)] = _hash_block(block, state)
            done += len(block)
    return out


def share_mask(hashes: np.ndarray, start: float, stop: float) -> np.ndarray:
    """Tell which hashes fall in a share of the hash range.

    Args:
        hashes: (items,) uint64, from `hash_strings`.
        start: lower end of the share, 0 to 1, inclusive.
        stop: upper end of the share, ``start`` to 1, exclusive (1 takes everything above).

    Returns:
        Boolean mask (items,).

    Raises:
        UsageError: the ends are not ``0 <= start <= stop <= 1``.
    """
    if not 0.0 <= start <= stop <= 1.0:
        raise UsageError(f"a share from {start} to {stop} is not within 0 and 1")
    low, high = round(start * 2**64), round(stop * 2**64)
    mask = np.ones(len(hashes), dtype=bool)
    # 2**64 itself does not fit in 64 bits, and is above every hash.
    mask &= hashes >= np.uint64(low) if low <= _MASK else False
    mask &= hashes < np.uint64(high) if high <= _MASK else True
    return mask


def _salted_basis(salt: str) -> int:
    state = _BASIS
    for byte in salt.encode() + b"\xff":
        state = ((state ^ byte) * _PRIME) & _MASK
    return state


def _hash_block(strings: Any, state: np.uint64) -> np.ndarray:
    """FNV-1a over a block, one character position of all its strings at a time."""
    strings = strings.cast(pa.large_string())
    offsets = np.frombuffer(strings.buffers()[1], dtype=np.int64)
    starts = offsets[strings.offset : strings.offset + len(strings)]
    lengths = offsets[strings.offset + 1 : strings.offset + len(strings) + 1] - starts
    data_buffer = strings.buffers()[2]
    data = np.frombuffer(data_buffer, dtype=np.uint8) if data_buffer else np.empty(0, np.uint8)
    hashes = np.full(len(strings), state, dtype=np.uint64)
    prime = np.uint64(_PRIME)
    shortest = int(lengths.min()) if len(lengths) else 0
    for position in range(shortest):
        hashes = (hashes ^ data[starts + position]) * prime
    alive = np.flatnonzero(lengths > shortest)
    position = shortest
    while len(alive):
        hashes[alive] = (hashes[alive] ^ data[starts[alive] + position]) * prime
        position += 1
        alive = alive[lengths[alive] > position]
    return _finalise(hashes)


def _finalise(hashes: np.ndarray) -> np.ndarray:
    """MurmurHash3's 64-bit finaliser."""
    shift = np.uint64(33)
    hashes ^= hashes >> shift
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> shift
    hashes *= np.uint64(0xC4CEB9FE1A85EC53)
    hashes ^= hashes >> shift
    return hashes
