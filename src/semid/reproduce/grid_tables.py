"""The tables at the end of a grid: means, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from semid.markdown import code_span
from semid.reproduce.paired import Difference, paired_difference

Row = Mapping[str, Any]


def _by_seed(rows: Sequence[Row], figure: str, **values: Any) -> dict[int, float]:
    """Return a figure by seed of the rows with these values."""
    return {
        row["seed"]: row[figure]
        for row in rows
        if all(row[name] == value for name, value in values.items()) and row[figure] is not None
    }


def difference(
    rows: Sequence[Row],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    figure: str = "auc",
) -> Difference | None:
    """Return the mean of a - b over the seeds that two cells share, or None without any.

    ``a`` and ``b`` are values of their rows, for example ``{"method": "moc", "scale": 3}``.
    """
    first, second = _by_seed(rows, figure, **a), _by_seed(rows, figure, **b)
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    return paired_difference([first[s] for s in seeds], [second[s] for s in seeds])


def grid_tables(rows: Sequence[Row]) -> str:
    """Return Markdown: every cell, codes against none and each other, fusion on and off."""
    if not rows:
        return "no runs"
    out = [f"Protocol: {code_span(rows[0]['protocol'])}", ""]
    out += [f"Popularity alone: {rows[0]['popularity_auc']:.4f}", "", *_cells(rows)]
    comparisons = [
        ("Codes against none, the same model, fusion and seeds:", _against_none(rows)),
        *(
            (
                f"{title} against the others, the same model, scale, fusion and seeds:",
                _against_others(rows, method),
            )
            for method, title in (("moc", "MoC"), ("barq", "BARQ"))
        ),
        ("Fusion on against off:", _fusion(rows)),
    ]
    for title, lines in comparisons:
        if lines:
            out += ["", title, "", *lines]
    out += ["", "Intervals are 95 % of Student's t over seeds, on one split."]
    return "\n".join(out)


def _cell_keys(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys((r["model"], r["method"], r["scale"], r["fusion"]) for r in rows))


def _cells(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| model | method | scale | fusion | seeds | AUC | log loss | unseen items AUC "
        "| codes shuffled at test | fusion taken out at test | norm of W_down W_up |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, method, scale, fusion in _cell_keys(rows):
        cell = {"model": model, "method": method, "scale": scale, "fusion": fusion}
        runs = [r for r in rows if cell.items() <= r.items()]
        # Differences to the same weights without codes or without fusion.
        shuffled, without = (
            [r["reliance"][name] - r["auc"] for r in runs if name in r["reliance"]]
            for name in ("auc_codes_shuffled", "auc_without_fusion")
        )
        norms = [r["reliance"]["fusion_norm"] for r in runs if "fusion_norm" in r["reliance"]]
        cold = [r["cold_auc"] for r in runs if r["cold_auc"] is not None]
        lines.append(
            f"| {model} | {method} | {scale or '-'} | {'on' if fusion else 'off'} | {len(runs)} "
            f"| {_spread([r['auc'] for r in runs])} | {_spread([r['log_loss'] for r in runs])} "
            f"| {_spread(cold)} | {_signed(shuffled)} | {_signed(without)} "
            f"| {_spread(norms)} |"
        )
    return lines


def _table(rows: list[tuple[str, Difference | None]], head: str) -> list[str]:
    lines = [f"| {name} | {pair} |" for name, pair in rows if pair is not None]
    return [f"| {head} | AUC difference |", "|---|---|", *lines] if lines else []


def _against_none(rows: Sequence[Row]) -> list[str]:
    pairs = []
    for model, method, scale, fusion in _cell_keys(rows):
        if method == "none":
            continue
        shared = {"model": model, "fusion": fusion}
        base = {**shared, "method": "none"}
        name = f"{model}, {method} {scale}x, fusion {'on' if fusion else 'off'}"
        pairs.append((name, difference(rows, {**shared, "method": method, "scale": scale}, base)))
    return _table(pairs, "codes - none")


def _against_others(rows: Sequence[Row], first: str) -> list[str]:
    pairs = []
    for model, method, scale, fusion in _cell_keys(rows):
        if method in ("none", first):
            continue
        shared = {"model": model, "scale": scale, "fusion": fusion}
        name = f"{model}, {first} - {method}, {scale}x, fusion {'on' if fusion else 'off'}"
        pair = difference(rows, {**shared, "method": first}, {**shared, "method": method})
        pairs.append((name, pair))
    return _table(pairs, f"{first} - other")


def _fusion(rows: Sequence[Row]) -> list[str]:
    pairs = []
    for model, method, scale, fusion in _cell_keys(rows):
        if not fusion:
            continue
        shared = {"model": model, "method": method, "scale": scale}
        name = f"{model}, {method}" + (f" {scale}x" if scale else "")
        pair = difference(rows, {**shared, "fusion": True}, {**shared, "fusion": False})
        pairs.append((name, pair))
    return _table(pairs, "fusion on - off")


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def _signed(values: Sequence[float]) -> str:
    return f"{np.mean(values):+.4f}" if values else "-"
