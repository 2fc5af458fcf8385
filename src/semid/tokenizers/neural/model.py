"""Autoencoder and quantizer as one module, and its training as the loop wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.tokenizers.neural.autoencoder import Autoencoder
from semid.tokenizers.neural.codebook import Codebook
from semid.tokenizers.neural.quantizers import Quantizer
from semid.training.batches import epoch_batches, own_share, steps_per_epoch
from semid.training.distributed import rank, world_size
from semid.training.loop import Evaluation, Step
from semid.training.options import TrainOptions
from semid.training.rows import TrainingRows

__all__ = ["UNHEALTHY_SHARE", "QuantizedAutoencoder", "ReconstructionTrainee", "squared_error"]

UNHEALTHY_SHARE = 0.125
"""A level with a perplexity below this share of what is attainable makes a checkpoint unhealthy."""

EVALUATED = 8192


def squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Sum over dimensions, mean over rows, in float32."""
    return (reconstruction.float() - x).square().sum(dim=1).mean()


class QuantizedAutoencoder(nn.Module):
    """Encoder, quantizer, decoder, and the loss over them.

    ``|x - x_hat|^2 + beta sum_l |sg[q_l] - r_l|^2 (+ sum_l |q_l - sg[r_l]|^2 by gradient)``.

    Args:
        autoencoder: encoder and decoder.
        quantizer: codebooks between them.
        commitment_weight: beta.
    """

    quantizing: Tensor

    def __init__(
        self, autoencoder: Autoencoder, quantizer: Quantizer, *, commitment_weight: float
    ) -> None:
        super().__init__()
        self.autoencoder, self.quantizer = autoencoder, quantizer
        self.commitment_weight = commitment_weight
        self.register_buffer("quantizing", torch.zeros((), dtype=torch.bool))

    def forward(self, rows: Tensor) -> Step:
        """Return the loss of rows ``(n, dim)``."""
        x = self.autoencoder.standard(rows)
        z = self.autoencoder.encode(x)
        if not bool(self.quantizing):
            error = squared_error(x, self.autoencoder.decode(z))
            # Every parameter takes part in every step, as parallel training wants it.
            idle = sum((p.sum() for p in self.quantizer.parameters()), x.new_zeros(()))
            return Step(error + 0.0 * idle, {"reconstruction": error.detach()})
        found = self.quantizer(z)
        error = squared_error(x, self.autoencoder.decode(found.latent))
        commitment = found.commitment.sum()
        loss = error + self.commitment_weight * commitment + found.codebook
        return Step(loss, {"reconstruction": error.detach(), "commitment": commitment.detach()})

    @torch.no_grad()
    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardized rows and their reconstructions (from codes once there are any)."""
        x = self.autoencoder.standard(rows)
        z = self.autoencoder.encode(x)
        if bool(self.quantizing):
            z = self.quantizer(z).latent
        return x, self.autoencoder.decode(z)


class ReconstructionTrainee:
    """What the loop trains: reconstruction on shuffled rows, judged on held-out rows.

    Args:
        model: what is trained.
        rows: rows to train on.
        held_out: rows to judge on; None judges on the training rows.
        options: batch size.
        seed: of the order of rows.
        weights: ``(rows,)`` item weights: how often a row is drawn.
        pretrain: epochs without quantization before the codebooks are made.
        initialize: makes the codebooks, called once, after those epochs.
        device: where the model lies.
    """

    def __init__(
        self,
        model: QuantizedAutoencoder,
        rows: TrainingRows,
        held_out: TrainingRows | None,
        options: TrainOptions,
        *,
        seed: int,
        weights: npt.NDArray[np.float64] | None,
        pretrain: int,
        initialize: Callable[[], None],
        device: torch.device,
    ) -> None:
        self.module: nn.Module = model
        self.model, self.rows, self.held_out = model, rows, held_out
        self.options, self.seed, self.weights = options, seed, weights
        self.pretrain, self.initialize, self.device = pretrain, initialize, device
        self.steps_per_epoch = steps_per_epoch(len(rows), options.batch_size)

    def start_epoch(self, epoch: int) -> None:
        """Make the codebooks when it is time."""
        if epoch >= self.pretrain and not bool(self.model.quantizing):
            self.initialize()
            self.model.quantizing.fill_(True)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, float]]:
        """Yield this process's rows of each batch."""
        dealt = epoch_batches(
            len(self.rows),
            self.options.batch_size,
            seed=self.seed,
            epoch=epoch,
            weights=self.weights,
        )
        for batch in dealt[first:]:
            own, weight = own_share(batch, rank=rank(), world=world_size())
            yield self.rows.take(own).to(self.device), weight

    def evaluate(self, epoch: int) -> Evaluation:
        """Return the relative error on held-out rows, with each level's usage in this epoch."""
        judged = self.held_out or self.rows
        error = spread = 0.0
        for start in range(0, len(judged), EVALUATED):
            rows = judged.take(np.arange(start, min(start + EVALUATED, len(judged))))
            x, reconstruction = self.model.reconstruct(rows.to(self.device))
            error += float((x - reconstruction).double().square().sum())
            spread += float(x.double().square().sum())
        score = error / spread if spread else 0.0
        if not bool(self.model.quantizing):
            return Evaluation(float("inf"), logs={"autoencoder_error": score})
        logs, healthy = self._usage()
        return Evaluation(score, healthy=healthy, logs=logs)

    def _usage(self) -> tuple[dict[str, float], bool]:
        logs: dict[str, float] = {}
        healthy = True
        for level, book in enumerate(self.model.quantizer.books):
            assert isinstance(book, Codebook)
            used = book.take_usage_().double()
            shares = used[used > 0] / used.sum()
            perplexity = float((-(shares * shares.log()).sum()).exp())
            attainable = min(len(used), int(used.sum()))
            healthy &= perplexity >= UNHEALTHY_SHARE * attainable
            logs[f"perplexity_{level + 1}"] = perplexity
            logs[f"dead_{level + 1}"] = float((used == 0).sum())
            logs[f"revived_{level + 1}"] = float(book.revived)
        return logs, healthy
