"""Interactions from every place, sequences against a loop over users, the split of users."""

import json
import logging
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.data.ids import ItemIds
from semid.data.interactions import Interactions, read_interactions, split_users
from semid.errors import InteractionsError, UsageError

DATA = Path(os.environ.get("SEMID_DATA", Path(__file__).parents[2] / "shared" / "data"))
ROWS = [  # user, item, timestamp, rating; the users interleave and times tie
    ("u1", "b", 20, 5.0),
    ("u2", "a", 10, 4.0),
    ("u1", "a", 10, 3.0),
    ("u1", "c", 20, None),
    ("u2", "zz", 15, 1.0),
    ("u2", "c", 30, 2.0),
    ("u3", "a", 5, 5.0),
]
NAMES = ["user_id", "item_id", "timestamp", "rating"]
TABLE = pa.table({name: [row[i] for row in ROWS] for i, name in enumerate(NAMES)})
IDS = ItemIds(["a", "b", "c", "never"])
EXPECTED = {"u1": [0, 1, 2], "u2": [0, -1, 2], "u3": [0]}


def as_dict(sequences):
    users = sequences.user_ids.to_pylist()
    return {user: sequences[i].tolist() for i, user in enumerate(users)}


def containers(folder):
    pq.write_table(TABLE, folder / "log.parquet", row_group_size=2)
    (folder / "parts").mkdir()
    for i, start in enumerate((0, 3)):
        pq.write_table(TABLE.slice(start, 3 + i), folder / "parts" / f"{i}.parquet")
    frame = TABLE.to_pandas()
    frame.to_csv(folder / "log.csv", index=False)
    frame.to_csv(folder / "log.tsv.gz", index=False, sep="\t")
    coded = frame.astype({"user_id": "category", "item_id": "category"})
    dictionary = TABLE.set_column(0, "user_id", TABLE["user_id"].dictionary_encode())
    return {
        "parquet": folder / "log.parquet",
        "folder": folder / "parts",
        "glob": f"{folder}/parts/*.parquet",
        "csv": folder / "log.csv",
        "tsv.gz": folder / "log.tsv.gz",
        "arrow": pa.concat_tables([TABLE.slice(0, 2), TABLE.slice(2)]),
        "dictionary": pa.concat_tables([dictionary.slice(0, 2), dictionary.slice(2)]),
        "pandas": frame,
        "categories": coded,
        "polars": pl.from_arrow(TABLE),
        "polars categories": pl.from_arrow(TABLE).cast({"user_id": pl.Categorical}),
    }


def test_every_container_gives_the_same_interactions(tmp_path):
    for name, source in containers(tmp_path).items():
        log = read_interactions(source)
        assert len(log) == len(ROWS), name
        assert log.users.dtype == log.items.dtype == np.int32
        assert log.user_ids.to_pylist() == ["u1", "u2", "u3"], name
        assert log.item_ids.take(pa.array(log.items)).to_pylist() == [row[1] for row in ROWS]
        assert log.has_order
        assert log.order.tolist() == [row[2] for row in ROWS]
        np.testing.assert_array_equal(log.rating, [5, 4, 3, np.nan, 1, 2, 5])
        assert as_dict(log.sequences(IDS)) == EXPECTED, name
    assert read_interactions(log) is log


def test_ties_in_time_keep_the_order_of_the_file_and_unknown_items_their_place(caplog):
    with caplog.at_level(logging.WARNING):
        sequences = read_interactions(TABLE).sequences(IDS)
    assert as_dict(sequences) == EXPECTED
    assert sequences.unknown == 1
    assert "1 of 4 items are not in the catalogue" in caplog.text
    pairs, users = sequences.consecutive_pairs()
    # u2 went from 'a' over an unknown item to 'c': that is no pair.
    assert pairs.tolist() == [[0, 1], [1, 2]]
    assert users.tolist() == [0, 0]
    assert pairs.dtype == users.dtype == np.int32
    none, _ = sequences.consecutive_pairs(np.array([False, True, True]))
    assert none.shape == (0, 2)


