"""Item ids (from anywhere, looked up, hashed, held out) and item texts."""

import logging

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds, hash_strings, held_out_mask, share_mask
from semid.data.interactions import read_interactions
from semid.data.items import load_ids, read_items, split_column
from semid.errors import IdsError, InputError, InteractionsError, UsageError

X = np.ones((3, 2), np.float32)


def hash_by_hand(text, salt=""):
    """The documented algorithm, one byte and one string at a time."""
    state = 0xCBF29CE484222325
    for byte in salt.encode() + b"\xff" + text.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        state = (state ^ (state >> 33)) * factor % 2**64
    return state ^ (state >> 33)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=30), st.text(max_size=5), st.integers(0, 30))
def test_hash_equals_the_documented_algorithm(texts, salt, cut):
    array = pa.array(texts, pa.string())
    expected = [hash_by_hand(t, salt) for t in texts]
    assert hash_strings(array, salt=salt).tolist() == expected
    assert hash_strings(array.slice(cut), salt=salt).tolist() == expected[cut:]
    chunked = pa.chunked_array([array.slice(0, cut), array.slice(cut)])
    assert hash_strings(chunked, salt=salt).tolist() == expected


def test_hash_of_an_id_does_not_depend_on_its_type_or_place():
    n = 70_000  # crosses a block
    by_range = ItemIds.range(n).hash64("s")
    assert by_range[[0, 7, 65_536, n - 1]].tolist() == [
        hash_by_hand(str(i), "s") for i in (0, 7, 65_536, n - 1)
    ]
    shuffled = np.random.default_rng(0).permutation(n)
    np.testing.assert_array_equal(ItemIds(shuffled).hash64("s"), by_range[shuffled])
    texts = ItemIds(pa.array(shuffled).cast(pa.string()).dictionary_encode())
    np.testing.assert_array_equal(texts.hash64("s"), by_range[shuffled])
    assert len(np.unique(by_range)) == n


def test_held_out_share_is_right_nested_and_stable():
    ids = ItemIds.range(50_000)
    small, large = held_out_mask(ids, 0.05), held_out_mask(ids, 0.2)
    assert abs(small.mean() - 0.05) < 0.004
    assert abs(large.mean() - 0.2) < 0.008
    assert not (small & ~large).any()
    assert not held_out_mask(ids, 0).any()
    assert held_out_mask(ids, 1).all()
    grown = held_out_mask(ItemIds.range(60_000), 0.05)
    np.testing.assert_array_equal(grown[:50_000], small)
    other = held_out_mask(ids, 0.05, salt="other")
    assert abs((small & other).mean() - 0.0025) < 0.001
    with pytest.raises(UsageError, match="between 0 and 1"):
        held_out_mask(ids, 1.5)


