"""Runs are kept once, whoever writes beside, and a kill loses or doubles nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from ledger_cases import append
from semid.errors import InputError, UsageError
from semid.progress import QuietProgress
from semid.registry import recipe_names
from semid.reproduce.ledger import Ledger, digest, read_runs, rounded
from semid.reproduce.pool import Job, run_jobs
from semid.reproduce.predict_runs import unfitted
from semid.reproduce.recipe import (
    DrqRecipe,
    MocRecipe,
    PredictRecipe,
    RetrievalRecipe,
    read_experiment,
)
from semid.reproduce.study import EXPERIMENTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("paper", ["drq", "moc"])
def test_committed_runs_keep_their_keys(paper):
    # Else the same command would run all of them again: hours.
    rows = read_runs(ROOT / "results" / paper / "runs.jsonl")
    done = {row["key"]: row for row in rows if row["data"] == "beauty"}
    experiment = EXPERIMENTS[paper](read_experiment(paper), None, ROOT)
    beauty_files = "25f7b3a199d99df8"  # the digest of the data set
    cells = [cell for cell in experiment.cells() if cell["data"] == "beauty"]
    keys = {digest(experiment.identity(cell, beauty_files)) for cell in cells}
    assert len(done) >= 30
    assert done.keys() <= keys


def jobs(count, settings="s"):
    return [Job(f"k{n}", f"job {n}", {"number": n, "seed": 0}, settings) for n in range(count)]


class Doubles:
    """Counts what it runs; fails or is interrupted where it is told to."""

    def __init__(self, fails=(), stop_at=None):
        self.fails, self.stop_at, self.ran = fails, stop_at, []

    def __call__(self, job):
        number = job.spec["number"]
        self.ran.append(number)
        if number == self.stop_at:
            raise KeyboardInterrupt
        if number in self.fails:
            raise ArithmeticError("no luck")
        return {"twice": 2 * number, "seconds": 1.0}


class Dies:
    """Kills its own process at one job."""

    def __call__(self, job):
        if job.spec["number"] == 1:
            os._exit(9)
        return {"twice": 2 * job.spec["number"]}


def run(runner, folder, count=5, **options):
    return run_jobs(jobs(count), runner, folder, progress=QuietProgress(), **options)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Doubles(stop_at=2), tmp_path)
    assert [r["number"] for r in read_runs(tmp_path / "runs.jsonl")] == [0, 1]
    # What a kill leaves of a line is no result: it is cut off and the run repeated.
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"key": "k2", "number": 2, "tw')
    assert len(read_runs(tmp_path / "runs.jsonl")) == 2
    again = Doubles()
    assert run(again, tmp_path) == {}
    assert again.ran == [2, 3, 4]
    rows = read_runs(tmp_path / "runs.jsonl")
    assert [r["number"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["twice"] for r in rows] == [0, 2, 4, 6, 8]
    for row in rows:
        assert row["settings"] == "s"
        assert row["versions"]["torch"]
        assert {"commit", "dirty", "machine", "finished"} <= set(row)
    third = Doubles()
    run(third, tmp_path)
    assert third.ran == []


def test_one_failure_leaves_the_others_and_is_tried_again(tmp_path):
    failed = run(Doubles(fails=(1,)), tmp_path)
    assert failed == {"job 1": "ArithmeticError: no luck"}
    assert [r["number"] for r in read_runs(tmp_path / "runs.jsonl")] == [0, 2, 3, 4]
    again = Doubles()
    assert run(again, tmp_path) == {}
    assert again.ran == [1]
    with pytest.raises(UsageError, match="at least 1"):
        run(Doubles(), tmp_path, processes=0)


def test_a_claimed_run_is_left_to_who_has_it(tmp_path):
    mine, other = Ledger(tmp_path), Ledger(tmp_path)
    with mine.claim("k0") as first, other.claim("k0") as second, other.claim("k1") as third:
        assert (first, second, third) == (True, False, True)
    with other.claim("k0") as free:
        assert free
    assert mine.add({"key": "k0", "value": 1})
    assert not other.add({"key": "k0", "value": 2})
    with other.claim("k0") as done:
        assert not done
    assert [r["value"] for r in read_runs(mine.path)] == [1]


def test_processes_that_write_at_once_lose_and_double_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    found = [context.Process(target=append, args=(tmp_path, start)) for start in (0, 20, 40)]
    for process in found:
        process.start()
    for process in found:
        process.join()
        assert process.exitcode == 0
    keys = [row["key"] for row in read_runs(tmp_path / "runs.jsonl")]
    assert sorted(keys) == sorted(f"k{n}" for n in range(60))


@pytest.mark.slow
def test_a_process_that_dies_leaves_the_others(tmp_path):
    failed = run(Dies(), tmp_path, count=6, processes=2)
    assert list(failed) == ["job 1"]
    assert "code 9" in failed["job 1"]
    assert sorted(r["number"] for r in read_runs(tmp_path / "runs.jsonl")) == [0, 2, 3, 4, 5]


def test_a_ledger_that_was_edited_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": "a"}\n{"key": \n{"key": "b"}\n')
    with pytest.raises(InputError, match="line 2"):
        read_runs(path)
    assert read_runs(tmp_path / "none.jsonl") == []


def test_numbers_are_rounded_and_never_nan():
    found = rounded({"a": 1 / 3, "b": [float("nan"), float("inf"), 2], 3: (0.1,)})
    assert found == {"a": 0.333333, "b": [None, None, 2], "3": [0.1]}
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})


def test_every_recipe_that_comes_with_semid_is_read():
    kinds = {
        "behavior": DrqRecipe,
        "drq": DrqRecipe,
        "moc": MocRecipe,
        "predict": PredictRecipe,
        "retrieval": RetrievalRecipe,
    }
    names = [name for kind in kinds for name in (kind, f"{kind}-quick")]
    assert recipe_names("reproduce/recipes") == names
    for name in recipe_names("reproduce/recipes"):
        recipe = read_experiment(name)
        assert type(recipe) is kinds[recipe.paper]
        assert recipe.quick == name.endswith("quick")
    full = read_experiment("moc")
    first = full.stages[0]
    assert first.models == ("dcnv2", "deepfm")
    assert {"random", "shuffled", "widened", "none", "vqvae"} < set(first.methods)
    assert len(full.data) == 4
    assert full.seeds == 5
    drq = read_experiment("drq")
    assert [d.codebook_size for d in drq.data] == [256, 256, 256, 4096]
    assert drq.seeds >= 3


def test_every_tokenizer_of_the_study_of_numbers_can_be_made():
    recipe = read_experiment("predict")
    fitted = [spec for spec in recipe.tokenizers if spec.control in ("", "shuffled")]
    assert len(fitted) == 22
    for spec in fitted:
        made = unfitted(recipe, spec, 256, seed=3)
        assert made.kind == spec.kind
        assert made.settings["seed"] == 3
        if "training" in made.settings:
            assert made.settings["training"]["epochs"] == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('paper = "drq"\nsedes = 3', "did you mean 'seeds'"),
        ('paper = "drq"\nseeds = "3"', "seeds is '3'; give a whole number"),
        ('paper = "dqr"', "did you mean 'drq'"),
        ('paper = "drq"\n[[data]]\nname = "a"', "folder = "),
        ('paper = "drq"\n[[tokenizers]]\nname = "a"\nkind = "rqvea"', "did you mean 'rqvae'"),
        ('paper = "moc"\n[[stages]]\nname = "a"\nmodels = ["dcn"]', "did you mean 'dcnv2'"),
        ('paper = "moc"\n[[stages]]\nname = "a"\nvariant = "b"', "stages.variant='b'"),
        ('paper = "moc"\n[[stages]]\nmodels = ["dcnv2"]', "does not say name"),
        ('paper = "moc"\nstages = 3', "give a list"),
        ("paper = ", "no valid TOML|not valid TOML"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_experiment(path)


def test_a_recipe_that_does_not_exist():
    with pytest.raises(UsageError, match="did you mean 'drq'"):
        read_experiment("drqq")


def test_rows_are_plain_json(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add({"key": "a", "value": 0.1234567891, "name": "Zoë"})
    line = (tmp_path / "runs.jsonl").read_text(encoding="utf8")
    assert json.loads(line) == {"key": "a", "value": 0.123457, "name": "Zoë"}
