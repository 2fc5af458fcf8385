"""Retrieval, matching and popularity against brute force and known answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.diagnostics.auc import auc, negative_pairs, pair_aucs
from semid.diagnostics.discrete import discrete_ranks, discrete_retrieval
from semid.diagnostics.pairs import bootstrap, cluster_sums, item_pairs
from semid.diagnostics.popularity import popularity_health, popularity_segments
from semid.diagnostics.retrieval import item_retrieval, neighbor_ranks
from semid.errors import InputError, UsageError
from semid.seeds import numpy_generator


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_pairs(pool: int, count: int, seed: int = 0):
    draw = rng(seed)
    first, second = draw.integers(-1, pool, count), draw.integers(-1, pool, count)
    first[0], second[0] = 0, 1
    return item_pairs(first, second, pool=pool, users=draw.integers(0, 9, count))


# Pairs ---------------------------------------------------------------------------------------


def test_pairs_count_what_they_leave_out():
    pairs = item_pairs([0, 1, 2, -1, 2], [1, -1, 2, 0, 0], pool=3, users=[7, 7, 8, 8, 9])
    assert pairs.queries.tolist() == [0, 2]
    assert pairs.targets.tolist() == [1, 0]
    assert pairs.users.tolist() == [7, 9]
    assert (pairs.unknown, pairs.same, len(pairs)) == (2, 1, 2)
    assert item_pairs([0], [1], pool=3).counts().to_dict()["by_user"] is False


def test_pairs_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match="no pair is left of 2: 1 have"):
        item_pairs([0, -1], [0, 1], pool=3)
    with pytest.raises(InputError, match="no pair is left of 0"):
        item_pairs(np.array([], np.int64), np.array([], np.int64), pool=3)
    with pytest.raises(InputError, match="0 to 2"):
        item_pairs([0], [3], pool=3)
    with pytest.raises(InputError, match="users has shape"):
        item_pairs([0], [1], pool=3, users=[1, 2])


# Bootstrap -----------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_has_the_textbook_width():
    values = rng().normal(size=400)
    sums = cluster_sums(np.arange(400), np.column_stack([np.ones(400), values]))
    found = bootstrap(
        sums, lambda t: t[:, 1:] / t[:, :1], replicates=2000, confidence=0.95, seed=0
    )[0]
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_draws_whole_clusters():
    clusters = np.repeat(np.arange(40), 50)
    values = np.repeat(rng().normal(size=40), 50)
    wide = bootstrap(
        cluster_sums(clusters, np.column_stack([np.ones(2000), values])),
        lambda t: t[:, 1:] / t[:, :1],
        replicates=500,
        confidence=0.95,
        seed=0,
    )[0]
    assert wide.high - wide.low > 2 * 1.96 * values.std() / math.sqrt(40) * 0.8
    one = bootstrap(np.ones((1, 2)), lambda t: t[:, :1], replicates=5, confidence=0.9, seed=0)[0]
    assert (one.low, one.high) == (None, None)
    with pytest.raises(UsageError, match="replicates"):
        bootstrap(np.ones((2, 1)), lambda t: t, replicates=-1, confidence=0.9, seed=0)


# Retrieval by embeddings ---------------------------------------------------------------------


def brute_ranks(embedding: np.ndarray, pairs, depth: int) -> np.ndarray:
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    result = []
    for q, t in zip(pairs.queries, pairs.targets, strict=True):
        scores = unit @ unit[q]
        scores[q] = -np.inf
        result.append(min(int((scores > scores[t]).sum()), depth))
    return np.array(result)


def test_neighbor_ranks_match_brute_force():
    embedding = rng().normal(size=(150, 12)).astype(np.float32)
    pairs = random_pairs(150, 400)
    found = neighbor_ranks(embedding, pairs, depth=20, threads=1)
    assert np.array_equal(found, brute_ranks(embedding.astype(np.float64), pairs, 20))
    assert 0 < (found < 20).sum() < len(pairs)


def test_ties_among_equal_reconstructions_are_not_broken_by_row():
    embedding = np.ones((200, 4), np.float32)
    pairs = item_pairs(np.arange(10, 200), np.zeros(190, np.int64), pool=200)
    places = [neighbor_ranks(embedding, pairs, depth=199, seed=s)[0] for s in range(12)]
    assert len(set(places)) > 6
    assert 40 < np.mean(places) < 160


def test_item_retrieval_and_retention():
    x = rng().normal(size=(300, 8)).astype(np.float32)
    blurred = x + 0.8 * rng(1).normal(size=x.shape).astype(np.float32)
    near = np.argsort(-(x @ x.T) / np.linalg.norm(x, axis=1), axis=1)[:, 1:4]
    pairs = item_pairs(
        np.repeat(np.arange(300), 3), near.ravel(), pool=300, users=np.repeat(np.arange(150), 6)
    )
    found = item_retrieval(
        x,
        {"decoder(z)": x.copy(), "decoder(codes)": blurred},
        pairs,
        cutoffs=(5, 20),
        replicates=100,
    )
    rates = {rate.name: rate.rates for rate in found.hit_rates}
    assert rates["random"][5].value == pytest.approx(5 / 299)
    same, lossy = found.retention
    assert same.above_chance[5].value == 1
    assert (same.plain[20].low, same.plain[20].high) == (1, 1)
    for k in (5, 20):
        original, kept = rates["original"][k].value, rates["decoder(codes)"][k].value
        chance = k / 299
        expected = (kept - chance) / (original - chance)
        estimate = lossy.above_chance[k]
        assert estimate.value == pytest.approx(expected)
        assert estimate.low < expected < estimate.high
        assert lossy.plain[k].value == pytest.approx(kept / original)
        assert rates["original"][k].low <= original <= rates["original"][k].high
    assert found == item_retrieval(
        x,
        {"decoder(z)": x.copy(), "decoder(codes)": blurred},
        pairs,
        cutoffs=(5, 20),
        replicates=100,
    )
    json.dumps(found.to_dict())


def test_retention_is_undefined_where_the_original_is_no_better_than_chance():
    x = np.concatenate([np.eye(10), -np.eye(10)]).astype(np.float32)
    opposite = item_pairs(np.arange(10), np.arange(10, 20), pool=20)
    found = item_retrieval(x, {"decoder(codes)": x}, opposite, cutoffs=(2,), replicates=10)
    assert found.hit_rates[0].rates[2].value == 0
    assert found.retention[0].above_chance[2] is None
    assert found.retention[0].plain[2] is None
    json.dumps(found.to_dict())


def test_retrieval_refuses_what_does_not_fit():
    pairs = random_pairs(30, 20)
    x = rng().normal(size=(30, 3))
    with pytest.raises(InputError, match="29 candidates of a pool of 30"):
        item_retrieval(x, {}, pairs, cutoffs=(20, 30))
    with pytest.raises(InputError, match="holds 29 items, the pool 30"):
        item_retrieval(x[:29], {}, pairs, cutoffs=(5,))
    with pytest.raises(UsageError, match="at least 1"):
        item_retrieval(x, {}, pairs, cutoffs=())
    with pytest.raises(UsageError, match="at most 500"):
        neighbor_ranks(np.ones((700, 2)), random_pairs(700, 5), depth=501)


# Retrieval by codes --------------------------------------------------------------------------


def brute_discrete(codes, pairs, hierarchical, seed):
    order = numpy_generator(seed, "ties").permutation(len(codes))
    rows = []
    for q, t in zip(pairs.queries, pairs.targets, strict=True):
        equal = codes == codes[q]
        score = (np.logical_and.accumulate(equal, axis=1) if hierarchical else equal).sum(1)
        others = np.arange(len(codes)) != q
        better = others & (score > score[t])
        tied = others & (score == score[t])
        rank = better.sum() + (tied & (order < order[t])).sum()
        rows.append((rank, better.sum(), tied.sum(), score[t]))
    return np.array(rows)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 4), st.integers(1, 5), st.booleans()
)
def test_discrete_ranks_match_brute_force(seed, pool, levels, size, hierarchical):
    codes = rng(seed).integers(0, size, (pool, levels)).astype(np.uint16)
    pairs = random_pairs(pool, 50, seed)
    found = discrete_ranks(codes, pairs, hierarchical=hierarchical, seed=seed, threads=1)
    expected = brute_discrete(codes, pairs, hierarchical, seed)
    assert np.array_equal(
        np.stack([found.rank, found.better, found.tied, found.match], axis=1), expected
    )


@pytest.mark.parametrize("hierarchical", [True, False])
def test_expected_hits_are_the_mean_over_orders_of_ties(hierarchical):
    codes = rng().integers(0, 3, (60, 2))
    pairs = random_pairs(60, 300)
    options = {"hierarchical": hierarchical, "cutoffs": (5, 20), "replicates": 0}
    runs = [discrete_retrieval(codes, pairs, seed=s, **options) for s in range(60)]
    name = "levels 1-2" if hierarchical else "codebooks 1-2"
    assert (runs[0].depths[1].name, runs[0].expected[1].name) == (name, f"{name}, expected")
    assert len({run.depths[1].rates[5].value for run in runs}) > 10
    assert len({run.expected[1].rates[5].value for run in runs}) == 1
    for depth in range(2):
        for k in (5, 20):
            mean = np.mean([run.depths[depth].rates[k].value for run in runs])
            assert mean == pytest.approx(runs[0].expected[depth].rates[k].value, abs=0.02)


def test_discrete_retrieval_of_a_collapsed_codebook_is_chance():
    pairs = random_pairs(101, 3000)
    found = discrete_retrieval(
        np.zeros((101, 2), np.uint16), pairs, hierarchical=True, cutoffs=(10,), replicates=50
    )
    assert found.expected[1].rates[10].value == pytest.approx(0.1)
    assert found.depths[1].rates[10].value == pytest.approx(0.1, abs=0.03)
    assert found.depths[0].rates[10].low < found.depths[0].rates[10].high
    json.dumps(found.to_dict())
    with pytest.raises(InputError, match="the pool 101"):
        discrete_ranks(np.zeros((5, 2), np.uint16), pairs, hierarchical=True)


def test_equal_codes_over_several_blocks_and_threads():
    codes = rng().integers(0, 40, (6000, 3))
    pairs = random_pairs(6000, 12_000)
    one = discrete_ranks(codes, pairs, hierarchical=False, threads=1)
    two = discrete_ranks(codes, pairs, hierarchical=False, threads=2)
    assert np.array_equal(one.rank, two.rank)
    some = np.arange(0, len(pairs), 997)
    few = item_pairs(pairs.queries[some], pairs.targets[some], pool=6000)
    assert np.array_equal(one.rank[some], brute_discrete(codes, few, False, 0)[:, 0])


# AUCs ----------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
)
@settings(deadline=None)
def test_auc_is_mann_whitney(positives, negatives):
    wins = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert auc(positives, negatives) == pytest.approx(np.mean(wins))


def test_auc_needs_both_classes():
    with pytest.raises(InputError, match="both classes"):
        auc([], [1.0])
    with pytest.raises(InputError, match="both classes"):
        auc([1.0], [])
    with pytest.raises(InputError, match="NaN"):
        auc([float("nan")], [1.0])


def test_negatives_are_fixed_uniform_and_never_the_query():
    pairs = random_pairs(5, 4000)
    drawn = negative_pairs(pairs, per_pair=10, seed=3)
    assert np.array_equal(drawn.targets, negative_pairs(pairs, per_pair=10, seed=3).targets)
    assert not np.array_equal(drawn.targets, negative_pairs(pairs, per_pair=10, seed=4).targets)
    assert not (drawn.targets == pairs.queries[:, None]).any()
    shares = np.bincount(drawn.targets[pairs.queries == 2].ravel(), minlength=5)
    assert shares[2] == 0
    assert shares[[0, 1, 3, 4]] / shares.sum() == pytest.approx(0.25, abs=0.02)
    assert negative_pairs(pairs, per_pair=1).targets.shape == (len(pairs), 1)
    with pytest.raises(UsageError, match="at least 1"):
        negative_pairs(pairs, per_pair=0)


def brute_readings(codes, codebooks, weights, a, b):
    equal = codes[a] == codes[b]
    weighted = 0.0
    for level, codebook in enumerate(codebooks):
        centered = codebook - codebook[codes[:, level]].mean(0)
        u, v = centered[codes[a, level]], centered[codes[b, level]]
        scale = np.linalg.norm(u) * np.linalg.norm(v)
        weighted += weights[level] * (u @ v / scale if scale else 0.0)
    prefix = 0
    while prefix < len(equal) and equal[prefix]:
        prefix += 1
    return {
        "exact_full": float(equal.all()),
        "exact_prefix": prefix,
        "exact_count": int(equal.sum()),
        "weighted": weighted,
        "weighted_equality": float(equal @ np.array(weights)),
    }


@pytest.mark.parametrize("size", [4, 20])  # fewer pairs of codes than pairs of items, and more
@pytest.mark.parametrize("hierarchical", [True, False])
def test_pair_aucs_match_brute_force(hierarchical, size):
    codes = rng().integers(0, 4, (40, 3))
    codebooks = [rng(i).normal(size=(size, 5)) + 3 for i in range(3)]
    x = rng(9).normal(size=(40, 6))
    pairs = random_pairs(40, 60)
    negatives = negative_pairs(pairs, per_pair=4, seed=1)
    found = pair_aucs(
        codes,
        codebooks,
        pairs,
        negatives,
        hierarchical=hierarchical,
        embeddings={"original": x},
        replicates=50,
    )
    variances = [
        (c[codes[:, level]] - c[codes[:, level]].mean(0)).var(0).sum()
        for level, c in enumerate(codebooks)
    ]
    weights = np.array(variances) / sum(variances) if hierarchical else np.full(3, 1 / 3)
    assert found.weights == pytest.approx(tuple(weights))
    pos = list(zip(pairs.queries, pairs.targets, strict=True))
    neg = [(a, b) for a, row in zip(pairs.queries, negatives.targets, strict=True) for b in row]
    score = lambda a, b: brute_readings(codes, codebooks, weights, a, b)  # noqa: E731
    p, n = [score(*pair) for pair in pos], [score(*pair) for pair in neg]
    for name in p[0]:
        expected = auc([s[name] for s in p], [s[name] for s in n])
        assert found.aucs[name].value == pytest.approx(expected, abs=2e-3)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = auc([unit[a] @ unit[b] for a, b in pos], [unit[a] @ unit[b] for a, b in neg])
    assert found.aucs["embedding: original"].value == pytest.approx(expected, abs=2e-3)
    assert found.exact == found.aucs["exact_prefix" if hierarchical else "exact_count"]
    assert [match.depth for match in found.matches] == [1, 2, 3]
    first = found.matches[0]
    assert first.prefix_positive == first.code_positive
    assert first.code_positive == np.mean([codes[a, 0] == codes[b, 0] for a, b in pos])
    assert found.matches[2].prefix_negative == np.mean(
        [(codes[a] == codes[b]).all() for a, b in neg]
    )
    json.dumps(found.to_dict())


def test_auc_interval_follows_an_exact_resampling_of_users():
    codes = rng().integers(0, 3, (50, 2))
    pairs = random_pairs(50, 400)
    negatives = negative_pairs(pairs, per_pair=5)
    books = [np.eye(3), np.eye(3)]
    found = pair_aucs(codes, books, pairs, negatives, hierarchical=True, replicates=500)
    equal = lambda a, b: np.logical_and.accumulate(codes[a] == codes[b], axis=1).sum(1)  # noqa: E731
    p = equal(pairs.queries, pairs.targets)
    n = np.stack([equal(pairs.queries, negatives.targets[:, i]) for i in range(5)], axis=1)
    users, drawn = np.unique(pairs.users), []
    for seed in range(300):
        chosen = rng(seed).choice(users, len(users))
        rows = np.concatenate([np.flatnonzero(pairs.users == user) for user in chosen])
        drawn.append(auc(p[rows], n[rows].ravel()))
    estimate = found.aucs["exact_prefix"]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert estimate.low == pytest.approx(low, abs=0.4 * (high - low))
    assert estimate.high == pytest.approx(high, abs=0.4 * (high - low))
    assert estimate.high - estimate.low == pytest.approx(high - low, rel=0.35)


def test_a_level_of_weight_zero_is_not_read():
    codes, pairs = rng().integers(0, 3, (20, 2)), random_pairs(20, 300)
    negatives = negative_pairs(pairs)
    options = {"hierarchical": True, "replicates": 0}
    books = [np.eye(3), np.eye(3)]
    found = pair_aucs(codes, books, pairs, negatives, level_weights=[5.0, 0.0], **options)
    assert found.weights == (1.0, 0.0)
    alone = pair_aucs(codes[:, :1], books[:1], pairs, negatives, **options)
    for name in ("weighted", "weighted_equality"):
        assert found.aucs[name].value == alone.aucs[name].value
    assert found.aucs["exact_full"].value != alone.aucs["exact_full"].value


def test_pair_aucs_refuse_what_does_not_fit():
    codes, pairs = rng().integers(0, 3, (20, 2)), random_pairs(20, 30)
    negatives = negative_pairs(pairs)
    books = [np.eye(3), np.eye(3)]
    for weights in ([1.0], [2.0, -1.0], [0.0, 0.0]):
        with pytest.raises(InputError, match="level weights"):
            pair_aucs(codes, books, pairs, negatives, hierarchical=True, level_weights=weights)
    with pytest.raises(InputError, match="belongs to these pairs"):
        pair_aucs(codes, books, random_pairs(20, 31), negatives, hierarchical=True)
    with pytest.raises(InputError, match="the pool 20"):
        pair_aucs(codes[:19], books, pairs, negatives, hierarchical=True)
    with pytest.raises(InputError, match="original holds 3 items"):
        pair_aucs(
            codes, books, pairs, negatives, hierarchical=True, embeddings={"original": np.eye(3)}
        )


# Popularity ----------------------------------------------------------------------------------


def test_popularity_segments_keep_equal_counts_together():
    counts = np.array([9, 5, 5, 5, 2, 2, 1, 1, 1, 1, 0])
    assert popularity_segments(counts, head=0.1, mid=0.4).tolist() == [
        0,
        1,
        1,
        1,
        1,
        1,
        2,
        2,
        2,
        2,
        3,
    ]
    assert popularity_segments(counts, head=0.2, mid=0.0).tolist()[:4] == [0, 0, 0, 0]
    with pytest.raises(InputError, match="no popularity"):
        popularity_segments([0, 0])
    with pytest.raises(InputError, match="non-negative"):
        popularity_segments([-1, 2])
    with pytest.raises(UsageError, match="head=0"):
        popularity_segments([1, 2], head=0.0)


def test_popularity_health_by_hand():
    #               head     mid           tail       unseen
    codes = np.array([[0, 0], [0, 1], [0, 1], [0, 0], [1, 1], [1, 1]])
    counts = np.array([10, 4, 4, 1, 1, 0])
    found = popularity_health(codes, counts, head=0.2, mid=0.4)
    head, mid, tail, unseen = found.segments
    assert [s.items for s in found.segments] == [1, 2, 2, 1]
    assert (head.colliding_item_rate, head.shared_with_head, head.collision_rate) == (1, 0, 0)
    assert (mid.unique_ids, mid.collision_rate, mid.colliding_item_rate) == (1, 0.5, 1)
    assert (tail.unique_ids, tail.shared_with_head, tail.mean_bucket) == (2, 0.5, 2)
    assert (unseen.interactions, unseen.shared_with_head) == (0, 0)
    assert sum(s.capacity_share for s in found.segments) == pytest.approx(1)
    assert tail.perplexity == pytest.approx((2, 2))
    assert found.interactions_in_shared_ids == 1
    assert head.interaction_share == 0.5
    json.dumps(found.to_dict())
    with pytest.raises(InputError, match="counts 2"):
        popularity_health(codes, counts[:2])


@pytest.mark.parametrize(
    ("head", "mid", "segments"),
    [
        (0.2, 0.4, [0, 1, 1, 2, 2, 3]),
        (0.2, 0.0, [0, 2, 2, 2, 2, 3]),
        (0.6, 0.4, [0, 0, 0, 1, 1, 3]),
        (0.01, 0.01, [0, 2, 2, 2, 2, 3]),  # the head has at least one item
    ],
)
def test_segments_at_the_ends_of_their_ranges(head, mid, segments):
    counts = np.array([50, 40, 30, 20, 10, 0])
    assert popularity_segments(counts, head=head, mid=mid).tolist() == segments
    for bad in ({"head": 0.0}, {"head": 1.0, "mid": 0.0}, {"mid": -0.1}, {"head": 0.7, "mid": 0.4}):
        with pytest.raises(UsageError, match="needed"):
            popularity_segments(counts, **bad)


def test_bootstrap_of_known_totals():
    """Two clusters of equal size: means of 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4."""

    def mean(totals):
        return totals[:, :1] / totals[:, 1:]

    sums = np.array([[0.0, 5.0], [5.0, 5.0]])
    estimate = bootstrap(sums, mean, replicates=400, confidence=0.95, seed=0)[0]
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.0, 1.0)
    inner = bootstrap(sums, mean, replicates=400, confidence=0.3, seed=0)[0]
    assert (inner.low, inner.high) == (0.5, 0.5)
    single = bootstrap(sums, mean, replicates=1, confidence=0.95, seed=0)[0]
    assert single.low == single.high
    for alone, options in ((sums, {"replicates": 0}), (sums[:1], {"replicates": 9})):
        estimate = bootstrap(alone, mean, confidence=0.95, seed=0, **options)[0]
        assert estimate.value == alone[:, 0].sum() / alone[:, 1].sum()
        assert estimate.low is None
        assert estimate.high is None
    for bad in ({"replicates": -1}, {"confidence": 0.0}, {"confidence": 1.0}):
        with pytest.raises(UsageError, match="replicates must not be negative"):
            bootstrap(sums, mean, seed=0, **{"replicates": 5, "confidence": 0.95} | bad)
