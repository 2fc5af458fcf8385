"""Catalogues for serving engines, read as the engines read them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from semid.catalogue.prefixes import PrefixIndex
from semid.errors import MissingExtraError, UsageError
from semid.exports.id_files import wrap_codes
from semid.exports.serving import static_arrays


@pytest.fixture(params=[(5, 4, 6), (3, 3, 3, 3), (4, 7)], ids=str)
def codes(request) -> np.ndarray:
    sizes = request.param
    drawn = np.stack([np.random.default_rng(1).integers(0, size, 60) for size in sizes], axis=1)
    return np.concatenate([drawn, np.array(sizes)[None] - 1])


def walk_static(arrays: dict[str, np.ndarray]) -> set[tuple[int, ...]]:
    """Return all sequences of tokens that STATIC's decoding allows.

    The first token is looked up in the start mask, the next ones in the dense tables; from then on
    a state has a row of pairs of token and next state.
    """
    dense, levels = arrays["dense_mask"], len(arrays["layer_max_branches"])
    starts = {int(token) for token in np.flatnonzero(arrays["start_mask"])}
    found = [tuple(map(int, place)) for place in np.argwhere(dense)]
    assert {place[0] for place in found} == starts
    beams = [(place, int(arrays["dense_states"][place])) for place in found]
    for level in range(dense.ndim, levels):
        longer = []
        for tokens, state in beams:
            begin, end = arrays["indptr"][state : state + 2]
            assert 0 < end - begin <= arrays["layer_max_branches"][level]
            for token, following in arrays["packed_csr"][begin:end].tolist():
                longer.append(((*tokens, token), following))
        beams = longer
    assert all(state == 0 for _, state in beams)
    return {tokens for tokens, _ in beams}


def test_static_allows_the_ids_alone(codes):
    index = PrefixIndex.build(codes)
    levels = codes.shape[1]
    sizes = codes.max(axis=0) + 1
    for layers in range(1, levels):
        for offsets in (np.zeros(levels, int), np.cumsum(sizes) - sizes):
            arrays = static_arrays(index, offsets=offsets.tolist(), layers=layers)
            allowed = walk_static(arrays)
            assert allowed == {tuple(row) for row in (codes + offsets).tolist()}
            vocabulary = len(arrays["start_mask"])
            assert vocabulary == (sizes + offsets).max()
            # One row of tokens that do not exist, for reads beyond the last state.
            padding = arrays["packed_csr"][arrays["indptr"][-2] :]
            assert padding.tolist() == [[vocabulary, 0]] * vocabulary
            assert arrays["packed_csr"].dtype == arrays["indptr"].dtype == np.int32


def test_static_refuses_what_does_not_fit():
    index = PrefixIndex.build([[0, 1, 2], [1, 0, 3]])
    for options, message in (
        ({"offsets": [0, 1]}, "give 3 numbers"),
        ({"offsets": [0, 1, -1]}, "give 3 numbers"),
        ({"vocab_size": 3}, "at least 4"),
        ({"layers": 3}, "which are 3"),
        ({"layers": 0}, "which are 3"),
        ({"vocab_size": 2**16}, "cells"),
    ):
        with pytest.raises(UsageError, match=message):
            static_arrays(index, **options)
    with pytest.raises(UsageError, match="two levels or more"):
        static_arrays(PrefixIndex.build([[0], [1]]))


def test_flashrec_has_each_id_once(codes, tmp_path):
    ids = wrap_codes(codes)
    semid.export("flashrec", tmp_path / "plain.json", ids=ids)
    semid.export("flashrec", tmp_path / "ended.json", ids=ids, end_code=1)
    expected = sorted({tuple(row) for row in codes.tolist()})
    for name, end in (("plain", ()), ("ended", (1,))):
        catalogue = json.loads((tmp_path / f"{name}.json").read_text())
        keys = [tuple(map(int, key.split(","))) for key in catalogue]
        assert keys == [(*row, *end) for row in expected]
        assert set(catalogue.values()) == {1}
    with pytest.raises(UsageError, match="end_code=-1"):
        semid.export("flashrec", tmp_path / "no.json", ids=ids, end_code=-1)


def test_sid2pid_finds_the_most_popular_item(tmp_path):
    ids = wrap_codes(np.array([[1, 2], [1, 2], [8000, 3], [1, 2]]), items=[40, 41, 42, 43])
    log = pa.table({"user_id": ["a", "b", "c"], "item_id": [43, 41, 43]})
    semid.export("sid2pid", tmp_path / "sid2pid.json", ids=ids, interactions=log)
    mapping = json.loads((tmp_path / "sid2pid.json").read_text())
    # The benchmark packs a, b as a * 8192 + b and takes the first of the list.
    assert [entry["pid"] for entry in mapping[str(1 * 8192 + 2)]] == [43, 41, 40]
    assert mapping[str(8000 * 8192 + 3)] == [{"pid": 42, "count": 0, "count_after_downsample": 0}]
    assert mapping[str(1 * 8192 + 2)][0]["count"] == 2
    named = wrap_codes(np.array([[1, 2], [3, 4]]), items=["x", "y"])
    semid.export("sid2pid", tmp_path / "rows.json", ids=named, base=5)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {key: entries[0]["pid"] for key, entries in rows.items()} == {"7": 0, "19": 1}
    with pytest.raises(UsageError, match="at least 5"):
        semid.export("sid2pid", tmp_path / "no.json", ids=named, base=4)


def read_sid_gr(path, vocab_size: int) -> dict[tuple[int, ...], object]:
    """Read a catalogue under the rules of SID-GR's reader: token path -> item id."""
    paths: dict[tuple[int, ...], object] = {}
    items = set()
    for line in path.read_text(encoding="utf8").splitlines():
        entry = json.loads(line)
        tokens = tuple(entry["token_ids"])
        assert tokens
        assert all(type(token) is int and 0 <= token < vocab_size for token in tokens)
        assert tokens not in paths  # the reader refuses two items on one path, and an item twice
        assert entry["item_id"] not in items
        assert isinstance(entry.get("metadata", {}), dict)
        items.add(entry["item_id"])
        paths[tokens] = entry["item_id"]
    return paths


