"""What ids keep of behavior: what its page needs beside the data in ``papers/behavior.toml``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from semid.report.figure import line, palette
from semid.reproduce.claims import Rows
from semid.reproduce.drq import cell
from semid.reproduce.papers import Line, Paper, average

SHARES = {", 3 % of the users": 0.03, ", 10 % of the users": 0.1, ", 30 % of the users": 0.3, "": 1}
"""Share of the training users by the end of a tokenizer's name."""


def tokenizer_lines(rows: Rows) -> list[Line]:
    """Return a line per tokenizer."""
    return [Line(name, cell(name)) for name in rows.names("tokenizer")]


def relation_lines(rows: Rows) -> Iterator[Line]:
    """Yield a line per relation and tokenizer that saw all users."""
    kinds = dict.fromkeys(kind for row in rows.rows for kind in row.get("relations", ()))
    for kind in kinds:
        for name in rows.names("tokenizer"):
            if not name.endswith("of the users"):
                yield Line(f"{name}, {kind.replace('_', ' ')}", cell(name), ("relations", kind))


def share_chart(rows: Rows, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Yield a curve of the retention over the share of users per tokenizer with shares."""
    names = rows.names("tokenizer")
    for number, name in enumerate(one for one in names if f"{one}, 30 % of the users" in names):
        points = {
            share: average(values)
            for end, share in SHARES.items()
            if (values := rows.values(BEHAVIOR.metric("retention"), tokenizer=name + end))
        }
        yield line(name, list(points), list(points.values()), palette(number))


BEHAVIOR = Paper(
    "behavior",
    cell,
    lambda rows: {},
    code={
        "tokenizers": tokenizer_lines,
        "relations": relation_lines,
        "share of users": share_chart,
    },
)
