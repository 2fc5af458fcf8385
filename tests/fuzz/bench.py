"""Files and tiny models that every case starts from; made once, read by every case."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from fuzzing import cli

import semid

ITEMS, DIM, LEVELS, SIZE, USERS = 48, 6, 2, 8, 20


@dataclass
class Bench:
    """The prepared folder.

    Attributes:
        path: of the folder; cases read from it and never write to it.
    """

    path: Path
    loaded: dict[str, Any] = field(default_factory=dict)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def copy(self, name: str, to: Path) -> Path:
        """Copy a file or folder for a case to change."""
        source = self.path / name
        if source.is_dir():
            shutil.copytree(source, to)
        else:
            shutil.copy(source, to)
        return to

    def model(self, name: str) -> Any:
        """Return a loaded model."""
        if name not in self.loaded:
            self.loaded[name] = semid.load(self.path / name)
        return self.loaded[name]

    @cached_property
    def rows(self) -> np.ndarray:
        """The embeddings ``(ITEMS, DIM)``."""
        return np.load(self.path / "items.npy")

    @cached_property
    def codes(self) -> np.ndarray:
        """The codes of the model ``rqkmeans`` for `rows`."""
        return self.encode(self.rows)

    def encode(self, rows: np.ndarray, name: str = "rqkmeans") -> np.ndarray:
        """Return the codes of a matrix, from the array interface."""
        return np.asarray(self.model(name).encode(np.ascontiguousarray(rows, "f4")).codes)


def make_bench(path: Path) -> Bench:
    """Write the data, fit the models, export the ids."""
    path.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(12, DIM))
    x = centers[np.arange(ITEMS) % 12] + 0.2 * generator.normal(size=(ITEMS, DIM))
    x = x.astype(np.float32)
    items = pa.table(
        {
            "item_id": [f"i{n}" for n in range(ITEMS)],
            "embedding": pa.array(list(x), pa.list_(pa.float32())),
            "title": [f"item {n}" for n in range(ITEMS)],
            "brand": [f"b{n % 3}" for n in range(ITEMS)],
            "categories": ["a > b" if n % 2 else "c" for n in range(ITEMS)],
        }
    )
    user = np.repeat(np.arange(USERS), 12)
    log = pa.table(
        {
            "user_id": [f"u{n}" for n in user],
            "item_id": [f"i{n}" for n in generator.integers(0, ITEMS, len(user))],
            "timestamp": np.arange(len(user)),
            "rating": generator.integers(1, 6, len(user)).astype(float),
            "device": [["web", "app"][n % 2] for n in range(len(user))],
            "price": generator.normal(10.0, 3.0, len(user)),
        }
    )
    np.save(path / "items.npy", x)
    pq.write_table(items, path / "items.parquet")
    pq.write_table(log, path / "log.parquet")
    pc.write_csv(log, path / "log.csv")
    (path / "ids.txt").write_text("\n".join(items["item_id"].to_pylist()) + "\n", encoding="utf8")
    (path / "recipe.toml").write_text(RECIPE, encoding="utf8")
    (path / "pipeline.toml").write_text(PIPELINE, encoding="utf8")
    semid.from_codebooks(
        [x[:SIZE, :4], x[SIZE : 2 * SIZE, 4:]], combine="concat", mean=x[0], projection=np.eye(DIM)
    ).save(path / "codebooks")
    small = ("--levels", LEVELS, "--codebook-size", SIZE, "-q")
    net = ("--tokenizer", "rqvae", "--epochs", 1, "--latent", 4)
    table, ids = path / "items.parquet", path / "ids.parquet"
    for command in (
        ("fit", table, *small, "-o", path / "rqkmeans"),
        ("fit", table, *small, "-o", path / "other", "--seed", 1),
        ("fit", table, *small, *net, "-o", path / "rqvae"),
        ("fit", table, "--recipe", path / "pipeline.toml", "-q", "-o", path / "pipeline"),
        ("encode", path / "rqkmeans", table, "-o", ids, "-q"),
        ("unique", ids, "-o", path / "unique.parquet", "-q"),
        (
            *("rank", path / "log.parquet", "--items", table, "--ids", ids, "-q", "-o"),
            *(path / "ranker", "--epochs", 1, "--hidden", "8", "--width", 4),
        ),
        (
            *("retrieve", path / "log.parquet", "--ids", ids, "-q", "-o", path / "retriever"),
            *("--epochs", 1, "--width", 4),
        ),
        ("export", path / "unique.parquet", "--to", "lcrec", "-o", path / "lcrec.json"),
        ("export", ids, "--to", "grid", "-o", path / "grid.pt"),
        ("export", ids, "--to", "openonerec", "-o", path / "openonerec"),
        ("export", ids, "--to", "torcheasyrec", "-o", path / "torcheasyrec.parquet"),
    ):
        cli(*command)()
    pq.write_table(pq.read_table(table).slice(0, 30), path / "first.parquet")
    cli("encode", path / "rqkmeans", path / "first.parquet", "-o", path / "first-ids.parquet")()
    growing = ("encode", path / "rqkmeans", table, "--catalogue", path / "first-ids.parquet")
    cli(*growing, "-o", path / "bundle", "-q")()
    (path / "done.json").write_text(json.dumps({"items": ITEMS}), encoding="utf8")
    return Bench(path)


def warm_up(bench: Bench, scratch: Path) -> None:
    """Import and compile what the first use would, so that no case pays for it."""
    scratch.mkdir(parents=True, exist_ok=True)
    _ = bench.codes
    bench.encode(bench.rows, "rqvae")
    table = bench / "items.parquet"
    small = ("--levels", LEVELS, "--codebook-size", SIZE, "-q", "--overwrite")
    net = ("--tokenizer", "rqvae", "--epochs", 1, "--latent", 4)
    cli("fit", table, *small, *net, "-o", scratch / "model")()
    cli("report", bench / "rqkmeans", table, "-o", scratch / "r.html", "-q", "--overwrite")()
    shutil.rmtree(scratch)


RECIPE = """\
tokenizer = "rqvae"
levels = 2
codebook_size = 8
seed = 0
normalize = false
validation_fraction = 0.05

[network]
hidden = [8]
latent = 4

[training]
epochs = 1
batch_size = 16
learning_rate = 0.001
schedule = "cosine"
patience = 3
precision = "fp32"
"""

PIPELINE = """\
tokenizer = "pipeline"
seed = 0
validation_fraction = 0.05

[encoder]
tokenizer = "drqvae"
levels = 1
codebook_size = 8
network = {hidden = [8], latent = 4, pretrain_epochs = 1}
training = {epochs = 1, batch_size = 16}

[quantizer]
tokenizer = "opq"
n_codebooks = 2
codebook_size = 8
rotation_iter = 2
kmeans = {max_iter = 3}
"""
