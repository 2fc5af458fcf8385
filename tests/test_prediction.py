"""How well numbers rank tokenizers: statistics against brute force, and planted answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import semid
from semid.health import EVIDENCE_FILE, read_evidence
from semid.reproduce.claims import Rows
from semid.reproduce.page import make_page, write_page
from semid.reproduce.predict import (
    ALL_NUMBERS,
    OUTCOMES,
    evidence,
    make_panels,
    trials,
    write_evidence,
)
from semid.reproduce.prediction import (
    MIN_TOKENIZERS,
    Panel,
    bootstrap_correlations,
    mean_correlation,
    partial_correlation,
    rank_correlation,
    rank_correlations,
    ranked_pairs,
    share_right,
    try_left_out,
)


def rank(values: list[float]) -> list[float]:
    """Mean rank of ties, by counting."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def pearson(a, b) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    cross = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    squares = [sum((x - m) ** 2 for x in each) for each, m in ((a, mean_a), (b, mean_b))]
    return cross / (squares[0] * squares[1]) ** 0.5


@pytest.fixture
def columns():
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=(14, 6)), 1)  # with ties
    x[2, 1] = x[5, 1] = np.nan
    x[:, 4] = 1.0  # constant
    x[MIN_TOKENIZERS - 1 :, 5] = np.nan  # too few
    return x, np.round(rng.normal(size=14), 1)


def test_rank_correlations_are_those_by_counting(columns):
    x, y = columns
    together = rank_correlations(x, y)
    for column in range(x.shape[1]):
        known = [row for row in range(14) if not np.isnan(x[row, column])]
        alone = rank_correlation(x[:, column], y)
        if column in (4, 5):
            assert alone is None
            assert np.isnan(together[column])
            continue
        expected = pearson(*(rank([each[r] for r in known]) for each in (x[:, column], y)))
        assert alone == pytest.approx(expected)
        assert together[column] == pytest.approx(expected)


def test_partial_correlation_is_that_of_the_textbook(columns):
    x, y = columns
    first, second = x[:, 0], x[:, 2]
    r = {
        (a, b): pearson(rank(list(one)), rank(list(other)))
        for (a, one), (b, other) in itertools.permutations(
            [("x", first), ("y", y), ("z", second)], 2
        )
    }
    expected = (r["x", "y"] - r["x", "z"] * r["y", "z"]) / (
        (1 - r["x", "z"] ** 2) * (1 - r["y", "z"] ** 2)
    ) ** 0.5
    assert partial_correlation(first, y, [second]) == pytest.approx(expected)
    # What the given number decides is gone, and nothing is left of a number given itself.
    assert partial_correlation(first, y, [first]) is None
    few = slice(MIN_TOKENIZERS)
    assert partial_correlation(first[few], y[few], [second[few]]) is None
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=400)
    a, b = (hidden + 0.3 * rng.normal(size=400) for _ in range(2))
    assert rank_correlation(a, b) > 0.8
    assert abs(partial_correlation(a, b, [hidden])) < 0.15


def panel(quality, rng, *, noise=0.1, names=None):
    count = len(quality)
    return Panel(
        names or tuple(f"t{n}" for n in range(count)),
        {
            "good": quality + noise * rng.normal(size=count),
            "lower is better": -quality + 2 * noise * rng.normal(size=count),
            "nothing": rng.normal(size=count),
        },
        0.02 + 0.004 * quality,
    )


def test_pairs_are_ranked_by_their_scores():
    score, outcome = np.array([1.0, 2.0, 2.0, np.nan]), np.array([0.1, 0.4, 0.2, 0.3])
    pairs = sorted(ranked_pairs(score, outcome))
    assert pairs == [
        (pytest.approx(0.5), 0.5),  # equal scores
        (pytest.approx(0.5), 1.0),
        (pytest.approx(0.75), 1.0),
    ]
    assert [right for _, right in ranked_pairs(-score, outcome)] == [0.0, 0.0, 0.5]
    assert not list(ranked_pairs(score[:1], outcome[:1]))


def test_the_left_out_data_set_decides_nothing_about_the_choice():
    rng = np.random.default_rng(2)
    panels = {name: panel(rng.normal(size=16), rng) for name in ("a", "b", "c")}
    candidates = [("good",), ("lower is better",), ("nothing",)]
    found = try_left_out(panels, candidates)
    assert [trial.data for trial in found] == ["a", "b", "c"]
    assert all(trial.signs == {"good": 1.0} for trial in found)
    assert share_right(found) > 0.9
    # Pairs that are far apart are easier than those that are close.
    assert share_right(found, 0.2) >= share_right(found, 0.0, 0.05)
    assert share_right(found, 5.0) is None
    # Where the left-out set contradicts the others, the choice stays and fails.
    turned = {**panels, "c": Panel(panels["c"].names, panels["c"].numbers, -panels["c"].outcome)}
    trial = try_left_out(turned, candidates)[-1]
    assert trial.signs == {"good": 1.0}
    assert trial.correlation < -0.8
    assert share_right([trial]) < 0.1
    # Two numbers together, each with its own sign.
    both = try_left_out(panels, [("good", "lower is better"), ("good", "nothing")])
    assert both[0].signs == {"good": 1.0, "lower is better": -1.0}
    assert try_left_out({"a": panels["a"]}, candidates) == []