def test_sid_gr_has_a_path_per_item(codes, tmp_path):
    codes = np.unique(codes, axis=0)
    ids = wrap_codes(codes, items=np.arange(len(codes)) + 100)
    offsets = (np.arange(codes.shape[1]) * 10 + 3).tolist()
    semid.export("sid-gr", tmp_path / "plain.jsonl", ids=ids)
    semid.export("sid-gr", tmp_path / "own.jsonl", ids=ids, offsets=offsets, vocab_size=64)
    for name, tokens in (("plain", codes), ("own", codes + offsets)):
        paths = read_sid_gr(tmp_path / f"{name}.jsonl", 64)
        assert paths == {tuple(row): 100 + n for n, row in enumerate(tokens.tolist())}


def test_sid_gr_has_names_and_titles(tmp_path, caplog):
    ids = wrap_codes(np.array([[1, 2], [3, 4], [1, 2]]), items=["x", "ü", "007"])
    items = pa.table({"item_id": ["x", "ü"], "title": ['"one"', "two\nlines"]})
    semid.export("sid-gr", tmp_path / "titles.jsonl", ids=ids, items=items)
    lines = (tmp_path / "titles.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"item_id": "x", "token_ids": [1, 2], "metadata": {"title": '"one"'}},
        {"item_id": "ü", "token_ids": [3, 4], "metadata": {"title": "two\nlines"}},
        {"item_id": "007", "token_ids": [1, 2], "metadata": {"title": ""}},
    ]
    assert "semid unique" in caplog.text
    for wrong in ({"vocab_size": 4}, {"offsets": [0]}, {"offsets": [0, -1]}):
        with pytest.raises(UsageError, match=r"at least 5|give 2 numbers"):
            semid.export("sid-gr", tmp_path / "no.jsonl", ids=ids, **wrong)


