"""Tables and figures of the MoC reproduction, from rows alone, the paper's values beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from semid.report.figure import Figure, line
from semid.reproduce.claims import Rows, spread
from semid.reproduce.claims_moc import MODELS, auc
from semid.reproduce.paper_numbers import MOC_TABLE_1, MOC_TABLE_2
from semid.reproduce.tables_moc_codes import code_figures

__all__ = ["moc_sections"]

Section = tuple[str, str, str, list[Figure]]
NAMES = {
    "none": "no codes",
    "vqvae": "one code (1x of all)",
    "me": "ME",
    "rqvae": "RQ-VAE",
    "moc": "MoC",
    "random": "random codes",
    "shuffled": "shuffled codes",
    "widened": "wider item id",
}


def moc_sections(rows: Rows) -> list[Section]:
    """Return the sections of the page.

    Args:
        rows: of the ledger.
    """
    main = Rows([r for r in rows.rows if not r.get("variant")])
    return [
        (
            "table-1",
            "Table 1: AUC of methods over scales",
            "Fusion on and off for every method. Differences are paired over seeds: same split, "
            "another start, order and tokenizer a seed.",
            [_aucs(main, name) for name in main.names("data", run="rank")],
        ),
        (
            "differences",
            "Paired differences",
            "Against RQ-VAE of the same scale and fusion, and against no codes.",
            [_differences(main, name) for name in main.names("data", run="rank")],
        ),
        (
            "table-2",
            "Table 2: fusion",
            "Fusion on less off, the same method, scale, model and seed.",
            [_fusion(main, name) for name in main.names("data", run="rank")],
        ),
        (
            "figure-8",
            "Figure 8: one level, and levels from the lowest up",
            "Of the widest tokenizers.",
            [f for name in main.names("data", run="rank") for f in _levels(main, name)],
        ),
        (
            "figures",
            "Figures 1 to 4, 7, 9 and 10",
            "What clusters of the codes' embeddings know of the label, and their spectra. The "
            "mutual information is tiny, so its value for shuffled labels stands beside it.",
            code_figures(main),
        ),
        (
            "variants",
            "Other labels and splits",
            "What the paper does not print, chosen otherwise.",
            [_variant(rows, name) for name in rows.names("variant") if name],
        ),
    ]


def _cells(rows: Rows, data: str, **more: Any) -> list[tuple[str, int, bool]]:
    """Return method, scale and fusion of what there is, in a fixed order."""
    there = {
        (r["method"], r["scale"], r["fusion"])
        for r in rows.where(data=data, run="rank", part="", **more)
    }
    order = list(NAMES)
    place = {m: order.index(m) if m in order else len(order) for m, _, _ in there}
    return sorted(there, key=lambda cell: (place[cell[0]], *cell))


def _label(method: str, scale: int, fusion: bool) -> str:
    size = f" {scale}x" if scale > 1 else ""
    return f"{NAMES.get(method, method)}{size}{' + fusion' if fusion else ''}"


def _models(rows: Rows, data: str, **more: Any) -> list[str]:
    there = rows.names("model", data=data, run="rank", **more)
    return [m for m in MODELS if m in there]


def _paper(model: str, method: str, scale: int, fusion: bool, data: str) -> str:
    """Write the paper's value of a cell, where it prints one with this fusion."""
    if (method in ("me", "rqvae") and fusion) or (method == "moc" and not fusion):
        return ""
    value = MOC_TABLE_1.get((model, method, scale, data))
    return "" if value is None or (method == "vqvae" and fusion) else f"{value:.4f}"


def _aucs(rows: Rows, data: str) -> Figure:
    models = _models(rows, data)
    first = rows.where(data=data, run="rank")[0]
    table = []
    for method, scale, fusion in _cells(rows, data):
        own = {"data": data, "run": "rank", "part": "", "method": method, "scale": scale}
        cells = []
        for model in models:
            values = rows.values(auc, **own, fusion=fusion, model=model)
            cells += [f"{spread(values)} ({len(values)})" if values else "not run"]
            cells += [_paper(model, method, scale, fusion, data)]
        table.append([_label(method, scale, fusion), *cells])
    return Figure(
        f"auc-{data}",
        "table-1",
        f"Test AUC, {data}",
        f"Mean and standard deviation over seeds (their number). Popularity alone: "
        f"{first['popularity_auc']:.4f}.",
        f"Protocol: {first['protocol']}. The paper's values are of another label and other "
        "embeddings: for the order of methods only.",
        columns=["", *(c for model in models for c in (model, "paper"))],
        rows=table,
    )


