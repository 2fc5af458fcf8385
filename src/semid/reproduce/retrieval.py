"""Next-item recommendation: what its page needs beside the data in ``papers/retrieval.toml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from semid.data.interactions import TIES
from semid.report.figure import line, palette
from semid.reproduce.claims import Rows, metric
from semid.reproduce.papers import Column, Line, Paper, average, difference
from semid.reproduce.retrieval_grid import BASELINE

RECALL = metric("metrics.recall_10")
WITHOUT_HISTORY = metric("without_history.recall_10")
SETS = ("beauty", "sports", "toys")
FILE_ORDER = ", file order"


def cell(name: str) -> dict[str, Any]:
    """Select the runs of a name: ``model``, ``model on ids`` or either with ``, file order``."""
    plain = name.removesuffix(FILE_ORDER)
    model, _, ids = plain.partition(" on ")
    ties = "shuffle" if plain == name else "file"
    return {"model": model, "tokenizer": ids, "ties": ties}


def _names(rows: Rows, *orders: str) -> list[str]:
    """Name every model, or model on ids, that is run in one of some orders of ties."""
    cells = [row for row in (*rows.rows, *rows.missing) if row["ties"] in orders]
    pairs = dict.fromkeys((row["model"], row["tokenizer"]) for row in cells)
    return [f"{model} on {ids}" if ids else model for model, ids in pairs]


def facts(rows: Rows) -> Mapping[str, Any]:
    """Return the Semantic IDs of the recipe, and each with a model that reads it."""
    ids = [name for name in rows.planned("tokenizer") if name]
    # Claims are judged with shuffled ties; what runs in the files' order alone stands in tables.
    names = _names(rows, "shuffle")
    # Whether a model has item ids beside the codes is said in its name.
    coded = [name for name in names if " on " in name]
    together = [name for name in coded if "item ids" in name]
    alone = [name for name in coded if name not in together]
    return {"ids": ids, "all": names, "alone": alone, "together": together}


def run_lines(rows: Rows) -> list[Line]:
    """Return a line per model and ids, models without ids first."""
    control = {"model": BASELINE, "tokenizer": ""}
    names = sorted(_names(rows, *TIES), key=lambda name: " on " in name)
    parts = [cell(name) for name in names]
    return [
        Line(name, {k: v for k, v in part.items() if k != "ties"}, against=control)
        for name, part in zip(names, parts, strict=True)
    ]


def control_columns(rows: Rows) -> Iterator[Column]:
    """Yield the difference to the control, paired over seeds."""
    yield Column(f"R@10 less {BASELINE}", difference(RECALL))


def curve_chart(rows: Rows, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Yield a curve per line: validation NDCG@10 over epochs, of the first seed."""
    for number, one in enumerate(lines):
        curve = rows.where(**one.where)[0]["curve"]
        if curve:
            yield line(one.label, list(range(1, len(curve) + 1)), curve, palette(number))


def published(rows: Rows) -> list[list[str]]:
    """Write published Recall@10 above ours in the files' order, a column a data set."""
    ours = []
    for one in run_lines(rows):
        for figure, source in ((RECALL, "here"), (WITHOUT_HISTORY, "here, without history")):
            figures = [rows.values(figure, **one.where, data=data, ties="file") for data in SETS]
            if any(figures):
                cells = [f"{average(values):.4f}" if values else "" for values in figures]
                ours.append([one.label, source, *cells])
    theirs = [
        [name, source, *(f"{value:.4f}" if value else "" for value in values)]
        for name, source, *values in RETRIEVAL.file["published"]
    ]
    return [*theirs, *ours] if ours else []


RETRIEVAL = Paper(
    "retrieval",
    cell,
    facts,
    code={
        "runs": run_lines,
        "control": control_columns,
        "curves": curve_chart,
        "published": published,
    },
)
