"""Item-to-item retrieval by embeddings: hit rates and what a reconstruction retains of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.diagnostics.arrays import Matrix, as_block, as_matrix, row_blocks
from semid.diagnostics.bootstrap import Estimate, bootstrap, cluster_sums
from semid.diagnostics.pairs import ItemPairs, PairCounts
from semid.errors import InputError, UsageError
from semid.quantization.nearest import MAX_NEIGHBORS, index_database, top_k
from semid.results import Result
from semid.seeds import numpy_generator

__all__ = [
    "CUTOFFS",
    "HitRates",
    "ItemRetrieval",
    "Retention",
    "check_cutoffs",
    "hit_rates",
    "item_retrieval",
    "neighbor_ranks",
]

CUTOFFS = (20, 50, 100, 200)
"""The K of HR@K, the paper's."""

_QUERIES = 16_384  # queries a search; their lists of 200 are 26 MB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HitRates(Result):
    """HR@K of one way to retrieve.

    Attributes:
        name: which way.
        rates: K -> share of the cases whose target is among the first K, with its interval.
    """

    name: str
    rates: dict[int, Estimate]


@dataclass(frozen=True)
class Retention(Result):
    """What a reconstruction keeps of the original embedding's retrieval.

    Attributes:
        name: which reconstruction, ``decoder(codes)`` or ``decoder(z)``.
        above_chance: K -> ``(HR_rec - HR_random) / (HR_orig - HR_random)``, not bounded by 1;
            None where the original is not better than chance.
        plain: K -> ``HR_rec / HR_orig``; None where the original has no hit.
    """

    name: str
    above_chance: dict[int, Estimate | None]
    plain: dict[int, Estimate | None]


@dataclass(frozen=True)
class ItemRetrieval(Result):
    """Item-to-item retrieval by embeddings.

    Attributes:
        pairs: counts of the cases and of what was left out.
        seed: of the order of ties and of the bootstrap.
        hit_rates: ``original``, each reconstruction, ``random`` (closed form ``K / (N - 1)``).
        retention: one a reconstruction.
    """

    pairs: PairCounts
    seed: int
    hit_rates: tuple[HitRates, ...]
    retention: tuple[Retention, ...]


def check_cutoffs(cutoffs: Sequence[int], pool: int) -> tuple[int, ...]:
    """Return the cutoffs as a tuple.

    Raises:
        UsageError: none given, or one below 1.
        InputError: one is larger than the number of candidates, ``pool - 1``.
    """
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
    name: str,
    hits: Floats,
    ks: Sequence[int],
    pairs: ItemPairs,
    *,
    replicates: int,
    confidence: float,
    seed: int,
) -> HitRates:
    """Average hits over the cases, with intervals over users.

    Args:
        name: of the result.
        hits: 1 or 0, or a chance between, ``(pairs, cutoffs)``.
        ks: the cutoffs.
        pairs: the cases.
        replicates: bootstrap draws.
        confidence: coverage of the intervals.
        seed: of the bootstrap.
    """
    sums = cluster_sums(pairs.users, np.column_stack([np.ones(len(hits)), hits]))
    estimates = bootstrap(
        sums,
        lambda totals: totals[:, 1:] / totals[:, :1],
        replicates=replicates,
        confidence=confidence,
        seed=seed,
    )
    return HitRates(name, dict(zip(ks, estimates, strict=True)))


