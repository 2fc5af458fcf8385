"""Verdicts computed by hand, pages made of rows alone, and what may never be published."""

from __future__ import annotations

import json

import pytest

from semid.cli import main
from semid.errors import InputError, UsageError
from semid.reproduce.claims import Claim, Comparison, Difference, Rows, decide, evaluate, within
from semid.reproduce.drq import DRQ
from semid.reproduce.moc import MOC, paper_auc, paper_gain
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


def drq_rows(**more):
    """RQP-VAE has the largest K_eff, DRQ-VAE+CL the best AUC; three seeds of each."""
    sizes = {"RQ-VAE": 40.0, "RQP-VAE": 200.0, "RQ-KMeans": 90.0, "DRQ-VAE": 100.0}
    sizes["DRQ-VAE+CL"] = 120.0
    return [
        drq_row(name, seed, size=size, auc=0.8 if "CL" in name else 0.7, **more)
        for name, size in sizes.items()
        for seed in range(3)
    ]


def verdicts(found):
    return {j.claim.id: j.verdict for j in found}


def test_the_verdict_by_hand():
    up, down, flat = (Difference(m, m - 0.1, m + 0.1, 3) for m in (0.2, -0.2, 0.0))
    strict = Claim("a", "§1", "A.", "t")
    loose = Claim("b", "§1", "B.", "t", rule="most")

    def of(claim, *differences):
        return decide(claim, [Comparison("x", d) for d in differences]).verdict

    assert of(strict, up, up, None) == "holds"
    assert of(strict, up, up, flat) == "does not show"
    assert of(loose, up, up, flat) == "holds"
    assert of(loose, up, up, down) == "does not show"
    assert of(loose, up, flat) == "does not show"
    assert of(strict, down, down, flat) == "opposite"
    assert of(strict, down, down, up) == "does not show"
    assert of(strict, down, flat) == "does not show"
    assert of(strict, None, None) == "not run"
    # One seed has no interval, so it shows nothing.
    nan = float("nan")
    assert of(strict, Difference(0.5, nan, nan, 1)) == "does not show"
    judged = decide(strict, [Comparison("x", d) for d in (up, down, flat, None)])
    assert judged.counts == {"favor": 1, "against": 1, "open": 1, "not run": 1}
    assert judged.lines == [
        "x: +0.2000 [+0.1000, +0.3000]",
        "x: -0.2000 [-0.3000, -0.1000]",
        "x: +0.0000 [-0.1000, +0.1000]",
        "x: not run",
    ]
    gone = decide(strict, [Comparison(name, None) for name in ("y", "z")])
    assert gone.lines == ["not run: 2 comparisons, the first of y"]


def test_being_within_a_margin():
    assert within(Difference(0.01, -0.02, 0.04, 3), 0.05).low > 0
    assert within(Difference(0.2, 0.1, 0.3, 3), 0.05).high < 0
    crossing = within(Difference(0.05, 0.02, 0.08, 3), 0.05)
    assert crossing.low < 0 < crossing.high
    assert within(None, 0.05) is None


def test_claims_of_drq_by_hand():
    found = verdicts(evaluate(DRQ.claims, Rows(drq_rows())))
    assert found["overlap-rqp"] == "holds"
    assert found["usage-rqp"] == "does not show"  # perplexity leads, the Ginis are equal
    assert found["geometry-cl-best"] == "does not show"  # RQP-VAE is above
    assert found["overlap-drq"] == "holds"
    assert found["usage-drq"] == "holds"
    assert found["overlap-means-confusion"] == "opposite"
    assert found["auc-cl"] == "holds"
    assert found["error-codes"] == "does not show"  # beaten by one, level with three
    assert found["retention-codes"] == "opposite"  # 0.9 is not within 0.01 of 1
    assert found["no-winner"] == "holds"
    assert set(verdicts(evaluate(DRQ.claims, Rows([]))).values()) == {"not run"}
    # What was chosen otherwise decides nothing.
    assert set(
        verdicts(evaluate(DRQ.claims, Rows([drq_row("RQ-VAE", 0, variant="latent 32")]))).values()
    ) == {"not run"}


