"""Unique ids: every pair told apart, at the least distortion, whatever the order of the rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import semid
from catalogue_cases import drawn_tokenizer, parallel_tokenizer, rows
from semid.catalogue.assignment import assign_rows
from semid.catalogue.placement import bucket_sizes, group_numbers, group_starts
from semid.catalogue.uniqueness import make_unique
from semid.codes import SemanticIds
from semid.data.ids import ItemIds
from semid.errors import FingerprintError, IdsError, InputError, UsageError

NAMES = [f"item-{n}" for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return drawn_tokenizer()


@pytest.fixture(scope="module")
def x():
    data = rows()
    data[50:] = data[40:50]  # exact copies must collide
    return data


@pytest.fixture(scope="module")
def ids(tokenizer, x):
    return tokenizer.encode(x, ids=ItemIds(NAMES))


def unique(codes) -> int:
    return len(np.unique(codes, axis=0))


def test_an_appended_token_is_no_level_of_the_model(tokenizer, ids):
    told_apart = make_unique(ids).ids
    assert told_apart.levels == ids.levels + 1
    assert np.array_equal(tokenizer.decode(told_apart), tokenizer.decode(ids))
    assert np.array_equal(tokenizer.quantize(told_apart), tokenizer.quantize(ids))
    with pytest.raises(InputError, match="shape"):
        tokenizer.decode(told_apart.codes)  # bare numbers do not say what the last one is


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_assignment_equals_scipy(data):
    n, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 7))
    cost = np.array(data.draw(st.lists(st.integers(0, 6), min_size=n * k, max_size=n * k)))
    cost = cost.reshape(n, k).astype(float)
    capacity = np.array(data.draw(st.lists(st.integers(0, 3), min_size=k, max_size=k)))
    labels = assign_rows(cost, capacity)
    placed = np.flatnonzero(labels >= 0)
    assert (np.bincount(labels[placed], minlength=k) <= capacity).all()
    assert len(placed) == min(n, capacity.sum())
    slots = np.repeat(np.arange(k), capacity)
    if len(slots):
        r, c = linear_sum_assignment(cost[:, slots])
        assert cost[placed, labels[placed]].sum() == cost[:, slots][r, c].sum()


def test_assignment_refuses_nonsense():
    with pytest.raises(UsageError, match="finite"):
        assign_rows(np.array([[np.nan]]))
    with pytest.raises(UsageError, match="capacity"):
        assign_rows(np.zeros((2, 2)), [1])
    assert assign_rows(np.zeros((0, 3))).tolist() == []


def test_append_numbers_each_bucket_closest_first(ids):
    done = make_unique(ids, method="append")
    assert unique(ids.codes) < 60
    assert unique(done.ids.codes) == 60
    assert np.array_equal(done.ids.codes[:, :-1], ids.codes)
    assert done.ids.items == ids.items
    for a, b in itertools.permutations(range(60), 2):
        if (ids.codes[a] == ids.codes[b]).all():
            first = (ids.residual_norms[a], NAMES[a]) < (ids.residual_norms[b], NAMES[b])
            assert (done.ids.codes[a, -1] < done.ids.codes[b, -1]) == first
    assert done.report.moved == 0
    assert done.report.shared_before == sum(
        (ids.codes == row).all(1).sum() > 1 for row in ids.codes
    )
    assert done.report.shared_after == 0
    assert done.ids.info.codebook_sizes == (4, 8, 256)


@pytest.mark.parametrize("items", [0, 1])
def test_catalogues_of_one_item_and_of_none(ids, items):
    done = make_unique(ids.take(np.arange(items)))
    assert (done.report.unique_before, done.report.unique_after) == (items, items)
    assert (done.report.shared_before, done.report.moved) == (0, 0)
    assert done.report.distortion_after == done.report.distortion_before


def test_buckets_are_numbered_in_the_order_of_the_codes():
    codes = np.array([[1, 0], [0, 2], [1, 0], [0, 1]])
    assert group_numbers(codes).tolist() == [2, 1, 2, 0]
    assert bucket_sizes(group_numbers(codes)).tolist() == [2, 1, 2, 1]
    assert group_numbers(codes[:0]).tolist() == bucket_sizes(np.zeros(0, int)).tolist() == []
    assert group_numbers(codes[:, :0]).tolist() == [0] * 4
    assert group_starts(np.array([3, 3, 5, 7, 7])).tolist() == [0, 2, 3, 5]
    assert group_starts(np.zeros(0, int)).tolist() == [0]


def test_append_beyond_its_alphabet_is_reported(ids):
    done = make_unique(ids, method="append", capacity=2)
    sizes = np.unique(ids.codes, axis=0, return_counts=True)[1]
    assert done.report.unplaced == np.maximum(sizes - 2, 0).sum()
    assert (done.ids.codes[done.report.unplaced_rows, -1] == 1).all()


def brute_force_extra(tokenizer, x, codes, capacity):
    """Least total extra distance over all placements, group by group, by scipy."""
    total = 0.0
    books = tokenizer.codebooks
    inputs = (
        x
        if not tokenizer.hierarchical
        else x
        - sum((book[codes[:, level]] for level, book in enumerate(books[:-1])), np.zeros_like(x))
    )
    distance = ((inputs[:, None, :].astype(float) - books[-1][None]) ** 2).sum(-1)
    slots = np.repeat(np.arange(len(books[-1])), capacity)
    for prefix in np.unique(codes[:, :-1], axis=0):
        rows_ = np.flatnonzero((codes[:, :-1] == prefix).all(1))
        cost = distance[rows_] - distance[rows_].min(1, keepdims=True)
        r, c = linear_sum_assignment(cost[:, slots])
        total += cost[:, slots][r, c].sum()
    return total


@pytest.mark.parametrize("make", [drawn_tokenizer, parallel_tokenizer])
@pytest.mark.parametrize("capacity", [1, 2])
def test_reassign_is_the_cheapest_placement(make, capacity):
    tokenizer, data = make(sizes=(8, 32)), rows(70)
    ids = tokenizer.encode(data)
    done = make_unique(
        ids, method="reassign", tokenizer=tokenizer, embeddings=data, capacity=capacity
    )
    counts = np.unique(done.ids.codes, axis=0, return_counts=True)[1]
    free = counts[np.unique(done.ids.codes, axis=0, return_inverse=True)[1].ravel()]
    over = np.maximum(np.unique(ids.codes[:, 0], return_counts=True)[1] - 32 * capacity, 0)
    assert done.report.unplaced == over.sum()
    assert (free <= capacity).all() or done.report.unplaced
    assert np.array_equal(done.ids.codes[:, :-1], ids.codes[:, :-1])
    assert np.array_equal(done.ids.encoded, ids.codes)
    left = data - tokenizer.quantize(done.ids.codes)
    assert done.report.distortion_after == pytest.approx((left**2).sum() / 70, rel=1e-5)
    if tokenizer.hierarchical:
        paid = 70 * (done.report.distortion_after - done.report.distortion_before)
        expected = brute_force_extra(tokenizer, data, ids.codes.astype(int), capacity)
        assert paid == pytest.approx(expected, rel=1e-4)
    assert done.report.moved == (done.ids.codes != ids.codes).any(1).sum() > 0


@pytest.mark.parametrize("chunk", [1, 5, 20])
def test_chunks_of_groups_change_nothing(monkeypatch, chunk):
    tokenizer, data = drawn_tokenizer(sizes=(8, 32)), rows(70)
    ids = tokenizer.encode(data)
    whole = make_unique(ids, method="reassign", tokenizer=tokenizer, embeddings=data)
    monkeypatch.setattr("semid.catalogue.placement.CHUNK_ROWS", chunk)
    parts = make_unique(ids, method="reassign", tokenizer=tokenizer, embeddings=data)
    assert np.array_equal(parts.ids.codes, whole.ids.codes)
    assert parts.report.largest_extra == whole.report.largest_extra > 0


def test_reassign_reports_who_found_no_place(tokenizer):
    data = np.repeat(rows(3), 20, axis=0)  # 20 copies of each for 8 last codes
    ids = tokenizer.encode(data)
    done = make_unique(ids, method="reassign", tokenizer=tokenizer, embeddings=data)
    groups = len(np.unique(ids.codes[:, 0]))
    assert done.report.unplaced == 60 - 8 * groups
    kept = done.report.unplaced_rows
    assert np.array_equal(done.ids.codes[kept], ids.codes[kept])
    assert "no place" in done.report.summary()


@pytest.mark.parametrize("method", ["append", "reassign", "none"])
def test_row_order_changes_nothing(tokenizer, x, ids, method):
    order = np.random.default_rng(3).permutation(60)
    given_ = {} if method != "reassign" else {"tokenizer": tokenizer, "embeddings": x}
    given_ |= {"embedding_ids": ItemIds(NAMES)} if given_ else {}
    straight = make_unique(ids, method=method, **given_).ids
    shuffled = make_unique(ids.take(order), method=method, **given_).ids
    assert np.array_equal(shuffled.codes, straight.codes[order])
    assert shuffled.items == ids.items.take(order)


@pytest.mark.parametrize("method", ["append", "reassign"])
def test_idempotent_reversible_and_stored(tokenizer, x, ids, method, tmp_path):
    given_ = {"tokenizer": tokenizer, "embeddings": x, "embedding_ids": ItemIds(NAMES)}
    once = make_unique(ids, method=method, **given_).ids
    once.write(tmp_path / "once.parquet")
    read = SemanticIds.read(tmp_path / "once.parquet")
    assert read.info == once.info
    twice = make_unique(read, method=method, **given_).ids
    assert np.array_equal(twice.codes, once.codes)
    assert twice.info == once.info
    back = make_unique(read, method="none").ids
    assert np.array_equal(back.codes, ids.codes)
    assert back.info == ids.info
    assert back.model_codes is None
    other = "append" if method == "reassign" else "reassign"
    assert np.array_equal(
        make_unique(read, method=other, **given_).ids.codes,
        make_unique(ids, method=other, **given_).ids.codes,
    )


def test_plain_files_are_as_before(ids, tmp_path):
    ids.write(tmp_path / "plain.parquet")
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "plain.parquet")
    assert table.column_names == ["item_id", "codes", "residual_norm"]
    assert b"unique" not in table.schema.metadata[b"semid"]


def test_wrong_calls_are_refused(tokenizer, x, ids):
    with pytest.raises(UsageError, match="did you mean 'append'"):
        make_unique(ids, method="apend")
    with pytest.raises(UsageError, match="--model and --embeddings"):
        make_unique(ids, method="reassign", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="capacity=0"):
        make_unique(ids, capacity=0)
    with pytest.raises(UsageError, match="not with none"):
        make_unique(ids, method="none", capacity=2)
    with pytest.raises(FingerprintError, match="another codebook"):
        make_unique(ids, method="reassign", tokenizer=drawn_tokenizer(seed=9), embeddings=x)
    with pytest.raises(IdsError, match="60 of 60 items have no embedding"):
        make_unique(ids, method="reassign", tokenizer=tokenizer, embeddings=x)
    info = make_unique(ids).ids.info
    with pytest.raises(InputError, match="no model_codes"):
        SemanticIds(ids.items, make_unique(ids).ids.codes, ids.residual_norms, info)


def test_imported_ids_without_norms_are_numbered_by_id(ids):
    unknown = SemanticIds(ids.items, ids.codes, np.full(60, np.nan, np.float32), ids.info)
    done = make_unique(unknown)
    assert unique(done.ids.codes) == 60
    assert done.report.to_dict()["distortion_before"] is None


def test_names_are_public():
    assert semid.make_unique is make_unique
