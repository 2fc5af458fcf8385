"""Training of SASRec beside RecBole's on the same log: targets a second, and peak memory.

    python benchmarks/retrieval_peers.py ../shared/data/amazon2014_beauty --peers FOLDER/bin/python

Both train SASRec of width 64 with two layers, two heads and a softmax over all items on histories
of up to 50 items, in turn, each in a process of its own with one thread and its own default batch:
128 histories here, 2,048 prefixes of histories there. What is counted is the same on both sides:
items that were predicted in training. The peer's environment holds the same torch and ``recbole``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH, LAYERS, HEADS, LENGTH = 64, 2, 2, 50
TARGETS = 20_000
"""Items predicted in a turn at least."""


def semid_side(log: str) -> Callable[[], int]:
    """Return a function that trains one batch of ours and returns the targets it had."""
    import torch

    from semid.recommenders.retrieval.data import prepare_retrieval_data
    from semid.recommenders.retrieval.networks import SASRec, SASRecOptions
    from semid.recommenders.retrieval.training import TRAINING, RetrievalTask
    from semid.training.options import TrainOptions

    data = prepare_retrieval_data(log, ties="file")
    options = SASRecOptions(
        width=WIDTH, layers=LAYERS, heads=HEADS, max_length=LENGTH, loss="full", dropout=0.5
    )
    model = SASRec(data.items, options).train()
    training = TrainOptions.of(None, defaults=TRAINING)
    task = RetrievalTask(
        model, data, training, max_length=LENGTH, seed=0, device=torch.device("cpu")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def batches() -> Any:
        for epoch in range(10**6):
            yield from task.batches(epoch, 0)

    stream = batches()

    def step() -> int:
        batch, _ = next(stream)
        optimizer.zero_grad(set_to_none=True)
        model(batch).loss.backward()
        optimizer.step()
        return len(batch.targets)

    return step


def recbole_side(log: str) -> Callable[[], int]:
    """Return a function that trains one batch of RecBole's."""
    import pandas as pd
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer

    folder = Path(tempfile.mkdtemp(prefix="recbole-"))
    os.chdir(folder)  # the trainer writes logs where it is started
    (folder / "log").mkdir()
    table = pd.read_csv(log)
    table.columns = ["user_id:token", "item_id:token", "position:float"]
    table.to_csv(folder / "log" / "log.inter", sep="\t", index=False)
    settings = {
        "data_path": str(folder),
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "TIME_FIELD": "position",
        "load_col": {"inter": ["user_id", "item_id", "position"]},
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "hidden_size": WIDTH,
        "inner_size": 4 * WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "use_gpu": False,
        "state": "ERROR",
        "show_progress": False,
    }
    config = Config(model="SASRec", dataset="log", config_dict=settings)
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    model = SASRec(config, train.dataset).train()
    optimizer = Trainer(config, model).optimizer

    def batches() -> Any:
        while True:
            yield from train

    stream = batches()

    def step() -> int:
        batch = next(stream)
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        optimizer.step()
        return len(batch)

    return step


def serve(side: str, log: str) -> None:
    """Train a turn for each line of standard input, and answer with what it took."""
    import torch

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = {"semid": semid_side, "recbole": recbole_side}[side](log)
    print("ready", flush=True)
    for _ in sys.stdin:
        began, targets = time.process_time(), 0
        while targets < TARGETS:
            targets += step()
        took = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = {"targets": targets, "cpu_s": took, "peak_mb": peak / 1024}
        print("took " + json.dumps({**answer, "start_mb": before / 1024}), flush=True)


class Side:
    """A process that trains when it is told to."""

    def __init__(self, python: str, name: str, log: str, path: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--serve", name, log],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self.answer("ready")

    def answer(self, word: str) -> str:
        """Return what follows a word; libraries print notices of their own between."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line[len(word) :]
        raise RuntimeError("a side ended early")

    def turn(self) -> dict[str, float]:
        """Train a turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.answer("took "))
        return found


def main() -> None:
    """Train both sides in turn and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder with interactions.parquet")
    parser.add_argument("--peers", type=Path, help="Python of an environment with recbole")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "LOG"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
        return
    import numpy as np

    from common import save
    from semid.data.interactions import read_interactions

    read = read_interactions(given.data / "interactions.parquet", rating_column="", ties="file")
    rows = read.by_user()
    users, items = read.users[rows], read.items[rows]
    with tempfile.TemporaryDirectory() as folder:
        # One log for both, in the order that both keep.
        log = Path(folder) / "log.csv"
        table = np.stack([users, items, np.arange(len(users))], 1)
        head = "user_id,item_id,position"
        np.savetxt(log, table, fmt="u%d,i%d,%d", header=head, comments="")
        ours = os.environ.get("PYTHONPATH", "")
        sides = {"semid": Side(sys.executable, "semid", str(log), ours)}
        if given.peers:
            sides["recbole"] = Side(str(given.peers), "recbole", str(log), "")
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for turn in range(given.turns + 1):
            for name, side in sides.items():
                found = side.turn()
                turns[name] += [found] if turn else []
    speeds = {n: [t["targets"] / t["cpu_s"] for t in found] for n, found in turns.items()}
    results = [
        {
            "side": name,
            "targets per CPU s": float(np.median(speeds[name])),
            "least": min(speeds[name]),
            "most": max(speeds[name]),
            "times the peer": float(np.median(speeds[name]) / np.median(speeds[[*sides][-1]])),
            "peak MB": found[-1]["peak_mb"],
            "MB above start": found[-1]["peak_mb"] - found[-1]["start_mb"],
        }
        for name, found in turns.items()
    ]
    save(
        "retrieval-peers",
        results,
        settings={"data": given.data.name, "turns": given.turns, "targets a turn": TARGETS},
        packages=["recbole"],
        note="Training of SASRec (width 64, 2 layers, full softmax), one thread, in turn.",
    )


if __name__ == "__main__":
    main()
