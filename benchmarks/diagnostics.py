"""Speed of the diagnostics: overlap rate against scipy and torch, one thread each.

Runs are interleaved (A B C A B C) and the ratio of medians is printed: absolute times of a busy
machine mean little. Needs the union catalogue (SEMID_DATA, default ../shared/data).

    python benchmarks/diagnostics.py [--codes 4096] [--dim 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy
import scipy.spatial.distance
import torch

from semid.diagnostics import NOISE_SCALES, latent_std, overlap


def principal_components(path: Path, rows: int, dim: int) -> npt.NDArray[np.float32]:
    """Return some rows of a real embedding on its first principal components."""
    matrix = np.load(path, mmap_mode="r")
    chosen = np.sort(np.random.default_rng(0).choice(len(matrix), 20_000, replace=False))
    x = matrix[chosen].astype(np.float64)
    x -= x.mean(0)
    axes = np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :dim]
    return (x[np.random.default_rng(1).permutation(len(x))[:rows]] @ axes).astype(np.float32)


def interleave(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ.get("SEMID_DATA", "../shared/data"))
    codebook = principal_components(
        data / "union_catalogue" / "embeddings.f16.npy", options.codes, options.dim
    )
    counts = np.random.default_rng(2).integers(1, 60, options.codes)
    share = counts / counts.sum()
    std = latent_std(codebook)
    width = 4 * std * std
    weights = torch.from_numpy(share)

    def with_scipy() -> float:
        squares = scipy.spatial.distance.cdist(codebook, codebook, "sqeuclidean")
        return float(share @ np.exp(-squares / width) @ share)

    def with_torch() -> float:
        table = torch.from_numpy(codebook)
        kernel = torch.exp(-torch.cdist(table, table).double().square_() / width)
        return float(weights @ kernel @ weights)

    def ours(scales: tuple[float, ...]) -> float:
        found = overlap(codebook, counts, latent_std=std, scales=scales, threads=1)
        return found.at(1.0).rate

    runs = {
        "scipy cdist, 1 scale": with_scipy,
        "torch.cdist, 1 scale": with_torch,
        "semid, 1 scale": lambda: ours((1.0,)),
        f"semid, {len(NOISE_SCALES)} scales": lambda: ours(NOISE_SCALES),
    }
    rates = {name: run() for name, run in runs.items()}
    seconds = interleave(runs, options.rounds)
    print(f"overlap rate, K={options.codes}, D={options.dim}, one thread, {options.rounds} rounds")
    print(f"{platform.processor() or platform.machine()}; numpy {np.__version__}, ", end="")
    print(f"scipy {scipy.__version__}, torch {torch.__version__}")
    for name, taken in seconds.items():
        ratio = taken / seconds["semid, 1 scale"]
        print(f"{name:24s} {taken:8.3f} s  {ratio:6.2f} x semid  R = {rates[name]:.9f}")


if __name__ == "__main__":
    main()
