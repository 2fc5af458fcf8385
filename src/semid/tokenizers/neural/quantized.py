"""Tokenizers whose codebooks are trained together with the autoencoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.quantization.blocks import BLOCK_ROWS, Blocks, in_memory
from semid.quantization.kmeans import KMeansOptions, KMeansResult, kmeans
from semid.quantization.nearest import index_codebook
from semid.quantization.residual import fit_residual
from semid.seeds import child_seed
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import Autoencoder
from semid.tokenizers.neural.quantizers import Codebook, ParallelQuantizer, Quantizer
from semid.tokenizers.neural.tokenizer import NeuralTokenizer, PreparedRows, pick_device
from semid.training.batches import epoch_batches, own_share, steps_per_epoch
from semid.training.distributed import rank, world_size
from semid.training.loop import Evaluation, Step, train
from semid.training.options import TrainOptions
from semid.training.rows import TrainingRows
from semid.training.stages import Stages

__all__ = [
    "UNHEALTHY_SHARE",
    "LatentBlocks",
    "QuantizedAutoencoder",
    "QuantizedTokenizer",
    "ReconstructionTrainee",
    "initialize_",
    "squared_error",
]


Array = npt.NDArray[np.float32]
INITIAL = KMeansOptions(max_iter=10)


class LatentBlocks:
    """A view of rows after an encoder, computed as they are read.

    Args:
        base: ``(rows, dim)``.
        encode: maps rows ``(n, dim)`` to latents ``(n, latent)``, each row by itself.
        latent: width of the latents.
    """

    def __init__(self, base: Blocks, encode: Callable[[Array], Array], latent: int) -> None:
        self.base, self.encode, self.latent = base, encode, latent

    @property
    def dim(self) -> int:
        """Width of a latent."""
        return self.latent

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.base)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, latents)`` in order."""
        for start, block in self.base.blocks(size):
            yield start, self.encode(block)

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the latents of the rows at ``indices``."""
        return self.encode(self.base.rows(indices))


def initialize_(
    quantizer: Quantizer,
    latents: Blocks,
    *,
    seed: int,
    batch: int,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    memory_bytes: int = 1 << 30,
) -> None:
    """Set every codebook by K-means, each with a child seed of its own.

    Args:
        quantizer: its codebooks are set, level by level or each on its own.
        latents: ``(rows, latent)`` of all training rows.
        seed: any integer.
        batch: rows of a training step, for the first moving counts.
        weights: ``(rows,)`` item weights.
        threads: plain threads; it changes no result.
        memory_bytes: latents are held up to this size.

    Cost: ten Lloyd iterations a codebook.
    """
    held = in_memory(latents, limit_bytes=memory_bytes)
    books = [book for book in quantizer.books if isinstance(book, Codebook)]

    def set_(book: Codebook, result: KMeansResult) -> None:
        counts = np.bincount(result.labels, weights, minlength=len(result.centroids))
        shares = torch.from_numpy((counts / counts.sum()).astype(np.float32))
        book.initialize_(torch.from_numpy(result.centroids), shares, batch=batch)

    if isinstance(quantizer, ParallelQuantizer):
        for number, book in enumerate(books):
            rows = held
            if len(quantizer.maps):
                rows = _mapped(held, quantizer.maps[number])
            result = kmeans(
                rows,
                len(book.codewords),
                seed=child_seed(seed, "codebook", number),
                options=INITIAL,
                weights=weights,
                threads=threads,
            )
            set_(book, result)
        return
    fit_residual(
        held,
        [len(book.codewords) for book in books],
        seed=child_seed(seed, "initial"),
        options=INITIAL,
        weights=weights,
        threads=threads,
        on_level=lambda level, result: set_(books[level], result),
    )


def _mapped(latents: Blocks, each: nn.Module) -> Blocks:
    assert isinstance(each, nn.Linear)
    weight = each.weight.detach().cpu().numpy().T.copy()
    return LatentBlocks(latents, lambda z: z @ weight, latents.dim)


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


class QuantizedTokenizer(NeuralTokenizer):
    """Base of tokenizers with a quantizer inside the autoencoder; a subclass names it."""

    @abstractmethod
    def _quantizer(self, latent: int) -> Quantizer:
        """Make the quantizer, its codebooks still empty."""

    def _fit(self, context: FitContext) -> dict[str, Any]:
        prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
        device = pick_device(self.device)
        autoencoder = self._new_autoencoder(context.inputs)
        autoencoder.standardize_(prepared.mean, prepared.variance)
        latent = self._latent_width(autoencoder.dim)
        model = QuantizedAutoencoder(
            autoencoder,
            self._quantizer(latent),
            commitment_weight=self.network.commitment_weight,
        ).to(device)

        def initialize() -> None:
            encoder = autoencoder.exact_encoder()
            initialize_(
                model.quantizer,
                LatentBlocks(
                    prepared.train.blocks, lambda x: encoder(x, threads=self.threads), latent
                ),
                seed=self.seed,
                batch=self.training.batch_size,
                weights=context.weights,
                threads=self.threads,
            )

        trainee = ReconstructionTrainee(
            model,
            prepared.train,
            prepared.held_out,
            self.training,
            seed=self.seed,
            weights=context.weights,
            pretrain=min(self.network.pretrain_epochs, self.training.epochs - 1),
            initialize=initialize,
            device=device,
        )
        result = train(
            trainee,
            self.training,
            seed=self.seed,
            progress=context.progress,
            store=Stages(context.checkpoint).stage("train"),
            log=self.logger,
        )
        self._preprocess = prepared.preprocess
        self._take(model)
        return {"training": result.to_dict()}

    def _take(self, model: QuantizedAutoencoder) -> None:
        """Keep what encoding and decoding need."""
        books = [book for book in model.quantizer.books if isinstance(book, Codebook)]
        self._prepared = tuple(index_codebook(book.codewords.detach().cpu()) for book in books)
        self._set_autoencoder(model.autoencoder)
