"""Every tokenizer on real catalogues: reconstruction, usage, dead codes, collisions, time.

    python benchmarks/tokenizers.py ../shared/data --sets beauty toys sports --seeds 3

One JSON line a fit is appended to the output file as soon as it is done; fits that are there
already are skipped, so a run that was stopped continues by the same command. At the end the lines
are shown as Markdown tables. ``--models`` keeps the fitted models for ``semid report`` and
``semid compare``; ``--epochs`` shortens the training of the neural ones. scikit-learn's residual
K-means on the same training rows stands beside ours; perplexities are never raised by constraining
the assignment.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans

import semid
from semid.data.ids import held_out_mask
from semid.data.interactions import Interactions
from semid.health import collisions, usage
from semid.reproduce.datasets import Opened
from semid.reproduce.recipe import DataSet
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.stored import HELD_OUT_SALT
from semid.training.options import resolve_precision

SETS = {
    "beauty": "amazon2014_beauty",
    "toys": "amazon2014_toys",
    "sports": "amazon2014_sports",
    "union": "union_catalogue",
}
LOGS = {"union": ("amazon2014_beauty", "amazon2014_toys", "amazon2014_sports")}
"""Whose interactions a set joins, where they are not its own."""
Row = dict[str, Any]
Made = tuple[Callable[[int], Tokenizer], dict[str, Any]]


def methods(codes: int, log: Interactions | None, epochs: int | None) -> dict[str, Made]:
    """Return name -> seed -> tokenizer and further arguments of its fit, at default settings."""
    training = {} if epochs is None else {"training": semid.TrainOptions(epochs=epochs)}

    def neural(kind: Callable[..., Tokenizer], **settings: Any) -> Callable[[int], Tokenizer]:
        return lambda s: kind(codebook_size=codes, seed=s, **settings, **training)

    made: dict[str, Made] = {
        "RQKMeans": (lambda s: semid.RQKMeans(codebook_size=codes, seed=s), {}),
        "RQKMeans, 10 trials": (  # as many as scikit-learn draws at 4096 codes
            lambda s: semid.RQKMeans(codebook_size=codes, seed=s, kmeans={"n_local_trials": 10}),
            {},
        ),
        "RQVAE": (neural(semid.RQVAE), {}),
        "RQPVAE": (neural(semid.RQPVAE), {}),
        "DRQVAE": (neural(semid.DRQVAE), {}),
        "VQVAE": (neural(semid.VQVAE), {}),
    }
    for count in (1, 2, 3, 7):
        made[f"MoCVAE {count}x"] = (neural(semid.MoCVAE, n_codebooks=count), {})
    if log is not None:
        made["DRQVAE+CL"] = (neural(semid.DRQVAE, contrastive_weight=0.1), {"interactions": log})
    return made


def summarize(codes: np.ndarray, size: int) -> Row:
    """Return usage and collisions of codes ``(items, levels)``."""
    found, used = collisions(codes), usage(codes, size)
    return {
        "perplexity": [round(u.perplexity, 2) for u in used],
        "dead": [u.dead for u in used],
        "one_minus_unique": found.collision_rate,
        "shared": found.colliding_item_rate,
    }


def fit_ours(x: np.ndarray, ids: Path, tokenizer: Tokenizer, extra: dict[str, Any]) -> Row:
    """Fit one of ours and measure it."""
    began, cpu = time.perf_counter(), time.process_time()
    tokenizer.fit(x, ids=ids, **extra)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    report = tokenizer.report
    assert report is not None
    return {
        "error_trained": report.training_error,
        "error_held_out": report.validation_error,
        **summarize(tokenizer.encode(x).codes, tokenizer.codebook_sizes[0]),
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def fit_sklearn(x: np.ndarray, held: np.ndarray, codes: int, seed: int) -> Row:
    """Residual K-means by scikit-learn on the same training rows."""
    began, cpu = time.perf_counter(), time.process_time()
    residual, labels = x.copy(), []
    for level in range(3):
        model = KMeans(codes, n_init=1, max_iter=25, tol=0, random_state=seed + 100 * level)
        model.fit(residual[~held])
        labels.append(model.predict(residual))
        residual = residual - model.cluster_centers_[labels[-1]]
    variance = ((x[~held] - x[~held].mean(0)) ** 2).sum(1).mean()
    errors = (residual**2).sum(1)
    return {
        "error_trained": float(errors[~held].mean() / variance),
        "error_held_out": float(errors[held].mean() / variance),
        **summarize(np.stack(labels, 1), codes),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def tables(rows: list[Row]) -> str:
    """Return one Markdown table a data set and codebook size, mean and spread over seeds."""
    out = []
    groups = dict.fromkeys((r["data"], r["codes"], r.get("epochs")) for r in rows)
    for data, codes, epochs in groups:
        own = [r for r in rows if (r["data"], r["codes"], r.get("epochs")) == (data, codes, epochs)]
        out += [
            f"\n**{data}, K = {codes}**" + (f", {epochs} epochs\n" if epochs else "\n"),
            "| tokenizer | seeds | error trained | error held out | perplexity a level "
            "| dead codes | 1 - unique/N | in shared buckets | CPU s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for method in dict.fromkeys(r["method"] for r in own):
            fits = [r for r in own if r["method"] == method]
            levels = np.mean([r["perplexity"] for r in fits], axis=0)
            cells = [spread([r[name] for r in fits]) for name in FIGURES[:2]]
            cells += [" / ".join(f"{p:.0f}" for p in levels)]
            cells += [str(max(sum(r["dead"]) for r in fits))]
            cells += [spread([r[name] for r in fits]) for name in FIGURES[2:]]
            taken: dict[str, list[float]] = {}
            for r in fits:
                taken.setdefault(r.get("precision", "fp32"), []).append(r["cpu_seconds"])
            cells += [" / ".join(f"{np.mean(seen):.0f} {name}" for name, seen in taken.items())]
            out.append(f"| {method} | {len(fits)} | " + " | ".join(cells) + " |")
    return "\n".join(out)


FIGURES = ("error_trained", "error_held_out", "one_minus_unique", "shared")


def spread(values: list[float]) -> str:
    """Return the mean, with the standard deviation where there are several."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def read(path: Path) -> list[Row]:
    """Return the fits done so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of data sets")
    parser.add_argument("--sets", nargs="+", default=["beauty", "toys", "sports"], choices=SETS)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of the neural tokenizers; default: their own")
    parser.add_argument("--models", type=Path, help="folder to keep the fitted models in")
    parser.add_argument("--only", nargs="+", help="names of tokenizers, as in the table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tokenizers.jsonl"))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": resolve_precision("auto", torch.device("cpu")),
    }
    for seed in range(given.seeds):
        for name in given.sets:
            folder = given.data / SETS[name]
            x = np.load(folder / "embeddings.f16.npy").astype(np.float32)
            ids = folder / "items.parquet"
            held = held_out_mask(semid.open_embeddings(x, ids=ids).ids, 0.05, salt=HELD_OUT_SALT)
            names = LOGS.get(name, (SETS[name],))
            logs = {n: given.data / n / "interactions.parquet" for n in names}
            spec = DataSet(name=name, folder=SETS[name], logs=LOGS.get(name, ()))
            made = methods(given.codes, Opened(spec, folder, logs).log(), given.epochs)
            for method in ["scikit-learn", *made]:
                key = {"data": name, "codes": given.codes, "method": method, "seed": seed}
                key["epochs"] = given.epochs
                done = any(all(r.get(k) == v for k, v in key.items()) for r in read(given.out))
                if done or (given.only and method not in given.only):
                    continue
                if method == "scikit-learn":
                    row = fit_sklearn(x, held, given.codes, seed)
                else:
                    make, extra = made[method]
                    tokenizer = make(seed)
                    row = fit_ours(x, ids, tokenizer, extra)
                    if given.models is not None:
                        title = f"{name}-{method}-{seed}".replace(" ", "-").lower()
                        tokenizer.save(given.models / title, overwrite=True)
                with given.out.open("a", encoding="utf8") as file:
                    file.write(json.dumps({**key, **row, **machine}) + "\n")
    print(tables(read(given.out)))


if __name__ == "__main__":
    main()
