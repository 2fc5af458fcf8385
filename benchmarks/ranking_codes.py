"""Do codes help ranking? Real logs, every method and control on equal terms, paired over seeds.

    python benchmarks/ranking_codes.py ../shared/data --sets anime beauty toys sports

No codes, random codes, many embeddings of one code (ME), RQ-VAE, Mixture-of-Codes and BARQ at 3x,
fusion on and off for each, DeepFM and DCNv2, five seeds; a twentieth of the items is held out of
training altogether. Every run is a line of ``results.jsonl`` under the output folder and is not
repeated: the same command continues where it was stopped. Tables go to ``tables.md`` beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import semid
from semid.progress import make_progress
from semid.recommenders.ranking.builder import RankingDataConfig
from semid.recommenders.ranking.data import prepare_ranking_data
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.training import rank_options
from semid.reproduce.ranking_grid import Grid, grid_tables, run_grid

SETS = {
    "anime": ("anime_mal", "rating>=8", ()),
    "beauty": ("amazon2014_beauty", "sampled(uniform,1)", ("brand",)),
    "toys": ("amazon2014_toys", "sampled(uniform,1)", ("brand_code",)),
    "sports": ("amazon2014_sports", "sampled(uniform,1)", ("brand",)),
}
"""Folder, label and single-valued item columns of each set."""
METHODS = ("none", "random", "me", "rqvae", "moc", "barq")
"""BARQ learns from the order of the training positives: left out where the log has none."""


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of data sets")
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
        embeddings = semid.open_embeddings(
            place / "embeddings.f16.npy", ids=place / "items.parquet"
        )
        out = given.out / name
        print(f"{name}: {data.protocol}", flush=True)
        with make_progress() as progress:
            rows = run_grid(
                grid, data, out, embeddings=embeddings, device=given.device, progress=progress
            )
        tables = grid_tables(rows)
        (out / "tables.md").write_text(f"# {name}\n\n{tables}\n", encoding="utf8")
        print(tables, flush=True)


if __name__ == "__main__":
    main()
