"""Item-to-item retrieval by embeddings: hit rates and what a reconstruction retains of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.diagnostics.pairs import (
    Estimate,
    ItemPairs,
    PairCounts,
    bootstrap,
    cluster_sums,
    require_pool,
)
from semid.diagnostics.spaces import Matrix, as_block, as_matrix, nearest_entries, row_blocks
from semid.errors import InputError, UsageError
from semid.quantization import engine
from semid.quantization.engine.plain import METRICS
from semid.quantization.nearest import MAX_NEIGHBORS
from semid.results import Result
from semid.seeds import numpy_generator

CUTOFFS = (20, 50, 100, 200)
"""The K of HR@K, the paper's."""

_QUERIES = 16_384  # queries per search; their lists of 200 take 26 MB

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HitRates(Result):
    """HR@K of one way to retrieve."""

    name: str  # which way
    # K -> share of the pairs whose target is among the first K, with its interval
    rates: dict[int, Estimate]


@dataclass(frozen=True)
class Retention(Result):
    """How much of the original embedding's retrieval a reconstruction retains."""

    name: str  # which reconstruction, ``decoder(codes)`` or ``decoder(z)``
    # K -> ``(HR_rec - HR_random) / (HR_orig - HR_random)``, not bounded by 1; None where the
    # original is not better than chance
    above_chance: dict[int, Estimate | None]
    # K -> ``HR_rec / HR_orig``; None where the original has no hit
    plain: dict[int, Estimate | None]


@dataclass(frozen=True)
class ItemRetrieval(Result):
    """Item-to-item retrieval by embeddings."""

    pairs: PairCounts  # counts of the pairs and of those left out
    seed: int  # of the order of ties and of the bootstrap
    # ``original``, each reconstruction, ``random`` (closed form ``K / (N - 1)``)
    hit_rates: tuple[HitRates, ...]
    retention: tuple[Retention, ...]  # one per reconstruction


def check_cutoffs(cutoffs: Sequence[int], pool: int) -> tuple[int, ...]:
    """Return the cutoffs as a tuple, checked against the pool of candidates."""
    ks = tuple(int(k) for k in cutoffs)
    if not ks or min(ks) < 1:
        raise UsageError(f"cutoffs={list(ks)}: at least one, each at least 1, is needed")
    if max(ks) > pool - 1:
        raise InputError(
            f"cutoff {max(ks)} is larger than the {pool - 1} candidates of a pool of {pool} items; "
            "give smaller cutoffs"
        )
    return ks


def hit_rates(
    name: str, hits: Floats, ks: Sequence[int], pairs: ItemPairs, **options: Any
) -> HitRates:
    """Average hits ``(pairs, cutoffs)``, or probabilities of hits, with intervals over users."""
    sums = cluster_sums(pairs.users, np.column_stack([np.ones(len(hits)), hits]))
    estimates = bootstrap(sums, lambda totals: totals[:, 1:] / totals[:, :1], **options)
    return HitRates(name, dict(zip(ks, estimates, strict=True)))


def group_by_query(pairs: ItemPairs) -> tuple[Ints, Ints, Ints]:
    """Return the pairs sorted by query, each query once, and the bounds of its pairs."""
    order = np.argsort(pairs.queries, kind="stable")
    queries, first = np.unique(pairs.queries[order], return_index=True)
    return order, queries, np.append(first, len(order))