def test_intervals_hold_the_truth_and_widen_with_few_tokenizers_and_users():
    rng = np.random.default_rng(3)
    many = {name: panel(rng.normal(size=40), rng, noise=0.7) for name in ("a", "b")}
    few = {
        name: Panel(each.names[:8], {k: v[:8] for k, v in each.numbers.items()}, each.outcome[:8])
        for name, each in many.items()
    }
    wide, narrow = (
        bootstrap_correlations(panels, ["good", "nothing"], draws=300, seed=0)
        for panels in (few, many)
    )
    assert narrow["good"][0] < mean_correlation(many, "good") < narrow["good"][1]
    assert narrow["good"][0] > 0.4
    assert narrow["nothing"][0] < 0 < narrow["nothing"][1]
    assert wide["good"][1] - wide["good"][0] > narrow["good"][1] - narrow["good"][0]
    # Few noisy groups of users add to the interval.
    users = np.full(8, 5.0)
    noisy = {
        name: Panel(
            each.names,
            each.numbers,
            each.outcome,
            (each.outcome[:, None] + 0.01 * rng.normal(size=(40, 8))) * users,
            users,
        )
        for name, each in many.items()
    }
    of_users = bootstrap_correlations(noisy, ["good"], draws=300, seed=0)["good"]
    assert of_users[1] - of_users[0] > narrow["good"][1] - narrow["good"][0]
    again = bootstrap_correlations(many, ["good", "nothing"], draws=300, seed=0)
    assert again == narrow


def ledger(sets=("a", "b", "c"), tokenizers=14, seeds=2):
    """Rows in which retention decides the outcome, and a control that is worst in everything."""
    rng, rows = np.random.default_rng(4), []
    for data in sets:
        for number in range(tokenizers + 1):
            control = number == tokenizers
            quality = -3.0 if control else rng.normal()
            for seed in range(seeds):
                numbers = {name: rng.normal() for name in ALL_NUMBERS}
                numbers |= {"retention": quality, "bits per id": 24.0 if number < 8 else 16.0}
                outcome = 0.02 + 0.004 * (quality + 0.2 * rng.normal())
                shared = {
                    "paper": "predict",
                    "quick": False,
                    "settings": data,
                    "data": data,
                    "tokenizer": f"t{number}",
                    "control": "random" if control else "",
                    "seed": seed,
                    "numbers": numbers,
                    "threads": 1,
                    "seconds": 1.0,
                }
                users = [10] * 64
                sums = [10 * outcome] * 64
                rows.append(
                    {
                        **shared,
                        "key": f"{data}{number}{seed}c",
                        "model": "composed",
                        "metrics": {"ndcg_10": outcome, "recall_10": 2 * outcome},
                        "user_groups": {"users": users, "ndcg_10": sums},
                    }
                )
                rows.append(
                    {
                        **shared,
                        "key": f"{data}{number}{seed}d",
                        "model": "dcnv2",
                        "metrics": {"auc": 0.7 + outcome},
                    }
                )
    return rows


def test_the_page_finds_the_number_that_decides(tmp_path):
    rows = ledger()
    page = make_page("predict", rows)
    verdicts = {one.claim.id: one.verdict for one in page.results}
    assert verdicts["overlap"] == "does not show"
    table = next(f for _, _, _, figures in page.sections for f in figures if f.id == "next-item")
    assert table.rows[0][0] == "retention"
    assert table.rows[0][1] == "3 x 14"  # the control is left out
    strongest = [float(row[2]) for row in table.rows]
    assert strongest[0] > 0.85
    assert max(map(abs, strongest[1:])) < 0.6
    assert float(table.rows[0][4]) > 0.8  # given bits
    assert page.picture.count("<circle") == 15
    assert "decides nothing" not in page.picture
    written = write_page(page, tmp_path, "predict")
    assert tmp_path / "predict.svg" in written
    assert not list(tmp_path.glob(".predict*"))  # each file carries its own mark
    assert "](predict.svg)" in (tmp_path / "predict.md").read_text(encoding="utf8")
    found = trials(Rows(rows), "next item")["best number"]
    assert [list(trial.signs) for trial in found] == [["retention"]] * 3
    known = evidence(Rows(rows))["next item"]
    assert known["enough"]
    assert known["numbers"]["retention"]["pairs_right"] > 0.85
    assert known["numbers"]["retention"]["low"] > 0.5
    json.dumps(known, allow_nan=False)


