"""Unique ids a part at a time: token for token those of the whole catalogue at once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from semid.catalogue.uniqueness import make_unique
from semid.codes import SemanticIds
from semid.distributed.unique_parts import unique_folder
from semid.errors import ArtefactError, IdsError, OutputExistsError, UsageError


@pytest.fixture(scope="module")
def tokenizer(clustered) -> semid.RQKMeans:
    return semid.RQKMeans(levels=2, codebook_size=6).fit(clustered)


def spread(ids: SemanticIds, folder: Path, files: int) -> Path:
    folder.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(len(ids)), files)):
        ids.take(rows).write(folder / f"part-{number}.parquet")
    return folder


@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize(("files", "parts"), [(1, 1), (4, 3)])
def test_parts_give_the_tokens_of_the_whole(tokenizer, clustered, tmp_path, capacity, files, parts):
    names = [f"i{(row * 31) % 1200}" for row in range(1200)]
    twice = np.concatenate([clustered[:600], clustered[:600]])  # equal norms: ties go by item id
    ids = tokenizer.encode(twice, ids=names)
    whole = make_unique(ids, method="append", capacity=capacity)
    folder = spread(ids, tmp_path / "ids", files)
    report = unique_folder(folder, tmp_path / "out", capacity=capacity, parts=parts)
    read = SemanticIds.read(tmp_path / "out")
    assert read.to_arrow().equals(whole.ids.to_arrow())
    assert read.info == whole.ids.info
    ours, theirs = asdict(report), asdict(whole.report)
    for figures in (ours, theirs):
        figures.pop("unplaced_rows")
    assert ours == pytest.approx(theirs)
    # It can be done again, and gives the same.
    again = unique_folder(tmp_path / "out", tmp_path / "again", capacity=capacity)
    assert again.to_dict() == pytest.approx(report.to_dict())
    assert SemanticIds.read(tmp_path / "again").to_arrow().equals(whole.ids.to_arrow())


def test_what_does_not_belong_together_is_refused(tokenizer, clustered, tmp_path):
    ids = tokenizer.encode(clustered)
    folder = spread(ids, tmp_path / "ids", 2)
    with pytest.raises(UsageError, match="capacity=0"):
        unique_folder(folder, tmp_path / "out", capacity=0)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        unique_folder(folder, tmp_path / "there")
    ids.take(np.arange(3)).write(folder / "part-9.parquet")
    with pytest.raises(IdsError, match="3 item ids stand in more than one place"):
        unique_folder(folder, tmp_path / "out")
    other = semid.RQKMeans(levels=2, codebook_size=5).fit(clustered).encode(clustered)
    other.write(folder / "part-9.parquet", overwrite=True)
    with pytest.raises(ArtefactError, match="another model"):
        unique_folder(folder, tmp_path / "out")
    with pytest.raises(ArtefactError, match="2 different models"):
        SemanticIds.read(folder)


def test_the_command_line_takes_a_folder(tokenizer, clustered, tmp_path, capsys):
    ids = tokenizer.encode(clustered)
    folder = spread(ids, tmp_path / "ids", 3)
    assert run("unique", folder, "-o", tmp_path / "out") == 0
    assert "-> 1,200 distinct ids of 1,200 items" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    found = pq.read_table(tmp_path / "out")
    assert found.equals(make_unique(ids).ids.to_arrow())
