"""Overlap rate of one codebook: semid against scipy and torch, one thread on every side.

    python benchmarks/overlap.py [--codes 4096] [--dim 256] [--repeats 5]

Codewords are rows of the union catalogue (SEMID_DATA, default ../shared/data).
"""

from __future__ import annotations

import argparse

import numpy as np
import scipy.spatial.distance
import torch

from common import in_turn, save, union_rows
from semid.diagnostics.overlap import NOISE_SCALES, overlap
from semid.diagnostics.spaces import latent_std


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    codebook = union_rows(given.dim)[: given.codes].numpy()
    counts = np.random.default_rng(2).integers(1, 60, given.codes)
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

    taken = in_turn(
        {
            "semid, 1 scale": lambda: ours((1.0,)),
            f"semid, {len(NOISE_SCALES)} scales": lambda: ours(NOISE_SCALES),
            "scipy cdist, 1 scale": with_scipy,
            "torch.cdist, 1 scale": with_torch,
        },
        repeats=given.repeats,
    )
    base = taken["semid, 1 scale"]
    save(
        "overlap",
        [{"side": n, "R": f"{t.result:.9f}", **t.figures(base)} for n, t in taken.items()],
        settings=vars(given),
        packages=("scipy",),
        note="Ratios (`_x`) are to the first line.",
    )


if __name__ == "__main__":
    main()
