"""Tokenizers that train a continuous autoencoder first, with contrastive pairs (DRQ §4.1)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from semid.data.ids import ItemIds
from semid.options import MAX_WEIGHT, Options, option
from semid.seeds import numpy_generator, torch_generator
from semid.tokenizers.behavior import Behavior, PairSource, read_behavior
from semid.tokenizers.codebooks import ResidualTokenizer
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import Autoencoder, blank_linear
from semid.tokenizers.neural.tokenizer import (
    NeuralTokenizer,
    PreparedRows,
    RowsTask,
    relative_error,
    squared_sums,
)
from semid.training.checkpoint import StateStore, load_module_, module_arrays
from semid.training.distributed import batch_span, summed_gradient, with_rows_of_others
from semid.training.loop import Evaluation, Step


def info_nce(
    first: Tensor, second: Tensor, *, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE of ``(n, latent)`` pairs, but for ``excluded`` (n, n) all negatives."""
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


def uniformity(z: Tensor) -> Tensor:
    """Log of the mean Gaussian potential of rows ``(n, latent)``; lower is more even.

    On the sphere (Wang and Isola 2020, eq. 2).
    """
    unit = functional.normalize(z.float(), dim=1)
    with torch.autocast(unit.device.type, enabled=False):
        # |a - b|^2 = 2 - 2 cos(a, b) on the unit sphere; rounding may leave a small negative.
        squared_distances = (2.0 - 2.0 * (unit @ unit.t())).clamp_min(0.0)
    different = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (-2.0 * squared_distances[different]).exp().mean().log()


EVALUATION_ROWS = 4096
"""Rows per block, and selection pairs drawn once, of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Objective(Options):
    """Weights of the losses beside reconstruction."""

    contrastive_weight: float = option(
        0.0, ge=0, le=MAX_WEIGHT, help="Weight lambda of InfoNCE on pairs."
    )
    temperature: float = option(0.07, gt=0, le=MAX_WEIGHT, help="InfoNCE temperature.")
    pairs_per_step: int = option(512, ge=2, le=65_536, help="Pairs per training step.")
    uniformity_weight: float = option(
        0.0, ge=0, le=MAX_WEIGHT, help="Weight of the uniformity loss on the pairs' latents."
    )
    kl_weight: float = option(
        0.0,
        ge=0,
        le=MAX_WEIGHT,
        help="Weight of a KL term; above 0 the latent is sampled in training.",
    )


class Batch(NamedTuple):
    """This process's part of the rows to reconstruct, and of the pairs of rows to contrast."""

    rows: Tensor  # (n, dim)
    seed: int  # of the sampled latent
    total: int  # rows of all processes
    weight: float  # of the mean loss over ``rows``, so that averages over processes are exact
    first: Tensor | None = None  # (n, dim), of as many pairs as ``excluded`` has rows
    second: Tensor | None = None  # (n, dim)
    excluded: Tensor | None = None  # (pairs, pairs), which second[j] is no negative of first[i]


class ContinuousAutoencoder(nn.Module):
    """Encoder and decoder without a quantizer: ``L_rec + lambda L_CL`` (DRQ §4.1).

    ``L_rec`` is the squared error over the variance of the input, so that lambda means the same at
    any width and scale (ours; for unit vectors it is close to the paper's summed error).
    """

    def __init__(self, autoencoder: Autoencoder, objective: Objective) -> None:
        super().__init__()
        self.autoencoder, self.objective = autoencoder, objective
        head = autoencoder.encoder[-1]
        assert isinstance(head, nn.Linear)
        self.log_variance: nn.Linear | None = None
        if objective.kl_weight > 0:
            self.log_variance = blank_linear(head.in_features, head.out_features)
            # Little noise at first (sigma = e^-2), so that reconstruction is learned before.
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
            noise = torch.randn(batch.total, sampled.shape[1], generator=generator)
            noise = noise[batch_span(batch.total)].to(z.device)
            divergence = (
                0.5 * (sampled.square() + log_variance.exp() - 1.0 - log_variance).sum(1).mean()
            )
            sampled = sampled + noise * (0.5 * log_variance).exp()
            loss = loss + objective.kl_weight * divergence
            logs["kl"] = divergence.detach()
        error = (model.decode(sampled).float() - x[:count]).square().mean()
        loss = loss + error
        logs["reconstruction"] = error.detach()
        if batch.first is not None and batch.excluded is not None:
            # Every pair is contrasted with those of all processes, as one process would.
            pairs, own = len(batch.excluded), len(batch.first)
            first = with_rows_of_others(z[count : count + own].float(), pairs)
            second = with_rows_of_others(z[count + own :].float(), pairs)
            if objective.contrastive_weight > 0:
                contrastive = info_nce(
                    first, second, temperature=objective.temperature, excluded=batch.excluded
                )
                weighted = objective.contrastive_weight * contrastive
                loss = loss + summed_gradient(weighted, batch.weight)
                logs["contrastive"] = contrastive.detach()
            if objective.uniformity_weight > 0:
                uniform = 0.5 * (uniformity(first) + uniformity(second))
                loss = loss + summed_gradient(objective.uniformity_weight * uniform, batch.weight)
                logs["uniformity"] = uniform.detach()
        return Step(loss, logs)