def moc_row(method, scale, fusion, seed, auc, *, data="toys", model="dcnv2", **more):
    return {
        **ORIGIN,
        "key": f"{data}{model}{method}{scale}{fusion}{seed}{more}",
        "settings": "s",
        "paper": "moc",
        "quick": False,
        "data": data,
        "variant": "",
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


def moc_rows():
    """Fusion lifts everything by .002; without it MoC is level with RQ-VAE, ME falls."""
    base = {("none", 0): 0.70, ("vqvae", 1): 0.71, ("me", 7): 0.705}
    base |= {("rqvae", 7): 0.72, ("moc", 7): 0.72, ("random", 7): 0.70}
    return [
        moc_row(method, scale, fusion, seed, auc + 0.002 * fusion)
        for (method, scale), auc in base.items()
        for fusion in (False, True)
        for seed in range(5)
    ]


def test_claims_of_moc_by_hand():
    rows = moc_rows()
    # Level, and not by construction: the sign of the gap changes from seed to seed.
    for row in rows:
        if row["method"] == "moc":
            row["auc"] += 1e-5 if row["seed"] % 2 else -1e-5
    found = verdicts(evaluate(MOC.claims, Rows(rows)))
    assert found["moc-printed"] == "holds"  # +.002 of fusion on one side alone
    assert found["moc-rqvae"] == "does not show"
    assert found["moc-me"] == "holds"
    assert found["scaling-me"] == "holds"
    assert found["scaling-moc"] == "holds"
    assert found["control-random"] == "holds"
    assert found["control-shuffled"] == "not run"
    assert found["fusion-moc"] == found["fusion-rqvae"] == "holds"
    assert found["nmi-moc"] == found["level-order"] == found["information"] == "not run"
    assert set(verdicts(evaluate(MOC.claims, Rows([]))).values()) == {"not run"}


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


def test_a_page_has_every_claim_with_its_verdict_and_what_was_not_run():
    page = make_page("drq", drq_rows(), missing=["union, RQ-VAE, seed 0", "union, RQ-VAE, seed 1"])
    text = page.to_markdown()
    for judged in evaluate(DRQ.claims, Rows(drq_rows())):
        assert f"**{judged.verdict}** ({judged.claim.where})" in text
    assert "| DRQ-VAE+CL | 3 | 0.8000" in text
    assert "paper: RQ-VAE" in text
    assert "union, RQ-VAE, seeds 0, 1" in text
    assert "Commit c0ffee (15 runs)" in text
    # Contrastive learning leads alone in soft matching;
    # equal collision rates leave all level.
    assert "| beauty: soft matching: weighted AUC | DRQ-VAE+CL (0.8010) | nobody | none |" in text
    assert "| beauty: capacity: K\\_eff of the first level | RQP-VAE (200.1) | nobody |" in text
    assert "| RQ-VAE (0.1000) | RQP-VAE, RQ-KMeans, DRQ-VAE, DRQ-VAE+CL | none |" in text
    html = page.to_html()
    for judged in page.results:
        assert f'id="claim-{judged.claim.id}"' in html
    moc = make_page("moc", moc_rows()).to_markdown()
    assert "(no difference seen)" in moc or "+0.0000" in moc
    assert "0.7474" in moc  # the paper's DCNv2, MoC with fusion, 7x on Toys
    assert "Nothing has run yet" in make_page("moc", []).to_markdown()


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


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


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
    text = (tmp_path / "docs" / "drq.md").read_text()
    assert "Not to be quoted" not in text
    assert "union, DRQ-VAE, seeds 0, 1, 2" in text  # what the recipe has and the rows have not
    assert run(*shown, tmp_path / "toy", "--publish", "-o", tmp_path / "docs") == 1
    assert run(*shown, tmp_path / "nowhere") == 2
    assert run("reproduce", "drq", "--publish") == 2
    assert run("reproduce", "dqr") == 2
    assert "did you mean 'drq'" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"holds no moc/runs\.jsonl"):
        page_from("moc", tmp_path / "real", tmp_path)
    with pytest.raises(InputError, match="among those of"):
        make_page("moc", drq_rows())
