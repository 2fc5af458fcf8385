"""The MoC paper's tables and figures, its printed values beside ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from semid.report.figure import line
from semid.reproduce.claims import Rows, metric
from semid.reproduce.moc import (
    AUC,
    MODELS,
    NAMES,
    between_codes,
    cell,
    nmi,
    paper_auc,
    variance_rebuilt,
)
from semid.reproduce.tables import (
    Cell,
    Column,
    Line,
    Lines,
    Section,
    Table,
    average,
    count_seeds,
    difference,
    mean,
    mean_and_deviation,
    printed,
    spread,
)

__all__ = ["MOC_SECTIONS"]

LABELS = {
    **NAMES,
    "vqvae": "one code (1x of all)",
    "random": "random codes",
    "shuffled": "shuffled codes",
    "widened": "wider item id",
}
RANKED = {"run": "rank", "variant": ""}
MAIN = {"variant": ""}
INTERVALS = "Intervals are 95 % of Student's t over seeds"


def _cells(rows: Rows, **more: Any) -> list[tuple[str, int, bool]]:
    """Return method, scale and fusion of what there is, in a fixed order."""
    cells = {
        (r["method"], r["scale"], r["fusion"]) for r in rows.where(run="rank", part="", **more)
    }
    return sorted(cells, key=lambda one: (list(LABELS).index(one[0]), *one))


def _label(method: str, scale: int, fusion: bool) -> str:
    size = f" {scale}x" if scale > 1 else ""
    return f"{LABELS[method]}{size}{' + fusion' if fusion else ''}"


def _models(rows: Rows, **more: Any) -> list[str]:
    run = rows.names("model", run="rank", **more)
    return [model for model in MODELS if model in run]


def _auc_lines(rows: Rows) -> list[Line]:
    return [Line(_label(*one), cell(*one)) for one in _cells(rows)]


def _auc_cell(model: str) -> Cell:
    """Return cells with a model's AUC and the number of seeds."""

    def write(rows: Rows, line: Line) -> str:
        values = line.values(rows, AUC, model=model)
        return f"{spread(values)} ({len(values)})" if values else "not run"

    return write


def _paper_cell(model: str) -> Cell:
    """Return cells with the paper's value, where it prints one with this fusion."""

    def write(rows: Rows, line: Line) -> str:
        method, fusion = line.where["method"], line.where["fusion"]
        if fusion != (method == "moc"):
            return ""
        value = paper_auc(model, method, line.where["scale"], rows.rows[0]["data"])
        return "" if value is None else f"{value:.4f}"

    return write


def _auc_columns(rows: Rows) -> list[Column]:
    return [
        column
        for model in _models(rows)
        for column in (Column(model, _auc_cell(model)), Column("paper", _paper_cell(model)))
    ]


def _difference_lines(rows: Rows, **more: Any) -> list[Line]:
    """Return a line per cell and rival: no codes, and RQ-VAE of the same scale."""
    lines = []
    for method, scale, fusion in _cells(rows, **more):
        own = {**cell(method, scale, fusion), **more}
        for name, rival in (("no codes", ("none", 0)), ("RQ-VAE", ("rqvae", scale))):
            other = {**cell(*rival, fusion), **more}
            if other != own and method != "none":
                lines.append(Line(f"{_label(method, scale, fusion)} - {name}", own, (), other))
    return lines


def _variant_lines(rows: Rows) -> list[Line]:
    """Return the differences of every data set and model of a variant."""
    return [
        Line(f"{data}, {model}: {one.label}", one.where, (), one.against)
        for data in rows.names("data")
        for model in _models(rows, data=data)
        for one in _difference_lines(rows, data=data, model=model)
    ]


def _fusion_lines(rows: Rows) -> list[Line]:
    return [
        Line(_label(method, scale, False), cell(method, scale, True), (), cell(method, scale))
        for method, scale, fusion in _cells(rows)
        if fusion
    ]


def _paper_fusion(rows: Rows, line: Line) -> str:
    """Write the paper's difference: it ablates fusion for DeepFM on Toys."""
    name = f"{line.where['method']}-{line.where['scale']}"
    on, off = (printed("moc")["table-2"][key].get(name) for key in ("fusion", "plain"))
    if rows.rows[0]["data"] != "toys" or on is None or off is None:
        return ""
    return f"{on - off:+.4f}"


def _model_columns(rows: Rows) -> list[Column]:
    return [Column(model, difference(AUC, model=model)) for model in _models(rows)]


def _part_lines(kind: str) -> Lines:
    """Return the lines of figure 8: RQ-VAE's and MoC's codes by level."""

    def lines(rows: Rows) -> list[Line]:
        found = []
        for method in ("rqvae", "moc"):
            own = rows.where(method=method, fusion=False)
            parts = {tuple(r["part"].split()) for r in own if r.get("part")}
            for n in sorted(int(number) for name, number in parts if name == kind):
                where = {"run": "rank", "method": method, "fusion": False, "part": f"{kind} {n}"}
                found.append(Line(f"{NAMES[method]} {kind} {n}", where))
        return found

    return lines


