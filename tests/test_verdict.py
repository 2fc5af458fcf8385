"""The verdict: every threshold from both sides, useless codes, one relative error everywhere."""

from __future__ import annotations

import logging
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import semid
from cli_cases import run
from report_cases import FixedResidual, blobs
from semid.catalogue.refresh import refresh
from semid.cli.reports import demo
from semid.data.ids import held_out_mask
from semid.health import (
    GEOMETRY,
    NEAR,
    ROWS_PER_CODEWORD,
    THRESHOLDS,
    Collisions,
    Concentration,
    EnergyCounter,
    Inputs,
    collisions,
    evaluate_threshold,
    threshold_table,
    usage,
    usage_from_counts,
    verdict,
)
from semid.report import diagnose
from semid.report.compare import compare
from semid.tokenizers.neural.quantized import ReconstructionTask
from semid.tokenizers.neural.quantizers import Codebook, UpdateRule
from semid.tokenizers.stored import HELD_OUT_SALT

DOCS = Path(__file__).parents[1] / "docs" / "report.md"
KMEANS = {"n_init": 1, "max_iter": 10}
LEVEL = replace(usage_from_counts(np.full(256, 40)), perplexity=200.0)
IDS = Collisions(
    items=10_000,
    unique_ids=10_000,
    collision_rate=0.0,
    colliding_item_rate=0.0,
    largest_bucket=1,
    histogram={1: 10_000},
    distinct_items=10_000,
    duplicate_items=0,
    collision_rate_distinct=0.0,
    colliding_item_rate_distinct=0.0,
    largest_bucket_distinct=1,
)
INPUTS = Inputs(rows=None, columns=None, constant=(), constant_weight=0.0, width=1000)


def judged(levels=(LEVEL, LEVEL), ids=IDS, inputs=INPUTS, **errors):
    found = verdict(levels, ids, inputs=inputs, **errors)
    return {(f.name, f.severity) for f in found.findings}


def at_perplexity(share):
    return judged((replace(LEVEL, perplexity=1 + 255 * share), LEVEL))


def at_dead(share):
    return judged((replace(LEVEL, dead=round(256 * share)), LEVEL))


def at_filling(items_per_id):
    return judged(ids=replace(IDS, distinct_items=round(65_536 * items_per_id)))


def at_collisions(rate):
    return judged(
        (LEVEL,) * 4, replace(IDS, collision_rate_distinct=rate, colliding_item_rate_distinct=0.0)
    )


def at_shared(share):
    return judged(ids=replace(IDS, colliding_item_rate_distinct=share))


def at_bucket(items, of=100_000):
    ids = replace(IDS, distinct_items=of, largest_bucket_distinct=items)
    return judged((LEVEL,) * 4, ids)


def at_duplicates(share):
    return judged(ids=replace(IDS, duplicate_items=round(10_000 * share)))


def at_error(error):
    return judged(training_error=error, validation_error=error)


def at_gap(ratio):
    return judged(training_error=0.2, validation_error=0.2 * ratio)


def at_rows(share, *, rest=0.3, count=30):
    concentration = Concentration(count=count, total=1000, share=share, rest_error=rest)
    return judged(inputs=replace(INPUTS, rows=concentration))


def at_columns(share, *, rest=0.3, count=30):
    concentration = Concentration(
        count=count, total=1000, share=share, rest_error=rest, columns=tuple(range(count))
    )
    return judged(inputs=replace(INPUTS, columns=concentration))


def at_constant(columns, weight=0.0):
    return judged(inputs=replace(INPUTS, constant=tuple(range(columns)), constant_weight=weight))


def at_geometry(share):
    return {(f.name, f.severity) for f in evaluate_threshold(GEOMETRY, share, "", "", "")}


