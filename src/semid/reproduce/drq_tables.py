"""The DRQ paper's tables, its printed values beside ours, and which tokenizer leads when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from semid.report.figure import Figure, line
from semid.reproduce.claims import Comparison, Metric, Rows, metric, negated
from semid.reproduce.drq import (
    CODES,
    CONTINUOUS,
    TOKENIZERS,
    auc,
    effective_size,
    flip_rate,
    overlap,
    retention,
    usage,
)
from semid.reproduce.tables import (
    Column,
    Line,
    Lines,
    Section,
    Table,
    average,
    mean,
    mean_and_deviation,
    printed,
)

__all__ = ["DRQ_SECTIONS", "recommend"]

BESIDE = (
    "Mean and standard deviation over seeds. Lines called 'paper' are its own values, on another "
    "catalogue with K = 4096: for the order of rows only."
)


Values = Sequence[tuple[str, Metric, int]]
"""Name, metric and decimals of columns."""


def _columns(values: Values) -> list[Column]:
    """Return the number of seeds, then columns with mean and standard deviation."""
    measured = [Column(name, mean_and_deviation(read, digits)) for name, read, digits in values]
    return [Column("seeds", _seeds), *measured]


def _seeds(rows: Rows, line: Line) -> str:
    """Count a line's seeds; the raw input has none."""
    return str(len(rows.where(**line.where)) or "not run") if "tokenizer" in line.where else ""


def _lines(rows: Rows, at: tuple[Any, ...] = ()) -> list[Line]:
    """Return a line per tokenizer of the paper, then one per variant that there is."""
    variants = {(r["tokenizer"], r["variant"]) for r in rows.rows if r["variant"]}
    return [
        Line(
            f"{name} ({variant})" if variant else name,
            {"tokenizer": name, "variant": variant},
            at,
        )
        for name, variant in [*((name, "") for name in TOKENIZERS), *sorted(variants)]
    ]


def _geometry_lines(rows: Rows) -> list[Line]:
    """Return the input's own line, which is the same for all tokenizers, before the others."""
    first = {"variant": "", "seed": min(rows.names("seed", variant=""), default=0)}
    raw = Line("Raw input", first, ("geometry", "input"))
    return [raw, *_lines(rows, ("geometry", "latent"))]


def _table(
    key: str,
    title: str,
    definition: str,
    values: Values | Callable[[Rows], Values],
    *,
    caption: str = BESIDE,
    lines: Lines = _lines,
) -> Table:
    """Return a table with the paper's values beside ours."""
    return Table(
        key,
        title,
        caption,
        definition,
        lines,
        lambda rows: _columns(values(rows) if callable(values) else values),
        printed=printed("drq").get(key, {}),
    )


def _levels(rows: Rows) -> int:
    return max((len(r.get("overlap") or []) for r in rows.rows), default=3)


def _overlap_values(rows: Rows) -> Values:
    return [
        (f"{name}, level {n + 1}", read, digits)
        for n in range(_levels(rows))
        for name, read, digits in (
            ("R", overlap(n, "rate"), 6),
            ("K_eff", effective_size(n), 1),
            ("geometry from noise", metric("overlap", n, "geometry_scale"), 2),
        )
    ]


def _usage_values(rows: Rows) -> Values:
    return [
        (f"{name}, level {n + 1}", usage(n, name.lower()), digits)
        for n in range(_levels(rows))
        for name, digits in (("perplexity", 1), ("active", 0), ("Gini", 3))
    ]


def _scales(rows: Rows) -> list[float]:
    return next((r["overlap"][0]["scale"] for r in rows.main().rows if r.get("overlap")), [])


def _sweep_lines(rows: Rows) -> list[Line]:
    """Return a line per tokenizer and level."""
    return [
        Line(f"{name}, level {n + 1}", {"tokenizer": name, "variant": ""}, ("overlap", n))
        for name in TOKENIZERS
        for n in range(_levels(Rows(rows.where(tokenizer=name, variant=""))))
        if rows.where(tokenizer=name, variant="")
    ]


def _sweep_columns(rows: Rows) -> list[Column]:
    return [
        Column(f"{scale:g}", mean(metric("effective_size", n), ".1f"))
        for n, scale in enumerate(_scales(rows))
    ]


