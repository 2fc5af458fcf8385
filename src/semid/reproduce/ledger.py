"""The ledger: every finished run one JSON line, written once, whoever writes beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from semid.errors import InputError

try:
    import fcntl
except ImportError:  # no such module on Windows: one command at a time there
    fcntl = None  # type: ignore[assignment]

__all__ = ["RUNS_FILE", "Ledger", "digest", "median", "read_runs", "rounded"]

RUNS_FILE = "runs.jsonl"
DIGITS = 6


def digest(document: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a JSON-able document."""
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """Round every float inside a JSON-able document to so many significant digits.

    NaN and infinity, which JSON does not know, become None.
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return value


def read_runs(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a ledger file.

    A last line that a kill cut short is no result and is left out; a broken line before it means
    that the file was edited.

    Raises:
        InputError: a line before the last is no JSON.
    """
    file = Path(path)
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is no line
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError:
            raise InputError(
                f"line {number} of '{file}' is no JSON; take the file from version control again, "
                "or delete the line to have its run repeated"
            ) from None
    return found


class Ledger:
    """Runs in a folder, safe with several processes and several commands at once.

    A run is claimed before it begins and added once; what a kill leaves half done holds no claim
    any more and is repeated. Where the system has no ``fcntl`` there are no claims.

    Args:
        folder: made if it does not exist; holds ``runs.jsonl`` and locks.
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
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._seen += len(whole)
            self._keys |= {json.loads(line)["key"] for line in whole.splitlines() if line.strip()}
        return self._keys

    def add(self, row: Mapping[str, Any]) -> bool:
        """Append a run, unless its ``key`` is there already.

        Returns:
            Whether it was written.
        """
        line = json.dumps(rounded(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self.lock("ledger"):
            if row["key"] in self.keys():
                return False
            with self.path.open("ab+") as file:
                end = file.seek(0, os.SEEK_END)
                if end > self._seen:  # a line that a kill cut short
                    file.truncate(self._seen)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        return True

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yield whether this process may run ``key``: nobody else runs it and it is not done."""
        with self._held(f"run-{key}", wait=False) as mine:
            yield mine and key not in self.keys()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Wait for, and hold, a lock of this ledger; a process that dies lets go of it."""
        with self._held(name, wait=True):
            yield

    @contextlib.contextmanager
    def _held(self, name: str, *, wait: bool) -> Iterator[bool]:
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
            yield True  # closing the file lets go


def median(values: Sequence[float]) -> float:
    """Return the median of at least one value."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
