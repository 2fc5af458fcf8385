"""The ledger: one JSON line per finished run, written once, and where it comes from.

Several processes and several commands may work on one ledger at the same time.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from semid.errors import InputError

try:
    import fcntl
except ImportError:  # no such module on Windows: one command at a time there
    fcntl = None  # type: ignore[assignment]


RUNS_FILE = "runs.jsonl"
DIGITS = 6
PACKAGES = ("semid", "numpy", "torch", "numba", "pyarrow")
CELL = ("data", "variant", "run", "ties", "tokenizer", "model", "method", "scale", "fusion", "part")


def cell_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a run of a paper from the others, whatever its settings."""
    return tuple(row.get(name, "") for name in (*CELL, "seed"))


def digest(document: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a JSON-able document."""
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """Round every float inside a document to significant digits; what is not finite is None."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return value


def read_runs(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a ledger file; a broken line, except a last one cut short, is an error."""
    file = Path(path)
    if not file.exists():
        return []
    *lines, _ = file.read_bytes().split(b"\n")  # what follows the last newline was cut short
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise InputError(
                f"line {number} of '{file}' is no JSON; take the file from version control again, "
                "or delete the line to have its run repeated"
            ) from None
    return rows


class Ledger:
    """Runs in a folder, safe with several processes and several commands at once.

    A run is claimed before it begins and added once. A killed process loses its claims, so its
    unfinished run is repeated. Where the system has no ``fcntl`` there are no claims.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / RUNS_FILE
        self.locks = self.folder / ".locks"
        self.locks.mkdir(parents=True, exist_ok=True)
        self._seen = 0
        self._keys: set[str] = set()

    def keys(self) -> set[str]:
        """Return the keys of finished runs; reads only what is new in the file."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._seen)
                fresh = file.read()
            # A line without its newline is not complete yet; it is read again next time.
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._seen += len(whole)
            self._keys |= {json.loads(line)["key"] for line in whole.splitlines() if line.strip()}
        return self._keys

    def add(self, row: Mapping[str, Any]) -> bool:
        """Append a run, unless its ``key`` is there already; return whether it was written."""
        line = json.dumps(rounded(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self.lock("ledger"):
            # Under the lock no other process can append between this check and the write.
            if row["key"] in self.keys():
                return False
            with self.path.open("ab+") as file:
                end = file.seek(0, os.SEEK_END)
                if end > self._seen:
                    # `keys` has read every whole line: what follows was cut short by a kill.
                    file.truncate(self._seen)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        return True

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yield whether this process may run ``key``: nobody else runs it and it is not done."""
        with self._locked(f"run-{key}", wait=False) as mine:
            yield mine and key not in self.keys()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Wait for, and hold, a lock of this ledger; a process that dies lets go of it."""
        with self._locked(name, wait=True):
            yield

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Yield whether the lock is ours; the system releases it when the file is closed."""
        if fcntl is None:
            yield True
            return
        self.locks.mkdir(parents=True, exist_ok=True)
        with (self.locks / f"{name}.lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def origin() -> dict[str, Any]:
    """Return what stands beside every result: code, versions, machine, threads and time."""
    import torch

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**_fixed(), "threads": torch.get_num_threads(), "finished": now}


@cache
def _fixed() -> dict[str, Any]:
    """Return what does not change while the process runs: its code is what it was at the start."""
    import torch

    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".")
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(changed),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "chip": _chip(),
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _git(*arguments: str) -> str | None:
    """Return what git says of the folder of this package; None where it is in no repository."""
    command, folder = ["git", *arguments], Path(__file__).parents[1]
    try:
        return subprocess.check_output(
            command, cwd=folder, stderr=subprocess.DEVNULL, text=True, timeout=30
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _chip() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
