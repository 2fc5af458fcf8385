"""Error on items that no fit has seen: joint refinement beside faiss' residual quantizer.

    python benchmarks/refinement.py ../shared/data --sets beauty toys sports --seeds 5

A twentieth of the items, another one for each seed, is kept from every side. semid keeps a
twentieth of what is left for its ridge and the end of its rounds; faiss (beam 5, its other settings
as they are) learns from all of it. Codes cost the same number of bits on all sides. Errors are
relative to the variance of the kept items.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

import semid
from common import save
from semid.data.source import EmbeddingSource
from semid.ranking.paired import paired_difference

SETS = {name: f"amazon2014_{name}" for name in ("beauty", "toys", "sports")} | {
    "union": "union_catalogue"
}
LEVELS = 3
FAISS = "faiss, beam 5"
Decoded = tuple[Any, float]


def by_faiss(train: EmbeddingSource, test: np.ndarray, codes: int, seed: int) -> Decoded:
    """Fit faiss' residual quantizer with beam 5; return what it makes of ``test``."""
    rows = train.rows(np.arange(len(train)))
    began = time.process_time()
    model = faiss.ResidualQuantizer(rows.shape[1], LEVELS, int(np.log2(codes)))
    model.max_beam_size = 5
    model.cp.seed = seed + 1
    model.train(rows)
    spent = time.process_time() - began
    return model.decode(model.compute_codes(test)), spent


def by_semid(tok: Any, train: EmbeddingSource, test: np.ndarray, log: Any = None) -> Decoded:
    """Fit a tokenizer; return what it makes of ``test``."""
    began = time.process_time()
    tok.fit(train, interactions=log)
    spent = time.process_time() - began
    return tok.decode(tok.encode(test).codes), spent


def one_split(items: EmbeddingSource, log: Path, codes: int, seed: int) -> dict[str, Decoded]:
    """Keep a twentieth of the items and let every side decode them; errors and CPU seconds."""
    kept = np.zeros(len(items), dtype=bool)
    kept[np.random.default_rng(seed).permutation(len(items))[: len(items) // 20]] = True
    train, test = items.subset(~kept), items.rows(np.flatnonzero(kept))
    shared: dict[str, Any] = {"codebook_size": codes, "seed": seed}
    found = {
        FAISS: by_faiss(train, test, codes, seed),
        "RQKMeans": by_semid(semid.RQKMeans(**shared), train, test),
        "BARQ, no behaviour": by_semid(semid.BARQ(behaviour_weight=0.0, **shared), train, test),
    }
    if log.exists():
        found["BARQ"] = by_semid(semid.BARQ(**shared), train, test, semid.read_interactions(log))
    spread = np.square(test - test.mean(0), dtype=np.float64).sum()
    return {
        side: (float(np.square(decoded - test, dtype=np.float64).sum() / spread), spent)
        for side, (decoded, spent) in found.items()
    }


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data sets")
    parser.add_argument("--sets", nargs="+", default=["beauty", "toys", "sports"], choices=SETS)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    runs = []
    for name in given.sets:
        place = given.data / SETS[name]
        items = semid.open_embeddings(place / "embeddings.f16.npy", ids=place / "items.parquet")
        for seed in range(given.seeds):
            found = one_split(items, place / "interactions.parquet", given.codes, seed)
            for side, (error, spent) in found.items():
                run = {"data": name, "side": side, "seed": seed, "error": error, "cpu_s": spent}
                runs.append(run)
                print(run, flush=True)
    save(
        f"refinement-{given.codes}",
        summary(runs),
        settings={k: v for k, v in vars(given).items() if k != "data"},
        packages=("faiss-cpu",),
        note="`below` is how much lower than faiss the error is, paired by seed, with the half "
        "width of its 95 % interval.",
    )


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean errors and paired differences to faiss, a row a data set and side."""
    rows = []
    for data in dict.fromkeys(run["data"] for run in runs):
        own = [run for run in runs if run["data"] == data]
        errors = {
            side: [r["error"] for r in own if r["side"] == side]
            for side in dict.fromkeys(r["side"] for r in own)
        }
        base = np.array(errors[FAISS])
        for side, found in errors.items():
            row: dict[str, Any] = {"data": data, "side": side, "error": float(np.mean(found))}
            shares = 1 - np.array(found) / base
            row["below"] = "" if side == FAISS else f"{shares.mean():.1%}"
            if side != FAISS and len(found) > 1:
                gap = paired_difference(list(shares), [0.0] * len(shares))
                row["below"] += f" ± {(gap.high - gap.low) / 2:.1%}"
            row["fit cpu_s"] = float(np.mean([r["cpu_s"] for r in own if r["side"] == side]))
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
