"""How codes relate to behavior: item pairs from interactions or relations, and their measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.data.ids import ItemIds
from semid.data.interactions import TEST, Interactions, split_users
from semid.data.tables import open_table
from semid.diagnostics.auc import negative_pairs, pair_aucs
from semid.diagnostics.discrete import discrete_retrieval
from semid.diagnostics.pairs import ItemPairs, item_pairs
from semid.diagnostics.retrieval import CUTOFFS, item_retrieval
from semid.errors import InteractionsError
from semid.report.results import Behavior, PairResults

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pool:
    """The items among which to search: codes (items, levels) and embeddings by name."""

    codes: npt.NDArray[Any]
    codebooks: Sequence[Array]
    embeddings: Mapping[str, Array]  # (items, width); the first is the original
    hierarchical: bool  # whether prefixes mean relatedness


def choose_cutoffs(cutoffs: Sequence[int] | None, items: int) -> tuple[tuple[int, ...], list[str]]:
    """Return the cutoffs, by default the usual ones that the pool is large enough for."""
    if cutoffs is not None:
        return tuple(cutoffs), []
    usual = tuple(k for k in CUTOFFS if k < items)
    if usual == CUTOFFS:
        return usual, []
    smaller = usual or (max(items // 10, 1),)
    return smaller, [
        f"The pool of {items:,} items is too small for the usual cutoffs "
        f"{', '.join(map(str, CUTOFFS))}; hit rates are at {', '.join(map(str, smaller))}"
    ]


def behavior_pairs(
    interactions: Interactions, ids: ItemIds
) -> tuple[ItemPairs | None, Behavior, list[str]]:
    """Pair each item of the test users with the next one; also counts, and notes."""
    sequences = interactions.sequences(ids, require_order=False)
    test = split_users(interactions.user_ids) == TEST
    behavior = Behavior(
        interactions=len(interactions),
        users=len(test),
        test_users=int(test.sum()),
        unknown_interactions=sequences.unknown,
        order=interactions.order_text if sequences.ordered else None,
    )
    notes = []
    if sequences.unknown:
        notes.append(
            f"{sequences.unknown:,} of {len(interactions):,} interactions are with items outside "
            "the catalogue; they count as gaps, and nothing is paired across them"
        )
    if not sequences.ordered:
        notes.append(
            "The interactions have no order (no column 'position' or 'timestamp'), so retrieval "
            "and AUCs, which need consecutive items, are left out"
        )
        return None, behavior, notes
    # Test users are a tenth by a hash of their id: no fit uses their interactions.
    consecutive = sequences.consecutive_pairs(test)
    first, second = consecutive.pairs[:, 0], consecutive.pairs[:, 1]
    if not (first != second).any():
        raise InteractionsError(
            f"{interactions.label}: no two different items of the catalogue follow each other in "
            f"the history of a test user ({int(test.sum()):,} of {len(test):,} users are test "
            "users, a tenth by a hash of their id); give more users, or leave interactions out"
        )
    pairs = item_pairs(first, second, pool=len(ids), users=consecutive.users)
    return pairs, behavior, notes


def measure_pairs(
    pairs: ItemPairs,
    pool: Pool,
    *,
    cutoffs: Sequence[int],
    seed: int,
    replicates: int,
    threads: int | None,
) -> PairResults:
    """Measure retrieval by embedding and by codes, and AUCs, on one set of pairs."""
    original, *reconstructions = pool.embeddings
    options: dict[str, Any] = {"cutoffs": cutoffs, "seed": seed, "replicates": replicates}
    retrieval = item_retrieval(
        pool.embeddings[original],
        {name: pool.embeddings[name] for name in reconstructions},
        pairs,
        threads=threads,
        **options,
    )
    discrete = discrete_retrieval(
        pool.codes, pairs, hierarchical=pool.hierarchical, threads=threads, **options
    )
    aucs = pair_aucs(
        pool.codes,
        pool.codebooks,
        pairs,
        negative_pairs(pairs, seed=seed),
        hierarchical=pool.hierarchical,
        embeddings=pool.embeddings,
        replicates=replicates,
        threads=threads,
    )
    return PairResults(pairs.counts(), tuple(cutoffs), retrieval, discrete, aucs)


def relations(source: Any, ids: ItemIds) -> tuple[dict[str, ItemPairs], list[str]]:
    """Read item pairs of a second ground truth by kind, and notes.

    Columns are ``item_id``, ``related_item_id`` and, for pairs of several kinds, ``relation``.
    """
    opened = open_table(source, what="relations", error=InteractionsError)
    columns = ["item_id", "related_item_id"]
    for column in columns:
        opened.require(column, flag="the column's name in the file")
    if "relation" in opened.names:
        columns.append("relation")
    table = opened.read(columns, text=columns)
    first = ids.index_of(table["item_id"].combine_chunks())
    second = ids.index_of(table["related_item_id"].combine_chunks())
    kinds: npt.NDArray[Any] = np.full(len(table), "related", dtype=object)
    if "relation" in table.column_names:
        kinds = table["relation"].cast(pa.large_string()).to_numpy()
    # Ids outside the catalogue have row -1.
    unknown = int(((first < 0) | (second < 0)).sum())
    notes = []
    if unknown:
        notes.append(
            f"{unknown:,} of {len(table):,} pairs of {opened.label} name an item outside the "
            "catalogue and are left out"
        )
    pairs = {}
    for kind in sorted({str(kind) for kind in kinds}):
        rows = kinds == kind
        pairs[kind] = item_pairs(first[rows], second[rows], pool=len(ids))
    return pairs, notes