def test_ties_decide_whether_position_goes_before_timestamp():
    table = pa.table(
        {
            "user_id": ["u", "u", "u"],
            "item_id": ["a", "b", "c"],
            "timestamp": [1, 1, 0],
            "position": [2, 0, 1],
        }
    )
    log = read_interactions(table, ties="file")
    assert log.order_text == "position, ties in file order"
    assert log.sequences(IDS)[0].tolist() == [1, 2, 0]
    by_time = read_interactions(table, time_column="timestamp", ties="file")
    assert by_time.sequences(IDS)[0].tolist() == [2, 0, 1]
    # What the position says about a tie is the file's order too.
    shuffled = read_interactions(table)
    assert shuffled.order_text == "timestamp, ties shuffled with seed 0"
    ends = [
        tuple(read_interactions(table, ties_seed=seed).sequences(IDS)[0].tolist())
        for seed in range(20)
    ]
    assert set(ends) == {(2, 0, 1), (2, 1, 0)}
    with pytest.raises(UsageError, match=r"--ties \(ties=\)"):
        read_interactions(table, ties="random")


def test_shuffled_ties_do_not_depend_on_the_order_of_the_file():
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 5)
    table = pa.table(
        {
            "user_id": users,
            "item_id": np.tile(np.arange(5), 200),
            "timestamp": np.tile([1, 1, 1, 0, 2], 200),
        }
    )
    ids = ItemIds([str(item) for item in range(5)])

    def ends(log):
        sequences = log.sequences(ids)
        return {
            user: sequences[place].tolist()
            for place, user in enumerate(sequences.user_ids.to_pylist())
        }

    expected = ends(read_interactions(table))
    rows = pa.array(generator.permutation(len(table)))
    assert ends(read_interactions(table.take(rows))) == expected
    assert all(items[0] == 3 and items[-1] == 4 for items in expected.values())
    # Each of the three items at one time comes first for about a third of the users.
    assert np.bincount([items[1] for items in expected.values()], minlength=3).min() > 45
    # Adding users changes nothing for the others.
    assert ends(read_interactions(table.slice(0, 500))) == {
        user: items for user, items in expected.items() if int(user) < 100
    }


LISTS = {"u1": ["a", "c", "b"], "u2": ["b"]}


def write_inter_json(folder):
    path = folder / "log.inter.json"
    path.write_text(json.dumps(LISTS))
    return path


def write_recbole(folder, header, rows):
    path = folder / "log.inter"
    path.write_text("\n".join(["\t".join(header), *("\t".join(row) for row in rows)]) + "\n")
    return path


def list_containers(folder):
    lists = pa.table({"user_id": list(LISTS), "item_id": list(LISTS.values())})
    pq.write_table(lists, folder / "lists.parquet")
    times = lists.append_column("timestamp", pa.array([[1, 3, 2], [5]]))
    users = pc.run_end_encode(pa.array(list(LISTS)))
    views = pa.table(
        {"user_id": users, "item_id": pa.array(LISTS.values(), pa.list_(pa.string_view()))}
    )
    events = [("u1", "b", "3"), ("u1", "a", "1"), ("u1", "c", "2"), ("u2", "b", "1")]
    return {
        "Arrow lists": (lists, "acb"),
        "Parquet lists": (folder / "lists.parquet", "acb"),
        "pandas lists": (lists.to_pandas(), "acb"),
        "lists with times": (times, "abc"),
        "views": (lists.cast(lists.schema.set(0, pa.field("user_id", pa.string_view()))), "acb"),
        "views and runs": (views, "acb"),
        "LC-Rec": (write_inter_json(folder), "acb"),
        "RecBole": (
            write_recbole(folder, ("user_id:token", "item_id:token", "timestamp:float"), events),
            "acb",
        ),
    }


def test_every_layout_of_sequences(tmp_path):
    for name, (source, first) in list_containers(tmp_path).items():
        log = read_interactions(source)
        sequences = log.sequences(IDS)
        assert sequences.user_ids.to_pylist() == ["u1", "u2"], name
        expected = [IDS.strings().to_pylist().index(letter) for letter in first]
        assert sequences[0].tolist() == expected, name
        assert len(sequences[1]) == 1, name
        assert sequences.ordered, name


