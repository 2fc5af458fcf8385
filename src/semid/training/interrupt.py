"""Ctrl-C and SIGTERM wait for the end of a step, so that the state saved is that of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupts", "deferred_interrupts"]


class Interrupts:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.pending = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Note the wish; a second one stops at once."""
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Yield an object whose ``pending`` turns true on SIGINT or SIGTERM.

    Handlers are set in the main thread alone (elsewhere Python allows none) and put back at the
    end.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in kept:
        signal.signal(number, interrupts.ask)
    try:
        yield interrupts
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