def test_shares_tile_the_hash_range():
    hashes = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert share_mask(hashes, 0, 0.5).tolist() == [True, True, False, False]
    assert share_mask(hashes, 0.5, 1).tolist() == [False, False, True, True]
    assert not share_mask(hashes, 1, 1).any()
    assert not share_mask(hashes, 0, 0).any()
    assert share_mask(hashes, 0, 1).all()
    for start, stop in ((-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(UsageError, match="not within"):
            share_mask(hashes, start, stop)
    with pytest.raises(UsageError):
        share_mask(hashes, 0.5, 0.4)


KINDS = [
    pa.array(["b", "a", "007"]),
    pa.array(["b", "a", "007"], pa.large_string()),
    pa.array(["b", "a", "007"]).dictionary_encode(),
    pa.array([5, -3, 2**62]),
    pa.array([5, 3, 200], pa.uint8()),
]


@pytest.mark.parametrize("values", KINDS, ids=lambda v: str(v.type)[:12])
def test_ids_are_strings_inside_and_keep_their_type(values):
    ids = ItemIds(values)
    texts = [str(v) for v in values.to_pylist()]
    assert len(ids) == 3
    assert [ids[i] for i in (0, 1, -1)] == texts
    assert ids.to_arrow().equals(values)
    assert ids.strings(1, 3).to_pylist() == texts[1:]
    assert ids.strings().type == pa.large_string()
    taken = ids.take(np.array([2, 0]))
    assert taken.to_arrow().type == values.type
    assert taken.strings().to_pylist() == [texts[2], texts[0]]
    assert ids.index_of([texts[2], "absent", texts[0], "", texts[0]]).tolist() == [2, -1, 0, -1, 0]
    assert ids == ItemIds(texts)
    assert ids != taken
    with pytest.raises(IndexError):
        ids[3]


def test_range_behaves_like_stored_numbers():
    ids, stored = ItemIds.range(5), ItemIds(np.arange(5))
    assert ids.is_range
    assert not stored.is_range
    assert ids == stored == ItemIds.range(5)
    assert ids.to_arrow().to_pylist() == [0, 1, 2, 3, 4]
    asked = ["4", "04", "5", "-1", "1"]
    assert ids.index_of(asked).tolist() == stored.index_of(asked).tolist() == [4, -1, -1, -1, 1]
    assert ids.index_of(pa.array(["3", None])).tolist() == [3, -1]
    assert ids.take(np.array([3, 1])).strings().to_pylist() == ["3", "1"]
    assert len(ItemIds.range(0).index_of(["1"])) == 1


@pytest.mark.parametrize("ids", [ItemIds.range(7), ItemIds(list("abcdefg")), ItemIds([*range(7)])])
def test_parts_of_the_ids_are_slices(ids):
    whole = ids.strings().to_pylist()
    assert whole == [ids[row] for row in range(7)]
    for start, stop in ((0, 3), (2, 5), (4, None), (5, 2), (3, 99), (-2, None), (-3, -1)):
        assert ids.strings(start, stop).to_pylist() == whole[start:stop]
    assert ids[-7] == whole[0]
    for row in (7, -8):
        with pytest.raises(IndexError, match="outside the 7 items"):
            ids[row]


def test_lookup_survives_hash_collisions(monkeypatch):
    monkeypatch.setattr(
        "semid.data.ids.hash_strings", lambda s, salt="": np.zeros(len(s), np.uint64)
    )
    ids = ItemIds(["a", "b", "c"])
    assert ids.index_of(["c", "x", "a", "b"]).tolist() == [2, -1, 0, 1]
    with pytest.raises(IdsError, match="'b' \\(2 times\\)"):
        ItemIds(["a", "b", "b"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None, "b"], r": 1 null \(first: row 1\)"),
        ([1.5, 2.5], r"type double; ids are strings or integers"),
        ([1, "a"], "mixes types"),
        ([True, False], "type bool"),
        (np.ones((2, 2), int), r"shape \(2, 2\)"),
        (list("abcabb"), r"2 ids more than once \(3 rows too many\): 'a' \(2 times\), 'b'"),
        ([7, 8, 7], r"'7' \(2 times\)"),
        ([2**70, 1], r"integers beyond 64 bits: give them as strings"),
        (["a", "\ud800"], r"not valid Unicode \('\\ud800'\)"),
        ([b"a", b"b"], "type binary; .*decode the bytes"),
        (np.array([b"a", b"b"]), "type .*binary.*decode the bytes"),
        (np.array(["2020-01-01"], "M8[s]"), r"type timestamp\[s\].*cast the column"),
        (np.array([1.0, 2.0]), "type double; .*cast whole numbers to int64"),
        (pa.array([b"a\xff"]).cast(pa.string(), safe=False), "text that is not UTF-8"),
        (
            pa.DictionaryArray.from_arrays(pa.array([1, 0]), pa.array([None, "a"])),
            r": 1 null \(first: row 1\)",
        ),
        (list("abcdefgabcdefg"), r"7 ids more than once \(7 rows too many\).*, \.\.\.;"),
    ],
)
def test_ids_that_cannot_be_used(values, message):
    with pytest.raises(IdsError, match=message):
        ItemIds(values)


@pytest.mark.parametrize("values", ["abc", b"abc", 5, {"a", "b"}])
def test_ids_that_are_no_list(values):
    with pytest.raises(UsageError, match=f"are a {type(values).__name__}; give an array or a list"):
        ItemIds(values)


