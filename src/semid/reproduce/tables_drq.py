"""Tables and figures of the DRQ reproduction, from rows alone, the paper's values beside ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from semid.report.figure import Figure, line
from semid.reproduce.claims import Row, Rows, spread
from semid.reproduce.drq_reads import TOKENIZERS, Read, figure, space
from semid.reproduce.paper_numbers import (
    DRQ_AUC,
    DRQ_COLLISIONS,
    DRQ_GEOMETRY,
    DRQ_OVERLAP,
    DRQ_RETENTION,
    DRQ_USAGE,
)
from semid.reproduce.which import which_tokenizer

__all__ = ["drq_sections"]

Section = tuple[str, str, str, list[Figure]]
BESIDE = (
    "Mean and standard deviation over seeds. Lines called 'paper' are its own values, on another "
    "catalogue with K = 4096: for the order of rows only."
)


class _Tables:
    """Builds a table a data set, a row a tokenizer, then its variants."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.sets = rows.names("data")

    def labels(self, data: str) -> list[tuple[str, str]]:
        """Return tokenizer and variant of every row there is, the paper's five first."""
        there = {(r["tokenizer"], r["variant"]) for r in self.rows.where(data=data)}
        main = [(name, "") for name in TOKENIZERS]
        return main + sorted(pair for pair in there if pair[1])

    def table(
        self,
        key: str,
        section: str,
        title: str,
        columns: Sequence[tuple[str, Read, int]],
        *,
        paper: Callable[[str], Sequence[str]] | None = None,
        definition: str,
        caption: str = "",
    ) -> list[Figure]:
        """Return one table a data set."""
        found = []
        for data in self.sets:
            rows = []
            for name, variant in self.labels(data):
                own = {"data": data, "tokenizer": name, "variant": variant}
                seeds = len(self.rows.where(**own))
                cells = [spread(self.rows.values(read, **own), digits=n) for _, read, n in columns]
                label = f"{name} ({variant})" if variant else name
                rows.append([label, str(seeds) if seeds else "not run", *cells])
                if paper is not None and not variant and (beside := paper(name)):
                    rows.append([f"paper: {name}", "", *beside])
            found.append(
                Figure(
                    f"{key}-{data}",
                    section,
                    f"{title}, {data}",
                    caption or BESIDE,
                    definition,
                    columns=["", "seeds", *(name for name, _, _ in columns)],
                    rows=rows,
                )
            )
        return found


def _written(values: Sequence[float | int] | None) -> list[str]:
    return [] if values is None else [f"{v:g}" for v in values]


def drq_sections(rows: Rows) -> list[Section]:
    """Return the sections of the page.

    Args:
        rows: of the ledger.
    """
    t = _Tables(rows)
    found = which_tokenizer(rows)
    return [
        (
            "which",
            "Which tokenizer when",
            "Drawn from the runs below and nothing else.",
            [found] if found.rows else [],
        ),
        ("table-1", "Table 1: geometry", "Of the latent before quantization.", _geometry(t)),
        (
            "table-2",
            "Table 2: overlap and K_eff",
            "At small noise R shows nothing but usage: where the geometry part is below a tenth of "
            "R, the last column says from which noise on it is not.",
            [*_overlap(t), *_sweep(t), *_flips(t)],
        ),
        ("table-3", "Table 3: usage", "Of all items.", _usage(t)),
        (
            "table-4",
            "Table 4: retention",
            "From the codes and, for autoencoders, from the latent before quantization: the "
            "paper's near-lossless figures fit the latter alone.",
            [*_retention(t, "decoder(codes)"), *_retention(t, "decoder(z)"), *_errors(t)],
        ),
        ("table-5", "Table 5: AUCs and collisions", "", [*_aucs(t), *_collisions(t)]),
    ]


def _geometry(t: _Tables) -> list[Figure]:
    keys = (
        ("participation ratio", "participation_ratio", 2),
        ("effective rank", "effective_rank", 2),
        ("top share", "top_share", 4),
        ("mean |cosine|", "mean_abs_cosine", 4),
        ("mean |cosine|, centered", "mean_abs_cosine_centered", 4),
    )
    found = t.table(
        "geometry",
        "table-1",
        "Geometry",
        [(name, space("latent", key), digits) for name, key, digits in keys],
        paper=lambda name: [*_written(DRQ_GEOMETRY.get(name)), ""],
        definition="Participation ratio, entropy effective rank and largest eigenvalue's share of "
        "the covariance; mean absolute cosine between columns as they are, and centered.",
    )
    return [
        replace(one, rows=[*_raw(t, data, keys), *one.rows])
        for one, data in zip(found, t.sets, strict=True)
    ]


