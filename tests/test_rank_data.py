"""From a log to rows: labels, splits that leak nothing, features, streams, bad input."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rank_cases import ITEMS, codes, data, item_table, log_table
from semid.data.ids import ItemIds
from semid.data.interactions import read_interactions
from semid.errors import IdsError, InputError, InteractionsError, UsageError
from semid.recommenders.ranking.builder import RankingDataConfig
from semid.recommenders.ranking.data import prepare_ranking_data
from semid.recommenders.ranking.features import CodeFeatures, code_table
from semid.recommenders.ranking.schema import Vocabulary
from semid.recommenders.ranking.splits import Label, split_rows
from semid.recommenders.ranking.stream import RankingStream


def pairs(part):
    return set(zip(part.person.tolist(), part.item.tolist(), strict=True))


def test_labels_are_read_and_written():
    assert str(Label.parse("rating>=8")) == "rating>=8"
    assert Label.parse("rating > 3").apply(np.array([3.0, 4.0])).tolist() == [False, True]
    assert str(Label.parse("sampled(popularity, 4)")) == "sampled(popularity,4)"
    for wrong, message in (
        ("rating=8", "neither COLUMN>=NUMBER"),
        ("sampled(unifrom,1)", "did you mean 'uniform'"),
        ("sampled(uniform,0)", "give 1 to"),
    ):
        with pytest.raises(UsageError, match=message):
            Label.parse(wrong)
    with pytest.raises(InteractionsError, match=r"every row is positive.*runs from 2 to 5"):
        Label.parse("rating>=1").apply(np.array([2.0, 5.0]))
    with pytest.raises(InteractionsError, match="1 rows without a number"):
        Label.parse("rating>=1").apply(np.array([2.0, np.nan]))


@pytest.mark.parametrize("split", ["random", "leave-last-out", "time"])
def test_parts_share_no_interaction(split):
    found = data(split=split)
    parts = [pairs(rows) for rows in found.parts.values()]
    assert sum(map(len, parts)) == len(log_table())
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_leave_last_out_and_time_look_forward():
    log = read_interactions(log_table())
    part = split_rows(log, "leave-last-out")
    for user in range(len(log.user_ids)):
        own = np.flatnonzero(log.users == user)
        ordered = part[own[np.argsort(log.order[own])]]
        assert ordered[-1] == 2
        assert ordered[-2] == 1
        assert (ordered[:-2] == 0).all()
    log = read_interactions(log_table(), time_column="timestamp")
    part = split_rows(log, "time")
    assert log.order[part == 0].max() < log.order[part == 1].min()
    assert log.order[part == 1].max() < log.order[part == 2].min()
    assert np.bincount(part).tolist() == [960, 120, 120]


def test_repeated_pairs_stay_together_in_a_random_split():
    log = read_interactions(pa.concat_tables([log_table()] * 2))
    part = split_rows(log, "random", seed=3)
    assert np.array_equal(part[:1200], part[1200:])


def test_vocabularies_and_popularity_come_from_training_rows():
    found = data(cold_items=0.2)
    train = found.parts["train"]
    assert set(train.user.tolist()) == set(range(1, len(found.schema.users)))
    cold = found.parts["cold"]
    trained = set(train.item.tolist())
    assert not trained & set(cold.item.tolist())
    assert (found.schema.id_rows[cold.item.numpy()] == 0).all()
    assert (found.interactions[cold.item.numpy()] == 0).all()
    assert found.interactions.sum() == len(train)
    assert found.positives.sum() == train.label.sum()
    rare = data(min_count=30)
    counts = np.bincount(rare.parts["train"].item.numpy(), minlength=ITEMS + 1)
    assert ((rare.schema.id_rows > 0) == (counts >= 30)).all()


def test_sampled_negatives_are_no_positives_of_the_past_and_know_no_future():
    found = prepare_ranking_data(
        log_table(), items=item_table(), config=RankingDataConfig(label="sampled(uniform,2)")
    )
    positives, seen = {}, set()
    for name in ("train", "validation", "test"):
        rows = found.parts[name]
        good = rows.label.numpy() == 1
        keys = np.stack([rows.person.numpy(), rows.item.numpy()], 1)
        positives[name] = set(map(tuple, keys[good].tolist()))
        seen |= positives[name]
        negative = set(map(tuple, keys[~good].tolist()))
        assert not negative & seen, name
        assert (~good).sum() + found.dropped_negatives >= 2 * good.sum() - found.dropped_negatives
    # Training negatives may be what is tested: to avoid them would tell the model the answer.
    rows = found.parts["train"]
    drawn = {
        key
        for key, label in zip(
            zip(rows.person.tolist(), rows.item.tolist(), strict=True), rows.label, strict=True
        )
        if not label
    }
    assert drawn & positives["test"]


def test_popularity_negatives_follow_training_counts():
    base = log_table(600, items=ITEMS)
    found = prepare_ranking_data(base, config=RankingDataConfig(label="sampled(popularity,3)"))
    rows = found.parts["train"]
    drawn = np.bincount(rows.item.numpy()[rows.label.numpy() == 0], minlength=ITEMS + 1)
    assert np.corrcoef(drawn[1:], found.positives[1:])[0, 1] > 0.6


def test_history_is_the_users_training_past():
    table = log_table()
    found = data(history=4)
    log = read_interactions(table)
    train = pairs(found.parts["train"])
    liked = np.asarray(log.rating) >= 4
    catalogue = found.schema.items
    item_row = catalogue.rows(log.item_ids)[log.items]
    times = {
        (int(u), int(i)): (t, good)
        for u, i, t, good in zip(log.users, item_row, log.order, liked, strict=True)
    }
    for name in ("train", "test"):
        rows = found.parts[name]
        inputs, _ = rows.batch(torch.arange(len(rows)))
        for row in range(0, len(rows), 7):
            user, item = int(rows.person[row]), int(rows.item[row])
            now = times[user, item][0]
            past = sorted(
                (
                    (t, i)
                    for (u, i), (t, good) in times.items()
                    if u == user and good and t < now and (u, i) in train
                ),
                reverse=True,
            )[:4]
            expected = [i for _, i in past] + [0] * (4 - len(past))
            assert inputs.history[row].tolist() == expected


def test_protocol_says_what_was_done():
    found = data(cold_items=0.1, history=2, categorical=("device",), dense=("price",), seed=7)
    for part in (
        "label=rating>=4",
        "split=random(0.8/0.1/0.1)",
        "data_seed=7",
        "history=2",
        "cold_items=0.1",
        "fields=user+item+brand+categories+device+price",
    ):
        assert part in found.protocol


def test_attributes_of_items():
    schema = data().schema
    brand, categories = schema.attributes["brand"], schema.attributes["categories"]
    assert not brand.multi
    assert categories.multi
    names = categories.vocabulary.strings()
    row = categories.rows[1 + 1]
    assert [names[r - 1] for r in row if r] == ["top", "c0"]
    assert set(brand.vocabulary.strings()) == {"b0", "b1"}
    assert brand.rows[0] == 0


def test_vocabulary_reserves_row_0_and_survives_storage():
    words = Vocabulary(pa.array(["a", "ü", ""]))
    assert words.rows(pa.array(["ü", "x", None, "a"])).tolist() == [2, 0, 0, 1]
    again = Vocabulary.of(words.tensors("w"), "w")
    assert again.strings() == words.strings()


@pytest.mark.parametrize(
    ("mode", "fields", "slots"),
    [("levels", 3, 3), ("multi", 2, 2), ("prefix", 3, 3), ("ngram", 1, 2)],
)
def test_code_features(mode, fields, slots):
    ids = codes()
    scale = 2 if mode == "multi" else None
    catalogue = ItemIds([f"i{n}" for n in range(ITEMS)] + ["new"])
    found = code_table(ids, catalogue, CodeFeatures(mode=mode, scale=scale))
    assert len(found.fields) == fields
    assert len(found.sizes) == slots
    assert found.without == 1
    assert (found.rows[0] == 0).all()
    assert (found.rows[-1] == 0).all()
    assert (found.rows[1:-1] > 0).all()
    assert (found.rows.max(0) < found.sizes).all()
    spans = {
        "levels": [(0, 1), (1, 2), (2, 3)],
        "multi": [(0, 1), (0, 1)],
        "prefix": [(0, 1), (0, 2), (0, 3)],
        "ngram": [(0, 2), (1, 3)],
    }[mode]
    for slot, (start, end) in enumerate(spans):
        grams = [tuple(row) for row in ids.codes[:, start:end].tolist()]
        numbers = found.rows[1:-1, slot].tolist()
        assert len(set(zip(grams, numbers, strict=True))) == len(set(grams)) == len(set(numbers))


def test_prefixes_over_the_budget_are_hashed_and_counted():
    ids = codes()
    found = code_table(ids, ids.items, CodeFeatures(mode="prefix", max_rows=20))
    distinct = len(np.unique(ids.codes, axis=0))
    assert found.sizes[2] == 20
    assert found.collisions >= distinct - 19


def test_controls():
    ids = codes()
    plain = code_table(ids, ids.items, CodeFeatures())
    shuffled = code_table(ids, ids.items, CodeFeatures(control="shuffled"))
    assert sorted(map(tuple, plain.rows[1:])) == sorted(map(tuple, shuffled.rows[1:]))
    assert (plain.rows != shuffled.rows).any(1).mean() > 0.8
    drawn = code_table(ids, ids.items, CodeFeatures(control="random"))
    assert drawn.sizes == plain.sizes
    assert (drawn.rows != plain.rows).mean() > 0.7
    other = code_table(ids, ids.items, CodeFeatures(control="random", seed=1))
    assert (drawn.rows != other.rows).any()
    single = code_table(ids, ids.items, CodeFeatures(levels=(1,)))
    assert np.array_equal(single.rows[:, 0], plain.rows[:, 1])
    assert single.fields == ("code:2",)


def test_an_item_table_without_rows_is_named(tmp_path):
    log = pa.table({"user_id": ["u", "u"], "item_id": ["a", "b"], "position": [0, 1]})
    empty = pa.table({"item_id": pa.array([], pa.string())})
    with pytest.raises(InteractionsError, match="there are no ids"):
        prepare_ranking_data(log, items=empty, config=RankingDataConfig(label="sampled(uniform,1)"))


def test_codes_that_do_not_fit():
    ids = codes()
    with pytest.raises(UsageError, match="these codes are residual"):
        code_table(ids, ids.items, CodeFeatures(mode="parallel"))
    with pytest.raises(UsageError, match="a shared prefix means nothing"):
        code_table(codes(hierarchical=False), ids.items, CodeFeatures(mode="prefix"))
    with pytest.raises(UsageError, match="more than the 3 codes"):
        code_table(ids, ids.items, CodeFeatures(scale=4))
    with pytest.raises(IdsError, match="none of the 2 items has codes"):
        code_table(ids, ItemIds(["x", "y"]), CodeFeatures())
    with pytest.raises(IdsError, match="the ids hold no items"):
        code_table(ids.take(np.arange(0)), ids.items, CodeFeatures())
    with pytest.raises(UsageError, match="did you mean 'levels'"):
        CodeFeatures(mode="level")


def test_a_stream_reads_the_same_rows(tmp_path):
    table = log_table()
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=100)
    options = RankingDataConfig(label="rating>=4", categorical=("device",), dense=("price",))
    found = RankingStream.open(
        tmp_path / "log.parquet", items=item_table(), config=options, buffer_rows=150
    )
    held = sum(len(rows) for rows in found.parts.values())
    assert found.train_rows + held == len(table)
    assert found.interactions.sum() == found.train_rows
    batches = found.batches(90, seed=1, device=torch.device("cpu"))

    def epoch(number, first=0):
        return [
            torch.stack([i.user, i.item, label.long()], 1)
            for (i, label), _ in batches.batches(number, first)
        ]

    one, again, two = epoch(0), epoch(0), epoch(1)
    assert [len(b) for b in one] == batches.sizes
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], two[0])
    assert all(torch.equal(a, b) for a, b in zip(one[3:], epoch(0, 3), strict=True))
    rows = {tuple(row) for row in torch.cat(one).tolist()}
    assert len(rows) == found.train_rows
    assert rows == {tuple(row) for row in torch.cat(two).tolist()}
    order = torch.cat(one)[:, 0] * 1000 + torch.cat(one)[:, 1]
    assert not torch.equal(order, order.sort().values)
    moments = found.schema.dense["price"]
    assert moments == pytest.approx((10, 4), rel=0.1)
    for wrong, message in (
        ({"label": "sampled(uniform,1)"}, "draws negatives"),
        ({"label": "rating>=4", "split": "time"}, "whole log at once"),
        ({"label": "rating>=4", "history": 3}, "history"),
    ):
        with pytest.raises(UsageError, match=message):
            RankingStream.open(tmp_path / "log.parquet", config=RankingDataConfig(**wrong))


def test_bad_logs():
    table = log_table(200)
    with pytest.raises(InteractionsError, match="every row is positive"):
        prepare_ranking_data(table, config=RankingDataConfig(label="rating>=0"))
    with pytest.raises(UsageError, match="click"):
        prepare_ranking_data(table, config=RankingDataConfig(label="click>=1"))
    holes = table.set_column(
        table.column_names.index("price"), "price", pa.array([float("nan")] + [1.0] * 199)
    )
    with pytest.raises(InputError, match=r"dense column 'price'.*1 rows.*first: row 0"):
        prepare_ranking_data(holes, config=RankingDataConfig(label="rating>=4", dense=("price",)))
    with pytest.raises(InputError, match=r"column 'price'.*a category is a string"):
        prepare_ranking_data(
            table, config=RankingDataConfig(label="rating>=4", categorical=("price",))
        )
    with pytest.raises(InputError, match=r"column 'device'.*holds numbers"):
        prepare_ranking_data(table, config=RankingDataConfig(label="rating>=4", dense=("device",)))
    with pytest.raises(UsageError, match="needs to know what came first"):
        prepare_ranking_data(
            table.drop_columns(["timestamp"]),
            config=RankingDataConfig(label="rating>=4", split="leave-last-out"),
        )
    with pytest.raises(UsageError, match="add up to 1"):
        RankingDataConfig(fractions=(0.5, 0.1, 0.1))
    with pytest.raises(UsageError, match="no table of items"):
        prepare_ranking_data(
            table, config=RankingDataConfig(label="rating>=4", item_columns=("brand",))
        )
    strangers = item_table().set_column(0, "item_id", pa.array([f"x{n}" for n in range(ITEMS)]))
    with pytest.raises(InteractionsError, match=r"none of the .* items"):
        prepare_ranking_data(table, items=strangers, config=RankingDataConfig(label="rating>=4"))