def test_ids_from_every_place(tmp_path):
    names = ["x1", "x2", "007"]
    table = pa.table({"item_id": ["a", "b", "c"], "asin": names})
    pq.write_table(table, tmp_path / "items.parquet")
    table.to_pandas().to_csv(tmp_path / "items.csv", index=False)
    table.to_pandas().to_csv(tmp_path / "items.tsv.gz", index=False, sep="\t")
    (tmp_path / "ids.txt").write_text("\ufeffx1\r\nx2\r\n007\r\n", encoding="utf-8")
    for file in ("items.parquet", "items.csv", "items.tsv.gz"):
        assert load_ids(tmp_path / file).strings().to_pylist() == ["a", "b", "c"]
        assert load_ids(f"{tmp_path / file}:asin").strings().to_pylist() == names
        assert load_ids(tmp_path / file, id_column="asin").strings().to_pylist() == names
        with pytest.raises(UsageError, match=r"no column 'asim'; did you mean 'asin'"):
            load_ids(f"{tmp_path / file}:asim")
    given = [
        (tmp_path / "ids.txt"),
        names,
        tuple(names),
        np.array(names),
        np.array(names, dtype=object),
        pa.array(names),
        pa.chunked_array([names[:1], names[1:]]),
        pd.Series(names),
        pd.Index(names),
        pl.Series(names),
        ItemIds(names),
        pa.table({"asin": names}),
        pd.DataFrame({"item_id": names, "other": [1, 2, 3]}),
        pl.DataFrame({"item_id": names, "other": [1, 2, 3]}),
    ]
    for ids in given:
        opened = open_embeddings(X, ids=ids)
        assert opened.ids.strings().to_pylist() == names
    assert load_ids(torch.tensor([5, 6])).strings().to_pylist() == ["5", "6"]
    assert load_ids(range(3)).strings().to_pylist() == ["0", "1", "2"]


def test_empty_strings_are_no_ids_of_a_catalogue(tmp_path):
    pq.write_table(pa.table({"item_id": ["a", ""], "embedding": [[1.0], [2.0]]}), tmp_path / "x.pq")
    coded = pa.array(["b", "a", "", ""]).dictionary_encode()
    for ids, message in (
        (["a", "", "b"], r"1 empty string \(first: row 1\)"),
        (pa.array([""]), "1 empty string"),
        (pd.Series(["a", "b", ""]), r"row 2"),
        (pa.table({"item_id": coded}), r"2 empty strings \(first: row 2\)"),
        (tmp_path / "x.pq", r"'item_id' of .*1 empty string \(first: row 1\)"),
    ):
        with pytest.raises(IdsError, match=message):
            load_ids(ids)
    with pytest.raises(IdsError, match="1 empty string"):
        open_embeddings(tmp_path / "x.pq")


def test_nulls_and_empty_strings_that_no_item_has_are_no_ids():
    unused = pa.DictionaryArray.from_arrays(pa.array([2, 3]), pa.array([None, "", "a", "b"]))
    assert load_ids(unused).strings().to_pylist() == ["a", "b"]
    assert ItemIds(np.array([2**63], np.uint64))[0] == str(2**63)


def test_ids_as_string_views():
    views = pa.array(["b", "a"], pa.string_view())
    assert ItemIds(views).index_of(views).tolist() == [0, 1]
    assert ItemIds(pa.chunked_array([views])).take(np.array([1]))[0] == "a"
    log = read_interactions(pa.table({"user_id": views, "item_id": views}))
    assert log.item_ids.to_pylist() == ["b", "a"]


def test_texts_of_numpy_keep_what_follows_a_nul():
    names = np.array(["a\x00b", "a\x00c"])
    assert load_ids(names).strings().to_pylist() == names.tolist()
    assert ItemIds(names).index_of(names[::-1]).tolist() == [1, 0]
    log = read_interactions({"user_id": names, "item_id": names})
    assert log.item_ids.to_pylist() == names.tolist()


def test_frames_whose_ids_are_no_arrow_values():
    for ids, message in (
        ([2**70, 1], r"'item_id' of the pandas table .*beyond 64 bits.*frame\['item_id'\]"),
        (["\ud800", "a"], "'item_id' of the pandas table .*not valid Unicode"),
        ([1, "a"], r"'item_id' of the pandas table mixes types.*frame\['item_id'\]"),
    ):
        frame = pd.DataFrame({"item_id": pd.Series(ids, dtype=object), "embedding": [[1.0], [2.0]]})
        with pytest.raises(InputError, match=message):
            open_embeddings(frame)


TEXT_KINDS = [
    lambda ids: pa.array(ids),
    lambda ids: pa.array(ids, pa.large_string()),
    lambda ids: pa.array(ids).dictionary_encode(),
    lambda ids: pa.array(ids, pa.large_string()).dictionary_encode(),
    lambda ids: pa.array(ids, pa.dictionary(pa.int8(), pa.string())),
]