def neighbor_ranks(
    embedding: Matrix,
    pairs: ItemPairs,
    *,
    depth: int = 200,
    seed: int = 0,
    threads: int | None = None,
) -> npt.NDArray[np.int64]:
    """Find each target's place among its query's nearest neighbors by cosine.

    Items of one id have one reconstruction and tie; so do copies in the input. The search breaks
    ties by row, so rows are shuffled first: ties stand in a seeded random order.

    Args:
        embedding: ``(pool, dim)``.
        pairs: the cases.
        depth: places looked at, below the pool's size and at most 500.
        seed: of the order of ties.
        threads: see `semid.quantization.nearest.top_k`.

    Returns:
        Place from 0, int64 ``(pairs,)``; ``depth`` where the target is further down.

    Raises:
        InputError: embedding of another length than the pool, or depth beyond it.
        UsageError: depth beyond 500.

    Cost: one exact search of all different queries in the pool; a float32 copy of the pool.
    """
    array = as_matrix(embedding, "embedding")
    if len(array) != pairs.pool:
        raise InputError(f"embedding holds {len(array)} items, the pool {pairs.pool}")
    check_cutoffs([depth], pairs.pool)
    if depth > MAX_NEIGHBORS:
        raise UsageError(
            f"cutoff {depth}: lists are at most {MAX_NEIGHBORS} long; give smaller cutoffs"
        )
    order = numpy_generator(seed, "ties").permutation(len(array))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    database = np.empty(array.shape, np.float32)
    for rows in row_blocks(len(array)):
        database[place[rows]] = as_block(array, rows)
    ready = index_database(torch.from_numpy(database), metric="cosine")
    by_query = np.argsort(pairs.queries, kind="stable")
    queries, first = np.unique(pairs.queries[by_query], return_index=True)
    bounds = np.append(first, len(by_query))
    result = np.full(len(pairs), depth, np.int64)
    for start in range(0, len(queries), _QUERIES):
        stop = min(start + _QUERIES, len(queries))
        rows_of = place[queries[start:stop]]
        lists = top_k(
            torch.from_numpy(database[rows_of]),
            ready,
            depth,
            exclude=torch.from_numpy(rows_of),
            threads=threads,
        ).indices.numpy()
        for part in row_blocks(int(bounds[stop] - bounds[start])):
            cases = by_query[bounds[start] + part.start : bounds[start] + part.stop]
            line = np.searchsorted(queries[start:stop], pairs.queries[cases])
            hit = lists[line] == place[pairs.targets[cases]][:, None]
            result[cases] = np.where(hit.any(1), hit.argmax(1), depth)
    return result


def _retention(
    name: str, original: Floats, kept: Floats, chance: Floats, pairs: ItemPairs, **options: Any
) -> tuple[list[Estimate | None], list[Estimate | None]]:
    """Estimate both ratios for every cutoff, original and reconstruction on the same draws."""
    count = len(chance)
    values = np.column_stack([np.ones(len(original)), original, kept])

    def ratios(totals: Floats) -> Floats:
        base = totals[:, 1 : 1 + count] / totals[:, :1]
        ours = totals[:, 1 + count :] / totals[:, :1]
        above = base - chance
        with np.errstate(divide="ignore", invalid="ignore"):
            corrected = np.where(above > 0, (ours - chance) / above, np.nan)
            plain = np.where(base > 0, ours / base, np.nan)
        return np.concatenate([corrected, plain], axis=1)

    found = bootstrap(cluster_sums(pairs.users, values), ratios, **options)
    usable = [estimate if np.isfinite(estimate.value) else None for estimate in found]
    return usable[:count], usable[count:]


def item_retrieval(
    original: Matrix,
    reconstructions: Mapping[str, Matrix],
    pairs: ItemPairs,
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    seed: int = 0,
    replicates: int = 1000,
    confidence: float = 0.95,
    threads: int | None = None,
) -> ItemRetrieval:
    """Measure how well neighbors by cosine find the next item, before and after quantization.

    Args:
        original: input embedding ``(pool, dim)``.
        reconstructions: name -> reconstructed embedding ``(pool, any dim)``; name them
            ``decoder(codes)`` and ``decoder(z)``.
        pairs: the cases; from users whom no tokenizer saw.
        cutoffs: the K of HR@K, each below the pool's size and at most 500.
        seed: of the order of ties and of the bootstrap.
        replicates: bootstrap draws of users; 0 gives no intervals.
        confidence: coverage of the intervals.
        threads: see `neighbor_ranks`.

    Returns:
        An `ItemRetrieval`.

    Raises:
        InputError: embeddings of another length than the pool, or cutoffs beyond it.

    Cost: an exact search of all different queries per embedding.

    Source: DRQ section 5.5.
    """
    ks = check_cutoffs(cutoffs, pairs.pool)
    options: dict[str, Any] = {"replicates": replicates, "confidence": confidence, "seed": seed}
    chance = np.array(ks) / (pairs.pool - 1)

    def hits(embedding: Matrix) -> Floats:
        ranks = neighbor_ranks(embedding, pairs, depth=max(ks), seed=seed, threads=threads)
        return np.stack([ranks < k for k in ks], axis=1).astype(np.float64)

    base = hits(original)
    rates = [hit_rates("original", base, ks, pairs, **options)]
    retained = []
    for name, embedding in reconstructions.items():
        kept = hits(embedding)
        rates.append(hit_rates(name, kept, ks, pairs, **options))
        corrected, plain = _retention(name, base, kept, chance, pairs, **options)
        retained.append(
            Retention(
                name, dict(zip(ks, corrected, strict=True)), dict(zip(ks, plain, strict=True))
            )
        )
    rates.append(
        HitRates("random", {k: Estimate(float(c)) for k, c in zip(ks, chance, strict=True)})
    )
    return ItemRetrieval(pairs.counts(), seed, tuple(rates), tuple(retained))