def neighbor_ranks(
    embedding: Matrix,
    pairs: ItemPairs,
    *,
    depth: int = 200,
    seed: int = 0,
    threads: int | None = None,
) -> Ints:
    """Return each target's position among its query's nearest neighbors by cosine.

    Items of one id have one reconstruction and tie; so do copies in the input. The search breaks
    ties by row, so rows are shuffled first: ties are in a seeded random order.

    Args:
        embedding: ``(pool, dim)``.
        pairs: queries and targets.
        depth: length of the lists, below the pool's size and at most 500.
        seed: of the order of ties.
        threads: number of CPU threads; the result does not depend on it.

    Returns:
        Position from 0, int64 ``(pairs,)``; ``depth`` where the target is further down.

    Cost: one exact search of all different queries in the pool; a float32 copy of the pool.
    """
    array = as_matrix(embedding, "embedding")
    require_pool("the embedding", array, pairs)
    check_cutoffs([depth], pairs.pool)
    if depth > MAX_NEIGHBORS:
        raise UsageError(
            f"cutoff {depth}: lists are at most {MAX_NEIGHBORS} long; give smaller cutoffs"
        )
    # ``place`` is the shuffled row of each item; the search sees only shuffled rows.
    order = numpy_generator(seed, "ties").permutation(len(array))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    database = np.empty(array.shape, np.float32)
    for rows in row_blocks(len(array)):
        database[place[rows]] = as_block(array, rows)
    table = engine.table.VectorTable(database, metric=METRICS["cosine"], unique=False)
    by_query, queries, bounds = group_by_query(pairs)  # so that each query is searched once
    result = np.full(len(pairs), depth, np.int64)
    for start in range(0, len(queries), _QUERIES):
        stop = min(start + _QUERIES, len(queries))
        query_rows = place[queries[start:stop]]
        cases = by_query[bounds[start] : bounds[stop]]
        # Lists without a target are not needed.
        targets = place[pairs.targets[cases]], bounds[start : stop + 1] - bounds[start]
        lists, keys = nearest_entries(
            database[query_rows], table, depth, exclude=query_rows, targets=targets, threads=threads
        )
        lists[np.isinf(keys)] = -1
        # Look the targets up in the lists, a block of pairs at a time: this array is large.
        for part in row_blocks(len(cases)):
            row = np.searchsorted(queries[start:stop], pairs.queries[cases[part]])
            hit = lists[row] == targets[0][part, None]
            result[cases[part]] = np.where(hit.any(1), hit.argmax(1), depth)
    return result


def _retention(
    original: Floats, reconstructed: Floats, chance: Floats, pairs: ItemPairs, **options: Any
) -> tuple[list[Estimate | None], list[Estimate | None]]:
    """Estimate both ratios for every cutoff, original and reconstruction on the same draws."""
    count = len(chance)
    values = np.column_stack([np.ones(len(original)), original, reconstructed])

    def ratios(totals: Floats) -> Floats:
        # Columns: number of pairs, hits of the original by cutoff, hits of the reconstruction.
        base = totals[:, 1 : 1 + count] / totals[:, :1]
        ours = totals[:, 1 + count :] / totals[:, :1]
        # Retention compares what both achieve beyond chance; without such a margin of the original
        # there is nothing to retain.
        above = base - chance
        with np.errstate(divide="ignore", invalid="ignore"):
            corrected = np.where(above > 0, (ours - chance) / above, np.nan)
            plain = np.where(base > 0, ours / base, np.nan)
        return np.concatenate([corrected, plain], axis=1)

    estimates = bootstrap(cluster_sums(pairs.users, values), ratios, **options)
    defined = [estimate if np.isfinite(estimate.value) else None for estimate in estimates]
    return defined[:count], defined[count:]


def item_retrieval(
    original: Matrix,
    reconstructions: Mapping[str, Matrix],
    pairs: ItemPairs,
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    seed: int = 0,
    replicates: int = 1000,
    threads: int | None = None,
) -> ItemRetrieval:
    """Measure how often nearest neighbors hold the related item, before and after quantization.

    Args:
        original: input embedding ``(pool, dim)``.
        reconstructions: name -> reconstructed embedding ``(pool, any dim)``; name them
            ``decoder(codes)`` and ``decoder(z)``.
        pairs: queries and targets, of users whose data no tokenizer was fitted on.
        cutoffs: the K of HR@K, each below the pool's size and at most 500.
        seed: of the order of ties and of the bootstrap.
        replicates: bootstrap draws of users; 0 gives no intervals.
        threads: number of CPU threads; the result does not depend on it.

    Cost: an exact search of all different queries per embedding. Source: DRQ section 5.5.
    """
    ks = check_cutoffs(cutoffs, pairs.pool)
    options: dict[str, Any] = {"replicates": replicates, "seed": seed}
    chance = np.array(ks) / (pairs.pool - 1)

    def hits(embedding: Matrix) -> Floats:
        ranks = neighbor_ranks(embedding, pairs, depth=max(ks), seed=seed, threads=threads)
        return np.stack([ranks < k for k in ks], axis=1).astype(np.float64)

    base = hits(original)
    rates = [hit_rates("original", base, ks, pairs, **options)]
    retained = []
    for name, embedding in reconstructions.items():
        reconstructed = hits(embedding)
        rates.append(hit_rates(name, reconstructed, ks, pairs, **options))
        corrected, plain = _retention(base, reconstructed, chance, pairs, **options)
        ratios = (dict(zip(ks, values, strict=True)) for values in (corrected, plain))
        retained.append(Retention(name, *ratios))
    by_chance = {k: Estimate(float(c)) for k, c in zip(ks, chance, strict=True)}
    rates.append(HitRates("random", by_chance))
    return ItemRetrieval(pairs.counts(), seed, tuple(rates), tuple(retained))
