"""Continuous autoencoder with contrastive pairs, and its training: DRQ's first stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.options import MAX_WEIGHT, Options, option
from semid.seeds import numpy_generator, torch_generator
from semid.tokenizers.neural.autoencoder import Autoencoder, blank_linear
from semid.tokenizers.neural.contrastive import info_nce, uniformity
from semid.tokenizers.neural.pairs import Behavior, PairSource
from semid.training.batches import epoch_batches, own_share, steps_per_epoch
from semid.training.distributed import rank, world_size
from semid.training.loop import Evaluation, Step
from semid.training.options import TrainOptions
from semid.training.rows import TrainingRows

__all__ = ["Batch", "ContinuousAutoencoder", "ContinuousTrainee", "Objective"]

EVALUATED = 4096
"""Rows a block, and selection pairs drawn once, in an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Objective(Options):
    """Weights of the losses beside reconstruction.

    Attributes:
        contrastive_weight: lambda of InfoNCE, 0 or more.
        temperature: of InfoNCE, above 0 (ours: 0.07).
        pairs_per_step: pairs a step, at least 2; each is the others' negative.
        uniformity_weight: of the uniformity of the pairs' latents, 0 or more.
        kl_weight: of the divergence from a standard normal, 0 or more; above 0 the latent is
            sampled in training (the paper's loss has none, whatever its name says).
    """

    contrastive_weight: float = option(0.0, ge=0, le=MAX_WEIGHT)
    temperature: float = option(0.07, gt=0, le=MAX_WEIGHT)
    pairs_per_step: int = option(512, ge=2, le=65_536)
    uniformity_weight: float = option(0.0, ge=0, le=MAX_WEIGHT)
    kl_weight: float = option(0.0, ge=0, le=MAX_WEIGHT)

    @property
    def needs_pairs(self) -> bool:
        """Whether any loss is over pairs."""
        return self.contrastive_weight > 0 or self.uniformity_weight > 0


class Batch(NamedTuple):
    """Rows of a step.

    Attributes:
        rows: ``(n, dim)`` to be reconstructed.
        first: ``(pairs, dim)`` anchors, or None.
        second: ``(pairs, dim)`` positives, or None.
        excluded: ``(pairs, pairs)`` which are no negatives, or None.
        seed: of the sampled latent.
    """

    rows: Tensor
    first: Tensor | None
    second: Tensor | None
    excluded: Tensor | None
    seed: int


class ContinuousAutoencoder(nn.Module):
    """Encoder and decoder without a quantizer: ``L_rec + lambda L_CL`` (DRQ §4.1).

    ``L_rec`` is the squared error over the variance of the input, so that lambda means the same at
    any width and scale (ours; for unit vectors it is close to the paper's summed error).

    Args:
        autoencoder: encoder and decoder.
        objective: the other losses.
    """

    def __init__(self, autoencoder: Autoencoder, objective: Objective) -> None:
        super().__init__()
        self.autoencoder, self.objective = autoencoder, objective
        head = autoencoder.encoder[-1]
        assert isinstance(head, nn.Linear)
        self.log_variance: nn.Linear | None = None
        if objective.kl_weight > 0:
            self.log_variance = blank_linear(head.in_features, head.out_features)
            nn.init.zeros_(self.log_variance.weight)
            nn.init.constant_(self.log_variance.bias, -4.0)

    def forward(self, batch: Batch) -> Step:
        """Return the loss of a batch."""
        model, objective = self.autoencoder, self.objective
        count = len(batch.rows)
        rows = [r for r in (batch.rows, batch.first, batch.second) if r is not None]
        x = model.standard(torch.cat(rows) if len(rows) > 1 else rows[0])
        features = model.features(x)
        z = model.head(features)
        sampled, logs = z[:count], {}
        loss = x.new_zeros(())
        if self.log_variance is not None:
            spread = self.log_variance(features[:count].float()).float().clamp(-20.0, 10.0)
            noise = torch.randn(sampled.shape, generator=torch_generator(batch.seed, "latent")).to(
                z.device
            )
            divergence = 0.5 * (sampled.square() + spread.exp() - 1.0 - spread).sum(1).mean()
            sampled = sampled + noise * (0.5 * spread).exp()
            loss = loss + objective.kl_weight * divergence
            logs["kl"] = divergence.detach()
        error = (model.decode(sampled).float() - x[:count]).square().mean()
        loss = loss + error
        logs["reconstruction"] = error.detach()
        if batch.first is not None:
            pairs = len(batch.first)
            first, second = z[count : count + pairs], z[count + pairs :]
            if objective.contrastive_weight > 0:
                near = info_nce(
                    first, second, temperature=objective.temperature, excluded=batch.excluded
                )
                loss = loss + objective.contrastive_weight * near
                logs["contrastive"] = near.detach()
            if objective.uniformity_weight > 0:
                even = 0.5 * (uniformity(first) + uniformity(second))
                loss = loss + objective.uniformity_weight * even
                logs["uniformity"] = even.detach()
        return Step(loss, logs)