def _raw(t: _Tables, data: str, keys: Sequence[tuple[str, str, int]]) -> list[list[str]]:
    """Return the input's own row, and the paper's."""
    cells = [
        spread(t.rows.values(space("input", key), data=data, variant="")[:1], digits=n)
        for _, key, n in keys
    ]
    return [
        ["Raw input", "", *cells],
        ["paper: Raw input", "", *_written(DRQ_GEOMETRY["Raw input"]), ""],
    ]


def _at(level: int, key: str, scale: float) -> Read:
    def read(row: Row) -> float | None:
        levels = row.get("overlap") or []
        if level >= len(levels):
            return None
        found = levels[level]
        if key == "geometry_scale":
            value = found["geometry_scale"]
            return None if value is None else float(value)
        return float(found[key][found["scale"].index(scale)])

    return read


def _levels(t: _Tables) -> int:
    return max((len(r.get("overlap") or []) for r in t.rows.rows), default=3)


def _overlap(t: _Tables) -> list[Figure]:
    columns: list[tuple[str, Read, int]] = []
    for n in range(_levels(t)):
        columns += [
            (f"R, level {n + 1}", _at(n, "rate", 0.1), 6),
            (f"K_eff, level {n + 1}", _at(n, "effective_size", 0.1), 1),
            (f"geometry from noise, level {n + 1}", _at(n, "geometry_scale", 0.1), 2),
        ]

    def paper(name: str) -> list[str]:
        return [c for r, size in DRQ_OVERLAP[name] for c in (f"{r:g}", f"{size:g}", "")]

    return t.table(
        "overlap",
        "table-2",
        "Overlap at noise 0.1",
        columns,
        paper=paper,
        definition="R = sum p_i p_j exp(-|c_i - c_j|^2 / 4 s^2), K_eff = 1 / R, s = 0.1 times the "
        "latent's standard deviation a dimension. 'Geometry from noise' is the least multiple of "
        "the sweep at which the geometry part exceeds a tenth of R.",
    )


def _sweep(t: _Tables) -> list[Figure]:
    found = []
    for data in t.sets:
        traces: list[dict[str, Any]] = []
        rows: list[list[str]] = []
        scales: list[float] = []
        for color, name in enumerate(TOKENIZERS):
            own = t.rows.where(data=data, tokenizer=name, variant="")
            if not own or not own[0].get("overlap"):
                continue
            scales = own[0]["overlap"][0]["scale"]
            for n in range(len(own[0]["overlap"])):
                values = [
                    t.rows.values(
                        _at(n, "effective_size", s), data=data, tokenizer=name, variant=""
                    )
                    for s in scales
                ]
                means = [sum(v) / len(v) for v in values]
                title = f"{name}, level {n + 1}"
                traces.append(
                    line(title, scales, means, color + 1, dash=("solid", "dash", "dot")[min(n, 2)])
                )
                rows.append([title, *(f"{m:.1f}" for m in means)])
        if rows:
            found.append(
                Figure(
                    f"sweep-{data}",
                    "table-2",
                    f"K_eff over noise, {data}",
                    "Where a curve is flat it shows usage alone.",
                    "K_eff of every level at each multiple of the latent's standard deviation, "
                    "mean over seeds.",
                    traces,
                    {
                        "xaxis": {"title": "noise", "type": "log"},
                        "yaxis": {"title": "K_eff", "type": "log"},
                    },
                    ["", *(f"{s:g}" for s in scales)],
                    rows,
                )
            )
    return found


def _flip(noise: float, where: str, which: str) -> Read:
    def read(row: Row) -> float | None:
        measured = row.get("flips") or {}
        found = measured.get(where) or (
            measured.get("input") if measured.get("latent_is_input") else None
        )
        if not found or noise not in found["scale"]:
            return None
        value = found[which][found["scale"].index(noise)]
        return float(value)

    return read


