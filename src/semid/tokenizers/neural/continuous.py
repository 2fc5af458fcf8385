"""Tokenizers that train a continuous autoencoder first, with contrastive pairs (DRQ §4.1)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from semid.tokenizers.codebooks import ResidualTokenizer
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import Autoencoder, blank_linear
from semid.tokenizers.neural.tokenizer import NeuralTokenizer, PreparedRows, pick_device
from semid.training.batches import TrainingRows, epoch_batches, process_share, steps_per_epoch
from semid.training.checkpoint import StateStore, load_module_, module_arrays
from semid.training.distributed import rank, world_size
from semid.training.loop import Evaluation, Step, train
from semid.training.options import TrainOptions


def info_nce(
    first: Tensor, second: Tensor, *, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE with the other pairs of the batch as negatives.

    Shapes: ``first`` (n, latent), ``second`` (n, latent), ``excluded`` (n, n).
    """
    anchors = functional.normalize(first.float(), dim=1)
    positives = functional.normalize(second.float(), dim=1)
    with torch.autocast(anchors.device.type, enabled=False):  # small temperatures magnify rounding
        logits = anchors @ positives.t() / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    # -log exp(s_ii) / sum_j exp(s_ij): row i is a classification whose right answer is column i.
    target = torch.arange(len(logits), device=logits.device)
    anchor_loss = functional.cross_entropy(logits, target)
    positive_loss = functional.cross_entropy(logits.t(), target)
    return 0.5 * (anchor_loss + positive_loss)


