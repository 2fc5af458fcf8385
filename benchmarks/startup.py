"""CPU seconds of whole commands: what is encoded, reported and refused on a small catalogue.

    python benchmarks startup
    python benchmarks startup --source src --source ../other/src    # two checkouts, in turn
    python benchmarks startup --first    # with an empty kernel cache, once per checkout

Every command is a process of its own, pinned to one CPU where the system can do that. User and
system time count, the median of several runs. `import torch` alone says how fast the machine is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import save

ITEMS, DIM = 12_000, 256
COMMANDS = {
    "encode 12 thousand items": "encode model x.npy -o ids.parquet --overwrite",
    "report with interactions": "report model x.npy --interactions log.parquet -o r.html "
    "--overwrite",
    "--help": "--help",
    "fit --help": "fit --help",
    "refuses: fit, no such file": "fit nowhere.npy -o out",
    "refuses: fit rqvae, no such file": "fit nowhere.npy --tokenizer rqvae -o out",
    "refuses: fit rqvae, epochs 0": "fit x.npy --tokenizer rqvae --epochs 0 -o out",
    "refuses: encode, no such model": "encode nowhere x.npy -o out.parquet",
    "refuses: encode, output exists": "encode model x.npy -o ids.parquet",
    "refuses: report, no such file": "report model nowhere.npy -o out.html",
    "refuses: rank, no such column": "rank log.parquet --user-column who -o out",
    "refuses: retrieve, no such ids": "retrieve log.parquet --ids nowhere.parquet -o out",
}


def cpu_seconds(arguments: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Run Python with arguments; return the user and system seconds of the process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def semid(command: str) -> list[str]:
    return ["-c", "from semid.cli import main; main()", *command.split()]


def write_inputs(folder: Path) -> None:
    """Write embeddings in loose clusters, and a log."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(400, DIM))
    x = centers[generator.integers(400, size=ITEMS)] + generator.normal(size=(ITEMS, DIM))
    np.save(folder / "x.npy", x.astype(np.float32))
    users = np.repeat(np.arange(10_000), 10)
    items = generator.integers(ITEMS, size=len(users))
    log = {"user_id": users, "item_id": items, "timestamp": np.tile(np.arange(10), 10_000)}
    pq.write_table(pa.table(log), folder / "log.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", action="append", help="src folder of a checkout to measure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--first", action="store_true", help="fit with an empty kernel cache too")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sources = options.source or [str(Path(__file__).parents[1] / "src")]
    titles = [f"source {number}" for number in range(1, len(sources) + 1)]
    with contextlib.ExitStack() as stack:
        folders, environments, firsts = {}, {}, {}
        for source in sources:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folders[source] = folder
            environments[source] = {
                **os.environ,
                "PYTHONPATH": str(Path(source).resolve()),
                "PYTHONDONTWRITEBYTECODE": "",  # users have compiled bytecode
                "OMP_NUM_THREADS": "1",
            }
            write_inputs(folder)
            fit = semid("fit x.npy --levels 3 --codebook-size 256 -o model --overwrite")
            if options.first:
                cache = {"NUMBA_CACHE_DIR": str(folder / "cache")}
                environments[source] |= cache
                firsts[source] = cpu_seconds(fit, folder, environments[source])
            cpu_seconds(fit, folder, environments[source])
        calls = {"python -c 'import torch'": ["-c", "import torch"]}
        calls |= {name: semid(command) for name, command in COMMANDS.items()}
        rows = []
        for name, arguments in calls.items():
            times: dict[str, list[float]] = {source: [] for source in sources}
            for turn in range(options.repeats + 1):  # the first fills caches
                for source in sources:
                    spent = cpu_seconds(arguments, folders[source], environments[source])
                    times[source] += [spent] if turn else []
            medians = [float(np.median(each)) for each in times.values()]
            rows.append({"command": name} | dict(zip(titles, medians, strict=True)))
            print(rows[-1], flush=True)
        if firsts:
            again = {s: cpu_seconds(fit, folders[s], environments[s]) for s in sources}
            for title, spent in (("fit, first on a machine", firsts), ("fit, again", again)):
                rows.append({"command": title} | dict(zip(titles, spent.values(), strict=True)))
    save(
        "startup",
        rows,
        settings={"items": ITEMS, "dim": DIM, "repeats": options.repeats},
        packages=["pyarrow", "typer"],
        note="CPU seconds (user and system) of whole processes, medians.",
    )


if __name__ == "__main__":
    main()
