"""Users' items in order, as rows of a catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from semid.errors import InteractionsError, UsageError


class ConsecutivePairs(NamedTuple):
    """Items that a user took one directly after the other.

    Attributes:
        pairs: (n, 2) int32 rows of items, the earlier first; in the order of users and of time.
        users: (n,) int32, the user of each pair.
    """

    pairs: np.ndarray
    users: np.ndarray


@dataclass(frozen=True)
class Sequences:
    """Each user's items, oldest first, as rows of a catalogue.

    Attributes:
        user_ids: (users,) Arrow large_string array.
        offsets: (users + 1,) int64; user ``u`` owns ``items[offsets[u]:offsets[u + 1]]``.
        items: (interactions,) int32 rows of the catalogue, -1 where the item is not in it. Unknown
            items keep their place, so that nothing looks consecutive that was not.
        ordered: whether the order is that of time; otherwise it is the file's.
    """

    user_ids: Any
    offsets: np.ndarray
    items: np.ndarray
    ordered: bool = True

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, user: int) -> np.ndarray:
        """Return the items (n,) of one user, oldest first."""
        if not -len(self) <= user < len(self):
            raise IndexError(f"user {user} is outside the {len(self)} users")
        user %= len(self)
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Interactions of each user, unknown items included: (users,) int64."""
        return np.diff(self.offsets)

    @property
    def unknown(self) -> int:
        """Interactions whose item is not in the catalogue."""
        return int((self.items < 0).sum())

    def select(self, users: np.ndarray) -> Sequences:
        """Return the sequences of the users in a boolean mask (users,), in their order."""
        mask = self._mask(users)
        return Sequences(
            self.user_ids.filter(mask),
            offsets_of(self.lengths[mask]),
            self.items[np.repeat(mask, self.lengths)],
            self.ordered,
        )

    def consecutive_pairs(self, users: np.ndarray | None = None) -> ConsecutivePairs:
        """Pair each item with the next of the same user.

        Pairs in which an item is unknown are left out, and its neighbors are not paired with each
        other: no jump over a gap. An item that follows itself is a pair like any other. A boolean
        mask (users,) restricts whose pairs are taken.
        """
        if not self.ordered:
            raise InteractionsError(
                "consecutive items need an order and the interactions have none; give them a "
                "column 'position' or 'timestamp', or name one with --time-column (time_column=)"
            )
        # Neighbors in the flat array are consecutive where one user owns both and both are known.
        owner = np.repeat(np.arange(len(self), dtype=np.int32), self.lengths)
        first, second = self.items[:-1], self.items[1:]
        keep = (owner[:-1] == owner[1:]) & (first >= 0) & (second >= 0)
        if users is not None:
            keep &= self._mask(users)[owner[:-1]]
        pairs = np.stack([first[keep], second[keep]], axis=1)
        return ConsecutivePairs(pairs, owner[:-1][keep])

    def _mask(self, users: np.ndarray) -> np.ndarray:
        mask = np.asarray(users)
        if mask.dtype != bool or mask.shape != (len(self),):
            raise UsageError(
                f"users are chosen by a boolean mask of shape ({len(self)},), not {mask.dtype} of "
                f"shape {mask.shape}"
            )
        return mask


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Return where each of consecutive parts begins, and the end of the last: (parts + 1,)."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
