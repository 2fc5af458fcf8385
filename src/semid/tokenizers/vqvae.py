"""VQ-VAE: one codebook inside an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from semid.tokenizers.mocvae import MoCVAE
from semid.tokenizers.neural.tokenizer import Network
from semid.training.loggers import Logger
from semid.training.options import TrainOptions

__all__ = ["VQVAE"]


class VQVAE(MoCVAE):
    """One code an item: the 1x point of every Mixture-of-Codes curve, and what many embeddings use.

    It is `MoCVAE` with one codebook.

    Args:
        codebook_size: codewords (2 to 2**32).
        seed: any integer.
        rule: ``ema`` (moving averages) or ``gradient``.
        ema_decay: of the moving averages, in (0, 1).
        revive_below: share of an even filling below which a code is revived; 0 never.
        network: shape and losses of the autoencoder.
        training: how it is trained.
        normalize: scale (centred) rows to unit length first.
        center: subtract the training mean first.
        validation_fraction: share of the items held out by a hash of their id, in [0, 1).
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.
        threads: plain threads for K-means and encoding; results do not depend on it.
        logger: told the figures of every epoch.

    Raises:
        UsageError: if a value is out of range.

    Source: van den Oord 2017; MoC §2: ``|x - x_hat|^2 + beta |sg[q] - z|^2 (+ |q - sg[z]|^2)``.
    """

    kind: ClassVar[str] = "vqvae"

    def __init__(
        self,
        *,
        codebook_size: int = 256,
        seed: int = 0,
        rule: str = "ema",
        ema_decay: float = 0.99,
        revive_below: float = 0.1,
        network: Network | Mapping[str, Any] | None = None,
        training: TrainOptions | Mapping[str, Any] | None = None,
        normalize: bool = False,
        center: bool = False,
        validation_fraction: float = 0.05,
        device: str = "auto",
        threads: int | None = None,
        logger: Logger | None = None,
    ) -> None:
        super().__init__(
            n_codebooks=1,
            codebook_size=codebook_size,
            seed=seed,
            rule=rule,
            ema_decay=ema_decay,
            revive_below=revive_below,
            network=network,
            training=training,
            normalize=normalize,
            center=center,
            validation_fraction=validation_fraction,
            device=device,
            threads=threads,
            logger=logger,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        inherited = super().settings
        del inherited["n_codebooks"], inherited["projection"]
        return {**inherited, "codebook_size": self.codebook_sizes[0]}