def _part_chart(rows: Rows, lines: Sequence[Line]) -> list[dict[str, Any]]:
    traces = []
    for color, method in enumerate(("rqvae", "moc")):
        own = [one for one in lines if one.where["method"] == method]
        numbers = [int(one.where["part"].split()[1]) for one in own]
        means = [average(one.values(rows, AUC)) for one in own]
        if own:
            traces.append(line(NAMES[method], numbers, means, color + 1, mode="lines+markers"))
    return traces


def _part_table(kind: str, title: str) -> Table:
    return Table(
        kind,
        title,
        "Test AUC, mean over seeds.",
        "Codes of the widest tokenizer; the other codes are not given to the model.",
        _part_lines(kind),
        [Column("seeds", count_seeds(AUC)), Column("AUC", mean_and_deviation(AUC))],
        RANKED,
        chart=_part_chart,
        layout={"xaxis": {"title": "level"}, "yaxis": {"title": "AUC"}},
    )


def _kept_lines(rows: Rows) -> list[Line]:
    return [
        Line(f"{NAMES[method]} {scale}x", {"run": "kept", "method": method, "scale": scale})
        for method in NAMES
        for scale in sorted(rows.names("scale", run="kept", method=method))
    ]


def _analyzed(rows: Rows, key: str = "analysis") -> Iterator[Line]:
    """Yield a line per cell with an analysis, in order of appearance."""
    cells = dict.fromkeys(
        (r["method"], r["scale"], r["fusion"])
        for r in rows.rows
        if r.get(key) and not r.get("part")
    )
    for method, scale, fusion in cells:
        after = ", model with fusion" if key == "analysis" else ", after fusion"
        label = f"{NAMES[method]} {scale}x{after if fusion else ''}"
        yield Line(label, cell(method, scale, fusion), (key,))


def _all_analyzed(rows: Rows) -> list[Line]:
    return [*_analyzed(rows), *_analyzed(rows, "analysis_fused")]


def _point_lines(places: Mapping[str, str], numbered: bool = False) -> Lines:
    """Return lines per point of the analyses of models without fusion."""

    def lines(rows: Rows) -> Iterator[Line]:
        for one in _analyzed(rows):
            if one.where["fusion"]:
                continue
            first = next(r["analysis"] for r in rows.where(**one.where) if r.get("analysis"))
            for place, what in places.items():
                for n in range(len(first[place])):
                    label = f"{one.label}, {what}{f' {n + 1}' if numbered else ''}"
                    yield Line(label, one.where, ("analysis", place, n))

    return lines


INFORMATION = [
    Column("NMI", mean(metric("nmi"), ".5f")),
    Column("adjusted", mean(metric("ami"), ".5f")),
    Column("by chance", mean(metric("by_chance"), ".5f")),
]


def _cluster_chart(rows: Rows, lines: Sequence[Line]) -> list[dict[str, Any]]:
    curves: dict[str, list[Line]] = {}
    for one in lines:
        curves.setdefault(one.label, []).append(one)
    colors = {one.label: number for number, one in enumerate(_analyzed(rows))}
    return [
        line(
            label,
            [int(one.values(rows, metric("clusters"))[0]) for one in points],
            [average(one.values(rows, metric("nmi"))) for one in points],
            colors[label.rpartition(", ")[0]] % 7 + 1,
            dash="solid" if points[0].at[1] == "sweep" else "dash",
        )
        for label, points in curves.items()
    ]