class ContinuousTrainee:
    """What the loop trains: shuffled rows and drawn pairs, judged by the same loss on others.

    The score is the relative error on held-out items plus lambda times InfoNCE on pairs of the
    users kept for selection, where there are any.

    Args:
        model: what is trained.
        rows: rows to train on.
        held_out: rows to judge on; None judges on the training rows.
        behavior: pairs, or None.
        options: batch size.
        seed: of the order of rows and the pairs drawn.
        weights: ``(rows,)`` item weights: how often a row is drawn.
        device: where the model lies.
    """

    def __init__(
        self,
        model: ContinuousAutoencoder,
        rows: TrainingRows,
        held_out: TrainingRows | None,
        behavior: Behavior | None,
        options: TrainOptions,
        *,
        seed: int,
        weights: npt.NDArray[np.float64] | None,
        device: torch.device,
    ) -> None:
        self.module: nn.Module = model
        self.model, self.rows, self.held_out = model, rows, held_out
        self.behavior, self.options, self.seed = behavior, options, seed
        self.weights, self.device = weights, device
        self.steps_per_epoch = steps_per_epoch(len(rows), options.batch_size)

    def start_epoch(self, epoch: int) -> None:
        """Do nothing."""

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Batch, float]]:
        """Yield this process's rows and pairs of each step."""
        dealt = epoch_batches(
            len(self.rows),
            self.options.batch_size,
            seed=self.seed,
            epoch=epoch,
            weights=self.weights,
        )
        for number in range(first, len(dealt)):
            own, weight = own_share(dealt[number], rank=rank(), world=world_size())
            step = epoch * self.steps_per_epoch + number
            rows = self.rows.take(own).to(self.device)
            yield self._batch(rows, step), weight

    def _batch(self, rows: Tensor, step: int) -> Batch:
        if self.behavior is None:
            return Batch(rows, None, None, None, self.seed + step)
        generator = numpy_generator(self.seed, "pairs", step, rank())
        size = max(2, self.model.objective.pairs_per_step // world_size())
        first, second, excluded = self._pairs(self.behavior.train, size, generator)
        return Batch(rows, first, second, excluded, self.seed + step)

    def _pairs(
        self, source: PairSource, size: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, second = source.draw(size, generator)
        excluded = source.positives.excluded(first, second)
        return (
            self.rows.take(first).to(self.device),
            self.rows.take(second).to(self.device),
            torch.from_numpy(excluded).to(self.device),
        )

    def evaluate(self, epoch: int) -> Evaluation:
        """Return the relative error on held-out rows and the contrastive loss on other users."""
        judged, model = self.held_out or self.rows, self.model.autoencoder
        error = spread = 0.0
        moment: Tensor | None = None
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(judged), EVALUATED):
            rows = judged.take(np.arange(start, min(start + EVALUATED, len(judged))))
            x = model.standard(rows.to(self.device))
            z = model.encode(x)
            error += float((model.decode(z) - x).double().square().sum())
            spread += float(x.double().square().sum())
            wide = z.double()
            moment = wide.t() @ wide if moment is None else moment + wide.t() @ wide
            total = total.to(z.device) + wide.sum(dim=0)
        assert moment is not None
        relative = error / spread if spread else 0.0
        logs = {
            "relative_error": relative,
            "participation_ratio": _participation(moment, total, len(judged)),
        }
        score = relative
        if self.behavior is not None and self.behavior.select is not None:
            near = self._select_loss(self.behavior.select)
            logs["contrastive_selection_users"] = near
            score += self.model.objective.contrastive_weight * near
        return Evaluation(score, logs=logs)

    def _select_loss(self, source: PairSource) -> float:
        """InfoNCE on pairs of the users kept for selection, the same in every epoch."""
        objective = self.model.objective
        generator = numpy_generator(self.seed, "selection")
        size = objective.pairs_per_step
        losses = []
        for _ in range(max(1, min(EVALUATED, source.count) // size)):
            first, second, excluded = self._pairs(source, size, generator)
            model = self.model.autoencoder
            z = model.encode(model.standard(torch.cat([first, second])))
            losses.append(
                float(
                    info_nce(
                        z[:size], z[size:], temperature=objective.temperature, excluded=excluded
                    )
                )
            )
        return float(np.mean(losses))


def _participation(moment: Tensor, total: Tensor, rows: int) -> float:
    """Return ``(sum l)^2 / sum l^2`` over the eigenvalues of the covariance."""
    mean = total / rows
    covariance = moment / rows - torch.outer(mean, mean)
    squares = float(covariance.square().sum())
    return float(covariance.trace()) ** 2 / squares if squares > 0 else 0.0