def test_few_runs_claim_nothing(tmp_path):
    for rows in (ledger(sets=("a",)), ledger(tokenizers=6), ledger(tokenizers=2), []):
        known = evidence(Rows(rows))["next item"]
        assert not known["enough"]
        assert known["numbers"] == {}
        page = make_page("predict", rows)
        assert not page.picture or "decides nothing" in page.picture
        assert "yes" not in [row[-1] for figure in page.summary for row in figure.rows[:1]]
        assert write_page(page, tmp_path, "predict")


def test_panels_are_means_over_seeds_and_hold_what_they_are_asked_for():
    rows = Rows(ledger(seeds=3))
    of_all = make_panels(rows, OUTCOMES["next item"])["a"]
    each = [make_panels(rows, OUTCOMES["next item"], seed=seed)["a"] for seed in range(3)]
    assert np.allclose(of_all.outcome, np.mean([one.outcome for one in each], axis=0))
    assert np.allclose(
        of_all.numbers["cosine"], np.mean([one.numbers["cosine"] for one in each], axis=0)
    )
    assert np.allclose((of_all.groups.sum(1) / of_all.users.sum()), of_all.outcome)
    everything = make_panels(rows, OUTCOMES["next item"], lambda row: True)["a"]
    assert len(everything.names) == len(of_all.names) + 1
    assert make_panels(rows, OUTCOMES["ranking"])["a"].groups is None


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Evidence of a planted ledger in the place of the committed one."""

    def put(rows):
        (tmp_path / "predict").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "predict" / "runs.jsonl").write_text(lines, encoding="utf8")
        file = tmp_path / "evidence.json"
        write_evidence(tmp_path, file)
        monkeypatch.setattr("semid.health._evidence.EVIDENCE_FILE", file)
        read_evidence.cache_clear()
        return read_evidence()

    yield put
    monkeypatch.undo()
    read_evidence.cache_clear()


def planted(**options):
    """A ledger whose relative error predicts, and whose other numbers do not."""
    rows = ledger(**options)
    for row in rows:
        row["numbers"]["relative error"] = -row["numbers"]["retention"]
    return rows


def test_verdict_and_comparison_say_how_well_their_numbers_predict(known, clustered):
    models = {
        str(size): semid.RQKMeans(levels=2, codebook_size=size, seed=0).fit(clustered)
        for size in (4, 8)
    }
    few = known(planted(sets=("a",)))
    assert not few.enough
    compared = semid.compare(models, clustered, replicates=0)
    verdict = compared.diagnoses["4"].verdict
    assert "ranked right" not in verdict.summary()
    assert not any("ranked right" in note for note in compared.notes)
    assert compared.metrics[0].key == "id_flips"
    enough = known(planted())
    assert enough.numbers["relative error"].predicts
    assert enough.best(["relative error", "dead codes"]) == "relative error"
    assert enough.best(["dead codes"]) is None
    summary = verdict.summary()
    right = enough.numbers["relative error"].pairs_right
    assert right > 0.85
    assert f"relative error (lower is better) in {right:.0%}" in summary
    assert "Not shown to predict it" in summary
    compared = semid.compare(models, clustered, replicates=0)
    assert compared.metrics[0].key == "relative_error"
    assert any(f"in {right:.0%}" in note for note in compared.notes)
    assert "relative error (lower" in compared.to_markdown()
    # Toy runs are no evidence.
    assert not known([{**row, "quick": True} for row in planted()]).enough


@pytest.mark.parametrize("outcome", ["next item", "ranking"])
def test_the_table_on_predict_is_the_five_best_of_the_evidence(outcome):
    page = (Path(__file__).parents[1] / "docs" / "predict.md").read_text(encoding="utf8")
    known = read_evidence(outcome).numbers
    best = sorted((n for n in known if known[n].predicts), key=lambda n: -known[n].pairs_right)
    lines = [
        f"| {outcome} | {name} | {'higher' if known[name].correlation > 0 else 'lower'} "
        f"| {known[name].pairs_right:.0%} | {known[name].correlation:+.2f} "
        f"({known[name].low:+.2f} to {known[name].high:+.2f}) |"
        for name in best[:5]
    ]
    assert "\n".join(lines) in page
    if outcome == "next item":  # what `semid advise` prints there
        assert f"right in {known['neighbors kept'].pairs_right:.0%} of pairs" in page
    # What the page says below the table.
    flips = [name for name in known if name.startswith("flips")]
    for name in ("Gini of codes", "least perplexity", "overlap R", "least K_eff", *flips):
        assert not known[name].predicts
    kept = known["neighbors kept"]
    assert kept.predicts
    assert (kept.correlation > 0) == (outcome == "next item")


def test_the_committed_evidence_is_that_of_the_committed_ledger(tmp_path):
    write_evidence(Path(__file__).parents[1] / "results", tmp_path / "evidence.json")
    made = json.loads((tmp_path / "evidence.json").read_text(encoding="utf8"))
    assert made == json.loads(EVIDENCE_FILE.read_text(encoding="utf8")), "run `make results`"
