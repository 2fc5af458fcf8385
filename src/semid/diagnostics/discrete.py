"""Retrieval by codes alone: longest common prefix or number of equal codes, ties at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.diagnostics.pairs import ItemPairs, PairCounts, require_pool
from semid.diagnostics.retrieval import (
    CUTOFFS,
    HitRates,
    Ints,
    check_cutoffs,
    group_by_query,
    hit_rates,
)
from semid.health import bucket_keys, check_codes
from semid.lazy import kernel
from semid.quantization.threads import map_blocks
from semid.results import Result
from semid.seeds import numpy_generator

_QUERIES = 4096  # queries per block of the search by equal codes


@dataclass(frozen=True)
class DiscreteRanks:
    """Position of each pair's target in its query's list."""

    rank: Ints  # position under the seeded order of ties, from 0, int64 ``(pairs,)``
    better: Ints  # number of candidates that match the query more than the target does
    tied: Ints  # number of candidates that match it as much, the target among them
    match: Ints  # length of the common prefix, or number of equal codes, of query and target

    def expected_hits(self, k: int) -> npt.NDArray[np.float64]:
        """Return each pair's probability of a hit at ``k``, averaged over all orders of ties."""
        return np.clip((k - self.better) / self.tied, 0.0, 1.0)


def _prefix_ranks(codes: npt.NDArray[Any], pairs: ItemPairs, order: Ints) -> DiscreteRanks:
    """Rank by common prefix without listing candidates; ``order`` is the priority among ties.

    Candidates that share the first ``match`` codes with the query and differ in the next one tie
    with the target. They are the group of depth ``match`` less the group of depth ``match + 1``,
    so sizes of groups and positions inside them give every count.
    """
    items, levels = codes.shape
    q, t = pairs.queries, pairs.targets
    match = np.logical_and.accumulate(codes[q] == codes[t], axis=1).sum(1)
    better, tied = np.zeros(len(q), np.int64), np.zeros(len(q), np.int64)
    rank = np.zeros(len(q), np.int64)
    for depth in range(levels + 1):
        group = np.zeros(items, np.int64)  # at depth 0, one group of all items
        if depth:
            group = np.unique(bucket_keys(codes[:, :depth]), return_inverse=True)[1]
        # (group, priority) in one sorted number: a group is a range of it, by priority, so the
        # number of its members with a lower priority is a position inside the range.
        places = np.sort(group * items + order)
        starts = np.searchsorted(places, np.arange(int(group.max()) + 2) * items)
        sizes = np.diff(starts)
        # Pairs whose common prefix ends here: the whole group ties, for now.
        at = match == depth
        g = group[q[at]]
        before = np.searchsorted(places, g * items + order[t[at]]) - starts[g]
        tied[at] += sizes[g]
        rank[at] += before
        # Pairs whose common prefix ended one level before: the items that still share a prefix
        # with the query match it better, so they are no ties but precede the target.
        at = match == depth - 1
        g = group[q[at]]
        before = np.searchsorted(places, g * items + order[t[at]]) - starts[g]
        better[at] = sizes[g] - 1  # without the query, which is no candidate
        tied[at] -= sizes[g]
        rank[at] += better[at] - before
    # Pairs of one whole id have no depth after the last: take the query out of their group here.
    whole = match == levels
    tied[whole] -= 1
    rank[whole] -= order[q[whole]] < order[t[whole]]
    return DiscreteRanks(rank, better, tied, match)


@kernel()
def _count_ranks(
    codes: Ints,
    posting: Ints,
    starts: Ints,
    order: Ints,
    queries: Ints,
    case_starts: Ints,
    targets: Ints,
    out: Ints,
) -> None:
    """Write rank, better and tied of the targets of some queries to ``out`` (targets, 3).

    ``codes`` (items, levels) are offset so that no two levels share one. The items of a code lie in
    ``posting`` from ``starts`` of it on, the ``targets`` of a query from ``case_starts`` of it on.
    ``order`` is the priority of each item among ties.
    """
    items, levels = codes.shape
    equal = np.zeros(items, np.int64)
    touched = np.empty(items, np.int64)
    for i in range(len(queries)):
        q = queries[i]
        # Walk the lists of the items that share a code with the query and count matches per item.
        count = 0
        for level in range(levels):
            code = codes[q, level]
            for p in range(starts[code], starts[code + 1]):
                item = posting[p]
                if equal[item] == 0 and item != q:
                    touched[count] = item
                    count += 1
                if item != q:
                    equal[item] += 1
        for case in range(case_starts[i], case_starts[i + 1]):
            t = targets[case]
            better, tied, ahead, earlier = 0, 0, 0, 0
            for p in range(count):
                item = touched[p]
                if equal[item] > equal[t]:
                    better += 1
                elif equal[item] == equal[t]:
                    tied += 1
                    ahead += order[item] < order[t]
                earlier += order[item] < order[t]
            if equal[t] == 0:
                # The target shares no code with the query and ties with the rest of the pool,
                # which is not listed: count it as all candidates less the listed ones.
                tied = items - 1 - count
                ahead = order[t] - earlier - (order[q] < order[t])
            out[case, 0] = better + ahead
            out[case, 1] = better
            out[case, 2] = tied
        for p in range(count):
            equal[touched[p]] = 0


