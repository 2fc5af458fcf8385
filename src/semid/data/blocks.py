"""Blocks of rows: the fixed unit of work, before anyone has judged the values in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["BLOCK", "MAX_NORM", "Flag", "RawBlock", "reblock", "squared_norms", "within_range"]

BLOCK = 65_536
"""Rows of a block: the fixed unit of work whose sums are added in order."""

MAX_NORM = 1e15
"""Longest row. Squared distances of longer ones, and sums of a few million of those, come near the
end of float32 at 3.4e38."""


class Flag:
    """Bits that say what is wrong with the row of a `RawBlock`; such a row is filled with NaN."""

    NULL_ROW = 1
    NULL_VALUE = 2
    RAGGED = 4


class RawBlock(NamedTuple):
    """Rows as a container gives them, before anyone has judged them.

    Attributes:
        values: (n, dim) float32, C-contiguous.
        flags: (n,) uint8 of `Flag` bits, or None when no row has one.
        shared: whether ``values`` is memory that belongs to somebody else.
    """

    values: np.ndarray
    flags: np.ndarray | None = None
    shared: bool = False


def reblock(pieces: Iterable[RawBlock], size: int, dim: int) -> Iterator[RawBlock]:
    """Cut pieces of any length into blocks of exactly ``size`` rows (the last may be shorter).

    A piece that happens to be a whole block passes through untouched; otherwise rows are copied
    once, into one block at a time.
    """
    block = _Filling(size, dim)
    previous: RawBlock | None = None
    for piece in pieces:
        if len(piece.values) == 0:
            continue
        # One piece behind, because a short last piece may pass through untouched too.
        if previous is not None:
            yield from block.add(previous)
        previous = piece
    if previous is not None:
        if block.filled == 0 and len(previous.values) <= size:
            yield previous
            return
        yield from block.add(previous)
    yield from block.rest()


class _Filling:
    """The block that pieces are being copied into."""

    def __init__(self, size: int, dim: int) -> None:
        self.shape = (size, dim)
        self.filled = 0

    def add(self, piece: RawBlock) -> Iterator[RawBlock]:
        """Append a piece; yield every block that it fills."""
        size = self.shape[0]
        if self.filled == 0 and len(piece.values) == size:
            yield piece
            return
        at = 0
        while at < len(piece.values):
            if self.filled == 0:
                self.values = np.empty(self.shape, dtype=np.float32)
                self.flags = np.zeros(size, dtype=np.uint8)
            n = min(size - self.filled, len(piece.values) - at)
            self.values[self.filled : self.filled + n] = piece.values[at : at + n]
            if piece.flags is not None:
                self.flags[self.filled : self.filled + n] = piece.flags[at : at + n]
            self.filled, at = self.filled + n, at + n
            if self.filled == size:
                yield from self.rest()

    def rest(self) -> Iterator[RawBlock]:
        """Yield what has been filled, if anything."""
        if self.filled:
            flags = self.flags[: self.filled]
            yield RawBlock(self.values[: self.filled], flags if flags.any() else None)
            self.filled = 0


def within_range(values: np.ndarray) -> bool:
    """Whether all rows are finite and no longer than `MAX_NORM`, at the price of one product.

    The sum of all squares proves it: NaN and infinity survive every addition, and no row exceeds
    the sum. Only where it is large does every row have to be looked at.
    """
    if float(np.vdot(values, values)) <= MAX_NORM**2:
        return True
    return bool((squared_norms(values) <= MAX_NORM**2).all())


def squared_norms(values: np.ndarray) -> np.ndarray:
    """Return the squared length of each row: (n,) float64, NaN and infinity where the row has."""
    norms: np.ndarray = np.einsum("nd,nd->n", values, values, dtype=np.float64)
    return norms
