"""The program as a person meets it: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid
from semid.cli import main
from semid.codes import SemanticIds


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory, clustered) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    np.save(folder / "x.npy", clustered)
    flat = pa.array(clustered.reshape(-1))
    table = pa.table(
        {
            "item_id": [f"i{n}" for n in range(len(clustered))],
            "title": [f"Thing {n}" for n in range(len(clustered))],
            "embedding": pa.FixedSizeListArray.from_arrays(flat, clustered.shape[1]),
        }
    )
    pq.write_table(table, folder / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def model(catalogue) -> Path:
    tokenizer = semid.RQKMeans(levels=2, codebook_size=16)
    tokenizer.fit(catalogue / "items.parquet").save(catalogue / "model")
    return catalogue / "model"


def test_fit_encode_report(run, catalogue, tmp_path):
    items = catalogue / "items.parquet"
    options = ("--levels", 2, "--codebook-size", 16)
    code, out, err = run("fit", items, *options, "-o", tmp_path / "model")
    assert code == 0, err
    assert "verdict:" in out
    steps = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert {"read", "level 1 of 2", "level 2 of 2", "evaluate"} <= {step["task"] for step in steps}
    code, out, _ = run("encode", tmp_path / "model", items, "-o", tmp_path / "ids.parquet", "-q")
    assert code == 0
    assert "1,200 items" in out
    ids = SemanticIds.read(tmp_path / "ids.parquet")
    assert ids.items[7] == "i7"
    same = semid.RQKMeans(levels=2, codebook_size=16).fit(items)
    assert np.array_equal(ids.codes, same.encode(items).codes)
    code, out, err = run("report", tmp_path / "model", items, "-o", tmp_path / "r.html", "-q")
    assert code == 0, err
    page = (tmp_path / "r.html").read_text(encoding="utf8")
    assert "Thing" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.parquet", "model", "r.html"]


def test_ids_from_a_table(run, catalogue, model, tmp_path):
    code, _, err = run(
        "encode", model, catalogue / "x.npy", "--ids", f"{catalogue / 'items.parquet'}:title",
        "-o", tmp_path / "ids.parquet", "-q",
    )  # fmt: skip
    assert code == 0, err
    assert SemanticIds.read(tmp_path / "ids.parquet").items[3] == "Thing 3"


def test_quiet_is_quiet(run, catalogue, tmp_path):
    arguments = ("fit", catalogue / "x.npy", "--levels", 1, "--codebook-size", 8, "-q")
    _, _, err = run(*arguments, "-o", tmp_path / "m")
    assert err == ""


@pytest.mark.parametrize("command", ["fit", "encode", "report", "compare", "demo"])
def test_help_teaches(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage" in out
    code, everything, _ = run("--help")
    assert command in everything


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("semid ")
    command = [sys.executable, "-m", "semid", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == out


def test_wrong_usage_exits_with_2(run, catalogue, model, tmp_path):
    out = tmp_path / "m"
    x = catalogue / "x.npy"
    code, _, err = run("fit", x, "--levls", 2, "-o", out)
    assert code == 2
    assert "--levels" in err
    code, _, err = run("fit", x, "--tokenizer", "rqkmean", "-o", out)
    assert code == 2
    assert "did you mean 'rqkmeans'" in err
    code, _, err = run("fit", x, "--levels", 0, "-o", out)
    assert code == 2
    code, _, err = run("fit", x, "--tol", 7, "-o", out)
    assert code == 2
    assert "tol" in err
    code, _, err = run("fit", x, "-o", model)
    assert code == 2
    assert "--overwrite" in err
    code, _, err = run("fit", catalogue / "items.parquet", "--embedding-column", "emb", "-o", out)
    assert code == 2
    assert "embedding" in err
    code, _, _ = run("fittt")
    assert code == 2
    assert not out.exists()


def test_bad_data_exits_with_1_and_writes_nothing(run, catalogue, model, tmp_path, clustered):
    spoilt = clustered.copy()
    spoilt[17] = np.nan
    np.save(tmp_path / "nan.npy", spoilt)
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((catalogue / "x.npy").read_bytes()[:5000])
    np.save(tmp_path / "narrow.npy", clustered[:, :9])
    (tmp_path / "empty").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    small = ("--codebook-size", 16, "-o", out, "-q")
    for file, said in (
        ("nan.npy", "row 17"),
        ("pickled.npy", "object"),
        ("cut.npy", "cut.npy"),
        ("missing.npy", "missing.npy"),
    ):
        code, _, err = run("fit", tmp_path / file, *small)
        assert code in (1, 2), file
        assert said in err, file
        assert "Traceback" not in err
    code, _, err = run("fit", catalogue / "x.npy", "--codebook-size", 5000, "-o", out, "-q")
    assert code == 1
    assert "codebook_size=5000" in err
    code, _, err = run("encode", model, tmp_path / "narrow.npy", "-o", out, "-q")
    assert code == 1
    assert "width 9" in err
    code, _, err = run("encode", tmp_path / "empty", catalogue / "x.npy", "-o", out, "-q")
    assert code == 1
    assert "config.json" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_skipping_invalid_rows(run, model, tmp_path, clustered):
    spoilt = clustered.copy()
    spoilt[17] = np.nan
    np.save(tmp_path / "nan.npy", spoilt)
    out = tmp_path / "ids.parquet"
    code, _, err = run("encode", model, tmp_path / "nan.npy", "--on-invalid", "skip", "-o", out)
    assert code == 0, err
    ids = SemanticIds.read(out)
    assert len(ids) == 1199
    assert "17" not in ids.items.strings().to_pylist()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(semid.SemidError):
        main(["encode", str(tmp_path), "x.npy", "-o", str(tmp_path / "o"), "--debug"])


STOPPED = """
import sys
import semid.tokenizers.codebooks as module

save = module.LevelRun._save
count = 0

def interrupt(self, state):
    global count
    save(self, state)
    count += 1
    if count == 3:
        raise KeyboardInterrupt

module.LevelRun._save = interrupt
from semid.cli import main
main(sys.argv[1:])
"""


def test_ctrl_c_then_resume(run, catalogue, tmp_path):
    arguments = [
        "fit", str(catalogue / "x.npy"), "--levels", "2", "--codebook-size", "16", "-q",
        "-o", str(tmp_path / "model"),
    ]  # fmt: skip
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPED, *arguments], capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 130
    assert "--resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.partial"]
    code, _, err = run(*arguments)
    assert code == 2
    assert "--resume" in err
    code, _, err = run(*arguments, "--resume")
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    whole = semid.RQKMeans(levels=2, codebook_size=16).fit(catalogue / "x.npy")
    assert semid.load(tmp_path / "model").weights_fingerprint == whole.weights_fingerprint
