"""How residual K-means scales: measured on one and two workers, extended by a model to a cluster.

``python benchmarks scaling`` fits synthetic rows in one process, in two processes of torchrun and
in one and two actors of Ray, checks that all end with the same bits, counts what travelled in an
iteration, and prints a model of the time on 1 to 64 nodes beside what it says of the measured runs.

The model of one iteration, for W workers of C cores over R rows:

    rows:     ceil(blocks of the largest shard / C) * seconds a block of one core
    sums:     ceil(log2 W) steps, each one list of nodes: nodes * K * (d + 1) * 8 bytes / bandwidth
    centers:  K * d * 4 bytes to each worker, from the driver: W * K * d * 4 / bandwidth
    calls:    (1 + ceil(log2 W)) * seconds a call

Seconds a block and a call are measured here in one worker; cores and bandwidth are assumptions,
given in the flags.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers give way to every other process by default, which on a busy machine looks like Ray.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import distributed as dist

from common import RESULTS, machine, markdown
from semid.distributed.ray_fit import FitWorker, shard_loads, share_units
from semid.distributed.ray_shards import RayShardPool
from semid.distributed.ray_workers import RayOptions, connect
from semid.distributed.units import Catalogue
from semid.quantization.blocks import BLOCK_ROWS, ArrayBlocks, cut_blocks
from semid.quantization.seeding import kmeans_plus_plus
from semid.quantization.sharding import LocalShardPool, Shard, ShardedMatrix
from semid.training.distributed import (
    ProcessShardPool,
    is_main,
    join_processes,
    process_span,
    world_size,
)

SEED = 0
ENGINES = ("local", "torchrun", "ray")


def synthetic(rows: int, dim: int) -> np.ndarray:
    """Rows around 4,096 centers of falling scale, so that neither level is noise alone."""
    generator = np.random.default_rng(SEED)
    scale = np.linspace(2.0, 0.2, dim, dtype=np.float32)
    centers = generator.standard_normal((4096, dim), dtype=np.float32) * scale
    x = 0.4 * generator.standard_normal((rows, dim), dtype=np.float32)
    x += centers[generator.integers(0, 4096, rows)]
    return x


def own_clock() -> list[float]:
    """CPU seconds of this process."""
    return [time.process_time()]


def gathered_clock() -> list[float]:
    """CPU seconds of every rank."""
    seconds: list[Any] = [None] * world_size()
    dist.all_gather_object(seconds, time.process_time())
    return seconds


def clock_of(pids: list[int]) -> list[float]:
    """CPU seconds of other processes of this machine."""
    ticks = os.sysconf("SC_CLK_TCK")
    words = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
    return [(int(each[11]) + int(each[12])) / ticks for each in words]


def measure(
    rows: ShardedMatrix, codes: int, iterations: int, clock: Callable[[], list[float]]
) -> dict[str, Any]:
    """Seed and iterate; return seconds, CPU seconds a worker, and what tells results apart."""
    before = clock()
    began = time.perf_counter()
    centers = kmeans_plus_plus(rows, codes, generator=np.random.default_rng(SEED))
    seeding = time.perf_counter() - began
    seeding_cpu = np.subtract(clock(), before)
    before = clock()
    sent = {name: dict(getattr(rows.pool, name, {})) for name in ("sent", "received", "passed")}
    seconds = []
    for _ in range(iterations):
        began = time.perf_counter()
        total = rows.assign(centers)
        filled = total.counts > 0
        centers[filled] = (total.sums[filled] / total.counts[filled, None]).astype(np.float32)
        seconds.append(time.perf_counter() - began)
    cpu = np.subtract(clock(), before) / iterations
    volume = {
        name: getattr(rows.pool, name).get("assign", 0) / iterations
        for name in sent
        if hasattr(rows.pool, name)
    }
    seeded = {name: sum(found.values()) for name, found in sent.items()}
    return {
        "seeding": seeding,
        "iteration": min(seconds),
        "iteration_cpu": cpu.tolist(),
        "seeding_cpu": seeding_cpu.tolist(),
        "iterations": seconds,
        "bytes_an_iteration": volume,
        "bytes_seeding": seeded,
        "bits": centers.tobytes().hex()[:64] + f"{float(total.inertia).hex()}",
    }


def as_rank(path: str, codes: int, iterations: int) -> None:
    """Run as one of torchrun's processes."""
    x = np.load(path, mmap_mode="r")
    join_processes()
    first, last = process_span(len(x))
    shard = Shard(ArrayBlocks(np.array(x[first:last])), first_row=first, threads=1)
    shard_pool = ProcessShardPool(shard, len(x)) if world_size() > 1 else LocalShardPool(shard)
    clock = gathered_clock if world_size() > 1 else own_clock
    found = measure(ShardedMatrix(shard_pool, dim=x.shape[1]), codes, iterations, clock)
    if is_main():
        print("RESULT " + json.dumps(found), flush=True)


