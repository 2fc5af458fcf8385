"""Do codes help ranking? Real logs, every method and control on equal terms, paired over seeds.

    python benchmarks/ranking_codes.py ../shared/data --sets anime beauty toys sports

No codes, random codes, many embeddings of one code (ME), RQ-VAE, Mixture-of-Codes and BARQ at 3x,
fusion on and off for each, DeepFM and DCNv2, five seeds; a twentieth of the items is held out of
training altogether. Every run is a line of ``results.jsonl`` under the output folder and is not
repeated: the same command continues where it was stopped. Tables go to ``tables.md`` beside it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import semid
from semid.progress import make_progress
from semid.recommenders.ranking.builder import RankingDataConfig
from semid.recommenders.ranking.data import prepare_ranking_data
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.training import rank_options
from semid.reproduce.claims import Rows, metric
from semid.reproduce.ranking_grid import RESULTS_FILE, Grid, grid_tables, read_results, run_grid

SETS = {
    "anime": ("anime_mal", "rating>=8", ()),
    "beauty": ("amazon2014_beauty", "sampled(uniform,1)", ("brand",)),
    "toys": ("amazon2014_toys", "sampled(uniform,1)", ("brand_code",)),
    "sports": ("amazon2014_sports", "sampled(uniform,1)", ("brand",)),
}
"""Folder, label and single-valued item columns of each set."""
METHODS = ("none", "random", "me", "rqvae", "moc", "barq")
"""BARQ learns from the order of the training positives: left out where the log has none."""


def unseen_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: AUC on items never trained on, codes less none; and the machines."""
    runs = Rows(rows)
    lines = ["AUC on items never trained on, codes - none, the same model, fusion and seeds:", ""]
    lines += ["| codes - none | AUC difference on unseen items |", "|---|---|"]
    axes = ("model", "fusion", "method", "scale")
    for model, fusion, method, scale in dict.fromkeys(tuple(r[a] for a in axes) for r in rows):
        if method == "none":
            continue
        same = {"model": model, "fusion": fusion}
        codes = {**same, "method": method, "scale": scale}
        gap = runs.difference(metric("cold_auc"), codes, {**same, "method": "none"})
        if gap is not None:
            switch = "on" if fusion else "off"
            lines.append(f"| {model}, {method} {scale}x, fusion {switch} | {gap} |")
    machines = Counter(
        (r.get("machine") or {}).get("gpu") or (r.get("machine") or {}).get("chip") for r in rows
    )
    names = [f"{name or 'not recorded'} ({count} runs)" for name, count in machines.items()]
    return "\n".join([*lines, "", f"Machines: {', '.join(names)}."])


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "data", type=Path, nargs="?", help="folder of data sets; without it only tables are written"
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--scales", type=int, nargs="+", default=[3])
    parser.add_argument("--models", nargs="+", default=["deepfm", "dcnv2"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cold", type=float, default=0.05, help="share of items held out")
    parser.add_argument("--unknown-rate", type=float, default=0.0)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--hidden", type=int, nargs="*", default=[400, 400])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ranking_codes"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.sets:
        out = given.out / name
        rows = read_results(out / RESULTS_FILE) if given.data is None else run_set(name, given)
        tables = f"{grid_tables(rows)}\n\n{unseen_tables(rows)}"
        (out / "tables.md").write_text(f"# {name}\n\n{tables}\n", encoding="utf8")
        print(tables, flush=True)


def run_set(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is missing of a data set and return all its rows."""
    folder, label, single = SETS[name]
    place = given.data / folder
    data = prepare_ranking_data(
        place / "interactions.parquet",
        items=place / "items.parquet",
        config=RankingDataConfig(label=label, cold_items=given.cold, item_columns=single),
    )
    log = data.training_log
    ordered = log is not None and log.has_order
    grid = Grid(
        methods=tuple(m for m in given.methods if ordered or m != "barq"),
        scales=tuple(given.scales),
        models=tuple(given.models),
        fusion=(False, True),
        seeds=given.seeds,
        config=RankerConfig(
            width=given.width,
            options={"hidden": tuple(given.hidden)},
            unknown_rate=given.unknown_rate,
        ),
        training=rank_options(None),
    )
    embeddings = semid.open_embeddings(place / "embeddings.f16.npy", ids=place / "items.parquet")
    print(f"{name}: {data.protocol}", flush=True)
    with make_progress() as progress:
        return run_grid(
            grid,
            data,
            given.out / name,
            embeddings=embeddings,
            device=given.device,
            progress=progress,
        )


if __name__ == "__main__":
    main()
