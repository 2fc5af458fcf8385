"""A run that is interrupted in the middle."""

from __future__ import annotations

from semid.progress import QuietProgress


class Stop(QuietProgress):
    """Interrupts after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step(self, done: int = 1, **fields: object) -> None:
        self.left -= bool(fields)
        if self.left == 0:
            raise KeyboardInterrupt