CASES = [
    (at_perplexity, "collapsed-level",
     [(0.124, "unhealthy"), (0.126, "warning"), (0.249, "warning"),
      (0.26, "near"), (0.28, None)]),
    (at_dead, "dead-codes", [(0.08, None), (0.095, "near"), (0.105, "warning"), (0.9, "warning")]),
    (at_filling, "small-id-space",
     [(0.4, None), (0.48, "near"), (0.51, "warning"),
      (99.0, "warning"), (101.0, "unhealthy")]),
    (at_collisions, "collisions",
     [(0.26, None), (0.28, "near"), (0.31, "warning"),
      (0.59, "warning"), (0.61, "unhealthy")]),
    (at_shared, "shared-ids", [(0.09, None), (0.11, "note"), (0.49, "note"), (0.51, "warning")]),
    (at_bucket, "giant-bucket",
     [(31, None), (88, None), (95, "near"),
      (101, "warning"), (999, "warning"), (1001, "unhealthy")]),
    (at_duplicates, "duplicate-input",
     [(0.0, None), (0.001, "note"),
      (0.0099, "note"), (0.0101, "warning")]),
    (at_error, "little-variance-kept",
     [(0.6, None), (0.65, "near"), (0.71, "warning"),
      (0.84, "warning"), (0.86, "unhealthy")]),
    (at_error, "worse-than-mean", [(0.999, None), (1.0, "unhealthy")]),
    (at_gap, "overfit", [(1.3, None), (1.4, "near"), (1.51, "warning")]),
    (at_rows, "few-rows", [(0.45, None), (0.48, "near"), (0.51, "warning")]),
    (at_columns, "few-columns", [(0.45, None), (0.48, "near"), (0.51, "warning")]),
    (at_constant, "constant-dimension", [(0, None), (1, "note"), (10, "note"), (11, "warning")]),
    (at_geometry, "overlapping-codewords",
     [(0.08, None), (0.095, "near"), (0.11, "warning"),
      (0.49, "warning"), (0.51, "unhealthy")]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("judge", "name", "value", "severity"),
    [
        pytest.param(judge, name, value, severity, id=f"{name} {value}")
        for judge, name, steps in CASES
        for value, severity in steps
    ],
)
def test_each_threshold_from_both_sides(judge, name, value, severity):
    found = judge(value)
    assert {each for each in found if each[0] == name} == (
        {(name, severity)} if severity not in (None, "near") else set()
    )
    assert (("near-threshold", "note") in found) == (severity == "near")


def test_every_threshold_has_a_case():
    names = {name for _, name, _ in CASES}
    assert {name for each in THRESHOLDS.values() for name in each.finding.split(", ")} <= names


def test_few_rows_are_few_and_the_error_of_the_rest_counts():
    assert at_rows(0.9, count=50) == {("few-rows", "warning")}
    assert at_rows(0.9, count=51) == set()
    assert at_rows(0.9, rest=0.84) == {("few-rows", "warning")}
    assert at_rows(0.9, rest=0.86) == {("few-rows", "unhealthy")}
    assert at_columns(0.9, rest=0.86) == {("few-columns", "unhealthy")}


def test_a_full_bucket_is_a_giant_only_beside_an_even_filling():
    wide = (replace(LEVEL, codebook_size=10_000, dead=0, perplexity=9000.0),)
    ids = replace(IDS, distinct_items=1_000, collision_rate_distinct=0.0)
    assert judged(wide, replace(ids, largest_bucket_distinct=32)) == set()
    assert judged(wide, replace(ids, largest_bucket_distinct=33)) == {("giant-bucket", "unhealthy")}


def test_documents_state_every_threshold(tmp_path):
    text = DOCS.read_text(encoding="utf8")
    for line in threshold_table(reasons=True):
        assert line in text, f"docs/report.md lacks: {line}"
    assert f"within a factor of {NEAR:g} of a warning" in text
    assert f"fewer than {ROWS_PER_CODEWORD} training rows per codeword" in text
    x, *_ = blobs()
    tok = semid.RQKMeans(levels=2, codebook_size=8, kmeans=KMEANS).fit(x)
    card = (tok.save(tmp_path / "model") / "README.md").read_text(encoding="utf8")
    assert all(line in card for line in threshold_table())
    assert "sum |x - x_hat|^2 / sum |x - mean|^2" in card


# Useless codes ---------------------------------------------------------------------------


def fitted(x, levels=2, codebook_size=8, **options):
    tok = semid.RQKMeans(levels=levels, codebook_size=codebook_size, kmeans=KMEANS, **options)
    return tok.fit(x)


def findings(tok):
    return {f.name: f.severity for f in tok.report.health.findings}


@pytest.fixture(scope="module")
def normal():
    return np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)


def test_an_id_space_too_small_for_the_items(normal):
    assert findings(fitted(normal, levels=1, codebook_size=16))["small-id-space"] == "unhealthy"
    assert "small-id-space" not in findings(fitted(normal, levels=3, codebook_size=32))


