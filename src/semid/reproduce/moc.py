"""The MoC paper: what its claims and tables need beside the data in ``papers/moc.toml``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from semid.report.figure import line
from semid.reproduce.claims import Metric, Row, Rows, inside, metric
from semid.reproduce.papers import Column, Line, Lines, Paper, average, difference, spread

MODELS = ("deepfm", "deepim", "autoint", "dcnv2")
SETS = ("toys", "beauty", "sports")
# Method -> its name in claims, and in the tables of all runs where that says more.
NAMES = {"none": "no codes", "vqvae": "one code", "me": "ME", "rqvae": "RQ-VAE"}
NAMES |= {"rqpvae": "RQP-VAE", "moc": "MoC"}
NAMES |= {name: name for name in ("random", "shuffled", "widened")}
LABELS = {**NAMES, "vqvae": "one code (1x of all)", "widened": "wider item id"}
LABELS |= {name: f"{name} codes" for name in ("random", "shuffled")}
AUC = metric("auc")
CLUSTERS = 100
REGULARIZED = "regularized"
"""Variant whose rankers have a penalty of embeddings: claims on the AUC are judged on it."""


def paper_auc(model: str, method: str, scale: int, data: str) -> float | None:
    """Return the AUC of the paper's table 1; at 1x the method is ``vqvae``."""
    values = MOC.file["table-1"].get(model, {}).get(f"{method}-{scale}")
    return float(values[SETS.index(data)]) if values and data in SETS else None


def paper_gain(other: str) -> tuple[int, int, float]:
    """Count cells of the paper's table 1, first those with MoC higher; return the mean gain too."""
    gains = [
        ours - theirs
        for cells in MOC.file["table-1"].values()
        for scale in (2, 3, 7)
        for ours, theirs in zip(cells[f"moc-{scale}"], cells[f"{other}-{scale}"], strict=True)
    ]
    # The paper prints few digits: values that are equal there differ by rounding alone.
    return sum(gain > 1e-9 for gain in gains), len(gains), average(gains)


def nmi(points: str = "sweep") -> Metric:
    """Return the metric: NMI of clustered embeddings with the label."""

    def read(analysis: Row) -> float:
        # Small data have fewer clusters; the most that there are count then.
        at_size = [p for p in analysis[points] if p["clusters"] == CLUSTERS]
        return float((at_size or analysis[points][-1:])[0]["nmi"])

    return read


def top_value(analysis: Row) -> float:
    """Return the logarithm of the largest singular value."""
    return float(np.log10(analysis["spectrum"]["value"][0]))


def used_share(analysis: Row) -> float:
    """Return the share of singular values above a thousandth of the largest."""
    spectrum = analysis["spectrum"]
    return float(spectrum["above"] / spectrum["dimensions"])


def between_codes(name: str) -> Metric:
    """Return the metric: mean absolute off-diagonal entry of a matrix over codes."""

    def read(analysis: Row) -> float | None:
        matrix = np.abs(np.asarray(analysis[name], dtype=np.float64))
        count = len(matrix)
        if count < 2:
            return None
        return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))

    return read


def variance_rebuilt(row: Row) -> float | None:
    """Return the share of the variance of item embeddings that is rebuilt from codes."""
    probe = row.get("kept")
    return 1.0 - float(probe["error"]) if probe else None


CELL = re.compile(
    r"(?P<rebuilt>rebuilt )?(?P<method>.+?)(?: (?P<scale>\d+)x)?"
    r"(?:, code (?P<alone>\d+) alone|, codes 1 to (?P<first>\d+))?(?P<fusion> \+ fusion)?"
)


def named_cell(name: str) -> dict[str, Any]:
    """Select the runs that a name such as ``MoC 7x, code 2 alone + fusion`` stands for."""
    parts = re.fullmatch(CELL, name)
    if parts is None or parts["method"] not in NAMES.values():
        raise ValueError(f"'{name}' names no cell")
    method = next(key for key, label in NAMES.items() if label == parts["method"])
    scale = int(parts["scale"] or (0 if method == "none" else 1))
    if parts["rebuilt"]:
        return {"run": "kept", "method": method, "scale": scale, "model": ""}
    part = next((f"{kind} {parts[kind]}" for kind in ("alone", "first") if parts[kind]), "")
    return cell(method, scale, bool(parts["fusion"]), part)