def by_torchrun(path: Path, ranks: int, codes: int, iterations: int) -> dict[str, Any]:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    flags = ("--as-rank", str(path), "--codes", str(codes), "--iterations", str(iterations))
    done = subprocess.run(
        [sys.executable, *launch, __file__, *flags],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    (line,) = [line for line in done.stdout.splitlines() if "RESULT " in line]
    found: dict[str, Any] = json.loads(line.split("RESULT ", 1)[1])
    return found


def by_ray(folder: Path, workers: int, codes: int, iterations: int) -> dict[str, Any]:
    options = RayOptions(workers=workers)
    ray = connect(options)
    catalogue = Catalogue.open(folder)
    units = catalogue.units(BLOCK_ROWS)
    shares = share_units(units, workers)

    def make(place: int) -> FitWorker:
        return FitWorker(
            catalogue, shares[place], held_out=0.0, codes=codes, threads=1, memory_bytes=8 << 30
        )

    shard_pool = RayShardPool(ray, make, RayOptions(retries=1), size=workers)
    try:
        loads, spans = shard_loads(units, [unit.rows for unit in units], workers)
        shard_pool.load(loads, spans)
        rows = ShardedMatrix(shard_pool, dim=catalogue.source(units[:1]).dim)
        empty = np.zeros((1, rows.dim), np.float32)
        rows.assign(empty)  # reads the rows and loads the kernels
        calls = []
        for _ in range(20):
            began = time.perf_counter()
            shard_pool.pool.ask({0: ("call", ("__len__",))})
            calls.append(time.perf_counter() - began)
        for volume in (shard_pool.sent, shard_pool.received, shard_pool.passed):
            volume.clear()
        pids = shard_pool.pool.process_ids()
        run = measure(rows, codes, iterations, lambda: clock_of(pids))
        return {**run, "call": float(np.median(calls))}
    finally:
        shard_pool.close()


def model(
    rows: float,
    *,
    workers: int,
    cores: int,
    codes: int,
    dim: int,
    block_seconds: float,
    call_seconds: float,
    bandwidth: float,
) -> dict[str, float]:
    """Return the parts of an iteration in seconds."""
    blocks = math.ceil(rows / BLOCK_ROWS)
    largest = max(last - first for first, last in cut_blocks(blocks, workers))
    steps = math.ceil(math.log2(workers)) if workers > 1 else 0
    # A range that starts and ends at a sixteenth of its length is at most a few whole nodes.
    nodes = 1 if workers & (workers - 1) == 0 and blocks % workers == 0 else 4
    return {
        "rows": math.ceil(largest / cores) * block_seconds,
        "sums": steps * nodes * codes * (dim + 1) * 8 / bandwidth,
        "centers": (workers if workers > 1 else 0) * codes * dim * 4 / bandwidth,
        "calls": (1 + steps) * call_seconds if workers > 1 else 0.0,
    }


def spell(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=16 * BLOCK_ROWS)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--cores", type=int, default=16, help="cores of a node in the model")
    parser.add_argument("--bandwidth", type=float, default=1.25e9, help="bytes a second of a node")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help="the model again, from stored runs")
    parser.add_argument("--folder", type=Path, help="where the rows go for a while")
    given = parser.parse_args()
    if given.as_rank:
        as_rank(given.as_rank, given.codes, given.iterations)
        return
    if given.again:
        stored = json.loads((RESULTS / "scaling.json").read_text(encoding="utf8"))
        report(stored["runs"], given, stored["machine"])
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = runs(Path(folder), given)
    report(found, given, machine(["ray", "pyarrow"]))


