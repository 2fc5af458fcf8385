"""Encoding to Parquet: equal to encode(), and no row lost or doubled by a stop or a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import semid
from semid.codes import SemanticIds
from semid.errors import ArtefactError, EmbeddingError, OutputExistsError
from semid.filesystems import Folder
from semid.progress import QuietProgress
from semid.runs import partial_path
from semid.tokenizers import base, encoding
from semid.tokenizers.encoding import encode_to_parquet


@pytest.fixture(scope="module")
def tokenizer(clustered):
    return semid.RQKMeans(levels=2, codebook_size=16).fit(clustered)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(base, "BLOCK_ROWS", 50)
    monkeypatch.setattr(encoding, "BLOCK_ROWS", 50)


class StopAfter(QuietProgress):
    def __init__(self, rows: int) -> None:
        self.left = rows

    def step(self, done: int = 1, **fields: object) -> None:
        self.left -= done
        if self.left <= 0:
            raise KeyboardInterrupt


def test_equals_encode(tokenizer, clustered, tmp_path, small_blocks):
    ids = [f"item-{i}" for i in range(len(clustered))]
    path = tmp_path / "ids.parquet"
    assert encode_to_parquet(tokenizer, clustered, path, ids=ids) == len(clustered)
    streamed, whole = SemanticIds.read(path), tokenizer.encode(clustered, ids=ids)
    assert np.array_equal(streamed.codes, whole.codes)
    assert np.array_equal(streamed.residual_norms, whole.residual_norms)
    assert streamed.items == whole.items
    assert streamed.info == whole.info
    assert [file.name for file in tmp_path.iterdir()] == ["ids.parquet"]


@pytest.mark.parametrize("rows", [1, 200, 201, 650, 1199])
def test_stopped_and_resumed(tokenizer, clustered, tmp_path, small_blocks, rows):
    path = tmp_path / "ids.parquet"
    with pytest.raises(KeyboardInterrupt):
        encode_to_parquet(tokenizer, clustered, path, progress=StopAfter(rows))
    assert not path.exists()
    with pytest.raises(OutputExistsError, match="--resume"):
        encode_to_parquet(tokenizer, clustered, path)
    again = encode_to_parquet(tokenizer, clustered, path, resume=True)
    assert again < len(clustered)
    assert np.array_equal(SemanticIds.read(path).codes, tokenizer.encode(clustered).codes)
    assert not Path(partial_path(path)).exists()


def test_to_a_uri(tokenizer, clustered, tmp_path, small_blocks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = "memory://semid-encoding/ids.parquet"
    with pytest.raises(KeyboardInterrupt):
        encode_to_parquet(tokenizer, clustered, uri, progress=StopAfter(300))
    assert encode_to_parquet(tokenizer, clustered, uri, resume=True) < len(clustered)
    assert np.array_equal(SemanticIds.read(uri).codes, tokenizer.encode(clustered).codes)
    assert Folder("memory://semid-encoding").names(hidden=True) == ["ids.parquet"]
    assert not list(tmp_path.iterdir())
    Folder("memory://semid-encoding").remove()


def test_resume_refuses_another_run(tokenizer, clustered, tmp_path, small_blocks):
    path = tmp_path / "ids.parquet"
    with pytest.raises(KeyboardInterrupt):
        encode_to_parquet(tokenizer, clustered, path, progress=StopAfter(300))
    with pytest.raises(ArtefactError, match="another model, beam or source"):
        encode_to_parquet(tokenizer, clustered[:-1], path, resume=True)
    with pytest.raises(ArtefactError, match="another model, beam or source"):
        encode_to_parquet(tokenizer, clustered, path, resume=True, beam_width=2)


def test_bad_rows_write_nothing(tokenizer, clustered, tmp_path):
    path = tmp_path / "ids.parquet"
    with pytest.raises(EmbeddingError, match="width"):
        encode_to_parquet(tokenizer, clustered[:, :5], path)
    spoilt = clustered.copy()
    spoilt[1100, 0] = np.nan
    with pytest.raises(EmbeddingError, match="row 1100"):
        encode_to_parquet(tokenizer, spoilt, path)
    assert not path.exists()


KILLED = """
import sys, time
import numpy as np, semid
from semid.filesystems import Folder
from semid.progress import QuietProgress
from semid.tokenizers import base, encoding

base.BLOCK_ROWS = encoding.BLOCK_ROWS = 50

class Slow(QuietProgress):
    def step(self, done=1, **fields):
        time.sleep(0.05)

encoding.encode_to_parquet(
    semid.load(sys.argv[1]), sys.argv[2], sys.argv[3], resume=True, progress=Slow()
)
"""


def test_killed_and_resumed(tokenizer, clustered, tmp_path, small_blocks):
    """A real kill -9 in the middle, seen by the parts already on disk."""
    np.save(tmp_path / "x.npy", clustered)
    tokenizer.save(tmp_path / "model")
    path = tmp_path / "ids.parquet"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(tmp_path / "x.npy"), str(path)]
    )
    folder = Path(partial_path(path))
    deadline = time.monotonic() + 120
    while len(list(folder.glob("part-*"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not path.exists()
    written = encode_to_parquet(tokenizer, tmp_path / "x.npy", path, resume=True)
    assert 0 < written < len(clustered)
    assert pq.read_metadata(path).num_rows == len(clustered)
    assert np.array_equal(SemanticIds.read(path).codes, tokenizer.encode(clustered).codes)
