"""Gaussian mixtures beside K-means where noise differs between columns and clusters.

    python benchmarks/anisotropic.py --noise 0.5 1 2

Rows are clusters with a noise of their own in each column: standard deviations are drawn from a
log-normal distribution, whose width is the anisotropy (0: all the same). One level with as many
codes as there are clusters. `agreement` is the adjusted mutual information of codes and clusters,
`error` the relative error, and `flips` the share of codes that change when the row gets a tenth of
its cluster's noise once more, all on rows that no fit has seen. Means over seeds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score

import semid
from common import save


def catalogue(
    anisotropy: float, *, clusters: int, dim: int, rows: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, their clusters, and the standard deviations of their noise."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(clusters, dim))
    spread = np.exp(anisotropy * generator.normal(size=(clusters, dim)))
    spread /= np.sqrt(np.square(spread).mean(axis=1, keepdims=True))  # the same power everywhere
    labels = generator.integers(0, clusters, rows)
    noise = spread[labels]
    x = centers[labels] + noise * generator.normal(size=(rows, dim))
    return x.astype(np.float32), labels, noise


def main() -> None:
    """Fit all sides on the same rows, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--clusters", type=int, default=32)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    common = {"levels": 1, "codebook_size": given.clusters, "threads": 1}
    sides = {
        "RQKMeans": lambda seed: semid.RQKMeans(**common, seed=seed),
        "RQGMM, spherical": lambda seed: semid.RQGMM(**common, seed=seed, covariance="spherical"),
        "RQGMM, diagonal": lambda seed: semid.RQGMM(**common, seed=seed),
    }
    rows: list[dict[str, Any]] = []
    for anisotropy in given.noise:
        for name, make in sides.items():
            figures = []
            for seed in range(given.seeds):
                x, labels, noise = catalogue(
                    anisotropy,
                    clusters=given.clusters,
                    dim=given.dim,
                    rows=2 * given.rows,
                    seed=seed,
                )
                train, test = x[: given.rows], x[given.rows :]
                began = time.process_time()
                model = make(seed).fit(train)
                spent = time.process_time() - began
                codes = model.encode(test).codes[:, 0]
                again = np.random.default_rng(seed).normal(size=test.shape)
                moved = test + 0.1 * noise[given.rows :] * again
                error = np.square(test - model.decode(codes[:, None])).sum()
                figures.append(
                    (
                        adjusted_mutual_info_score(labels[given.rows :], codes),
                        error / np.square(test - test.mean(0)).sum(),
                        (model.encode(moved.astype(np.float32)).codes[:, 0] != codes).mean(),
                        spent,
                    )
                )
            means = map(float, np.mean(figures, axis=0))
            names = ("agreement", "error", "flips", "fit CPU s")
            rows.append(
                {"anisotropy": anisotropy, "side": name, **dict(zip(names, means, strict=True))}
            )
    save(
        "anisotropic",
        rows,
        settings=vars(given),
        packages=["scikit-learn"],
        note="See the head of `benchmarks/anisotropic.py` for the columns.",
    )


if __name__ == "__main__":
    main()
