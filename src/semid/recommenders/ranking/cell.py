"""One cell of a comparison: train a ranking model with given codes and say how good it is."""

from __future__ import annotations

import time
from typing import Any

from semid.recommenders.ranking.data import RankingData
from semid.recommenders.ranking.methods import Coded
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.ranker import Ranker
from semid.recommenders.ranking.report import reliance
from semid.recommenders.ranking.training import train_ranker, training_device
from semid.training.options import TrainOptions

__all__ = ["train_cell"]


def train_cell(
    data: RankingData,
    coded: Coded,
    *,
    config: RankerConfig,
    training: TrainOptions,
    seed: int,
    device: str = "auto",
) -> tuple[Ranker, dict[str, Any]]:
    """Train one model and gather the figures that tables show.

    Args:
        data: the split.
        coded: codes of the items and how they are used, or none.
        config: model, width, fusion.
        training: how the run is conducted.
        seed: start of the weights, order of the rows, dropout.
        device: as for `semid.train_ranker`.

    Returns:
        The model, and a JSON-able dictionary of its figures on the test part.
    """
    began, cpu = time.perf_counter(), time.process_time()
    ranker = train_ranker(
        data,
        ids=coded.ids,
        features=coded.features,
        config=config,
        training=training,
        seed=seed,
        device=device,
    )
    report = ranker.report
    test = report["test"]
    ranker.network.to(training_device(device))
    relied = reliance(ranker.network, data, seed=seed)
    ranker.network.to("cpu")
    return ranker, {
        "auc": test["auc"],
        "auc_error": test["auc_error"],
        "log_loss": test["log_loss"],
        "user_auc": test["user_auc"],
        "calibration_error": test["calibration_error"],
        "popularity_auc": test["popularity_auc"],
        "validation_auc": report["validation"]["auc"],
        "cold_auc": report.get("cold", {}).get("auc"),
        "slices": {name: s["auc"] for name, s in report["slices"].items()},
        "reliance": relied,
        "best_epoch": report["training"]["best_epoch"],
        "epochs": report["training"]["epochs"],
        "stopped_early": report["training"]["stopped_early"],
        "precision": report["training"]["precision"],
        "parameters": report["parameters"],
        "protocol": data.protocol,
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }
