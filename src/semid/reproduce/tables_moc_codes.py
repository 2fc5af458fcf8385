"""Figures of the codes' embeddings: information kept, clusters, levels, spectra, correlation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from semid.report.figure import Figure, line
from semid.reproduce.claims import Row, Rows, spread
from semid.reproduce.claims_moc_codes import between, kept, nmi

__all__ = ["code_figures"]

NAMES = {"vqvae": "one code", "me": "ME", "rqvae": "RQ-VAE", "moc": "MoC", "shuffled": "shuffled"}


def code_figures(rows: Rows) -> list[Figure]:
    """Return the figures of every data set.

    Args:
        rows: of the main protocol.
    """
    found = []
    for data in rows.names("data"):
        own = Rows(rows.where(data=data))
        made = [_kept(own, data), _clusters(own, data), _scales(own, data), _spectra(own, data)]
        found += [figure for figure in [*made, _levels(own, data), _alike(own, data)] if figure]
    return found


def _cells(rows: Rows, *, fused: bool = False) -> Iterator[tuple[str, list[Row]]]:
    """Yield every cell with an analysis, by name, with its seeds."""
    seen: dict[str, list[Row]] = {}
    key = "analysis_fused" if fused else "analysis"
    for row in rows.rows:
        if not row.get(key) or row.get("part"):
            continue
        name = f"{NAMES.get(row['method'], row['method'])} {row['scale']}x"
        if row["fusion"]:
            name += ", after fusion" if fused else ", model with fusion"
        seen.setdefault(name, []).append(row)
    yield from seen.items()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _kept(rows: Rows, data: str) -> Figure | None:
    table = []
    for method in NAMES:
        for scale in sorted(rows.names("scale", run="kept", method=method)):
            values = rows.values(kept, run="kept", method=method, scale=scale)
            table.append([f"{NAMES[method]} {scale}x", str(len(values)), spread(values)])
    if not table:
        return None
    return Figure(
        f"kept-{data}",
        "figures",
        f"Information kept (fig. 1a), {data}",
        "Share of the variance of held-out items' embeddings that is rebuilt; higher is better.",
        "A two-layer perceptron with 512 hidden units rebuilds the item embedding from trainable "
        "embeddings of its codes.",
        columns=["", "seeds", "variance rebuilt"],
        rows=table,
    )


def _clusters(rows: Rows, data: str) -> Figure | None:
    traces: list[dict[str, Any]] = []
    table: list[list[str]] = []
    for color, (name, seeds) in enumerate(_cells(rows)):
        if "fusion" in name:
            continue
        for place, what, dash in (("sweep", "all codes", "solid"), ("first", "code 1", "dash")):
            points = [s["analysis"][place] for s in seeds]
            x = [p["clusters"] for p in points[0]]
            y = [_mean([p[n]["nmi"] for p in points if n < len(p)]) for n in range(len(x))]
            traces.append(line(f"{name}, {what}", x, y, color % 7 + 1, dash=dash))
            for n, clusters in enumerate(x):
                chance = _mean([p[n]["by_chance"] for p in points if n < len(p)])
                ami = _mean([p[n]["ami"] for p in points if n < len(p)])
                cells = [f"{y[n]:.5f}", f"{ami:.5f}", f"{chance:.5f}"]
                table.append([f"{name}, {what}", str(clusters), *cells])
    if not table:
        return None
    return Figure(
        f"clusters-{data}",
        "figures",
        f"What clusters know of the label (figs. 1b, 1c), {data}",
        "Higher is better; what labels shuffled at random give is no information.",
        "K-means over the embeddings of all codes side by side, and of the first alone; normalized "
        "mutual information with the label on the test part, the same adjusted for chance, and for "
        "shuffled labels.",
        traces,
        {"xaxis": {"title": "clusters", "type": "log"}, "yaxis": {"title": "NMI"}},
        ["", "clusters", "NMI", "adjusted", "by chance"],
        table,
    )


def _scales(rows: Rows, data: str) -> Figure | None:
    table = []
    for fused in (False, True):
        for name, seeds in _cells(rows, fused=fused):
            values = Rows(seeds).values(nmi(fused=fused))
            table.append([name, str(len(values)), spread(values, digits=5)])
    if not table:
        return None
    return Figure(
        f"scales-{data}",
        "figures",
        f"NMI at 100 clusters (figs. 2 and 9), {data}",
        "Mean and standard deviation over seeds.",
        "As above. 'After fusion' takes the embeddings behind the fusion module.",
        columns=["", "seeds", "NMI"],
        rows=table,
    )


def _levels(rows: Rows, data: str) -> Figure | None:
    table = []
    for name, seeds in _cells(rows):
        if "fusion" in name:
            continue
        for place, what in (("levels", "embedding"), ("codes", "code")):
            points = [s["analysis"][place] for s in seeds]
            for n in range(len(points[0])):
                cells = [_mean([p[n][k] for p in points]) for k in ("nmi", "ami", "by_chance")]
                table.append([f"{name}, {what} {n + 1}", *(f"{c:.5f}" for c in cells)])
    if not table:
        return None
    return Figure(
        f"levels-{data}",
        "figures",
        f"Each code alone (fig. 3), {data}",
        "Even rows: every code tells something. Falling rows: later codes tell little.",
        "NMI with the label of 100 clusters of one code's embedding, and of the code itself.",
        columns=["", "NMI", "adjusted", "by chance"],
        rows=table,
    )


def _spectra(rows: Rows, data: str) -> Figure | None:
    traces: list[dict[str, Any]] = []
    table: list[list[str]] = []
    color = 0
    for fused in (False, True):
        for name, seeds in _cells(rows, fused=fused):
            spectra = [s["analysis_fused" if fused else "analysis"]["spectrum"] for s in seeds]
            first = spectra[0]
            top = first["value"][0] or 1.0
            y = [v if v > 1e-8 * top else None for v in first["value"]]
            color += 1
            traces.append(
                line(name, first["rank"], y, color % 7 + 1, dash="dash" if fused else "solid")
            )
            tops = [s["value"][0] for s in spectra]
            used = [float(s["above"]) for s in spectra]
            table.append(
                [name, f"{_mean(tops):.4g}", f"{_mean(used):.1f} of {first['dimensions']}"]
            )
    if not table:
        return None
    return Figure(
        f"spectra-{data}",
        "figures",
        f"Singular values (figs. 4 and 10), {data}",
        "A curve that falls off a cliff uses few of its dimensions.",
        "Of the matrix of test rows by all code embeddings side by side, not centered; the curve "
        "is of the first seed, the table the mean over seeds, counting values above a thousandth "
        "of the largest.",
        traces,
        {"xaxis": {"title": "index"}, "yaxis": {"title": "singular value", "type": "log"}},
        ["", "largest", "above 1/1000 of it"],
        table,
    )


def _alike(rows: Rows, data: str) -> Figure | None:
    table = []
    for name, seeds in _cells(rows):
        found = Rows(seeds)
        pair = [found.values(between(key)) for key in ("correlation", "cka")]
        if pair[0]:
            table.append([name, *(spread(values, digits=3) for values in pair)])
    if not table:
        return None
    return Figure(
        f"alike-{data}",
        "figures",
        f"How alike codes' embeddings are (fig. 7), {data}",
        "Mean over pairs of codes; high means that codes carry the same.",
        "Absolute correlation of eq. 9, which depends on the basis a table happens to have, and "
        "linear CKA, which does not.",
        columns=["", "|correlation|", "CKA"],
        rows=table,
    )
