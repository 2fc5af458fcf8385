"""Ids of any program: every layout is read to the same ids, and audited from codes alone."""

from __future__ import annotations

import csv
import json
import re
from itertools import combinations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import semid
from cli_cases import run
from semid.errors import ArtefactError, InputError, SemidError, UsageError
from semid.report.audit import category_codes, prefix_structure

CODES = np.array([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 1, 4], [0, 0, 0]])
NAMES = [f"item-{n}" for n in range(5)]
TOKENS = [[f"<{letter}_{code}>" for letter, code in zip("abc", row, strict=True)] for row in CODES]


def by_name(values):
    return dict(zip(NAMES, values, strict=True))


def write_csv(path, header, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def write_own(path):
    ids = semid.import_ids("auto", write(path.parent / "inner.json", by_name(CODES.tolist())))
    ids.write(path)


def write(path, document):
    path.write_text(json.dumps(document), encoding="utf8")
    return path


def sid(row):
    return "<|sid_begin|>" + "".join(f"<s_{t[1:]}" for t in row) + "<|sid_end|>"


NUMBERED = {  # no item ids: row numbers
    "lcrec.json": lambda p: write(p, {str(n): row for n, row in enumerate(TOKENS)}),
    "single.json": lambda p: write(p, {str(n): "".join(row) for n, row in enumerate(TOKENS)}),
    "list.json": lambda p: write(p, CODES.tolist()),
    "codes.npy": lambda p: np.save(p, CODES.astype(np.uint16)),
    "grid.pt": lambda p: torch.save(torch.from_numpy(CODES.T.copy()), p),
    "levels.csv": lambda p: write_csv(p, ["c1", "c2", "c3"], CODES.tolist()),
}
NAMED = {
    "named.json": lambda p: write(p, by_name(CODES.tolist())),
    "tokens.json": lambda p: write(p, by_name(TOKENS)),
    "dashes.json": lambda p: write(p, by_name("-".join(map(str, row)) for row in CODES)),
    "onerec.parquet": lambda p: pq.write_table(
        pa.table({"pid": NAMES, "codes": CODES.tolist()}), p
    ),
    "text.parquet": lambda p: pq.write_table(
        pa.table({"pid": NAMES, "sid": [sid(row) for row in TOKENS]}), p
    ),
    "easyrec.parquet": lambda p: pq.write_table(
        pa.table({"item_id": NAMES, "codes": CODES.tolist(), "candidate_codes": CODES.tolist()}), p
    ),
    "one.csv": lambda p: write_csv(
        p, ["item_id", "codes"], [[n, str(r.tolist())] for n, r in zip(NAMES, CODES, strict=True)]
    ),
    "many.tsv": lambda p: write_csv(
        p,
        ["sid_10", "asin", "sid_2", "sid_1"],
        [[r[2], n, r[1], r[0]] for n, r in zip(NAMES, CODES, strict=True)],
        "\t",
    ),
    "own.parquet": write_own,
}


@pytest.mark.parametrize("name", [*NUMBERED, *NAMED])
def test_every_layout_gives_the_same_ids(name, tmp_path):
    file = tmp_path / name
    {**NUMBERED, **NAMED}[name](file)
    ids = semid.import_ids("auto", file)
    assert np.array_equal(ids.codes, CODES)
    assert [item for item, _ in ids] == (NAMES if name in NAMED else list("01234"))
    if name in NAMED:
        with pytest.raises(UsageError, match="item ids of its own"):
            semid.import_ids("auto", file, items=NAMES)
    else:
        ids = semid.import_ids("auto", file, items=NAMES)
        assert ids.items.strings().to_pylist() == NAMES


def test_a_token_of_colliding_items_alone_is_a_last_level(tmp_path, caplog):
    rows = [list(row) for row in TOKENS]
    rows[3].append("<d_0>")
    rows[4].append("<d_1>")
    ids = semid.import_ids("auto", write(tmp_path / "minionerec.json", by_name(rows)))
    assert np.array_equal(ids.codes[:, :3], CODES)
    assert ids.codes[:, 3].tolist() == [0, 0, 0, 1, 2]
    assert np.array_equal(ids.encoded, CODES)
    assert ids.info.unique == "append"
    assert "2 of 5 items have a further token" in caplog.text
    ids.write(tmp_path / "ids.parquet")
    assert np.array_equal(semid.SemanticIds.read(tmp_path / "ids.parquet").codes, ids.codes)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"a": [1, 2], "b": [1, 2, 3, 4]}, "items have 2, 4 codes"),
        ({"a": [1, 2], "b": []}, "row 1 holds"),
        ({"a": [1, 2], "b": [1, -2]}, "negative|holds|codes"),
        ({"a": [1, 2], "b": [1, 2.5]}, "row 1 holds"),
        ({"a": [1, 2], "b": [1, True]}, "row 1 holds"),
        ({"a": ["<a_1>"], "b": ["<a_x>"]}, "row 1 holds"),
        ({"a": ["<a_1><b_2>"], "b": ["<a_1>"]}, "row 0 holds"),
        ({"a": "1-2", "b": "one"}, "row 1 holds 'one'"),
        ({"a": 5}, "row 0 holds 5"),
        ({}, "no object"),
        ("x", "no object"),
    ],
)
def test_wrong_json_is_refused(document, message, tmp_path):
    with pytest.raises(SemidError, match=message):
        semid.import_ids("auto", write(tmp_path / "wrong.json", document))


