"""The DRQ paper: what its claims and tables need beside the data in ``papers/drq.toml``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from semid.diagnostics.pairs import rank_agreement
from semid.report.figure import line
from semid.reproduce.claims import (
    Comparison,
    Contrast,
    Family,
    Metric,
    Row,
    Rows,
    Statement,
    metric,
    pool,
    relative_change,
)
from semid.reproduce.intervals import CONFIDENCE, Difference, mean_difference
from semid.reproduce.papers import Column, Line, Paper, average

TOKENIZERS = ("RQ-VAE", "RQP-VAE", "RQ-KMeans", "DRQ-VAE", "DRQ-VAE+CL")
PLAIN = "RQ-VAE (plain)"
"""RQ-VAE that can collapse, for the claims about collapse; it stands in the tables alone."""
NOISE = 0.1
"""The noise at which overlap is judged; the page shows the whole sweep."""
VIEWS = (
    ("RQP-VAE", "log2 K_eff", "log2 overlap.0.effective_size@0.1"),
    ("DRQ-VAE", "relative error", "-decoder(codes).relative_error"),
    ("DRQ-VAE+CL", "weighted AUC", "behavior.aucs.weighted"),
)
"""The tokenizer that the paper calls the best of a view: each should be beaten by one of them."""


def flip_rate(noise: float, space: str = "input") -> Metric:
    """Return the metric: share of ids that noise on a space changes."""

    def read(row: Row) -> float | None:
        flips = row.get("flips") or {}
        # A tokenizer without an encoder has one space, which is measured once.
        name = "input" if flips.get("latent_is_input") and not flips.get(space) else space
        return metric(f"flips.{name}.id@{noise}")(row)

    return read


def within_level_agreement(
    rows: Rows, data: str, seed: int, space: str = "latent"
) -> tuple[list[float], float] | None:
    """Rank R against measured flips over tokenizers: in each level, and with all levels pooled.

    None where a tokenizer lacks flips at `NOISE`. Pooled, the correlation shows that both R and the
    flips rise with the level, whatever they do among tokenizers of one level.
    """
    flips: list[list[float]] = []
    rates: list[list[float]] = []
    for tokenizer in TOKENIZERS:
        for row in rows.where(**cell(tokenizer), data=data, seed=seed):
            measured = row.get("flips") or {}
            points = measured.get(space, measured.get("input"))
            if points and NOISE in points["scale"]:
                flips.append(points["code"][points["scale"].index(NOISE)])
                rates.append([one["rate"][one["scale"].index(NOISE)] for one in row["overlap"]])
    if len(flips) < 3:
        return None

    def correlate(measured: Sequence[float], predicted: Sequence[float]) -> float:
        value = rank_agreement(measured, {"R": predicted})["R"]
        return 0.0 if value is None else float(value)

    columns = zip(zip(*flips, strict=True), zip(*rates, strict=True), strict=True)
    levels = [correlate(*level) for level in columns]
    return levels, correlate([f for one in flips for f in one], [r for one in rates for r in one])


def overlap_agreement(rows: Rows, sets: Sequence[str]) -> list[Statement]:
    """Rank R against measured flips within levels: the mean over levels, one value per seed."""
    values: dict[str, dict[int, float]] = {}
    comparisons = []
    for data in sets:
        values[data] = {}
        for seed in sorted(rows.names("seed", data=data)):
            if (agreement := within_level_agreement(rows, data, seed)) is not None:
                values[data][seed] = average(agreement[0])
        runs = list(values[data].values())
        missing = sum(rows.lacking(**cell(one), data=data) for one in TOKENIZERS)
        name = f"{data}: rank correlation of R with the flips within levels"
        comparisons.append(Comparison(name, mean_difference(runs) if runs else None, missing))
    name = "rank correlation of R with the flips within levels"
    return [pool(name, values, comparisons, digits=3)]


def agreement_table(rows: Rows) -> list[list[str]]:
    """Write the correlations of R with the flips: of each level, and with all levels pooled."""
    table, main = [], rows.protocol()
    for data in main.names("data"):
        for space in ("latent", "input"):
            seeds = sorted(main.names("seed", data=data))
            agreements = [within_level_agreement(main, data, seed, space) for seed in seeds]
            runs = [one for one in agreements if one is not None]
            if runs:
                levels = zip(*(levels for levels, _ in runs), strict=True)
                means = [*map(average, levels), average([pooled for _, pooled in runs])]
                table.append([f"{data}, noise on the {space}", *(f"{m:+.2f}" for m in means)])
    return table


def beaten_somewhere(rows: Rows, sets: Sequence[str]) -> list[Statement]:
    """Compare each tokenizer with those that the paper calls the best of a view.

    The rival that beats it most clearly counts, at Bonferroni's level for the number of rivals.
    """
    statements = []
    for tokenizer in TOKENIZERS:
        leaders = [one for one in VIEWS if one[0] != tokenizer]
        confidence = 1 - (1 - CONFIDENCE) / len(leaders)
        rivals = []
        for leader, view, path in leaders:
            name = f"{tokenizer} is beaten; {view}, {leader} - {tokenizer}"
            contrast = Contrast(name, metric(path), cell(leader), cell(tokenizer))
            rivals.append(Family(name, (contrast,)).state(rows, sets, confidence))
        # Views have units of their own: the clearest rival is the one whose estimate is largest
        # beside its interval.
        best = max(rivals, key=lambda one: _clearness(one.estimate()))
        everything = tuple(c for one in rivals for c in one.comparisons)
        statements.append(replace(best, comparisons=everything))
    return statements


def _clearness(estimate: Difference | None) -> float:
    """Return an estimate in units of its interval's half width; one without an interval is last."""
    if estimate is None or not estimate.high > estimate.low:
        return math.inf if estimate is not None and estimate.low > 0 else -math.inf
    return 2 * estimate.mean / (estimate.high - estimate.low)


