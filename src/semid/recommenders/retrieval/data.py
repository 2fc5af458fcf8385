"""Histories of users, their split into training, validation and test, and packed batches."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from semid.codes import SemanticIds
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds, held_out_mask
from semid.data.interactions import read_interactions
from semid.data.sequences import Sequences, offsets_of
from semid.errors import InteractionsError, UsageError

logger = logging.getLogger(__name__)

MIN_INTERACTIONS = 3
"""Shorter histories have no item to train on beside those that validate and test."""

TARGETS = {"validation": 2, "test": 1}
"""Place of the target, counted from the end of a user's items."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Packed(NamedTuple):
    """Several histories in few rows of one width, so that hardly a place is padding.

    Attributes:
        items: ``(rows, width)`` int64 catalogue rows; 0 where there is padding.
        segments: ``(rows, width)`` int64, from 1: which history a place belongs to; 0 for padding.
            A place sees the earlier ones of its segment alone.
        positions: ``(rows, width)`` int64 place within the history, from 0.
        places: ``(n,)`` int64 flat indices of the places that predict.
        targets: ``(n,)`` int64 catalogue rows of the items that follow them.
    """

    items: Tensor
    segments: Tensor
    positions: Tensor
    places: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Packed:
        """Move every tensor."""
        return Packed(*(tensor.to(device) for tensor in self))


def pack(histories: Sequence[Ints], targets: Sequence[Ints] | None = None) -> Packed:
    """Pack histories, each ``(n,)`` and not empty.

    With ``targets``, each ``(n,)``, every place predicts; without them the last place of each
    history does. Predictions stand in the order of the histories.
    """
    width = max(map(len, histories))
    # First fit, longest first: rows are filled up with shorter histories.
    free: list[int] = []
    spans: list[tuple[int, int]] = [(0, 0)] * len(histories)
    for number in np.argsort([-len(each) for each in histories], kind="stable").tolist():
        length = len(histories[number])
        row = len(free)
        if free and max(free) >= length:
            row = next(r for r, space in enumerate(free) if space >= length)
        else:
            free.append(width)
        spans[number] = (row, width - free[row])
        free[row] -= length
    items, segments, positions = (np.zeros((len(free), width), np.int64) for _ in range(3))
    places: list[Any] = []
    for number, (history, (row, start)) in enumerate(zip(histories, spans, strict=True)):
        here = slice(start, start + len(history))
        items[row, here], segments[row, here] = history, number + 1
        positions[row, here] = np.arange(len(history))
        first = row * width + start
        last = first + len(history)
        places.append(np.arange(first if targets is not None else last - 1, last))
    following = np.concatenate(targets) if targets is not None else np.zeros(len(histories))
    arrays = (items, segments, positions, np.concatenate(places), following.astype(np.int64))
    return Packed(*map(torch.from_numpy, arrays))


@dataclass(frozen=True, eq=False)
class RetrievalItems:
    """What models know of the catalogue.

    Attributes:
        ids: the item ids, in the order of the rows.
        counts: ``(items,)`` int64 training interactions; 0 for items that training never saw.
        codes: ``(items, levels)`` int64, or None.
        sizes: codes per level; empty without codes.
        vectors: ``(items, dim)`` float32 embeddings, or None.
    """

    ids: ItemIds
    counts: Ints
    codes: Ints | None = None
    sizes: tuple[int, ...] = ()
    vectors: Floats | None = None

    def __len__(self) -> int:
        """Count the items."""
        return len(self.ids)

    @cached_property
    def buckets(self) -> tuple[Ints, Ints]:
        """Distinct ids ``(buckets, levels)``, sorted, and the bucket ``(items,)`` of each item."""
        if self.codes is None:
            raise UsageError("there are no codes: give Semantic IDs (--ids, ids=)")
        distinct, bucket = np.unique(self.codes, axis=0, return_inverse=True)
        return distinct, bucket.reshape(-1)


