"""What all neural tokenizers share: options, preprocessed rows, exact encoding, stored arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.data.blocks import Moments
from semid.errors import UsageError
from semid.options import MAX_WIDTH, Options, option
from semid.quantization.blocks import Blocks, Preprocess, RowView, map_rows
from semid.tokenizers.codebooks import CodebookTokenizer
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import (
    Autoencoder,
    EncoderGraph,
    ExactDecoder,
    ExactEncoder,
)
from semid.training.batches import TrainingRows, epoch_batches, process_share, steps_per_epoch
from semid.training.checkpoint import StateStore, load_module_
from semid.training.distributed import local_rank, rank, world_size
from semid.training.loggers import Logger
from semid.training.loop import Evaluation, TrainResult, train
from semid.training.options import TrainOptions

Array = npt.NDArray[np.float32]

DEVICES = ("auto", "cpu", "cuda")
DEFAULT_LATENT = 32
WEIGHTS = "autoencoder."
"""Prefix of the autoencoder's arrays in an artefact."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Options):
    """Shape and losses of the autoencoder (MoC §4.1; latent 0, pre-training and beta are ours)."""

    latent: int = option(
        0,
        ge=0,
        le=MAX_WIDTH,
        help="Width of the latent; 0 takes the tokenizer's own choice (32, DRQ-VAE up to 256).",
    )
    hidden: tuple[int, ...] = option(
        (512, 256, 128),
        ge=1,
        le=MAX_WIDTH,
        help="Widths of the encoder's hidden layers; the decoder mirrors them.",
    )
    commitment_weight: float = option(0.25, ge=0, help="Weight beta of the commitment loss.")
    pretrain_epochs: int = option(
        5, ge=0, help="Epochs of the autoencoder alone, before K-means starts the codebooks."
    )


def pick_device(name: str) -> torch.device:
    """Return the device to train on; processes of ``torchrun`` take one GPU each."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device='cuda': no CUDA device was found; give device='cpu' or 'auto'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


@dataclass(frozen=True)
class PreparedRows:
    """Rows of a fit after preprocessing; mean ``(dim,)`` and variance of the training rows."""

    preprocess: Preprocess
    train: TrainingRows
    held_out: TrainingRows | None
    mean: npt.NDArray[np.float64]
    variance: float

    @classmethod
    def of(cls, context: FitContext, *, center: bool, normalize: bool) -> PreparedRows:
        """Preprocess the rows of a fit."""
        preprocess = Preprocess.fit(context.train, center=center, normalize=normalize)
        train, held_out = TrainingRows(preprocess.view(context.train)), None
        if context.held_out is not None:
            held_out = TrainingRows(preprocess.view(context.held_out))
        # Held-out rows must not influence the scale that the network learns at.
        moments = Moments.of(train.blocks.blocks())
        return cls(preprocess, train, held_out, moments.mean, moments.variance)


class RowsTask(ABC):
    """Base of training tasks: batches of shuffled training rows, evaluated on held-out rows.

    Without held-out rows the training rows are evaluated. Item weights say how often one is drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: PreparedRows,
        context: FitContext,
        options: TrainOptions,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.module, self.rows = model, prepared.train
        self.validation = prepared.held_out or prepared.train
        self.context, self.options, self.seed, self.device = context, options, seed, device
        self.steps_per_epoch = steps_per_epoch(len(self.rows), options.batch_size)

    def start_epoch(self, epoch: int) -> None:  # noqa: B027 - most tasks have nothing to do
        """Prepare an epoch; a subclass may override it."""

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Any, float]]:
        """Yield this process's batch of each step from ``first``, and its weight."""
        batches = epoch_batches(
            len(self.rows),
            self.options.batch_size,
            seed=self.seed,
            epoch=epoch,
            weights=self.context.weights,
        )
        # Every process cuts the same batches and takes its share of each.
        for number in range(first, len(batches)):
            share, weight = process_share(batches[number], rank=rank(), world=world_size())
            rows = self.rows.take(share).to(self.device)
            step = epoch * self.steps_per_epoch + number
            yield self._batch(rows, step, total=len(batches[number]), weight=weight), weight

    def _batch(self, rows: Tensor, step: int, *, total: int, weight: float) -> Any:
        """Return what the model's ``forward`` takes in a step.

        ``rows`` are this process's part of ``total``, and ``weight`` that of their mean loss.
        """
        return rows

    def _validation_blocks(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self.validation), size):
            span = np.arange(start, min(start + size, len(self.validation)))
            yield self.validation.take(span).to(self.device)

    @abstractmethod
    def evaluate(self, epoch: int) -> Evaluation:
        """Return the score of the model as it is."""


def squared_sums(x: Tensor, reconstruction: Tensor) -> npt.NDArray[np.float64]:
    """Return ``[sum |x - x_hat|^2, sum |x|^2]``; their ratio is the relative error."""
    # Rows are standardized, so |x|^2 is the squared distance to the mean of the training rows.
    differences = (x - reconstruction, x)
    return np.array([float(each.double().square().sum()) for each in differences])


def relative_error(sums: npt.NDArray[np.float64]) -> float:
    """Return the relative error of added `squared_sums`; 0 where all rows are 0."""
    return float(sums[0] / sums[1]) if sums[1] else 0.0


