"""The grid: every cell once, resumed where it stopped, tokenizers once; and `semid rank`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from rank_cases import ITEMS, SMALL, codes, data, item_table, log_table
from semid.data.embeddings import open_embeddings
from semid.errors import IdsError, UsageError
from semid.progress import QuietProgress
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.training import rank_options
from semid.reproduce.claims import Rows, metric
from semid.reproduce.ranking_grid import (
    RESULTS_FILE,
    Grid,
    TokenizerCache,
    grid_tables,
    read_results,
    run_grid,
)

TRAINING = rank_options({"epochs": 1, "batch_size": 512, "precision": "fp32"})


def vectors(items=ITEMS):
    generator = np.random.default_rng(0)
    return generator.normal(size=(items, 6)).astype(np.float32)


def source(items=ITEMS, prefix="i"):
    return open_embeddings(vectors(items), ids=[f"{prefix}{n}" for n in range(items)])


def grid(**changes):
    settings = {
        "methods": ("none", "random", "rqkmeans"),
        "scales": (2,),
        "models": ("deepfm",),
        "fusion": (False, True),
        "seeds": 2,
        "codebook_size": 4,
        "config": RankerConfig(width=4, options=SMALL),
        "training": TRAINING,
    }
    return Grid(**{**settings, **changes})


@pytest.fixture(scope="module")
def rows():
    return data(cold_items=0.2)


def test_a_grid_runs_every_cell_once_and_resumes(rows, tmp_path):
    first = run_grid(grid(seeds=1), rows, tmp_path, embeddings=source())
    lines = (tmp_path / RESULTS_FILE).read_text().splitlines()
    assert len(first) == len(lines) == 6
    # A line that a kill cut short is run again; the others are not.
    (tmp_path / RESULTS_FILE).write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20] + "\n")
    again = run_grid(grid(), rows, tmp_path, embeddings=source())
    assert [r["auc"] for r in again[:6]] == [r["auc"] for r in first]
    assert len(again) == 12
    assert len(read_results(tmp_path / RESULTS_FILE)) == 12
    assert {(r["method"], r["scale"]) for r in again} == {
        ("none", 0),
        ("random", 2),
        ("rqkmeans", 2),
    }
    saved = [p.name for p in (tmp_path / "tokenizers").rglob("*.parquet")]
    assert saved == ["rqkmeans-2x.parquet"]
    tables = grid_tables(again)
    for part in (rows.protocol, "Popularity alone", "codes - none", "fusion on - off", "95 %"):
        assert part in tables
    ours = [{**row, "method": row["method"].replace("rqkmeans", "barq")} for row in again]
    assert "deepfm, barq - random, 2x, fusion on |" in grid_tables(ours)
    found = Rows(again).difference(
        metric("auc"), {"method": "random", "fusion": False}, {"method": "none", "fusion": False}
    )
    expected = np.mean(
        [
            a["auc"] - b["auc"]
            for a in again
            for b in again
            if (a["method"], b["method"]) == ("random", "none")
            and a["seed"] == b["seed"]
            and not a["fusion"]
            and not b["fusion"]
        ]
    )
    assert found.mean == pytest.approx(expected)
    assert found.pairs == 2


def test_tokenizers_see_training_items_alone(rows, tmp_path):
    x = vectors()
    cold = np.unique(rows.parts["cold"].item.numpy()) - 1
    moved = x.copy()
    names = rows.schema.items.strings()
    moved[[int(names[c][1:]) for c in cold]] += 50.0
    fitted = []
    for number, values in enumerate((x, moved)):
        folder = tmp_path / str(number)
        folder.mkdir()
        maker = TokenizerCache(
            folder,
            open_embeddings(values, ids=[f"i{n}" for n in range(ITEMS)]),
            rows,
            codebook_size=4,
        )
        found = maker.method("rqkmeans", 2, progress=QuietProgress())
        fitted.append(found.ids)
        assert len(found.ids) == ITEMS
    assert fitted[0].info.codebook_fingerprint == fitted[1].info.codebook_fingerprint
    maker = TokenizerCache(tmp_path, source(prefix="x"), rows, codebook_size=4)
    with pytest.raises(IdsError, match=r"none of the .* training items"):
        maker.method("rqkmeans", 2, progress=QuietProgress())


def test_a_tokenizer_that_learns_from_behavior_sees_training_positives_alone(rows, tmp_path):
    log = rows.training_log
    train = rows.parts["train"]
    liked = train.item[train.label == 1].numpy() - 1
    expected = np.bincount(liked, minlength=ITEMS)
    assert np.array_equal(
        np.bincount(log.catalogue_rows(rows.schema.items.ids)[log.items], minlength=ITEMS), expected
    )
    assert log.has_order
    assert log.rating is None
    table = log_table()
    wanted = {
        (u, i): t
        for u, i, t in zip(*(table[c].to_pylist() for c in table.column_names[:3]), strict=True)
    }
    users, items = log.user_ids.to_pylist(), log.item_ids.to_pylist()
    for user, item, time in zip(log.users, log.items, log.order, strict=True):
        assert wanted[users[user], items[item]] == time
    options = {"training": {"epochs": 1}, "network": {"hidden": (8,), "latent": 4}}
    maker = TokenizerCache(tmp_path, source(), rows, codebook_size=4, options=options)
    found = maker.method("barq", 2, progress=QuietProgress())
    assert len(found.ids) == ITEMS
    tokenizer = semid.load(tmp_path / "barq-2x")
    assert "behavior" in tokenizer.report.details


def test_wrong_grids(rows, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'rqvae'"):
        grid(methods=("rqvea",))
    with pytest.raises(UsageError, match="every axis"):
        grid(fusion=())
    with pytest.raises(UsageError, match="need --embeddings"):
        run_grid(grid(), rows, tmp_path)
    with pytest.raises(UsageError, match="give --ids"):
        run_grid(grid(methods=("ids",)), rows, tmp_path)
    with pytest.raises(UsageError, match="add ids to --methods"):
        run_grid(grid(methods=("none",)), rows, tmp_path, ids=codes())


def test_a_grid_takes_ids_and_repeats_only_their_runs_when_they_change(rows, tmp_path):
    settings = grid(methods=("none", "ids"), fusion=(False,), seeds=1)
    first = run_grid(settings, rows, tmp_path, ids=codes())
    assert [(row["method"], row["scale"]) for row in first] == [("none", 0), ("ids", 3)]
    ranker = semid.train_ranker(
        rows,
        ids=codes(),
        features={"mode": "levels"},
        config={**settings.config.to_dict(), "model": "deepfm"},
        training=TRAINING,
    )
    assert first[1]["auc"] == ranker.report["test"]["auc"]
    tables = grid_tables(first)
    assert f"ids: `{codes().info.label}`" in tables
    assert "deepfm, ids 3x, fusion off" in tables
    moved = codes()[np.arange(len(codes()))[::-1]]
    other = semid.SemanticIds(codes().items, moved.codes, moved.residual_norms, moved.info)
    again = run_grid(settings, rows, tmp_path, ids=other)
    assert again[0] == first[0]
    assert again[1]["run"] != first[1]["run"]
    assert len(read_results(tmp_path / RESULTS_FILE)) == 3


def test_a_resumed_run_trains_neither_model_again(tmp_path, monkeypatch):
    from semid.recommenders.ranking.ranker import Ranker
    from semid.recommenders.ranking.training import RankingTask

    pq.write_table(log_table(), tmp_path / "logs.parquet")
    codes().write(tmp_path / "ids.parquet")
    quick = ["--epochs", 2, "--hidden", "8", "--width", 4, "--precision", "fp32", "--quiet"]
    base = ["rank", tmp_path / "logs.parquet", "--ids", tmp_path / "ids.parquet", *quick]
    epochs = []
    start, save = RankingTask.start_epoch, Ranker.save
    monkeypatch.setattr(RankingTask, "start_epoch", lambda *a: epochs.append(start(*a)))
    assert run(*base, "-o", tmp_path / "whole") == 0
    assert len(epochs) == 4  # two epochs with codes, two without

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ranker, "save", full)
    assert run(*base, "-o", tmp_path / "new") == 1
    monkeypatch.setattr(Ranker, "save", save)
    epochs.clear()
    assert run(*base, "-o", tmp_path / "new", "--resume") == 0
    assert not epochs
    whole, resumed = semid.load(tmp_path / "whole"), semid.load(tmp_path / "new")
    assert resumed.report["baseline"] == whole.report["baseline"]
    assert sorted(path.name for path in tmp_path.glob("*new*")) == ["new"]


def test_wrong_input_costs_no_results(tmp_path, capsys):
    """``--overwrite`` replaces a grid or a comparison once everything has been read."""
    pq.write_table(log_table(), tmp_path / "logs.parquet")
    quick = ["--epochs", 1, "--width", 4, "--precision", "fp32", "-q"]
    calls = {
        "rank-grid": ["--methods", "none", "--models", "deepfm", "--hidden", "8", "--seeds", 1],
        "retrieve": ["--model", "popularity,sasrec"],
    }
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for command, options in calls.items():
        out = tmp_path / command
        words = [*options, *quick, "-o", out]
        assert run(command, tmp_path / "logs.parquet", *words) == 0
        before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        assert run(command, tmp_path / "broken.parquet", *words, "--overwrite") in (1, 2)
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    capsys.readouterr()


def test_semid_rank(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(log_table(), "logs.parquet")
    pq.write_table(item_table(), "items.parquet")
    codes().write("ids.parquet")
    quick = ["--epochs", 1, "--hidden", "8", "--width", 4, "--precision", "fp32", "--quiet"]
    log = ["logs.parquet", "--items", "items.parquet", *quick, "--label", "rating>=4"]
    base = ["rank", *log]
    fused = [*base, "--model", "dcnv2", "--fusion", "on", "--cold-items", "0.2"]
    assert run(*fused, "--ids", "ids.parquet", "--analyze", "a.json", "-o", "model") == 0
    shown = capsys.readouterr().out
    for part in ("protocol: label=rating>=4", "test (", "cold (", "popularity alone"):
        assert part in shown
    assert f"codes={codes().info.label} use=levels" in shown
    # The model without codes: the same split, seed and settings, without --ids.
    assert run(*fused, "-o", "alone") == 0
    assert "without codes" not in capsys.readouterr().out
    report = semid.load("model").report["baseline"]
    assert report["test"] == semid.load("alone").report["test"]
    lines = shown.splitlines()
    (place,) = [n for n, line in enumerate(lines) if line.startswith("test (")]
    assert lines[place + 1].startswith(f"  without codes: AUC {report['test']['auc']:.4f}, log")
    assert "codes - none: test AUC" in shown
    with_codes = [*base, "--ids", "ids.parquet", "--no-baseline"]
    assert run(*with_codes, "-o", "plain") == 0
    assert "without codes" not in capsys.readouterr().out
    assert "baseline" not in semid.load("plain").report
    assert not Path("model.partial").exists()
    assert "singular_values" in json.loads(Path("a.json").read_text())
    ranker = semid.load("model")
    assert ranker.config.fusion
    assert len(ranker.rank("u1", ["i1", "i2"]).items) == 2
    np.save("x.npy", vectors())
    grid = "--methods none,random --scales 2 --models deepfm --fusion on,off --seeds 1"
    small = ["--embeddings", "x.npy", "--codebook-size", 4, "-o", "grid"]
    assert run("rank-grid", *log, *grid.split(), *small) == 0
    assert "codes - none" in capsys.readouterr().out
    assert Path("grid/tables.md").exists()
    for extra, message in (
        (["--code-mode", "levels"], "without --ids"),
        (["--no-baseline"], "without --ids"),
        (["--fusion", "maybe"], "not one of"),
        (["--hidden", "a"], "whole numbers"),
        (["--fractions", "1,2"], "three positive shares"),
        (["--label", "stars>=4"], "stars"),
    ):
        assert run(*base, *extra, "-o", "other") == 2
        assert message in capsys.readouterr().err
    assert run(*base, "--stream", "-o", "streamed") == 0