@pytest.mark.parametrize("ending", ["parquet", "feather", "csv"])
def test_a_column_whose_name_is_no_text(tmp_path, ending):
    table, file = pa.table({"user_id": ["a"], "item_id": ["x"], "name": [1]}), tmp_path / "log"
    file = file.with_suffix(f".{ending}")
    if ending == "parquet":
        pq.write_table(table, file, store_schema=False)
    elif ending == "feather":
        feather.write_feather(table, file, compression="uncompressed")
    else:
        pa_csv.write_csv(table, file)
    assert len(read_interactions(file)) == 1
    file.write_bytes(file.read_bytes().replace(b"name", b"n\xffme"))
    with pytest.raises(InteractionsError, match="could not be read as"):
        read_interactions(file)


def test_recbole_keeps_tokens_as_text_and_splits_lists(tmp_path):
    rows = [("7", "007 8 9", "10", "4.5")]
    header = ("user_id:token", "item_id_list:token_seq", "item_id:token", "rating:float")
    log = read_interactions(write_recbole(tmp_path, header, rows), item_column="item_id_list")
    assert log.item_ids.to_pylist() == ["007", "8", "9"]
    assert log.order.tolist() == [0, 1, 2]


def test_broken_layouts_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "log.json"
    for text, message in (
        ("[1, 2]", "is not an object of lists"),
        ('{"u": 3}', "is not an object of lists"),
        ('{"u": [1', "cannot be read as JSON"),
        ('{"u": [1.5]}', "neither text nor whole numbers"),
        ('{"u": [true]}', "neither text nor whole numbers"),
        ("{}", "holds no rows"),
    ):
        path.write_text(text)
        with pytest.raises(InteractionsError, match=message):
            read_interactions(path)
    with pytest.raises(UsageError, match="does not exist"):
        read_interactions(tmp_path / "none.json")
    short = pa.table({"user_id": ["u"], "item_id": [["a", "b"]], "timestamp": [[1]]})
    with pytest.raises(InteractionsError, match=r"not as long as those of 'item_id'"):
        read_interactions(short)
    null = pa.table({"user_id": ["u", "v"], "item_id": [["a"], None]})
    with pytest.raises(InteractionsError, match="1 nulls"):
        read_interactions(null)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=40
    ),
    st.booleans(),
)
def test_sequences_and_pairs_equal_a_loop(rows, use_mask):
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    log = read_interactions(table, ties="file")
    catalogue = ItemIds(["3", "1", "0", "2", *(str(i) for i in range(7, 9))])
    row_of = {"3": 0, "1": 1, "0": 2, "2": 3}
    expected = defaultdict(list)
    for user, item, _ in sorted(rows, key=lambda row: row[2]):  # a stable sort
        expected[str(user)].append(row_of.get(str(item), -1))
    if not any(i >= 0 for s in expected.values() for i in s):
        with pytest.raises(InteractionsError, match="none of the"):
            log.sequences(catalogue)
        return
    sequences = log.sequences(catalogue)
    assert as_dict(sequences) == expected
    assert sequences.lengths.sum() == len(rows)
    names = sequences.user_ids.to_pylist()
    mask = np.array([int(u) % 2 == 0 for u in names]) if use_mask else None
    pairs, owners = sequences.consecutive_pairs(mask)
    wanted = [
        (names.index(user), a, b)
        for user in names
        if mask is None or mask[names.index(user)]
        for a, b in zip(expected[user], expected[user][1:], strict=False)
        if a >= 0 and b >= 0
    ]
    assert [(u, *p) for u, p in zip(owners.tolist(), pairs.tolist(), strict=True)] == wanted
    if mask is not None:
        chosen = as_dict(sequences.select(mask))
        assert chosen == {u: expected[u] for u, keep in zip(names, mask, strict=True) if keep}


def test_some_interactions_keep_all_that_belongs_to_them():
    log = read_interactions(TABLE, extra_columns=["item_id"])
    kept = np.arange(len(log)) % 2 == 0
    some = log.where(kept)
    assert len(some) == kept.sum()
    assert some.order.tolist() == log.order[kept].tolist()
    np.testing.assert_array_equal(some.rating, log.rating[kept])
    names = some.item_ids.take(pa.array(some.items)).to_pylist()
    assert names == [row[1] for row, keep in zip(ROWS, kept, strict=True) if keep]
    assert pa.array(some.columns["item_id"]).to_pylist() == names


