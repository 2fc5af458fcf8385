"""A ranking epoch beside FuxiCTR and DeepCTR-Torch, and beside its matrix products alone.

    python benchmarks ranking --epochs 3
    python benchmarks ranking --parity

200 thousand rows of 8 categorical fields, batch 8192, width 16, no batch norm, no dropout: the same
work for all sides. ``floor`` runs the perceptron's matrix products (and DCNv2's) with random inputs
and fused Adam and nothing else. Rows are drawn once; every side reads the same file or arrays.

The peers live in an environment of their own, since they pin old packages: this program makes it
(``--peers FOLDER``, kept for the next time) with pip and talks to it through files. Without it, or
where it cannot be made, their rows say "not installed" and the rest runs.

``--parity`` is no timing: FuxiCTR and semid train DeepFM and DCNv2 with the same settings on rows
with a planted signal, five seeds each, and their test AUCs stand side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import in_turn, save
from semid.data.ids import ItemIds
from semid.progress import QuietProgress
from semid.recommenders.ranking.metrics import auc, predict_logits
from semid.recommenders.ranking.network import RankerConfig, make_network
from semid.recommenders.ranking.schema import MemoryBatches, RankingRows, Schema, Vocabulary
from semid.recommenders.ranking.training import RankingTask, rank_options
from semid.training.loop import Evaluation, train

HERE = Path(__file__).parent
PEERS = ("fuxictr", "h5py", "deepctr-torch")
FIELDS, BATCH, WIDTH = 8, 8192, 16
SIZES = (20_000, 10_000, 1_000, 500, 200, 50, 20, 10)


def draw(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows ``(rows, fields)`` from 1 on, long-tailed, and labels with pairwise effects."""
    generator = np.random.default_rng(seed)
    x = np.stack([1 + (size * generator.random(rows) ** 2.5).astype(np.int64) for size in SIZES], 1)
    factors = [np.random.default_rng(9).normal(size=(size + 1, 4)) for size in SIZES]
    e = np.stack([f[column] for f, column in zip(factors, x.T, strict=True)], 1)
    logit = 0.25 * ((e.sum(1) ** 2 - (e**2).sum(1)).sum(1) / 2) / 4
    y = generator.random(rows) < 1 / (1 + np.exp(-logit))
    return x, y.astype(np.float32)


def schema() -> Schema:
    """Return the fields: a user, an item, and six context columns."""
    words = [Vocabulary(ItemIds.range(size)) for size in SIZES]
    return Schema(
        users=words[0],
        items=words[1],
        id_rows=np.arange(SIZES[1] + 1),
        id_size=SIZES[1] + 1,
        context={f"c{n}": word for n, word in enumerate(words[2:])},
    )


def rows_of(x: np.ndarray, y: np.ndarray) -> RankingRows:
    """Return rows as semid holds them."""
    wide = torch.from_numpy(x.astype(np.int32))
    return RankingRows(
        user=wide[:, 0].contiguous(),
        item=wide[:, 1].contiguous(),
        label=torch.from_numpy(y),
        context=wide[:, 2:].contiguous(),
        dense=torch.empty((len(y), 0)),
        history=None,
        person=wide[:, 0].contiguous(),
    )


class Ours:
    """semid's loop, an epoch a call, without evaluation (the peers' epochs have none either)."""

    def __init__(self, model: str, hidden: tuple[int, ...], x: np.ndarray, y: np.ndarray) -> None:
        options = {"hidden": hidden, "dropout": 0.0, "batch_norm": False}
        self.network = make_network(
            schema(), None, RankerConfig(model=model, width=WIDTH, options=options)
        )
        self.rows = rows_of(x, y)
        self.options = rank_options(
            {"epochs": 1, "batch_size": BATCH, "precision": "fp32", "patience": None}
        )

    def __call__(self) -> None:
        """Train an epoch."""
        source = MemoryBatches(self.rows, batch_size=BATCH, seed=0)
        task = RankingTask(self.network, source, self.rows)
        task.evaluate = lambda epoch: Evaluation(0.0)  # type: ignore[method-assign]
        train(task, self.options, seed=0, progress=QuietProgress())


class Floor:
    """The model's matrix products and Adam, on random inputs."""

    def __init__(self, model: str, hidden: tuple[int, ...], rows: int) -> None:
        size = FIELDS * WIDTH
        widths = [size, *hidden, 1]
        self.deep = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
        self.cross = nn.ModuleList(
            nn.Linear(size, size) for _ in range(3 if model == "dcnv2" else 0)
        )
        parameters = [*self.deep.parameters(), *self.cross.parameters()]
        self.optimizer = torch.optim.Adam(parameters, fused=True)
        self.steps = round(rows / BATCH)
        self.x = torch.randn(BATCH, size, requires_grad=True)

    def __call__(self) -> None:
        """Run an epoch."""
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            total = self.deep(self.x).sum()
            for layer in self.cross:
                total = total + layer(self.x).sum()
            total.backward()
            self.optimizer.step()


