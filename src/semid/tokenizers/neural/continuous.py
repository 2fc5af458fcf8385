"""Tokenizers that train a continuous autoencoder first, with contrastive pairs (DRQ 4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from semid.data.ids import ItemIds
from semid.errors import UsageError
from semid.options import MAX_WEIGHT, Options, option
from semid.seeds import numpy_generator, torch_generator
from semid.tokenizers.behavior import Behavior, PairSource, read_behavior
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import Autoencoder, blank_linear
from semid.tokenizers.neural.tokenizer import (
    NeuralOptions,
    NeuralTokenizer,
    PreparedRows,
    pick_device,
)
from semid.training.batches import epoch_batches, own_share, steps_per_epoch
from semid.training.distributed import rank, world_size
from semid.training.loop import Evaluation, Step, train
from semid.training.options import TrainOptions
from semid.training.rows import TrainingRows
from semid.training.stages import Stages
from semid.training.state import load_module_, module_arrays

__all__ = [
    "Batch",
    "ContinuousAutoencoder",
    "ContinuousTokenizer",
    "ContinuousTrainee",
    "Objective",
    "info_nce",
    "uniformity",
]


def info_nce(
    first: Tensor, second: Tensor, *, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE with the other pairs of the batch as negatives.

    Args:
        first: ``(n, latent)`` anchors; rows are scaled to unit length here.
        second: ``(n, latent)`` positives, row i of anchor i.
        temperature: divides the cosines, above 0.
        excluded: ``(n, n)`` boolean, true where ``second[j]`` is no negative of ``first[i]``.

    Returns:
        Scalar: mean over both directions, in nats. One mask serves both when positives count in
        both directions, as those of `semid.tokenizers.behavior.Positives` do.
    """
    a = functional.normalize(first.float(), dim=1)
    b = functional.normalize(second.float(), dim=1)
    with torch.autocast(a.device.type, enabled=False):  # small temperatures magnify rounding
        logits = a @ b.t() / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    forth = functional.cross_entropy(logits, target)
    back = functional.cross_entropy(logits.t(), target)
    return 0.5 * (forth + back)


def uniformity(z: Tensor, *, sharpness: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential of pairs on the sphere (Wang and Isola 2020, eq. 2).

    Args:
        z: ``(n, latent)``, n at least 2; rows are scaled to unit length here.
        sharpness: t of the potential ``exp(-t |a - b|^2)``.

    Returns:
        Scalar; lower is more even.
    """
    unit = functional.normalize(z.float(), dim=1)
    with torch.autocast(unit.device.type, enabled=False):
        squared = (2.0 - 2.0 * (unit @ unit.t())).clamp_min(0.0)
    apart = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (-sharpness * squared[apart]).exp().mean().log()


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


class ContinuousTokenizer(NeuralTokenizer):
    """Base of tokenizers that freeze a continuous encoder before they quantize (DRQ §4.1).

    Args:
        sizes: codewords of each level.
        beam_width: partial codes kept while encoding; 1 is greedy.
        objective: losses beside reconstruction.
        **options: as for every neural tokenizer.
    """

    def __init__(
        self,
        *,
        sizes: tuple[int, ...],
        beam_width: int,
        objective: Objective,
        **options: Unpack[NeuralOptions],
    ) -> None:
        self.objective = objective
        super().__init__(sizes=sizes, beam_width=beam_width, **options)

    @property
    def needs_behavior(self) -> bool:
        """Whether a loss is over pairs."""
        return self.objective.needs_pairs

    def _behavior(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behavior | None:
        given = interactions is not None or pairs is not None
        if given and not self.needs_behavior:
            raise UsageError(
                "interactions or pairs were given and contrastive_weight=0, so they would not be "
                "used; set --contrastive-weight (contrastive_weight), for example 0.1"
            )
        if self.needs_behavior and not given:
            raise UsageError(
                f"contrastive_weight={self.objective.contrastive_weight:g} needs pairs to learn "
                "from; give --interactions or --pairs (interactions=, pairs=)"
            )
        return read_behavior(interactions, pairs, ids=ids, train=train, threads=self.threads)

    def _trained(
        self, prepared: PreparedRows, context: FitContext, stages: Stages
    ) -> tuple[Autoencoder, dict[str, Any]]:
        """Return the trained autoencoder and a record of its training, as stage ``train``."""
        autoencoder = self._new_autoencoder(context.inputs)
        autoencoder.standardize_(prepared.mean, prepared.variance)
        model = ContinuousAutoencoder(autoencoder, self.objective)
        kept = stages.finished("train")
        if kept is not None:
            load_module_(model, kept[0])
            return autoencoder, kept[1]
        details = self._train(model, prepared, context, stages)
        stages.finish("train", module_arrays(model), details)
        return autoencoder, details

    def _train(
        self,
        model: ContinuousAutoencoder,
        prepared: PreparedRows,
        context: FitContext,
        stages: Stages,
    ) -> dict[str, Any]:
        device = pick_device(self.device)
        model.to(device)
        trainee = ContinuousTrainee(
            model,
            prepared.train,
            prepared.held_out,
            context.behavior,
            self.training,
            seed=self.seed,
            weights=context.weights,
            device=device,
        )
        result = train(
            trainee,
            self.training,
            seed=self.seed,
            progress=context.progress,
            store=stages.stage("train"),
            log=self.logger,
        )
        model.cpu()
        return result.to_dict()