def test_interactions_without_an_order():
    log = read_interactions(TABLE.select(["user_id", "item_id"]))
    assert not log.has_order
    assert log.rating is None
    with pytest.raises(InteractionsError, match=r"no order.*'position' or 'timestamp'.*--time-col"):
        log.sequences(IDS)
    loose = log.sequences(IDS, require_order=False)
    assert as_dict(loose) == {"u1": [1, 0, 2], "u2": [0, -1, 2], "u3": [0]}
    with pytest.raises(InteractionsError, match="consecutive items need an order"):
        loose.consecutive_pairs()


def test_integer_ids_and_leading_zeros(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,position\n1,007,0\n1,7,1\n")
    log = read_interactions(tmp_path / "log.csv")
    assert log.item_ids.to_pylist() == ["007", "7"]
    numbers = read_interactions(
        pa.table({"user_id": [1, 1], "item_id": [7, 8], "timestamp": [2, 1]})
    )
    assert numbers.sequences(ItemIds(np.array([7, 8])))[0].tolist() == [1, 0]


def test_times_of_other_types(tmp_path):
    days = pd.to_datetime(["2024-03-02", "2024-03-01", "2024-03-03"])
    base = {"user_id": ["u"] * 3, "item_id": ["a", "b", "c"]}
    stamps = pa.array(days)
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp\n"
        + "".join(f"u,{i},{d.isoformat()}\n" for i, d in zip("abc", days, strict=True))
    )
    sources = [
        pa.table({**base, "timestamp": stamps}),
        pa.table({**base, "timestamp": stamps.cast(pa.date32())}),
        pa.table({**base, "timestamp": [2.5, 1.0, 3.0]}),
        tmp_path / "log.csv",
    ]
    for source in sources:
        assert read_interactions(source).sequences(IDS)[0].tolist() == [1, 0, 2]


def test_further_columns_are_kept_on_request():
    table = TABLE.append_column("device", pa.array(list("mmwwmmw")))
    log = read_interactions(table, extra_columns=["device"])
    assert log.columns["device"].to_pylist() == list("mmwwmmw")
    assert read_interactions(table).columns == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": ["u", None]}, "'user_id' of the arrow table holds 1 nulls"),
        (
            {
                "item_id": pa.DictionaryArray.from_arrays(
                    pa.array([0, 1], pa.int32()), pa.array([None, "a"])
                )
            },
            "'item_id' of the arrow table holds 1 nulls",
        ),
        ({"item_id": [None, None]}, "'item_id'.*(nulls|holds null)"),
        ({"item_id": [1.5, 2.5]}, "holds double; ids are strings or integers"),
        ({"timestamp": ["x", "y"]}, "holds string; give numbers, dates or timestamps"),
        ({"timestamp": [1, None]}, "1 nulls, so the order"),
        ({"timestamp": [1.0, float("nan")]}, "1 times that are NaN"),
        ({"rating": ["good", "bad"]}, "'rating'.*holds string; give numbers"),
    ],
)
def test_columns_that_cannot_be_used(change, message):
    table = pa.table({"user_id": ["u", "v"], "item_id": ["a", "b"], "timestamp": [1, 2], **change})
    with pytest.raises(InteractionsError, match=message):
        read_interactions(table)


