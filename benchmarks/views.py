"""BARQ against the published tokenizers in every view, paired over seeds, and without its parts.

    python benchmarks/views.py ../shared/data --processes 2

Runs `barq.toml`, or another ``--recipe`` such as `family.toml`, by the machinery of ``semid
reproduce``: one JSON line a run, and the same command continues where it was stopped. Nothing is
fitted on what is measured: behavior is that of a tenth of the users, reconstruction that of a
twentieth of the items. The neural tokenizers' runs of ``semid reproduce drq``, whose network is
wider than their default, stand beside these. Tables go to ``--page``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from semid.progress import make_progress
from semid.reproduce.claims import metric
from semid.reproduce.drq import NOISE, flip_rate
from semid.reproduce.intervals import mean_difference, paired_difference
from semid.reproduce.ledger import RUNS_FILE, read_runs
from semid.reproduce.study import Study

HERE = Path(__file__).parent
OURS = "BARQ"
Row = dict[str, Any]


class View(NamedTuple):
    """One figure of a tokenizer, how it is read from a run, and its direction."""

    name: str
    read: Callable[[Row], float | None]
    higher: bool


def _mean(*reads: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
    def read(row: Row) -> float | None:
        found = [one(row) for one in reads]
        return None if None in found else float(np.mean([v for v in found if v is not None]))

    return read


def _share(row: Row) -> float:
    return float(row["collisions"]["unique_ids"]) / float(row["items"])


LEVELS = range(3)
RETENTION = "behavior.retention"
AUCS = "behavior.aucs"
VIEWS = (
    View("error held out", metric("decoder(codes).relative_error_held_out"), False),
    View("ids that flip at .2", flip_rate(0.2), False),
    View("perplexity, mean", _mean(*(metric(f"usage.{i}.perplexity") for i in LEVELS)), True),
    View(
        "K_eff at .1, mean",
        _mean(*(metric(f"overlap.{i}.effective_size@{NOISE}") for i in LEVELS)),
        True,
    ),
    View("unique ids / items", _share, True),
    View("retention at 50, decoder", metric(f"{RETENTION}.decoder(codes).50"), True),
    View("HR@50 by ids", metric("behavior.discrete.50"), True),
    View("weighted AUC", metric(f"{AUCS}.weighted"), True),
    View("embedding AUC, decoder", metric(f"{AUCS}.embedding: decoder(codes)"), True),
    View("prefix AUC", metric(f"{AUCS}.exact_prefix"), True),
)
"""What every tokenizer was given alike: its decoder into the input space, and its ids."""
SPACES = {
    "sum of codewords": "latent(codes)",
    "head into one behavior space": "behavior head(codes)",
    "BARQ's own head": "decode_behavior(codes)",
}
"""Other spaces that ids are decoded into: they decide no comparison, since not all have them."""
OTHER_SPACES = tuple(
    view
    for name, space in SPACES.items()
    for view in (
        View(f"retention at 50, {name}", metric(f"{RETENTION}.{space}.50"), True),
        View(f"embedding AUC, {name}", metric(f"{AUCS}.embedding: {space}"), True),
    )
)
COST = View(
    "fit, CPU s",
    lambda row: None if row["machine"]["gpu"] else float(row["fit_cpu_seconds"]),
    False,
)


def wide_runs() -> list[Row]:
    """Read the reproduction's runs of tokenizers with a network."""
    rows = read_runs(HERE.parent / "results" / "drq" / RUNS_FILE)
    return [
        {**row, "tokenizer": f"{row['tokenizer']}, wide"}
        for row in rows
        # The plain RQ-VAE is the paper's own, which collapses; it would make others look good.
        if row["kind"] not in ("rqkmeans", "plain-rqvae") and not row["variant"]
    ]


def name_of(row: Row) -> str:
    """Return a tokenizer's name, with what was chosen otherwise."""
    return f"{row['tokenizer']}, {row['variant']}" if row["variant"] else str(row["tokenizer"])


