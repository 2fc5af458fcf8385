"""Progress: bars on a terminal, one JSON line per step otherwise, nothing when quiet.

Library code takes a `Progress` and never prints. The command line chooses which one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich import progress as rich_progress
from rich.console import Console


class Progress(Protocol):
    """What a long piece of work reports to."""

    def start(self, task: str, *, total: int | None = None) -> None:
        """Begin a task of ``total`` steps (None: unknown), ending the one before."""

    def step(self, done: int = 1, **fields: Any) -> None:
        """Say that ``done`` more steps of the task are finished, with figures worth seeing."""

    def close(self) -> None:
        """End the last task."""


class QuietProgress:
    """Reports nothing."""

    def start(self, task: str, *, total: int | None = None) -> None:
        """Do nothing."""

    def step(self, done: int = 1, **fields: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class JsonProgress:
    """Writes one JSON line per step, at most ten per second, and one when a task ends."""

    def __init__(self) -> None:
        self._stream = sys.stderr  # so that output can be piped
        self._task: str | None = None
        self._last = 0.0

    def start(self, task: str, *, total: int | None = None) -> None:
        """Begin a task."""
        self.close()
        self._task, self._total, self._done = task, total, 0
        self._began = time.monotonic()
        self._fields: dict[str, Any] = {}

    def step(self, done: int = 1, **fields: Any) -> None:
        """Count steps; write a line unless one was written a moment ago."""
        if self._task is None:
            return
        self._done += done
        self._fields = fields
        if time.monotonic() - self._last >= 0.1:
            self._write("step")

    def close(self) -> None:
        """Write the task's last line."""
        if self._task is not None:
            self._write("end")
            self._task = None

    def _write(self, event: str) -> None:
        self._last = time.monotonic()
        line = {
            "task": self._task,
            "event": event,
            "done": self._done,
            "total": self._total,
            "seconds": round(time.monotonic() - self._began, 3),
            **self._fields,
        }
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


class RichProgress:
    """Draws one bar per task on a terminal."""

    def __init__(self, console: Console) -> None:
        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=30),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("{task.fields[note]}", style="dim"),
            console=console,
        )
        self._task: rich_progress.TaskID | None = None

    def start(self, task: str, *, total: int | None = None) -> None:
        """Begin a task with a bar of its own."""
        self._finish()
        self._bars.start()
        self._task = self._bars.add_task(task, total=total, note="")

    def step(self, done: int = 1, **fields: Any) -> None:
        """Move the bar and show the figures beside it."""
        if self._task is not None:
            note = "  ".join(f"{name} {_short(value)}" for name, value in fields.items())
            self._bars.update(self._task, advance=done, note=note)

    def close(self) -> None:
        """Leave the bars as they are."""
        self._finish()
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is not None:
            # A task of unknown length ends with a full bar.
            task = next(t for t in self._bars.tasks if t.id == self._task)
            self._bars.update(self._task, total=task.completed or 1, completed=task.completed or 1)
            self._task = None


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@contextmanager
def make_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Yield bars on a terminal, JSON lines elsewhere, silence when ``quiet``; closed at the end."""
    screen = Console(stderr=True)
    progress: Progress = JsonProgress()
    if quiet:
        progress = QuietProgress()
    elif screen.is_terminal:
        progress = RichProgress(screen)
    try:
        yield progress
    finally:
        progress.close()