@pytest.mark.parametrize("second", range(5))
@pytest.mark.parametrize("first", range(5))
def test_files_may_hold_text_in_different_types(first, second, tmp_path):
    halves = [TEXT_KINDS[first](["b", "a"]), TEXT_KINDS[second](["007", "c"])]
    for number, ids in enumerate(halves):
        columns = {"item_id": ids, "title": ids, "user_id": ids, "embedding": [[1.0], [2.0]]}
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    names = ["b", "a", "007", "c"]
    assert open_embeddings(tmp_path).ids.strings().to_pylist() == names
    assert load_ids(tmp_path).strings().to_pylist() == names
    items = read_items(tmp_path)
    assert (items.ids.strings().to_pylist(), items.titles.to_pylist()) == (names, names)
    log = read_interactions(tmp_path)
    assert log.item_ids.take(pa.array(log.items)).to_pylist() == names
    assert log.user_ids.type == pa.large_string()


def test_text_and_numbers_do_not_mix(tmp_path):
    for number, ids in enumerate((["a"], [1])):
        pq.write_table(pa.table({"item_id": ids, "user_id": ["u"]}), tmp_path / f"{number}.parquet")
    with pytest.raises(IdsError, match=r"do not agree on the types .*int64.*string"):
        load_ids(tmp_path)


def test_columns_of_one_name_are_refused_wherever_they_are_read(tmp_path):
    ids, titles = pa.array(["a", "b"]), pa.array(["x", "y"])
    table = pa.table([ids, titles, titles], names=["item_id", "title", "title"])
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("item_id,title,title\na,x,y\n", encoding="utf8")
    for source in (table, table.to_pandas(), tmp_path / "x.parquet", tmp_path / "x.csv"):
        with pytest.raises(UsageError, match="several columns called 'title'; rename all but one"):
            read_items(source)
        assert load_ids(source)[0] == "a"
    table = pa.table([ids, ids], names=["item_id", "item_id"])
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("item_id,item_id\na,x\n", encoding="utf8")
    for source in (table, table.to_pandas(), tmp_path / "x.parquet", tmp_path / "x.csv"):
        with pytest.raises(UsageError, match="several columns called 'item_id'"):
            load_ids(source)


def test_ids_that_differ_by_spaces_are_pointed_out(caplog):
    catalogue = ItemIds(["a", "b", "c"])
    assert catalogue.whitespace_hint(["x", "y"]) == ""
    assert "; 2 would match without spaces" in catalogue.whitespace_hint(["a ", " b", "x"])
    assert "; 1 would match without spaces" in ItemIds(["a ", "z"]).whitespace_hint(["a"])
    log = read_interactions(pa.table({"user_id": ["u", "u"], "item_id": ["a ", "b "]}))
    with pytest.raises(InteractionsError, match=r"like 'a '.*2 would match without spaces"):
        log.catalogue_rows(catalogue)
    log = read_interactions(pa.table({"user_id": ["u", "u"], "item_id": ["a ", "b"]}))
    with caplog.at_level(logging.WARNING):
        assert log.catalogue_rows(catalogue).tolist() == [-1, 1]
    assert "1 would match without spaces" in caplog.text
    with pytest.raises(IdsError, match="2 would match without spaces"):
        read_items(ITEMS, ids=ItemIds(["a ", "b\t"]))


def test_id_column_beside_the_embeddings(tmp_path, caplog):
    frame = pd.DataFrame({"asin": ["a", "b"], "embedding": [[1.0], [2.0]]})
    assert open_embeddings(frame, id_column="asin").ids[1] == "b"
    assert open_embeddings(frame.set_index("asin"), id_column="asin").ids[1] == "b"
    with caplog.at_level(logging.WARNING):
        assert open_embeddings(frame).ids.is_range
    assert "named by row number" in caplog.text
    named = frame.rename(columns={"asin": "item_id"}).set_index("item_id")
    assert open_embeddings(named).ids[0] == "a"
    pq.write_table(pa.table({"item_id": [9, 8], "embedding": [[1.0], [2.0]]}), tmp_path / "x.pq")
    opened = open_embeddings(tmp_path / "x.pq")
    assert opened.ids.to_arrow().type == pa.int64()
    assert open_embeddings(tmp_path / "x.pq", ids=["p", "q"]).ids[0] == "p"