@dataclass(frozen=True, eq=False)
class RetrievalData:
    """Users' items, oldest first, with leave-last-out: the last tests, the one before validates.

    Attributes:
        items: the catalogue.
        sequences: users with at least `MIN_INTERACTIONS` items of the catalogue.
        protocol: how the figures are measured, in one line.
    """

    items: RetrievalItems
    sequences: Sequences
    protocol: str

    def training(self, max_length: int) -> list[tuple[Ints, Ints]]:
        """Return inputs and the items that follow, each ``(n,)``; long histories in windows."""
        windows = []
        for user in range(len(self.sequences)):
            items = self.sequences[user][:-2].astype(np.int64)
            # A window's first input is the last target of the one before, so each item but the
            # first is a target once.
            for start in range(0, len(items) - 1, max_length):
                part = items[start : start + max_length + 1]
                windows.append((part[:-1], part[1:]))
        return windows

    def histories(self, part: str, max_length: int) -> tuple[list[Ints], Ints]:
        """Return each user's last items before the target, and the targets ``(users,)``.

        Args:
            part: ``validation`` or ``test``.
            max_length: items of a history at most; the newest are taken.
        """
        back = TARGETS[part]
        rows = [self.sequences[user].astype(np.int64) for user in range(len(self.sequences))]
        return [r[:-back][-max_length:] for r in rows], np.array([r[-back] for r in rows], np.int64)

    def training_log(self) -> pa.Table:
        """Return each user's items before the two targets, one row per user, oldest first.

        Fit tokenizers that learn from interactions on it: ids that learned from the whole log know
        its targets.
        """
        kept = self.sequences.lengths - max(TARGETS.values())
        from_start = np.arange(len(self.sequences.items))
        from_start -= np.repeat(self.sequences.offsets[:-1], self.sequences.lengths)
        rows = self.sequences.items[from_start < np.repeat(kept, self.sequences.lengths)]
        items = pa.LargeListArray.from_arrays(offsets_of(kept), self.items.ids.strings().take(rows))
        return pa.table({"user_id": self.sequences.user_ids, "item_id": items})

    @property
    def digest(self) -> str:
        """SHA-256 of everything that a run trains on."""
        items = self.items
        arrays = [self.sequences.offsets, self.sequences.items, items.codes, items.vectors]
        digest = hashlib.sha256(items.ids.hash64().tobytes())
        for array in arrays:
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def prepare_retrieval_data(
    interactions: Any,
    *,
    ids: SemanticIds | None = None,
    embeddings: Any = None,
    items: Any = None,
    cold_items: float = 0.0,
    catalogue: ItemIds | None = None,
    **columns: Any,
) -> RetrievalData:
    """Split a log for training and evaluation of next-item models.

    Args:
        interactions: the log, as `semid.read_interactions` reads it; it needs an order.
        ids: Semantic IDs; their items are the catalogue.
        embeddings: vectors of the items, for models that read them.
        items: item ids of ``embeddings`` that have none.
        cold_items: share of the catalogue, chosen by a hash of the id, that leaves all training
            histories: these items are then targets that training never saw.
        catalogue: the candidates, instead of the items of ``ids``.
        columns: names of columns and the order of ties, as for `semid.read_interactions`.

    Returns:
        Users with at least three items of the catalogue. Items that are not in it are left out of
        the histories; a warning counts them.

    Raises:
        InteractionsError: no order, no known item, or no user with three items.
        UsageError: ``ids`` and ``embeddings`` of different items.
    """
    log = read_interactions(interactions, rating_column="", **columns)
    opened = None if embeddings is None else open_embeddings(embeddings, ids=items)
    if catalogue is None:
        if ids is not None:
            catalogue = ids.items
        else:
            catalogue = ItemIds(log.item_ids) if opened is None else opened.ids
    # An item that is not in the catalogue can be neither read nor recommended.
    sequences = log.sequences(catalogue)
    sequences = _known_only(sequences)
    enough = sequences.lengths >= MIN_INTERACTIONS
    if not enough.any():
        longest = int(sequences.lengths.max(initial=0))
        raise InteractionsError(
            f"no user of {log.label} has {MIN_INTERACTIONS} interactions with items of the "
            f"catalogue (the longest history has {longest}): leave-last-out needs one item to "
            "train on, one to validate and one to test; give longer histories"
        )
    users = len(sequences)
    sequences = sequences.select(enough)
    if users > len(sequences):
        logger.warning(
            "%d of %d users have fewer than %d interactions with items of the catalogue and are "
            "left out",
            *(users - len(sequences), users, MIN_INTERACTIONS),
        )
    cold = held_out_mask(catalogue, cold_items, salt="cold items")
    if cold_items:
        sequences = _without_cold(sequences, cold)
    counts = _training_counts(sequences, len(catalogue))
    if not counts.any():
        raise InteractionsError(f"{log.label} leaves nothing to train on; give longer histories")
    # Embeddings are brought into the order of the catalogue, which is that of the ids.
    vectors = None
    if opened is not None:
        rows = opened.ids.index_of(catalogue.strings())
        if (rows < 0).any():
            first = catalogue[int(np.argmax(rows < 0))]
            raise UsageError(
                f"{int((rows < 0).sum())} of {len(catalogue)} items with Semantic IDs have no "
                f"embedding (first: '{first}'); give embeddings of all of them"
            )
        vectors = opened.rows(rows)
    codes = None if ids is None else ids.codes.astype(np.int64)
    sizes = () if ids is None else tuple(ids.info.codebook_sizes)
    words = [
        f"leave-last-out of {len(sequences):,} users with {MIN_INTERACTIONS} or more items",
        f"order by {log.order_text}",
        f"{len(catalogue):,} candidates",
        f"{cold_items:g} of the items held out of training" if cold_items else "",
    ]
    return RetrievalData(
        RetrievalItems(catalogue, counts, codes, sizes, vectors),
        sequences,
        "; ".join(filter(None, words)),
    )


