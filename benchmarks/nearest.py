"""Nearest codeword on real embeddings: semid against faiss, scikit-learn, torch and SuperKMeans.

Rows are taken from the union catalogue (``$SEMID_DATA/union_catalogue``, by default in
``../shared/data``), as they are or projected on their first principal components. The codebook of
level 1 is a short k-means of them, that of level 3 one of what two levels leave. All sides run in
turn (A B C A B C) on the same rows with the same number of threads; the table shows medians.

``wall x`` and ``cpu x`` are how many times faster than faiss IndexFlatL2 by wall time and by CPU
seconds, by medians; ``best x`` compares the least CPU seconds of each side, which is what is left
to compare on a machine so busy that the medians scatter.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor

from semid.quantization.engine.routes import working_routes
from semid.quantization.engine.search import search
from semid.quantization.nearest import nearest, prepare
from semid.quantization.threads import one_blas_thread

SHARE = 0.25
"""Seconds each side runs in a turn, so that all meet the machine's other work alike."""


def embeddings(dim: int) -> Tensor:
    """Load the catalogue in a random order, projected on its first ``dim`` components."""
    root = Path(os.environ.get("SEMID_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "union_catalogue" / "embeddings.f16.npy"
    if not path.exists():
        sys.exit(f"no real embeddings at {path}; set SEMID_DATA (blobs would flatter screening)")
    rows = torch.from_numpy(np.load(path)).float()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    if dim < rows.shape[1]:
        centred = rows - rows.mean(0)
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        rows = centred @ vectors.flip(1)[:, :dim]
    return rows.contiguous()


def lloyd(rows: Tensor, codes: int, *, iterations: int, seed: int) -> Tensor:
    """Run a few plain Lloyd iterations from random rows."""
    generator = torch.Generator().manual_seed(seed)
    codebook = rows[torch.randperm(len(rows), generator=generator)[:codes]].clone()
    for _ in range(iterations):
        labels = nearest(rows, codebook).labels
        counts = torch.bincount(labels, minlength=codes)
        sums = torch.zeros_like(codebook).index_add_(0, labels, rows)
        codebook = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), codebook)
    return codebook


def levels(rows: Tensor, codes: int, *, count: int, iterations: int) -> list[tuple[Tensor, Tensor]]:
    """Return the rows each level quantizes and its codebook."""
    made = []
    for level in range(count):
        codebook = lloyd(rows, codes, iterations=iterations, seed=level)
        made.append((rows, codebook))
        rows = rows - codebook[nearest(rows, codebook).labels]
    return made


def contestants(rows: Tensor, codebook: Tensor, threads: int) -> dict[str, Callable[[], object]]:
    """Return every side as a function without arguments; preparation is not timed on any side."""
    import faiss
    from sklearn.metrics import pairwise_distances_argmin
    from threadpoolctl import threadpool_limits

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    ready = prepare(codebook)
    half = codebook.square().sum(1) / 2

    def sklearn() -> object:
        with threadpool_limits(threads):
            return pairwise_distances_argmin(rows.numpy(), codebook.numpy())

    def plain() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        parts = [
            torch.addmm(half, block, codebook.T, beta=-1).max(1).indices
            for block in rows.split(1024)
        ]
        torch.set_num_threads(before)
        return torch.cat(parts)

    sides: dict[str, Callable[[], object]] = {
        "faiss IndexFlatL2": lambda: index.search(rows.numpy(), 1),
        "scikit-learn": sklearn,
        "torch addmm + max": plain,
        "semid auto": lambda: nearest(rows, ready, threads=threads),
    }
    for route in working_routes():
        sides[f"semid {route.name} ({route.library})"] = lambda route=route: search(  # type: ignore[misc]
            rows, ready.table, route, threads=threads
        )
    try:
        from superkmeans import SuperKMeans
    except ImportError:
        print("  SuperKMeans is not installed: left out")
    else:
        solver = SuperKMeans(len(codebook), codebook.shape[1], n_threads=threads)
        sides["SuperKMeans"] = lambda: solver.assign(rows.numpy(), codebook.numpy())
    return sides


def compare(rows: Tensor, codebook: Tensor, *, threads: int, repeats: int) -> None:
    """Time all sides in turn and print a line each."""
    sides = contestants(rows, codebook, threads)
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    measured: dict[str, float] = {}
    calls: dict[str, int] = {}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            if threads > 1:
                time.sleep(0.3)  # OpenMP's threads spin on for 0.2 s after the side before
            found = side()  # the first turn compiles, later ones find a warm cache
            start, used = time.perf_counter(), time.process_time()
            for _ in range(calls.get(name, 1)):
                side()
            spent = time.perf_counter() - start, time.process_time() - used
            if turn == 0:
                calls[name] = max(1, round(SHARE / max(spent[0], 1e-4)))
            else:
                wall[name].append(spent[0] / calls[name])
                cpu[name].append(spent[1] / calls[name])
            if hasattr(found, "measured"):
                measured[name] = found.measured / len(rows)
    base = "faiss IndexFlatL2"
    base_wall, base_cpu = (np.median(taken[base]) for taken in (wall, cpu))
    work = 2.0 * len(rows) * codebook.shape[0] * codebook.shape[1]
    print(f"  {'side':34} wall x   cpu x  best x  eqGF/s (best)  re-scored a row")
    for name in sides:
        ratios = base_wall / np.median(wall[name]), base_cpu / np.median(cpu[name])
        fastest = min(cpu[name])
        again = f"{measured[name]:15.2f}" if name in measured else ""
        print(
            f"  {name:34} {ratios[0]:6.2f}  {ratios[1]:6.2f}  {min(cpu[base]) / fastest:6.2f}"
            f"  {work / fastest / 1e9:13.0f}  {again}"
        )


def machine() -> str:
    """Describe chip and versions."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    import faiss
    import sklearn as scikit

    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{model}, {os.cpu_count()} CPUs{load}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, numba {numba.__version__}, faiss {faiss.__version__}, "
        f"scikit-learn {scikit.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4096, help="rows assigned in each run")
    parser.add_argument("--train", type=int, default=40960, help="rows the codebooks are fitted on")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 384])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3)
    chosen = parser.parse_args()
    print(machine())
    for dim in chosen.dims:
        data = embeddings(dim)
        made = levels(data[: chosen.train], chosen.codes, count=3, iterations=chosen.iterations)
        for level in (0, 2):
            rows, codebook = made[level]
            for threads in chosen.threads:
                print(f"K = {chosen.codes}, D = {dim}, level {level + 1}, threads {threads}")
                with one_blas_thread():
                    compare(
                        rows[: chosen.rows].contiguous(),
                        codebook,
                        threads=threads,
                        repeats=chosen.repeats,
                    )


if __name__ == "__main__":
    main()
