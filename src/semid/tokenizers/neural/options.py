"""What every neural tokenizer can be told, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from semid.errors import UsageError
from semid.options import MAX_WIDTH, Options, option
from semid.training.distributed import local_rank
from semid.training.loggers import Logger
from semid.training.options import TrainOptions

__all__ = ["DEVICES", "Network", "NeuralOptions", "ResidualOptions", "pick_device"]

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
