"""The tables at the end of a grid: means, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from semid.documents import code_span
from semid.reproduce.claims import Rows
from semid.reproduce.tables import average, spread

Row = Mapping[str, Any]
Pair = tuple[str, Row, Row]


def grid_tables(rows: Sequence[Row]) -> str:
    """Return Markdown: every cell, codes against none and each other, fusion on and off."""
    if not rows:
        return "no runs"
    # A cell is a run without its seed.
    axes = ("model", "method", "scale", "fusion")
    cells = [
        dict(zip(axes, values, strict=True))
        for values in dict.fromkeys(tuple(row[axis] for axis in axes) for row in rows)
    ]
    runs = Rows([dict(row) for row in rows])
    out = [f"Protocol: {code_span(rows[0]['protocol'])}", ""]
    out += [f"Popularity alone: {rows[0]['popularity_auc']:.4f}", ""]
    out += [
        "| model | method | scale | fusion | seeds | AUC | log loss | unseen items AUC "
        "| codes shuffled at test | fusion taken out at test | norm of W_down W_up |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(cell, runs.where(**cell)) for cell in cells),
    ]
    for title, head, pairs in _comparisons(cells):
        results = [(name, runs.difference(lambda row: row["auc"], a, b)) for name, a, b in pairs]
        lines = [f"| {name} | {result} |" for name, result in results if result is not None]
        if lines:
            out += ["", title, "", f"| {head} | AUC difference |", "|---|---|", *lines]
    out += ["", "Intervals are 95 % of Student's t over seeds, on one split."]
    return "\n".join(out)


def _line(cell: Row, runs: list[Any]) -> str:
    reliances = [(run["reliance"], run["auc"]) for run in runs]
    # Differences to the same weights without codes or without fusion.
    shuffled, without = (
        [figures[name] - auc for figures, auc in reliances if name in figures]
        for name in ("auc_codes_shuffled", "auc_without_fusion")
    )
    norms = [figures["fusion_norm"] for figures, _ in reliances if "fusion_norm" in figures]
    cold = [run["cold_auc"] for run in runs if run["cold_auc"] is not None]
    aucs, losses = ([run[name] for run in runs] for name in ("auc", "log_loss"))
    return (
        f"| {cell['model']} | {cell['method']} | {cell['scale'] or '-'} | {_switch(cell)} "
        f"| {len(runs)} | {spread(aucs)} | {spread(losses)} | {spread(cold)} "
        f"| {_signed(shuffled)} | {_signed(without)} | {spread(norms)} |"
    )


def _comparisons(cells: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[Pair]]]:
    """Yield title, head and the pairs of cells (name, a, b) of each table of differences."""
    coded = [cell for cell in cells if cell["method"] != "none"]
    pairs: list[Pair] = [
        (
            f"{cell['model']}, {cell['method']} {cell['scale']}x, fusion {_switch(cell)}",
            cell,
            {"model": cell["model"], "fusion": cell["fusion"], "method": "none"},
        )
        for cell in coded
    ]
    yield "Codes against none, the same model, fusion and seeds:", "codes - none", pairs
    for first, title in (("moc", "MoC"), ("barq", "BARQ")):
        pairs = [
            (
                f"{cell['model']}, {first} - {cell['method']}, {cell['scale']}x, "
                f"fusion {_switch(cell)}",
                {**cell, "method": first},
                cell,
            )
            for cell in coded
            if cell["method"] != first
        ]
        title = f"{title} against the others, the same model, scale, fusion and seeds:"
        yield title, f"{first} - other", pairs
    pairs = [
        (
            f"{cell['model']}, {cell['method']}" + (f" {cell['scale']}x" if cell["scale"] else ""),
            cell,
            {**cell, "fusion": False},
        )
        for cell in cells
        if cell["fusion"]
    ]
    yield "Fusion on against off:", "fusion on - off", pairs


def _switch(cell: Row) -> str:
    return "on" if cell["fusion"] else "off"


def _signed(values: Sequence[float]) -> str:
    return f"{average(values):+.4f}" if values else "-"