def test_wrong_tables_and_arrays_are_refused(tmp_path):
    write_csv(tmp_path / "none.csv", ["item_id", "title"], [["a", "b"]])
    with pytest.raises(InputError, match="codes are a column called"):
        semid.import_ids("auto", tmp_path / "none.csv")
    write_csv(tmp_path / "text.csv", ["item_id", "c1", "c2"], [["a", "1", "x"]])
    with pytest.raises(InputError, match="no whole numbers"):
        semid.import_ids("auto", tmp_path / "text.csv")
    for name, array in (("float", np.ones((3, 2))), ("flat", np.arange(4))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ArtefactError, match="codes are integers of shape"):
            semid.import_ids("auto", tmp_path / f"{name}.npy")
    np.save(tmp_path / "turned.npy", CODES[:2])
    with pytest.raises(ArtefactError, match="transposed"):
        semid.import_ids("auto", tmp_path / "turned.npy")
    with pytest.raises(UsageError, match=r"\.xlsx"):
        semid.import_ids("auto", tmp_path / "ids.xlsx")
    with pytest.raises(UsageError, match="does not exist"):
        semid.import_ids("auto", tmp_path / "gone.json")


def test_codes_that_are_no_codes_are_refused(tmp_path):
    file = write(tmp_path / "phones.json", {"a": [1, 2], "b": [1, 4_000_000_000]})
    with pytest.raises(InputError, match="number the codes of each level from 0"):
        semid.audit(semid.import_ids("auto", file))
    file = write(tmp_path / "long.json", {"a": [1, 2], "b": [1, 2**64]})
    with pytest.raises(ArtefactError, match="row 1 holds"):
        semid.import_ids("auto", file)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': [[[   ")
    with pytest.raises(SemidError, match=r"is not an \.npy file"):
        semid.import_ids("auto", tmp_path / "cut.npy")


def test_prefixes_are_counted_by_depth():
    rows = prefix_structure(np.array([[0, 0], [0, 0], [0, 1], [1, 0]]))
    assert [(r.depth, r.prefixes, r.children, r.largest, r.alone) for r in rows] == [
        (1, 2, 2.0, 3, 0.25),
        (2, 3, 1.5, 2, 0.5),
    ]