def test_tokens_are_spelled_as_asked(codes, tmp_path):
    ids = wrap_codes(codes)
    semid.export("lcrec", tmp_path / "own.json", ids=ids, token="<|sid_{level}_{code}|>")
    document = json.loads((tmp_path / "own.json").read_text())
    assert document["0"][:2] == [f"<|sid_0_{codes[0, 0]}|>", f"<|sid_1_{codes[0, 1]}|>"]
    for wrong in ("<{letter}>", "<{number}>", "{", "<{}>", "{code.x}"):
        with pytest.raises(UsageError, match="spell a token with"):
            semid.export("lcrec", tmp_path / "no.json", ids=ids, token=wrong)


def test_the_command_takes_options_of_a_format(codes, tmp_path):
    wrap_codes(codes).write(tmp_path / "ids.parquet")
    offsets = (np.arange(codes.shape[1]) * 10).tolist()

    def export(*arguments):
        return run("export", tmp_path / "ids.parquet", *arguments)

    output = tmp_path / "static.npz"
    assert export("--to", "static", "--set", f"offsets={offsets}", "-o", str(output)) == 0
    with np.load(output) as arrays:
        allowed = walk_static(dict(arrays))
    assert allowed == {tuple(row) for row in (codes + offsets).tolist()}
    for words in (["static", "--set", "ofsets=[0]"], ["grid", "--set", "base=3"]):
        assert export("--to", *words, "-o", str(tmp_path / "no")) == 2
    assert not (tmp_path / "no").exists()


# Embedding Atlas -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop():
    x = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    x[:, 0] *= 5
    x[:, 1] *= 3
    x[7] = 2 * x[6]  # another length, the same direction
    ids = semid.RQKMeans(levels=2, codebook_size=4, validation_fraction=0).fit(x).encode(x)
    return x, ids


def test_atlas_has_points_codes_neighbors_and_titles(shop, tmp_path):
    x, ids = shop
    items = pa.table({"item_id": list(range(80)), "title": [f"title {n}" for n in range(80)]})
    semid.export(
        *("atlas", tmp_path / "atlas.parquet"),
        ids=ids[::-1],
        embeddings=x,
        items=items,
        projection="pca",
        neighbors=3,
    )
    table = pq.read_table(tmp_path / "atlas.parquet").to_pydict()
    assert table["title"] == [f"title {n}" for n in reversed(range(80))]
    assert table["code_2"] == [str(code) for code in ids.codes[::-1, 1]]
    rows = x[::-1].astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    np.fill_diagonal(distance, np.inf)
    for row, entry in enumerate(table["neighbors"]):
        expected = np.sort(distance[row])[:3]
        assert row not in entry["ids"]
        assert np.allclose(distance[row][entry["ids"]], expected, atol=1e-5)
        assert np.allclose(entry["distances"], expected, atol=1e-5)
    # The first two principal components, by another way.
    left, singular, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    for place, name in enumerate(("projection_x", "projection_y")):
        component = left[:, place] * singular[place]
        sign = np.sign(component @ np.array(table[name]))
        assert np.allclose(sign * component, table[name], atol=1e-3)


def test_atlas_says_what_is_missing(shop, tmp_path, monkeypatch):
    x, ids = shop
    for options, message in (
        ({}, "give --embeddings"),
        ({"embeddings": x, "projection": "tsne"}, "'tsne' is not one of"),
        ({"embeddings": x, "neighbors": -1}, "give 0 to 1000"),
    ):
        with pytest.raises(UsageError, match=message):
            semid.export("atlas", tmp_path / "no.parquet", ids=ids, **options)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match=r"semid\[atlas\]"):
        semid.export("atlas", tmp_path / "no.parquet", ids=ids, embeddings=x, projection="umap")
    one = ids[:1]
    semid.export("atlas", tmp_path / "one.parquet", ids=one, embeddings=x)
    assert "neighbors" not in pq.read_table(tmp_path / "one.parquet").column_names
