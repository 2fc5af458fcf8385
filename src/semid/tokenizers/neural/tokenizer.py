"""What all neural tokenizers share: options, preprocessed rows, exact encoding, stored arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from semid.data.blocks import Moments
from semid.errors import UsageError, check_choice
from semid.options import MAX_WIDTH, Options, option
from semid.quantization.blocks import Blocks, Preprocess, PreprocessedBlocks
from semid.quantization.nearest import IndexedCodebook, index_codebook
from semid.quantization.refine import ColumnGroup
from semid.quantization.residual import ResidualCodes, dequantize, encode_residual
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import FitContext, check_beam, check_validation_fraction
from semid.tokenizers.neural.autoencoder import Autoencoder, EncoderGraph
from semid.tokenizers.stored import check_shapes
from semid.training.distributed import local_rank
from semid.training.loggers import Logger
from semid.training.options import TrainOptions
from semid.training.rows import TrainingRows
from semid.training.state import load_module_

__all__ = [
    "DEVICES",
    "LATENT",
    "Network",
    "NeuralOptions",
    "NeuralTokenizer",
    "PreparedRows",
    "ResidualOptions",
    "pick_device",
]


DEVICES = ("auto", "cpu", "cuda")

MAX_LAYERS = 128
"""Hidden layers of a perceptron; the papers have three."""


@dataclass(frozen=True, kw_only=True)
class Network(Options):
    """Shape and losses of the autoencoder.

    Attributes:
        latent: width of the latent; 0 takes the tokenizer's own choice (32, DRQ-VAE 256).
        hidden: widths of the encoder's hidden layers, mirrored by the decoder (MoC §4.1).
        commitment_weight: beta, 0 or more (the papers' equations have 1; 0.25 is ours).
        pretrain_epochs: epochs of the autoencoder alone, before K-means over its latents starts
            the codebooks (ours); 0 starts them from the untrained encoder.
    """

    latent: int = option(0, ge=0, le=MAX_WIDTH)
    hidden: tuple[int, ...] = option((512, 256, 128), ge=1, le=MAX_WIDTH)
    commitment_weight: float = option(0.25, ge=0)
    pretrain_epochs: int = option(5, ge=0)


class NeuralOptions(TypedDict, total=False):
    """Arguments that every neural tokenizer takes beside its own; all have defaults.

    Attributes:
        seed: any integer.
        network: shape and losses of the autoencoder.
        training: how it is trained.
        normalize: scale (centered) rows to unit length first.
        center: subtract the training mean first.
        validation_fraction: share of the items held out by a hash of their id, in [0, 1).
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``; encoding is on the CPU.
        threads: plain threads for K-means and encoding; results do not depend on it.
        logger: told the figures of every epoch; it stays the caller's to close.
    """

    seed: int
    network: Network | Mapping[str, Any] | None
    training: TrainOptions | Mapping[str, Any] | None
    normalize: bool
    center: bool
    validation_fraction: float
    device: str
    threads: int | None
    logger: Logger | None


class ResidualOptions(NeuralOptions, total=False):
    """Arguments of tokenizers whose levels quantize what the levels before left.

    Attributes:
        levels: codes an item.
        codebook_size: codewords a level (2 to 2**32), or one number a level.
        beam_width: partial codes kept while encoding; 1 is greedy.
    """

    levels: int
    codebook_size: int | Sequence[int]
    beam_width: int


def pick_device(wanted: str) -> torch.device:
    """Return the device to train on; processes of ``torchrun`` take one GPU each.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("device='cuda': no CUDA device was found; give device='cpu' or 'auto'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


@dataclass(frozen=True)
class PreparedRows:
    """Rows of a fit after preprocessing, and their moments.

    Attributes:
        preprocess: fitted on the training rows.
        train: rows to train on.
        held_out: rows to judge on, or None.
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
        """Prepare the rows of a fit."""
        preprocess = Preprocess.fit(context.train, center=center, normalize=normalize)

        def ready(blocks: Blocks) -> TrainingRows:
            return TrainingRows(
                blocks if preprocess.identity else PreprocessedBlocks(blocks, preprocess)
            )

        train = ready(context.train)
        held = None if context.held_out is None else ready(context.held_out)
        moments = Moments.of(train.blocks.blocks())
        return cls(preprocess, train, held, moments.mean, moments.variance)


Array = npt.NDArray[np.float32]
LATENT = 32


class NeuralTokenizer(Tokenizer):
    """Base of tokenizers that quantize the latent of an autoencoder, level after level.

    How autoencoder and codebooks are learned is a subclass's `_fit`; it ends by `_set_autoencoder`
    and by setting ``_preprocess`` and ``_prepared``.

    Args:
        sizes: codewords of each level or codebook.
        beam_width: partial codes kept while encoding; 1 is greedy.
        seed: any integer.
        network: shape and losses of the autoencoder.
        training: how it is trained.
        normalize: scale (centered) rows to unit length first.
        center: subtract the training mean first.
        validation_fraction: share of the items held out by a hash of their id, in [0, 1).
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``; encoding is on the CPU.
        threads: plain threads for K-means and encoding; results do not depend on it.
        logger: told the figures of every epoch; it stays the caller's to close.

    Subclasses take the arguments from ``seed`` on as `NeuralOptions`.
    """

    def __init__(
        self,
        *,
        sizes: tuple[int, ...],
        beam_width: int = 1,
        seed: int = 0,
        network: Network | Mapping[str, Any] | None = None,
        training: TrainOptions | Mapping[str, Any] | None = None,
        normalize: bool = False,
        center: bool = False,
        validation_fraction: float = 0.05,
        device: str = "auto",
        threads: int | None = None,
        logger: Logger | None = None,
    ) -> None:
        super().__init__()
        self.codebook_sizes = sizes
        check_beam(beam_width, kind=self.kind, hierarchical=self.hierarchical)
        check_validation_fraction(validation_fraction)
        self.beam_width = int(beam_width)
        self.seed = int(seed)
        self.network = Network.of(network)
        self.training = TrainOptions.of(training)
        self.normalize, self.center = bool(normalize), bool(center)
        self.validation_fraction = float(validation_fraction)
        self.device = check_choice("device", device, DEVICES)
        self.threads, self.logger = threads, logger
        self._preprocess = Preprocess(normalize=normalize)
        self._prepared: tuple[IndexedCodebook, ...] = ()
        self._autoencoder: Autoencoder | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            "seed": self.seed,
            "network": {**asdict(self.network), "hidden": list(self.network.hidden)},
            "training": asdict(self.training),
            "normalize": self.normalize,
            "center": self.center,
            "validation_fraction": self.validation_fraction,
            "device": self.device,
        }

    def _new_autoencoder(self, inputs: Sequence[int]) -> Autoencoder:
        return Autoencoder(
            inputs,
            latent=self._latent_width(sum(inputs)),
            hidden=self.network.hidden,
            seed=self.seed,
        )

    def _latent_width(self, dim: int) -> int:
        """Return the width of the latent for rows of width ``dim``."""
        return self.network.latent or LATENT

    def _set_autoencoder(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder.cpu()
        self._encoder, self._decoder = autoencoder.exact_encoder(), autoencoder.exact_decoder()

    def _parts(self, dim: int) -> list[ColumnGroup] | None:
        """Return which columns of latents a refinement fits together; None for all at once."""
        return None

    def _follow_codes(
        self,
        train: Blocks,
        held: Blocks | None,
        *,
        weights: npt.NDArray[np.float64] | None = None,
    ) -> dict[str, Any]:
        """Fit again what is fitted to codes, after codebooks changed; return details of it."""
        return {}

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        return encode_residual(
            self._encoded(x), self._prepared, beam_width=beam_width, threads=self.threads
        )

    def _encoded(self, x: Array) -> Array:
        """Return what the encoder makes of rows ``(n, dim)``: ``(n, latent)``."""
        return self._encoder(self._preprocess.apply(x), threads=self.threads)

    def _latent_block(self, x: Array) -> Array:
        return self._encoded(x)

    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        decoded = self._decoder(self._quantize_codes(codes), threads=self.threads)
        return self._preprocess.invert(decoded)

    def decode_latent(self, z: npt.ArrayLike) -> Array:
        """Return reconstructions ``(n, dim)`` of latents ``(n, latent)`` without quantization.

        Raises:
            NotFittedError: before `fit`.
        """
        _ = self.dim
        rows = np.ascontiguousarray(z, dtype=np.float32)
        return self._preprocess.invert(self._decoder(rows, threads=self.threads))

    def encoder_module(self) -> nn.Module:
        """Return the encoder as a module that can be traced and exported.

        Returns:
            From rows ``(n, dim)`` to latents ``(n, latent)`` float32, or to a list of one such a
            codebook where each has a map of its own. It adds up in another order than `encode`, so
            latents agree to float32 rounding.

        Raises:
            NotFittedError: before `fit`.
        """
        _ = self.dim
        assert self._autoencoder is not None
        return EncoderGraph(self._preprocess, self._autoencoder)

    def _quantize_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        return dequantize(codes, self._codebooks())

    def _codebooks(self) -> tuple[Array, ...]:
        return tuple(book.codewords.numpy() for book in self._prepared)

    def _tensors(self) -> dict[str, np.ndarray]:
        weights = {} if self._autoencoder is None else self._autoencoder.state_dict()
        tensors = {f"autoencoder.{name}": each.detach().numpy() for name, each in weights.items()}
        tensors |= {f"codebooks.{i}": book for i, book in enumerate(self._codebooks())}
        if self._preprocess.mean is not None:
            tensors["preprocess.mean"] = self._preprocess.mean
        return tensors

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        prefix = "autoencoder."
        weights = {
            name.removeprefix(prefix): array
            for name, array in tensors.items()
            if name.startswith(prefix)
        }
        autoencoder = self._loaded(weights) if weights else None
        dim = autoencoder.dim if autoencoder is not None else self._dim
        if self._dim not in (None, dim):
            raise ValueError(f"the encoder reads rows of width {dim}, config.json says {self._dim}")
        width = None if dim is None else self._quantized_width(dim, tensors)
        shapes = {f"codebooks.{i}": (size, width) for i, size in enumerate(self.codebook_sizes)}
        check_shapes(tensors, shapes | ({"preprocess.mean": (dim,)} if self.center else {}))
        if autoencoder is not None:
            self._set_autoencoder(autoencoder)
        self._preprocess = Preprocess(
            mean=tensors["preprocess.mean"] if self.center else None, normalize=self.normalize
        )
        self._prepared = tuple(
            index_codebook(torch.from_numpy(tensors[f"codebooks.{i}"])) for i in range(self.levels)
        )

    def _quantized_width(self, dim: int, tensors: Mapping[str, np.ndarray]) -> int:
        """Return the width of codewords for rows of width ``dim``."""
        return self._latent_width(dim)

    def _loaded(self, weights: Mapping[str, np.ndarray]) -> Autoencoder:
        """Make an autoencoder of the weights' own shape."""
        several = sorted(
            n for n in weights if n.startswith("projections.") and n.endswith("weight")
        )
        inputs = [weights[name].shape[1] for name in several] or [len(weights["mean"])]
        # Settings may declare any size: nothing of it is allocated before the weights have it too.
        with torch.device("meta"):
            autoencoder = self._new_autoencoder(inputs)
        load_module_(autoencoder, weights)
        return autoencoder