def cell(tokenizer: str, variant: str = "") -> dict[str, Any]:
    """Select the runs of a tokenizer, by default with the paper's choices."""
    return {"tokenizer": tokenizer, "variant": variant}


def noise_scales(rows: Rows) -> list[float]:
    """Return the noise scales at which overlap was measured."""
    runs = [r for r in rows.protocol().rows if r.get("overlap")]
    return list(runs[0]["overlap"][0]["scale"]) if runs else []


def facts(rows: Rows) -> Mapping[str, Any]:
    """Return tokenizers, levels, noise scales and cutoffs."""
    levels = max((len(r.get("overlap") or []) for r in rows.rows), default=3)
    behavior: Row = next((r["behavior"] for r in rows.rows if r.get("behavior")), {})
    return {
        "others": TOKENIZERS,
        "others than RQ-VAE": [name for name in TOKENIZERS if name != "RQ-VAE"],
        "levels": [{"n": n + 1, "at": n} for n in range(levels)],
        "scales": [{"scale": f"{scale:g}", "at": n} for n, scale in enumerate(noise_scales(rows))],
        "cutoffs": [{"k": k} for k in behavior.get("cutoffs", ())],
    }


def tokenizer_lines(rows: Rows, at: tuple[Any, ...] = ()) -> list[Line]:
    """Return a line per tokenizer of the paper, then one per variant that there is."""
    variants = sorted({(r["tokenizer"], r["variant"]) for r in rows.rows if r["variant"]})
    lines = [Line(name, cell(name), at) for name in (*TOKENIZERS, PLAIN)]
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
    for name in (*TOKENIZERS, PLAIN):
        runs = rows.where(**cell(name))
        for n in range(len(runs[0].get("overlap") or []) if runs else 0):
            yield Line(f"{name}, level {n + 1}", cell(name), ("overlap", n))


def sweep_chart(rows: Rows, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Yield a curve per tokenizer and level."""
    scales = noise_scales(rows)
    for one in lines:
        reads = [metric(f"effective_size.{n}") for n in range(len(scales))]
        sizes = [average(one.values(rows, read)) for read in reads]
        color = (*TOKENIZERS, PLAIN).index(one.where["tokenizer"]) + 1
        dash = ("solid", "dash", "dot")[min(one.at[1], 2)]
        yield line(one.label, scales, sizes, color, dash=dash)


def recommend(rows: Rows) -> list[list[str]]:
    """Name the leader over all data sets for every question, and those level with it."""
    main, table = rows.protocol(), []
    sets = main.names("data")
    for question, name, digits in DRQ.file["questions"]:
        read, shown = DRQ.metric(name), DRQ.metric(name.removeprefix("log2 "))
        means = {
            t: [average(v) for v in of_sets]
            for t in TOKENIZERS
            if all(of_sets := [main.values(read, data=d, tokenizer=t) for d in sets])
        }
        if not means:
            continue
        best = max(means, key=lambda t: average(means[t]))
        rivals = {
            t: Family(t, (Contrast(t, read, cell(best), cell(t)),)).state(main, sets)
            for t in means
            if t != best
        }
        # Level with the leader unless the interval over data sets leaves out 0.
        estimates = {t: one.estimate(len(rivals)) for t, one in rivals.items()}
        level = [t for t, e in estimates.items() if e is None or not e.low > 0]
        figures = [average(main.values(shown, data=d, tokenizer=best)) for d in sets]
        values = ", ".join(f"{abs(value):.{digits}f}" for value in figures)
        table.append([question, best, values, ", ".join(level) or "nobody"])
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
        "agreement": agreement_table,
        "tokenizers": tokenizer_lines,
        "geometry": geometry_lines,
        "seeds": seeds_columns,
        "sweep": sweep_lines,
        "sweep chart": sweep_chart,
    },
)
