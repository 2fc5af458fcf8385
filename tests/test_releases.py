"""Public releases in small: both Amazon layouts, both MovieLens layouts, k-cores, ratings."""

from __future__ import annotations

import gzip
import json
import sys
import types

import numpy as np
import pyarrow.parquet as pq
import pytest

from cli_cases import run
from semid.data.interactions import read_interactions
from semid.data.releases import core_mask, read_amazon, read_movielens
from semid.errors import InputError, InteractionsError, MissingExtraError, UsageError
from semid.recommenders.ranking.builder import RankingDataConfig
from semid.recommenders.ranking.data import prepare_ranking_data


def write_gz(path, lines):
    with gzip.open(path, "wt", encoding="utf8") as file:
        file.writelines(line + "\n" for line in lines)
    return path


def reviews_2014(path, pairs):
    """Newest first, to see that time decides."""
    return write_gz(
        path,
        [
            json.dumps(
                {
                    "reviewerID": user,
                    "asin": item,
                    "overall": rating,
                    "unixReviewTime": 1_400_000_000 - 86_400 * n,
                    "reviewText": "fine",
                }
            )
            for n, (user, item, rating) in enumerate(pairs)
        ],
    )


PAIRS = [("u1", "A", 5.0), ("u1", "B", 2.0), ("u2", "A", 4.0), ("u2", "B", 1.0), ("u3", "C", 3.0)]


def test_amazon_2014(tmp_path):
    reviews = reviews_2014(tmp_path / "reviews_Beauty.json.gz", PAIRS)
    meta = write_gz(
        tmp_path / "meta_Beauty.json.gz",
        [  # Python literals, as released
            "{'asin': 'A', 'title': 'Soap &amp; more', 'brand': 'Acme', "
            "'categories': [['Beauty'], ['Beauty', 'Bath', 'Soap']], 'price': 3.5}",
            "{'asin': 'Z', 'title': \"Somebody's\"}",
        ],
    )
    found = read_amazon(reviews, items=meta, core=2)
    rows = found.interactions.to_pylist()
    assert [(r["user_id"], r["item_id"], r["position"], r["rating"]) for r in rows] == [
        ("u1", "B", 0, 2.0),
        ("u1", "A", 1, 5.0),
        ("u2", "B", 0, 1.0),
        ("u2", "A", 1, 4.0),
    ]
    assert rows[1]["timestamp"] == 1_400_000_000
    assert found.items.to_pylist() == [
        {
            "item_id": "A",
            "title": "Soap & more",
            "brand": "Acme",
            "categories": "Beauty > Bath > Soap",
            "text": "Title: Soap & more; Brand: Acme; Categories: Beauty > Bath > Soap",
        },
        {"item_id": "B", "title": "", "brand": "", "categories": "", "text": ""},
    ]
    assert any("1 interactions outside the 2-core" in note for note in found.notes)
    assert any("1 items have no description" in note for note in found.notes)
    assert len(read_amazon(reviews, core=0).interactions) == 5
    with pytest.raises(InteractionsError, match="3-core"):
        read_amazon(reviews, core=3)


def test_amazon_2023(tmp_path):
    lines = [
        {
            "user_id": user,
            "asin": item.lower(),
            "parent_asin": item,
            "rating": rating,
            "timestamp": 1_600_000_000_123 + 1000 * n,
        }
        for n, (user, item, rating) in enumerate(PAIRS)
    ]
    reviews = write_gz(tmp_path / "All_Beauty.jsonl.gz", map(json.dumps, lines))
    items = [
        {"parent_asin": "A", "title": "Soap", "store": "Shop", "categories": ["Beauty", "Soap"]},
        {"parent_asin": "B", "title": "Gel", "details": {"Brand": "Acme"}, "categories": []},
    ]
    meta = write_gz(tmp_path / "meta_All_Beauty.jsonl.gz", map(json.dumps, items))
    found = read_amazon(reviews, items=meta, core=0)
    assert found.interactions.column("item_id").to_pylist() == ["A", "B", "A", "B", "C"]
    assert found.interactions.column("timestamp").to_pylist()[0] == 1_600_000_000
    assert found.items.column("brand").to_pylist() == ["Shop", "Acme", ""]
    assert found.items.column("categories").to_pylist() == ["Beauty > Soap", "", ""]


def test_wrong_files(tmp_path):
    other = write_gz(tmp_path / "a.json.gz", [json.dumps({"user": 1})])
    with pytest.raises(InputError, match=r"line 1 .* has neither reviewerID, asin or user_id"):
        read_amazon(other)
    whole = json.dumps({"reviewerID": "u", "asin": "A", "overall": 5, "unixReviewTime": 1})
    for line in ('{"reviewerID": "u', "{'reviewerID': u}", "17"):  # cut, a name, no object
        cut = write_gz(tmp_path / "b.json.gz", [whole, line])
        with pytest.raises(InputError, match=r"line 2 .* no JSON object"):
            read_amazon(cut)
    bare = write_gz(tmp_path / "c.json.gz", [json.dumps({"reviewerID": "u", "asin": "A"})])
    with pytest.raises(InputError, match="no number in 'overall'"):
        read_amazon(bare)
    with pytest.raises(UsageError, match="does not exist"):
        read_amazon(tmp_path / "none.json.gz")
    with pytest.raises(UsageError, match="unpacked MovieLens"):
        read_movielens(tmp_path)


