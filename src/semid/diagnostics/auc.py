"""Matching AUCs on related pairs against one fixed set of random negatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.diagnostics.pairs import Estimate, ItemPairs, PairCounts, bootstrap, require_pool
from semid.diagnostics.spaces import Matrix, as_matrix, row_blocks
from semid.errors import InputError, UsageError
from semid.health import check_codes, usage
from semid.lazy import kernel
from semid.quantization.threads import map_blocks
from semid.results import Result
from semid.seeds import numpy_generator

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


def auc(positives: npt.ArrayLike, negatives: npt.ArrayLike) -> float:
    """Return the probability that a positive scores above a negative; a tie counts one half.

    The exact Mann-Whitney statistic of scores ``(n,)`` and ``(m,)``, over ``n * m``. Raises
    `InputError` where one class is empty or scores are NaN. Cost: a sort.
    """
    return float(_placements(positives, negatives)[0].mean())


def _placements(positives: npt.ArrayLike, negatives: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return each positive's share of negatives below it, each negative's of positives above."""
    p, n = np.asarray(positives, np.float64), np.asarray(negatives, np.float64)
    if p.ndim != 1 or n.ndim != 1 or not len(p) or not len(n):
        raise InputError(
            f"an AUC needs scores of both classes; got positives {p.shape} and negatives {n.shape}"
        )
    if np.isnan(p).any() or np.isnan(n).any():
        raise InputError("scores hold NaN; an AUC has no place for them")
    # Both sorts serve twice: once to look values up in ascending order, once to be looked up in.
    p_order, n_order = np.argsort(p), np.argsort(n)
    wins = _below(p, p_order, n[n_order])
    return wins, 1.0 - _below(n, n_order, p[p_order])


def _below(values: Floats, order: npt.NDArray[np.int64], others: Floats) -> Floats:
    """Return the share of ``others`` (ascending) below each value, equal ones counting one half.

    ``order`` sorts the values. Looked up in ascending order, neighbors hit the same cache lines;
    in random order each look-up would miss the cache.
    """
    ascending = values[order]
    below = np.empty(len(values))
    # The left position counts smaller values, the right one equal values too: their sum is twice
    # the number of smaller values plus the number of equal ones, which is the half count doubled.
    below[order] = np.searchsorted(others, ascending, side="left")
    below[order] += np.searchsorted(others, ascending, side="right")
    return below / (2.0 * len(others))


@dataclass(frozen=True)
class NegativePairs:
    """Random pairs (a, b'), the same for every tokenizer that is compared."""

    # row of b', int64 ``(pairs, per_pair)``; never the query itself
    targets: Rows = field(repr=False, compare=False)
    per_pair: int  # negatives per positive pair
    seed: int  # of the draw


def negative_pairs(pairs: ItemPairs, *, per_pair: int = 10, seed: int = 0) -> NegativePairs:
    """Draw ``per_pair`` fixed negatives for each pair, uniform over the pool without the query.

    An item that the query's user also interacted with may be drawn: no item is known to be
    unrelated.
    """
    if per_pair < 1:
        raise UsageError(f"per_pair={per_pair} must be at least 1")
    rng = numpy_generator(seed, "negatives")
    # Draw from the pool less one item and skip the query: uniform without rejection.
    drawn = rng.integers(0, pairs.pool - 1, (len(pairs), per_pair))
    return NegativePairs(drawn + (drawn >= pairs.queries[:, None]), per_pair, seed)


@dataclass(frozen=True)
class MatchRate(Result):
    """How often pairs match at one depth."""

    depth: int  # levels, counted from 1
    prefix_positive: float  # share of positive pairs whose first ``depth`` codes are all equal
    prefix_negative: float  # the same of the negatives
    code_positive: float  # share of positive pairs whose code at this level is equal
    code_negative: float  # the same of the negatives

    def rates(self, hierarchical: bool) -> tuple[float, float]:
        """Return the match rates of positives and negatives, by prefix or by this code alone."""
        if hierarchical:
            return self.prefix_positive, self.prefix_negative
        return self.code_positive, self.code_negative

    def ratio(self, hierarchical: bool) -> float | None:
        """Return how much more often positives match than negatives; None if these never do."""
        positive, negative = self.rates(hierarchical)
        return positive / negative if negative > 0 else None


@dataclass(frozen=True)
class PairAucs(Result):
    """AUCs of every reading on the same pairs and negatives."""

    pairs: PairCounts  # counts of the positive pairs and of those left out
    per_pair: int  # negatives per pair
    seed: int  # of the negatives and of the bootstrap
    hierarchical: bool  # whether ``exact`` is ``exact_prefix`` (True) or ``exact_count``
    weights: tuple[float, ...]  # of the levels in the weighted readings
    # reading -> AUC with its interval: ``exact_full``, ``exact_prefix``, ``exact_count``,
    # ``weighted``, ``weighted_equality``, and ``embedding: <name>`` for each embedding given
    aucs: dict[str, Estimate]
    matches: tuple[MatchRate, ...]  # how often pairs match, by depth

    @property
    def exact(self) -> Estimate:
        """The exact reading of these ids: by prefix, or by number of equal codes."""
        return self.aucs["exact_prefix" if self.hierarchical else "exact_count"]