def _difference_rows(
    rows: Rows, data: str, models: Sequence[str], variant: str = ""
) -> list[list[str]]:
    table = []
    for method, scale, fusion in _cells(rows, data, variant=variant):
        base: dict[str, Any] = {
            "data": data,
            "run": "rank",
            "part": "",
            "fusion": fusion,
            "variant": variant,
        }
        own = {**base, "method": method, "scale": scale}
        rivals = [("no codes", {**base, "method": "none", "scale": 0})]
        rivals.append(("RQ-VAE", {**base, "method": "rqvae", "scale": scale}))
        for name, other in rivals:
            if other == own or method == "none":
                continue
            cells = [
                "-" if d is None else str(d)
                for m in models
                for d in [rows.difference(auc, {**own, "model": m}, {**other, "model": m})]
            ]
            if any(cell != "-" for cell in cells):
                table.append([f"{_label(method, scale, fusion)} - {name}", *cells])
    return table


def _differences(rows: Rows, data: str) -> Figure:
    models = _models(rows, data)
    return Figure(
        f"differences-{data}",
        "differences",
        f"AUC differences, {data}",
        "Intervals are 95 % of Student's t over seeds, on one split.",
        "Mean of the paired differences. One interval in twenty leaves out 0 by chance.",
        columns=["", *models],
        rows=_difference_rows(rows, data, models),
    )


def _variant(rows: Rows, variant: str) -> Figure:
    sets = rows.names("data", run="rank", variant=variant)
    table = []
    for data in sets:
        for model in _models(rows, data, variant=variant):
            for row in _difference_rows(rows, data, [model], variant):
                table.append([f"{data}, {model}: {row[0]}", *row[1:]])
    first = rows.where(variant=variant, run="rank")
    return Figure(
        f"variant-{''.join(c if c.isalnum() else '-' for c in variant)}",
        "variants",
        f"AUC differences, {variant}",
        "To be read beside the differences under the main protocol.",
        f"Protocol: {first[0]['protocol']}" if first else "",
        columns=["", "difference"],
        rows=table,
    )


def _fusion(rows: Rows, data: str) -> Figure:
    models = _models(rows, data)
    table = []
    for method, scale, fusion in _cells(rows, data):
        if not fusion:
            continue
        base = {"data": data, "run": "rank", "part": "", "method": method, "scale": scale}
        cells = []
        for model in models:
            on, off = ({**base, "model": model, "fusion": f} for f in (True, False))
            found = rows.difference(auc, on, off)
            cells.append("-" if found is None else str(found))
        paper = [MOC_TABLE_2.get((method, scale, f)) for f in (True, False)]
        beside = ""
        if data == "toys" and paper[0] is not None and paper[1] is not None:
            beside = f"{paper[0] - paper[1]:+.4f}"
        table.append([_label(method, scale, False), *cells, beside])
    return Figure(
        f"fusion-{data}",
        "table-2",
        f"Fusion on less off, {data}",
        "Intervals are 95 % of Student's t over seeds.",
        "The paper ablates fusion for DeepFM on Toys; its difference stands in the last column.",
        columns=["", *models, "paper, deepfm"],
        rows=table,
    )


def _levels(rows: Rows, data: str) -> list[Figure]:
    found = []
    for part, title in (("alone", "One level alone"), ("first", "Levels from the lowest up")):
        traces: list[dict[str, Any]] = []
        table: list[list[str]] = []
        for color, method in enumerate(("rqvae", "moc")):
            own = rows.where(data=data, run="rank", method=method, fusion=False)
            numbers = sorted(
                {int(str(r["part"]).split()[1]) for r in own if str(r.get("part")).startswith(part)}
            )
            means = []
            for n in numbers:
                values = rows.values(
                    auc, data=data, run="rank", method=method, fusion=False, part=f"{part} {n}"
                )
                means.append(sum(values) / len(values))
                table.append([f"{NAMES[method]} {part} {n}", str(len(values)), spread(values)])
            if numbers:
                traces.append(line(NAMES[method], numbers, means, color + 1, mode="lines+markers"))
        if table:
            found.append(
                Figure(
                    f"{part}-{data}",
                    "figure-8",
                    f"{title}, {data}",
                    "Test AUC, mean over seeds.",
                    "Codes of the widest tokenizer; the other codes are not given to the model.",
                    traces,
                    {"xaxis": {"title": "level"}, "yaxis": {"title": "AUC"}},
                    ["", "seeds", "AUC"],
                    table,
                )
            )
    return found
