"""Tokenizers whose codebooks are trained together with the autoencoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.quantization.blocks import Blocks, in_memory
from semid.quantization.kmeans import KMeansOptions, KMeansResult, kmeans
from semid.quantization.residual import fit_residual
from semid.seeds import child_seed
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import Autoencoder
from semid.tokenizers.neural.quantizers import (
    Codebook,
    ParallelQuantizer,
    Quantizer,
    mean_squared_norm,
)
from semid.tokenizers.neural.tokenizer import (
    LatentBlocks,
    NeuralTokenizer,
    PreparedRows,
    pick_device,
)
from semid.training.batches import TrainingRows, epoch_batches, process_share, steps_per_epoch
from semid.training.distributed import rank, world_size
from semid.training.loop import Evaluation, Step, train
from semid.training.options import TrainOptions

Array = npt.NDArray[np.float32]

INITIAL = KMeansOptions(max_iter=10)
"""K-means that starts a codebook: training moves the codewords on, so it need not converge."""

LATENT_BYTES = 1 << 30
"""Latents of the whole data set are held up to this size while codebooks are started."""

MIN_PERPLEXITY_SHARE = 0.125
"""A level with a perplexity below this share of what is attainable makes a checkpoint unhealthy."""

EVALUATION_ROWS = 8192
"""Rows per block of an evaluation."""


def squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Sum over dimensions, mean over rows, in float32."""
    return mean_squared_norm(reconstruction.float() - x)


def initialize_(
    quantizer: Quantizer,
    latents: Blocks,
    *,
    seed: int,
    batch: int,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
) -> None:
    """Start every codebook by K-means over the latents of the whole data set, not of one batch.

    Cost: ten Lloyd iterations per codebook.

    Shapes: ``latents`` (rows, latent), ``weights`` (rows,).
    """
    latents = in_memory(latents, limit_bytes=LATENT_BYTES)
    codebooks = quantizer.codebooks

    def set_codebook(codebook: Codebook, result: KMeansResult) -> None:
        counts = np.bincount(result.labels, weights, minlength=len(result.centroids))
        shares = torch.from_numpy((counts / counts.sum()).astype(np.float32))
        codebook.initialize_(torch.from_numpy(result.centroids), shares, batch=batch)

    if not isinstance(quantizer, ParallelQuantizer):
        fit_residual(
            latents,
            [len(codebook.codewords) for codebook in codebooks],
            seed=child_seed(seed, "initial"),
            options=INITIAL,
            weights=weights,
            threads=threads,
            on_level=lambda level, result: set_codebook(codebooks[level], result),
        )
        return
    for number, codebook in enumerate(codebooks):
        space = _projected(latents, quantizer.maps[number]) if len(quantizer.maps) else latents
        result = kmeans(
            space,
            len(codebook.codewords),
            seed=child_seed(seed, "codebook", number),
            options=INITIAL,
            weights=weights,
            threads=threads,
        )
        set_codebook(codebook, result)