def test_times_in_csv_beyond_64_bits_have_lost_their_order(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text(f"user_id,item_id,timestamp\nu,a,{2**64 - 1}\nu,b,{2**64 - 2}\n")
    with pytest.raises(InteractionsError, match=r"2 times that are .* beyond 64 bits"):
        read_interactions(file)


def test_all_problems_at_once():
    table = pa.table({"user_id": ["u", None], "item_id": [1.5, 2.5], "timestamp": ["x", "y"]})
    with pytest.raises(InteractionsError) as refused:
        read_interactions(table)
    assert len(refused.value.problems) == 3


class Stream:
    """A table of a library that semid does not know, with Arrow's C stream alone."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


def test_tables_through_the_arrow_c_stream():
    expected, log = read_interactions(TABLE), read_interactions(Stream(TABLE))
    assert log.user_ids.equals(expected.user_ids)
    np.testing.assert_array_equal(log.items, expected.items)


def test_files_and_columns_that_are_not_there(tmp_path):
    (tmp_path / "log.csv").write_text("user,item_id\nu,a\n")
    with pytest.raises(
        UsageError, match=r"no column 'user_id'; did you mean 'user'.*--user-column"
    ):
        read_interactions(tmp_path / "log.csv")
    assert len(read_interactions(tmp_path / "log.csv", user_column="user")) == 1
    for name, flag in [("time_column", "--time-col"), ("rating_column", "rating_column=")]:
        with pytest.raises(UsageError, match=rf"no column 'timestam'.*{flag}"):
            read_interactions(TABLE, **{name: "timestam"})
    with pytest.raises(UsageError, match="no column 'ratin'; did you mean 'rating'"):
        read_interactions(TABLE, extra_columns=["ratin"])
    for name in ("absent.csv", "absent.parquet"):
        with pytest.raises(UsageError, match="does not exist"):
            read_interactions(tmp_path / name)
    with pytest.raises(UsageError, match="from a list"):
        read_interactions([("u", "a")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "is empty"),
        ("x.csv", b"user_id,item_id\n", "no rows"),
        ("x.csv", b"user_id,item_id\nu\n", "could not be read as CSV"),
        ("x.csv", b"user_id,item_id\nu,\n", "1 nulls"),
        ("x.parquet", b"PAR1", "truncated, damaged"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InteractionsError, match=message):
        read_interactions(tmp_path / name)


def test_empty_table():
    with pytest.raises(InteractionsError, match="no rows"):
        read_interactions(TABLE.slice(0, 0))


def test_no_item_in_the_catalogue_says_how_both_are_called():
    with pytest.raises(InteractionsError, match=r"called like 'b', the catalogue's like '0'"):
        read_interactions(TABLE).sequences(ItemIds.range(5))


def test_split_of_users_is_80_10_10_and_depends_on_the_id_alone():
    part = split_users(np.arange(50_000))
    np.testing.assert_allclose(np.bincount(part) / len(part), [0.8, 0.1, 0.1], atol=0.006)
    texts = [str(i) for i in range(100)][::-1]
    np.testing.assert_array_equal(split_users(texts), part[:100][::-1])
    coded = pa.array(texts).dictionary_encode()
    np.testing.assert_array_equal(split_users(coded), part[:100][::-1])
    assert (split_users(texts, salt="another") != split_users(texts)).any()


def test_many_users_without_a_loop():
    """Two hundred thousand users in shuffled order come out sorted and complete."""
    rng = np.random.default_rng(0)
    users = rng.integers(0, 200_000, 1_000_000).astype(np.int32)
    items = rng.integers(0, 50, 1_000_000).astype(np.int32)
    order = rng.permutation(1_000_000)
    known = pa.array([str(i) for i in range(200_000)], pa.large_string())
    log = Interactions(users, items, known, known.slice(0, 50), order, "timestamp")
    sequences = log.sequences(ItemIds.range(50))
    owner = np.repeat(np.arange(200_000), sequences.lengths)
    expected = np.lexsort((order, users))
    np.testing.assert_array_equal(owner, users[expected])
    np.testing.assert_array_equal(sequences.items, items[expected])


@pytest.mark.skipif(not (DATA / "amazon2014_beauty").exists(), reason="SEMID_DATA is not there")
def test_real_log_reads_in_full():
    folder = DATA / "amazon2014_beauty"
    log = read_interactions(folder / "interactions.parquet")
    ids = ItemIds(pq.read_table(folder / "items.parquet", columns=["item_id"]).column(0))
    sequences = log.sequences(ids)
    assert (len(log), len(sequences), len(ids)) == (198_502, 22_363, 12_101)
    assert sequences.unknown == 0
    assert len(sequences.consecutive_pairs().pairs) == 198_502 - 22_363
