"""K-means to equal quality: semid against faiss, SuperKMeans and scikit-learn on real rows.

    python benchmarks/kmeans.py [--rows 50000] [--dim 256] [--codes 4096] [--threads 1]

Rows come from the union catalogue (SEMID_DATA, default ../shared/data). All sides train on the
same rows without sub-sampling, in turn, with the same number of threads. Inertia is measured for
all of them by exact assignment of the same rows, relative to the rows' variance; the table says
who reached faiss's quality with k-means++ seeding and what it cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from common import in_turn, save, union_rows
from semid.quantization.blocks import ArrayBlocks
from semid.quantization.kmeans import KMeansOptions, kmeans
from semid.quantization.nearest import nearest

Array = npt.NDArray[np.float32]


def by_semid(x: Array, codes: int, iterations: int, threads: int, trials: int = 4) -> Array:
    """Greedy k-means++ and exact Lloyd."""
    options = KMeansOptions(max_iter=iterations, tol=0.0, n_local_trials=trials)
    return kmeans(ArrayBlocks(x), codes, seed=0, options=options, threads=threads).centroids


def by_faiss(x: Array, codes: int, iterations: int, plus_plus: bool) -> Array:
    """faiss.Kmeans on all rows, with random or k-means++ seeding."""
    model = faiss.Kmeans(
        x.shape[1], codes, niter=iterations, seed=1, max_points_per_centroid=10**9,
        min_points_per_centroid=1,
    )  # fmt: skip
    if plus_plus:
        model.cp.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    model.train(x)
    found: Array = model.centroids
    return found


def by_superkmeans(x: Array, codes: int, iterations: int, threads: int) -> Array:
    """SuperKMeans in its flat mode on all rows, without its early stop by recall."""
    from superkmeans import SuperKMeans

    model = SuperKMeans(
        codes, x.shape[1], hierarchical=False, iters=iterations, sampling_fraction=1.0,
        max_points_per_cluster=10**9, n_threads=threads, seed=1, early_termination=False,
    )  # fmt: skip
    found: Array = np.asarray(model.train(x))
    return found


def by_sklearn(x: Array, codes: int, iterations: int, threads: int) -> Array:
    """scikit-learn's greedy k-means++ and Lloyd, one restart."""
    with threadpool_limits(threads):
        model = KMeans(codes, n_init=1, max_iter=iterations, tol=0, random_state=0).fit(x)
    found: Array = model.cluster_centers_.astype(np.float32)
    return found


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iterations", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--without", nargs="*", default=[], help="sides to leave out, by prefix")
    given = parser.parse_args()
    x = union_rows(given.dim)[: given.rows].numpy()
    faiss.omp_set_num_threads(given.threads)
    torch.set_num_threads(given.threads)
    codes, threads = given.codes, given.threads
    sides: dict[str, Callable[[], Any]] = {
        "faiss k-means++, 10 iterations": lambda: by_faiss(x, codes, 10, True),
        "faiss random, 10 iterations": lambda: by_faiss(x, codes, 10, False),
        "SuperKMeans, 10 iterations": lambda: by_superkmeans(x, codes, 10, threads),
        "scikit-learn, 10 iterations": lambda: by_sklearn(x, codes, 10, threads),
    }
    # As good as faiss' k-means++ with as little work as that takes.
    sides["semid, 2 trials, 2 iterations"] = lambda: by_semid(x, codes, 2, threads, 2)
    for count in given.iterations:
        sides[f"semid, {count} iterations"] = lambda count=count: by_semid(  # type: ignore[misc]
            x, codes, count, threads
        )
    sides = {
        name: side for name, side in sides.items() if not name.startswith(tuple(given.without))
    }
    taken = in_turn(sides, repeats=given.repeats, rest=0.3 if threads > 1 else 0.0)
    base = next(iter(taken.values()))
    spread = float(((x - x.mean(0)) ** 2).sum(dtype=np.float64))
    rows = []
    for name, timing in taken.items():
        found = nearest(torch.from_numpy(x), torch.from_numpy(timing.result))
        inertia = float(found.distances.double().sum())
        rows.append({"side": name, "relative inertia": inertia / spread, **timing.figures(base)})
    save(
        "kmeans" if codes == 4096 else f"kmeans-{codes}",
        rows,
        settings=vars(given),
        packages=("faiss-cpu", "superkmeans", "scikit-learn"),
        note="Ratios (`_x`) are to the first line: how many times less time.",
    )


if __name__ == "__main__":
    main()
