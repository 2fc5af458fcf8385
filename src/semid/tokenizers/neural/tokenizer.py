"""What all neural tokenizers share: options, preprocessed rows, exact encoding, stored arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from semid.data.blocks import Moments
from semid.errors import UsageError
from semid.options import MAX_WIDTH, Options, option
from semid.quantization.blocks import BLOCK_ROWS, Blocks, Preprocess, PreprocessedBlocks
from semid.tokenizers.codebooks import CodebookTokenizer
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import Autoencoder, EncoderGraph
from semid.training.batches import TrainingRows
from semid.training.checkpoint import load_module_
from semid.training.distributed import local_rank
from semid.training.loggers import Logger
from semid.training.options import TrainOptions

Array = npt.NDArray[np.float32]

DEVICES = ("auto", "cpu", "cuda")
DEFAULT_LATENT = 32
WEIGHTS = "autoencoder."
"""Prefix of the autoencoder's arrays in an artefact."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Options):
    """Shape and losses of the autoencoder.

    Attributes:
        latent: width of the latent; 0 takes the tokenizer's own choice (32, DRQ-VAE 256).
        hidden: widths of the encoder's hidden layers, mirrored by the decoder (MoC §4.1).
        commitment_weight: beta (the papers' equations have 1; 0.25 is ours).
        pretrain_epochs: epochs of the autoencoder alone, before K-means over its latents starts
            the codebooks (ours); 0 starts them from the untrained encoder.
    """

    latent: int = option(
        0, ge=0, le=MAX_WIDTH, help="Width of the latent; 0 takes the tokenizer's own choice."
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


class LatentBlocks:
    """A view of rows after an encoder, computed as they are read.

    Args:
        base: ``(rows, dim)``.
        encode: maps rows ``(n, dim)`` to latents ``(n, latent)``, each row by itself.
        latent: width of the latents.
    """

    def __init__(self, base: Blocks, encode: Callable[[Array], Array], latent: int) -> None:
        self.base, self.encode, self.dim = base, encode, latent

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


@dataclass(frozen=True)
class PreparedRows:
    """Rows of a fit after preprocessing, and their moments.

    Attributes:
        preprocess: fitted on the training rows.
        train: rows to train on.
        held_out: rows to evaluate on, or None.
        mean: ``(dim,)`` float64 of the training rows.
        variance: mean squared distance to it.
    """

    preprocess: Preprocess
    train: TrainingRows
    held_out: TrainingRows | None
    mean: npt.NDArray[np.float64]
    variance: float

    @classmethod
    def of(cls, context: FitContext, *, center: bool, normalize: bool) -> PreparedRows:
        """Preprocess the rows of a fit."""
        preprocess = Preprocess.fit(context.train, center=center, normalize=normalize)

        def preprocessed(blocks: Blocks) -> TrainingRows:
            return TrainingRows(
                blocks if preprocess.identity else PreprocessedBlocks(blocks, preprocess)
            )

        train = preprocessed(context.train)
        held_out = None if context.held_out is None else preprocessed(context.held_out)
        moments = Moments.of(train.blocks.blocks())
        return cls(preprocess, train, held_out, moments.mean, moments.variance)


@dataclass(kw_only=True, eq=False, repr=False)
class NeuralTokenizer(CodebookTokenizer):
    """Base of tokenizers that quantize the latent of an autoencoder.

    How autoencoder and codebooks are learned is a subclass's `_fit`; it ends by `_set_autoencoder`,
    `_set_codebooks` and by setting ``_preprocess``.
    """

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

    @property
    def has_decoder(self) -> bool:
        """Whether `decode_latent` works: always."""
        return True

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

    def _set_autoencoder(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder.cpu()
        self._encoder, self._decoder = autoencoder.exact_encoder(), autoencoder.exact_decoder()

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
        """Return the encoder as a module that can be traced and exported.

        It adds up in another order than `encode`, so latents agree to float32 rounding.
        """
        _ = self.dim
        assert self._autoencoder is not None
        return EncoderGraph(self._preprocess, self._autoencoder)

    def _tensors(self) -> dict[str, np.ndarray]:
        weights = {} if self._autoencoder is None else self._autoencoder.state_dict()
        tensors = {f"{WEIGHTS}{name}": each.detach().numpy() for name, each in weights.items()}
        return tensors | super()._tensors()

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        weights = {
            name.removeprefix(WEIGHTS): array
            for name, array in tensors.items()
            if name.startswith(WEIGHTS)
        }
        autoencoder = self._load_autoencoder(weights) if weights else None
        if autoencoder is not None and autoencoder.dim != self._dim:
            raise ValueError(
                f"the encoder reads rows of width {autoencoder.dim}, config.json says {self._dim}"
            )
        if autoencoder is not None:
            self._set_autoencoder(autoencoder)
        super()._set_tensors(tensors)

    def _codeword_width(self, tensors: Mapping[str, np.ndarray]) -> int:
        return self._latent_width(self.dim)

    def _load_autoencoder(self, weights: Mapping[str, np.ndarray]) -> Autoencoder:
        """Make an autoencoder of the weights' own shape."""
        projections = sorted(
            n for n in weights if n.startswith("projections.") and n.endswith("weight")
        )
        inputs = [weights[name].shape[1] for name in projections] or [len(weights["mean"])]
        # Settings may declare any size: nothing of it is allocated before the weights have it too.
        with torch.device("meta"):
            autoencoder = self._new_autoencoder(inputs)
        load_module_(autoencoder, weights)
        return autoencoder
