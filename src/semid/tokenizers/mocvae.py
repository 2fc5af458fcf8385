"""Mixture-of-Codes: parallel codebooks that all quantize the same latent (MoC §4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from semid.tokenizers.context import level_sizes
from semid.tokenizers.neural.codebook import UpdateRule
from semid.tokenizers.neural.quantizers import ParallelQuantizer, Quantizer
from semid.tokenizers.neural.tokenizer import Network, NeuralTokenizer
from semid.training.loggers import Logger
from semid.training.options import TrainOptions

__all__ = ["MoCVAE"]


class MoCVAE(NeuralTokenizer):
    """One encoder, several codebooks beside each other; the decoder sees the mean codeword.

    Codes are parallel: each codebook describes the whole item, and a shared first code means no
    more than a shared last one.

    Args:
        n_codebooks: codes an item.
        codebook_size: codewords a codebook (2 to 2**32), or one number a codebook.
        seed: any integer; each codebook's K-means start has a child seed of its own.
        rule: ``ema``: each codebook follows the mean of the latents it was given (MoC §2, "in
            practice"); ``gradient``: all are fitted jointly through their average.
        ema_decay: of the moving averages, in (0, 1).
        revive_below: share of an even filling below which a code is put on a latent of the current
            batch, in [0, 1); 0 never revives (ours: 0.1).
        projection: a learned linear map of the latent for each codebook (ours, after the paper's
            "various spaces"; off in the paper's equations).
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

    Source: MoC §4.1, eq. 7: ``z_q = mean_i q_i``, ``q_i`` the codeword of codebook i nearest to z.
    """

    kind: ClassVar[str] = "mocvae"
    hierarchical: ClassVar[bool] = False

    def __init__(
        self,
        *,
        n_codebooks: int = 3,
        codebook_size: int | Sequence[int] = 256,
        seed: int = 0,
        rule: str = "ema",
        ema_decay: float = 0.99,
        revive_below: float = 0.1,
        projection: bool = False,
        network: Network | Mapping[str, Any] | None = None,
        training: TrainOptions | Mapping[str, Any] | None = None,
        normalize: bool = False,
        center: bool = False,
        validation_fraction: float = 0.05,
        device: str = "auto",
        threads: int | None = None,
        logger: Logger | None = None,
    ) -> None:
        self.rule = UpdateRule(kind=rule, decay=ema_decay, revive_below=revive_below)
        self.projection = bool(projection)
        super().__init__(
            sizes=level_sizes(n_codebooks, codebook_size, name="n_codebooks"),
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

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            "n_codebooks": self.levels,
            "codebook_size": list(self.codebook_sizes),
            "rule": self.rule.kind,
            "ema_decay": self.rule.decay,
            "revive_below": self.rule.revive_below,
            "projection": self.projection,
            **super().settings,
        }

    def _quantizer(self, latent: int) -> Quantizer:
        return ParallelQuantizer(
            self.codebook_sizes,
            latent,
            rule=self.rule,
            seed=self.seed,
            projection=self.projection,
        )