def _flips(t: _Tables) -> list[Figure]:
    columns = [
        (f"ids, {where} noise {noise:g}", _flip(noise, where, "id"), 4)
        for where in ("input", "latent")
        for noise in (0.05, 0.1, 0.2)
    ]
    return t.table(
        "flips",
        "table-2",
        "What noise really flips (ours)",
        columns,
        definition="Share of items whose id changes when noise is added and the item is encoded "
        "again; noise as a multiple of the standard deviation of the space it is put on.",
        caption="Lower is steadier. Only noise on the input compares tokenizers of different "
        "latents fairly.",
    )


def _usage(t: _Tables) -> list[Figure]:
    columns: list[tuple[str, Read, int]] = []
    for n in range(_levels(t)):
        columns += [
            (f"perplexity, level {n + 1}", figure("usage", n, "perplexity"), 1),
            (f"active, level {n + 1}", figure("usage", n, "active"), 0),
            (f"Gini, level {n + 1}", figure("usage", n, "gini"), 3),
        ]

    def paper(name: str) -> list[str]:
        cells = DRQ_USAGE[name]
        return [c for n in range(3) for c in (_written(cells[n]) if n in cells else [""] * 3)]

    return t.table(
        "usage",
        "table-3",
        "Usage",
        columns,
        paper=paper if _levels(t) == 3 else None,
        definition="Perplexity exp(H) of the code frequencies, codes with an item, Gini over all K "
        "codes. The paper prints the first and the last level.",
    )


def _cutoffs(t: _Tables) -> list[str]:
    for row in t.rows.rows:
        if row.get("behavior"):
            return [str(k) for k in row["behavior"]["cutoffs"]]
    return []


def _retention(t: _Tables, way: str) -> list[Figure]:
    ks = _cutoffs(t)
    paper = (
        (lambda name: [f"{DRQ_RETENTION[name][k]:g}" for k in ks])
        if set(ks) <= set(DRQ_RETENTION["RQ-VAE"])
        else None
    )
    return t.table(
        f"retention-{'codes' if 'codes' in way else 'z'}",
        "table-4",
        f"Retention of {way}",
        [(f"@{k}", figure("behavior", "retention", way, k), 4) for k in ks],
        paper=paper,
        definition="(HR - HR by chance) / (HR of the original embedding - HR by chance), on "
        "consecutive items of held-out users; not bounded by 1.",
    )


def _errors(t: _Tables) -> list[Figure]:
    columns = [
        (f"{name}, {way}", figure(way, key), 6 if key == "mse" else 4)
        for way in ("decoder(codes)", "decoder(z)")
        for name, key in (
            ("MSE an element", "mse"),
            ("relative error", "relative_error"),
            ("cosine", "cosine"),
        )
    ]
    columns.append(
        ("relative error, held out", figure("decoder(codes)", "relative_error_held_out"), 4)
    )
    return t.table(
        "errors",
        "table-4",
        "Reconstruction",
        columns,
        definition="Relative error: squared error over the variance. The paper prints an MSE of "
        "0.000432 and a cosine of 0.999784 for DRQ-VAE.",
    )


def _aucs(t: _Tables) -> list[Figure]:
    names = (
        ("embedding", "embedding: decoder(codes)"),
        ("weighted", "weighted"),
        ("exact, prefix", "exact_prefix"),
        ("exact, whole id", "exact_full"),
        ("exact, count", "exact_count"),
        ("original embedding", "embedding: original"),
    )
    return t.table(
        "aucs",
        "table-5",
        "AUC of pairs",
        [(name, figure("behavior", "aucs", key), 4) for name, key in names],
        paper=lambda name: [*_written(DRQ_AUC.get(name)), "", "", ""],
        definition="Consecutive items of held-out users against ten fixed random negatives a pair; "
        "ties count one half. The paper does not say which reading of 'exact' it means.",
    )


def _collisions(t: _Tables) -> list[Figure]:
    def paper(name: str) -> list[str]:
        return [*_written(DRQ_COLLISIONS[name]), ""] if name in DRQ_COLLISIONS else []

    return t.table(
        "collisions",
        "table-5",
        "Collisions",
        [
            ("1 - unique/N", figure("collisions", "collision_rate"), 4),
            ("unique ids", figure("collisions", "unique_ids"), 0),
            ("fullest bucket", figure("collisions", "largest_bucket"), 0),
            ("items not alone", figure("collisions", "shared_share"), 4),
        ],
        paper=paper,
        definition="Over all items. Few collisions are no merit by themselves: noisy codes have "
        "few.",
    )