def _projected(latents: Blocks, projection: nn.Module) -> Blocks:
    assert isinstance(projection, nn.Linear)
    weight = projection.weight.detach().cpu().numpy().T.copy()
    return LatentBlocks(latents, lambda z: z @ weight, latents.dim)


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
            # Distributed data parallel waits for a gradient of every parameter in every step, so
            # the idle codebooks take part with weight 0.
            idle = sum((p.sum() for p in self.quantizer.parameters()), x.new_zeros(()))
            return Step(error + 0.0 * idle, {"reconstruction": error.detach()})
        quantized = self.quantizer(z)
        error = squared_error(x, self.autoencoder.decode(quantized.latent))
        commitment = quantized.commitment.sum()
        loss = error + self.commitment_weight * commitment + quantized.codebook
        return Step(loss, {"reconstruction": error.detach(), "commitment": commitment.detach()})

    @torch.no_grad()
    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardized rows and their reconstructions (from codes once there are any)."""
        x = self.autoencoder.standard(rows)
        z = self.autoencoder.encode(x)
        if bool(self.quantizing):
            z = self.quantizer(z).latent
        return x, self.autoencoder.decode(z)


class ReconstructionTask:
    """The training task: reconstruction of shuffled rows, evaluated on held-out rows.

    Args:
        model: what is trained.
        rows: rows to train on.
        held_out: rows to evaluate on; None evaluates on the training rows.
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
        """Make the codebooks after the epochs of pre-training."""
        if epoch >= self.pretrain and not bool(self.model.quantizing):
            self.initialize()
            self.model.quantizing.fill_(True)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, float]]:
        """Yield this process's rows of each batch."""
        batches = epoch_batches(
            len(self.rows),
            self.options.batch_size,
            seed=self.seed,
            epoch=epoch,
            weights=self.weights,
        )
        for batch in batches[first:]:
            share, weight = process_share(batch, rank=rank(), world=world_size())
            yield self.rows.take(share).to(self.device), weight

    def evaluate(self, epoch: int) -> Evaluation:
        """Return the relative error on held-out rows, with each level's usage in this epoch."""
        validation = self.held_out or self.rows
        error = spread = 0.0
        for start in range(0, len(validation), EVALUATION_ROWS):
            span = np.arange(start, min(start + EVALUATION_ROWS, len(validation)))
            x, reconstruction = self.model.reconstruct(validation.take(span).to(self.device))
            error += float((x - reconstruction).double().square().sum())
            spread += float(x.double().square().sum())
        score = error / spread if spread else 0.0
        if not bool(self.model.quantizing):
            # Infinite, so that no state from before the codebooks is kept as the best one.
            return Evaluation(float("inf"), logs={"autoencoder_error": score})
        logs, healthy = self._usage()
        return Evaluation(score, healthy=healthy, logs=logs)

    def _usage(self) -> tuple[dict[str, float], bool]:
        logs: dict[str, float] = {}
        healthy = True
        for level, codebook in enumerate(self.model.quantizer.codebooks):
            used = codebook.take_usage_().double()
            shares = used[used > 0] / used.sum()
            perplexity = float((-(shares * shares.log()).sum()).exp())
            attainable = min(len(used), int(used.sum()))
            healthy &= perplexity >= MIN_PERPLEXITY_SHARE * attainable
            logs[f"perplexity_{level + 1}"] = perplexity
            logs[f"dead_{level + 1}"] = float((used == 0).sum())
            logs[f"revived_{level + 1}"] = float(codebook.revived)
        return logs, healthy


@dataclass(kw_only=True, eq=False, repr=False)
class QuantizedTokenizer(NeuralTokenizer):
    """Base of tokenizers with a quantizer inside the autoencoder; a subclass makes it."""

    @abstractmethod
    def _quantizer(self, latent: int) -> Quantizer:
        """Make the quantizer, its codebooks still empty."""

    def _fit(self, context: FitContext) -> dict[str, Any]:
        prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
        config, options, device = self._config, self._train_options, pick_device(self.device)
        autoencoder = self._new_autoencoder(context.inputs)
        autoencoder.standardize_(prepared.mean, prepared.variance)
        latent = self._latent_width(autoencoder.dim)
        model = QuantizedAutoencoder(
            autoencoder, self._quantizer(latent), commitment_weight=config.commitment_weight
        ).to(device)

        def initialize() -> None:
            encoder = autoencoder.exact_encoder()
            initialize_(
                model.quantizer,
                LatentBlocks(
                    prepared.train.blocks, lambda x: encoder(x, threads=self.threads), latent
                ),
                seed=self.seed,
                batch=options.batch_size,
                weights=context.weights,
                threads=self.threads,
            )

        task = ReconstructionTask(
            model,
            prepared.train,
            prepared.held_out,
            options,
            seed=self.seed,
            weights=context.weights,
            pretrain=min(config.pretrain_epochs, options.epochs - 1),
            initialize=initialize,
            device=device,
        )
        result = train(
            task,
            options,
            seed=self.seed,
            progress=context.progress,
            store=context.stages.stage("train"),
            log=self.logger,
        )
        self._preprocess = prepared.preprocess
        self._set_model(model)
        return {"training": result.to_dict()}

    def _set_model(self, model: QuantizedAutoencoder) -> None:
        """Keep what encoding and decoding need."""
        codebooks = model.quantizer.codebooks
        self._set_codebooks([each.codewords.detach().cpu().numpy() for each in codebooks])
        self._set_autoencoder(model.autoencoder)