def _sweep_chart(rows: Rows, lines: Sequence[Line]) -> list[dict[str, Any]]:
    traces = []
    scales = _scales(rows)
    for one in lines:
        values = [one.values(rows, metric("effective_size", n)) for n in range(len(scales))]
        color = TOKENIZERS.index(one.where["tokenizer"]) + 1
        dash = ("solid", "dash", "dot")[min(one.at[1], 2)]
        traces.append(line(one.label, scales, [average(v) for v in values], color, dash=dash))
    return traces


def _retention(key: str, space: str) -> Table:
    def values(rows: Rows) -> Values:
        cutoffs = next((r["behavior"]["cutoffs"] for r in rows.rows if r.get("behavior")), ())
        return [(f"@{k}", retention(space, str(k)), 4) for k in cutoffs]

    return _table(
        key,
        f"Retention of {space}",
        "(HR - HR by chance) / (HR of the original embedding - HR by chance), on consecutive items "
        "of held-out users; not bounded by 1.",
        values,
    )


QUESTIONS: dict[str, tuple[Metric, int]] = {
    "steady ids: fewest flips under input noise 0.2": (negated(flip_rate(0.2)), 4),
    "close to the embedding: least error of the codes": (
        negated(metric(CODES, "relative_error")),
        4,
    ),
    "close to it on items never seen: least held-out error": (
        negated(metric(CODES, "relative_error_held_out")),
        4,
    ),
    "retrieval by reconstruction: retention at 50": (retention(CODES, "50"), 4),
    "retrieval by ids alone: HR@50": (metric("behavior", "discrete", "50"), 4),
    "soft matching: weighted AUC": (auc("weighted"), 4),
    "even usage: perplexity of the last level": (usage(-1, "perplexity"), 1),
    "capacity: K_eff of the first level": (effective_size(0), 1),
    "unique ids: fewest collisions": (negated(metric("collisions", "collision_rate")), 4),
}
"""What one may need of ids, and the metric that answers it, higher being better."""


def recommend(rows: Rows) -> Figure | None:
    """Name the leader for every question and data set, and the tokenizers that are level with it.

    A tokenizer is level with the leader unless the paired interval over seeds of their difference
    leaves out 0; with one seed all are level.

    Args:
        rows: rows of the ledger; variants do not take part.
    """
    main = rows.main()
    table = []
    for data in main.names("data"):
        for question, (read, digits) in QUESTIONS.items():
            values = {name: main.values(read, data=data, tokenizer=name) for name in TOKENIZERS}
            means = {name: average(v) for name, v in values.items() if v}
            if not means:
                continue
            best = max(means, key=lambda name: means[name])
            level = [
                other
                for other in means
                if other != best
                and not Comparison(
                    other,
                    main.difference(
                        read,
                        {"data": data, "tokenizer": best},
                        {"data": data, "tokenizer": other},
                    ),
                ).favor
            ]
            absent = [name for name in TOKENIZERS if name not in means]
            table.append(
                [
                    f"{data}: {question}",
                    f"{best} ({abs(means[best]):.{digits}f})",
                    ", ".join(level) or "nobody",
                    ", ".join(absent) or "none",
                ]
            )
    if not table:
        return None
    return Figure(
        "which",
        "which",
        "Which tokenizer when",
        "Start from what you need of the ids; no view stands for another.",
        "The leader by the mean over seeds, and the tokenizers whose paired 95 % interval against "
        "it includes 0. Few collisions and even usage are no merit by themselves: noisy codes have "
        "both.",
        columns=["wanted", "leader", "level with it", "not run"],
        rows=table,
    )


