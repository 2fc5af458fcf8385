"""Usage, collisions and the verdict against brute force and hand-computed cases."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.errors import InputError, UsageError
from semid.health import (
    CapacityCounter,
    CollisionCounter,
    UsageCounter,
    bucket_keys,
    check_codes,
    collisions,
    merge_capacities,
    row_hashes,
    usage,
    usage_from_counts,
    verdict,
)


def brute_gini(counts: np.ndarray) -> float:
    k = len(counts)
    differences = np.abs(counts[:, None].astype(float) - counts[None, :]).sum()
    return differences / (2 * k * counts.sum())


def random_codes(seed: int, items: int, sizes: list[int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, k, items) for k in sizes], axis=1).astype(np.uint16)


def test_usage_of_a_hand_computed_level():
    found = usage(np.array([[0], [0], [1], [3]], np.uint16), 4)[0]
    assert (found.active, found.dead, found.items, found.codebook_size) == (3, 1, 4, 4)
    assert found.perplexity == pytest.approx(2**1.5)  # H = 1.5 bits
    assert found.collision_probability == pytest.approx(0.25 + 2 / 16)
    assert found.largest_share == 0.5
    assert found.gini == pytest.approx(0.375)
    assert found.probabilities.tolist() == [0.5, 0.25, 0.0, 0.25]
    assert "counts" not in found.to_dict()
    assert found.to_dict(arrays=True)["counts"] == [2, 1, 0, 1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any))
def test_usage_matches_brute_force_and_its_order(counts):
    array = np.array(counts)
    found = usage_from_counts(array)
    p = array[array > 0] / array.sum()
    assert found.perplexity == pytest.approx(float(np.exp(-(p * np.log(p)).sum())))
    assert found.gini == pytest.approx(brute_gini(array), abs=1e-12)
    assert 1 - 1e-12 <= 1 / found.collision_probability <= found.perplexity * (1 + 1e-9)
    assert found.perplexity <= found.active <= found.codebook_size


def test_even_and_single_use_are_the_ends():
    even = usage_from_counts(np.full(64, 7))
    assert (even.perplexity, even.gini) == (pytest.approx(64), pytest.approx(0, abs=1e-12))
    single = usage_from_counts(np.eye(64)[3] * 9)
    assert (single.perplexity, single.gini) == (1.0, pytest.approx(1 - 1 / 64))


def test_usage_counter_in_blocks_and_merged_equals_one_pass():
    codes = random_codes(0, 1000, [7, 300, 5])
    whole = usage(codes, [7, 300, 5])
    first, second = UsageCounter([7, 300, 5]), UsageCounter([7, 300, 5])
    first.update(codes[:1])
    first.update(codes[1:333])
    second.update(codes[333:])
    first.merge(second)
    assert first.result() == whole
    assert all(
        np.array_equal(a.counts, b.counts) for a, b in zip(first.result(), whole, strict=True)
    )
    with pytest.raises(UsageError, match="cannot be merged"):
        first.merge(UsageCounter([7]))


def test_the_papers_collision_identity():
    items, unique = 500_000, 462_660
    ids = np.concatenate([np.arange(unique), np.arange(items - unique)])
    codes = np.stack([ids // 4096**2, ids // 4096 % 4096, ids % 4096], axis=1).astype(np.uint16)
    found = collisions(codes)
    assert found.unique_ids == unique
    assert found.collision_rate == pytest.approx(0.074680, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 120),
    st.sampled_from([[2, 2], [3], [300, 300, 2], [2] * 70, [60_000] * 6]),
)
def test_collisions_match_brute_force(seed, items, sizes):
    codes = random_codes(seed, items, [min(k, 3) for k in sizes])
    codes[0] = np.array(sizes) - 1  # the widest code decides how the id is packed
    buckets = Counter(map(tuple, codes.tolist()))
    found = collisions(codes)
    assert found.unique_ids == len(buckets)
    assert found.collision_rate == pytest.approx(1 - len(buckets) / items)
    assert found.colliding_item_rate == pytest.approx(
        sum(n for n in buckets.values() if n > 1) / items
    )
    assert found.largest_bucket == max(buckets.values())
    assert dict(found.histogram) == dict(Counter(buckets.values()))
    counter = CollisionCounter(sizes)
    for start in range(0, items, 17):
        counter.update(codes[start : start + 17])
    assert counter.result() == found


def test_bucket_keys_order_as_the_ids_do():
    codes = random_codes(3, 400, [5, 4, 3])
    assert np.array_equal(np.argsort(bucket_keys(codes), kind="stable"), np.lexsort(codes.T[::-1]))
    wide = np.tile(codes, (1, 40))
    assert np.array_equal(np.argsort(bucket_keys(wide), kind="stable"), np.lexsort(wide.T[::-1]))


def test_ids_wider_than_a_key_are_told_apart_or_refused():
    wide = 2**62
    codes = np.array([[wide, wide], [1, wide]])  # 63 bits, and 1 for which of the two
    assert bucket_keys(codes).tolist() == [2**63 + wide, wide]
    assert len(np.unique(bucket_keys(np.array([[wide, 0], [wide, 1], [0, 1]])))) == 3
    with pytest.raises(InputError, match="level 1 holds codes of 63 bits; at most 62 fit"):
        bucket_keys(np.array([[wide, wide], [1, wide], [2, wide]]))


def test_copies_in_the_input_are_counted_apart():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    x = x[[0, 1, 0, 2, 3, 4, 4]]
    codes = np.array([[0], [1], [0], [1], [2], [3], [3]], np.uint16)
    found = collisions(codes, duplicate_groups=row_hashes(x))
    assert (found.items, found.unique_ids, found.duplicate_items) == (7, 4, 2)
    assert found.distinct_items == 5
    assert found.collision_rate == pytest.approx(3 / 7)
    assert found.collision_rate_distinct == pytest.approx(1 / 5)
    assert found.colliding_item_rate == pytest.approx(6 / 7)
    assert found.colliding_item_rate_distinct == pytest.approx(2 / 5)
    assert (found.largest_bucket, found.largest_bucket_distinct) == (2, 2)
    counter, other = CollisionCounter([4]), CollisionCounter([4])
    counter.update(codes[:3], duplicate_groups=row_hashes(x[:3]))
    other.update(codes[3:], duplicate_groups=row_hashes(x[3:]))
    counter.merge(other)
    assert counter.result() == found
    counter.update(codes)
    with pytest.raises(InputError, match="2 of 3 blocks"):
        counter.result()


def test_row_hashes_see_content_only():
    x = np.random.default_rng(1).normal(size=(5000, 7)).astype(np.float16)
    whole = row_hashes(x)
    assert np.array_equal(whole[1234:4000], row_hashes(x[1234:4000]))
    assert np.array_equal(whole, row_hashes(x.astype(np.float32)))
    assert np.array_equal(row_hashes(np.zeros((1, 3))), row_hashes(-np.zeros((1, 3))))
    assert len(np.unique(whole)) == len(np.unique(x, axis=0))
    changed = x.copy()
    changed[:, 6] += np.float16(0.25)
    assert not np.any(whole == row_hashes(changed))
    assert not np.any(whole == row_hashes(x[:, ::-1]))
    with pytest.raises(InputError, match="batch, dim"):
        row_hashes(x[0])


def test_row_hashes_of_sparse_rows_differ():
    rows = np.zeros((64 * 64, 64), np.float32)
    rows[np.arange(64 * 64), np.repeat(np.arange(64), 64)] = 1
    rows[np.arange(64 * 64), np.tile(np.arange(64), 64)] += 2
    assert len(np.unique(row_hashes(rows))) == len(np.unique(rows, axis=0))


def test_bad_codes_are_refused_with_every_bad_level():
    with pytest.raises(InputError, match="levels"):
        usage(np.zeros(3, np.uint16), 4)
    with pytest.raises(InputError, match="integer dtype"):
        usage(np.zeros((3, 1)), 4)
    with pytest.raises(InputError) as caught:
        check_codes(np.array([[4, 0, -1]]), [4, 4, 4])
    assert caught.value.problems == (
        "level 0 holds codes 4 to 4; allowed: 0 to 3",
        "level 2 holds codes -1 to -1; allowed: 0 to 3",
    )
    with pytest.raises(InputError, match="allowed: at least 0"):
        check_codes(np.array([[-1]]))
    with pytest.raises(UsageError, match="2 entries"):
        usage(np.zeros((3, 1), np.uint16), [4, 4])
    with pytest.raises(InputError, match="at least one item"):
        UsageCounter([4]).result()
    with pytest.raises(InputError, match="update first"):
        CollisionCounter([4]).result()


def judge(codes, sizes, **options):
    return verdict(usage(codes, sizes), collisions(codes), **options)


def test_even_codes_are_healthy_where_ids_suffice_for_the_items():
    rng = np.random.default_rng(0)
    assert judge(rng.integers(0, 256, (5000, 3)), 256).level == "healthy"
    short = judge(rng.integers(0, 64, (5000, 1)), 64)
    assert [(f.name, f.severity) for f in short.findings] == [("small-id-space", "warning")]
    assert judge(rng.integers(0, 4096, (40, 3)), 4096).level == "healthy"  # fewer items than codes
    assert judge(np.zeros((1, 3), np.uint16), 256).level == "healthy"


def test_collapse_is_found_at_its_level():
    codes = np.random.default_rng(0).integers(0, 256, (5000, 3))
    codes[:, 1] = codes[:, 1] % 5
    found = judge(codes, 256)
    assert found.level == "unhealthy"
    assert not found.healthy
    assert (found.findings[0].name, found.findings[0].level) == ("collapsed-level", 1)
    assert "dead-codes" in {f.name for f in found.findings}
    assert "verdict: unhealthy" in found.summary()


def test_giant_bucket_and_collisions_are_found():
    codes = np.random.default_rng(0).integers(0, 256, (5000, 3))
    codes[:200] = codes[0]
    names = {f.name: f.severity for f in judge(codes, 256).findings}
    assert names == {"giant-bucket": "unhealthy"}
    repeated = np.repeat(codes[200:1400], 4, axis=0)
    assert "collisions" in {f.name for f in judge(repeated, 256).findings}


def test_copies_in_the_input_are_not_blamed_on_the_tokenizer():
    rng = np.random.default_rng(0)
    codes = np.repeat(rng.integers(0, 256, (1200, 3)), 4, axis=0)
    groups = np.repeat(np.arange(1200), 4)
    found = verdict(usage(codes, 256), collisions(codes, duplicate_groups=groups))
    assert [f.name for f in found.findings] == ["duplicate-input"]
    assert found.level == "warning"


def test_errors_are_judged_and_everything_is_json():
    codes = np.random.default_rng(0).integers(0, 256, (5000, 3))
    found = judge(
        codes, 256, training_error=0.2, validation_error=0.4, effective_sizes=[1.0, 2.0, 3.0]
    )
    assert [f.name for f in found.findings] == ["overfit"]
    assert "held out 0.4000" in found.summary()
    again = json.loads(json.dumps(found.to_dict()))
    assert again["level"] == "warning"
    assert again["collisions"]["unique_ids"] == found.collisions.unique_ids
    assert len(found.usage[0].to_dict(arrays=True)["counts"]) == 256
    worse = judge(codes, 256, training_error=0.9, validation_error=1.01)
    assert [f.name for f in worse.findings] == ["worse-than-mean"]
    with pytest.raises(InputError, match="2 entries"):
        judge(codes, 256, effective_sizes=[1.0, 2.0])
    with pytest.raises(InputError, match="no levels"):
        verdict((), collisions(codes))


def severities(found) -> dict[str, str]:
    return {f.name: f.severity for f in found.findings}


def in_buckets(sizes: list[int]) -> np.ndarray:
    """Codes of ids that hold so many items each; three levels of 256 codes, all used evenly."""
    ids = np.repeat(np.random.default_rng(0).permutation(len(sizes)), sizes)
    return np.stack([ids % 256, ids // 7 % 256, (ids // 256 * 89 + ids) % 256], axis=1)


@pytest.mark.parametrize(
    ("unique", "severity"), [(705, None), (695, "warning"), (405, "warning"), (395, "unhealthy")]
)
def test_collisions_are_judged_by_their_rate(unique, severity):
    sizes = [1000 // unique + (i < 1000 % unique) for i in range(unique)]
    assert severities(judge(in_buckets(sizes), 256)).get("collisions") == severity


@pytest.mark.parametrize(
    ("items", "largest", "severity"),
    [
        (40_000, 39, None),  # below a thousandth of the items
        (40_000, 41, "warning"),
        (40_000, 399, "warning"),
        (40_000, 401, "unhealthy"),
        (20_000, 32, None),  # over a thousandth, but not over 32 times the even filling
        (20_000, 33, "warning"),
    ],
)
def test_giant_buckets_are_judged_by_their_share(items, largest, severity):
    codes = in_buckets([largest] + [1] * (items - largest))
    assert severities(judge(codes, 256)).get("giant-bucket") == severity


@pytest.mark.parametrize(
    ("active", "collapsed"),
    [(65, None), (63, "warning"), (33, "warning"), (31, "unhealthy")],
)
def test_levels_are_judged_by_the_share_of_their_perplexity(active, collapsed):
    counts = np.zeros(256, int)
    counts[:active] = 20
    few = collisions(np.arange(256)[:, None])
    found = verdict([usage_from_counts(counts)], few)
    assert severities(found).get("collapsed-level") == collapsed
    assert found.level == (collapsed or "warning")  # the dead codes


@pytest.mark.parametrize(
    ("size", "items", "dead", "starved"),
    [(100, 900, 10, False), (100, 890, 11, True), (100, 40, 70, False), (100, 40, 71, True)],
)
def test_dead_codes_count_beyond_those_that_few_items_make_unavoidable(size, items, dead, starved):
    counts = np.zeros(size, int)
    counts[: size - dead] = items // (size - dead)
    counts[0] += items - counts.sum()
    found = verdict([usage_from_counts(counts)], collisions(np.arange(100)[:, None]))
    assert ("dead-codes" in severities(found)) == starved


@pytest.mark.parametrize(("copies", "severity"), [(0, None), (10, "note"), (11, "warning")])
def test_copies_in_the_input_are_judged_by_their_share(copies, severity):
    codes = np.random.default_rng(0).integers(0, 256, (1000, 3))
    groups = np.arange(1000)
    groups[1 : copies + 1] = 0
    codes[1 : copies + 1] = codes[0]
    found = verdict(usage(codes, 256), collisions(codes, duplicate_groups=groups))
    assert severities(found).get("duplicate-input") == severity
    assert found.healthy == (severity != "warning")
    if copies == 11:
        assert "11 items (1.10%)" in found.summary()


@pytest.mark.parametrize(
    ("training", "validation", "names"),
    [
        (0.4, 0.5, []),
        (0.4, 0.6, ["near-threshold"]),
        (0.4, 0.601, ["overfit"]),
        (None, 0.999, ["little-variance-kept"]),
        (None, 1.0, ["worse-than-mean"]),
        (1.0, None, ["worse-than-mean"]),
        (1.2, 0.9, ["little-variance-kept"]),  # held-out error decides where it is known
        (0.0, 0.5, []),
    ],
)
def test_errors_are_judged_at_their_thresholds(training, validation, names):
    codes = np.random.default_rng(0).integers(0, 256, (5000, 3))
    found = judge(codes, 256, training_error=training, validation_error=validation)
    assert [f.name for f in found.findings] == names


def test_summary_holds_the_figures():
    found = judge(np.array([[0, 1], [0, 1], [1, 0], [1, 1]]), 2, training_error=0.25)
    lines = found.summary().splitlines()
    assert lines[1].split(": ")[1] == "perplexity 2.0 of 2, 0 dead codes, largest code 50.00%"
    assert "3 unique of 4 items; 1 - unique/N 0.2500" in lines[3]
    assert lines[3].endswith("items in shared buckets 0.5000; largest bucket 2")
    assert lines[4] == "  relative error: training 0.2500"


def test_levels_of_one_code_are_judged_neither_way():
    found = judge(np.zeros((50, 1), np.uint16), 1)
    assert found.usage[0].perplexity == 1
    assert "collapsed-level" not in severities(found)
    with pytest.raises(UsageError):
        UsageCounter([0])


def test_capacity_of_a_hand_computed_catalogue():
    counter = CapacityCounter([4], 3)
    assert len(counter) == 0
    assert counter.result().ids == 0
    counter.update(np.array([[0], [0], [1], [2]]), [0, 1, 1, 1])
    found = counter.result()
    assert (len(counter), found.ids, found.items) == (4, 3, (1, 3, 0))
    assert found.histograms == ({2: 1}, {1: 2, 2: 1}, {})
    assert found.capacity_shares == pytest.approx((1 / 6, 5 / 6, 0))
    assert found.colliding_item_rates == pytest.approx((1, 1 / 3, 0))
    twice = merge_capacities([found, found])
    assert (twice.ids, twice.histograms) == (6, ({2: 2}, {1: 4, 2: 2}, {}))
    with pytest.raises(UsageError, match="segments=0"):
        CapacityCounter([4], 0)
    with pytest.raises(UsageError, match="cannot be merged"):
        counter.merge(CapacityCounter([4], 2))
    for segments in ([3], [-1]):
        with pytest.raises(InputError, match="0 to 2"):
            counter.update(np.array([[0]]), segments)
    with pytest.raises(InputError, match="same segments"):
        merge_capacities([found, CapacityCounter([4], 2).result()])
    with pytest.raises(InputError, match="at least one part"):
        merge_capacities([])
