"""Tokenizers whose codebooks are trained together with the autoencoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.quantization.blocks import Blocks, in_memory, map_rows
from semid.quantization.kmeans import KMeansOptions, KMeansResult, kmeans
from semid.quantization.residual import fit_residual
from semid.seeds import child_seed
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import Autoencoder, ExactEncoder
from semid.tokenizers.neural.quantizers import (
    Codebook,
    ParallelQuantizer,
    Quantizer,
    mean_squared_norm,
)
from semid.tokenizers.neural.tokenizer import (
    NeuralTokenizer,
    RowsTask,
    relative_error,
    squared_sums,
)
from semid.training.loop import Evaluation, Step

Array = npt.NDArray[np.float32]

INITIAL = KMeansOptions(max_iter=10)
"""K-means that starts a codebook: training moves the codewords on, so it need not converge."""

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
    """Start every codebook by K-means over all ``(rows, latent)`` latents, not those of a batch."""
    # Every iteration reads all latents: encoding the rows again each time would cost far more.
    latents = in_memory(latents)
    codebooks = quantizer.codebooks

    def set_codebook(codebook: Codebook, result: KMeansResult) -> None:
        # Moving averages start as if training had gone on with these labels for a while.
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
        space = latents
        if len(quantizer.maps):
            # The codebook quantizes its own linear map of the latent.
            space = _projected(latents, quantizer.maps[number])
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
    # A linear layer holds its weights as (out, in); rows are multiplied from the left.
    (weight,) = projection.parameters()
    matrix = weight.detach().cpu().numpy().T.copy()
    return map_rows(latents, lambda z: z @ matrix, latents.dim)


class QuantizedAutoencoder(nn.Module):
    """Encoder, quantizer, decoder, and the loss over them; beta is ``commitment_weight``.

    ``|x - x_hat|^2 + beta sum_l |sg[q_l] - r_l|^2 (+ sum_l |q_l - sg[r_l]|^2 by gradient)``.
    """

    quantizing: Tensor

    def __init__(
        self, autoencoder: Autoencoder, quantizer: Quantizer, *, commitment_weight: float
    ) -> None:
        super().__init__()
        self.autoencoder, self.quantizer = autoencoder, quantizer
        self.commitment_weight = commitment_weight
        self.register_buffer("quantizing", torch.tensor(quantizer.is_fixed))

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
        # The codebook loss is 0 where moving averages update the codewords.
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


class ReconstructionTask(RowsTask):
    """Reconstruction of rows; after some epochs ``initialize`` starts the codebooks, once."""

    def __init__(
        self,
        model: QuantizedAutoencoder,
        *arguments: Any,
        pretrain: int,
        initialize: Callable[[], None],
        **options: Any,
    ) -> None:
        super().__init__(model, *arguments, **options)
        self.model, self.pretrain, self.initialize = model, pretrain, initialize

    def start_epoch(self, epoch: int) -> None:
        """Start the codebooks after the epochs of pre-training."""
        if epoch >= self.pretrain and not bool(self.model.quantizing):
            self.initialize()
            self.model.quantizing.fill_(True)

    def evaluate(self, epoch: int) -> Evaluation:
        """Return the relative error on held-out rows, with the usage since the last evaluation."""
        sums = np.zeros(2)
        for rows in self._validation_blocks(EVALUATION_ROWS):
            sums += squared_sums(*self.model.reconstruct(rows))
        score = relative_error(sums)
        if not bool(self.model.quantizing):
            # Infinite, so that no state from before the codebooks is kept as the best one.
            return Evaluation(float("inf"), logs={"autoencoder_error": score})
        logs, healthy = self._usage()
        return Evaluation(score, healthy=healthy, logs=logs)

    def _usage(self) -> tuple[dict[str, float], bool]:
        logs: dict[str, float] = {}
        healthy = True
        for level, codebook in enumerate(self.model.quantizer.codebooks):
            # The perplexity exp(H) of the codes; a level that collapses has few.
            used = codebook.take_usage_().double()
            shares = used[used > 0] / used.sum()
            perplexity = float((-(shares * shares.log()).sum()).exp())
            # No more codes can be in use than there are codewords, or rows that were coded.
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
        prepared, autoencoder = self._start_model(context)
        config, options = self._config, self._train_options
        quantizer = self._quantizer(self._latent_width(autoencoder.dim))
        model = QuantizedAutoencoder(
            autoencoder, quantizer, commitment_weight=config.commitment_weight
        )

        def initialize() -> None:
            initialize_(
                quantizer,
                self._latents(prepared.train.blocks, ExactEncoder(autoencoder)),
                seed=self.seed,
                batch=options.batch_size,
                weights=context.weights,
                threads=self.threads,
            )

        result = self._train(
            ReconstructionTask,
            model,
            prepared,
            context,
            context.stages.stage("train"),
            # At least the last epoch trains the codebooks, however few epochs there are.
            pretrain=min(config.pretrain_epochs, options.epochs - 1),
            initialize=initialize,
        )
        self._preprocess = prepared.preprocess
        self._set_model(model)
        return {"training": result.to_dict()}

    def _set_model(self, model: QuantizedAutoencoder) -> None:
        """Keep what encoding and decoding need."""
        codebooks = model.quantizer.codebooks
        self._set_codebooks([each.codewords.detach().cpu().numpy() for each in codebooks])
        self._set_autoencoder(model.autoencoder)
