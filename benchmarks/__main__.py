"""The benchmarks' own program: ``python benchmarks [NAME ...]``, ``python benchmarks NAME --help``.

Without a name it runs those that compare semid with its peers, one after another, at their default
sizes; results go to ``benchmarks/results``. A single name takes that benchmark's own options.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
PEERS = ("nearest", "kmeans", "encoding", "neighbors", "overlap", "product", "training_step")
"""What a bare call runs."""


def main() -> None:
    """Run the named benchmarks, or all that compare with peers."""
    known = sorted(
        path.stem for path in HERE.glob("*.py") if path.stem not in ("__main__", "common")
    )
    names, options = sys.argv[1:], []
    if any(word.startswith("-") for word in names) and names[0] in known:
        names, options = names[:1], names[1:]
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no benchmark {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    for name in names or PEERS:
        print(f"{name}:", flush=True)
        sys.argv = [name, *options]
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