@pytest.mark.parametrize("scale", [1e2, 1e6])
def test_one_long_row_is_named_and_the_others_are_judged(normal, scale):
    x = normal.copy()
    x[7] *= scale
    tok = fitted(x, levels=3, codebook_size=32)
    assert findings(tok)["few-rows"] == "warning"
    assert not set(findings(tok)) & {"overfit", "overlapping-codewords"}
    what = next(f.what for f in tok.report.health.findings if f.name == "few-rows")
    assert what.startswith("1 of 2,000 rows")
    rest = np.delete(x, 7, axis=0).astype(np.float64)
    gaps = rest - np.delete(tok.decode(tok.encode(x)), 7, axis=0)
    error = (gaps**2).sum() / ((rest - rest.mean(0)) ** 2).sum()
    assert what.endswith(f"{error:.3f}")


@pytest.mark.parametrize(("width", "wide"), [(8, 1), (64, 3)])
def test_columns_of_another_scale_are_named(width, wide):
    x = np.random.default_rng(0).normal(size=(2000, width)).astype(np.float32)
    x[:, :wide] *= 1e4
    tok = fitted(x)
    assert findings(tok)["few-columns"] == "unhealthy"


def test_columns_in_the_order_of_their_variance_are_no_fault(normal):
    x = normal @ np.diag(0.8 ** np.arange(8, dtype=np.float32))
    assert not {"few-columns", "few-rows"} & set(findings(fitted(x, levels=3, codebook_size=32)))


def test_codes_that_keep_little_of_the_variance():
    x = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    assert findings(fitted(x))["little-variance-kept"] == "unhealthy"


@pytest.mark.parametrize("codebook_size", [2, 3, 4, 8, 256])
def test_a_constant_level_is_collapsed_whatever_its_size(codebook_size):
    codes = np.random.default_rng(0).integers(0, codebook_size, (3000, 16))
    codes[:, 5] = 0
    found = verdict(usage(codes, codebook_size), collisions(codes))
    worst = found.findings[0]
    assert (worst.name, worst.severity, worst.level) == ("collapsed-level", "unhealthy", 5)


class AnyCodes(FixedResidual):
    """Good codebooks, and codes that do not depend on the embedding."""

    def _encode_block(self, x, beam_width):
        codes = super()._encode_block(x, beam_width)
        rows = np.random.default_rng(1).integers(0, len(x), len(x))
        return replace(codes, codes=codes.codes[rows])


def test_codes_unrelated_to_the_embeddings_are_unhealthy(normal):
    books = fitted(normal, levels=3, codebook_size=32).codebooks
    assert diagnose(FixedResidual(*books), normal, explorer=False).verdict.level == "healthy"
    found = diagnose(AnyCodes(*books), normal, explorer=False).verdict.findings
    assert ("worse-than-mean", "unhealthy") in {(f.name, f.severity) for f in found}


def test_an_encoder_whose_output_is_constant_is_unhealthy():
    x = np.ones((50, 4), np.float32)
    found = diagnose(FixedResidual(np.eye(4, dtype=np.float32)), x, explorer=False).verdict
    assert "constant-latent" in {f.name for f in found.findings}


def test_a_level_of_codewords_at_one_point_is_unhealthy_right_after_the_fit(normal):
    books = [book.copy() for book in fitted(normal, levels=2, codebook_size=32).codebooks]
    rng = np.random.default_rng(0)
    books.append((rng.normal(size=(32, 8)) * 1e-5).astype(np.float32))
    found = diagnose(FixedResidual(*books), normal, explorer=False).verdict.findings
    assert ("overlapping-codewords", 2) in {(f.name, f.level) for f in found}


@pytest.mark.parametrize(("used", "healthy"), [(7, False), (9, True)])
def test_a_collapsed_level_makes_a_checkpoint_unhealthy(used, healthy):
    book = Codebook(64, 2, rule=UpdateRule(), seed=0, name=0)
    book.used[:used] = 1000
    trainee = object.__new__(ReconstructionTask)
    trainee.model = SimpleNamespace(quantizer=SimpleNamespace(codebooks=[book]))
    assert trainee._usage()[1] is healthy
    assert not torch.count_nonzero(book.used)


# One relative error ----------------------------------------------------------------------