def runs(folder: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    x = synthetic(given.rows, given.dim)
    np.save(folder / "x.npy", x)
    items = folder / "items"
    items.mkdir()
    for file, start in enumerate(range(0, len(x), 4 * BLOCK_ROWS)):
        part = pa.array(x[start : start + 4 * BLOCK_ROWS].reshape(-1))
        table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(part, x.shape[1])})
        pq.write_table(table, items / f"{file:03d}.parquet", row_group_size=BLOCK_ROWS)
    shard_pool = LocalShardPool(Shard(ArrayBlocks(x), threads=1))
    found = {
        "local, 1": measure(
            ShardedMatrix(shard_pool, dim=x.shape[1]), given.codes, given.iterations, own_clock
        )
    }
    del shard_pool, x
    for ranks in (1, 2):
        name = f"torchrun, {ranks}"
        print(name, flush=True)
        found[name] = by_torchrun(folder / "x.npy", ranks, given.codes, given.iterations)
    for workers in (1, 2):
        found[f"ray, {workers}"] = by_ray(items, workers, given.codes, given.iterations)
    return found


def report(
    found: dict[str, dict[str, Any]], given: argparse.Namespace, where: dict[str, Any]
) -> None:
    equal = len({run["bits"] for run in found.values()}) == 1
    base = found["local, 1"]
    blocks = math.ceil(given.rows / BLOCK_ROWS)
    one = float(np.median([sum(found[f"{n}, 1"]["iteration_cpu"]) for n in ENGINES]))
    fixed = {
        "codes": given.codes,
        "dim": given.dim,
        # CPU, not wall: other work on the machine must not pass for arithmetic. The three runs of
        # one worker do the same sums; the middle one stands for them.
        "block_seconds": one / blocks,
        "call_seconds": found["ray, 1"]["call"],
        "bandwidth": given.bandwidth,
    }
    lines = []
    for name, run in found.items():
        workers = int(name.rsplit(" ", 1)[1])
        said = model(given.rows, workers=workers, cores=1, **fixed)["rows"]
        seen = max(run["iteration_cpu"])
        lines.append(
            {
                "run": name,
                "iteration, wall": f"{run['iteration']:.3f} s",
                "CPU of the busiest": f"{seen:.3f} s",
                "model": f"{said:.3f} s",
                "model / CPU": f"{said / seen:.2f}",
                "CPU of all / one": f"{sum(run['iteration_cpu']) / one:.2f}",
                "seeding, CPU of all": f"{sum(run['seeding_cpu']):.1f} s",
            }
            | {
                name: f"{run['bytes_an_iteration'].get(name, 0) / 1e6:.2f} MB"
                for name in ("sent", "received", "passed")
            }
        )
    print(f"{given.rows:,} x {given.dim}, K = {given.codes}; equal to the last bit: {equal}")
    print(markdown(lines))
    far = []
    for rows in (1e8, 1e9):
        for workers in (1, 2, 4, 8, 16, 32, 64):
            parts = model(rows, workers=workers, cores=given.cores, **fixed)
            each = sum(parts.values())
            # The driver seeds on a sample, whose size does not grow with the rows.
            level = base["seeding_cpu"][0] / given.cores + 26 * each
            far.append(
                {
                    "items": f"{rows:,.0f}",
                    "nodes": workers,
                    "iteration": spell(each),
                    "of it passing": f"{1 - parts['rows'] / each:.1%}",
                    "level (25 iterations)": spell(level),
                    "rows a node": f"{rows * given.dim * 4 / workers / 1e9:.1f} GB",
                }
            )
    print(f"\nmodel: nodes of {given.cores} cores, {given.bandwidth / 1e9:.2f} GB/s (assumed)")
    print(markdown(far))
    RESULTS.mkdir(exist_ok=True)
    document = {
        "machine": machine(["ray", "pyarrow"]),
        "given": {k: str(v) for k, v in vars(given).items()},
    }
    document |= {"equal": equal, "runs": found, "measured": lines, "model": far}
    (RESULTS / "scaling.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
