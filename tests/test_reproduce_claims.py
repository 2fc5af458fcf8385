"""Verdicts computed by hand, pages made of rows alone, and what may never be published."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cli_cases import run
from semid.errors import InputError, UsageError
from semid.reproduce.claims import Claim, Comparison, Rows, decide, evaluate, metric, pool
from semid.reproduce.drq import DRQ, within_level_agreement
from semid.reproduce.intervals import Difference, mean_difference, within
from semid.reproduce.ledger import read_runs
from semid.reproduce.moc import MOC, MODELS, REGULARIZED, paper_auc, paper_gain
from semid.reproduce.page import current, make_page
from semid.reproduce.study import page_from

ORIGIN = {
    "commit": "c0ffee",
    "dirty": False,
    "versions": {"semid": "0.1.0"},
    "machine": {"chip": "a chip", "cpus": 2},
    "threads": 1,
}
SCALES = [0.05, 0.1, 0.2]
ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "results", ROOT / "docs" / "results"


def drq_row(tokenizer, seed, *, data="beauty", quick=False, variant="", size=100.0, auc=0.7):
    """A row whose figures follow from ``size``, ``auc`` and the seed."""
    noise = 0.1 * seed
    spaces = ("input", "latent", "decoder(codes)")
    measures = {
        "participation_ratio": size + noise,
        "effective_rank": size + noise,
        "top_share": 1 / (size + noise),
        "mean_abs_cosine": 0.1,
        "mean_abs_cosine_centered": 0.1,
        "dim": 256,
    }
    cutoffs = {"20": 0.9, "50": 0.9, "100": auc, "200": auc}
    error = {"mse": 0.1, "relative_error": 1 - auc + 0.001 * seed, "cosine": 0.9}
    return {
        **ORIGIN,
        "key": f"{data}{tokenizer}{variant}{seed}{quick}",
        "settings": "s",
        "paper": "drq",
        "quick": quick,
        "data": data,
        "tokenizer": tokenizer,
        "variant": variant,
        "seed": seed,
        "protocol": "levels=3 codebook_size=256",
        "seconds": 10.0,
        "geometry": {name: dict(measures) for name in spaces},
        "overlap": [
            {
                "scale": SCALES,
                "rate": [1 / (size + noise)] * 3,
                "collision_probability": 1 / (size + noise),
                "effective_size": [size + noise] * 3,
                "geometry_scale": 0.2,
            }
        ]
        * 3,
        # The steadiest tokenizer here has the largest R: the opposite of what eq. 1 is for.
        "flips": {
            "latent_is_input": False,
            "latent": {
                "scale": SCALES,
                "code": [[size / 1000 + level / 1e6 for level in range(3)]] * 3,
                "id": [size / 1000] * 3,
            },
        },
        "usage": [{"perplexity": size + noise, "active": 256, "dead": 0, "gini": 0.2}] * 3,
        "collisions": {"collision_rate": 0.1, "unique_ids": 90, "largest_bucket": 3},
        "decoder(codes)": error,
        "decoder(z)": error,
        "behavior": {
            "cutoffs": [20, 50, 100, 200],
            "retention": {"decoder(codes)": cutoffs, "decoder(z)": cutoffs},
            "aucs": {
                "weighted": auc + 0.001 * seed,
                "embedding: decoder(codes)": auc,
                "exact_prefix": auc,
            },
        },
    }


def drq_rows(shift=0.0, **more):
    """RQP-VAE has the largest K_eff, DRQ-VAE+CL the best AUC; three seeds of each."""
    sizes = {"RQ-VAE": 40.0, "RQP-VAE": 200.0, "RQ-KMeans": 90.0, "DRQ-VAE": 100.0}
    sizes["DRQ-VAE+CL"] = 120.0
    return [
        # A shift of the sizes makes another data set that differs a little.
        drq_row(
            name,
            seed,
            size=size * (1 + shift),
            auc=0.8 + shift / 50 if "CL" in name else 0.7,
            **more,
        )
        for name, size in sizes.items()
        for seed in range(3)
    ]


def many_rows():
    """Four data sets that differ a little."""
    names = ("beauty", "toys", "sports", "anime")
    return [row for n, data in enumerate(names) for row in drq_rows(data=data, shift=n / 50)]


def verdicts(found):
    return {j.claim.id: j.verdict for j in found}


CLAIM = Claim("a", "§1", "A.", "t")


def statement(*means, missing=0, seeds=3, **options):
    """One value a data set; ``None`` was not run."""
    values = {
        f"d{n}": {} if mean is None else dict.fromkeys(range(seeds), mean)
        for n, mean in enumerate(means)
    }
    comparisons = [
        Comparison(name, mean_difference(list(v.values())) if v else None, missing)
        for name, v in values.items()
    ]
    return pool("s", values, comparisons, **options)


def test_the_verdict_by_hand():
    up, down, flat = (statement(m + 0.1, m - 0.1, m, m + 0.05, digits=2) for m in (0.5, -0.5, 0.0))

    def of(*statements):
        return decide(CLAIM, statements).verdict

    assert of(up) == of(up, up, up) == "holds"
    assert of(up, flat) == of(flat) == "does not show"
    assert of(down) == of(up, down) == of(down, down, flat) == "contradicted"
    # Nothing is judged before all that the words cover has run.
    assert of(statement(0.6, 0.4, 0.5, None)) == "incomplete"
    assert of(up, statement(None, None)) == "incomplete"
    assert of(up, statement(0.6, 0.4, 0.5, missing=1)) == "incomplete"
    assert of(statement(None, None), statement(None)) == of() == "not run"
    # Over several data sets the interval is Student's over their means, computed by scipy here.
    from scipy import stats

    test = stats.ttest_1samp([0.6, 0.4, 0.5, 0.55], 0).confidence_interval()
    estimate = up.estimate()
    assert (estimate.low, estimate.high) == pytest.approx((test.low, test.high))
    test = stats.ttest_1samp([0.6, 0.4, 0.5, 0.55], 0).confidence_interval(1 - 0.05 / 3)
    assert up.estimate(3).low == pytest.approx(test.low)
    # Over one data set it is Student's over seeds; one seed has no interval and shows nothing.
    single = pool("s", {"d": {0: 0.5, 1: 0.6, 2: 0.55}}, [Comparison("d", Difference(0, 0, 0, 3))])
    test = stats.ttest_1samp([0.5, 0.6, 0.55], 0).confidence_interval()
    assert (single.estimate().low, single.estimate().high) == pytest.approx((test.low, test.high))
    assert of(statement(0.5, seeds=1)) == "does not show"
    assert decide(CLAIM, [up]).evidence == "+0.51 [+0.38, +0.65]"
    assert decide(CLAIM, [up, down, flat]).evidence == "1 above 0, 1 below, of 3"
    assert str(statement(None)) == "s: not run"


def test_a_margin_is_kept_at_every_level():
    close = statement(0.01, -0.01, 0.0, 0.02, margin=0.1)
    assert decide(CLAIM, [close]).verdict == "holds"
    far = statement(0.51, 0.49, 0.5, 0.52, margin=0.1)
    assert decide(CLAIM, [far, close]).verdict == "contradicted"
    assert far.estimate(5).high > far.estimate().high


def test_being_within_a_margin():
    assert within(Difference(0.01, -0.02, 0.04, 3), 0.05).low > 0
    assert within(Difference(0.2, 0.1, 0.3, 3), 0.05).high < 0
    crossing = within(Difference(0.05, 0.02, 0.08, 3), 0.05)
    assert crossing.low < 0 < crossing.high
    assert within(None, 0.05) is None


def rates(true_effects, *, draws=1500, sets=4, models=4, seeds=3):
    """Simulate verdicts on claims: effects by statement, noise of data sets, models and seeds."""
    generator = np.random.default_rng(7)
    counts = Counter()
    for _ in range(draws):
        statements = []
        for effect in true_effects:
            # Data sets differ in noise by a factor of 10, models share a data set's part.
            scale = generator.uniform(0.1, 1.0, sets)
            values = effect + generator.normal(size=sets) * scale
            runs = values[:, None, None] + generator.normal(size=(sets, models, seeds))
            means = runs.mean(1)
            by_data = {str(d): dict(enumerate(means[d].tolist())) for d in range(sets)}
            statements.append(pool("s", by_data, []))
        counts[decide(CLAIM, statements).verdict] += 1
    return {verdict: count / draws for verdict, count in counts.items()}


@pytest.mark.parametrize("count", [1, 4, 16])
def test_the_error_rate_does_not_depend_on_the_number_of_comparisons(count):
    # A false claim: one of its statements has no effect, the others a very large one.
    false = rates([0.0] + [20.0] * (count - 1))
    assert false.get("holds", 0.0) < 0.025 + 0.01
    # A claim that is just true everywhere is said to be contradicted as rarely.
    assert rates([0.0] * count).get("contradicted", 0.0) < 0.025 + 0.01
    # More models sharpen the estimate and never make a verdict impossible.
    assert rates([6.0], models=count)["holds"] > 0.9


def test_claims_of_drq_by_hand():
    rows = Rows(many_rows())
    found = verdicts(evaluate(DRQ.claims, rows))
    assert found["overlap-rqp"] == "holds"
    assert found["usage-rqp"] == "does not show"  # perplexity leads, the Ginis are equal
    assert found["geometry-cl-best"] == "contradicted"  # RQP-VAE is above
    assert found["overlap-drq"] == "holds"
    assert found["usage-drq"] == "holds"
    assert found["overlap-means-confusion"] == "contradicted"
    assert found["auc-cl"] == "holds"
    assert found["error-codes"] == "contradicted"  # beaten by one, level with three
    assert found["retention-codes"] == "contradicted"  # 0.9 is not within 0.01 of 1
    assert found["no-winner"] == "holds"
    assert set(verdicts(evaluate(DRQ.claims, Rows([]))).values()) == {"not run"}
    # What was chosen otherwise decides nothing.
    assert set(
        verdicts(evaluate(DRQ.claims, Rows([drq_row("RQ-VAE", 0, variant="latent 32")]))).values()
    ) == {"not run"}


def test_r_is_judged_within_levels():
    # Among tokenizers more overlap means fewer flips; both rise with the level.
    rows = drq_rows()
    for row in rows:
        size = row["overlap"][0]["effective_size"][0]
        row["overlap"] = [
            {**one, "rate": [10.0**level / size] * 3} for level, one in enumerate(row["overlap"])
        ]
        row["flips"]["latent"]["code"] = [[10.0**level + size / 1e3 for level in range(3)]] * 3
    levels, pooled = within_level_agreement(Rows(rows), "beauty", 0)
    assert levels == pytest.approx([-1, -1, -1])
    assert pooled > 0.5
    (claim,) = (
        j for j in evaluate(DRQ.claims, Rows(rows)) if j.claim.id == "overlap-means-confusion"
    )
    assert claim.statements[0].estimate().mean == pytest.approx(-1)
    (line,) = DRQ.code["agreement"](Rows(rows))
    assert line[1:4] == ["-1.00"] * 3
    assert float(line[4]) > 0.5


def test_a_claim_waits_for_every_run_that_its_words_cover():
    rows = many_rows()
    lacks = {"data": "union", "variant": ""}
    missing = [{**lacks, "tokenizer": name, "seed": 0} for name in ("DRQ-VAE", "RQ-KMeans")]
    found = verdicts(evaluate(DRQ.claims, Rows(rows, missing)))
    assert found["overlap-drq"] == found["overlap-means-confusion"] == "incomplete"
    # Other runs of that data set are not even planned, and still its words cover them.
    assert found["geometry-rqvae"] == "incomplete"
    # RQ-VAE returns no collapsed epoch: what is said of its collapse needs the plain one.
    assert found["usage-rqvae"] == found["overlap-rqvae"] == "not run"
    # A seed that is left makes its comparison incomplete, and leaves the others alone.
    late = [{"data": "toys", "variant": "", "tokenizer": "RQ-VAE", "seed": 3}]
    found = verdicts(evaluate(DRQ.claims, Rows(rows, late)))
    assert found["overlap-drq"] == "holds"
    assert found["auc-cl"] == "incomplete"
    other = [{"data": "toys", "variant": "latent 32", "tokenizer": "RQ-VAE", "seed": 3}]
    assert verdicts(evaluate(DRQ.claims, Rows(rows, other)))["auc-cl"] == "holds"


def moc_row(method, scale, fusion, seed, auc, *, data="toys", model="dcnv2", **more):
    return {
        **ORIGIN,
        "key": f"{data}{model}{method}{scale}{fusion}{seed}{more}",
        "settings": "s",
        "paper": "moc",
        "quick": False,
        "data": data,
        "variant": REGULARIZED,
        "run": "rank",
        "model": model,
        "method": method,
        "scale": scale,
        "fusion": fusion,
        "seed": seed,
        "auc": auc + 0.0001 * seed,
        "popularity_auc": 0.6,
        "protocol": "label=sampled(uniform,1)",
        "seconds": 20.0,
        **more,
    }


def moc_rows(models=MODELS):
    """Fusion lifts everything by .002; without it MoC is level with RQ-VAE, ME falls."""
    base = {("none", 0): 0.70, ("vqvae", 1): 0.71, ("me", 7): 0.705}
    base |= {("rqvae", 7): 0.72, ("moc", 7): 0.72, ("random", 7): 0.70}
    return [
        moc_row(
            # Every seed has a little noise of its own, alike for no two cells.
            *(method, scale, fusion, seed),
            auc + 0.002 * fusion + 1e-5 * ((seed * 7 + len(method) * 3) % 5),
            model=model,
        )
        for model in models
        for (method, scale), auc in base.items()
        for fusion in (False, True)
        for seed in range(5)
    ]


def test_claims_of_moc_by_hand():
    rows = moc_rows()
    # Level, and not by construction: the sign of the gap changes from seed to seed.
    for row in rows:
        if row["method"] == "moc":
            row["auc"] += 1e-4 if row["seed"] % 2 else -1e-4
    found = verdicts(evaluate(MOC.claims, Rows(rows)))
    # +.002 of fusion on one side alone beats RQ-VAE on each model; on equal terms nothing does.
    assert found["moc-printed"] == found["moc-toys"] == "holds"
    assert found["moc-rqvae"] == "does not show"
    assert found["moc-me"] == "holds"
    assert found["scaling-me"] == "holds"
    assert found["scaling-moc"] == "holds"
    assert found["control-random"] == "holds"
    assert found["control-shuffled"] == "not run"
    assert found["fusion-moc"] == found["fusion-rqvae"] == "holds"
    assert found["nmi-moc"] == found["level-order"] == found["information"] == "not run"
    assert set(verdicts(evaluate(MOC.claims, Rows([]))).values()) == {"not run"}
    # Rankers without a penalty of embeddings decide nothing of this.
    overfitted = [{**row, "variant": ""} for row in rows]
    assert verdicts(evaluate(MOC.claims, Rows(overfitted)))["moc-me"] == "not run"
    # "All four models" with two of them run.
    two = [row for row in rows if row["model"] in MODELS[:2]]
    found = verdicts(evaluate(MOC.claims, Rows(two)))
    assert found["moc-toys"] == found["moc-me"] == found["moc-printed"] == "incomplete"


def test_the_paper_against_itself():
    assert paper_auc("dcnv2", "moc", 7, "sports") == 0.6989
    assert paper_auc("autoint", "vqvae", 1, "beauty") == 0.6630
    assert paper_auc("dcnv2", "moc", 5, "sports") is None
    table = MOC.file["table-1"]
    assert [len(cells) for cells in table.values()] == [1 + 3 * 3] * 4
    assert {len(values) for cells in table.values() for values in cells.values()} == {3}
    above, cells, mean = paper_gain("rqvae")
    assert (above, cells) == (26, 36)
    assert mean == pytest.approx(0.000425)


def test_a_metric_in_bits():
    assert metric("log2 usage.-1.perplexity")({"usage": [{"perplexity": 8}]}) == 3.0
    assert metric("log2 usage.0.perplexity")({"usage": [{"perplexity": 0}]}) is None
    assert metric("log2 usage.0.perplexity")({"usage": []}) is None


def test_a_page_has_every_claim_with_its_verdict_and_what_was_not_run():
    cells = [
        {"data": data, "variant": "", "tokenizer": "RQ-VAE", "seed": seed}
        for data in ("toys", "union")
        for seed in (0, 1)
    ]
    page = make_page(
        "drq",
        drq_rows(),
        cells=cells,
        title=lambda c: f"{c['data']}, {c['tokenizer']}, seed {c['seed']}",
    )
    text, tables = page.to_markdown(), page.tables_markdown()
    document = json.loads(page.to_json())
    assert len(document["claims"]) == len(page.results) == len(page.claim_rows)
    for judged, listed in zip(page.results, document["claims"], strict=True):
        assert f"| {judged.claim.where} | {judged.verdict} |" in text
        assert listed["verdict"] == judged.verdict
        assert [len(one["comparisons"]) for one in listed["statements"]] == [
            len(one.comparisons) for one in judged.statements
        ]
    # Every interval is in the document, none of the long lists on the page.
    auc = next(one for one in document["claims"] if one["id"] == "auc-cl")
    first = auc["statements"][0]["comparisons"][0]
    assert first["name"] == "beauty: embedding AUC, DRQ-VAE+CL - RQ-VAE"
    assert first["mean"] == pytest.approx(0.1)
    assert "embedding AUC, DRQ-VAE+CL - RQ-VAE" not in text
    assert "0.0 hours on 1 threads of a chip" in text
    assert "| DRQ-VAE+CL | 3 | 0.8000" in tables
    assert "paper: RQ-VAE" in tables
    assert "RQ-VAE, seeds 0, 1: toys, union" in tables
    assert "Commit c0ffee (15 runs)" in tables
    # Equal collision rates leave all level; one data set has no interval over data sets.
    lines = {line[0]: line[1:] for figure in page.summary for line in figure.rows}
    two = make_page("drq", many_rows()).summary[0].rows
    lines = {line[0]: line[1:] for line in two}
    assert lines["soft matching: weighted AUC"][::2] == ["DRQ-VAE+CL", "nobody"]
    assert lines["capacity: K_eff of the first level"] == [
        "RQP-VAE",
        "200, 204, 208, 212",
        "nobody",
    ]
    assert lines["unique ids: fewest collisions"][0] == "RQ-VAE"
    assert lines["unique ids: fewest collisions"][2] == "RQP-VAE, RQ-KMeans, DRQ-VAE, DRQ-VAE+CL"
    html = page.to_html()
    for judged in page.results:
        assert f'id="claim-{judged.claim.id}"' in html
    moc = make_page("moc", moc_rows()).tables_markdown()
    assert "(no difference seen)" in moc or "+0.0000" in moc
    assert "0.7474" in moc  # the paper's DCNv2, MoC with fusion, 7x on Toys
    assert "Nothing has run yet" in make_page("moc", []).tables_markdown()


@pytest.mark.parametrize("paper", sorted(p.parent.name for p in RESULTS.glob("*/runs.jsonl")))
def test_the_committed_pages_are_those_of_the_committed_runs(paper, tmp_path):
    # Every number on them is the ledger's: ``make results`` writes them again.
    for path in page_from(paper, RESULTS, tmp_path, publish=True):
        if path.suffix != ".html":
            assert path.read_text() == (DOCS / path.name).read_text(), "run 'make results'"


@pytest.mark.parametrize("page", ["index.md", "corrections.md"])
def test_prose_on_results_has_no_figures_of_its_own(page):
    # Links to the pages instead: what is written by hand is not made again with them.
    assert not re.search(r"[-+\s(]\.\d|\d\.\d|\d %", (DOCS / page).read_text())


def test_the_tables_on_barq_are_those_of_its_ledger():
    path = ROOT / "benchmarks" / "views.py"
    spec = importlib.util.spec_from_file_location("views", path)
    views = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(views)
    rows = read_runs(ROOT / "benchmarks" / "results" / "views" / "drq" / "runs.jsonl")
    rows += views.wide_runs()
    page = (ROOT / "docs" / "barq.md").read_text()
    assert "\n".join(views.front(rows)) in page
    assert "\n".join(views.counts(rows)) in page
    # No figure of a tokenizer counts in two views.
    for row in rows:
        figures = [value for view in views.VIEWS if (value := view.read(row)) is not None]
        assert len(set(figures)) == len(figures)


def test_rows_of_earlier_settings_do_not_mix():
    old = [{**row, "settings": "old", "key": row["key"] + "old"} for row in drq_rows()]
    kept, dropped = current([*old, *drq_rows()])
    assert len(kept) == dropped == 15
    assert {row["settings"] for row in kept} == {"s"}
    twice = [*drq_rows(), {**drq_rows()[0], "key": "again", "seconds": 99.0}]
    kept, dropped = current(twice)
    assert (len(kept), dropped) == (15, 1)
    assert 99.0 in {row["seconds"] for row in kept}


def write(folder, rows):
    place = folder / rows[0]["paper"]
    place.mkdir(parents=True)
    (place / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_toys_never_reach_the_documentation(tmp_path, capsys):
    quick = drq_rows(quick=True)
    write(tmp_path / "toy", quick)
    with pytest.raises(InputError, match="15 of 15 rows come from --quick"):
        page_from("drq", tmp_path / "toy", tmp_path / "docs", publish=True)
    assert not (tmp_path / "docs").exists()
    with pytest.raises(InputError, match="mixed with"):
        make_page("drq", [*quick, *drq_rows()])
    assert "Not to be quoted" in make_page("drq", quick).to_markdown()
    write(tmp_path / "real", drq_rows())
    shown = ["reproduce", "drq", "--from"]
    assert run(*shown, tmp_path / "real", "--publish", "-o", tmp_path / "docs") == 0
    text = (tmp_path / "docs" / "drq-tables.md").read_text()
    assert "Not to be quoted" not in text
    # What the recipe has and the rows have not.
    assert "DRQ-VAE, seeds 0, 1, 2: toys, sports, union" in text
    assert run(*shown, tmp_path / "toy", "--publish", "-o", tmp_path / "docs") == 1
    assert run(*shown, tmp_path / "nowhere") == 2
    assert run("reproduce", "drq", "--publish") == 2
    assert run("reproduce", "dqr") == 2
    assert "did you mean 'drq'" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"holds no moc/runs\.jsonl"):
        page_from("moc", tmp_path / "real", tmp_path)
    with pytest.raises(InputError, match="among those of"):
        make_page("moc", drq_rows())