class Peer:
    """A side that runs in the peers' environment, started once, told to run an epoch by a line."""

    def __init__(
        self, python: Path, name: str, model: str, hidden: tuple[int, ...], file: Path
    ) -> None:
        self.name = name
        self.seconds: list[float] = []  # CPU seconds of its epochs
        self.process = subprocess.Popen(
            [str(python), str(HERE / "ranking_peers.py"), name, model, json.dumps(hidden), file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ""},
        )
        self._answer("ready")

    def __call__(self) -> None:
        """Run an epoch and note the CPU seconds that the peer took."""
        assert self.process.stdin is not None
        self.process.stdin.write("epoch\n")
        self.process.stdin.flush()
        self.seconds.append(float(self._answer("took ")))

    def _answer(self, word: str) -> str:
        """Return what follows ``word``; peers print notices of their own between."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line[len(word) :]
        raise RuntimeError(f"{self.name} ended before it said '{word.strip()}'")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment(folder: Path | None) -> Path | None:
    """Return the Python of the peers' environment, making it if it is not there."""
    if folder is None:
        return None
    python = folder / "bin" / "python"
    if not python.exists():
        # torch comes from this environment: the peers need the same one for a fair run.
        venv.create(folder, with_pip=True, system_site_packages=False)
        site = next((folder / "lib").glob("python*")) / "site-packages"
        own = Path(torch.__file__).parents[1]
        (site / "own.pth").write_text(f"{own}\n", encoding="utf8")
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PEERS]
        if subprocess.run(command, check=False).returncode:
            return None
    return python


def timings(given: argparse.Namespace, python: Path | None) -> list[dict[str, Any]]:
    """Time an epoch of every side."""
    x, y = draw(given.rows, 0)
    result = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npz"
        np.savez(file, x=x, y=y)
        for model, hidden in (("deepfm", (400, 400)), ("dcnv2", (400, 400)), ("deepfm", (64, 32))):
            sides: dict[str, Any] = {
                "floor": Floor(model, hidden, given.rows),
                "semid": Ours(model, hidden, x, y),
            }
            peers = {}
            for name in ("fuxictr-memory", "fuxictr-npz", "deepctr") if python else ():
                try:
                    peers[name] = Peer(python, name, model, hidden, file)
                except (RuntimeError, OSError) as error:
                    print(f"{name}: {error}")
            taken = in_turn({**sides, **peers}, repeats=given.epochs)
            ours = float(np.median(taken["semid"].cpu))
            for name, timing in taken.items():
                # The first epochs of a peer are those of the turn that warms up.
                spent = peers[name].seconds[-given.epochs :] if name in peers else timing.cpu
                seconds = float(np.median(spent))
                result.append(
                    {
                        "model": f"{model} {'-'.join(map(str, hidden))}",
                        "side": name,
                        "cpu_s": seconds,
                        "times_semid": seconds / ours,
                    }
                )
            for peer in peers.values():
                peer.close()
    return result


def parity(given: argparse.Namespace, python: Path | None) -> list[dict[str, Any]]:
    """Train both sides with the same settings and compare their test AUC."""
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for model in ("deepfm", "dcnv2"):
            for seed in range(given.seeds):
                x, y = draw(given.rows, seed)
                cut = int(0.8 * len(y)), int(0.9 * len(y))
                parts = [rows_of(x[a:b], y[a:b]) for a, b in ((0, cut[0]), cut, (cut[1], len(y)))]
                options = {"hidden": (64, 32), "dropout": 0.0, "batch_norm": False}
                architecture = RankerConfig(
                    model=model, width=WIDTH, options=options, init_std=1e-4
                )
                network = make_network(schema(), None, architecture, seed=seed)
                training = rank_options(
                    {"epochs": 20, "batch_size": BATCH, "precision": "fp32", "patience": 2}
                )
                source = MemoryBatches(parts[0], batch_size=BATCH, seed=seed)
                train(
                    RankingTask(network, source, parts[1]),
                    training,
                    seed=seed,
                    progress=QuietProgress(),
                )
                row = {
                    "model": model,
                    "seed": seed,
                    "semid": auc(y[cut[1] :], predict_logits(network, parts[2])),
                    "fuxictr": float("nan"),
                }
                if python:
                    file = Path(folder) / f"{seed}.npz"
                    np.savez(file, x=x, y=y)
                    found = subprocess.run(
                        [
                            str(python),
                            str(HERE / "ranking_peers.py"),
                            "fuxictr-parity",
                            model,
                            "[64, 32]",
                            file,
                            str(seed),
                        ],
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    if found.returncode == 0:
                        row["fuxictr"] = float(found.stdout.split()[-1])
                    else:
                        print(found.stderr[-500:], file=sys.stderr)
                result.append(row)
    return result


def main() -> None:
    """Run the timings or the parity run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=3, help="turns that count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environment")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    python = environment(given.peers)
    settings = {"rows": given.rows, "fields": FIELDS, "batch": BATCH, "threads": given.threads}
    if given.parity:
        note = "Test AUC with the same settings on the same rows; no timing."
        save("ranking-parity", parity(given, python), settings=settings, packages=[], note=note)
    else:
        note = "CPU seconds an epoch, sides in turn, medians; times_semid above 1 is slower."
        save("ranking", timings(given, python), settings=settings, packages=[], note=note)


if __name__ == "__main__":
    main()
