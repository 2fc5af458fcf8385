"""Exact top-k retrieval by cosine: semid against faiss and torch, one thread on every side.

    python benchmarks/neighbors.py [--pool 100000] [--queries 4096] [--dim 256] [--k 200]

Rows are those of the union catalogue (SEMID_DATA, default ../shared/data), scaled to unit length.
"""

from __future__ import annotations

import argparse

import faiss
import numpy as np
import torch

from common import in_turn, save, union_rows
from semid.quantization.nearest import index_database, top_k


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pool", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    pool = torch.nn.functional.normalize(union_rows(given.dim)[: given.pool]).contiguous()
    sought = pool[: given.queries].contiguous()
    index = faiss.IndexFlatIP(given.dim)
    index.add(pool.numpy())
    ready = index_database(pool)

    def plain() -> np.ndarray:
        return np.concatenate(
            [(part @ pool.T).topk(given.k).indices.numpy() for part in sought.split(512)]
        )

    taken = in_turn(
        {
            "faiss IndexFlatIP": lambda: index.search(sought.numpy(), given.k)[1],
            "torch mm + topk": plain,
            "semid": lambda: top_k(sought, ready, given.k, threads=1).indices.numpy(),
        },
        repeats=given.repeats,
    )
    base = taken["faiss IndexFlatIP"]
    mine = taken["semid"].result
    rows = []
    for name, timing in taken.items():
        pairs = zip(timing.result, mine, strict=True)
        shared = np.mean([len(np.intersect1d(a, b)) / given.k for a, b in pairs])
        rows.append({"side": name, "shared with semid": f"{shared:.6f}", **timing.figures(base)})
    save(
        "neighbors",
        rows,
        settings=vars(given),
        packages=("faiss-cpu",),
        note="Ratios (`_x`) are to the first line: how many times less time.",
    )


if __name__ == "__main__":
    main()
