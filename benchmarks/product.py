"""Product quantization: semid's PQ and OPQ against faiss on real rows, fit and encoding apart.

    python benchmarks/product.py [--rows 50000] [--parts 16 64] [--iterations 25] [--threads 1]

Rows come from the union catalogue (SEMID_DATA, default ../shared/data). Both sides train on the
same rows without sub-sampling, in turn, with the same number of Lloyd iterations and of
alternations between codes and rotation. Errors are relative to the rows' variance, on the rows
trained on and on as many others.
"""

from __future__ import annotations

import argparse
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

import semid
from common import in_turn, save, union_rows

Array = npt.NDArray[np.float32]
MANY = 10**9


def fit_semid(x: Array, parts: int, given: argparse.Namespace, rotate: bool) -> Any:
    """PQ or OPQ on all rows, without early stopping."""
    settings: dict[str, Any] = {
        "n_codebooks": parts,
        "validation_fraction": 0,
        "threads": given.threads,
        "kmeans": {"max_iter": given.iterations, "tol": 0.0},
    }
    if rotate:
        return semid.OPQ(**settings, rotation_iter=given.alternations).fit(x)
    return semid.PQ(**settings).fit(x)


def fit_faiss(x: Array, parts: int, given: argparse.Namespace, rotate: bool) -> Any:
    """Faiss on all rows; one Lloyd iteration per alternation, as in the paper and in semid."""
    index = faiss.IndexPQ(x.shape[1], parts, 8)
    index.pq.cp.niter, index.pq.cp.max_points_per_centroid = given.iterations, MANY
    index.pq.cp.min_points_per_centroid = 1
    if not rotate:
        index.train(x)
        return index
    opq = faiss.OPQMatrix(x.shape[1], parts)
    opq.niter, opq.niter_pq, opq.niter_pq_0 = given.alternations, 1, 1
    opq.max_train_points = MANY
    whole = faiss.IndexPreTransform(opq, index)
    whole.train(x)
    whole.index = index  # keep a reference: the parts belong to Python
    return whole


def encode_faiss(index: Any, x: Array) -> Array:
    """Return packed codes."""
    codes: Array = index.sa_encode(x)
    return codes


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--parts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--alternations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", nargs="*", default=[], help="PQ or OPQ")
    given = parser.parse_args()
    data = union_rows(384).numpy()
    x, unseen = data[: given.rows], data[given.rows : 2 * given.rows]
    faiss.omp_set_num_threads(given.threads)
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []

    def errors(side: str, model: Any) -> dict[str, float]:
        figures = {}
        for name, sample in (("error", x), ("unseen error", unseen)):
            if side == "semid":
                decoded = model.decode(model.encode(sample))
            else:
                decoded = model.sa_decode(model.sa_encode(sample))
            spread = float(((sample - x.mean(0)) ** 2).sum(dtype=np.float64))
            figures[name] = float(((sample - decoded) ** 2).sum(dtype=np.float64)) / spread
        return figures

    for parts in given.parts:
        for name, rotate in (("PQ", False), ("OPQ", True)):
            if name in given.without:
                continue
            fits = in_turn(
                {
                    "faiss": lambda: fit_faiss(x, parts, given, rotate),  # noqa: B023
                    "semid": lambda: fit_semid(x, parts, given, rotate),  # noqa: B023
                },
                repeats=given.repeats,
            )
            models = {side: timing.result for side, timing in fits.items()}
            encodings = in_turn(
                {
                    "faiss": lambda: encode_faiss(models["faiss"], unseen),  # noqa: B023
                    "semid": lambda: models["semid"].encode(unseen).codes,  # noqa: B023
                },
                repeats=given.repeats,
            )
            for what, taken in (("fit", fits), ("encode", encodings)):
                for side, timing in taken.items():
                    rows.append(
                        {
                            "method": f"{name}{parts}",
                            "what": what,
                            "side": side,
                            **errors(side, models[side]),
                            **timing.figures(taken["faiss"]),
                        }
                    )
                    print(rows[-1], flush=True)
    save(
        "product",
        rows,
        settings=vars(given),
        packages=("faiss-cpu",),
        note="256 codewords per part. Ratios (`_x`) are to faiss: how many times less time. A fit "
        "of semid also encodes and decodes every row once for its verdict.",
    )


if __name__ == "__main__":
    main()