def test_categories_become_prefixes():
    codes = np.arange(12).reshape(4, 3)
    paths = [("toys", "cars"), ("toys", "dolls"), ("books", "cars"), ("toys",)]
    coded = category_codes(paths, codes)
    assert coded[:, 0].tolist() == [0, 0, 1, 0]
    assert len({tuple(row) for row in coded[:, :2].tolist()}) == 4  # "cars" of books is another
    assert np.array_equal(coded[:, 2], codes[:, 2])


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    semid.SyntheticCatalogue(items=1200, seed=0).write(folder)
    model = semid.RQKMeans(levels=2, codebook_size=8, seed=0)
    model.fit(folder / "embeddings.npy", ids=folder / "items.parquet")
    ids = model.encode(folder / "embeddings.npy", ids=folder / "items.parquet")
    ids.write(folder / "ids.parquet")
    return folder


def test_alignment_is_that_of_a_brute_force_count(shop):
    ids = semid.SemanticIds.read(shop / "ids.parquet")
    result = semid.audit(ids, interactions=shop / "interactions.parquet", replicates=0)
    log = semid.read_interactions(shop / "interactions.parquet")
    from semid.report.behavior import behavior_pairs

    pairs, _, _ = behavior_pairs(log, ids.items)
    rows = {(row.codes, row.depth): row for row in result.alignment}
    assert set(rows) == {(name, depth) for name in ("ids", "random") for depth in (1, 2)}
    for depth in (1, 2):
        prefixes = [tuple(row) for row in ids.codes[:, :depth].tolist()]
        pool = list(combinations(range(len(ids)), 2))
        chance = np.mean([prefixes[a] == prefixes[b] for a, b in pool])
        queries = zip(pairs.queries.tolist(), pairs.targets.tolist(), strict=True)
        sharing = np.mean([prefixes[a] == prefixes[b] for a, b in queries])
        row = rows["ids", depth]
        assert row.chance == pytest.approx(chance)
        assert row.sharing == pytest.approx(sharing)
        assert rows["random", depth].chance == pytest.approx(chance)  # equal sizes of prefixes
        assert row.lift > 2  # codes of topics that users stay in
        assert rows["random", depth].lift < 1.6
    assert result.pairs == len(pairs.queries)
    assert result.verdict.collisions.unique_ids == len(np.unique(ids.codes, axis=0))
    assert [p.prefixes for p in result.prefixes] == [8, len(np.unique(ids.codes, axis=0))]


def test_the_audit_can_be_read_again_and_shown(shop, tmp_path):
    ids = semid.SemanticIds.read(shop / "ids.parquet")
    items = pd.DataFrame(
        {"item_id": ids.items.strings().to_pylist(), "category": ids.codes[:, 0].astype(str)}
    ).iloc[1:]
    result = semid.audit(
        ids,
        interactions=shop / "interactions.parquet",
        items=items,
        source="<mine>",
        replicates=20,
    )
    rows = {(row.codes, row.depth): row for row in result.alignment}
    # Here the category is the first code, but for the item without one.
    assert rows["category", 1].sharing == pytest.approx(rows["ids", 1].sharing, abs=0.02)
    assert any("1 of 1,200 items have no category" in note for note in result.notes)
    again = type(result).from_dict(json.loads(result.to_json()))
    assert again.to_dict() == result.to_dict()
    page = result.to_html()
    assert "&lt;mine&gt;" in page
    assert "<mine>" not in page
    assert "Agreement with behavior" in page
    assert "| random, 2 |" in result.to_markdown()
    with pytest.raises(UsageError, match="no column 'categories'"):
        semid.audit(ids, interactions=shop / "interactions.parquet", items=items[["item_id"]])


def test_the_command_prints_and_writes(shop, tmp_path, capsys):
    page = tmp_path / "audit.html"
    log = str(shop / "interactions.parquet")
    assert run("audit", shop / "ids.parquet", "--interactions", log, "-o", page) == 0
    printed = capsys.readouterr().out
    assert re.search(r"random, depth 2: .* HR@20", printed)
    assert page.read_text(encoding="utf8").startswith("<!doctype html>")
    assert run("audit", shop / "ids.parquet", "--category-column", "brand") == 2


def test_items_without_interactions_are_refused(shop):
    with pytest.raises(UsageError, match=r"--items .* --interactions"):
        semid.audit(semid.SemanticIds.read(shop / "ids.parquet"), items=shop / "items.parquet")
