"""How the DRQ paper's figures are read from rows, and compared on every data set there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from semid.reproduce.claims import Comparison, Row, Rows
from semid.reproduce.paired import Difference, paired_difference

__all__ = [
    "SCALE",
    "TOKENIZERS",
    "DrqTest",
    "Read",
    "constant",
    "effective_size",
    "figure",
    "flips",
    "less",
    "others",
    "relative",
    "space",
]

TOKENIZERS = ("RQ-VAE", "RQP-VAE", "RQ-KMeans", "DRQ-VAE", "DRQ-VAE+CL")
SCALE = 0.1
"""The noise at which overlap is judged; the page shows the whole sweep."""

Read = Callable[[Row], float | None]


def figure(*path: Any) -> Read:
    """Return how to read a figure by its path; None where any part is missing."""

    def read(row: Row) -> float | None:
        found: Any = row
        for step in path:
            if found is None:
                return None
            if isinstance(step, int):
                # Level -1 is the deepest; a level that is not there is a missing figure.
                found = found[step] if -len(found) <= step < len(found) else None
            else:
                found = found.get(step)
        return None if found is None else float(found)

    return read


def flips(row: Row) -> float | None:
    """Read the share of ids that input noise of 0.2 changes."""
    found = (row.get("flips") or {}).get("input")
    if not found or 0.2 not in found["scale"]:
        return None
    return float(found["id"][found["scale"].index(0.2)])


def effective_size(level: int, scale: float = SCALE) -> Read:
    """Return how to read K_eff of a level at a noise scale."""

    def read(row: Row) -> float | None:
        levels = row.get("overlap") or []
        if not -len(levels) <= level < len(levels):
            return None
        found = levels[level]
        return float(found["effective_size"][found["scale"].index(scale)])

    return read


def less(read: Read) -> Read:
    """Turn a figure that should be low into one that should be high."""

    def negative(row: Row) -> float | None:
        value = read(row)
        return None if value is None else -value

    return negative


class DrqTest:
    """Builds comparisons on every data set that the rows have.

    Args:
        rows: of the ledger; those of a variant decide nothing.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.sets = rows.names("data", variant="") or ["any data set"]

    def above(
        self,
        winner: str,
        losers: Sequence[str],
        reads: dict[str, Read],
        *,
        digits: int = 4,
    ) -> list[Comparison]:
        """Compare one tokenizer with others in some figures, higher being the claim."""
        return [
            Comparison(
                f"{name}: {what}, {winner} - {loser}",
                self.rows.difference(
                    read,
                    {"data": name, "tokenizer": winner, "variant": ""},
                    {"data": name, "tokenizer": loser, "variant": ""},
                ),
                digits,
            )
            for name in self.sets
            for what, read in reads.items()
            for loser in losers
        ]

    def inside(
        self, tokenizer: str, reads: dict[str, tuple[Read, Read]], *, digits: int = 4
    ) -> list[Comparison]:
        """Compare two figures of one tokenizer, the first being claimed the higher."""
        own = {"tokenizer": tokenizer, "variant": ""}
        return [
            Comparison(
                f"{name}: {what}, {tokenizer}",
                self.rows.difference(a, {"data": name, **own}, {"data": name, **own}, read_b=b),
                digits,
            )
            for name in self.sets
            for what, (a, b) in reads.items()
        ]


def space(name: str, key: str) -> Read:
    """Return how to read a measure of a space's geometry."""
    return figure("geometry", name, key)


def others(*names: str) -> list[str]:
    """Return the paper's other tokenizers."""
    return [name for name in TOKENIZERS if name not in names]


def relative(a: Read, b: Read) -> Read:
    """Return how to read ``a / b - 1``."""

    def read(row: Row) -> float | None:
        top, base = a(row), b(row)
        return None if top is None or not base else top / base - 1.0

    return read


def constant(rows: Rows, read: Read, **wanted: Any) -> Difference | None:
    """Return a figure's mean over seeds with its interval."""
    values = rows.values(read, variant="", **wanted)
    return paired_difference(values, [0.0] * len(values)) if values else None
