"""Contrastive pairs and losses, against lists written out and loops."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

import semid
from semid.data.ids import ItemIds
from semid.data.interactions import TRAIN, split_users
from semid.errors import InteractionsError, UsageError
from semid.tokenizers.behavior import Neighbors, Positives, SequencePairs, TablePairs, read_behavior
from semid.tokenizers.neural.continuous import info_nce, uniformity

EVERY = np.ones(12, dtype=bool)


def log(users: int = 400, items: int = 12, seed: int = 0) -> pa.Table:
    generator = np.random.default_rng(seed)
    return pa.table(
        {
            "user_id": [f"u{n // 5}" for n in range(5 * users)],
            "item_id": [f"i{n}" for n in generator.integers(0, items, 5 * users)],
            "timestamp": list(range(5 * users)),
        }
    )


IDS = ItemIds([f"i{n}" for n in range(12)])


def test_negatives_leave_out_the_anchor_and_its_other_positives():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 30, (2, 80))
    positives = Positives(first, second, 30)
    related = {(a, b) for a, b in zip(first, second, strict=True)}
    related |= {(b, a) for a, b in related}
    for item in range(30):
        assert positives.of(item).tolist() == sorted({b for a, b in related if a == item})
    chosen = generator.integers(0, 80, 25)
    a, b = first[chosen], second[chosen]
    found = positives.excluded(a, b)
    for i in range(25):
        for j in range(25):
            assert found[i, j] == (i != j and (a[i] == b[j] or (a[i], b[j]) in related))


def test_sequences_give_every_consecutive_pair_and_no_other():
    items = np.array([0, 1, 2, -1, 3, 3, 4, 5, 6, 7, 8], dtype=np.int32)
    offsets = np.array([0, 3, 7, 7, 9, 11], dtype=np.int64)
    users = np.array([True, True, True, False, True])
    pairs = SequencePairs(items, offsets, users, 9, protocol="")
    first, second = pairs.draw(2000, np.random.default_rng(0))
    found = set(zip(first.tolist(), second.tolist(), strict=True))
    assert found == {(0, 1), (1, 2), (3, 4), (7, 8)}
    assert pairs.count == 4
    shares = np.bincount(first, minlength=9)[[0, 1, 3, 7]] / 2000
    np.testing.assert_allclose(shares, 0.25, atol=0.05)


def test_no_pair_of_a_user_who_is_not_a_training_user():
    table = log()
    found = read_behavior(table, None, ids=IDS, train=EVERY)
    users = [f"u{n}" for n in range(400)]
    part = dict(zip(users, split_users(users), strict=True))
    owners, items = table["user_id"].to_pylist(), table["item_id"].to_pylist()
    expected = {
        (int(items[n][1:]), int(items[n + 1][1:]))
        for n in range(len(items) - 1)
        if owners[n] == owners[n + 1] and part[owners[n]] == TRAIN and items[n] != items[n + 1]
    }
    first, second = found.train.draw(20_000, np.random.default_rng(0))
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected
    assert found.select is not None
    assert "training users" in found.train.protocol
    assert "test users" in found.train.protocol


def test_pairs_speak_of_training_rows_and_leave_held_out_items_out():
    train = EVERY.copy()
    train[[2, 7]] = False
    rows = np.flatnonzero(train)
    given = np.array([[0, 1], [1, 2], [3, 8], [7, 9], [10, 11]])
    found = read_behavior(None, given, ids=IDS, train=train).train
    first, second = found.draw(200, np.random.default_rng(0))
    pairs = set(zip(rows[first].tolist(), rows[second].tolist(), strict=True))
    assert pairs == {(0, 1), (3, 8), (10, 11)}


def test_pairs_by_id_table_and_neighbors(tmp_path):
    ids = np.array([["i0", "i3"], ["i4", "i5"], ["i6", "nobody"]])
    assert read_behavior(None, ids, ids=IDS, train=EVERY).train.count == 2
    table = pa.table({"item_id": ["i0", "i1"], "related_item_id": ["i2", "i3"]})
    found = read_behavior(None, table, ids=IDS, train=EVERY).train
    first, second = found.draw(50, np.random.default_rng(0))
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == {(0, 2), (1, 3)}
    angles = np.repeat(np.arange(6), 2) + np.tile([0.0, 0.05], 6)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    near = read_behavior(
        None, Neighbors(circle, k=1, ids=IDS.to_arrow()), ids=IDS, train=EVERY
    ).train
    first, second = near.draw(500, np.random.default_rng(0))
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == {(n, n ^ 1) for n in range(12)}


def test_pairs_that_cannot_be_used_are_refused():
    with pytest.raises(InteractionsError, match="none of the 2 pairs"):
        read_behavior(None, np.array([["a", "b"], ["c", "i1"]]), ids=IDS, train=EVERY)
    with pytest.raises(UsageError, match="row numbers outside 0 to 11"):
        read_behavior(None, np.array([[0, 12]]), ids=IDS, train=EVERY)
    with pytest.raises(UsageError, match="shape"):
        read_behavior(None, np.zeros((3, 3), dtype=int), ids=IDS, train=EVERY)
    with pytest.raises(InteractionsError, match="no order"):
        read_behavior(log().drop_columns("timestamp"), None, ids=IDS, train=EVERY)
    with pytest.raises(UsageError, match="give one of"):
        read_behavior(log(), np.array([[0, 1]]), ids=IDS, train=EVERY)
    with pytest.raises(InteractionsError, match="paired with themselves"):
        TablePairs(np.array([1]), np.array([1]), 3, protocol="")


def test_tokenizers_refuse_what_they_would_not_use(clustered):
    with pytest.raises(UsageError, match="rqkmeans learns from embeddings alone"):
        semid.RQKMeans(codebook_size=16).fit(clustered, interactions=log())
    # Before any row is read: the source is not there.
    with pytest.raises(UsageError, match="contrastive_weight=0"):
        semid.DRQVAE(codebook_size=16).fit("nowhere.npy", interactions=log())
    for weight in ("contrastive_weight", "uniformity_weight"):
        with pytest.raises(UsageError, match=rf"needs pairs.*, or --\S+ 0 \({weight}=\) to learn"):
            semid.DRQVAE(codebook_size=16, **{weight: 0.1}).fit("nowhere.npy")
    with pytest.raises(UsageError, match="behavior_weight=0"):
        semid.BARQ(codebook_size=16, behavior_weight=0).fit("nowhere.npy", pairs=[[0, 1]])


def test_info_nce_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    excluded = torch.rand(6, 6, generator=generator) < 0.3
    excluded.fill_diagonal_(False)
    found = float(info_nce(a, b, temperature=0.2, excluded=excluded))

    def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(x @ y / x.norm() / y.norm())

    total = 0.0
    for i in range(6):
        forth = [j for j in range(6) if not excluded[i, j]]
        back = [j for j in range(6) if not excluded[j, i]]
        own = cosine(a[i], b[i]) / 0.2
        total -= own - math.log(sum(math.exp(cosine(a[i], b[j]) / 0.2) for j in forth))
        total -= own - math.log(sum(math.exp(cosine(a[j], b[i]) / 0.2) for j in back))
    assert found == pytest.approx(total / 12, rel=1e-5)


def test_uniformity_is_lower_for_points_that_are_spread():
    spread = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    narrow = torch.tensor([[1.0, 0], [1, 0.1], [1, -0.1], [1, 0.2]])
    assert float(uniformity(spread)) < float(uniformity(narrow))
    expected = math.log((8 * math.exp(-4) + 4 * math.exp(-8)) / 12)
    assert float(uniformity(spread)) == pytest.approx(expected, rel=1e-5)