class ContinuousTask(RowsTask):
    """Reconstruction of rows and contrast of drawn pairs.

    The score is the relative error on held-out items plus lambda times InfoNCE on pairs of the
    users kept for selection, where there are any.
    """

    def __init__(self, model: ContinuousAutoencoder, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        self.model, self.objective = model.autoencoder, model.objective

    def _batch(self, rows: Tensor, step: int, *, total: int, weight: float) -> Batch:
        batch = Batch(rows, self.seed + step, total, weight)
        if self.context.behavior is None:
            return batch
        # The draws depend on the step alone: a continued run and every process see the same pairs.
        generator = numpy_generator(self.seed, "pairs", step, 0)
        size = self.objective.pairs_per_step
        first, second, excluded = self._pairs(
            self.context.behavior.train, size, generator, span=batch_span(size)
        )
        return batch._replace(first=first, second=second, excluded=excluded)

    def _pairs(
        self, source: PairSource, size: int, generator: np.random.Generator, *, span: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw pairs; return the rows of those in ``span``, and what all exclude."""
        first, second = source.draw(size, generator)
        excluded = torch.from_numpy(source.positives.excluded(first, second))
        rows = [self.rows.take(part[span]).to(self.device) for part in (first, second)]
        return rows[0], rows[1], excluded.to(self.device)

    def evaluate(self, epoch: int) -> Evaluation:
        """Return the relative error on held-out rows and the contrastive loss on other users."""
        sums = np.zeros(2)
        moment = total = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows in self._validation_blocks(EVALUATION_ROWS):
            x = self.model.standard(rows)
            z = self.model.encode(x)
            sums += squared_sums(x, self.model.decode(z))
            exact = z.double()
            # Sums for the covariance of all latents, (latent, latent) and (latent,).
            moment, total = moment + exact.t() @ exact, total + exact.sum(dim=0)
        score = relative_error(sums)
        logs = {
            "relative_error": score,
            "participation_ratio": _participation(moment, total, len(self.validation)),
        }
        # Users kept for selection: pairs of training users would reward learning them by heart.
        behavior = self.context.behavior
        if behavior is not None and behavior.select is not None:
            contrastive = self._select_loss(behavior.select)
            logs["contrastive_selection_users"] = contrastive
            score += self.objective.contrastive_weight * contrastive
        return Evaluation(score, logs=logs)

    def _select_loss(self, source: PairSource) -> float:
        """InfoNCE on pairs of the users kept for selection, the same in every epoch."""
        # Equal pairs in every epoch: the score then compares models, not draws.
        generator = numpy_generator(self.seed, "selection")
        size, temperature = self.objective.pairs_per_step, self.objective.temperature
        losses = []
        for _ in range(max(1, min(EVALUATION_ROWS, source.count) // size)):
            first, second, excluded = self._pairs(source, size, generator, span=slice(None))
            z = self.model.encode(self.model.standard(torch.cat([first, second])))
            loss = info_nce(z[:size], z[size:], temperature=temperature, excluded=excluded)
            losses.append(float(loss))
        return float(np.mean(losses))


def _participation(moment: Tensor, total: Tensor, rows: int) -> float:
    """Return ``(sum l)^2 / sum l^2`` over the eigenvalues of the covariance."""
    mean = total / rows
    covariance = moment / rows - torch.outer(mean, mean)
    # The sum of the eigenvalues is the trace, that of their squares the squared Frobenius norm.
    squares = float(covariance.square().sum())
    return float(covariance.trace()) ** 2 / squares if squares > 0 else 0.0


@dataclass(kw_only=True, eq=False, repr=False)
class ContinuousTokenizer(ResidualTokenizer, NeuralTokenizer):
    """Base of tokenizers that freeze a continuous encoder before they quantize (DRQ §4.1)."""

    @abstractmethod
    def _objective(self) -> Objective:
        """Return the losses beside reconstruction."""

    def _behavior(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behavior | None:
        return read_behavior(interactions, pairs, ids=ids, train=train, threads=self.threads)

    def _train_autoencoder(self, context: FitContext) -> tuple[PreparedRows, dict[str, Any]]:
        """Train the autoencoder and freeze it; return its rows and a record of the training."""
        prepared, autoencoder = self._start_model(context)
        model = ContinuousAutoencoder(autoencoder, self._objective())

        def run(store: StateStore | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            result = self._train(ContinuousTask, model, prepared, context, store)
            return module_arrays(model.cpu()), result.to_dict()

        # A continued run takes the weights of a finished training from the checkpoint.
        arrays, details = context.stage("train", run)
        load_module_(model, arrays)
        self._preprocess = prepared.preprocess
        self._set_autoencoder(autoencoder)
        return prepared, details