def uniformity(z: Tensor, *, sharpness: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential of pairs on the sphere (Wang and Isola 2020, eq. 2).

    Returns scalar; lower is more even.

    Shapes: ``z`` (n, latent).
    """
    unit = functional.normalize(z.float(), dim=1)
    with torch.autocast(unit.device.type, enabled=False):
        # |a - b|^2 = 2 - 2 cos(a, b) on the unit sphere; rounding may leave a small negative.
        squared_distances = (2.0 - 2.0 * (unit @ unit.t())).clamp_min(0.0)
    different = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (-sharpness * squared_distances[different]).exp().mean().log()


EVALUATION_ROWS = 4096
"""Rows per block, and selection pairs drawn once, of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Objective(Options):
    """Weights of the losses beside reconstruction.

    Attributes:
        contrastive_weight: lambda of InfoNCE, 0 or more.
        temperature: of InfoNCE, above 0 (ours: 0.07).
        pairs_per_step: pairs per step; each is the negative of the others.
        uniformity_weight: of the uniformity of the pairs' latents, 0 or more.
        kl_weight: of the divergence from a standard normal, 0 or more; above 0 the latent is
            sampled in training (the paper's loss has none, whatever its name says).
    """

    contrastive_weight: float = option(
        0.0, ge=0, le=MAX_WEIGHT, help="Weight lambda of InfoNCE on pairs."
    )
    temperature: float = option(0.07, gt=0, le=MAX_WEIGHT, help="InfoNCE temperature.")
    pairs_per_step: int = option(512, ge=2, le=65_536, help="Pairs per training step.")
    uniformity_weight: float = option(
        0.0, ge=0, le=MAX_WEIGHT, help="Weight of the uniformity loss on the pairs' latents."
    )
    kl_weight: float = option(0.0, ge=0, le=MAX_WEIGHT, help="Weight of a KL term.")

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
        # Rows and pairs go through the encoder together: one product instead of three.
        rows = [r for r in (batch.rows, batch.first, batch.second) if r is not None]
        x = model.standard(torch.cat(rows) if len(rows) > 1 else rows[0])
        features = model.features(x)
        z = model.head(features)
        sampled, logs = z[:count], {}
        loss = x.new_zeros(())
        if self.log_variance is not None:
            # KL(N(mu, sigma^2) || N(0, 1)) and the reparameterized sample mu + sigma * noise
            # (Kingma and Welling 2014), with v = log sigma^2 held within what exp can take.
            log_variance = self.log_variance(features[:count].float()).float().clamp(-20.0, 10.0)
            generator = torch_generator(batch.seed, "latent")
            noise = torch.randn(sampled.shape, generator=generator).to(z.device)
            divergence = (
                0.5 * (sampled.square() + log_variance.exp() - 1.0 - log_variance).sum(1).mean()
            )
            sampled = sampled + noise * (0.5 * log_variance).exp()
            loss = loss + objective.kl_weight * divergence
            logs["kl"] = divergence.detach()
        error = (model.decode(sampled).float() - x[:count]).square().mean()
        loss = loss + error
        logs["reconstruction"] = error.detach()
        if batch.first is not None:
            pairs = len(batch.first)
            first, second = z[count : count + pairs], z[count + pairs :]
            if objective.contrastive_weight > 0:
                contrastive = info_nce(
                    first, second, temperature=objective.temperature, excluded=batch.excluded
                )
                loss = loss + objective.contrastive_weight * contrastive
                logs["contrastive"] = contrastive.detach()
            if objective.uniformity_weight > 0:
                uniform = 0.5 * (uniformity(first) + uniformity(second))
                loss = loss + objective.uniformity_weight * uniform
                logs["uniformity"] = uniform.detach()
        return Step(loss, logs)


class ContinuousTask:
    """The training task: shuffled rows and drawn pairs, evaluated by the same loss on others.

    The score is the relative error on held-out items plus lambda times InfoNCE on pairs of the
    users kept for selection, where there are any.

    Args:
        model: what is trained.
        rows: rows to train on.
        held_out: rows to evaluate on; None evaluates on the training rows.
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
        batches = epoch_batches(
            len(self.rows),
            self.options.batch_size,
            seed=self.seed,
            epoch=epoch,
            weights=self.weights,
        )
        for number in range(first, len(batches)):
            share, weight = process_share(batches[number], rank=rank(), world=world_size())
            step = epoch * self.steps_per_epoch + number
            rows = self.rows.take(share).to(self.device)
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
        validation, model = self.held_out or self.rows, self.model.autoencoder
        error = spread = 0.0
        moment: Tensor | None = None
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(validation), EVALUATION_ROWS):
            span = np.arange(start, min(start + EVALUATION_ROWS, len(validation)))
            rows = validation.take(span)
            x = model.standard(rows.to(self.device))
            z = model.encode(x)
            error += float((model.decode(z) - x).double().square().sum())
            spread += float(x.double().square().sum())
            exact = z.double()
            moment = exact.t() @ exact if moment is None else moment + exact.t() @ exact
            total = total.to(z.device) + exact.sum(dim=0)
        assert moment is not None
        relative = error / spread if spread else 0.0
        logs = {
            "relative_error": relative,
            "participation_ratio": _participation(moment, total, len(validation)),
        }
        score = relative
        if self.behavior is not None and self.behavior.select is not None:
            contrastive = self._select_loss(self.behavior.select)
            logs["contrastive_selection_users"] = contrastive
            score += self.model.objective.contrastive_weight * contrastive
        return Evaluation(score, logs=logs)

    def _select_loss(self, source: PairSource) -> float:
        """InfoNCE on pairs of the users kept for selection, the same in every epoch."""
        objective = self.model.objective
        generator = numpy_generator(self.seed, "selection")
        size = objective.pairs_per_step
        losses = []
        for _ in range(max(1, min(EVALUATION_ROWS, source.count) // size)):
            first, second, excluded = self._pairs(source, size, generator)
            model = self.model.autoencoder
            z = model.encode(model.standard(torch.cat([first, second])))
            loss = info_nce(
                z[:size], z[size:], temperature=objective.temperature, excluded=excluded
            )
            losses.append(float(loss))
        return float(np.mean(losses))


def _participation(moment: Tensor, total: Tensor, rows: int) -> float:
    """Return ``(sum l)^2 / sum l^2`` over the eigenvalues of the covariance.

    The sum of the eigenvalues is the trace, that of their squares the squared Frobenius norm.
    """
    mean = total / rows
    covariance = moment / rows - torch.outer(mean, mean)
    squares = float(covariance.square().sum())
    return float(covariance.trace()) ** 2 / squares if squares > 0 else 0.0


@dataclass(kw_only=True, eq=False, repr=False)
class ContinuousTokenizer(ResidualTokenizer, NeuralTokenizer):
    """Base of tokenizers that freeze a continuous encoder before they quantize (DRQ §4.1)."""

    @abstractmethod
    def _objective(self) -> Objective:
        """Return the losses beside reconstruction."""

    @property
    def needs_behavior(self) -> bool:
        """Whether a loss is over pairs."""
        return self._objective().needs_pairs

    def _behavior(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behavior | None:
        has_pairs = interactions is not None or pairs is not None
        if has_pairs and not self.needs_behavior:
            raise UsageError(
                "interactions or pairs were given and contrastive_weight=0, so they would not be "
                "used; set --contrastive-weight (contrastive_weight), for example 0.1"
            )
        if self.needs_behavior and not has_pairs:
            raise UsageError(
                f"contrastive_weight={self._objective().contrastive_weight:g} needs pairs to learn "
                "from; give --interactions or --pairs (interactions=, pairs=)"
            )
        return read_behavior(interactions, pairs, ids=ids, train=train, threads=self.threads)

    def _train_autoencoder(
        self, prepared: PreparedRows, context: FitContext
    ) -> tuple[Autoencoder, dict[str, Any]]:
        """Return the trained autoencoder and a record of its training, as stage ``train``."""
        autoencoder = self._new_autoencoder(context.inputs)
        autoencoder.standardize_(prepared.mean, prepared.variance)
        model = ContinuousAutoencoder(autoencoder, self._objective())

        def run(store: StateStore | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            device = pick_device(self.device)
            task = ContinuousTask(
                model.to(device),
                prepared.train,
                prepared.held_out,
                context.behavior,
                self._train_options,
                seed=self.seed,
                weights=context.weights,
                device=device,
            )
            result = train(
                task,
                self._train_options,
                seed=self.seed,
                progress=context.progress,
                store=store,
                log=self.logger,
            )
            return module_arrays(model.cpu()), result.to_dict()

        arrays, details = context.stage("train", run)
        load_module_(model, arrays)
        return autoencoder, details