def test_fit_report_compare_and_refresh_print_one_relative_error(normal):
    x = normal + np.linspace(0, 30, 8, dtype=np.float32)  # off the origin
    tok = fitted(x, validation_fraction=0.2)
    report = diagnose(tok, x, explorer=False)
    held = held_out_mask(semid.open_embeddings(x).ids, 0.2, salt=HELD_OUT_SALT)
    gaps = ((x - tok.decode(tok.encode(x)).astype(np.float64)) ** 2).sum(1)
    spreads = ((x - x.mean(0, dtype=np.float64)) ** 2).sum(1)
    expected = {
        "all": gaps.sum() / spreads.sum(),
        "training": gaps[~held].sum() / spreads[~held].sum(),
        "held_out": gaps[held].sum() / spreads[held].sum(),
    }
    assert report.reconstruction.relative_error == pytest.approx(expected, rel=1e-9)
    last = {name: report.reconstruction.per_level[-1].errors[name] for name in expected}
    assert last == pytest.approx(expected, rel=1e-5), "the latent is the input here"
    assert tok.report.training_error == report.verdict.training_error
    assert tok.report.validation_error == report.verdict.validation_error
    assert tok.report.summary == report.verdict.summary()
    compared = compare({"one": tok, "two": tok}, x)
    assert compared.metric("relative_error").values == (tok.report.validation_error,) * 2
    ids = tok.encode(x)
    previous = refresh(tok, ids, x).report.generations[0]
    assert previous.error == pytest.approx(expected["all"], rel=1e-9)
    assert previous.held_out_error == pytest.approx(tok.report.validation_error, rel=1e-9)


def test_errors_of_unknown_rows_are_not_called_training_errors(normal):
    tok = fitted(normal)
    found = diagnose(tok, normal[:900], explorer=False).verdict
    assert (found.training_error, found.validation_error) == (None, None)
    assert f"all rows {found.error:.4f}" in found.summary()
    whole = fitted(normal, validation_fraction=0.0)
    again = diagnose(whole, normal, explorer=False)
    assert again.verdict.training_error == whole.report.training_error
    assert set(again.reconstruction.relative_error) == {"all", "training"}


@pytest.mark.parametrize(("times", "count"), [(50, 0), (200, 1)])
def test_rows_and_columns_stand_out_at_a_hundred_medians(times, count):
    signs = np.where(np.arange(400) % 2, 1.0, -1.0)[:, None]
    x = np.tile(signs, (1, 20)).astype(np.float32)
    columns, rows = x.copy(), x.copy()
    columns[:, 3] *= np.sqrt(times)
    rows[5] *= np.sqrt(times)
    for part, name in ((columns, "columns"), (rows, "rows")):
        counter = EnergyCounter(np.zeros(20))
        counter.update(part, part)
        assert getattr(counter.result(), name).count == count


def test_counters_of_parts_add_up(normal):
    other = normal + 0.1
    whole, first, second = (EnergyCounter(normal.mean(0)) for _ in range(3))
    whole.update(normal, other)
    first.update(normal[:700], other[:700])
    second.update(normal[700:], other[700:])
    first.merge(second)
    a, b = first.result(), whole.result()
    assert (a.rows.count, a.columns.count, a.constant) == (
        b.rows.count,
        b.columns.count,
        b.constant,
    )
    assert a.rows.rest_error == pytest.approx(b.rows.rest_error)
    assert first.variances == pytest.approx(normal.var(0), rel=1e-5)


# Rows per codeword -----------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "lines"), [(39 * 8, 0), (39 * 8 - 1, 1)])
def test_few_rows_per_codeword_are_said_once_before_a_fit(normal, caplog, rows, lines):
    with caplog.at_level(logging.WARNING):
        fitted(normal[:rows], validation_fraction=0.0)
    said = [r.getMessage() for r in caplog.records if "rows per codeword" in r.getMessage()]
    assert len(said) == lines
    for text in said:
        assert "--codebook-size 7 (codebook_size)" in text


def test_the_command_line_says_it_once_and_the_demo_not_at_all(normal, tmp_path, capsys):
    np.save(tmp_path / "x.npy", normal[:300])
    options = ["--levels", "1", "--codebook-size", "16", "-o", str(tmp_path / "m"), "-q"]
    assert run("fit", tmp_path / "x.npy", *options) == 0
    assert capsys.readouterr().err.count("rows per codeword") == 1
    defaults = {name: each.default for name, each in signature(demo).parameters.items()}
    assert 0.95 * defaults["items"] >= ROWS_PER_CODEWORD * defaults["codebook_size"]