def cell(method: str, scale: int, fusion: bool = False, part: str = "") -> dict[str, Any]:
    """Select the ranking runs of one cell."""
    return {"run": "rank", "method": method, "scale": scale, "fusion": fusion, "part": part}


def facts(rows: Rows) -> Mapping[str, Any]:
    """Return scales, models and the paper's own gain."""
    scales = [s for s in rows.planned("scale", run="rank") if s and s > 1]
    widest = max(scales, default=7)
    above, cells, mean_gain = paper_gain("rqvae")
    # Embeddings were analyzed of one ranking model, whichever the recipe has first.
    analyzed = next((r["model"] for r in rows.rows if r.get("analysis")), "dcnv2")
    rebuilt = rows.planned("scale", run="kept", method="moc")
    return {
        "m": widest,
        "codes": range(1, widest + 1),
        "all codes but the last": range(1, widest),
        "rebuilt scales": [s for s in rebuilt if s <= 3] or [2, 3],
        "models": MODELS,
        "controlled": ("dcnv2", "deepfm"),
        "level models": rows.planned("model", run="rank", part="alone 1") or ["dcnv2"],
        "analyzed": {"model": analyzed},
        "above": above,
        "cells": cells,
        "mean_gain": mean_gain,
    }


def _cells(rows: Rows, **more: Any) -> list[tuple[str, int, bool]]:
    """Return method, scale and fusion of what there is, in a fixed order."""
    runs = rows.where(run="rank", part="", **more)
    cells = {(r["method"], r["scale"], r["fusion"]) for r in runs}
    return sorted(cells, key=lambda one: (list(LABELS).index(one[0]), *one))


def _label(method: str, scale: int, fusion: bool) -> str:
    size = f" {scale}x" if scale > 1 else ""
    return f"{LABELS[method]}{size}{' + fusion' if fusion else ''}"


def _models(rows: Rows, **more: Any) -> list[str]:
    run = rows.names("model", run="rank", **more)
    return [model for model in MODELS if model in run]


def auc_lines(rows: Rows) -> list[Line]:
    """Return a line per method, scale and fusion."""
    return [Line(_label(*one), cell(*one)) for one in _cells(rows)]


def auc_columns(rows: Rows) -> list[Column]:
    """Return two columns per ranking model: our AUC and the paper's."""
    return [
        Column(name, partial(write, model))
        for model in _models(rows)
        for name, write in ((model, _auc_cell), ("paper", _paper_cell))
    ]


def _auc_cell(model: str, rows: Rows, line: Line) -> str:
    """Write a model's AUC and the number of seeds."""
    values = line.values(rows, AUC, model=model)
    return f"{spread(values)} ({len(values)})" if values else "not run"


def _paper_cell(model: str, rows: Rows, line: Line) -> str:
    """Write the paper's value, where it prints one with this fusion."""
    method, fusion = line.where["method"], line.where["fusion"]
    # The paper's table has MoC with fusion and all other methods without.
    if fusion != (method == "moc"):
        return ""
    value = paper_auc(model, method, line.where["scale"], rows.rows[0]["data"])
    return "" if value is None else f"{value:.4f}"


def loss_columns(rows: Rows) -> list[Column]:
    """Return columns per ranking model: log loss, calibration error, chosen penalty."""

    def write(model: str, name: str, rows: Rows, line: Line) -> str:
        values = line.values(rows, metric(name), model=model)
        return f"{average(values):.4f}" if values else "-"

    titles = {"log loss": "log_loss", "calibration error": "calibration_error"}
    if any("embedding_penalty" in row for row in rows.rows):
        titles["penalty"] = "embedding_penalty"
    return [
        Column(f"{model}, {title}", partial(write, model, name))
        for model in _models(rows)
        for title, name in titles.items()
    ]