def _equal_ranks(
    codes: npt.NDArray[Any], pairs: ItemPairs, order: Ints, threads: int | None
) -> DiscreteRanks:
    """Rank by number of equal codes, from the lists of items of each code."""
    items, levels = codes.shape
    # Number the codes in use through all levels, so that one array of lists serves them all.
    dense = np.empty((items, levels), np.int64)
    offset = 0
    for level in range(levels):
        dense[:, level] = offset + np.unique(codes[:, level], return_inverse=True)[1]
        offset = int(dense[:, level].max()) + 1
    # The items of each code, one code after the other, and where each list starts.
    flat = dense.T.ravel()
    posting = np.argsort(flat, kind="stable") % items
    starts = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=offset))])
    by_query, queries, bounds = group_by_query(pairs)  # pairs of one query share its search
    targets = pairs.targets[by_query]
    by_target = np.empty((len(targets), 3), np.int64)

    def work(start: int) -> None:
        stop = min(start + _QUERIES, len(queries))
        a, b = bounds[start], bounds[stop]
        cases = bounds[start : stop + 1] - a
        out = by_target[a:b]
        _count_ranks(dense, posting, starts, order, queries[start:stop], cases, targets[a:b], out)

    map_blocks(work, range(0, len(queries), _QUERIES), threads=threads)
    result = np.empty_like(by_target)
    result[by_query] = by_target
    match = (codes[pairs.queries] == codes[pairs.targets]).sum(1)
    return DiscreteRanks(result[:, 0], result[:, 1], result[:, 2], match)


def discrete_ranks(
    codes: npt.ArrayLike,
    pairs: ItemPairs,
    *,
    hierarchical: bool,
    seed: int = 0,
    threads: int | None = None,
) -> DiscreteRanks:
    """Return each target's exact position in its query's list, without listing candidates.

    Candidates are all items of the pool but the query, ranked by longest common prefix
    (``hierarchical``) or by number of equal codes ``(pool, levels)``. Ties, which are most of the
    list, are in one seeded random order of the items, never in item order.

    Cost: by prefix ``levels * pool log pool``; by equal codes, per query, the items that share a
    code with it.
    """
    array = check_codes(codes)
    require_pool("the array of codes", array, pairs)
    order = numpy_generator(seed, "ties").permutation(len(array))
    if hierarchical:
        return _prefix_ranks(array, pairs, order)
    return _equal_ranks(array, pairs, order, threads)


@dataclass(frozen=True)
class DiscreteRetrieval(Result):
    """Hit rates of retrieval by codes."""

    hierarchical: bool  # whether by prefix (True) or by number of equal codes
    seed: int  # of the order of ties
    pairs: PairCounts  # counts of the pairs
    # hit rates with the first 1, 2, ... levels; the last is the whole id
    depths: tuple[HitRates, ...]
    expected: tuple[HitRates, ...]  # the same averaged over all orders of ties: no seed enters


def discrete_retrieval(
    codes: npt.ArrayLike,
    pairs: ItemPairs,
    *,
    hierarchical: bool,
    cutoffs: Sequence[int] = CUTOFFS,
    seed: int = 0,
    replicates: int = 1000,
    threads: int | None = None,
) -> DiscreteRetrieval:
    """Measure HR@K of retrieval by codes ``(pool, levels)``, with the first 1, 2, ... levels.

    Ranks are those of `discrete_ranks`; the other arguments are those of `item_retrieval`.

    Source: DRQ section 5.5; the order of ties is ours.
    """
    ks = check_cutoffs(cutoffs, pairs.pool)
    array = check_codes(codes)
    depths, expected = [], []
    options: dict[str, Any] = {"replicates": replicates, "seed": seed}
    for depth in range(1, array.shape[1] + 1):
        ranks = discrete_ranks(
            array[:, :depth], pairs, hierarchical=hierarchical, seed=seed, threads=threads
        )
        name = f"levels 1-{depth}" if hierarchical else f"codebooks 1-{depth}"
        hits = np.stack([ranks.rank < k for k in ks], axis=1).astype(np.float64)
        depths.append(hit_rates(name, hits, ks, pairs, **options))
        chances = np.stack([ranks.expected_hits(k) for k in ks], axis=1)
        expected.append(hit_rates(f"{name}, expected", chances, ks, pairs, **options))
    return DiscreteRetrieval(hierarchical, seed, pairs.counts(), tuple(depths), tuple(expected))
