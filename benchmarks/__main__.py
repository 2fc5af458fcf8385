"""The benchmarks' own program: ``python benchmarks [NAME ...]``, ``python benchmarks NAME --help``.

Without a name it runs those that compare semid with its peers, one after another;
results go to ``benchmarks/results``. A single name takes that benchmark's own options.
"""

from __future__ import annotations

import runpy
import shlex
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PEERS = (
    "nearest --threads 1 --repeats 3",
    "kmeans --codes 256",
    "kmeans --repeats 2 --without scikit",
    "encoding --codes 256 --dim 256 --train 32768",
    "encoding --train 32768 --rows 8192 --iterations 5 --repeats 3",
    "neighbors",
    "overlap",
    "product --rows 20000 --parts 16 --alternations 10 --repeats 2",
    "training_step",
)
"""What a bare call runs, in sizes for half an hour of one core."""


def main() -> None:
    """Run the named benchmarks, or all that compare with peers."""
    known = sorted(
        path.stem for path in HERE.glob("*.py") if path.stem not in ("__main__", "common")
    )
    names = sys.argv[1:]
    if any(word.startswith("-") for word in names) and names[0] in known:
        names = [shlex.join(names)]
    unknown = [name for name in names if name.split()[0] not in known]
    if unknown:
        sys.exit(f"no benchmark {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    for name in names or PEERS:
        print(f"{name}:", flush=True)
        sys.argv = shlex.split(name)
        begun = time.perf_counter()
        runpy.run_path(str(HERE / f"{sys.argv[0]}.py"), run_name="__main__")
        print(f"{name}: took {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
