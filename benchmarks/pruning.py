"""Would pruning by the last assignment pay in Lloyd? The share of rows it would spare.

    python benchmarks pruning

Hamerly's test keeps a row's label without looking at any centroid but its own: after the centroids
have moved, the distance to its own (measured anew) is below the last distance to the second nearest
less the largest move. Elkan's and Yinyang's tests spare more pairs, and need bounds a centroid or a
group; what they can spare at most is shown by the share of rows whose label changes.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from common import save, union_rows
from semid.quantization.blocks import ArrayBlocks, statistics
from semid.quantization.nearest import index_codebook, nearest_m
from semid.quantization.seeding import kmeans_plus_plus


def main() -> None:
    """Run Lloyd plainly, count, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=10)
    given = parser.parse_args()
    x = union_rows(given.dim)[: given.rows].contiguous()
    book = kmeans_plus_plus(ArrayBlocks(x.numpy()), given.codes, generator=np.random.default_rng(0))
    rows, labels, second = [], np.full(len(x), -1), np.zeros(len(x))
    moved = np.inf
    for iteration in range(1, given.iterations + 1):
        found = nearest_m(x, index_codebook(torch.from_numpy(book)), 2)
        new, distances = found.labels.numpy(), found.distances.numpy().astype(np.float64)
        own = np.linalg.norm(x.numpy() - book[np.maximum(labels, 0)], axis=1)
        spared = (labels >= 0) & (own < second - moved)
        rows.append(
            {
                "iteration": iteration,
                "rows spared": float(spared.mean()),
                "labels changed": float((new[:, 0] != labels).mean()),
                "relative inertia": float(distances[:, 0].sum() / (x - x.mean(0)).square().sum()),
            }
        )
        labels, second = new[:, 0].copy(), np.sqrt(distances[:, 1])
        total = statistics(x.numpy(), labels, found.distances[:, 0].numpy(), codes=given.codes)
        means = (total.sums / np.maximum(total.counts, 1)[:, None]).astype(np.float32)
        means[total.counts == 0] = book[total.counts == 0]
        moved = float(np.linalg.norm(means - book, axis=1).max())
        book = means
    save(
        "pruning",
        rows,
        settings=vars(given),
        packages=(),
        note="Greedy k-means++, then plain Lloyd; shares of all rows.",
    )


if __name__ == "__main__":
    main()