DRQ_SECTIONS = (
    Section(
        "which",
        "Which tokenizer when",
        "Drawn from the runs below and nothing else.",
        [recommend],
    ),
    Section(
        "table-1",
        "Table 1: geometry",
        "Of the latent before quantization.",
        [
            _table(
                "geometry",
                "Geometry",
                "Participation ratio, entropy effective rank and largest eigenvalue's share of "
                "the covariance; mean absolute cosine between columns as they are, and centered.",
                [
                    ("participation ratio", metric("participation_ratio"), 2),
                    ("effective rank", metric("effective_rank"), 2),
                    ("top share", metric("top_share"), 4),
                    ("mean |cosine|", metric("mean_abs_cosine"), 4),
                    ("mean |cosine|, centered", metric("mean_abs_cosine_centered"), 4),
                ],
                lines=_geometry_lines,
            )
        ],
    ),
    Section(
        "table-2",
        "Table 2: overlap and K_eff",
        "At small noise R shows nothing but usage: where the geometry part is below a tenth of "
        "R, the last column says from which noise on it is not.",
        [
            _table(
                "overlap",
                "Overlap at noise 0.1",
                "R = sum p_i p_j exp(-|c_i - c_j|^2 / 4 s^2), K_eff = 1 / R, s = 0.1 times the "
                "latent's standard deviation a dimension. 'Geometry from noise' is the least "
                "multiple of the sweep at which the geometry part exceeds a tenth of R.",
                _overlap_values,
            ),
            Table(
                "sweep",
                "K_eff over noise",
                "Where a curve is flat it shows usage alone.",
                "K_eff of every level at each multiple of the latent's standard deviation, "
                "mean over seeds.",
                _sweep_lines,
                _sweep_columns,
                chart=_sweep_chart,
                layout={
                    "xaxis": {"title": "noise", "type": "log"},
                    "yaxis": {"title": "K_eff", "type": "log"},
                },
            ),
            _table(
                "flips",
                "What noise really flips (ours)",
                "Share of items whose id changes when noise is added and the item is encoded "
                "again; noise as a multiple of the standard deviation of the space it is put on.",
                [
                    (f"ids, {space} noise {noise:g}", flip_rate(noise, space), 4)
                    for space in ("input", "latent")
                    for noise in (0.05, 0.1, 0.2)
                ],
                caption="Lower is steadier. Only noise on the input compares tokenizers of "
                "different latents fairly.",
            ),
        ],
    ),
    Section(
        "table-3",
        "Table 3: usage",
        "Of all items.",
        [
            _table(
                "usage",
                "Usage",
                "Perplexity exp(H) of the code frequencies, codes with an item, Gini over all K "
                "codes. The paper prints the first and the last level.",
                _usage_values,
            )
        ],
    ),
    Section(
        "table-4",
        "Table 4: retention",
        "From the codes and, for autoencoders, from the latent before quantization: the "
        "paper's near-lossless figures fit the latter alone.",
        [
            _retention("retention-codes", CODES),
            _retention("retention-z", CONTINUOUS),
            _table(
                "errors",
                "Reconstruction",
                "Relative error: squared error over the variance. The paper prints an MSE of "
                "0.000432 and a cosine of 0.999784 for DRQ-VAE.",
                [
                    *(
                        (f"{name}, {space}", metric(space, key), digits)
                        for space in (CODES, CONTINUOUS)
                        for name, key, digits in (
                            ("MSE an element", "mse", 6),
                            ("relative error", "relative_error", 4),
                            ("cosine", "cosine", 4),
                        )
                    ),
                    ("relative error, held out", metric(CODES, "relative_error_held_out"), 4),
                ],
            ),
        ],
    ),
    Section(
        "table-5",
        "Table 5: AUCs and collisions",
        "",
        [
            _table(
                "aucs",
                "AUC of pairs",
                "Consecutive items of held-out users against ten fixed random negatives a pair; "
                "ties count one half. The paper does not say which reading of 'exact' it means.",
                [
                    ("embedding", auc(f"embedding: {CODES}"), 4),
                    ("weighted", auc("weighted"), 4),
                    ("exact, prefix", auc("exact_prefix"), 4),
                    ("exact, whole id", auc("exact_full"), 4),
                    ("exact, count", auc("exact_count"), 4),
                    ("original embedding", auc("embedding: original"), 4),
                ],
            ),
            _table(
                "collisions",
                "Collisions",
                "Over all items. Few collisions are no merit by themselves: noisy codes have few.",
                [
                    ("1 - unique/N", metric("collisions", "collision_rate"), 4),
                    ("unique ids", metric("collisions", "unique_ids"), 0),
                    ("fullest bucket", metric("collisions", "largest_bucket"), 0),
                    ("items not alone", metric("collisions", "shared_share"), 4),
                ],
            ),
        ],
    ),
)
