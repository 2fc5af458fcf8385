"""Where a result comes from: commit, versions and machine."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["origin"]

PACKAGES = ("semid", "numpy", "torch", "numba", "pyarrow")


def origin() -> dict[str, Any]:
    """Return what stands beside every result.

    Returns:
        JSON-able: ``commit`` of the source tree (None outside one), ``dirty`` (whether its code
        differs from that commit), ``versions``, ``machine`` (chip, CPUs, and the GPU if torch has
        one), ``threads`` and ``finished``.
    """
    import torch

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**_fixed(), "threads": torch.get_num_threads(), "finished": now}


@cache
def _fixed() -> dict[str, Any]:
    """Return what does not change while the process runs: its code is what it was at the start."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".")
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(changed),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {"chip": _chip(), "cpus": os.cpu_count(), "gpu": _gpu()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git(*arguments: str) -> str | None:
    """Return what git says of the folder of this package; None where it is in no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _chip() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    """Return the name of the device that runs train on where there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