def _spectrum_chart(rows: Rows, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Draw the spectrum of the first seed; what is not a number of floats is left out."""
    traces = []
    for number, one in enumerate(lines, start=1):
        key = one.at[0]
        spectrum = next(r[key]["spectrum"] for r in rows.where(**one.where) if r.get(key))
        top = spectrum["value"][0] or 1.0
        values = [v if v > 1e-8 * top else None for v in spectrum["value"]]
        dash = "solid" if key == "analysis" else "dash"
        traces.append(line(one.label, spectrum["rank"], values, number % 7 + 1, dash=dash))
    return traces


def _used(rows: Rows, line: Line) -> str:
    """Write how many singular values are above a thousandth of the largest."""
    above, of = (line.values(rows, metric("spectrum", key)) for key in ("above", "dimensions"))
    return f"{average(above):.1f} of {of[0]:.0f}"


MOC_SECTIONS = (
    Section(
        "table-1",
        "Table 1: AUC of methods over scales",
        "Fusion on and off for every method. Differences are paired over seeds: same split, "
        "another start, order and tokenizer a seed.",
        [
            Table(
                "auc",
                "Test AUC",
                "Mean and standard deviation over seeds (their number). Popularity alone: "
                "{popularity_auc:.4f}.",
                "Protocol: {protocol}. The paper's values are of another label and other "
                "embeddings: for the order of methods only.",
                _auc_lines,
                _auc_columns,
                RANKED,
            )
        ],
    ),
    Section(
        "differences",
        "Paired differences",
        "Against RQ-VAE of the same scale and fusion, and against no codes.",
        [
            Table(
                "differences",
                "AUC differences",
                f"{INTERVALS}, on one split.",
                "Mean of the paired differences. One interval in twenty leaves out 0 by chance.",
                _difference_lines,
                _model_columns,
                RANKED,
            )
        ],
    ),
    Section(
        "table-2",
        "Table 2: fusion",
        "Fusion on less off, the same method, scale, model and seed.",
        [
            Table(
                "fusion",
                "Fusion on less off",
                f"{INTERVALS}.",
                "The paper ablates fusion for DeepFM on Toys; its difference stands in the last "
                "column.",
                _fusion_lines,
                lambda rows: [*_model_columns(rows), Column("paper, deepfm", _paper_fusion)],
                RANKED,
            )
        ],
    ),
    Section(
        "figure-8",
        "Figure 8: one level, and levels from the lowest up",
        "Of the widest tokenizers.",
        [
            _part_table("alone", "One level alone"),
            _part_table("first", "Levels from the lowest up"),
        ],
        by_data=True,
    ),
    Section(
        "figures",
        "Figures 1 to 4, 7, 9 and 10",
        "What clusters of the codes' embeddings know of the label, and their spectra. The "
        "mutual information is tiny, so its value for shuffled labels stands beside it.",
        [
            Table(
                "kept",
                "Information kept (fig. 1a)",
                "Share of the variance of held-out items' embeddings that is rebuilt; higher is "
                "better.",
                "A two-layer perceptron with 512 hidden units rebuilds the item embedding from "
                "trainable embeddings of its codes.",
                _kept_lines,
                [
                    Column("seeds", count_seeds(variance_rebuilt)),
                    Column("variance rebuilt", mean_and_deviation(variance_rebuilt)),
                ],
                MAIN,
            ),
            Table(
                "clusters",
                "What clusters know of the label (figs. 1b, 1c)",
                "Higher is better; what labels shuffled at random give is no information.",
                "K-means over the embeddings of all codes side by side, and of the first alone; "
                "normalized mutual information with the label on the test part, the same adjusted "
                "for chance, and for shuffled labels.",
                _point_lines({"sweep": "all codes", "first": "code 1"}),
                [Column("clusters", mean(metric("clusters"), ".0f")), *INFORMATION],
                MAIN,
                chart=_cluster_chart,
                layout={
                    "xaxis": {"title": "clusters", "type": "log"},
                    "yaxis": {"title": "NMI"},
                },
            ),
            Table(
                "scales",
                "NMI at 100 clusters (figs. 2 and 9)",
                "Mean and standard deviation over seeds.",
                "As above. 'After fusion' takes the embeddings behind the fusion module.",
                _all_analyzed,
                [
                    Column("seeds", count_seeds(nmi())),
                    Column("NMI", mean_and_deviation(nmi(), 5)),
                ],
                MAIN,
            ),
            Table(
                "spectra",
                "Singular values (figs. 4 and 10)",
                "A curve that falls off a cliff uses few of its dimensions.",
                "Of the matrix of test rows by all code embeddings side by side, not centered; the "
                "curve is of the first seed, the table the mean over seeds, counting values above "
                "a thousandth of the largest.",
                _all_analyzed,
                [
                    Column("largest", mean(metric("spectrum", "value", 0), ".4g")),
                    Column("above 1/1000 of it", _used),
                ],
                MAIN,
                chart=_spectrum_chart,
                layout={
                    "xaxis": {"title": "index"},
                    "yaxis": {"title": "singular value", "type": "log"},
                },
            ),
            Table(
                "levels",
                "Each code alone (fig. 3)",
                "Even rows: every code tells something. Falling rows: later codes tell little.",
                "NMI with the label of 100 clusters of one code's embedding, and of the code "
                "itself.",
                _point_lines({"levels": "embedding", "codes": "code"}, numbered=True),
                INFORMATION,
                MAIN,
            ),
            Table(
                "alike",
                "How alike codes' embeddings are (fig. 7)",
                "Mean over pairs of codes; high means that codes carry the same.",
                "Absolute correlation of eq. 9, which depends on the basis a table happens to "
                "have, and linear CKA, which does not.",
                _analyzed,
                [
                    Column("|correlation|", mean_and_deviation(between_codes("correlation"), 3)),
                    Column("CKA", mean_and_deviation(between_codes("cka"), 3)),
                ],
                MAIN,
            ),
        ],
        by_data=True,
    ),
    Section(
        "variants",
        "Other labels and splits",
        "What the paper does not print, chosen otherwise.",
        [
            Table(
                "variant",
                "AUC differences",
                "To be read beside the differences under the main protocol.",
                "Protocol: {protocol}",
                _variant_lines,
                [Column("difference", difference(AUC))],
                {"run": "rank"},
                per="variant",
            )
        ],
    ),
)
