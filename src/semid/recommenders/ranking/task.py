"""What the training loop needs of a ranking model: batches in memory or streamed, and an AUC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.recommenders.ranking.metrics import auc, log_loss
from semid.recommenders.ranking.network import RankingNetwork
from semid.recommenders.ranking.optimizer import make_optimizer
from semid.recommenders.ranking.rows import RankingRows
from semid.recommenders.ranking.schema import Inputs
from semid.training.batches import epoch_batches, own_share, steps_per_epoch
from semid.training.distributed import rank, world_size
from semid.training.loop import Evaluation
from semid.training.options import TrainOptions

__all__ = ["EVALUATION_BATCH", "BatchSource", "MemoryBatches", "RankingTask", "predict_logits"]

EVALUATION_BATCH = 65_536
"""Rows scored at once."""


class BatchSource(Protocol):
    """Where training batches come from.

    Attributes:
        steps_per_epoch: batches an epoch.
    """

    steps_per_epoch: int

    def batches(self, epoch: int, first: int) -> Iterator[tuple[tuple[Inputs, Tensor], float]]:
        """Yield ``((inputs, labels), weight)`` of an epoch from step ``first`` on."""
        ...


class MemoryBatches:
    """Batches of rows in memory: a permutation an epoch, one gather a column.

    Args:
        rows: training rows, on the device of the network.
        batch_size: rows a step.
        seed: decides the order.
    """

    def __init__(self, rows: RankingRows, *, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = steps_per_epoch(len(rows), batch_size)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[tuple[Inputs, Tensor], float]]:
        """Yield ``((inputs, labels), weight)`` of an epoch from step ``first`` on."""
        dealt = epoch_batches(len(self.rows), self.batch_size, seed=self.seed, epoch=epoch)
        device = self.rows.label.device
        for batch in dealt[first:]:
            own, weight = own_share(batch, rank=rank(), world=world_size())
            yield self.rows.batch(torch.from_numpy(own).to(device)), weight


def predict_logits(
    network: RankingNetwork, rows: RankingRows, *, batch_size: int = EVALUATION_BATCH
) -> npt.NDArray[np.float32]:
    """Score rows ``(rows,)`` in evaluation mode; the network's mode is put back."""
    was_training = network.training
    network.eval()
    parts = []
    device = next(network.parameters()).device
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            stop = min(start + batch_size, len(rows))
            at = torch.arange(start, stop, device=rows.label.device)
            inputs, _ = rows.batch(at)
            parts.append(network.logits(inputs.to(device)).cpu().numpy())
    network.train(was_training)
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


class RankingTask:
    """A trainee of `semid.training.loop.train`, judged by validation AUC.

    Args:
        network: what is trained.
        source: training batches.
        validation: rows that choose the checkpoint.
        code_rate: learning rate of the code tables as a multiple of the others'.
        code_decay: their decoupled decay; None takes the others'.
    """

    def __init__(
        self,
        network: RankingNetwork,
        source: BatchSource,
        validation: RankingRows,
        *,
        code_rate: float = 1.0,
        code_decay: float | None = None,
    ) -> None:
        self.module: nn.Module = network
        self.steps_per_epoch = source.steps_per_epoch
        self.network, self.source, self.validation = network, source, validation
        self.code_rate, self.code_decay = code_rate, code_decay
        self.labels = validation.label.cpu().numpy()

    def optimizer(self, options: TrainOptions) -> torch.optim.Optimizer:
        """Return the optimizer; called by the loop."""
        return make_optimizer(
            self.network, options, code_rate=self.code_rate, code_decay=self.code_decay
        )

    def start_epoch(self, epoch: int) -> None:
        """Do nothing: batches are a function of the epoch."""

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Any, float]]:
        """Yield this process's batches of an epoch from step ``first`` on."""
        yield from self.source.batches(epoch, first)

    def evaluate(self, epoch: int) -> Evaluation:
        """Return the validation AUC."""
        logits = predict_logits(self.network, self.validation)
        figures = {"log_loss": log_loss(self.labels, logits)}
        if self.network.fusion is not None:
            figures["fusion_norm"] = self.network.fusion.norm()
        return Evaluation(auc(self.labels, logits), higher_is_better=True, logs=figures)
