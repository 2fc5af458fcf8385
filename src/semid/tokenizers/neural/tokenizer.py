"""What neural tokenizers share: training, exact encoding, their arrays in an artefact."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import UsageError, check_choice
from semid.quantization.assign import assign
from semid.quantization.blocks import Blocks, PreparedBlocks, Preprocess
from semid.quantization.nearest import PreparedCodebook, prepare
from semid.quantization.residual import ResidualCodes, dequantize, encode_residual
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import Autoencoder
from semid.tokenizers.neural.codebook import Codebook
from semid.tokenizers.neural.initialise import LatentBlocks, initialise_
from semid.tokenizers.neural.model import QuantizedAutoencoder, ReconstructionTrainee
from semid.tokenizers.neural.quantizers import ParallelQuantizer, Quantizer
from semid.tokenizers.neural.rowwise import perceptron
from semid.training.loggers import Logger
from semid.training.loop import train
from semid.training.options import TrainOptions
from semid.training.rows import TrainingRows
from semid.training.stages import Stages

__all__ = ["DEVICES", "LATENT", "Network", "NeuralTokenizer", "PreparedRows", "pick_device"]

Array = npt.NDArray[np.float32]
DEVICES = ("auto", "cpu", "cuda")
LATENT = 32


@dataclass(frozen=True, kw_only=True)
class Network:
    """Shape and losses of the autoencoder.

    Attributes:
        latent: width of the latent; 0 takes the tokenizer's own choice (32, DRQ-VAE 256).
        hidden: widths of the encoder's hidden layers, mirrored by the decoder (MoC §4.1).
        commitment_weight: beta, 0 or more (the papers' equations have 1; 0.25 is ours).
        pretrain_epochs: epochs of the autoencoder alone, before K-means over its latents starts
            the codebooks (ours); 0 starts them from the untrained encoder.
    """

    latent: int = 0
    hidden: tuple[int, ...] = (512, 256, 128)
    commitment_weight: float = 0.25
    pretrain_epochs: int = 5

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UsageError: listing every value out of range.
        """
        object.__setattr__(self, "hidden", tuple(int(width) for width in self.hidden))
        problems = []
        if self.latent < 0:
            problems.append(f"latent={self.latent}: give at least 1, or 0 for the default")
        if any(width < 1 for width in self.hidden):
            problems.append(f"hidden={self.hidden}: give widths of at least 1")
        if not 0 <= self.commitment_weight < float("inf"):
            problems.append(f"commitment_weight={self.commitment_weight}: give 0 or more")
        if self.pretrain_epochs < 0:
            problems.append(f"pretrain_epochs={self.pretrain_epochs}: give 0 or more")
        if problems:
            raise UsageError("; ".join(problems))


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
                blocks if preprocess.identity else PreparedBlocks(blocks, preprocess)
            )

        train = ready(context.train)
        held = None if context.held_out is None else ready(context.held_out)
        mean, squares = np.zeros(train.dim), 0.0
        for _, block in train.blocks.blocks():
            mean += block.sum(axis=0, dtype=np.float64)
            squares += float(np.einsum("nd,nd->", block, block, dtype=np.float64))
        mean /= len(train)
        variance = max(squares / len(train) - float(mean @ mean), 0.0)
        return cls(preprocess, train, held, mean, variance)