def difference_lines(rows: Rows, **more: Any) -> list[Line]:
    """Return a line per cell and rival: no codes, RQ-VAE and RQP-VAE of the same scale."""
    lines = []
    for method, scale, fusion in _cells(rows, **more):
        selection = {**cell(method, scale, fusion), **more}
        for rival in (("none", 0), ("rqvae", scale), ("rqpvae", scale)):
            other, name = {**cell(*rival, fusion), **more}, NAMES[rival[0]]
            if other != selection and method != "none":
                lines.append(
                    Line(f"{_label(method, scale, fusion)} - {name}", selection, (), other)
                )
    return lines


def variant_lines(rows: Rows) -> list[Line]:
    """Return the differences of every data set and model of another label or split."""
    if rows.names("variant") == [REGULARIZED]:  # has a table per data set
        return []
    return [
        Line(f"{data}, {model}: {one.label}", one.where, (), one.against)
        for data in rows.names("data")
        for model in _models(rows, data=data)
        for one in difference_lines(rows, data=data, model=model)
    ]


def fusion_lines(rows: Rows) -> list[Line]:
    """Return a line per method and scale: fusion on against off."""
    return [
        Line(_label(method, scale, False), cell(method, scale, True), (), cell(method, scale))
        for method, scale, fusion in _cells(rows)
        if fusion
    ]


def paper_fusion(rows: Rows, line: Line) -> str:
    """Write the paper's difference: it ablates fusion for DeepFM on Toys."""
    name = f"{line.where['method']}-{line.where['scale']}"
    on, off = (MOC.file["table-2"][key].get(name) for key in ("fusion", "plain"))
    if rows.rows[0]["data"] != "toys" or on is None or off is None:
        return ""
    return f"{on - off:+.4f}"


def difference_columns(rows: Rows) -> list[Column]:
    """Return a column of differences per ranking model."""
    return [Column(model, difference(AUC, model=model)) for model in _models(rows)]


def part_lines(kind: str) -> Lines:
    """Return the lines of figure 8: RQ-VAE's, RQP-VAE's and MoC's codes by level."""

    def lines(rows: Rows) -> Iterator[Line]:
        for method in ("rqvae", "rqpvae", "moc"):
            runs = rows.where(method=method, fusion=False)
            parts = {tuple(r["part"].split()) for r in runs if r.get("part")}
            for n in sorted(int(number) for name, number in parts if name == kind):
                where = {"run": "rank", "method": method, "fusion": False, "part": f"{kind} {n}"}
                yield Line(f"{NAMES[method]} {kind} {n}", where)

    return lines