def values(rows: Sequence[Row], view: View) -> dict[int, float]:
    """Return a view's figure by seed."""
    found = {int(row["seed"]): view.read(row) for row in rows}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def table(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Write views by tokenizers, mean and standard deviation over seeds."""
    lines = ["| | " + " | ".join(names) + " |", "| :-- |" + " --: |" * len(names)]
    for view in (*VIEWS, *OTHER_SPACES, COST):
        cells = []
        for name in names:
            found = list(values([r for r in rows if name_of(r) == name], view).values())
            spread = f" ± {np.std(found, ddof=1):.3g}" if len(found) > 1 else ""
            cells.append(f"{np.mean(found):.4g}{spread}" if found else "")
        if any(cells):
            lines.append(f"| {view.name} | " + " | ".join(cells) + " |")
    return lines


def against(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Write ours less each other, paired by seed; the sign is turned so that above 0 is better."""
    lines = ["| ours less | " + " | ".join(names) + " |", "| :-- |" + " --: |" * len(names)]
    for view in VIEWS:
        ours = values([r for r in rows if name_of(r) == OURS], view)
        cells = []
        for name in names:
            other = values([r for r in rows if name_of(r) == name], view)
            both = sorted(ours.keys() & other.keys())
            if not both:
                cells.append("")
                continue
            a, b = [ours[s] for s in both], [other[s] for s in both]
            gap = paired_difference(a, b) if view.higher else paired_difference(b, a)
            if gap.pairs < 2:
                cells.append(f"{gap.mean:+.3g}")
                continue
            half = (gap.high - gap.low) / 2
            word = "" if not gap.shown else " better" if gap.mean > 0 else " worse"
            cells.append(f"{gap.mean:+.3g} ± {half:.2g}{word}")
        lines.append(f"| {view.name} | " + " | ".join(cells) + " |")
    return lines


def verdict(rows: Sequence[Row], other: str, view: View) -> str:
    """Say whether ours is better than another tokenizer, worse, or the same; one seed cannot."""
    ours, theirs = (
        values([r for r in rows if r["tokenizer"] == name], view) for name in (OURS, other)
    )
    both = sorted(ours.keys() & theirs.keys())
    if len(both) < 2:
        return "one seed" if both else ""
    gap = paired_difference([ours[s] for s in both], [theirs[s] for s in both])
    if not gap.shown:
        return "same"
    return "better" if (gap.mean > 0) == view.higher else "worse"


def overall(rows: Sequence[Row], other: str, view: View) -> str:
    """Say the same over all data sets, by the rule of `semid.reproduce.claims`."""
    means = []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        ours, theirs = (
            values([r for r in own if r["tokenizer"] == name], view) for name in (OURS, other)
        )
        # Ratios, since data sets differ in the size of codebooks and in hit rates.
        both = [float(np.log(ours[seed] / theirs[seed])) for seed in ours if seed in theirs]
        means += [fmean(both)] if both else []
    if len(means) < 2:
        return ""
    gap = mean_difference(means)
    if not gap.shown:
        return "same"
    return "better" if (gap.mean > 0) == view.higher else "worse"


def counts(rows: Sequence[Row]) -> list[str]:
    """Write in how many views ours is better, the same and worse, a column a data set.

    The last column is over data sets.
    """
    plain = [row for row in rows if not row["variant"]]
    sets = list(dict.fromkeys(row["data"] for row in plain if row["tokenizer"] == OURS))
    names = list(dict.fromkeys(row["tokenizer"] for row in plain if row["tokenizer"] != OURS))
    heads = [*sets, "over data sets"]
    lines = [
        "| better, same, worse | " + " | ".join(heads) + " |",
        "| :-- |" + " :-- |" * len(heads),
    ]
    for name in names:
        cells = []
        for data in sets:
            own = [row for row in plain if row["data"] == data]
            found = [verdict(own, name, view) for view in VIEWS]
            cells.append("one seed" if "one seed" in found else _tally(found))
        cells.append(_tally([overall(plain, name, view) for view in VIEWS]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _tally(words: Sequence[str]) -> str:
    found = [words.count(word) for word in ("better", "same", "worse")]
    return ", ".join(map(str, found)) if any(found) else "not run"


def short(value: float) -> str:
    """Write three digits, or a whole number where it has more."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


def front(rows: Sequence[Row]) -> list[str]:
    """Write ours beside the best other tokenizer of each view, a column a data set."""
    sets = list(dict.fromkeys(row["data"] for row in rows if name_of(row) == OURS))
    lines = ["| | " + " | ".join(sets) + " |", "| :-- |" + " :-- |" * len(sets)]
    for view in VIEWS:
        cells = []
        for data in sets:
            own = [r for r in rows if r["data"] == data and not r["variant"]]
            found = {
                name: values([r for r in own if r["tokenizer"] == name], view)
                for name in dict.fromkeys(r["tokenizer"] for r in own)
            }
            mine = list(found.pop(OURS).values())
            if not mine:  # a log without order: nothing reads behavior
                cells.append("")
                continue
            means = {name: np.mean(list(v.values())) for name, v in found.items() if v}
            best = (max if view.higher else min)(means, key=lambda name: means[name])
            figures = f"{short(fmean(mine))}, {best} {short(means[best])}"
            cells.append(f"**{verdict(own, best, view)}**: {figures}")
        lines.append(f"| {view.name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "data", type=Path, nargs="?", help="folder of data sets; without it only tables are written"
    )
    parser.add_argument("--recipe", type=Path, default=HERE / "barq.toml")
    parser.add_argument("--only", nargs="*", default=[], help="words a run's title must hold")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "views")
    parser.add_argument("--page", default="views.md", help="name of the page of tables in --out")
    given = parser.parse_args()
    if given.data is not None:
        study = Study(given.recipe, data=given.data, output=given.out, only=given.only)
        with make_progress() as progress:
            failed = study.run(processes=given.processes, threads=1, progress=progress)
        for title, why in failed.items():
            print(f"failed: {title}: {why}")
    rows = read_runs(given.out / "drq" / RUNS_FILE)
    sets = {row["data"] for row in rows}
    rows += [row for row in wide_runs() if row["data"] in sets]
    text = ["# BARQ and the others in every view", ""]
    text += ["Wide ones are those of `semid reproduce drq`: a latent of 256, hidden layers of 512"]
    text += ["and 256, lambda 0.1. Others have their defaults, DRQ-VAE+CL with lambda 1.", ""]
    text += ["Ours, and the best other of each view; 95 % intervals, paired by seed. All have the"]
    text += ["decoder that they come with; other spaces stand in the tables below alone.", ""]
    text += [*front(rows), "", f"Ours against each other in {len(VIEWS)} views:", ""]
    text += [*counts(rows), ""]
    for name in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == name]
        names = list(dict.fromkeys(name_of(row) for row in own))
        seeds = sorted({int(row["seed"]) for row in own})
        text += [f"## {name}, seeds {seeds[0]} to {seeds[-1]}", "", *table(own, names), ""]
        text += ["Paired, 95 % intervals; above 0 is better:", ""]
        text += [*against(own, [n for n in names if n != OURS]), ""]
    (given.out / given.page).write_text("\n".join(text), encoding="utf8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
