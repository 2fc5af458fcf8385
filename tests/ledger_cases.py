"""What a process of its own does to a ledger; imports little, since each process imports it."""

from __future__ import annotations

from pathlib import Path

from semid.reproduce.ledger import Ledger


def append(folder: Path, start: int) -> None:
    """Add forty runs, some of which others add too."""
    ledger = Ledger(folder)
    for n in range(start, start + 40):
        ledger.add({"key": f"k{n % 60}", "text": "x" * 2000})
