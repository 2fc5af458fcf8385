"""Nearest codeword on real embeddings: semid against faiss, scikit-learn, torch and SuperKMeans.

Rows are taken from the union catalogue (``$SEMID_DATA/union_catalogue``, by default in
``../shared/data``), as they are or projected on their first principal components. The codebook of
level 1 is a short k-means of others, that of level 3 one of what two levels leave. All sides run in
turn (A B C A B C) on the same rows with the same number of threads; the table shows medians.

``wall_x`` and ``cpu_x`` are how many times faster than faiss IndexFlatL2 by wall time and by CPU
seconds, by medians; ``best_x`` compares the least CPU seconds of each side, which is what is left
to compare on a machine so busy that the medians scatter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import in_turn, save, union_rows
from semid.quantization.engine.search import search, working_routes
from semid.quantization.nearest import index_codebook, nearest
from semid.quantization.threads import one_blas_thread


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


def levels(
    rows: Tensor, held_out: Tensor, codes: int, *, count: int, iterations: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the held-out rows that each level quantizes, and its codebook, fitted on ``rows``."""
    made = []
    for level in range(count):
        codebook = lloyd(rows, codes, iterations=iterations, seed=level)
        made.append((held_out, codebook))
        rows, held_out = (x - codebook[nearest(x, codebook).labels] for x in (rows, held_out))
    return made


def contestants(rows: Tensor, codebook: Tensor, threads: int) -> dict[str, Callable[[], object]]:
    """Return every side as a function without arguments; preparation is not timed on any side."""
    import faiss
    from sklearn.metrics import pairwise_distances_argmin
    from threadpoolctl import threadpool_limits

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    ready = index_codebook(codebook)
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


def compare(rows: Tensor, codebook: Tensor, *, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Time all sides in turn; return a line each."""
    sides = contestants(rows, codebook, threads)
    taken = in_turn(sides, repeats=repeats, rest=0.3 if threads > 1 else 0.0)
    work = 2.0 * len(rows) * codebook.shape[0] * codebook.shape[1]
    lines = []
    for name, timing in taken.items():
        figures = timing.figures(taken["faiss IndexFlatL2"])
        again = getattr(timing.result, "measured", None)
        lines.append(
            {
                "side": name,
                **figures,
                "eqGF/s": work / figures["least_cpu_s"] / 1e9,
                "re-scored a row": "" if again is None else again / len(rows),
            }
        )
    return lines


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4096, help="rows assigned in each run")
    parser.add_argument("--train", type=int, default=40960, help="rows the codebooks are fitted on")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 384])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3)
    given = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for dim in given.dims:
        train, held_out = union_rows(dim)[: given.train + given.rows].split(
            [given.train, given.rows]
        )
        made = levels(train, held_out, given.codes, count=3, iterations=given.iterations)
        for level in (0, 2):
            rows, codebook = made[level]
            for threads in given.threads:
                with one_blas_thread():
                    found = compare(
                        rows.contiguous(), codebook, threads=threads, repeats=given.repeats
                    )
                case = {"dim": dim, "level": level + 1, "threads": threads}
                lines += [{**case, **line} for line in found]
    save(
        "nearest",
        lines,
        settings=vars(given),
        packages=("faiss-cpu", "superkmeans", "scikit-learn"),
        note=(
            "Ratios (`_x`) are to faiss IndexFlatL2 in the same case: by median wall time, by "
            "median CPU time, and by the least CPU time of each."
        ),
    )


if __name__ == "__main__":
    main()
