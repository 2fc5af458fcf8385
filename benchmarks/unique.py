"""A million synthetic items made unique, by a token and by reassignment.

    python benchmarks/unique.py --items 1000000

Items are drawn around the codewords of a residual tokenizer, popular codes first (share falling as
``rank ** -skew``), so that many share an id. Only the step itself is timed, not the encoding. With
a larger skew more prefixes hold more items than the last codebook has codewords, and looking for
whom to leave out takes most of the time. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import numpy as np

import semid
from semid.catalogue.assignment import assign_rows
from semid.codes import SemanticIds
from semid.data.ids import ItemIds


def catalogue(
    items: int, codes: int, dim: int, noise: float, skew: float, seed: int
) -> tuple[semid.RQKMeans, np.ndarray]:
    """Draw a tokenizer and embeddings ``(items, dim)`` float32."""
    generator = np.random.default_rng(seed)
    books = [0.5**level * generator.normal(size=(codes, dim)).astype("f4") for level in range(3)]
    tokenizer = semid.RQKMeans(levels=3, codebook_size=codes)
    tokenizer._dim = dim
    tokenizer._set_tensors({f"codebooks.{level}": book for level, book in enumerate(books)})
    share = 1.0 / np.arange(1, codes + 1) ** skew
    x = np.zeros((items, dim), np.float32)
    for book in books:
        x += book[generator.choice(codes, size=items, p=share / share.sum())]
    return tokenizer, x + noise * generator.normal(size=x.shape).astype("f4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--skew", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer, x = catalogue(args.items, args.codes, args.dim, args.noise, args.skew, args.seed)
    named = ItemIds([f"item-{row:08d}" for row in range(args.items)])
    source = semid.open_embeddings(x, ids=named)
    ids: SemanticIds = tokenizer.encode(source)
    assign_rows(np.zeros((2, 2)))  # compiled before the clock runs
    found: dict[str, Any] = {
        "items": args.items, "levels": 3, "codes": args.codes, "dim": args.dim,
        "noise": args.noise, "skew": args.skew, "seed": args.seed,
        "python": platform.python_version(),
    }  # fmt: skip
    for method in ("append", "reassign"):
        began, cpu = time.perf_counter(), time.process_time()
        done = semid.make_unique(ids, method=method, tokenizer=tokenizer, embeddings=source)
        found[method] = {
            "seconds": round(time.perf_counter() - began, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            **done.report.to_dict(),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