def _known_only(sequences: Sequences) -> Sequences:
    """Leave unknown items out of all histories."""
    known = sequences.items >= 0
    owner = np.repeat(np.arange(len(sequences)), sequences.lengths)
    counts = np.bincount(owner[known], minlength=len(sequences))
    return Sequences(
        sequences.user_ids, offsets_of(counts), sequences.items[known], sequences.ordered
    )


def _without_cold(sequences: Sequences, cold: npt.NDArray[np.bool_]) -> Sequences:
    """Leave cold items out of training histories; where they validate or test they stay."""
    ends = np.repeat(sequences.offsets[1:], sequences.lengths)
    from_end = ends - np.arange(len(sequences.items))
    # The last two items of a user stay whatever they are: they are targets, not training.
    keep = ~cold[sequences.items] | (from_end <= max(TARGETS.values()))
    owner = np.repeat(np.arange(len(sequences)), sequences.lengths)
    counts = np.bincount(owner[keep], minlength=len(sequences))
    warm = Sequences(
        sequences.user_ids, offsets_of(counts), sequences.items[keep], sequences.ordered
    )
    return warm.select(warm.lengths >= MIN_INTERACTIONS)


def _training_counts(sequences: Sequences, items: int) -> Ints:
    """Count the training interactions of each item: all but each user's last two."""
    # Place of each interaction from the end of its user's: 1 is the test target.
    ends = np.repeat(sequences.offsets[1:], sequences.lengths)
    trained = ends - np.arange(len(sequences.items)) > max(TARGETS.values())
    counts: Ints = np.bincount(sequences.items[trained], minlength=items)
    return counts


def check_arrays(items: RetrievalItems, sequences: Sequences) -> None:
    """Refuse arrays of a damaged file that do not go together."""
    count = len(items)
    if items.counts.shape != (count,):
        raise ValueError(f"{items.counts.shape} counts for {count} items")
    if items.codes is not None:
        codes = items.codes
        if codes.shape != (count, len(items.sizes)) or codes.min(initial=0) < 0:
            raise ValueError(f"codes have shape {codes.shape}")
        if (codes >= np.array(items.sizes)).any():
            raise ValueError("a code is outside its codebook")
    offsets = sequences.offsets
    ends = offsets[-1] if len(offsets) else -1
    if (np.diff(offsets) < 0).any() or ends != len(sequences.items):
        raise ValueError("the histories do not end where their items end")
    if len(offsets) != len(sequences.user_ids) + 1:
        raise ValueError(f"{len(offsets) - 1} histories of {len(sequences.user_ids)} users")
    inside = (sequences.items >= 0) & (sequences.items < count)
    if not inside.all():
        raise ValueError("a history names an item outside the catalogue")
