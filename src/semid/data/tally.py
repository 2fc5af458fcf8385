"""What is wrong with rows: counted by kind, said in sentences."""

from __future__ import annotations

import numpy as np

from semid.data.blocks import MAX_NORM, Flag, RawBlock, squared_norms, within_range
from semid.data.ids import ItemIds

__all__ = ["Tally"]

_NAN, _INFINITE, _LONG = 8, 16, 32
_WORDS = {
    Flag.NULL_ROW: "null instead of an embedding",
    Flag.NULL_VALUE: "null values inside the embedding",
    _NAN: "NaN",
    _INFINITE: "infinite values (or values beyond the range of float32)",
    _LONG: f"values too large for squared distances in float32 (longer than {MAX_NORM:g})",
    Flag.RAGGED: "another width than {dim}, which is the most frequent",
}


class Tally:
    """Counts what is wrong with rows and remembers the first of each kind.

    Args:
        label: the embeddings in the user's words.
        dim: the width that rows should have.
        ids: the ids of all rows, to name the first bad one.
    """

    def __init__(self, label: str, dim: int, ids: ItemIds) -> None:
        self.label, self.dim, self.ids = label, dim, ids
        self.counts = dict.fromkeys(_WORDS, 0)
        self.first: dict[int, int] = {}

    def add(self, raw: RawBlock, rows: np.ndarray) -> np.ndarray:
        """Count one block whose rows are numbered ``rows``; return the mask of its usable rows."""
        clean: np.ndarray = np.ones(len(raw.values), dtype=bool)
        flags = np.zeros(len(raw.values), np.uint8) if raw.flags is None else raw.flags
        if not within_range(raw.values):
            clean = squared_norms(raw.values) <= MAX_NORM**2
        if raw.flags is None and clean.all():
            return clean
        unflagged = flags == 0
        kinds = {bit: (flags & bit) != 0 for bit in (1, 2, 4)}
        kinds[_NAN] = unflagged & np.isnan(raw.values).any(axis=1)
        kinds[_INFINITE] = unflagged & np.isinf(raw.values).any(axis=1)
        kinds[_LONG] = unflagged & np.isfinite(raw.values).all(axis=1) & ~clean
        for kind, mask in kinds.items():
            if mask.any():
                self.counts[kind] += int(mask.sum())
                self.first.setdefault(kind, int(rows[np.flatnonzero(mask)[0]]))
        usable: np.ndarray = clean & unflagged
        return usable

    def sentences(self) -> list[str]:
        """Say every problem in one sentence each, with what to do about it."""
        out = []
        for kind, words in _WORDS.items():
            count = self.counts[kind]
            if not count:
                continue
            row = self.first[kind]
            out.append(
                f"{self.label} holds {count} row{'s' if count > 1 else ''} with "
                f"{words.format(dim=self.dim)} (first: item '{self.ids[row]}', row {row}); "
                "drop them or pass --on-invalid skip (on_invalid='skip')"
            )
        return out
