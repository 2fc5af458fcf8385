"""Encoding three levels: semid against faiss on the same codebooks, and against faiss's own RQ.

    python benchmarks/encoding.py [--rows 16384] [--dim 128] [--codes 4096] [--train 98304]

Rows come from the union catalogue (SEMID_DATA, default ../shared/data); the encoded rows are held
out from the fits. "faiss flat x 3" and semid encode greedily with semid's codebooks, so their
codes must be equal up to ties; faiss's ResidualQuantizer trains its own codebooks on the same rows
with beam 1, so its column of the error says which codebooks generalize better. Beams are of both
sides' own codebooks.
"""

from __future__ import annotations

import argparse
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from common import in_turn, save, union_rows
from semid.quantization.blocks import ArrayBlocks
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.nearest import index_codebook
from semid.quantization.residual import dequantize, encode_residual, fit_residual

Array = npt.NDArray[np.float32]


def flat(x: Array, indexes: list[Any], books: list[Array]) -> npt.NDArray[np.int64]:
    """Encode greedily with one exact faiss index a level."""
    residual, codes = x, []
    for index, book in zip(indexes, books, strict=True):
        codes.append(index.search(residual, 1)[1][:, 0])
        residual = residual - book[codes[-1]]
    return np.stack(codes, 1)


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16_384, help="rows encoded in each run")
    parser.add_argument(
        "--train", type=int, default=98_304, help="rows the codebooks are fitted on"
    )
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    everything = union_rows(given.dim)
    train = everything[: given.train].numpy()
    x = everything[given.train : given.train + given.rows].contiguous().numpy()
    faiss.omp_set_num_threads(given.threads)
    torch.set_num_threads(given.threads)
    options = KMeansOptions(max_iter=given.iterations, tol=0.0)
    books, _ = fit_residual(
        ArrayBlocks(train), (given.codes,) * 3, seed=0, options=options, threads=given.threads
    )
    ready = [index_codebook(torch.from_numpy(book)) for book in books]
    indexes = []
    for book in books:
        indexes.append(faiss.IndexFlatL2(given.dim))
        indexes[-1].add(book)
    bits = int(np.log2(given.codes))
    own = faiss.IndexResidualQuantizer(given.dim, 3, bits)
    own.rq.max_beam_size = 1
    own.rq.cp.niter = given.iterations
    own.rq.cp.max_points_per_centroid = 10**9
    own.train(train)

    def by_faiss(beam: int, tables: bool = False) -> Array:
        own.rq.max_beam_size, own.rq.use_beam_LUT = beam, int(tables)
        return own.rq.compute_codes(x)

    def by_semid(beam: int) -> npt.NDArray[np.int64]:
        return encode_residual(x, ready, beam_width=beam, threads=given.threads).codes

    sides = {
        "faiss flat x 3": lambda: flat(x, indexes, books),
        "faiss ResidualQuantizer, beam 1": lambda: by_faiss(1),
        "semid, greedy": lambda: by_semid(1),
        "faiss ResidualQuantizer, beam 5": lambda: by_faiss(5),
        "faiss ResidualQuantizer, beam 5, use_beam_LUT": lambda: by_faiss(5, True),
        "semid, beam 5": lambda: by_semid(5),
        "semid, beam 8": lambda: by_semid(8),
    }
    taken = in_turn(sides, repeats=given.repeats, rest=0.3 if given.threads > 1 else 0.0)
    spread = float(((x - train.mean(0)) ** 2).sum(dtype=np.float64))
    rows = []
    for name, timing in taken.items():
        found = timing.result
        decoded = own.rq.decode(found) if "Residual" in name else dequantize(found, books)
        error = float(((x - decoded) ** 2).sum(dtype=np.float64)) / spread
        figures = timing.figures(taken["faiss flat x 3"])
        speed = given.rows / figures["least_cpu_s"] / 1000
        rows.append(
            {"side": name, "held-out error": error, "thousand items a core s": speed, **figures}
        )
    same = float((taken["faiss flat x 3"].result == taken["semid, greedy"].result).all(1).mean())
    save(
        "encoding" if given.codes == 4096 else f"encoding-{given.codes}",
        rows,
        settings=vars(given),
        packages=("faiss-cpu",),
        note=(
            "Ratios (`_x`) are to the first line. Rows whose codes are equal in faiss flat x 3 "
            f"and semid greedy: {same:.2%}."
        ),
    )


if __name__ == "__main__":
    main()
