"""`semid.advise`: what it tries, what it takes, and what it says of its certainty."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from semid.errors import EmbeddingError, InputError, InteractionsError, UsageError
from semid.health import Evidence, Predictor
from semid.reproduce import advise as module
from semid.reproduce.intervals import mean_difference


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    return semid.SyntheticCatalogue(items=800, users=400, seed=0).write(folder / "cat")


@pytest.fixture(scope="module")
def advice(shop):
    return semid.advise(shop.embeddings, ids=shop.items, repeats=2, seed=0, progress=False)


def test_the_choice_is_the_shortest_of_those_near_the_best(advice):
    # What a test of the committed runs would tell without a log.
    assert advice.criterion == "neighbors kept"
    assert "ranks two tokenizers right" in advice.reason
    values = [each.value for each in advice.candidates]
    assert values == sorted(values, reverse=True)
    assert advice.candidates[0].behind == 0
    healthy = [each for each in advice.candidates if each.verdict == "healthy"]
    near = [each for each in healthy if each.value >= 0.95 * healthy[0].value]
    assert advice.choice in near
    assert advice.choice.bits == min(each.bits for each in near)
    assert advice.sample == 640  # four fifths, so that samples differ
    for each in advice.candidates:
        assert each.low <= each.value <= each.high
        assert each.low < each.high
        assert 0 <= each.colliding <= 1
        assert advice.sample / each.codebook_size > 20
    # The command is one that runs.
    assert f"--levels {advice.choice.levels} " in advice.command
    assert advice.command in advice.summary()
    assert module.Advice.from_dict(json.loads(json.dumps(advice.to_dict()))) == advice


def test_advice_repeats_and_follows_its_seed(shop, advice):
    options = {"ids": shop.items, "repeats": 2, "progress": False}
    again = semid.advise(shop.embeddings, seed=0, **options)
    values = [each.value for each in advice.candidates]
    assert [each.value for each in again.candidates] == values
    other = semid.advise(shop.embeddings, seed=7, behind=1.0, **options)
    assert [each.value for each in other.candidates] != values
    # Whoever gives up all quality gets the shortest healthy ids.
    healthy = [each.bits for each in other.candidates if each.verdict == "healthy"]
    assert other.choice.bits == min(healthy)


def test_interactions_decide_where_they_are_given(shop, monkeypatch):
    tried = {each["tokenizer"]: each for each in module._candidates(12_000, 9_600, 384, True)}
    assert {"rqkmeans", "opq", "drqvae", "barq"} == set(tried)
    assert "drqvae" not in {e["tokenizer"] for e in module._candidates(12_000, 9_600, 384, False)}
    assert {e["codebook_size"] for e in module._candidates(12_000, 9_600, 384, False)} == {64, 256}
    barq = {**tried["barq"], "codebook_size": 8, "options": {"training": {"epochs": 1}}}
    wrong = {**tried["drqvae"], "codebook_size": 8, "options": {"pairs_per_step": 10**6}}
    small = {"tokenizer": "rqkmeans", "levels": 2, "codebook_size": 8}
    monkeypatch.setattr(module, "_candidates", lambda *_: [small, barq, wrong])
    advice = semid.advise(
        shop.embeddings,
        ids=shop.items,
        interactions=shop.interactions,
        repeats=2,
        sample=500,
        progress=False,
    )
    assert advice.criterion == "retention"
    assert {each.name for each in advice.candidates} == {"rqkmeans 2x8", "barq 3x8"}
    assert any(note.startswith("drqvae is left out") for note in advice.notes)
    learned = module.Advice(**{**vars(advice), "recommended": "barq 3x8"})
    assert "--interactions LOG" in learned.command
    # Embeddings that know nothing of the log rank nothing, and the message says so.
    monkeypatch.setattr(module, "intrinsic_numbers", lambda _: {"retention": None})
    options = {"ids": shop.items, "interactions": shop.interactions, "progress": False}
    with pytest.raises(InputError, match="leave --interactions"):
        semid.advise(shop.embeddings, repeats=2, sample=500, **options)


def test_samples_hold_whole_histories_of_test_users(shop):
    source = semid.open_embeddings(shop.embeddings, ids=shop.items)
    log = semid.read_interactions(shop.interactions)
    rows = module._draw(source, log, 400, seed=1)
    assert len(np.unique(rows)) == 400
    assert (np.diff(rows) > 0).all()
    sequences = log.sequences(source.ids)
    test = module.split_users(log.user_ids) == module.TEST
    inside = np.isin(sequences.items, rows)

    def share_of_pairs(mask):
        pairs = sequences.consecutive_pairs(mask).pairs
        return np.isin(pairs, rows).all(1).mean()

    assert inside.any()
    # Of pairs of random items a quarter would survive.
    assert share_of_pairs(test) > 0.5
    assert not np.array_equal(rows, module._draw(source, log, 400, seed=2))
    assert len(module._draw(source, None, 500, seed=1)) == 500


def test_the_ledger_decides_what_ranks(monkeypatch, shop):
    known = Evidence(
        data_sets=("a", "b", "c"),
        tokenizers=20,
        enough=True,
        numbers={
            "retention": Predictor(0.9, 0.7, 0.95, 0.9),
            "relative error": Predictor(-0.8, -0.9, -0.5, 0.81),
            "cosine": Predictor(0.2, -0.3, 0.5, 0.6),
        },
    )
    monkeypatch.setattr(module, "read_evidence", lambda: known)
    assert module._criterion(True)[:2] == ("retention", True)
    # Without a log there is no retention, and the next best number has the other direction.
    name, higher, reason = module._criterion(False)
    assert (name, higher) == ("relative error", False)
    assert "81%" in reason
    advice = semid.advise(shop.embeddings, ids=shop.items, repeats=2, sample=500, progress=False)
    values = [each.value for each in advice.candidates]
    assert values == sorted(values)
    assert all(each.behind >= 0 for each in advice.candidates)
    assert "lower is better" in advice.summary()


def test_intervals_are_paired_over_the_samples():
    tried = [
        {"tokenizer": "rqkmeans", "levels": 2, "codebook_size": 8},
        {"tokenizer": "opq", "levels": 4, "codebook_size": 8},
    ]
    about = {"colliding": 0.1, "verdict": "healthy", "seconds": 1.0, "bits": 6.0}
    values = {0: [0.5, 0.7, 0.9], 1: [0.4, 0.59, 0.8]}
    best, other = module._candidate_results(tried, values, {0: about, 1: about}, 1.0)
    assert (best.name, other.name) == ("rqkmeans 2x8", "opq 4x8")
    # The samples differ by far more than the candidates do on each of them.
    expected = mean_difference([0.1, 0.11, 0.1])
    assert other.behind_low == pytest.approx(expected.low)
    assert other.behind_high == pytest.approx(expected.high)
    assert other.high - other.low > 10 * (other.behind_high - other.behind_low)
    lower = module._candidate_results(tried, values, {0: about, 1: about}, -1.0)
    assert [each.name for each in lower] == ["opq 4x8", "rqkmeans 2x8"]


def test_bad_input_is_refused_in_a_sentence(shop, tmp_path, capsys):
    rows = np.zeros((20, 4), np.float32)
    with pytest.raises(InputError, match="20 items are too few"):
        semid.advise(rows)
    with pytest.raises(UsageError, match="repeats=1"):
        semid.advise(rows, repeats=1)
    with pytest.raises(UsageError, match="did you mean 'sample'"):
        semid.advise(rows, samples=1000)
    log = pq.read_table(shop.interactions).select(["user_id", "item_id"])
    with pytest.raises(InteractionsError, match="no order"):
        semid.advise(shop.embeddings, ids=shop.items, interactions=log, progress=False)
    strange = pa.table({"user_id": ["a", "a"], "item_id": ["x", "y"], "position": [0, 1]})
    with pytest.raises(InteractionsError, match="none of the"):
        semid.advise(shop.embeddings, ids=shop.items, interactions=strange, progress=False)
    wrong = np.ones((600, 4), np.float32)
    wrong[7, 2] = np.nan
    with pytest.raises(EmbeddingError, match="row 7"):
        semid.advise(wrong, repeats=2, progress=False)
    for words in (["nowhere.npy"], [str(shop.embeddings), "--ties", "file"]):
        assert run("advise", *words, "--ids", shop.items, "-q") == 2
    assert "--interactions" in capsys.readouterr().err


def test_the_command_prints_text_or_json(shop, capsys):
    places = [str(shop.embeddings), "--ids", shop.items.as_uri()]
    words = ["advise", *places, "--repeats", "2", "-q"]
    assert run(*words, "--sample", "500", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    advice = module.Advice.from_dict(document)
    assert advice.recommended in {each.name for each in advice.candidates}
