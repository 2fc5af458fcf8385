"""`diagnose`: planted failures are named, figures are right, bad input is refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from report_cases import FixedParallel, FixedResidual, blobs, healthy, logs, titles
from semid.errors import (
    EmbeddingError,
    InputError,
    InteractionsError,
    OutputExistsError,
    UsageError,
)
from semid.report import Diagnosis, compare, diagnose

FAST = {"replicates": 20, "threads": 1}
IDS = [f"item-{i}" for i in range(600)]


def names(diagnosis: Diagnosis) -> set[str]:
    return {finding.name for finding in diagnosis.verdict.findings}


def test_a_healthy_tokenizer_is_called_healthy() -> None:
    x, tok = healthy()
    d = diagnose(tok, x, **FAST)
    assert d.healthy
    assert d.verdict.findings == () or {f.severity for f in d.verdict.findings} == {"note"}


def test_figures_equal_brute_force() -> None:
    x, tok = healthy()
    d = diagnose(tok, x, **FAST)
    codes = tok.encode(x).codes
    decoded = tok.decode(codes)
    spread = ((x - x.mean(0)) ** 2).sum()
    assert d.reconstruction.relative_error["all"] == pytest.approx(
        ((x - decoded) ** 2).sum() / spread, rel=1e-5
    )
    first = x - tok.books[0][codes[:, 0]]
    assert d.reconstruction.per_level[0].errors["all"] == pytest.approx(
        (first**2).sum() / spread, rel=1e-5
    )
    cosines = (x * decoded).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(decoded, axis=1)
    assert d.reconstruction.mean_cosine == pytest.approx(cosines.mean(), rel=1e-5)
    assert d.verdict.collisions.unique_ids == len({tuple(row) for row in codes.tolist()})
    counts = np.sort(np.bincount(codes[:, 0], minlength=8))[::-1] / len(x)
    assert d.usage[0].rank_frequency.share == pytest.approx(counts.tolist())


def test_collapsed_level_is_named() -> None:
    x, centers, offsets = blobs()
    far = centers + 100
    far[0] = x.mean(0)  # every row is nearest to this codeword
    d = diagnose(FixedResidual(np.tile(far, (4, 1)) + np.arange(32)[:, None], offsets), x, **FAST)
    found = next(f for f in d.verdict.findings if f.name == "collapsed-level" and f.level == 0)
    assert d.verdict.level == found.severity == "unhealthy"
    assert "level 1" in found.what


def test_giant_bucket_is_named() -> None:
    x, centers, offsets = blobs(items=2000)
    rng = np.random.default_rng(1)
    x[: len(x) // 2] = centers[0] + rng.normal(size=(len(x) // 2, x.shape[1])) * 0.01
    books = np.concatenate([centers, centers + 50]), np.concatenate([offsets, offsets * 2])
    fine = rng.normal(size=(16, x.shape[1])) * 2  # coarse: all near rows share the last code
    d = diagnose(FixedResidual(*books, fine), x, **FAST)
    assert "giant-bucket" in names(d)
    assert d.buckets[0].items >= 1000
    assert d.buckets[0].distinct_inputs >= 1000


def test_overlapping_codewords_with_even_use_are_named_by_geometry_alone() -> None:
    rng = np.random.default_rng(0)
    words = rng.normal(size=(16, 8)).astype(np.float32)
    book = np.repeat(words, 4, axis=0) + rng.normal(size=(64, 8)).astype(np.float32) * 1e-3
    x = np.tile(book, (10, 1)) + rng.normal(size=(640, 8)).astype(np.float32) * 1e-6
    d = diagnose(FixedResidual(book), x, **FAST)
    assert d.usage[0].perplexity == pytest.approx(64, rel=1e-6), "use must be flat"
    assert "overlapping-codewords" in names(d)
    assert not names(d) & {"collapsed-level", "dead-codes"}
    assert d.overlap[0].points[3].effective_size == pytest.approx(16, rel=0.05)


def test_duplicated_inputs_are_named_and_counted_apart() -> None:
    x, tok = healthy()
    x[300:] = x[:300]
    d = diagnose(tok, x, **FAST)
    assert "duplicate-input" in names(d)
    assert d.verdict.collisions.duplicate_items == 300
    assert any(bucket.distinct_inputs < bucket.items for bucket in d.buckets)


@pytest.mark.parametrize(("value", "severity"), [(0.0, "warning"), (50.0, "warning")])
def test_constant_dimensions_are_named(value: float, severity: str) -> None:
    x, centers, offsets = blobs()
    wide = [
        np.concatenate([a, np.full((len(a), 1), v)], 1)
        for a, v in ((x, value), (centers, value), (offsets, 0.0))
    ]
    d = diagnose(FixedResidual(*wide[1:]), wide[0].astype(np.float32), **FAST)
    found = next(f for f in d.verdict.findings if f.name == "constant-dimension")
    assert "16" in found.what
    assert found.severity == severity


def test_equal_rows_do_not_break_it() -> None:
    tok = FixedResidual(np.eye(4, dtype=np.float32))
    d = diagnose(tok, np.ones((50, 4), dtype=np.float32), **FAST)
    assert d.verdict.level == "unhealthy"
    assert d.flips is None
    json.loads(d.to_json())
    assert "<html" in d.to_html()


def test_one_item_is_enough() -> None:
    x, tok = healthy()
    d = diagnose(tok, x[:1], **FAST)
    assert d.data.items == 1
    d.to_html()


@pytest.mark.parametrize("kind", [FixedResidual, FixedParallel])
def test_behavior_sees_what_follows_what(kind: type[FixedResidual]) -> None:
    x, centers, offsets = blobs()
    books = (centers, offsets) if kind is FixedResidual else (centers, centers * 0.9)
    d = diagnose(kind(*books), x, ids=IDS, interactions=logs(600), cutoffs=[20, 50], **FAST)
    assert d.behavior is not None
    measured = d.behavior.measured
    assert measured is not None
    rates = {r.name: r.rates[50].value for r in measured.retrieval.hit_rates}
    assert rates["decoder(codes)"] > 5 * rates["random"]
    assert measured.aucs.aucs["weighted"].value > 0.9
    assert measured.pairs.clusters <= d.behavior.test_users < 100
    assert d.explorer is not None
    assert len(d.explorer["trees"]) == (1 if kind is FixedResidual else 2)


def test_unknown_items_are_counted_and_said() -> None:
    x, tok = healthy()
    table = logs(600)
    strange = table["item_id"].to_pylist()
    strange[::7] = ["elsewhere"] * len(strange[::7])
    d = diagnose(tok, x, ids=IDS, interactions=table.set_column(1, "item_id", [strange]), **FAST)
    assert d.behavior is not None
    assert d.behavior.unknown_interactions == len(strange[::7])
    assert any("outside the catalogue" in note for note in d.notes)


def test_logs_without_order_leave_popularity_and_say_why() -> None:
    x, tok = healthy()
    d = diagnose(tok, x, ids=IDS, interactions=logs(600).drop_columns(["position"]), **FAST)
    assert d.behavior is not None
    assert d.behavior.measured is None
    assert d.behavior.popularity is not None
    assert any("no order" in note for note in d.notes)
    d.to_html()


def test_pairs_of_a_second_truth() -> None:
    x, tok = healthy()
    pairs = pa.table(
        {
            "item_id": [f"item-{i}" for i in range(200)] * 2,
            "related_item_id": [f"item-{i + 8}" for i in range(200)]
            + [f"item-{(i * 37 + 5) % 600}" for i in range(200)],
            "relation": ["twin"] * 200 + ["noise"] * 200,
        }
    )
    d = diagnose(tok, x, ids=IDS, relations=pairs, **FAST)
    assert d.relations is not None
    aucs = {kind: m.aucs.aucs["weighted"].value for kind, m in d.relations.items()}
    assert aucs["twin"] > 0.9
    assert aucs["noise"] < 0.7


class TestRefusals:
    def test_another_width(self) -> None:
        _, tok = healthy()
        with pytest.raises(EmbeddingError, match="width 5"):
            diagnose(tok, np.ones((10, 5), np.float32))

    def test_not_a_tokenizer(self) -> None:
        with pytest.raises(UsageError, match=r"semid\.load"):
            diagnose("model/", np.ones((10, 5), np.float32))  # type: ignore[arg-type]

    def test_options_by_name_and_range(self) -> None:
        x, tok = healthy()
        with pytest.raises(UsageError, match="did you mean 'flip_sample'"):
            diagnose(tok, x, flip_samples=10)
        with pytest.raises(UsageError, match="geometry_sample=0: give at least 1"):
            compare({"a": tok, "b": tok}, x, geometry_sample=0)

    def test_logs_of_other_items(self) -> None:
        x, tok = healthy()
        with pytest.raises(InteractionsError, match="is in the catalogue"):
            diagnose(tok, x, ids=[f"other-{i}" for i in range(600)], interactions=logs(600))

    def test_logs_without_a_pair(self) -> None:
        x, tok = healthy()
        table = logs(600)
        lonely = table.filter(pa.compute.equal(table["position"], 0))
        with pytest.raises(InteractionsError, match="follow each other"):
            diagnose(tok, x, ids=IDS, interactions=lonely)

    def test_cutoffs_beyond_the_pool(self) -> None:
        x, tok = healthy()
        with pytest.raises(InputError, match="larger than the 599 candidates"):
            diagnose(tok, x, ids=IDS, interactions=logs(600), cutoffs=[600], **FAST)

    def test_usual_cutoffs_shrink_with_the_pool_and_say_so(self) -> None:
        x, tok = healthy()
        d = diagnose(tok, x[:40], ids=IDS[:40], interactions=logs(40), **FAST)
        assert d.behavior is not None
        assert d.behavior.measured is not None
        assert d.behavior.measured.cutoffs == (20,)
        assert any("too small" in note for note in d.notes)

    def test_relations_without_a_known_pair(self) -> None:
        x, tok = healthy()
        pairs = pa.table({"item_id": ["a"], "related_item_id": ["b"]})
        with pytest.raises(InputError, match="no pair is left"):
            diagnose(tok, x, ids=IDS, relations=pairs, **FAST)

    def test_relations_without_their_columns(self) -> None:
        x, tok = healthy()
        with pytest.raises(UsageError, match="related_item_id"):
            diagnose(tok, x, ids=IDS, relations=pa.table({"item_id": ["a"]}), **FAST)


def test_same_seed_same_result() -> None:
    x, tok = healthy()
    first, second = (diagnose(tok, x, seed=3, **FAST).to_html() for _ in range(2))
    assert first == second


def test_writes_by_suffix_and_refuses_existing(tmp_path: Path) -> None:
    x, tok = healthy()
    d = diagnose(tok, x, ids=IDS, items=titles(600), interactions=logs(600), **FAST)
    for suffix, opening in ((".html", "<!doctype html>"), (".json", "{"), (".md", "# ")):
        path = d.write(tmp_path / f"report{suffix}")
        assert path.read_text(encoding="utf8").startswith(opening)
        with pytest.raises(OutputExistsError, match="overwrite"):
            d.write(path)
        d.write(path, overwrite=True)
    with pytest.raises(UsageError, match=r"\.html, \.json, \.md"):
        d.write(tmp_path / "report.pdf")
    assert json.loads((tmp_path / "report.json").read_text())["verdict"]["level"] == "healthy"
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == [
        "report.html",
        "report.json",
        "report.md",
    ]


@pytest.mark.parametrize("kind", [FixedResidual, FixedParallel])
def test_json_reads_back_as_the_same_result(kind: type[FixedResidual], tmp_path: Path) -> None:
    x, centers, offsets = blobs()
    pairs = pa.table({"item_id": ["item-0"], "related_item_id": ["item-8"]})
    d = diagnose(
        kind(centers, offsets), x, ids=IDS, interactions=logs(600), relations=pairs, **FAST
    )
    document = json.loads(d.write(tmp_path / "report.json").read_text(encoding="utf8"))
    again = Diagnosis.from_dict(document)
    assert again == d
    assert again.to_json() == d.to_json()
    figures = d.to_markdown()
    assert again.to_markdown() == figures


def test_reports_written_before_read_back_under_the_new_names() -> None:
    x, tok = healthy()
    d = diagnose(tok, x, ids=IDS, interactions=logs(600), **FAST)
    text = d.to_json().replace("colliding_item_rate", "shared_share")
    old = json.loads(text.replace("collision_probability", "floor"))
    assert Diagnosis.from_dict(old) == d
    with pytest.raises(InputError, match="no key 'perplexitie'"):
        old["usage"][0]["perplexitie"] = old["usage"][0].pop("perplexity")
        Diagnosis.from_dict(old)
