"""The search on a GPU beside torch's products: exact, and what share of the chip's bf16 rate.

    python benchmarks gpu --embeddings ../shared/data/amazon2014_sports/embeddings.f16.npy

Rows are those of a real catalogue, repeated with noise of a tenth of their spread until there are
as many as wanted; the codebook is a random choice of others. Every label is checked against
float64 products on the device. ``bf16 product`` is the matrix product alone: the ceiling.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import save
from semid.quantization.engine import gpu
from semid.quantization.nearest import index_codebook, index_database, nearest, top_k

SPAN = 65_536


def timed(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return median milliseconds of each side, run in turn after one turn that does not count."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            side()
            torch.cuda.synchronize()
            if turn:
                spent[name].append(1000 * (time.perf_counter() - began))
    return {name: float(np.median(values)) for name, values in spent.items()}


def rows_like(path: Path, count: int) -> Tensor:
    """Repeat real rows with noise until there are ``count``, on the device."""
    real = torch.from_numpy(np.load(path).astype(np.float32)).cuda()
    generator = torch.Generator(device="cuda").manual_seed(0)
    at = torch.randint(len(real), (count,), generator=generator, device="cuda")
    noise = torch.randn(count, real.shape[1], generator=generator, device="cuda")
    return real[at] + 0.1 * real.std(0) * noise


def wrong_labels(x: Tensor, books: Tensor, labels: Tensor) -> int:
    """Count labels that float64 products say are not the nearest."""
    wide = books.double()
    norms = wide.square().sum(1)
    count = 0
    for start in range(0, len(x), 8192):
        apart = norms - 2 * x[start : start + 8192].double() @ wide.T
        chosen = apart.gather(1, labels[start : start + 8192, None].to(x.device))[:, 0]
        count += int((chosen > apart.amin(1) + 1e-12 * norms.max()).sum())
    return count


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--embeddings", type=Path, required=True, help="real rows, .npy")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark measures one")
    x = rows_like(given.embeddings, given.rows)
    books = x[torch.randperm(len(x), device="cuda")[: given.codes]].contiguous()
    halves = 0.5 * books.square().sum(1)
    ready = index_codebook(books.cpu())
    rounded, rounded_books = x.bfloat16(), books.bfloat16()

    def plain() -> Tensor:
        parts = (torch.addmm(halves, p, books.T, alpha=-1).argmin(1) for p in torch.split(x, SPAN))
        return torch.cat(list(parts))

    def product() -> None:
        for part in torch.split(rounded, SPAN):
            part @ rounded_books.T

    chosen = gpu._route

    def through(route: str) -> None:
        gpu._route = lambda *_: route
        nearest(x, ready)
        gpu._route = chosen

    spent = timed(
        {
            "semid": lambda: nearest(x, ready),
            **{f"semid, {route}": partial(through, route) for route in gpu.ROUTES},
            "torch float32": plain,
            "bf16 product": product,
        },
        given.repeats,
    )
    work = 2 * x.shape[0] * x.shape[1] * len(books)
    found = nearest(x, ready).labels
    table = [
        {
            "task": "nearest",
            "side": name,
            "ms": took,
            "TFLOP/s": work / took / 1e9,
            "of the bf16 product": spent["bf16 product"] / took,
            "wrong": {"semid": wrong_labels(x, books, found)}.get(name, ""),
        }
        for name, took in spent.items()
    ]
    pool, sought = x[:100_000].contiguous(), x[-4096:].contiguous()
    database = index_database(pool.cpu())
    lists = timed(
        {
            "semid": lambda: top_k(sought, database, given.k),
            "torch float32": lambda: (sought @ pool.T).topk(given.k),
        },
        given.repeats,
    )
    work = 2 * len(sought) * pool.shape[0] * pool.shape[1]
    table += [
        {
            "task": f"top {given.k} of 100,000",
            "side": name,
            "ms": took,
            "TFLOP/s": work / took / 1e9,
            "of the bf16 product": "",
            "wrong": "",
        }
        for name, took in lists.items()
    ]
    save(
        "gpu",
        table,
        settings=vars(given),
        packages=(),
        note=f"{torch.cuda.get_device_name()}. Labels are exact by re-scoring in float64.",
    )


if __name__ == "__main__":
    main()