def test_id_files_that_cannot_be_used(tmp_path):
    pq.write_table(pa.table({"asin": ["a"], "title": ["t"]}), tmp_path / "items.parquet")
    with pytest.raises(UsageError, match=r"no column 'item_id'.*'asin', 'title'.*file:column"):
        load_ids(tmp_path / "items.parquet")
    with pytest.raises(UsageError, match="name one of them"):
        load_ids(f"{tmp_path}/items.parquet:asin", id_column="title")
    with pytest.raises(UsageError, match="does not exist"):
        load_ids(tmp_path / "absent.parquet")
    with pytest.raises(UsageError, match="does not exist"):
        load_ids(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match="does not exist"):
        load_ids(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="ids are a int"):
        load_ids(3)
    files = {
        "binary.txt": (b"\xfa\xfe\x00", "not UTF-8"),
        "empty.txt": (b"", "is empty"),
        "gap.txt": (b"a\n\nb\n", "1 empty lines .first: line 2"),
        "empty.csv": (b"", "is empty"),
        "header.csv": (b"item_id\n", "no rows"),
        "broken.csv": (b"item_id,b\n1\n", "could not be read as CSV"),
        "hole.csv": (b"item_id,b\n,1\nx,2\n", "1 null "),
        "bad.parquet": (b"PAR1 no", "truncated, damaged"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(IdsError, match=message):
            load_ids(tmp_path / name)
    with pytest.raises(UsageError, match="one id per line and has no column"):
        load_ids(f"{tmp_path}/gap.txt:asin")


def test_path_and_column_are_told_apart(tmp_path):
    odd = tmp_path / "odd:name.parquet"
    pq.write_table(pa.table({"item_id": ["a"]}), odd)
    assert split_column(odd) == (odd, None)
    assert split_column(f"{odd}:item_id") == (odd, "item_id")
    assert split_column("C:\\data\\items.parquet")[1] is None
    assert load_ids(f"{tmp_path}/*.parquet:item_id").strings().to_pylist() == ["a"]


ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c"],
        "title": ["Lamp", "", None],
        "text": ["Lamp, brass", "A chair", None],
        "categories": [["Home", "Light"], ["Home"], None],
    }
)


def test_titles_fall_back_on_text_and_then_on_the_id():
    items = read_items(ITEMS)
    assert [items.title(i) for i in range(3)] == ["Lamp", "A chair", "c"]
    assert items.categories.to_pylist() == ["Home > Light", "Home", ""]
    assert items.brand is None
    assert read_items(items) is items


def test_texts_line_up_with_the_catalogue():
    items = read_items(ITEMS, ids=ItemIds(["c", "x", "a"]))
    assert [items.title(i) for i in range(3)] == ["c", "x", "Lamp"]
    assert items.missing == 1
    assert len(items) == 3
    assert items.text.to_pylist() == ["", "", "Lamp, brass"]
    with pytest.raises(IdsError, match="called like '0', the table's like 'a'"):
        read_items(ITEMS, ids=ItemIds.range(2))


def test_items_from_files_and_frames(tmp_path):
    table = pa.table({"asin": ["1", "02"], "title": ["1984", "x"], "name": ["n1", "n2"]})
    pq.write_table(table, tmp_path / "items.parquet")
    table.to_pandas().to_csv(tmp_path / "items.csv", index=False)
    sources = [
        f"{tmp_path}/items.parquet:asin",
        f"{tmp_path}/items.csv:asin",
        table.rename_columns(["item_id", "title", "name"]),
        table.to_pandas().rename(columns={"asin": "item_id"}),
        pl.from_arrow(table).rename({"asin": "item_id"}),
    ]
    for source in sources:
        assert read_items(source).titles.to_pylist() == ["1984", "x"]
        assert read_items(source, title_column="name").titles.to_pylist() == ["n1", "n2"]
        assert read_items(source).ids.strings().to_pylist() == ["1", "02"]


def test_tables_of_items_that_cannot_be_used(tmp_path):
    with pytest.raises(UsageError, match=r"no column 'titel'; did you mean 'title'"):
        read_items(ITEMS, title_column="titel")
    with pytest.raises(UsageError, match="no column 'asin'"):
        read_items(ITEMS, id_column="asin")
    with pytest.raises(UsageError, match="neither a column 'title' nor 'text'"):
        read_items(ITEMS.select(["item_id", "categories"]))
    with pytest.raises(UsageError, match="does not exist"):
        read_items(tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="items cannot be read from a list"):
        read_items([1])
