"""Training with a beam: `RQKMeans` beside faiss' `ResidualQuantizer`, in turn, at equal bits.

    python benchmarks/beam_training.py --codes 256 1024

All sides learn from the same rows with one thread, a beam of 5 and at most 25 Lloyd iterations
per level. They are compared by the error on a twentieth of the items that none has seen. The time
is that of the whole fit; semid's includes its report, which encodes every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

import semid
from common import in_turn, save

LEVELS, BEAM = 3, 5


def by_faiss(rows: np.ndarray, codes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Fit faiss' residual quantizer; return what its codes make of rows."""
    model = faiss.ResidualQuantizer(rows.shape[1], LEVELS, int(np.log2(codes)))
    model.max_beam_size = BEAM
    model.train(rows)
    return lambda x: model.decode(model.compute_codes(x))


def by_semid(rows: np.ndarray, codes: int, **options: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Fit residual K-means; return what its codes make of rows."""
    settings = {"levels": LEVELS, "codebook_size": codes, "beam_width": BEAM, "threads": 1}
    model = semid.RQKMeans(**settings, validation_fraction=0, **options).fit(rows)
    return lambda x: model.decode(model.encode(x))


def main() -> None:
    """Run the sides in turn, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    data = Path(__file__).parents[2] / "shared" / "data" / "amazon2014_beauty"
    parser.add_argument("--data", type=Path, default=data, help="folder with embeddings.f16.npy")
    parser.add_argument("--codes", type=int, nargs="+", default=[256])
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    x = np.load(given.data / "embeddings.f16.npy").astype(np.float32)
    held_out = np.random.default_rng(0).permutation(len(x)) < len(x) // 20
    train, test = x[~held_out], x[held_out]
    spread = float(np.square(test - train.mean(0), dtype=np.float64).sum())
    rows = []
    for codes in given.codes:
        sides = {
            "faiss ResidualQuantizer": partial(by_faiss, train, codes),
            "RQKMeans": partial(by_semid, train, codes),
            "RQKMeans, train_with_beam": partial(by_semid, train, codes, train_with_beam=True),
        }
        timings = in_turn(sides, repeats=given.repeats)
        base = timings["faiss ResidualQuantizer"]
        for name, timing in timings.items():
            error = float(np.square(timing.result(test) - test, dtype=np.float64).sum()) / spread
            rows.append({"codes": codes, "side": name, "error": error, **timing.figures(base)})
    save(
        "beam-training",
        rows,
        settings={"data": given.data.name, "levels": LEVELS, "beam": BEAM, "threads": 1},
        packages=["faiss-cpu"],
        note="`error` is the relative error on items that no side has seen; ratios (`_x`) are to "
        "faiss.",
    )


if __name__ == "__main__":
    main()
