"""What is measured of a trained model, on the parts of its data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.recommenders.ranking.data import RankingData
from semid.recommenders.ranking.metrics import auc, measure
from semid.recommenders.ranking.network import RankingNetwork
from semid.recommenders.ranking.rows import RankingRows
from semid.recommenders.ranking.slices import measure_slices
from semid.recommenders.ranking.task import predict_logits
from semid.seeds import numpy_generator

__all__ = ["evaluate", "part_arrays", "reliance"]


def part_arrays(
    rows: RankingRows,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return labels, users and catalogue rows of a part as arrays."""
    return (
        rows.label.cpu().numpy(),
        rows.person.cpu().numpy(),
        rows.item.cpu().numpy().astype(np.int64),
    )


def evaluate(network: RankingNetwork, data: RankingData) -> dict[str, Any]:
    """Measure a network on every part but training.

    Args:
        network: trained.
        data: what it was trained on.

    Returns:
        JSON-able: ``validation``, ``test`` and ``cold`` (`Metrics`), and ``slices`` of the test
        part, where those exist.
    """
    found: dict[str, Any] = {}
    for name, rows in data.parts.items():
        if name == "train":
            continue
        labels, users, items = part_arrays(rows)
        logits = predict_logits(network, rows)
        found[name] = measure(
            labels, logits, users=users, popularity=data.positives[items]
        ).to_dict()
        if name == "test":
            slices = measure_slices(
                labels,
                logits,
                users=users,
                items=items,
                interactions=data.interactions,
                positives=data.positives,
            )
            found["slices"] = {key: value.to_dict() for key, value in slices.items()}
    return found


def reliance(
    network: RankingNetwork, data: RankingData, *, part: str = "test", seed: int = 0
) -> dict[str, float]:
    """Say whether a trained network uses its fusion and its codes.

    Args:
        network: trained.
        data: what it was trained on.
        part: rows to score.
        seed: of the shuffle.

    Returns:
        ``auc``; with fusion ``fusion_norm`` (of ``W_down W_up``) and ``auc_without_fusion``, the
        AUC of the same weights with it taken out; with codes ``auc_codes_shuffled``, the AUC of
        the same weights where items swap their codes.
    """
    rows = data.parts[part]
    labels = rows.label.cpu().numpy()
    found = {"auc": auc(labels, predict_logits(network, rows))}
    if network.fusion is not None:
        found["fusion_norm"] = network.fusion.norm()
        with _without_fusion(network):
            found["auc_without_fusion"] = auc(labels, predict_logits(network, rows))
    if network.index.slots:
        with _shuffled_codes(network, seed):
            found["auc_codes_shuffled"] = auc(labels, predict_logits(network, rows))
    return found


@contextmanager
def _without_fusion(network: RankingNetwork) -> Iterator[None]:
    kept, network.fusion = network.fusion, None
    try:
        yield
    finally:
        network.fusion = kept


@contextmanager
def _shuffled_codes(network: RankingNetwork, seed: int) -> Iterator[None]:
    table = network.index.code_rows
    order = 1 + numpy_generator(seed, "shuffled at test").permutation(len(table) - 1)
    moved = torch.cat([table[:1], table[torch.from_numpy(order).to(table.device)]])
    network.index.code_rows = moved
    try:
        yield
    finally:
        network.index.code_rows = table
