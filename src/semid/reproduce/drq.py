"""The DRQ paper: what its claims and tables need beside the data in ``papers/drq.toml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from semid.diagnostics.pairs import rank_agreement
from semid.report.figure import line
from semid.reproduce.claims import (
    Comparison,
    Contrast,
    Metric,
    Row,
    Rows,
    metric,
    paired_difference,
    relative_change,
)
from semid.reproduce.papers import Column, Line, Paper, average

TOKENIZERS = ("RQ-VAE", "RQP-VAE", "RQ-KMeans", "DRQ-VAE", "DRQ-VAE+CL")
NOISE = 0.1
"""The noise at which overlap is judged; the page shows the whole sweep."""
VIEWS = {
    "K_eff": "overlap.0.effective_size@0.1",
    "relative error": "-decoder(codes).relative_error",
    "weighted AUC": "behavior.aucs.weighted",
}
"""In one of these every tokenizer should be beaten by some other."""


def flip_rate(noise: float, space: str = "input") -> Metric:
    """Return the metric: share of ids that noise on a space changes."""

    def read(row: Row) -> float | None:
        flips = row.get("flips") or {}
        # A tokenizer without an encoder has one space, which is measured once.
        name = "input" if flips.get("latent_is_input") and not flips.get(space) else space
        return metric(f"flips.{name}.id@{noise}")(row)

    return read


def overlap_agreement(rows: Rows, data: str) -> list[Comparison]:
    """Rank R against measured flips over tokenizers and levels, one correlation per seed."""
    correlations = []
    for seed in sorted(rows.names("seed", data=data)):
        flips, rates = [], []
        for row in rows.where(data=data, seed=seed):
            measured = row.get("flips") or {}
            points = measured.get("latent", measured.get("input"))
            if not points or NOISE not in points["scale"]:
                continue
            shares = points["code"][points["scale"].index(NOISE)]
            for share, level in zip(shares, row["overlap"], strict=False):
                flips.append(share)
                rates.append(level["rate"][level["scale"].index(NOISE)])
        if len(flips) >= 6:  # two tokenizers of three levels
            value = rank_agreement(flips, {"R": rates})["R"]
            if value is not None:
                correlations.append(float(value))
    result = paired_difference(correlations, [0.0] * len(correlations)) if correlations else None
    return [Comparison(f"{data}: rank correlation of R with the flips", result, 3)]


def beaten_somewhere(rows: Rows, data: str) -> Iterator[Comparison]:
    """Compare each tokenizer with the rival that beats it most clearly in some view."""
    for tokenizer in TOKENIZERS:
        contrasts = [
            Contrast(f"{view}, {other} - {tokenizer}", metric(path), cell(other), cell(tokenizer))
            for other in TOKENIZERS
            if other != tokenizer
            for view, path in VIEWS.items()
        ]
        comparisons = [contrast.compare(rows, data) for contrast in contrasts]
        rivals = [c for c in comparisons if c.difference is not None]
        if rivals:
            best = max(rivals, key=lambda c: c.favor)
            yield Comparison(f"{tokenizer} is beaten; {best.name}", best.difference)
        else:
            yield Comparison(f"{data}: {tokenizer} is beaten in some view", None)


def cell(tokenizer: str, variant: str = "") -> dict[str, Any]:
    """Select the runs of a tokenizer, by default with the paper's choices."""
    return {"tokenizer": tokenizer, "variant": variant}


def noise_scales(rows: Rows) -> list[float]:
    """Return the noise scales at which overlap was measured."""
    runs = [r for r in rows.main().rows if r.get("overlap")]
    return list(runs[0]["overlap"][0]["scale"]) if runs else []


def facts(rows: Rows) -> Mapping[str, Any]:
    """Return tokenizers, levels, noise scales and cutoffs."""
    levels = max((len(r.get("overlap") or []) for r in rows.rows), default=3)
    behavior: Row = next((r["behavior"] for r in rows.rows if r.get("behavior")), {})
    return {
        "others": TOKENIZERS,
        "levels": [{"n": n + 1, "at": n} for n in range(levels)],
        "scales": [{"scale": f"{scale:g}", "at": n} for n, scale in enumerate(noise_scales(rows))],
        "cutoffs": [{"k": k} for k in behavior.get("cutoffs", ())],
    }


