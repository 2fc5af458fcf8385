"""Which numbers predict recommendations: what its page needs beside ``papers/predict.toml``."""

from __future__ import annotations

from typing import Any

from semid.reproduce.claims import Rows
from semid.reproduce.papers import Line, Paper


def cell(name: str) -> dict[str, Any]:
    """Select the runs of a name: ``model on tokenizer``."""
    model, _, tokenizer = name.partition(" on ")
    return {"model": model, "tokenizer": tokenizer}


def run_lines(rows: Rows) -> list[Line]:
    """Return a line per recommender and tokenizer."""
    return [
        Line(f"{model} on {name}", {"model": model, "tokenizer": name})
        for model in rows.names("model")
        for name in rows.names("tokenizer", model=model)
    ]


PREDICT = Paper("predict", cell, lambda rows: {}, code={"runs": run_lines})
