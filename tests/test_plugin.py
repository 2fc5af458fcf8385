"""A tokenizer of another package, registered by an entry point, works in every command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import semid
from cli_cases import run
from semid.errors import UsageError
from semid.tokenizers.factory import TOKENIZERS, make_tokenizer

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the package and its metadata on the path, as an installation does."""
    monkeypatch.syspath_prepend(PLUGIN)
    yield
    sys.modules.pop("semid_lloyd", None)


def test_every_command_takes_it(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    semid.SyntheticCatalogue(items=600, dim=8, seed=0).write("data")
    items, log = "data/items.parquet", "data/interactions.parquet"
    source = ("data/embeddings.npy", "--ids", items)
    fit = ("fit", *source, "--tokenizer", "lloyd", "--codebook-size", 8, "--levels", 2)
    assert run(*fit, "--set", "rounds=3", "-o", "model", "-q") == 0
    assert run(*fit, "--set", "rounds=9", "-o", "model2", "-q") == 0
    assert "fitted lloyd" in capsys.readouterr().out
    model = semid.load("model")
    assert (model.kind, model.rounds, model.codebook_sizes) == ("lloyd", 3, (8, 8))
    assert run("encode", "model", *source, "-o", "ids.parquet", "-q") == 0
    report = ("--interactions", log, "-q")
    assert run("report", "model", *source, *report, "-o", "report.json") == 0
    assert json.loads(Path("report.json").read_text())["model"]["kind"] == "lloyd"
    assert run("compare", "model", "model2", *source, "-o", "compare.html", "-q") == 0
    assert run("refine", "model", *source, "--rounds", 1, "-o", "refined", "-q") == 0
    assert semid.load("refined").beam_width == 8
    refresh = ("refresh", "model", *source, "--catalogue", "ids.parquet")
    assert run(*refresh, "-o", "next", "-q") == 0
    rank = ("rank", log, "--items", items, "--ids", "ids.parquet", "--epochs", 1)
    assert run(*rank, "--hidden", 4, "--width", 2, "-o", "ranker", "-q") == 0
    assert run("unique", "ids.parquet", "-o", "unique.parquet", "-q") == 0
    assert run("export", "unique.parquet", "--to", "lcrec", "-o", "index.json") == 0


def test_help_shows_its_options(installed, capsys):
    assert run("fit", "--tokenizer", "lloyd", "--help") == 0
    shown = capsys.readouterr().out
    assert "--codebook-size" in shown
    assert "Lloyd iterations per level (default 4)." in shown
    assert "--epochs" not in shown


def test_what_it_lacks_is_refused(installed):
    assert "lloyd" in TOKENIZERS
    with pytest.raises(UsageError, match=r"--epochs \(training.epochs\) does not apply to lloyd"):
        make_tokenizer("lloyd", {"training.epochs": 3})
    with pytest.raises(UsageError, match="rounds=0"):
        make_tokenizer("lloyd", {"rounds": 0})


def test_without_the_package_its_models_are_named(installed, tmp_path, monkeypatch):
    x = semid.SyntheticCatalogue(items=300, dim=8, seed=0).matrix()
    make_tokenizer("lloyd", {"codebook_size": 4}).fit(x).save(tmp_path / "model")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(PLUGIN)])
    with pytest.raises(semid.SemidError, match="holds a 'lloyd'; this semid knows"):
        semid.load(tmp_path / "model")