@kernel(fastmath={"reassoc", "contract"})
def _dots(
    table: npt.NDArray[np.float32],
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    out: npt.NDArray[np.float64],
) -> None:
    """Write the inner products of pairs of rows, products and sums in float64."""
    for i in range(len(first)):
        a, b = first[i], second[i]
        total = 0.0
        for j in range(table.shape[1]):
            total += np.float64(table[a, j]) * np.float64(table[b, j])
        out[i] = total


def pair_cosines(
    table: npt.NDArray[Any],
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    *,
    threads: int | None = None,
) -> npt.NDArray[np.float64]:
    """Return the cosines ``(pairs,)`` of rows of a table (rows, dim), in float64.

    They are exactly 1 for equal rows and 0 for rows of zeros. A table that is not float32 is
    copied.
    """
    rows = np.asarray(np.ascontiguousarray(table, dtype=np.float32))
    every = np.arange(len(rows))
    squares, result = np.empty(len(rows)), np.empty(len(first))

    # Squared norms are taken by the same function as the products of pairs, so the cosine of equal
    # rows is exactly 1.
    def norm(part: slice) -> None:
        _dots(rows, every[part], every[part], squares[part])

    def cosine(part: slice) -> None:
        a, b, out = first[part], second[part], result[part]
        _dots(rows, a, b, out)
        scale = np.sqrt(squares[a] * squares[b])  # of equal rows exactly the product
        np.divide(out, scale, out=out, where=scale > 0)

    map_blocks(norm, list(row_blocks(len(rows))), threads=threads)
    if not np.isfinite(squares).all():
        bad = int(np.flatnonzero(~np.isfinite(squares))[0])
        raise InputError(f"row {bad} holds NaN or infinite values; drop such rows first")
    map_blocks(cosine, list(row_blocks(len(first))), threads=threads)
    return result


class _Cases:
    """Positive and negative pairs in one list, positives first."""

    def __init__(self, pairs: ItemPairs, negatives: NegativePairs) -> None:
        if negatives.targets.shape != (len(pairs), negatives.per_pair):
            raise InputError(
                f"negatives have shape {negatives.targets.shape}; "
                f"({len(pairs)}, {negatives.per_pair}) belongs to these pairs"
            )
        self.positives = len(pairs)
        self.a = np.concatenate([pairs.queries, np.repeat(pairs.queries, negatives.per_pair)])
        self.b = np.concatenate([pairs.targets, negatives.targets.ravel()])
        cluster = np.unique(pairs.users, return_inverse=True)[1]
        self.clusters = np.concatenate([cluster, np.repeat(cluster, negatives.per_pair)])

    def estimate(self, scores: npt.NDArray[Any], **options: Any) -> Estimate:
        """Return the AUC with its interval over users.

        A user is drawn with all pairs, positive and negative. The AUC of a draw is taken to first
        order in the users' weights, the projections of the two-sample U statistic. That needs one
        sort in all instead of one per draw; the difference is of order 1 / users.
        """
        wins, losses = _placements(scores[: self.positives], scores[self.positives :])
        n, count = self.positives, int(self.clusters.max()) + 1
        # Per user: positives and the sum of their placements, negatives and the sum of theirs.
        sums = [
            np.bincount(self.clusters[part], weights=weights, minlength=count)
            for part, weights in (
                (slice(n), None),
                (slice(n), wins),
                (slice(n, None), None),
                (slice(n, None), losses),
            )
        ]
        whole = float(wins.mean())

        def statistic(totals: Floats) -> Floats:
            # First order: mean placement of the drawn positives among all negatives, plus that of
            # the drawn negatives among all positives, less the AUC, which both of them contain.
            value = totals[:, 1] / totals[:, 0] + totals[:, 3] / totals[:, 2] - whole
            return np.clip(value, 0.0, 1.0)[:, None]

        return bootstrap(np.stack(sums, axis=1).astype(np.float64), statistic, **options)[0]