def part_chart(rows: Rows, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Yield a curve of the AUC over levels per method."""
    for color, method in enumerate(("rqvae", "moc", "rqpvae")):
        points = [one for one in lines if one.where["method"] == method]
        numbers = [int(one.where["part"].split()[1]) for one in points]
        means = [average(one.values(rows, AUC)) for one in points]
        if points:
            yield line(NAMES[method], numbers, means, color + 1, mode="lines+markers")


def rebuilt_lines(rows: Rows) -> list[Line]:
    """Return a line per method and scale whose codes item embeddings were rebuilt from."""
    return [
        Line(f"{NAMES[method]} {scale}x", {"run": "kept", "method": method, "scale": scale})
        for method in NAMES
        for scale in sorted(rows.names("scale", run="kept", method=method))
    ]


def analyzed(rows: Rows, key: str = "analysis") -> Iterator[Line]:
    """Yield a line per cell with an analysis, in order of appearance."""
    runs = [r for r in rows.rows if r.get(key) and not r.get("part")]
    cells = dict.fromkeys((r["method"], r["scale"], r["fusion"]) for r in runs)
    after = ", model with fusion" if key == "analysis" else ", after fusion"
    for method, scale, fusion in cells:
        label = f"{NAMES[method]} {scale}x{after if fusion else ''}"
        yield Line(label, cell(method, scale, fusion), (key,))


def all_analyzed(rows: Rows) -> list[Line]:
    """Return the lines of analyses before and after fusion."""
    return [*analyzed(rows), *analyzed(rows, "analysis_fused")]


def point_lines(places: Mapping[str, str], numbered: bool = False) -> Lines:
    """Return lines per point of the analyses of models without fusion."""

    def lines(rows: Rows) -> Iterator[Line]:
        for one in analyzed(rows):
            if one.where["fusion"]:
                continue
            first = next(r["analysis"] for r in rows.where(**one.where) if r.get("analysis"))
            for place, what in places.items():
                for n in range(len(first[place])):
                    label = f"{one.label}, {what}{f' {n + 1}' if numbered else ''}"
                    yield Line(label, one.where, ("analysis", place, n))

    return lines


def cluster_chart(rows: Rows, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Yield a curve of the NMI over the number of clusters per cell, of all codes and the first."""
    curves: dict[str, list[Line]] = {}
    for one in lines:
        curves.setdefault(one.label, []).append(one)
    colors = {one.label: number for number, one in enumerate(analyzed(rows))}
    for label, points in curves.items():
        yield line(
            label,
            [int(one.values(rows, metric("clusters"))[0]) for one in points],
            [average(one.values(rows, metric("nmi"))) for one in points],
            colors[label.rpartition(", ")[0]] % 7 + 1,
            dash="solid" if points[0].at[1] == "sweep" else "dash",
        )


def spectrum_chart(rows: Rows, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Yield the spectrum of each line's first seed, without values that are rounding errors."""
    for number, one in enumerate(lines, start=1):
        key = one.at[0]
        spectrum = next(r[key]["spectrum"] for r in rows.where(**one.where) if r.get(key))
        top = spectrum["value"][0] or 1.0
        values = [v if v > 1e-8 * top else None for v in spectrum["value"]]
        dash = "solid" if key == "analysis" else "dash"
        yield line(one.label, spectrum["rank"], values, number % 7 + 1, dash=dash)


def used_values(rows: Rows, line: Line) -> str:
    """Write how many singular values are above a thousandth of the largest."""
    above, of = (line.values(rows, metric(f"spectrum.{key}")) for key in ("above", "dimensions"))
    return f"{average(above):.1f} of {of[0]:.0f}"


MOC = Paper(
    "moc",
    named_cell,
    facts,
    metrics={
        "variance rebuilt": variance_rebuilt,
        "NMI": inside(["analysis"], nmi()),
        "NMI of the first embedding": inside(["analysis"], nmi("first")),
        "NMI after fusion": inside(["analysis_fused"], nmi()),
        "log10 top value": inside(["analysis"], top_value),
        "log10 top value after fusion": inside(["analysis_fused"], top_value),
        "share used": inside(["analysis"], used_share),
        "|correlation|": inside(["analysis"], between_codes("correlation")),
        "CKA": inside(["analysis"], between_codes("cka")),
        # Of the part of a row that a line is about.
        "nmi at 100": nmi(),
        "correlation": between_codes("correlation"),
        "cka": between_codes("cka"),
    },
    code={
        "auc": auc_lines,
        "auc columns": auc_columns,
        "loss columns": loss_columns,
        "differences": difference_lines,
        "difference columns": difference_columns,
        "difference": lambda rows: [Column("difference", difference(AUC))],
        "fusion": fusion_lines,
        "paper fusion": lambda rows: [Column("paper, deepfm", paper_fusion)],
        "alone": part_lines("alone"),
        "first": part_lines("first"),
        "part chart": part_chart,
        "rebuilt": rebuilt_lines,
        "clusters": point_lines({"sweep": "all codes", "first": "code 1"}),
        "cluster chart": cluster_chart,
        "levels": point_lines({"levels": "embedding", "codes": "code"}, numbered=True),
        "analyzed": analyzed,
        "all analyzed": all_analyzed,
        "used": lambda rows: [Column("above 1/1000 of it", used_values)],
        "spectrum chart": spectrum_chart,
        "variants": variant_lines,
    },
)
