"""RQ-VAE: residual codebooks inside an autoencoder, learnt by gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from semid.errors import UsageError
from semid.tokenizers.context import level_sizes
from semid.tokenizers.neural.codebook import UpdateRule
from semid.tokenizers.neural.quantizers import Quantizer, ResidualQuantizer
from semid.tokenizers.neural.tokenizer import Network, NeuralTokenizer
from semid.training.loggers import Logger
from semid.training.options import TrainOptions

__all__ = ["RQVAE"]


class RQVAE(NeuralTokenizer):
    """Encoder, residual levels with a straight-through estimator, decoder; codebooks by gradient.

    The baseline of both papers, without anything that keeps codes alive: it may collapse, and the
    verdict says so. Use `RQPVAE` where it does.

    Args:
        levels: codes an item.
        codebook_size: codewords a level (2 to 2**32), or one number a level.
        seed: any integer.
        network: shape and losses of the autoencoder.
        training: how it is trained.
        normalize: scale (centred) rows to unit length first.
        center: subtract the training mean first.
        beam_width: partial codes kept while encoding; 1 is greedy.
        validation_fraction: share of the items held out by a hash of their id, in [0, 1).
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.
        threads: plain threads for K-means and encoding; results do not depend on it.
        logger: told the figures of every epoch.

    Raises:
        UsageError: if a value is out of range.

    Source: MoC §2, DRQ §3; loss ``|x - x_hat|^2 + beta sum_l |sg[q_l] - r_l|^2 +
    sum_l |q_l - sg[r_l]|^2``. A step costs the autoencoder's products and, a level,
    O(batch codes latent).
    """

    kind: ClassVar[str] = "rqvae"
    hierarchical: ClassVar[bool] = True

    def __init__(
        self,
        *,
        levels: int = 3,
        codebook_size: int | Sequence[int] = 256,
        seed: int = 0,
        network: Network | Mapping[str, Any] | None = None,
        training: TrainOptions | Mapping[str, Any] | None = None,
        normalize: bool = False,
        center: bool = False,
        beam_width: int = 1,
        validation_fraction: float = 0.05,
        device: str = "auto",
        threads: int | None = None,
        logger: Logger | None = None,
    ) -> None:
        super().__init__(
            sizes=level_sizes(levels, codebook_size),
            seed=seed,
            network=network,
            training=training,
            normalize=normalize,
            center=center,
            validation_fraction=validation_fraction,
            device=device,
            threads=threads,
            logger=logger,
        )
        if beam_width < 1:
            raise UsageError(f"beam_width={beam_width}: give at least 1")
        self.beam_width = int(beam_width)

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            "levels": self.levels,
            "codebook_size": list(self.codebook_sizes),
            "beam_width": self.beam_width,
            **super().settings,
        }

    def _quantizer(self, latent: int) -> Quantizer:
        rule = UpdateRule(kind="gradient", revive_below=0.0)
        return ResidualQuantizer(self.codebook_sizes, latent, rule=rule, seed=self.seed)