def tokenizer_lines(rows: Rows, at: tuple[Any, ...] = ()) -> list[Line]:
    """Return a line per tokenizer of the paper, then one per variant that there is."""
    variants = sorted({(r["tokenizer"], r["variant"]) for r in rows.rows if r["variant"]})
    lines = [Line(name, cell(name), at) for name in TOKENIZERS]
    return lines + [Line(f"{name} ({v})", cell(name, v), at) for name, v in variants]


def geometry_lines(rows: Rows) -> list[Line]:
    """Return the input's own line, which is the same for all tokenizers, before the others."""
    first = {"variant": "", "seed": min(rows.names("seed", variant=""), default=0)}
    raw = Line("Raw input", first, ("geometry", "input"))
    return [raw, *tokenizer_lines(rows, ("geometry", "latent"))]


def seeds_columns(rows: Rows) -> list[Column]:
    """Return the column with a line's number of seeds; the raw input has none."""

    def count(rows: Rows, line: Line) -> str:
        runs = len(rows.where(**line.where))
        return str(runs or "not run") if "tokenizer" in line.where else ""

    return [Column("seeds", count)]


def sweep_lines(rows: Rows) -> Iterator[Line]:
    """Yield a line per tokenizer and level."""
    for name in TOKENIZERS:
        runs = rows.where(**cell(name))
        for n in range(len(runs[0].get("overlap") or []) if runs else 0):
            yield Line(f"{name}, level {n + 1}", cell(name), ("overlap", n))


def sweep_chart(rows: Rows, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Yield a curve per tokenizer and level."""
    scales = noise_scales(rows)
    for one in lines:
        reads = [metric(f"effective_size.{n}") for n in range(len(scales))]
        sizes = [average(one.values(rows, read)) for read in reads]
        color = TOKENIZERS.index(one.where["tokenizer"]) + 1
        dash = ("solid", "dash", "dot")[min(one.at[1], 2)]
        yield line(one.label, scales, sizes, color, dash=dash)


def recommend(rows: Rows) -> list[list[str]]:
    """Name the leader for every question and data set, and those that are level with it."""
    main, table = rows.main(), []
    for data in main.names("data"):
        for question, name, digits in DRQ.file["questions"]:
            read = DRQ.metric(name)
            values = {t: main.values(read, data=data, tokenizer=t) for t in TOKENIZERS}
            means = {t: average(v) for t, v in values.items() if v}
            if not means:
                continue
            best = max(means, key=lambda t: means[t])
            # Level with the leader unless the paired interval over seeds leaves out 0; with one
            # seed all are.
            rivals = [Contrast(t, read, cell(best), cell(t)) for t in means if t != best]
            level = [c.name for c in rivals if not c.compare(main, data).favor]
            absent = [t for t in TOKENIZERS if t not in means]
            leader = f"{best} ({abs(means[best]):.{digits}f})"
            names = (", ".join(level) or "nobody", ", ".join(absent) or "none")
            table.append([f"{data}: {question}", leader, *names])
    return table


DRQ = Paper(
    "drq",
    cell,
    facts,
    metrics={
        "change of participation ratio": relative_change(
            metric("geometry.latent.participation_ratio"),
            metric("geometry.input.participation_ratio"),
        ),
        "-flips": lambda row: None if (rate := flip_rate(0.2)(row)) is None else -rate,
        **{
            f"{space} flips at {noise:g}": flip_rate(noise, space)
            for space in ("input", "latent")
            for noise in (0.05, 0.1, 0.2)
        },
    },
    code={
        "overlap_agreement": overlap_agreement,
        "beaten_somewhere": beaten_somewhere,
        "recommend": recommend,
        "tokenizers": tokenizer_lines,
        "geometry": geometry_lines,
        "seeds": seeds_columns,
        "sweep": sweep_lines,
        "sweep chart": sweep_chart,
    },
)
