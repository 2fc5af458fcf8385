"""What the benchmarks share: real rows, runs in turn, a word on the machine, result files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RESULTS", "Timing", "in_turn", "machine", "markdown", "save", "union_rows"]

RESULTS = Path(__file__).parent / "results"
SHARE = 0.25
"""Seconds each side runs in a turn at least, so that all meet the machine's other work alike."""


def union_rows(dim: int) -> Tensor:
    """Load the union catalogue in a random order, on its first ``dim`` principal components.

    Blobs would flatter every screening and pruning trick, so there is no synthetic stand-in.
    """
    root = Path(os.environ.get("SEMID_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "union_catalogue" / "embeddings.f16.npy"
    if not path.exists():
        sys.exit(f"no real embeddings at {path}; set SEMID_DATA to the folder that holds them")
    rows = torch.from_numpy(np.load(path)).float()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    if dim < rows.shape[1]:
        centered = rows - rows.mean(0)
        _, vectors = torch.linalg.eigh(centered.T @ centered)
        rows = centered @ vectors.flip(1)[:, :dim]
    return rows.contiguous()


@dataclass
class Timing:
    """Seconds of one side's runs, a value a turn, and what its last run returned."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    result: Any = None

    def figures(self, base: Timing) -> dict[str, float]:
        """Return medians, the least CPU seconds, and how many times faster than ``base``."""
        return {
            "wall_s": float(np.median(self.wall)),
            "cpu_s": float(np.median(self.cpu)),
            "least_cpu_s": min(self.cpu),
            "wall_x": float(np.median(base.wall) / np.median(self.wall)),
            "cpu_x": float(np.median(base.cpu) / np.median(self.cpu)),
            "best_x": min(base.cpu) / min(self.cpu),
        }


def in_turn(
    sides: Mapping[str, Callable[[], Any]], *, repeats: int, rest: float = 0.0
) -> dict[str, Timing]:
    """Run all sides in turn (A B C A B C) after one turn that warms caches and compiles.

    Args:
        sides: functions without arguments, by name; preparation belongs outside them.
        repeats: turns that count.
        rest: seconds of sleep before each run: OpenMP's threads spin on for 0.2 s after the side
            before, which a side with several threads would pay for.
    """
    taken = {name: Timing() for name in sides}
    calls: dict[str, int] = {}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            time.sleep(rest)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls.get(name, 1)):
                taken[name].result = side()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                taken[name].wall.append(spent[0] / calls[name])
                taken[name].cpu.append(spent[1] / calls[name])
            else:
                calls[name] = max(1, round(SHARE / max(spent[0], 1e-4)))
    return taken


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Describe the chip, its load and the versions of ``packages``."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    versions = {}
    for package in ("semid", "numpy", "torch", "numba", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "chip": model,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    packages: Sequence[str],
    note: str,
) -> None:
    """Print the table and write it to ``results/<date>-<name>.json`` and ``.md``."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    seen = machine(packages)
    table = markdown(rows)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    document = {"date": today, "machine": seen, "settings": dict(settings), "rows": list(rows)}
    path = RESULTS / f"{today}-{name}.json"
    path.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf8")
    versions = ", ".join(f"{package} {version}" for package, version in seen["versions"].items())
    chosen = ", ".join(f"{key} {value}" for key, value in settings.items())
    path.with_suffix(".md").write_text(
        f"# {name}, {today}\n\n{note}\n\n{table}\n\n{seen['chip']}, {seen['cpus']} CPUs, load "
        f"{seen['load']}; Python {seen['python']}, {versions}.\nSettings: {chosen}.\n",
        encoding="utf8",
    )
