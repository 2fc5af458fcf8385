"""Speed of the diagnostics: overlap rate against scipy and torch, exact neighbours against faiss.

Runs are interleaved (A B C A B C) and the ratio of medians is printed: absolute times of a busy
machine mean little. Needs the union catalogue (SEMID_DATA, default ../shared/data).

    python benchmarks/diagnostics.py overlap [--codes 4096] [--dim 256] [--rounds 5]
    python benchmarks/diagnostics.py neighbours [--pool 100000] [--queries 4096] [--rounds 3]

One thread on every side.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import scipy
import scipy.spatial.distance
import torch

from semid.diagnostics import NOISE_SCALES, latent_std, overlap
from semid.quantization.topk import prepare_database, top_k

Array = npt.NDArray[np.float32]


def principal_components(rows: int, dim: int) -> Array:
    """Return random rows of the union catalogue on its first principal components."""
    data = Path(os.environ.get("SEMID_DATA", "../shared/data"))
    matrix = np.load(data / "union_catalogue" / "embeddings.f16.npy", mmap_mode="r")
    sample = np.sort(np.random.default_rng(0).choice(len(matrix), 20_000, replace=False))
    x = matrix[sample].astype(np.float32)
    mean = x.mean(0)
    axes = np.linalg.eigh((x - mean).T @ (x - mean))[1][:, ::-1][:, :dim]
    chosen = np.random.default_rng(1).choice(len(matrix), rows, replace=False)
    result: Array = (matrix[chosen].astype(np.float32) - mean) @ np.ascontiguousarray(axes)
    return result


def interleave(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time every run ``rounds`` times in turn; return median seconds."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def show(seconds: dict[str, float], base: str, notes: dict[str, str]) -> None:
    print(
        f"{platform.processor() or platform.machine()}, one thread; numpy {np.__version__}, ",
        end="",
    )
    print(f"scipy {scipy.__version__}, torch {torch.__version__}, faiss {faiss.__version__}")
    for name, taken in seconds.items():
        print(f"{name:24s} {taken:8.3f} s  {taken / seconds[base]:6.2f} x semid  {notes[name]}")


def bench_overlap(codes: int, dim: int, rounds: int) -> None:
    codebook = principal_components(codes, dim)
    counts = np.random.default_rng(2).integers(1, 60, codes)
    share = counts / counts.sum()
    std = latent_std(codebook)
    width = 4 * std * std
    weights = torch.from_numpy(share)

    def with_scipy() -> float:
        squares = scipy.spatial.distance.cdist(codebook, codebook, "sqeuclidean")
        return float(share @ np.exp(-squares / width) @ share)

    def with_torch() -> float:
        table = torch.from_numpy(codebook)
        kernel = torch.exp(torch.cdist(table, table).square_().mul_(-1 / width))
        return float(weights @ (kernel @ weights.float()).double())

    def ours(scales: tuple[float, ...]) -> float:
        found = overlap(codebook, counts, latent_std=std, scales=scales, threads=1)
        return found.at(1.0).rate

    runs = {
        "scipy cdist, 1 scale": with_scipy,
        "torch.cdist, 1 scale": with_torch,
        "semid, 1 scale": lambda: ours((1.0,)),
        f"semid, {len(NOISE_SCALES)} scales": lambda: ours(NOISE_SCALES),
    }
    rates = {name: f"R = {run():.9f}" for name, run in runs.items()}
    print(f"overlap rate, K={codes}, D={dim}, {rounds} rounds")
    show(interleave(runs, rounds), "semid, 1 scale", rates)


def bench_neighbours(pool: int, queries: int, dim: int, rounds: int) -> None:
    k = 200
    database = principal_components(pool, dim)
    database /= np.linalg.norm(database, axis=1, keepdims=True)
    sought = database[:queries].copy()
    index = faiss.IndexFlatIP(dim)
    index.add(database)
    ready = prepare_database(torch.from_numpy(database), metric="cosine")

    def with_faiss() -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = index.search(sought, k)[1]
        return found

    def ours() -> npt.NDArray[np.int64]:
        return top_k(torch.from_numpy(sought), ready, k, threads=1).indices.numpy()

    theirs, mine = with_faiss(), ours()
    shared = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(theirs, mine, strict=True)])
    print(f"top-{k}, {queries} queries in {pool} x {dim}, {rounds} rounds")
    note = f"lists share {shared:.6f}"
    seconds = interleave({"faiss IndexFlatIP": with_faiss, "semid": ours}, rounds)
    show(seconds, "semid", dict.fromkeys(seconds, note))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["overlap", "neighbours"])
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--pool", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if options.what == "overlap":
        bench_overlap(options.codes, options.dim, options.rounds)
    else:
        bench_neighbours(options.pool, options.queries, options.dim, options.rounds)


if __name__ == "__main__":
    main()