def test_movielens_1m(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::10::5::978300760\n1::20::3::978302109\n2::10::4::1\n")
    (tmp_path / "movies.dat").write_bytes(
        "10::Misérables, Les (1995)::Drama|Musical\n20::Heat (1995)::Action\n".encode("latin-1")
    )
    found = read_movielens(tmp_path)
    assert found.items.column("title").to_pylist() == ["Misérables, Les (1995)", "Heat (1995)"]
    assert found.items.column("categories").to_pylist() == ["Drama|Musical", "Action"]
    assert found.interactions.column("rating").to_pylist() == [5.0, 3.0, 4.0]
    (tmp_path / "ratings.dat").write_text("1::10::5\n")
    with pytest.raises(InputError, match="3 fields"):
        read_movielens(tmp_path)


def test_movielens_latest(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,3,0.5,964981247\n"
    )
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n1,Toy Story (1995),Adventure|Animation\n3,"Me, You (1996)",Comedy\n'
    )
    found = read_movielens(tmp_path)
    rows = found.interactions.to_pylist()
    assert [(r["item_id"], r["rating"], r["position"]) for r in rows] == [
        ("3", 0.5, 0),
        ("1", 4.0, 1),
    ]
    assert set(found.items.column("title").to_pylist()) == {"Toy Story (1995)", "Me, You (1996)"}
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,good,1\n")
    with pytest.raises(InputError, match="'good'"):
        read_movielens(tmp_path)


def test_the_core_is_the_largest_that_holds():
    generator = np.random.default_rng(0)
    users, items = generator.integers(0, 60, 300), generator.integers(0, 40, 300)
    kept = core_mask(users, items, 5)
    # By hand: throw out one at a time until nothing is left to throw out.
    left = set(range(300))
    while True:
        bad = {
            n
            for n in left
            if sum(users[m] == users[n] for m in left) < 5
            or sum(items[m] == items[n] for m in left) < 5
        }
        if not bad:
            break
        left -= bad
    assert set(np.flatnonzero(kept)) == left
    assert core_mask(users, items, 0).all()


class Encoder:
    """Stands in for a sentence encoder: the length of a text, on the unit circle."""

    def __init__(self, name):
        assert name == "a-model"

    def encode(self, texts, *, batch_size, normalize_embeddings, show_progress_bar):
        assert normalize_embeddings
        assert not show_progress_bar
        angles = np.array([len(t) for t in texts], dtype=np.float32)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_semid_prepare_and_the_rating_label(tmp_path, capsys, monkeypatch):
    generator = np.random.default_rng(1)
    drawn = [
        (
            f"u{generator.integers(20)}",
            f"i{generator.integers(12)}",
            float(generator.integers(1, 6)),
        )
        for _ in range(400)
    ]
    reviews = reviews_2014(tmp_path / "r.json.gz", drawn)
    meta = write_gz(
        tmp_path / "m.json.gz",
        [
            json.dumps({"asin": f"i{n}", "title": f"item {n}", "brand": f"b{n % 3}"})
            for n in range(12)
        ],
    )
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Encoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    given = ["prepare", "amazon", reviews, "--items", meta, "-o", tmp_path / "data" / "own"]
    assert run(*given, "--embed", "a-model") == 0
    assert "interactions of 20 users with 12 items" in capsys.readouterr().out
    folder = tmp_path / "data" / "own"
    assert np.load(folder / "embeddings.f16.npy").shape == (12, 2)
    assert read_interactions(folder / "interactions.parquet").order_column == "timestamp"
    assert pq.read_table(folder / "items.parquet").num_rows == 12
    rows = prepare_ranking_data(
        folder / "interactions.parquet",
        items=folder / "items.parquet",
        config=RankingDataConfig(label="rating>3"),
    )
    assert "label=rating>3" in rows.protocol
    share = float(rows.parts["train"].label.mean())
    assert 0.2 < share < 0.6
    assert run(*given) == 2  # it exists
    assert run("prepare", "netflix", reviews, "-o", tmp_path / "x") == 2
    assert run("prepare", "movielens", tmp_path, "--items", meta, "-o", tmp_path / "x") == 2
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    found = read_amazon(reviews, items=meta)
    with pytest.raises(MissingExtraError, match=r"semid\[text\]"):
        found.write(tmp_path / "y", embed="a-model")
    assert not (tmp_path / "y").exists()
