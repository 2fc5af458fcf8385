"""Behavior to learn from: pairs of items, drawn from sequences, tables or nearest neighbors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds
from semid.data.interactions import SELECT, TRAIN, read_interactions, split_users
from semid.data.source import EmbeddingSource
from semid.data.tables import is_frame, open_table
from semid.errors import InteractionsError, UsageError
from semid.lazy import torch
from semid.quantization.nearest import index_database, top_k

Array = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Positives:
    """Which items are positives of which, in both directions, as sorted neighbor lists.

    Memory: 4 bytes per distinct pair and direction, 8 per item.
    """

    def __init__(
        self, first: npt.NDArray[np.integer], second: npt.NDArray[np.integer], items: int
    ) -> None:
        a, b = first.astype(np.int64), second.astype(np.int64)
        # Each pair as one number, once per direction: sorting the numbers sorts the neighbor lists
        # and puts those of one item side by side.
        keys = np.unique(np.concatenate([a * items + b, b * items + a]))
        self._offsets = np.searchsorted(keys // items, np.arange(items + 1))
        self._others = (keys % items).astype(np.int32)

    def digest(self) -> str:
        """Return the SHA-256 of the lists."""
        digest = hashlib.sha256(self._offsets.tobytes())
        digest.update(self._others.tobytes())
        return digest.hexdigest()

    def of(self, item: int) -> npt.NDArray[np.int32]:
        """Return the positives of one item, rising."""
        return self._others[self._offsets[item] : self._offsets[item + 1]]

    def excluded(self, first: Rows, second: Rows) -> Mask:
        """Return which ``second[j]`` is no negative for ``first[i]``, both ``(n,)``: ``(n, n)``."""
        excluded: Mask = np.equal(first[:, None], second[None, :])
        order = np.argsort(second, kind="stable")
        sorted_second = second[order]
        # List the positives of all anchors one after another: `neighbors[k]` is a positive of
        # `first[anchors[k]]`, `within[k]` its place in that anchor's list.
        lengths = self._offsets[first + 1] - self._offsets[first]
        anchors = np.repeat(np.arange(len(first)), lengths)
        within = np.arange(len(anchors)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        neighbors = self._others[self._offsets[first][anchors] + within]
        # Where each of them stands in the batch: an item may stand there several times, as the run
        # `low` to `high` of the sorted batch, so the mask is set one place of the runs at a time.
        low = np.searchsorted(sorted_second, neighbors, side="left")
        high = np.searchsorted(sorted_second, neighbors, side="right")
        for shift in range(int((high - low).max(initial=0))):
            occurs = low + shift < high
            excluded[anchors[occurs], order[low[occurs] + shift]] = True
        np.fill_diagonal(excluded, False)
        return excluded


class PairSource(Protocol):
    """Where pairs come from."""

    positives: Positives  # all pairs, to exclude false negatives
    count: int  # pairs to draw from; repeats count
    protocol: str  # one sentence that says which data the pairs come from

    def draw(self, size: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
        """Draw pairs with replacement, each as likely as any other: two ``(size,)`` arrays."""
        ...


class TablePairs:
    """Pairs that are listed, but for those with a row of -1 or of an item with itself."""

    def __init__(
        self,
        first: npt.NDArray[np.integer],
        second: npt.NDArray[np.integer],
        items: int,
        *,
        protocol: str,
    ) -> None:
        usable = (first >= 0) & (second >= 0) & (first != second)
        if not usable.any():
            raise InteractionsError(
                f"no pair is left of {len(first)}: their items are unknown, held out for "
                "validation, or paired with themselves; check that pairs and embeddings share "
                "their ids (--ids, --id-column)"
            )
        self._first = first[usable].astype(np.int32)
        self._second = second[usable].astype(np.int32)
        self.count = len(self._first)
        self.positives = Positives(self._first, self._second, items)
        self.protocol = protocol

    def draw(self, size: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
        """Draw pairs with replacement."""
        pairs = generator.integers(0, self.count, size)
        return self._first[pairs].astype(np.int64), self._second[pairs].astype(np.int64)


class SequencePairs:
    """Consecutive items of sequences, drawn by position, so that pairs are never listed.

    ``items`` (interactions,) holds all sequences one after another, -1 for gaps; ``offsets``
    (users + 1,) where each begins; ``users`` (users,) whose pairs are used. Memory: 5 bytes per
    interaction of these users, and `Positives`.
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
        # Sequences of other users are dropped: what they do must not move a draw.
        self._items = items = items[np.repeat(users, lengths)]
        offsets = np.concatenate([[0], np.cumsum(lengths[users])])
        # Position p begins a pair if items p and p + 1 are known and differ ...
        begins = np.zeros(max(len(items) - 1, 0), dtype=bool)
        if len(begins):
            begins[:] = (items[:-1] >= 0) & (items[1:] >= 0) & (items[:-1] != items[1:])
            # ... and p is not the last position of a sequence.
            ends = offsets[1:-1]
            begins[ends[(ends > 0) & (ends <= len(begins))] - 1] = False
        self._begins = begins
        self.count = int(begins.sum())
        if not self.count:
            raise InteractionsError(
                f"no two different known items follow each other in the history of the "
                f"{int(users.sum())} training users of {len(users)}; give more interactions, or "
                "set contrastive_weight=0"
            )
        positions = np.flatnonzero(begins)
        self.positives = Positives(items[positions], items[positions + 1], count_items)
        self.protocol = protocol

    def draw(self, size: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
        """Draw pairs with replacement, by drawing positions until enough begin a pair."""
        accepted: list[Rows] = []
        missing = size
        while missing > 0:
            # Rejection sampling: positions are uniform, so accepted ones are uniform over pairs.
            # Draw as many as should give the missing ones, and a few more.
            draws = int(missing / (self.count / len(self._begins))) + 16
            drawn = generator.integers(0, len(self._begins), draws)
            accepted.append(drawn[self._begins[drawn]][:missing])
            missing -= len(accepted[-1])
        positions = np.concatenate(accepted)
        first, second = self._items[positions], self._items[positions + 1]
        return first.astype(np.int64), second.astype(np.int64)


@dataclass(frozen=True)
class Behavior:
    """Pairs to learn from (of training users, or of a table) and, if any, to choose epochs by."""

    train: PairSource
    select: PairSource | None

    def digest(self) -> str:
        """Identify the pairs, so that a resume with others is refused."""
        digest = hashlib.sha256()
        for source in (self.train, self.select):
            digest.update(b"none" if source is None else source.positives.digest().encode())
        return digest.hexdigest()


QUERY_ROWS = 4096


@dataclass(frozen=True)
class Neighbors:
    """Pairs of each item with its nearest neighbors in a second embedding, by cosine.

    Attributes:
        source: embeddings of the same items: anything `semid.open_embeddings` reads.
        k: neighbors per item, at least 1.
        ids: item ids for a source that has none.
    """

    source: Any
    k: int = 5
    ids: Any = None


def read_behavior(
    interactions: Any,
    pairs: Any,
    *,
    ids: ItemIds,
    train: npt.NDArray[np.bool_],
    threads: int | None = None,
) -> Behavior | None:
    """Return pairs in numbers of training rows, from interactions or pairs; None without both."""
    if interactions is None and pairs is None:
        return None
    if interactions is not None and pairs is not None:
        raise UsageError(
            "both interactions and pairs were given; give one of --interactions and --pairs "
            "(interactions=, pairs=) to learn from"
        )
    rows = np.where(train, np.cumsum(train) - 1, -1)
    if interactions is not None:
        return _from_interactions(interactions, ids, rows)
    first, second, origin = _read_pairs(pairs, ids, threads)
    if not ((first >= 0) & (second >= 0)).any():
        raise InteractionsError(
            f"none of the {len(first)} pairs has both items in the catalogue of {len(ids)}, whose "
            f"ids are like {ids.example}; check --pairs and --ids (pairs=, ids=)"
        )
    # Pairs of held-out items are dropped: what they go with must not be learned.
    table = TablePairs(
        _train_rows(rows, first),
        _train_rows(rows, second),
        int(train.sum()),
        protocol=f"contrastive pairs: {origin}; items held out for validation left out",
    )
    return Behavior(table, None)


def _train_rows(rows: Rows, items: npt.NDArray[np.integer]) -> Rows:
    """Map catalogue rows to training rows; -1 stays -1."""
    mapped: Rows = np.where(items >= 0, rows[items], -1)
    return mapped


def _from_interactions(interactions: Any, ids: ItemIds, rows: Rows) -> Behavior:
    log = read_interactions(interactions)
    sequences = log.sequences(ids)
    # Training users teach, selection users choose the epoch, test users are for evaluation.
    part = split_users(log.user_ids)
    items = _train_rows(rows, sequences.items).astype(np.int32)
    count = int(rows.max()) + 1

    def of(users: npt.NDArray[np.bool_], name: str) -> PairSource:
        return SequencePairs(
            items,
            sequences.offsets,
            users,
            count,
            protocol=f"contrastive pairs: consecutive items of {int(users.sum())} {name} users of "
            f"{len(part)} (80/10/10 by a hash of their id, order by {log.order_text}); test "
            "users and items held out for validation never seen",
        )

    train = of(part == TRAIN, "training")
    try:
        select = of(part == SELECT, "selection")
    except InteractionsError:  # too few users for pairs to choose by: the error decides alone
        select = None
    return Behavior(train, select)


def check_behavior(kind: str, weights: Mapping[str, float], **sources: Any) -> None:
    """Refuse interactions or pairs that a fit would not use, and a fit that lacks them.

    ``weights`` are those by which the tokenizer learns from behavior, ``sources`` what is given.
    """
    names = [name for name, source in sources.items() if source is not None]
    learns = any(weight > 0 for weight in weights.values())
    if learns and not names:
        raise missing_behavior(kind, weights)
    if names and not weights:
        raise UsageError(
            f"{kind} learns from embeddings alone, so {' and '.join(names)} (--{names[0]}) would "
            "not be used; leave them out, or take drqvae with --contrastive-weight "
            "(contrastive_weight=) above 0"
        )
    if names and not learns:
        weight = next(iter(weights))
        raise UsageError(
            f"interactions or pairs were given and {weight}=0, so they would not be used; give "
            f"--{weight.replace('_', '-')} ({weight}=) above 0, or leave them out"
        )


def missing_behavior(kind: str, weights: Mapping[str, float]) -> UsageError:
    """Return the refusal of a fit without the behavior that weights above 0 ask for."""
    off = " and ".join(
        f"--{name.replace('_', '-')} 0 ({name}=)" for name, weight in weights.items() if weight > 0
    )
    return UsageError(
        f"{kind} learns from behavior and needs pairs; give --interactions or --pairs "
        f"(interactions=, pairs=), or {off} to learn without them"
    )


def _read_pairs(pairs: Any, ids: ItemIds, threads: int | None) -> tuple[Rows, Rows, str]:
    if isinstance(pairs, Neighbors):
        return _neighbors(pairs, ids, threads)
    if isinstance(pairs, str | Path) or is_frame(pairs):
        columns = ["item_id", "related_item_id"]
        source = open_table(pairs, what="pairs", error=InteractionsError)
        for column in columns:
            source.require(column, flag="the column's name in the file")
        table = source.read(columns, text=columns)
        first, second = (ids.index_of(column.combine_chunks()) for column in table.columns)
        return first, second, f"{len(table)} pairs of {source.label}"
    array = np.asarray(pairs)
    if array.ndim != 2 or array.shape[1] != 2:
        raise UsageError(
            f"pairs have shape {array.shape}; give (n, 2) item ids or row numbers, a table or path "
            "with 'item_id' and 'related_item_id', or semid.Neighbors"
        )
    label = f"{len(array)} pairs given as an array"
    if array.dtype.kind in "iu":
        outside = (array < 0) | (array >= len(ids))
        if outside.any():
            raise UsageError(
                f"{int(outside.any(axis=1).sum())} pairs hold row numbers outside 0 to "
                f"{len(ids) - 1}; give rows of the embeddings, or ids as strings"
            )
        return array[:, 0].astype(np.int64), array[:, 1].astype(np.int64), label
    strings = [pa.array(array[:, side].astype(str), pa.large_string()) for side in (0, 1)]
    return ids.index_of(strings[0]), ids.index_of(strings[1]), label


def _neighbors(neighbors: Neighbors, ids: ItemIds, threads: int | None) -> tuple[Rows, Rows, str]:
    """Pair every item with its ``k`` nearest others; reads the second embedding into memory."""
    second: EmbeddingSource = open_embeddings(neighbors.source, ids=neighbors.ids)
    if neighbors.k < 1:
        raise UsageError(f"Neighbors k={neighbors.k}: give at least 1")
    positions = second.ids.index_of(ids.to_arrow())
    known = np.flatnonzero(positions >= 0)
    if len(known) <= neighbors.k:
        raise InteractionsError(
            f"only {len(known)} of {len(ids)} items have a second embedding; {neighbors.k} "
            "neighbors need more: give embeddings of the same items (--neighbors, --ids)"
        )
    matrix = torch.from_numpy(second.rows(positions[known]))
    base = index_database(matrix)
    nearest = np.empty((len(known), neighbors.k), dtype=np.int64)
    # In blocks of queries, each of which leaves itself out.
    for start in range(0, len(known), QUERY_ROWS):
        stop = min(start + QUERY_ROWS, len(known))
        rows = torch.arange(start, stop)
        best = top_k(matrix[start:stop], base, neighbors.k, exclude=rows, threads=threads)
        nearest[start:stop] = best.indices.numpy()
    first = np.repeat(known, neighbors.k)
    return first, known[nearest.reshape(-1)], f"{neighbors.k} nearest neighbors in {second.label}"
