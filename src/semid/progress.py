"""Progress: bars on a terminal, one line in a notebook, JSON lines for programs, or nothing.

Library code takes a `Progress` and never prints. The command line chooses which one. In Python, a
function marked `with_progress` shows bars by itself once it has worked for a second, on a terminal
or in a notebook; elsewhere it is silent.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column

from semid.lazy import plain_torch

# Seconds of work before bars appear unasked, and between lines where there is no terminal.
_DELAY = 1.0
_LINE_SECONDS = 1.0


class Progress(Protocol):
    """What a long piece of work reports to."""

    def start(self, task: str, *, total: int | None = None) -> None:
        """Begin a task of ``total`` steps (None: unknown), ending the one before."""

    def step(self, done: int = 1, **fields: Any) -> None:
        """Say that ``done`` more steps of the task are finished, with figures worth seeing."""

    def close(self) -> None:
        """End the last task."""


ProgressArgument = Progress | Literal[False] | None
"""What functions take: None shows progress by default, False shows none."""


class QuietProgress:
    """Reports nothing."""

    def start(self, task: str, *, total: int | None = None) -> None:
        """Do nothing."""

    def step(self, done: int = 1, **fields: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class JsonProgress:
    """Writes JSON lines, at most one per second, and one when a task ends."""

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
        if time.monotonic() - self._last >= _LINE_SECONDS:
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


class NotebookProgress(JsonProgress):
    """Rewrites one line of text per task, which every notebook shows without a further package."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.monotonic()  # work that ends within a second shows nothing
        self._shown = False

    def _write(self, event: str) -> None:
        if event == "end" and not self._shown:
            return
        self._last, self._shown = time.monotonic(), event != "end"
        total = "" if self._total is None else f"/{self._total:,}"
        seconds = time.monotonic() - self._began
        parts = [f"{self._task}", f"{self._done:,}{total}", f"{seconds:.0f} s", _note(self._fields)]
        self._stream.write("\r" + "  ".join(parts).ljust(100) + "\n" * (event == "end"))
        self._stream.flush()


class RichProgress:
    """Draws one bar per task on a terminal, after ``delay`` seconds of work."""

    def __init__(self, console: Console, *, delay: float = 0) -> None:
        # Figures beside a bar take the room that is left, and are cut where it is not enough.
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        name = Column(min_width=8, no_wrap=True, overflow="ellipsis")
        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", table_column=name),
            rich_progress.BarColumn(bar_width=20, table_column=Column(min_width=10, no_wrap=True)),
            rich_progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            rich_progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
            rich_progress.TextColumn("{task.fields[note]}", style="dim", table_column=rest),
            console=console,
            expand=True,
        )
        self._task: rich_progress.TaskID | None = None
        self._starts = time.monotonic() + delay

    def start(self, task: str, *, total: int | None = None) -> None:
        """Begin a task with a bar of its own."""
        self._finish()
        self._task = self._bars.add_task(task, total=total, note="")
        self._show()

    def step(self, done: int = 1, **fields: Any) -> None:
        """Move the bar and show the figures beside it."""
        if self._task is not None:
            self._bars.update(self._task, advance=done, note=_note(fields))
            self._show()

    def close(self) -> None:
        """Leave the bars as they are."""
        self._finish()
        self._bars.stop()

    def _show(self) -> None:
        if time.monotonic() >= self._starts:
            self._bars.start()  # a second start does nothing

    def _finish(self) -> None:
        if self._task is not None:
            # A task of unknown length ends with a full bar.
            task = next(t for t in self._bars.tasks if t.id == self._task)
            self._bars.update(self._task, total=task.completed or 1, completed=task.completed or 1)
            self._task = None


def _note(fields: dict[str, Any]) -> str:
    """Return figures in one line."""
    return "  ".join(
        f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in fields.items()
    )


@contextmanager
def make_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Yield bars on a terminal, JSON lines elsewhere, silence when ``quiet``; closed at the end."""
    screen = Console(stderr=True)
    progress: Progress = JsonProgress()
    if quiet:
        progress = QuietProgress()
    elif screen.is_terminal:
        progress = RichProgress(screen)
    with without_default_progress():
        try:
            yield progress
        finally:
            progress.close()


_silent = 0  # pieces of work in which functions show no progress of their own


@contextmanager
def without_default_progress() -> Iterator[None]:
    """Let functions show nothing unasked: inside work with a progress, and in commands."""
    global _silent
    _silent += 1
    try:
        yield
    finally:
        _silent -= 1


def default_progress() -> Progress:
    """Return what functions show unasked: bars, a line in a notebook, or nothing elsewhere."""
    screen = Console(stderr=True)
    if _silent:
        return QuietProgress()
    if screen.is_jupyter:
        return NotebookProgress()
    return RichProgress(screen, delay=_DELAY) if screen.is_terminal else QuietProgress()


_P = ParamSpec("_P")
_R = TypeVar("_R")


def with_progress(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function with the argument ``progress`` show its own where none is given.

    These are the long pieces of work, so it also runs with torch as it is by default.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given: Any = kwargs.get("progress")
        progress = default_progress() if given is None else given or QuietProgress()
        kwargs["progress"] = progress
        with without_default_progress(), plain_torch():
            try:
                return function(*args, **kwargs)
            finally:
                if given is None:
                    progress.close()

    return call
