"""What alignment saves: a catalogue that grows, refreshed three times, with and without.

    python benchmarks/refresh.py ../shared/data/amazon2014_beauty ../shared/data/amazon2014_sports

Items are sorted by the time of their first interaction. RQ-KMeans is fitted on the early half; the
later half comes in three steps. After each step the codebooks are fitted again, from the old ones
with renumbering (`semid.refresh`) and from scratch. Churn is the share of items published before
whose codes changed, next to the error and the collisions it buys. Popularity is the number of
interactions up to then. Writes RESULTS/refresh.json and RESULTS/refresh.md after every
data set; what they hold of other data under the same settings stays.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

import semid
from semid.catalogue.drift import drift
from semid.catalogue.refresh import refresh
from semid.data.ids import ItemIds

POINTS = (0.5, 0.667, 0.833, 1.0)


def first_seen(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, ItemIds]:
    """Return items by first appearance, and the log as item rows and times."""
    items = ItemIds(pq.read_table(folder / "items.parquet", columns=["item_id"])["item_id"])
    log = pq.read_table(folder / "interactions.parquet", columns=["item_id", "timestamp"])
    rows = items.index_of(log["item_id"])
    times = pc.cast(log["timestamp"], "int64").to_numpy()
    known = rows >= 0
    first = np.full(len(items), np.iinfo(np.int64).max)
    np.minimum.at(first, rows[known], times[known])
    return np.argsort(first, kind="stable"), rows[known], times[known], items


def steps(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one data set."""
    order, rows, times, items = first_seen(folder)
    x = np.load(folder / "embeddings.f16.npy", mmap_mode="r")
    seen = np.full(len(items), np.iinfo(np.int64).max)
    np.minimum.at(seen, rows, times)
    catalogues = [np.sort(order[: round(share * len(order))]) for share in POINTS]
    source = semid.open_embeddings(x, ids=items)
    began = time.perf_counter()
    model = semid.RQKMeans(
        levels=args.levels, codebook_size=args.codes, seed=args.seed, threads=args.threads
    ).fit(source.subset(catalogues[0]))
    print(f"{folder.name}: first fit {time.perf_counter() - began:.1f} s", flush=True)
    ids = model.encode(source.subset(catalogues[0]))
    done = []
    for before, now in pairwise(catalogues):
        until = seen[now].max()
        popularity = np.bincount(rows[times <= until], minlength=len(items))[now].astype(float)
        moved = drift(model, source.subset(before), source.subset(now))
        began = time.perf_counter()
        result = refresh(
            model,
            ids,
            source.subset(now),
            popularity=popularity,
            max_churn=args.max_churn,
            compare=True,
        )
        done.append(
            {
                "data": folder.name,
                "seconds": round(time.perf_counter() - began, 1),
                "drift": figures(moved.to_dict()),
                "refresh": result.report.to_dict(),
            }
        )
        print(f"{folder.name}: {len(now)} items", result.report.summary(), sep="\n", flush=True)
        model, ids = result.tokenizer, result.ids
    return done


def figures(moved: dict[str, Any]) -> dict[str, Any]:
    """Keep the figures without those that only lead to the verdict."""
    for level in moved["levels"]:
        for name in ("expected", "excess"):
            level.pop(name, None)
    return moved


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def markdown(document: dict[str, Any]) -> str:
    """Lay the results out as one table."""
    settings = document["settings"]
    lines = [
        "# Refreshing a catalogue that grows",
        "",
        f"`{document['command']}`, {settings['levels']} levels of {settings['codes']} codes, "
        f"seed {settings['seed']}. Changed: share of the items published before; *published* "
        f"spends a budget of {percent(settings['max_churn'])}.",
        "",
        "| data | items | new | codes | changed | by popularity | first code changed | error | "
        "held out | 1 - unique/N |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for step in document["steps"]:
        report = step["refresh"]
        for each in report["generations"]:
            moved = each["churn"] or {}
            whole = moved.get("prefix", (None,))[-1]
            mass = (moved.get("weighted_prefix") or (None,))[-1]
            first = moved.get("prefix", (None,))[0]
            lines.append(
                f"| {step['data']} | {report['items']} | {report['new']} | {each['name']} | "
                f"{percent(whole)} | {percent(mass)} | {percent(first)} | {each['error']:.4f} | "
                f"{each['held_out_error']:.4f} | {each['collision_rate']:.4f} |"
            )
    lines += [
        "",
        "## Drift before each refresh",
        "",
        "| data | items | verdict | largest usage shift | error before | error after | "
        "new items that are novel |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in document["steps"]:
        found = step["drift"]
        shift = max(level["total_variation"] for level in found["levels"])
        lines.append(
            f"| {step['data']} | {found['items_after']} | {found['verdict']} | {shift:.3f} | "
            f"{found['error_before']:.4f} | {found['error_after']:.4f} | "
            f"{percent(found['novel_new'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-churn", type=float, default=0.1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    document: dict[str, Any] = {
        "command": f"python benchmarks/refresh.py DATA... --codes {args.codes} "
        f"--levels {args.levels} --seed {args.seed} --max-churn {args.max_churn}",
        "settings": {
            "codes": args.codes, "levels": args.levels, "seed": args.seed,
            "max_churn": args.max_churn, "points": POINTS,
        },
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "steps": [],
    }  # fmt: skip
    args.results.mkdir(parents=True, exist_ok=True)
    stored = args.results / "refresh.json"
    if stored.exists():  # other data under the same settings stay
        earlier = json.loads(stored.read_text())
        if earlier["settings"] == json.loads(json.dumps(document["settings"])):
            again = [folder.name for folder in args.data]
            document["steps"] = [s for s in earlier["steps"] if s["data"] not in again]
    for folder in args.data:
        document["steps"] += steps(folder, args)
        (args.results / "refresh.json").write_text(json.dumps(document, indent=1) + "\n")
        (args.results / "refresh.md").write_text(markdown(document))


if __name__ == "__main__":
    main()
