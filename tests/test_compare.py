"""`compare`: ranks by view, honest trade-offs, pages and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from report_cases import FixedParallel, FixedResidual, blobs, healthy, logs, titles
from semid.diagnostics.pairs import bootstrap, differ, proportion, spearman
from semid.diagnostics.spaces import effective_rank, geometry
from semid.errors import OutputExistsError, UsageError
from semid.report import Comparison, compare
from semid.report.compare import METRICS, _with_values

FAST = {"replicates": 20, "threads": 1}
IDS = [f"item-{i}" for i in range(600)]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    x, centers, offsets = blobs()
    rng = np.random.default_rng(5)
    models = {
        "good": FixedResidual(centers, offsets),
        "coarse": FixedResidual(centers, offsets * 0),
        "random": FixedResidual(rng.normal(size=(8, 16)) * 3, rng.normal(size=(8, 16))),
        "parallel": FixedParallel(centers, centers * 1.01),
    }
    return compare(models, x, ids=IDS, interactions=logs(600), cutoffs=[20, 50], **FAST)


def test_the_better_model_ranks_first(comparison: Comparison) -> None:
    error = comparison.metric("relative_error")
    assert error.ranks[0] == 1
    assert list(np.argsort(error.values)) == list(np.argsort(error.ranks))
    auc = comparison.metric("weighted_auc")
    assert auc.values[2] is not None
    assert auc.ranks[2] == 4


def test_values_within_the_interval_of_the_difference_share_a_rank() -> None:
    shares = [proportion(round(share * 5000), 5000) for share in (0.867, 0.874, 0.95)]
    row = _with_values(METRICS["id_flips"][0], shares)
    assert row.ranks == (1, 1, 3)
    assert row.intervals[0] == (shares[0].low, shares[0].high)
    many = [proportion(round(share * 500_000), 500_000) for share in (0.867, 0.874)]
    assert _with_values(METRICS["id_flips"][0], many).ranks == (1, 2)
    assert _with_values(METRICS["id_flips"][0], [0.867, None, 0.874]).ranks == (1, None, 2)


def test_paired_draws_find_what_single_intervals_hide() -> None:
    noise = np.random.default_rng(0).normal(1, 0.5, (300, 1))
    a, b = (
        bootstrap(values / 300, lambda totals: totals, replicates=500, seed=3)[0]
        for values in (noise, noise + 0.02)
    )
    assert a.high > b.value  # the intervals overlap
    assert differ(a, b)
    assert not differ(a, a)
    assert not differ(replace(a, draws=None), replace(b, draws=None))


def test_findings_name_no_lead_that_is_noise(comparison: Comparison) -> None:
    x, tok = healthy()
    rng = np.random.default_rng(6)
    near = FixedResidual(*(book + rng.normal(size=book.shape) * 2e-3 for book in tok.books))
    c = compare({"a": tok, "b": near}, x, ids=IDS, interactions=logs(600), **FAST)
    flips = c.metric("id_flips")
    assert flips.values[0] != flips.values[1]
    assert flips.ranks == (1, 1)
    assert any(
        f.startswith("no model leads in symbolic robustness") and "within the interval" in f
        for f in c.findings
    )
    assert any(f.startswith("good") and "lead" in f for f in comparison.findings)


def test_the_interval_of_the_effective_rank_is_that_of_a_bootstrap() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(400, 6)) * [3, 2, 1, 1, 0.5, 0.1]
    estimate = effective_rank(x, name="x", seed=0, replicates=2000)
    drawn = [
        geometry(x[rng.integers(0, 400, 400)], name="x", sample=None).effective_rank
        for _ in range(2000)
    ]
    expected = geometry(x, name="x", sample=None).effective_rank
    assert estimate.value == pytest.approx(expected, rel=1e-12)
    assert estimate.high - estimate.low == pytest.approx(
        np.subtract(*np.quantile(drawn, [0.975, 0.025])), rel=0.1
    )


def test_flips_are_ranked_within_levels(comparison: Comparison) -> None:
    expected = []
    for level in range(2):
        flips, rates = [], []
        for d in comparison.diagnoses.values():
            scale = comparison.agreement.scale
            point = next(p for p in d.flips.innermost.flips.points if p.scale == scale)
            flips.append(point.code[level].value)
            rates.append(d.overlap[level].at(scale).rate)
        expected.append(spearman(flips, rates))
    assert comparison.agreement.rows == len(comparison.diagnoses)
    assert comparison.agreement.overlap == pytest.approx(np.mean(expected))


def test_few_collisions_earn_no_rank(comparison: Comparison) -> None:
    for key in ("collision_rate", "colliding_item_rate", "dead"):
        assert comparison.metric(key).ranks == (None,) * 4


def test_there_is_no_single_score(comparison: Comparison) -> None:
    assert not {"score", "total", "overall"} & set(comparison.to_dict())
    assert {row.view for row in comparison.metrics if row.lead} == {
        "robustness",
        "reconstruction",
        "matching",
        "geometry",
    }


def test_dominance_equals_brute_force(comparison: Comparison) -> None:
    lead = [row.ranks for row in comparison.metrics if row.lead]
    for i, name in enumerate(comparison.names):
        by = {
            other
            for j, other in enumerate(comparison.names)
            if all(r[j] <= r[i] for r in lead) and any(r[j] < r[i] for r in lead)
        }
        assert set(comparison.dominated[name]) == by


def test_equal_models_share_their_ranks() -> None:
    x, tok = healthy()
    c = compare({"a": tok, "b": tok}, x, **FAST)
    for row in c.metrics:
        assert row.values[0] == row.values[1]
        assert row.ranks in ((1, 1), (None, None))
    assert not any(c.dominated.values())


def test_without_interactions_the_view_is_left_out() -> None:
    x, tok = healthy()
    c = compare({"a": tok, "b": FixedResidual(*tok.books[:1])}, x, **FAST)
    assert "matching" not in {row.view for row in c.metrics}
    assert any("bits" in note for note in c.notes)


def test_known_relations_are_compared_kind_by_kind() -> None:
    x, tok = healthy()
    pairs = pa.table(
        {
            "item_id": [f"item-{i}" for i in range(200)] * 2,
            "related_item_id": [f"item-{i + 8}" for i in range(200)]
            + [f"item-{(i * 37 + 5) % 600}" for i in range(200)],
            "relation": ["also_bought"] * 200 + ["noise"] * 200,
        }
    )
    rng = np.random.default_rng(5)
    other = FixedResidual(rng.normal(size=(8, 16)) * 3, rng.normal(size=(8, 16)))
    c = compare({"good": tok, "random": other}, x, ids=IDS, relations=pairs, **FAST)
    for kind in ("also_bought", "noise"):
        row = c.metric(f"weighted_auc_{kind}")
        assert row.values == tuple(
            d.relations[kind].aucs.aucs["weighted"].value for d in c.diagnoses.values()
        )
        assert c.metric(f"discrete_hits_{kind}").view == "matching"
    assert c.metric("weighted_auc_also_bought").ranks == (1, 2)
    assert "weighted AUC of the codes, also bought" in c.to_markdown()


def test_pages_hold_every_model(comparison: Comparison, tmp_path: Path) -> None:
    for suffix in (".html", ".md", ".json"):
        path = comparison.write(tmp_path / f"c{suffix}")
        text = path.read_text(encoding="utf8")
        assert all(name in text for name in comparison.names)
        with pytest.raises(OutputExistsError):
            comparison.write(path)
    document = json.loads((tmp_path / "c.json").read_text(encoding="utf8"))
    assert document["names"] == list(comparison.names)
    again = Comparison.from_dict(document)
    assert again == comparison
    assert again.to_markdown() == comparison.to_markdown()
    page = (tmp_path / "c.html").read_text(encoding="utf8")
    assert "pareto-relative_error-id_flips" in page
    assert len(page.encode()) < 10_000_000


def test_hostile_names_are_escaped() -> None:
    x, tok = healthy()
    page = compare({"<b>a</b>": tok, "b": tok}, x, **FAST).to_html()
    assert "<b>a</b>" not in page


def test_one_model_is_refused() -> None:
    x, tok = healthy()
    with pytest.raises(UsageError, match="at least two"):
        compare({"a": tok}, x)


class TestCommands:
    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        import pyarrow.parquet as pq

        from semid.tokenizers.rqkmeans import RQKMeans

        folder = tmp_path_factory.mktemp("models")
        x, _, _ = blobs()
        np.save(folder / "x.npy", x)
        pq.write_table(titles(600), folder / "items.parquet")
        pq.write_table(logs(600), folder / "logs.parquet")
        for seed in (0, 1):
            model = RQKMeans(levels=2, codebook_size=8, seed=seed, threads=1)
            model.fit(folder / "x.npy", ids=folder / "items.parquet").save(folder / f"m{seed}")
        return folder

    def run(self, folder: Path, command: str, *arguments: str) -> None:
        from semid.cli.app import app

        paths = [str(folder / a) if (folder / a).exists() else a for a in arguments]
        result = CliRunner().invoke(app, [command, *paths], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    def test_report(self, folder: Path, tmp_path: Path) -> None:
        output = str(tmp_path / "r.html")
        common = ("m0", "x.npy", "--ids", "items.parquet", "--interactions", "logs.parquet", "-q")
        self.run(folder, "report", *common, "-o", output)
        page = Path(output).read_text(encoding="utf8")
        assert "Thing 3 of kind" in page
        assert "held out" in page
        with pytest.raises(OutputExistsError):
            self.run(folder, "report", *common, "-o", output)
        self.run(folder, "report", *common, "-o", output, "--overwrite")

    def test_compare(self, folder: Path, tmp_path: Path) -> None:
        output = str(tmp_path / "c.html")
        self.run(
            folder, "compare", "m0", "m1", "x.npy", "--ids", "items.parquet", "-q", "-o", output
        )
        page = Path(output).read_text(encoding="utf8")
        assert "m1" in page
        assert "x.npy" in page
        assert "Thing" in page.split("Fullest buckets")[-1]

    def test_compare_takes_names_of_items(self, folder: Path, tmp_path: Path) -> None:
        import pyarrow.parquet as pq

        names = titles(600).set_column(1, "title", [[f"Name {i}" for i in range(600)]])
        pq.write_table(names, folder / "names.parquet")
        output = tmp_path / "c.md"
        self.run(
            folder, "compare", "m0", "m1", "x.npy", "--ids", "items.parquet", "--items",
            "names.parquet", "--interactions", "logs.parquet", "-q", "-o", str(output),
        )  # fmt: skip
        assert "Name " in output.read_text(encoding="utf8").split("## Fullest buckets")[1]

    def test_compare_needs_two_models(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="at least two"):
            self.run(folder, "compare", "m0", "x.npy", "-o", str(tmp_path / "c.html"))
