"""Error on items that no fit has seen: joint refinement beside faiss' residual quantizer.

    python benchmarks/refinement.py ../shared/data --sets beauty toys sports --seeds 3
    python benchmarks/refinement.py ../shared/data --sets union --codes 4096

A twentieth of the items, another one for each seed, is kept from every side. semid keeps a
twentieth of what is left for its ridge and the end of its rounds; faiss (beam 5, its other settings
as they are) learns from all of it. Codes cost the same number of bits on all sides. Errors are
relative to the variance of the kept items. Every fit is a line of ``runs.jsonl`` and is not
repeated, for faiss takes twenty minutes on the union. The tables go to ``refinement.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

import semid
from common import RESULTS, markdown
from semid.data.source import EmbeddingSource
from semid.reproduce.intervals import paired_difference
from semid.reproduce.ledger import Ledger, origin, read_runs

SETS = {name: f"amazon2014_{name}" for name in ("beauty", "toys", "sports")} | {
    "union": "union_catalogue"
}
LOG = "interactions.parquet"
LEVELS = 3
FAISS = "faiss, beam 5"
Row = dict[str, Any]
Fitted = Callable[[np.ndarray], np.ndarray]
"""Returns what codes make of rows."""


def by_faiss(train: EmbeddingSource, codes: int, seed: int, log: Path) -> Fitted:
    """Fit faiss' residual quantizer with beam 5."""
    rows = train.rows(np.arange(len(train)))
    model = faiss.ResidualQuantizer(rows.shape[1], LEVELS, int(np.log2(codes)))
    model.max_beam_size = 5
    model.cp.seed = seed + 1
    model.train(rows)
    return lambda test: model.decode(model.compute_codes(test))


def by_local_search(train: EmbeddingSource, codes: int, seed: int, log: Path) -> Fitted:
    """Fit faiss' local search quantizer (LSQ++): additive codes without an order of levels."""
    rows = train.rows(np.arange(len(train)))
    model = faiss.LocalSearchQuantizer(rows.shape[1], LEVELS, int(np.log2(codes)))
    model.random_seed = seed + 1
    model.train(rows)
    return lambda test: model.decode(model.compute_codes(test))


def by_semid(
    make: Callable[..., Any],
    train: EmbeddingSource,
    codes: int,
    seed: int,
    log: Path,
    *,
    behavior: bool = False,
) -> Fitted:
    """Fit a tokenizer, with behavior if it takes some."""
    tok = make(codebook_size=codes, seed=seed)
    tok.fit(train, interactions=semid.read_interactions(log) if behavior else None)
    return lambda test: tok.decode(tok.encode(test).codes)


SIDES: dict[str, Callable[[EmbeddingSource, int, int, Path], Fitted]] = {
    FAISS: by_faiss,
    "faiss, LSQ": by_local_search,
    "RQKMeans": partial(by_semid, semid.RQKMeans),
    "RQKMeans, beam 5": partial(by_semid, partial(semid.RQKMeans, beam_width=5)),
    "RQKMeans, trained with beam 5": partial(
        by_semid, partial(semid.RQKMeans, beam_width=5, train_with_beam=True)
    ),
    "BARQ, no behavior": partial(by_semid, partial(semid.BARQ, behavior_weight=0.0)),
    "BARQ": partial(by_semid, semid.BARQ, behavior=True),
}


def measure(place: Path, side: str, codes: int, seed: int) -> Row:
    """Keep a twentieth of the items from a side's fit; return the error on them, and its cost."""
    items = semid.open_embeddings(place / "embeddings.f16.npy", ids=place / "items.parquet")
    kept = np.zeros(len(items), dtype=bool)
    kept[np.random.default_rng(seed).permutation(len(items))[: len(items) // 20]] = True
    test = items.rows(np.flatnonzero(kept))
    began = time.process_time()
    fitted = SIDES[side](items.subset(~kept), codes, seed, place / LOG)
    spent = time.process_time() - began
    spread = np.square(test - test.mean(0), dtype=np.float64).sum()
    error = float(np.square(fitted(test) - test, dtype=np.float64).sum() / spread)
    return {"error": error, "fit_cpu_seconds": spent, "faiss": faiss.__version__}


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return mean errors and paired differences to faiss, a row a side."""
    base = {r["seed"]: r["error"] for r in rows if r["side"] == FAISS}
    found = []
    for side in (side for side in SIDES if any(r["side"] == side for r in rows)):
        own = {r["seed"]: r["error"] for r in rows if r["side"] == side}
        shares = [1 - own[seed] / base[seed] for seed in sorted(own.keys() & base.keys())]
        below = ""
        if side != FAISS and shares:
            below = f"{np.mean(shares):.1%}"
            if len(shares) > 1:
                gap = paired_difference(shares, [0.0] * len(shares))
                below += f" ± {(gap.high - gap.low) / 2:.1%}"
        spent = [r["fit_cpu_seconds"] for r in rows if r["side"] == side]
        cells = {"splits": len(own), "error": float(np.mean(list(own.values()))), "below": below}
        found.append({"side": side, **cells, "fit CPU s": float(np.mean(spent))})
    return found


def main() -> None:
    """Run what is missing, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data sets")
    parser.add_argument("--sets", nargs="+", default=["beauty", "toys", "sports"], choices=SETS)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "refinement")
    given = parser.parse_args()
    ledger = Ledger(given.out)
    for name in given.sets:
        place = given.data / SETS[name]
        sides = [side for side in given.sides if side != "BARQ" or (place / LOG).exists()]
        for seed, side in ((seed, side) for seed in range(given.seeds) for side in sides):
            what: Row = {"data": name, "codes": given.codes, "side": side, "seed": seed}
            key = ", ".join(map(str, what.values()))
            with ledger.claim(key) as mine:
                if mine:
                    row = {"key": key, **what, **measure(place, side, given.codes, seed)}
                    ledger.add({**row, **origin()})
                    print(row, flush=True)
    rows = read_runs(ledger.path)
    text = [
        "# Error on items that no fit has seen",
        "",
        "`below` is how much lower than faiss' the error is, paired by split, with the half width "
        "of its 95 % interval.",
    ]
    measured = {(row["data"], row["codes"]) for row in rows}
    for name, codes in sorted(measured, key=lambda one: (list(SETS).index(one[0]), one[1])):
        own = [row for row in rows if (row["data"], row["codes"]) == (name, codes)]
        text += ["", f"## {name}, {LEVELS} x {codes}", "", markdown(summary(own))]
    (given.out / "refinement.md").write_text("\n".join(text) + "\n", encoding="utf8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
