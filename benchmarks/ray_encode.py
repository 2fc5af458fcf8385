"""Encode many synthetic rows with local processes and with Ray: the same codes, at what price.

``python benchmarks ray_encode`` writes 20 million x 128 float16 rows (5 GB) as Parquet into a
folder that is removed afterwards, encodes them on both engines in programs of their own, compares
every code, and prints CPU seconds (of all processes of an engine, its daemons among them) and peak
memory (proportional set size, so that what processes share counts once).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers give way to every other process by default, which on a busy machine looks like Ray.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import semid
from common import RESULTS, machine, markdown

FILE_ROWS = 1 << 20
GROUP_ROWS = 1 << 17
SEED = 0


def write(folder: Path, rows: int, dim: int) -> None:
    """Write float16 rows around 4,096 centers, a file at a time."""
    folder.mkdir()
    centers = np.random.default_rng(SEED).standard_normal((4096, dim), dtype=np.float32)
    centers *= np.linspace(2.0, 0.2, dim, dtype=np.float32)
    for file, start in enumerate(range(0, rows, FILE_ROWS)):
        count = min(FILE_ROWS, rows - start)
        generator = np.random.default_rng((SEED, file))
        x = generator.standard_normal((count, dim), dtype=np.float32)
        x *= np.float32(0.4)
        x += centers[generator.integers(0, len(centers), count)]
        flat = pa.array(x.astype(np.float16).reshape(-1))
        columns = {
            "item_id": pa.array(np.arange(start, start + count)),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
        }
        pq.write_table(
            pa.table(columns),
            folder / f"{file:04d}.parquet",
            row_group_size=GROUP_ROWS,
            compression="none",
            use_dictionary=False,
        )


def descendants(root: int) -> list[int]:
    """List the processes below ``root``."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                words = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)] = int(words[1])
    found, wave = [], [root]
    while wave:
        wave = [pid for pid, parent in parents.items() if parent in wave]
        found += wave
    return found


def memory(pids: list[int]) -> tuple[int, int]:
    """Return the proportional set sizes of all processes together, and of the largest."""
    sizes = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    sizes.append(int(line.split()[1]) * 1024)
    return sum(sizes), max(sizes, default=0)


def cpu_seconds(pids: list[int], seen: dict[int, float]) -> None:
    """Note the CPU seconds of each process, up to now."""
    ticks = os.sysconf("SC_CLK_TCK")
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            seen[pid] = max(seen.get(pid, 0.0), (int(words[11]) + int(words[12])) / ticks)


def watched(command: list[str]) -> dict[str, float]:
    """Run a program and all it starts, daemons too; return wall and CPU seconds and peak memory.

    CPU seconds are read from every process twice a second for as long as it lives: what Ray's
    daemon does not wait for never reaches the totals that its parents are told. Orphans become
    children of this process, so that they stay in sight.
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    began = time.perf_counter()
    process = subprocess.Popen(command)
    peak, largest, ended = 0, 0, threading.Event()
    seen: dict[int, float] = {}

    def look() -> None:
        nonlocal peak, largest
        turn = 0
        while not ended.wait(0.5):
            pids = descendants(os.getpid())
            cpu_seconds(pids, seen)
            turn += 1
            if turn % 4 == 0:
                whole, one = memory(pids)
                peak, largest = max(peak, whole), max(largest, one)

    watcher = threading.Thread(target=look)
    watcher.start()
    code = process.wait()
    wall = time.perf_counter() - began
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    ended.set()
    watcher.join()
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}")
    return {
        "wall_s": wall,
        "cpu_s": sum(seen.values()),
        "peak_gb": peak / 1e9,
        "largest_gb": largest / 1e9,
    }


def equal(first: Path, second: Path) -> bool:
    """Compare two folders of ids file by file."""
    names = sorted(path.name for path in first.iterdir())
    return names == sorted(path.name for path in second.iterdir()) and all(
        pq.read_table(first / name).equals(pq.read_table(second / name)) for name in names
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the rows go for a while")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        items, model = folder / "items", folder / "model"
        write(items, given.rows, given.dim)
        tokenizer = semid.RQKMeans(
            levels=given.levels, codebook_size=given.codes, kmeans={"max_iter": 3}
        )
        first = next(semid.open_embeddings(items).blocks(65_536))[1]
        tokenizer.fit(first).save(model)
        found: dict[str, dict[str, Any]] = {}
        start = [sys.executable, "-c", "from semid.cli import main; main()", "encode"]
        for engine, flags in {
            "local": ["--processes", str(given.workers)],
            "ray": ["--engine", "ray", "--workers", str(given.workers)],
        }.items():
            command = [*start, str(model), str(items), "-o", str(folder / engine), "-q", *flags]
            found[engine] = watched(command)
        same = equal(folder / "local", folder / "ray")
        stored = sum(path.stat().st_size for path in items.iterdir()) / 1e9
    rows = [{"engine": engine, **figures} for engine, figures in found.items()]
    over = found["ray"]["cpu_s"] / found["local"]["cpu_s"] - 1
    print(f"{given.rows:,} x {given.dim} float16, {stored:.2f} GB; all codes equal: {same}")
    print(markdown(rows))
    print(f"Ray over local: {over:+.1%} CPU seconds")
    RESULTS.mkdir(exist_ok=True)
    document = {
        "machine": machine(["ray", "pyarrow"]),
        "given": {key: str(value) for key, value in vars(given).items() if key != "folder"},
        "equal": same,
        "stored_gb": stored,
        "runs": found,
    }
    path = RESULTS / "ray_encode.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