def _level_cosines(
    codes: npt.NDArray[Any],
    codebooks: Sequence[npt.NDArray[Any]],
    cases: _Cases,
    threads: int | None,
) -> tuple[Floats, Floats]:
    """Return cosines of the centered codewords ``(pairs, levels)`` and each level's variance."""
    cosines = np.empty((len(cases.a), len(codebooks)))
    variances = np.empty(len(codebooks))
    for level, codebook in enumerate(codebooks):
        share = usage(codes[:, level : level + 1], len(codebook))[0].probabilities
        # Centered by usage, so that a mean that all codewords share does not make them alike.
        codewords = codebook.astype(np.float64)
        codewords -= share @ codewords
        variances[level] = share @ np.einsum("kd,kd->k", codewords, codewords)
        column = codes[:, level].astype(np.int64)
        a, b = column[cases.a], column[cases.b]
        size = len(codewords)
        if size * size <= len(a):
            # Fewer pairs of codewords than pairs of items: compute all of them once, then look up.
            every = np.arange(size)
            first, second = np.repeat(every, size), np.tile(every, size)
            all_pairs = pair_cosines(codewords, first, second, threads=threads)
            cosines[:, level] = all_pairs[a * size + b]
        else:
            cosines[:, level] = pair_cosines(codewords, a, b, threads=threads)
    return cosines, variances


def _level_weights(
    level_weights: Sequence[float] | None, variances: Floats, hierarchical: bool
) -> tuple[float, ...]:
    """Return the weights of the levels, summing to one."""
    levels = len(variances)
    if level_weights is None:
        level_weights = variances.tolist() if hierarchical else [1.0] * levels
    weights = np.asarray(level_weights)
    if weights.shape != (levels,) or (weights < 0).any() or not weights.any():
        raise InputError(
            f"level weights {weights.tolist()}: {levels} non-negative numbers, not all zero, are "
            "needed"
        )
    return tuple((weights / weights.sum()).tolist())


def pair_aucs(
    codes: npt.ArrayLike,
    codebooks: Sequence[Matrix],
    pairs: ItemPairs,
    negatives: NegativePairs,
    *,
    hierarchical: bool,
    embeddings: Mapping[str, Matrix] | None = None,
    level_weights: Sequence[float] | None = None,
    replicates: int = 1000,
    threads: int | None = None,
) -> PairAucs:
    """Measure how well ids distinguish related pairs from random ones, in every reading.

    Args:
        codes: integers ``(pool, levels)``.
        codebooks: one ``(codes, latent)`` array per level.
        pairs: the positive pairs, from users whose data no tokenizer was fitted on.
        negatives: from `negative_pairs`; the same for all tokenizers that are compared.
        hierarchical: whether prefixes mean relatedness.
        embeddings: name -> ``(pool, dim)``, scored by cosine: ``original`` as the upper bound,
            ``decoder(codes)``, ``decoder(z)``.
        level_weights: of the weighted readings; None takes the share of variance that each level's
            codewords carry, and equal weights for parallel codebooks.
        replicates: bootstrap draws of users; 0 gives no intervals.
        threads: number of CPU threads; the result does not depend on it.

    Returns:
        A `PairAucs`. ``weighted`` is ``sum_l w_l cos(c_a^l, c_b^l)`` with codewords less their
        usage-weighted mean; ``weighted_equality`` is ``sum_l w_l [c_a^l = c_b^l]``.

    Source: DRQ section 5.5, which names the metrics and prints no formula; these readings are ours.
    """
    tables = [as_matrix(codebook, f"codebook {i}") for i, codebook in enumerate(codebooks)]
    array = check_codes(codes, [len(table) for table in tables])
    require_pool("the array of codes", array, pairs)
    cases = _Cases(pairs, negatives)
    # Per pair and level: whether the codes are equal, and whether all up to this level are.
    equal = array[cases.a] == array[cases.b]
    prefix = np.logical_and.accumulate(equal, axis=1)
    cosines, variances = _level_cosines(array, tables, cases, threads)
    weights = _level_weights(level_weights, variances, hierarchical)
    # Every reading scores the same pairs; related pairs should score above random ones.
    scores: dict[str, npt.NDArray[Any]] = {
        "exact_full": prefix[:, -1],
        "exact_prefix": prefix.sum(1),
        "exact_count": equal.sum(1),
        "weighted": cosines @ np.array(weights),
        "weighted_equality": equal @ np.array(weights),
    }
    for name, embedding in (embeddings or {}).items():
        rows = as_matrix(embedding, name)
        require_pool(name, rows, pairs)
        scores[f"embedding: {name}"] = pair_cosines(rows, cases.a, cases.b, threads=threads)
    options = {"replicates": replicates, "seed": negatives.seed}
    # Positives come first in the list of pairs.
    n = cases.positives
    rates = [prefix[:n].mean(0), prefix[n:].mean(0), equal[:n].mean(0), equal[n:].mean(0)]
    matches = tuple(
        MatchRate(depth + 1, *(float(rate[depth]) for rate in rates))
        for depth in range(len(tables))
    )
    return PairAucs(
        pairs=pairs.counts(),
        per_pair=negatives.per_pair,
        seed=negatives.seed,
        hierarchical=hierarchical,
        weights=weights,
        aucs={name: cases.estimate(values, **options) for name, values in scores.items()},
        matches=matches,
    )
