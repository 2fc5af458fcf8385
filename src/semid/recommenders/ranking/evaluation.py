"""Evaluation of a trained network on the parts of its data."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.diagnostics.popularity import SEGMENTS, popularity_segments
from semid.recommenders.ranking.builder import RankingData
from semid.recommenders.ranking.metrics import auc, measure
from semid.recommenders.ranking.network import RankingNetwork
from semid.recommenders.ranking.rows import RankingRows
from semid.seeds import numpy_generator

EVALUATION_BATCH = 65_536
"""Rows scored at once."""

MAX_FEW_INTERACTIONS = 10
"""Largest number of training interactions of an item in the slice ``few``."""


def predict_logits(
    network: RankingNetwork, rows: RankingRows, *, batch_size: int = EVALUATION_BATCH
) -> npt.NDArray[np.float32]:
    """Score rows ``(rows,)`` in evaluation mode; the network's mode is put back."""
    was_training = network.training
    network.eval()
    # The rows may lie on another device than the network; only the batch moves.
    device = next(network.parameters()).device
    with torch.no_grad():
        logits = [
            network.logits(inputs.to(device)).cpu().numpy() for inputs in rows.blocks(batch_size)
        ]
    network.train(was_training)
    return np.concatenate(logits) if logits else np.empty(0, np.float32)


def slice_masks(
    items: npt.NDArray[np.int64],
    interactions: npt.NDArray[np.int64],
    *,
    few: int = MAX_FEW_INTERACTIONS,
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return a mask ``(rows,)`` per slice of the rows, by the catalogue row of their item.

    ``unseen`` items have none of the training interactions ``(items + 1,)``, ``few`` at most that
    many; ``head``, ``mid`` and ``tail`` are 10, 40 and 50 % of the seen items, by interactions.
    """
    counts = interactions[items]
    segment = popularity_segments(interactions)[items]
    masks = {"unseen": counts == 0, "few": (counts >= 1) & (counts <= few)}
    return masks | {name: segment == number for number, name in enumerate(SEGMENTS[:3])}


def evaluate(network: RankingNetwork, data: RankingData) -> dict[str, Any]:
    """Measure a trained network on every part but training."""
    report: dict[str, Any] = {}
    for name, rows in data.parts.items():
        if name == "train":
            continue
        labels, users = rows.label.cpu().numpy(), rows.person.cpu().numpy()
        items = rows.item.cpu().numpy().astype(np.int64)
        logits, popularity = predict_logits(network, rows), data.positives[items]
        report[name] = measure(labels, logits, users=users, popularity=popularity).to_dict()
        if name == "test":
            report["slices"] = {
                key: measure(
                    labels[mask], logits[mask], users=users[mask], popularity=popularity[mask]
                ).to_dict()
                for key, mask in slice_masks(items, data.interactions).items()
                if mask.any()
            }
    return report


def reliance(
    network: RankingNetwork, data: RankingData, *, part: str = "test", seed: int = 0
) -> dict[str, float]:
    """Return how much a trained network relies on its fusion and its codes, on one part.

    Returns:
        ``auc``; with fusion ``fusion_norm`` (of ``W_down W_up``) and ``auc_without_fusion``, the
        AUC of the same weights without it; with codes ``auc_codes_shuffled``, the AUC of the same
        weights after items swap their codes.
    """
    rows = data.parts[part]
    labels = rows.label.cpu().numpy()

    def score() -> float:
        return auc(labels, predict_logits(network, rows))

    # The network is changed in place for each score, and put back whatever happens.
    figures = {"auc": score()}
    fusion, table = network.fusion, network.index.code_rows
    try:
        if fusion is not None:
            network.fusion = None
            figures |= {"fusion_norm": fusion.norm(), "auc_without_fusion": score()}
            network.fusion = fusion
        if network.index.slots:
            # Row 0 belongs to items without codes and stays.
            order = 1 + numpy_generator(seed, "shuffled at test").permutation(len(table) - 1)
            shuffled = table[torch.from_numpy(order).to(table.device)]
            network.index.code_rows = torch.cat([table[:1], shuffled])
            figures["auc_codes_shuffled"] = score()
    finally:
        network.fusion, network.index.code_rows = fusion, table
    return figures