@dataclass(kw_only=True, eq=False, repr=False)
class NeuralTokenizer(CodebookTokenizer):
    """Base of tokenizers that quantize the latent of an autoencoder.

    How autoencoder and codebooks are learned is a subclass's `_fit`; it ends by `_set_autoencoder`,
    `_set_codebooks` and by setting ``_preprocess``.
    """

    has_decoder: ClassVar[bool] = True

    network: AutoencoderConfig | Mapping[str, Any] | None = option(
        None, help="Shape and losses of the autoencoder."
    )
    training: TrainOptions | Mapping[str, Any] | None = option(None, help="How it is trained.")
    device: str = option(
        "auto",
        choices=DEVICES,
        help="Device to train on: auto takes CUDA if there is one. Encoding is on the CPU.",
    )
    logger: Logger | None = option(
        None, setting=False, help="Receives the metrics of every epoch; the caller closes it."
    )

    def __post_init__(self) -> None:
        """Start without an autoencoder."""
        super().__post_init__()
        self._autoencoder: Autoencoder | None = None

    @property
    def _config(self) -> AutoencoderConfig:
        return AutoencoderConfig.of(self.network)

    @property
    def _train_options(self) -> TrainOptions:
        return TrainOptions.of(self.training)

    def _kernels(self) -> set[str]:
        return super()._kernels() | {"dense"}

    def _new_autoencoder(self, inputs: Sequence[int]) -> Autoencoder:
        return Autoencoder(
            inputs,
            latent=self._latent_width(sum(inputs)),
            hidden=self._config.hidden,
            seed=self.seed,
        )

    def _latent_width(self, dim: int) -> int:
        """Return the width of the latent for rows of width ``dim``."""
        return self._config.latent or DEFAULT_LATENT

    def _start_model(self, context: FitContext) -> tuple[PreparedRows, Autoencoder]:
        """Return the preprocessed rows of a fit and an untrained autoencoder of their scale."""
        # The network sees rows of variance 1, whatever the scale of the embeddings.
        prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
        autoencoder = self._new_autoencoder(context.inputs)
        autoencoder.standardize_(prepared.mean, prepared.variance)
        return prepared, autoencoder

    def _train(
        self,
        task: type[RowsTask],
        model: nn.Module,
        prepared: PreparedRows,
        context: FitContext,
        store: StateStore | None,
        **arguments: Any,
    ) -> TrainResult:
        """Train a model in place by a task, on the device asked for."""
        device, options = pick_device(self.device), self._train_options
        running = task(
            model.to(device),
            prepared,
            context,
            options,
            seed=self.seed,
            device=device,
            **arguments,
        )
        return train(
            running,
            options,
            seed=self.seed,
            progress=context.progress,
            store=store,
            log=self.logger,
        )

    def _latents(self, rows: Blocks, encoder: ExactEncoder) -> RowView:
        """Return a view of the latents ``(rows, latent)`` of preprocessed rows."""
        width = self._latent_width(rows.dim)
        return map_rows(rows, partial(encoder, threads=self.threads), width)

    def _set_autoencoder(self, autoencoder: Autoencoder) -> None:
        # Ids come from exact copies on the CPU, in which no row depends on its neighbors.
        self._autoencoder = autoencoder.cpu()
        self._encoder, self._decoder = ExactEncoder(autoencoder), ExactDecoder(autoencoder)

    def _latent_block(self, x: Array) -> Array:
        return self._encoder(self._preprocess.apply(x), threads=self.threads)

    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        decoded = self._decoder(self._quantize_codes(codes), threads=self.threads)
        return self._preprocess.invert(decoded)

    def decode_latent(self, z: npt.ArrayLike) -> Array:
        """Return reconstructions ``(n, dim)`` of latents ``(n, latent)`` without quantization."""
        _ = self.dim
        rows = np.ascontiguousarray(z, dtype=np.float32)
        return self._preprocess.invert(self._decoder(rows, threads=self.threads))

    def encoder_module(self) -> nn.Module:
        """Return the encoder as a module; its latents agree to float32 rounding."""
        _ = self.dim
        assert self._autoencoder is not None
        return EncoderGraph(self._preprocess, self._autoencoder)

    def _tensors(self) -> dict[str, np.ndarray]:
        weights = {} if self._autoencoder is None else self._autoencoder.state_dict()
        tensors = {f"{WEIGHTS}{name}": each.detach().numpy() for name, each in weights.items()}
        return tensors | super()._tensors()

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        stored = [name for name in tensors if name.startswith(WEIGHTS)]
        weights = {name.removeprefix(WEIGHTS): tensors[name] for name in stored}
        # A tokenizer that was fitted without a network has no weights.
        if weights:
            autoencoder = self._load_autoencoder(weights)
            if autoencoder.dim != self._dim:
                raise ValueError(
                    f"the encoder reads rows of width {autoencoder.dim}, config.json says "
                    f"{self._dim}"
                )
            self._set_autoencoder(autoencoder)
        super()._set_tensors(tensors)

    def _codeword_width(self, tensors: Mapping[str, np.ndarray]) -> int:
        return self._latent_width(self.dim)

    def _load_autoencoder(self, weights: Mapping[str, np.ndarray]) -> Autoencoder:
        """Make an autoencoder of the weights' own shape."""
        # Several inputs have a projection each, which is as wide as its input.
        projections = sorted(
            n for n in weights if n.startswith("projections.") and n.endswith("weight")
        )
        inputs = [weights[name].shape[1] for name in projections] or [len(weights["mean"])]
        # Settings may declare any size: nothing of it is allocated before the weights have it too.
        with torch.device("meta"):
            autoencoder = self._new_autoencoder(inputs)
        load_module_(autoencoder, weights)
        return autoencoder
