"""Blocks of rows: the fixed unit of work, and what can be wrong with the rows in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from semid.data.ids import ItemIds

# Rows of a block: the fixed unit of work whose sums are added in order.
BLOCK = 65_536

# Longest row. Squared distances of longer ones, and sums of a few million of those, come near the
# end of float32 at 3.4e38.
MAX_NORM = 1e15


class Flag:
    """Bits that say what is wrong with the row of a `RawBlock`; such a row is filled with NaN."""

    NULL_ROW = 1
    NULL_VALUE = 2
    RAGGED = 4


class RawBlock(NamedTuple):
    """Rows as a container gives them, before anyone has judged them."""

    values: np.ndarray  # (n, dim) float32, C-contiguous
    flags: np.ndarray | None = None  # (n,) uint8 of `Flag` bits, or None when no row has one
    shared: bool = False  # whether ``values`` is memory that belongs to somebody else

    @property
    def flag_bits(self) -> np.ndarray:
        """The flags (n,), zeros where no row has one."""
        return np.zeros(len(self.values), np.uint8) if self.flags is None else self.flags

    def take(self, rows: np.ndarray) -> RawBlock:
        """Return a copy of the rows at ``rows`` (k,)."""
        return RawBlock(self.values[rows], None if self.flags is None else self.flags[rows])


def gather(count: int, dim: int, parts: Iterable[tuple[np.ndarray, RawBlock]]) -> RawBlock:
    """Collect ``count`` rows from parts ``(places, rows)``, each place occurring once."""
    values = np.empty((count, dim), dtype=np.float32)
    flags = np.zeros(count, dtype=np.uint8)
    for places, raw in parts:
        values[places] = raw.values
        if raw.flags is not None:
            flags[places] = raw.flags
    return RawBlock(values, flags if flags.any() else None)


def reblock(pieces: Iterable[RawBlock], size: int) -> Iterator[RawBlock]:
    """Cut pieces into blocks of ``size`` rows (the last may be shorter), views where possible."""
    parts: list[RawBlock] = []
    count = 0
    for piece in pieces:
        start = 0
        # Each slice fills the current block up, or is what the piece still has.
        while start < len(piece.values):
            stop = min(start + size - count, len(piece.values))
            flags = None if piece.flags is None else piece.flags[start:stop]
            parts.append(RawBlock(piece.values[start:stop], flags, piece.shared))
            count, start = count + stop - start, stop
            if count == size:
                yield _joined(parts)
                parts, count = [], 0
    if parts:
        yield _joined(parts)


def _joined(parts: list[RawBlock]) -> RawBlock:
    if len(parts) == 1:
        values, flags, shared = parts[0]
    else:
        values, shared = np.concatenate([part.values for part in parts]), False
        flags = np.concatenate([part.flag_bits for part in parts])
    # Flags say that a row cannot be used: none, where all rows of the block can.
    return RawBlock(values, flags if flags is not None and flags.any() else None, shared)


def within_range(values: np.ndarray) -> bool:
    """Whether all rows are finite and no longer than `MAX_NORM`, at the price of one product."""
    # The sum of all squares proves it: NaN and infinity survive every addition, and no row exceeds
    # the sum. Only where it is large does every row have to be looked at.
    if float(np.vdot(values, values)) <= MAX_NORM**2:
        return True
    return bool((squared_norms(values) <= MAX_NORM**2).all())


def squared_norms(values: np.ndarray) -> np.ndarray:
    """Return the squared length of each row: (n,) float64, NaN and infinity where the row has."""
    return np.asarray(np.einsum("nd,nd->n", values, values, dtype=np.float64))


_NAN, _INFINITE, _LONG = 8, 16, 32
_WORDS = {
    Flag.NULL_ROW: "null instead of an embedding",
    Flag.NULL_VALUE: "null values inside the embedding",
    _NAN: "NaN",
    _INFINITE: "infinite values (or values beyond the range of float32)",
    _LONG: f"values too large for squared distances in float32 (longer than {MAX_NORM:g})",
    Flag.RAGGED: "another width than {dim}, which is the most frequent",
}


class Moments:
    """Mean of rows and their mean squared distance to it, from sums in float64 in block order."""

    def __init__(self) -> None:
        self.count = 0  # rows added
        self.total: np.ndarray = np.zeros(())  # (dim,) sum of the rows
        self.squares = 0.0  # sum of their squared lengths

    @classmethod
    def of(cls, blocks: Iterable[tuple[int, np.ndarray]]) -> Moments:
        """Add up blocks as ``blocks()`` yields them."""
        moments = cls()
        for _, rows in blocks:
            moments.add_(rows)
        return moments

    def add_(self, rows: np.ndarray) -> None:
        """Add rows (n, dim)."""
        self.count += len(rows)
        self.total = self.total + rows.sum(axis=0, dtype=np.float64)
        self.squares += float(np.einsum("nd,nd->", rows, rows, dtype=np.float64))

    def merge_(self, other: Moments) -> None:
        """Add what other rows have summed up to."""
        self.count += other.count
        self.total = self.total + other.total
        self.squares += other.squares

    @property
    def mean(self) -> np.ndarray:
        """Mean of the rows (dim,)."""
        return np.asarray(self.total / max(self.count, 1))

    @property
    def variance(self) -> float:
        """Mean squared distance of a row to the mean, at least 0."""
        mean = np.atleast_1d(self.mean)
        return max(self.squares / max(self.count, 1) - float(mean @ mean), 0.0)


class RowProblems:
    """Counts what is wrong with rows and remembers the first of each kind."""

    def __init__(self, label: str, dim: int, ids: ItemIds) -> None:
        # The embeddings in the user's words, the width that rows should have, and all ids.
        self.label, self.dim, self.ids = label, dim, ids
        self.counts = dict.fromkeys(_WORDS, 0)
        self.first: dict[int, int] = {}

    def add(self, raw: RawBlock, rows: np.ndarray) -> np.ndarray:
        """Count one block whose rows are numbered ``rows``; return the mask of its usable rows."""
        # The cheap test passes for nearly every block; rows are told apart only where it fails.
        clean: np.ndarray = np.ones(len(raw.values), dtype=bool)
        if not within_range(raw.values):
            clean = squared_norms(raw.values) <= MAX_NORM**2
        if raw.flags is None and clean.all():
            return clean
        unflagged = raw.flag_bits == 0
        # Flagged rows are filled with NaN, so the values of the others alone are classified.
        kinds = {bit: (raw.flag_bits & bit) != 0 for bit in (1, 2, 4)}
        kinds[_NAN] = unflagged & np.isnan(raw.values).any(axis=1)
        kinds[_INFINITE] = unflagged & np.isinf(raw.values).any(axis=1)
        kinds[_LONG] = unflagged & np.isfinite(raw.values).all(axis=1) & ~clean
        for kind, mask in kinds.items():
            if mask.any():
                self.counts[kind] += int(mask.sum())
                self.first.setdefault(kind, int(rows[np.flatnonzero(mask)[0]]))
        return np.asarray(clean & unflagged)

    def sentences(self) -> list[str]:
        """Say every problem in one sentence each, with what to do about it."""
        return [
            f"{self.label} holds {count} row{'s' if count > 1 else ''} with "
            f"{words.format(dim=self.dim)} (first: item '{self.ids[self.first[kind]]}', "
            f"row {self.first[kind]}); drop them or pass --on-invalid skip (on_invalid='skip')"
            for kind, words in _WORDS.items()
            if (count := self.counts[kind])
        ]
