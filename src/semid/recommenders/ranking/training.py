"""From data to a trained ranking model, by the training loop of every semid model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from semid.artefact import fingerprint
from semid.codes import SemanticIds
from semid.errors import UsageError
from semid.progress import Progress, QuietProgress
from semid.recommenders.ranking.data import RankingData
from semid.recommenders.ranking.features import CodeFeatures, CodeTable, code_table
from semid.recommenders.ranking.network import RankerConfig, RankingNetwork, make_network
from semid.recommenders.ranking.ranker import Ranker
from semid.recommenders.ranking.report import evaluate
from semid.recommenders.ranking.rows import RankingRows
from semid.recommenders.ranking.stream import RankingStream
from semid.recommenders.ranking.task import BatchSource, MemoryBatches, RankingTask
from semid.training.checkpoint import open_checkpoint, run_key
from semid.training.loggers import Logger
from semid.training.loop import train
from semid.training.options import TrainOptions

__all__ = ["TRAINING", "rank_options", "train_ranker", "training_device"]

TRAINING: dict[str, Any] = {
    "epochs": 30,
    "batch_size": 8_012,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "clip_norm": None,
    "patience": 3,
}
"""Defaults: batch and rate are the MoC paper's, the patience and the rest are ours."""


def rank_options(training: TrainOptions | Mapping[str, Any] | None) -> TrainOptions:
    """Return options with the defaults of ranking filled in."""
    if isinstance(training, TrainOptions):
        return training
    if training is not None and not isinstance(training, Mapping):
        return TrainOptions.of(training)  # says what is wrong
    return TrainOptions.of({**TRAINING, **(training or {})})


def train_ranker(
    data: RankingData | RankingStream,
    *,
    ids: SemanticIds | None = None,
    features: CodeFeatures | Mapping[str, Any] | None = None,
    config: RankerConfig | Mapping[str, Any] | None = None,
    training: TrainOptions | Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    logger: Logger | None = None,
) -> Ranker:
    """Train a ranking model, keep the epoch with the best validation AUC, and measure it.

    Args:
        data: from `prepare_ranking_data`, or a `RankingStream` for logs larger than memory.
        ids: Semantic IDs of the items; None trains without codes.
        features: how codes are used; the defaults of `CodeFeatures` where ids are given.
        config: model, width, fusion.
        training: how the run is conducted; defaults in `TRAINING`.
        seed: start of the weights, order of the rows, dropout.
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.
        checkpoint: folder for the state of the run, so that it can be continued.
        resume: continue from ``checkpoint`` if it holds a state of this run.
        progress: told about every step; silent by default.
        logger: told the figures of every epoch.

    Returns:
        A `Ranker` on the CPU whose ``report`` holds all figures, its best weights put back whether
        or not patience ran out.

    Raises:
        UsageError: codes are asked for and no ids are given, or a value is out of range.
        IdsError: not one item has codes.
        DivergedError: the loss is not finite.
    """
    if features is not None:
        features = CodeFeatures.of(features)
    config = RankerConfig.of(config)
    options = rank_options(training)
    if ids is None and features is not None:
        raise UsageError("features= says how codes are used, but there are none: give ids=")
    table = None
    if ids is not None:
        features = features or CodeFeatures(mode="levels")
        table = code_table(ids, data.schema.items.ids, features)
    item_id = features is None or features.item_id
    network = make_network(data.schema, table, config, item_id=item_id, seed=seed)
    if network.sparse and options.clip_norm is not None:
        raise UsageError(
            "clip_norm needs every gradient at once, and large tables have row-wise ones; pass "
            "clip_norm=None or sparse=False"
        )
    place = training_device(device)
    network.to(place)
    source, parts = _sources(data, options, seed, place)
    task = RankingTask(
        network,
        source,
        parts["validation"],
        code_rate=1.0 if features is None else features.rate,
        code_decay=None if features is None else features.weight_decay,
    )
    settings = {
        "kind": "ranker",
        "protocol": data.protocol,
        "architecture": config.to_dict(),
        "features": None if features is None else vars(features),
        "training": vars(options),
        "seed": seed,
    }
    key = "" if checkpoint is None else run_key(settings, data_digest(data, parts, table))
    with open_checkpoint(checkpoint, key=key, resume=resume) as store:
        result = train(
            task,
            options,
            seed=seed,
            progress=progress or QuietProgress(),
            store=store,
            log=logger,
            task=config.model,
        )
    report = {
        "protocol": data.protocol,
        "seed": seed,
        **_measured(network, data, parts),
        "training": result.to_dict(),
        "parameters": network.parameter_counts(),
        "items_without_codes": None if table is None else table.without,
        "code_collisions": None if table is None else table.collisions,
    }
    network.to("cpu")
    return Ranker(
        schema=data.schema,
        network=network,
        config=config,
        features=features,
        codes=table,
        codes_info=None if ids is None else ids.info,
        report=report,
    )


def _measured(
    network: RankingNetwork, data: RankingData | RankingStream, parts: dict[str, RankingRows]
) -> dict[str, Any]:
    judged = RankingData(data.schema, parts, data.interactions, data.positives, data.protocol)
    found = evaluate(network, judged)
    if network.fusion is not None:
        found["fusion_norm"] = network.fusion.norm()
    return found


def _sources(
    data: RankingData | RankingStream, options: TrainOptions, seed: int, device: torch.device
) -> tuple[BatchSource, dict[str, RankingRows]]:
    """Return where batches come from, and the parts, on the device."""
    parts = {name: rows.to(device) for name, rows in data.parts.items()}
    if isinstance(data, RankingStream):
        return data.batches_of(options.batch_size, seed=seed, device=device), parts
    return MemoryBatches(parts["train"], batch_size=options.batch_size, seed=seed), parts


def training_device(wanted: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        UsageError: another word, or CUDA where there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device (device=) is '{wanted}'; give auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda (device=) needs a GPU that torch can use; take auto or cpu")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def data_digest(
    data: RankingData | RankingStream,
    parts: Mapping[str, RankingRows],
    table: CodeTable | None = None,
) -> str:
    """Hash everything that a run trains on, so that a resume on other data is refused.

    Args:
        data: vocabularies, item attributes, and for a stream the digest of the log it read.
        parts: the rows in memory.
        table: codes of the items.
    """
    digest = hashlib.sha256(fingerprint(data.schema.tensors()).encode())
    digest.update(getattr(data, "log_digest", "").encode())
    for name, rows in sorted(parts.items()):
        digest.update(name.encode())
        for column in (rows, rows.history):
            for tensor in () if column is None else vars(column).values():
                if isinstance(tensor, torch.Tensor):
                    digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    if table is not None:
        digest.update(np.ascontiguousarray(table.rows).tobytes())
    return digest.hexdigest()
