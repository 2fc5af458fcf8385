"""Pairs of items that belong together, for contrastive training: drawn, never all listed.

Positives come from three places: consecutive items of the training users, a table of related
items, or nearest neighbors in a second embedding. A batch is drawn by a generator, so a resumed
run draws the same pairs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from semid.errors import InteractionsError

__all__ = ["Behavior", "PairSource", "Positives", "SequencePairs", "TablePairs"]

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Positives:
    """Which items are positives of which, in both directions, as sorted neighbor lists.

    Args:
        first: ``(pairs,)`` rows.
        second: ``(pairs,)`` rows.
        items: rows are 0 to ``items - 1``.

    Memory: 4 bytes a distinct pair and direction, and 8 an item; a sort of the pairs to make it.
    """

    def __init__(
        self, first: npt.NDArray[np.integer], second: npt.NDArray[np.integer], items: int
    ) -> None:
        a, b = first.astype(np.int64), second.astype(np.int64)
        keys = np.unique(np.concatenate([a * items + b, b * items + a]))
        owners = keys // items
        self._offsets = np.searchsorted(owners, np.arange(items + 1))
        self._others = (keys % items).astype(np.int32)

    def digest(self) -> str:
        """Return the SHA-256 of the lists."""
        found = hashlib.sha256(self._offsets.tobytes())
        found.update(self._others.tobytes())
        return found.hexdigest()

    def of(self, item: int) -> npt.NDArray[np.int32]:
        """Return the positives of one item, rising."""
        return self._others[self._offsets[item] : self._offsets[item + 1]]

    def excluded(self, first: Rows, second: Rows) -> Mask:
        """Say which ``second[j]`` is no negative for ``first[i]``.

        Args:
            first: ``(n,)`` anchors.
            second: ``(n,)`` their positives.

        Returns:
            ``(n, n)``: true where ``second[j]`` is the anchor itself or any positive of it (copies
            of its own positive among them), except on the diagonal, which holds the pairs.
            Cost: O(sum of the anchors' positives + n^2 / 8).
        """
        count = len(first)
        excluded: Mask = np.equal(first[:, None], second[None, :])
        order = np.argsort(second, kind="stable")
        present = second[order]
        lengths = self._offsets[first + 1] - self._offsets[first]
        anchors = np.repeat(np.arange(count), lengths)
        within = np.arange(len(anchors)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        neighbors = self._others[self._offsets[first][anchors] + within]
        low = np.searchsorted(present, neighbors, side="left")
        high = np.searchsorted(present, neighbors, side="right")
        for shift in range(int((high - low).max(initial=0))):
            hit = low + shift < high
            excluded[anchors[hit], order[low[hit] + shift]] = True
        np.fill_diagonal(excluded, False)
        return excluded


class PairSource(Protocol):
    """Where pairs come from.

    Attributes:
        positives: all pairs, for telling false negatives.
        count: pairs to draw from; repeats count.
        protocol: one sentence that says which data the pairs come from.
    """

    positives: Positives
    count: int
    protocol: str

    def draw(self, size: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
        """Draw pairs with replacement, each as likely as any other: two ``(size,)`` arrays."""
        ...


class TablePairs:
    """Pairs that are listed.

    Args:
        first: ``(pairs,)`` rows.
        second: ``(pairs,)`` rows.
        items: rows are 0 to ``items - 1``; pairs with a row of -1, or of an item with itself, are
            left out.
        protocol: one sentence for the report.

    Raises:
        InteractionsError: no pair is left.
    """

    def __init__(
        self,
        first: npt.NDArray[np.integer],
        second: npt.NDArray[np.integer],
        items: int,
        *,
        protocol: str,
    ) -> None:
        keep = (first >= 0) & (second >= 0) & (first != second)
        if not keep.any():
            raise InteractionsError(
                f"no pair is left of {len(first)}: their items are unknown, held out for "
                "validation, or paired with themselves; check that pairs and embeddings share "
                "their ids (--ids, --id-column)"
            )
        self._first = first[keep].astype(np.int32)
        self._second = second[keep].astype(np.int32)
        self.count = len(self._first)
        self.positives = Positives(self._first, self._second, items)
        self.protocol = protocol

    def draw(self, size: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
        """Draw pairs with replacement."""
        chosen = generator.integers(0, self.count, size)
        return self._first[chosen].astype(np.int64), self._second[chosen].astype(np.int64)


class SequencePairs:
    """Consecutive items of sequences, drawn by position, so that pairs are never listed.

    Args:
        items: ``(interactions,)`` rows of all sequences one after another, -1 for gaps.
        offsets: ``(users + 1,)`` where each sequence begins.
        users: ``(users,)`` whose pairs are taken.
        count_items: rows are 0 to ``count_items - 1``.
        protocol: one sentence for the report.

    Raises:
        InteractionsError: these users have no two different consecutive items.

    Memory: 5 bytes an interaction of these users, and `Positives`.
    """

    def __init__(
        self,
        items: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        users: Mask,
        count_items: int,
        *,
        protocol: str,
    ) -> None:
        lengths = np.diff(offsets)
        # Only the chosen users' sequences are kept: what others do must not move a draw.
        self._items = items = items[np.repeat(users, lengths)]
        offsets = np.concatenate([[0], np.cumsum(lengths[users])])
        begins = np.zeros(max(len(items) - 1, 0), dtype=bool)
        if len(begins):
            begins[:] = (items[:-1] >= 0) & (items[1:] >= 0) & (items[:-1] != items[1:])
            ends = offsets[1:-1]  # a position that ends a sequence begins no pair
            begins[ends[(ends > 0) & (ends <= len(begins))] - 1] = False
        self._begins = begins
        self.count = int(begins.sum())
        if not self.count:
            raise InteractionsError(
                f"no two different known items follow each other in the history of the "
                f"{int(users.sum())} training users of {len(users)}; give more interactions, or "
                "set contrastive_weight=0"
            )
        self._share = self.count / len(begins)
        at = np.flatnonzero(begins)
        self.positives = Positives(items[at], items[at + 1], count_items)
        self.protocol = protocol

    def draw(self, size: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
        """Draw pairs with replacement, by drawing positions until enough begin a pair."""
        found: list[Rows] = []
        missing = size
        while missing > 0:
            tried = generator.integers(0, len(self._begins), int(missing / self._share) + 16)
            hits = tried[self._begins[tried]][:missing]
            found.append(hits)
            missing -= len(hits)
        at = np.concatenate(found)
        return self._items[at].astype(np.int64), self._items[at + 1].astype(np.int64)


@dataclass(frozen=True)
class Behavior:
    """Pairs to learn from and pairs to choose checkpoints by.

    Attributes:
        train: pairs of training users, or of the table.
        select: pairs of the users kept for selection, or None.
    """

    train: PairSource
    select: PairSource | None

    def digest(self) -> str:
        """Identify the pairs, so that a resume with others is refused."""
        digest = hashlib.sha256()
        for source in (self.train, self.select):
            digest.update(b"none" if source is None else source.positives.digest().encode())
        return digest.hexdigest()