class NeuralTokenizer(Tokenizer):
    """Base of tokenizers with a quantizer inside an autoencoder.

    A subclass names its quantizer; everything else is here.

    Args:
        sizes: codewords of each level or codebook.
        seed: any integer.
        network: shape and losses of the autoencoder.
        training: how it is trained.
        normalize: scale (centred) rows to unit length first.
        center: subtract the training mean first.
        validation_fraction: share of the items held out by a hash of their id, in [0, 1).
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``; encoding is on the CPU.
        threads: plain threads for K-means and encoding; results do not depend on it.
        logger: told the figures of every epoch; it stays the caller's to close.
    """

    def __init__(
        self,
        *,
        sizes: tuple[int, ...],
        seed: int,
        network: Network | Mapping[str, Any] | None,
        training: TrainOptions | Mapping[str, Any] | None,
        normalize: bool,
        center: bool,
        validation_fraction: float,
        device: str,
        threads: int | None,
        logger: Logger | None,
    ) -> None:
        super().__init__()
        self.codebook_sizes = sizes
        if not 0 <= validation_fraction < 1:
            raise UsageError(f"validation_fraction={validation_fraction}: give a share in [0, 1)")
        self.seed = int(seed)
        self.network = network if isinstance(network, Network) else Network(**(network or {}))
        self.training = (
            training if isinstance(training, TrainOptions) else TrainOptions(**(training or {}))
        )
        self.normalize, self.center = bool(normalize), bool(center)
        self.validation_fraction = float(validation_fraction)
        self.device = check_choice("device", device, DEVICES)
        self.threads, self.logger = threads, logger
        self._preprocess = Preprocess(normalize=normalize)
        self._prepared: tuple[PreparedCodebook, ...] = ()
        self._maps: tuple[Array, ...] = ()
        self._autoencoder: Autoencoder | None = None

    @abstractmethod
    def _quantizer(self, latent: int) -> Quantizer:
        """Make the quantizer, its codebooks still empty."""

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

    def _fit(self, context: FitContext) -> dict[str, Any]:
        prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
        device = pick_device(self.device)
        autoencoder = self._new_autoencoder(context.inputs)
        autoencoder.standardize_(prepared.mean, prepared.variance)
        model = QuantizedAutoencoder(
            autoencoder,
            self._quantizer(self._latent_width(autoencoder.dim)),
            commitment_weight=self.network.commitment_weight,
        ).to(device)

        def initialise() -> None:
            encoder = autoencoder.exact_encoder()
            initialise_(
                model.quantizer,
                LatentBlocks(
                    prepared.train.blocks,
                    lambda x: encoder(x, threads=self.threads),
                    self._latent_width(autoencoder.dim),
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
            initialise=initialise,
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

    def _take(self, model: QuantizedAutoencoder) -> None:
        """Keep what encoding and decoding need."""
        books = [book for book in model.quantizer.books if isinstance(book, Codebook)]
        self._prepared = tuple(prepare(book.codewords.detach().cpu()) for book in books)
        if isinstance(model.quantizer, ParallelQuantizer):
            self._maps = tuple(
                parameter.detach().cpu().numpy().T.copy()
                for parameter in model.quantizer.maps.parameters()
            )
        self._set_autoencoder(model.autoencoder.cpu())

    def _set_autoencoder(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self._encoder, self._decoder = autoencoder.exact_encoder(), autoencoder.exact_decoder()

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        z = self._encoder(self._preprocess.apply(x), threads=self.threads)
        if self.hierarchical:
            return encode_residual(z, self._prepared, beam_width=beam_width, threads=self.threads)
        spaces = self._spaces(z)
        codes = np.empty((len(z), self.levels), dtype=np.int64)
        for level, (space, book) in enumerate(zip(spaces, self._prepared, strict=True)):
            codes[:, level], _ = assign(space, book, threads=self.threads)
        left = self._middle(spaces) - self._quantize_codes(codes)
        norms = np.sqrt(np.einsum("nd,nd->n", left, left, dtype=np.float64))
        return ResidualCodes(codes, norms.astype(np.float32))

    def _spaces(self, z: Array) -> list[Array]:
        """Return what each parallel codebook is given."""
        if not self._maps:
            return [z] * self.levels
        still = np.zeros(z.shape[1], dtype=np.float32)
        return [perceptron(z, [(each, still)], threads=self.threads) for each in self._maps]

    def _middle(self, spaces: list[Array]) -> Array:
        if not self._maps:
            return spaces[0]
        total = spaces[0]
        for space in spaces[1:]:
            total = total + space
        return total / np.float32(len(spaces))

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

    def _quantize_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        total = dequantize(codes, self._codebooks())
        return total if self.hierarchical else total / np.float32(self.levels)

    def _latent_block(self, x: Array) -> Array:
        z = self._encoder(self._preprocess.apply(x), threads=self.threads)
        return z if self.hierarchical or not self._maps else self._middle(self._spaces(z))

    def _codebooks(self) -> tuple[Array, ...]:
        return tuple(book.codewords.numpy() for book in self._prepared)

    def _tensors(self) -> dict[str, np.ndarray]:
        assert self._autoencoder is not None
        tensors = {
            f"autoencoder.{name}": tensor.detach().numpy()
            for name, tensor in self._autoencoder.state_dict().items()
        }
        tensors |= {f"codebooks.{i}": book for i, book in enumerate(self._codebooks())}
        tensors |= {f"maps.{i}": each for i, each in enumerate(self._maps)}
        if self._preprocess.mean is not None:
            tensors["preprocess.mean"] = self._preprocess.mean
        return tensors

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        prefix = "autoencoder."
        own = {
            name.removeprefix(prefix): torch.from_numpy(np.array(array))
            for name, array in tensors.items()
            if name.startswith(prefix)
        }
        several = sorted(n for n in own if n.startswith("projections.") and n.endswith("weight"))
        inputs = [own[name].shape[1] for name in several] or [len(own["mean"])]
        autoencoder = self._new_autoencoder(inputs)
        autoencoder.load_state_dict(own)
        self._set_autoencoder(autoencoder)
        self._preprocess = Preprocess(
            mean=tensors["preprocess.mean"] if self.center else None, normalize=self.normalize
        )
        self._prepared = tuple(
            prepare(torch.from_numpy(tensors[f"codebooks.{i}"])) for i in range(self.levels)
        )
        found = sum(name.startswith("maps.") for name in tensors)
        self._maps = tuple(np.ascontiguousarray(tensors[f"maps.{i}"]) for i in range(found))


def pick_device(wanted: str) -> torch.device:
    """Return the device to train on.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("device='cuda': no CUDA device was found; give device='cpu' or 'auto'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
