"""The release gate: each figure against brute force, and each can fail alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import semid
from catalogue_cases import codes_info
from cli_cases import run
from semid.catalogue.release import DECLARED, check_release, read_maxima
from semid.errors import SemidError, UsageError


def make_ids(codes, items=None, *, sizes=(8, 8), unique="none", norms=0.5, model_codes=None):
    codes = np.asarray(codes)
    info = codes_info(sizes, unique=unique)
    items = [f"i{n}" for n in range(len(codes))] if items is None else items
    from semid.data.ids import ItemIds

    residual_norms = np.full(len(codes), norms, np.float32)
    return semid.SemanticIds(ItemIds(items), codes, residual_norms, info, model_codes)


OLD = make_ids([[n // 8 % 8, n % 8] for n in range(40)])


def values(old, new, **options):
    return {f.name: f.value for f in check_release(old, new, **options).figures}


def test_equal_releases_pass_with_zeros():
    result = check_release(OLD, OLD, popularity=np.ones(40))
    assert result.passed
    assert {f.value for f in result.figures if f.name != "unresolved"} == {0.0}
    assert [f.name for f in result.figures] == list(DECLARED)


def test_figures_of_items_are_counted():
    codes = OLD.codes.astype(int)
    codes[0] = [7, 0]  # one item moves to a new id
    codes[[1, 2]] = codes[[2, 1]]  # two items change places
    new = make_ids(codes[:36], OLD.items.strings().to_pylist()[:36])  # four are gone
    popularity = np.zeros(40)
    popularity[[0, 5]] = 3, 1
    got = values(OLD, new, popularity=popularity)
    assert got["churn"] == pytest.approx(3 / 36)
    assert got["churn_popular"] == pytest.approx(3 / 4)
    assert got["removed"] == pytest.approx(4 / 40)
    assert got["reassigned"] == pytest.approx(2 / 40)
    assert values(OLD, new)["churn_popular"] is None


def test_figures_of_ids_are_counted():
    rng = np.random.default_rng(3)
    old = make_ids(rng.integers(0, 5, (60, 2)))
    new = make_ids(rng.integers(2, 8, (70, 2)), [f"i{n}" for n in range(20, 90)], sizes=(8, 12))
    got = values(old, new)
    invalid = []
    for depth in (1, 2):
        before = {tuple(row) for row in old.codes[:, :depth].tolist()}
        after = {tuple(row) for row in new.codes[:, :depth].tolist()}
        invalid.append(len(before - after) / len(before))
    assert got["invalid_prefixes"] == pytest.approx(max(invalid))
    tokens = [
        {(level, code) for level in (0, 1) for code in ids.codes[:, level].tolist()}
        for ids in (old, new)
    ]
    assert got["new_tokens"] == pytest.approx(len(tokens[1] - tokens[0]) / len(tokens[1]))
    assert got["vocabulary_growth"] == pytest.approx(4 / 16)
    assert got["usage_shift"] is None  # the codebooks have other sizes

    def colliding(ids):
        rows = [tuple(row) for row in ids.codes.tolist()]
        return np.mean([rows.count(row) > 1 for row in rows])

    assert got["collisions"] == pytest.approx(max(colliding(new) - colliding(old), 0))


def test_reassigned_ids_are_those_of_other_items_alone():
    old = make_ids([[0, 0], [0, 0], [1, 1], [2, 2]])
    new = make_ids([[3, 3], [0, 0], [2, 2], [1, 1]])
    # [0, 0] still has one of its items; [1, 1] and [2, 2] have changed hands.
    assert values(old, new)["reassigned"] == pytest.approx(2 / 3)


def test_unresolved_items_are_those_beyond_one_per_id():
    model = [[0, 0], [0, 0], [0, 0], [1, 1]]
    codes = [[0, 0, 0], [0, 0, 1], [0, 0, 1], [1, 1, 0]]
    new = make_ids(codes, sizes=(8, 8, 4), unique="append", model_codes=np.array(model))
    result = check_release(new, new)
    assert result.figure("unresolved").value == pytest.approx(1 / 4)
    assert not result.passed
    assert check_release(new, new, maxima={"unresolved": 0.25}).passed


def test_usage_and_errors_are_compared():
    flat = make_ids(np.stack([np.arange(4000) % 8, np.arange(4000) // 8 % 8], 1), norms=1.0)
    one = flat.codes.astype(int)
    one[: 4000 // 2, 0] = 0
    skewed = make_ids(one, norms=2.0)
    got = values(flat, skewed)
    share = np.bincount(one[:, 0], minlength=8) / 4000
    assert got["usage_shift"] == pytest.approx(0.5 * np.abs(share - 1 / 8).sum(), abs=0.02)
    assert got["error_growth"] == pytest.approx(3.0)
    unknown = make_ids(flat.codes, norms=math.nan)
    assert values(unknown, flat)["error_growth"] is None


def test_thresholds_are_read(tmp_path):
    file = tmp_path / "release.toml"
    file.write_text("churn = 0.5\nremoved = false\n", encoding="utf8")
    assert read_maxima(file) == {"churn": 0.5, "removed": None}
    for text, message in (
        ("chrun = 0.5", "did you mean 'churn'"),
        ("churn = true", "or false"),
        ("churn = -1", "or false"),
        ("churn = nan", "or false"),
        ('churn = "x"', "or false"),
        ("churn =", "release.toml"),
    ):
        file.write_text(text, encoding="utf8")
        with pytest.raises(UsageError, match=message):
            read_maxima(file)


def test_the_documentation_lists_every_figure():
    page = (Path(__file__).parents[1] / "docs" / "catalogue.md").read_text(encoding="utf8")
    for name, entry in DECLARED.items():
        assert f"| `{name}` | {entry['meaning']} | {entry['maximum']:g} |" in page


def test_releases_that_cannot_be_compared_are_refused():
    with pytest.raises(UsageError, match="2 codes and the new ones 3"):
        check_release(OLD, make_ids(np.zeros((4, 3), int), sizes=(2, 2, 2)))
    with pytest.raises(SemidError, match="40 and 0 items"):
        check_release(OLD, make_ids(np.zeros((0, 2), int)))


def test_the_command_decides_by_its_exit_code(tmp_path, capsys):
    OLD.write(tmp_path / "old.parquet")
    codes = OLD.codes.astype(int)
    codes[:10, 1] = (codes[:10, 1] + 1) % 8
    (tmp_path / "next").mkdir()
    make_ids(codes).write(tmp_path / "next" / "ids.parquet")
    semid.CatalogueBundle.create(tmp_path / "bundle", OLD)
    thresholds = tmp_path / "release.toml"

    def check(new, *more):
        code = run("check", tmp_path / "old.parquet", tmp_path / new, *more)
        return code, capsys.readouterr().out

    assert check("bundle")[0] == 0
    code, text = check("next")
    assert code == 3
    assert "FAIL churn" in text
    code, text = check("next", "--json")
    document = json.loads(text)
    assert code == 3
    assert not document["passed"]
    figure = next(f for f in document["figures"] if f["name"] == "churn")
    assert figure["value"] == pytest.approx(10 / 40)
    thresholds.write_text(
        "churn = 0.25\ncollisions = false\ninvalid_prefixes = 1\nreassigned = 1\n", encoding="utf8"
    )
    assert check("next", "--thresholds", str(thresholds))[0] == 0
    thresholds.write_text("no_such = 1", encoding="utf8")
    assert check("next", "--thresholds", str(thresholds))[0] == 2
    assert check("gone")[0] == 1
