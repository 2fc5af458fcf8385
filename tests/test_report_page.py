"""The page: self-contained, safe against item texts, and of bounded size."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from report_cases import FixedParallel, blobs, healthy, logs, titles
from semid.report import diagnose
from semid.report.explorer import TextWords, build_tree, describing_words, shorten
from semid.report.figure import number, share
from semid.report.figures import report_figures
from semid.report.pages import embed_json

FAST = {"replicates": 0, "threads": 1}
IDS = [f"item-{i}" for i in range(600)]


def test_every_figure_is_explained_and_has_its_numbers() -> None:
    x, tok = healthy()
    d = diagnose(tok, x, ids=IDS, interactions=logs(600), **FAST)
    figures = report_figures(d)
    assert len(figures) >= 10
    assert len({figure.id for figure in figures}) == len(figures)
    for figure in figures:
        assert "Good:" in figure.caption
        assert "Bad:" in figure.caption
        assert figure.definition
        assert figure.rows
        assert all(len(row) == len(figure.columns) for row in figure.rows), figure.id


def test_page_asks_nothing_of_the_network() -> None:
    x, tok = healthy()
    page = diagnose(tok, x, ids=IDS, items=titles(600), **FAST).to_html()
    assert "default-src 'none'" in page
    own = page[: page.index("semid-plots")]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", own)
    assert "@import" not in own


def test_item_texts_cannot_leave_their_place() -> None:
    x, tok = healthy()
    d = diagnose(tok, x, ids=IDS, items=titles(600, hostile=True), **FAST)
    page = d.to_html()
    assert "window.broken" in page
    for match in re.finditer("window.broken", page):
        before = page[: match.start()]
        inside = before.rfind("<script") > before.rfind("</script>")
        if inside:  # only as data, never as code
            assert before[before.rfind("<script") :].startswith('<script type="application/json"')
    assert "<img src=x" not in page
    found = re.search(r'id="semid-explorer">(.*?)</script>', page, re.S)
    assert found is not None
    assert json.loads(found.group(1))["titles"][0] == "</script><script>window.broken = 1</script>"
    markdown = d.to_markdown()
    assert "<script>" not in markdown


def test_embedded_json_reads_back() -> None:
    value = {"a": "</script><!--&\u2028\u2029", "b": [1.5, None, "é"]}
    text = str(embed_json(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_size_is_bounded_whatever_the_catalogue() -> None:
    x, centers, offsets = blobs(items=24_000, groups=64, dim=8)
    from report_cases import FixedResidual

    rng = np.random.default_rng(0)
    third = rng.normal(size=(64, 8)) * 0.1
    ids = [f"{'x' * 20}{i}" for i in range(24_000)]
    long = titles(24_000).set_column(
        1, "title", [[f"{'long title ' * 60}{i}" for i in range(24_000)]]
    )
    long = long.set_column(0, "item_id", [ids])
    d = diagnose(FixedResidual(centers, offsets, third), x, ids=ids, items=long, **FAST)
    assert d.explorer is not None
    assert d.explorer["shown"] == 20_000
    tree = d.explorer["trees"][0]
    roots = [n for n, p in zip(tree["items"], tree["parent"], strict=True) if p < 0]
    assert sum(roots) == 24_000
    page = d.to_html()
    assert len(page.encode()) < 10_000_000
    assert "20,000 of them" in page


def test_parallel_codebooks_have_a_tree_each() -> None:
    x, centers, _ = blobs()
    d = diagnose(FixedParallel(centers, centers * 0.9, centers * 1.1), x, **FAST)
    assert d.explorer is not None
    assert [tree["level"] for tree in d.explorer["trees"]] == [0, 1, 2]
    for level, tree in enumerate(d.explorer["trees"]):
        codes = np.array(d.explorer["codes"]).reshape(-1, 3)[:, level]
        for code, first, shown in zip(tree["code"], tree["first"], tree["shown"], strict=True):
            assert (codes[tree["order"][first : first + shown]] == code).all()
    assert "Codebook 2" in d.to_html()


def test_tree_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (300, 3))
    value = rng.normal(size=300)
    tree = build_tree(codes, values={"value": value})
    prefixes: dict[tuple[int, ...], list[int]] = {}
    for row, code in enumerate(codes.tolist()):
        for depth in (1, 2, 3):
            prefixes.setdefault(tuple(code[:depth]), []).append(row)
    paths: list[tuple[int, ...]] = []
    for node, (parent, code) in enumerate(zip(tree.parent, tree.code, strict=True)):
        paths.append((*paths[parent], int(code)) if parent >= 0 else (int(code),))
        rows = prefixes[paths[-1]]
        start = tree.first[node]
        assert sorted(tree.order[start : start + tree.items[node]]) == rows
        assert tree.metrics["value"][node] == pytest.approx(value[rows].mean())
        unique = len({tuple(codes[row]) for row in rows}) / len(rows)
        assert tree.metrics["unique"][node] == pytest.approx(unique)
    expected = {p for p, rows in prefixes.items() if len(p) == 1 or len(prefixes[p[:-1]]) > 1}
    assert set(paths) == expected
    assert tree.left_out == 0


def test_tree_budget_keeps_the_fullest_and_counts_the_rest() -> None:
    codes = np.repeat(np.arange(50), np.arange(1, 51))[:, None]
    tree = build_tree(codes, most_nodes=10)
    assert sorted(tree.items.tolist()) == list(range(41, 51))
    assert tree.left_out == 40


def test_words_describe_their_group() -> None:
    texts = ["red lipstick matte", "red lipstick gloss", "green shampoo", "green shampoo dry"]
    groups = np.array([0, 0, 1, 1])
    found = describing_words(TextWords.of(texts), groups)
    assert set(found[0]) == {"red", "lipstick"}
    assert set(found[1]) == {"green", "shampoo"}
    assert TextWords.of(["The 12 oz Bottle of it"]).vocabulary == ["bottle"]


def test_titles_are_cut_at_a_character() -> None:
    assert shorten("  a\n b ") == "a b"
    assert shorten("") is None
    cut = shorten("é" * 200)
    assert cut is not None
    assert len(cut.encode()) <= 120
    assert cut.endswith("…")


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.1292, "12.9%"), (0.00131, "0.13%"), (0.0, "0.0%"), (1.0, "100.0%"), (1e-6, "<0.01%")],
)
def test_shares_are_written_alike(value: float, written: str) -> None:
    assert share(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(214.7, "215"), (95.23, "95.2"), (0.38293, "0.383"), (12101.0, "12,101"), (0.0, "0")],
)
def test_measures_are_written_alike(value: float, written: str) -> None:
    assert number(value) == written
