"""Residual K-means: semid, scikit-learn and faiss on the same rows, iterations and restarts.

    python benchmarks/residual_kmeans.py ../shared/data/amazon2014_beauty --codes 256

Reconstruction error, unique ids, items in shared buckets and usage for each seed; the three run
one after another inside each seed, faiss with its own random seeding, all with one restart and
without early stopping. A row is printed as soon as it is known, the table is saved at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from sklearn.cluster import KMeans

import semid
from common import save
from semid.health import collisions, usage

Fit = Callable[[np.ndarray, int, int, int], np.ndarray]


def by_semid(x: np.ndarray, codes: int, seed: int, iterations: int) -> list[np.ndarray]:
    """Return codebooks of three levels."""
    tokenizer = semid.RQKMeans(
        codebook_size=codes,
        seed=seed,
        validation_fraction=0,
        kmeans=semid.KMeansOptions(max_iter=iterations, tol=0.0),
    )
    return list(tokenizer.fit(x).codebooks)


def by_levels(cluster: Fit) -> Callable[[np.ndarray, int, int, int], list[np.ndarray]]:
    """Turn a clusterer into a residual quantizer of three levels."""

    def fit(x: np.ndarray, codes: int, seed: int, iterations: int) -> list[np.ndarray]:
        books, residual = [], x
        for _ in range(3):
            books.append(cluster(residual, codes, seed, iterations))
            residual = residual - books[-1][nearest(residual, books[-1])]
        return books

    return fit


def by_sklearn(x: np.ndarray, codes: int, seed: int, iterations: int) -> np.ndarray:
    """Cluster with greedy k-means++ and Lloyd, one restart."""
    model = KMeans(codes, n_init=1, max_iter=iterations, tol=0, random_state=seed)
    return model.fit(x).cluster_centers_.astype(np.float32)


def by_faiss(x: np.ndarray, codes: int, seed: int, iterations: int) -> np.ndarray:
    """Cluster with random seeding on all rows."""
    model = faiss.Kmeans(
        x.shape[1], codes, niter=iterations, seed=seed + 1, max_points_per_centroid=10**9
    )
    model.train(np.ascontiguousarray(x))
    return model.centroids


def nearest(x: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Return labels by exact search."""
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(np.ascontiguousarray(book))
    return index.search(np.ascontiguousarray(x), 1)[1][:, 0]


def judge(x: np.ndarray, books: list[np.ndarray], codes: int) -> dict[str, float]:
    """Encode greedily and measure; the same code for all."""
    residual, labels = x, []
    for book in books:
        labels.append(nearest(residual, book))
        residual = residual - book[labels[-1]]
    ids = np.stack(labels, 1)
    found = collisions(ids)
    spread = float(((x - x.mean(0)) ** 2).sum())
    return {
        "relative_error": float((residual.astype(np.float64) ** 2).sum()) / spread,
        "collision_rate": found.collision_rate,
        "colliding_item_rate": found.colliding_item_rate,
        "largest_bucket": found.largest_bucket,
        **{f"perplexity_{u.level}": u.perplexity for u in usage(ids, codes)},
        "dead": sum(u.dead for u in usage(ids, codes)),
    }


def main() -> None:
    """Run the comparison, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="folders with embeddings.f16.npy")
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=25)
    given = parser.parse_args()
    fits = {
        "semid": by_semid,
        "scikit-learn": by_levels(by_sklearn),
        "faiss": by_levels(by_faiss),
    }
    rows = []
    for folder in given.folder:
        x = np.load(folder / "embeddings.f16.npy").astype(np.float32)
        for seed in range(given.seeds):
            for name, fit in fits.items():
                began = time.process_time()
                books = fit(x, given.codes, seed, given.iterations)
                seconds = time.process_time() - began
                row = {"data": folder.name, "fit": name, "seed": seed}
                row |= judge(x, books, given.codes)
                row["cpu_seconds"] = seconds
                rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
                print(json.dumps(rows[-1]), flush=True)
    save(
        f"residual_kmeans-{given.codes}",
        rows,
        settings={"codes": given.codes, "seeds": given.seeds, "iterations": given.iterations},
        packages=("faiss-cpu", "scikit-learn"),
        note="Three levels, every row trained on; errors are relative to the rows' variance.",
    )


if __name__ == "__main__":
    main()
