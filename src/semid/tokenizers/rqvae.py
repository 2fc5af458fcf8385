"""RQ-VAE and RQP-VAE: residual codebooks inside an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from semid.tokenizers.context import level_sizes
from semid.tokenizers.neural.quantized import QuantizedTokenizer
from semid.tokenizers.neural.quantizers import Quantizer, ResidualQuantizer, UpdateRule
from semid.tokenizers.neural.tokenizer import NeuralOptions, ResidualOptions

__all__ = ["RQPVAE", "RQVAE"]


class RQVAE(QuantizedTokenizer):
    """Encoder, residual levels with a straight-through estimator, decoder; codebooks by gradient.

    The baseline of both papers, without anything that keeps codes alive: it may collapse, and the
    verdict says so. Use `RQPVAE` where it does.

    Args:
        levels: codes an item.
        codebook_size: codewords a level (2 to 2**32), or one number a level.
        beam_width: partial codes kept while encoding; 1 is greedy.
        **options: what every neural tokenizer takes, see
            `semid.tokenizers.neural.tokenizer.NeuralOptions`: ``seed``, ``network``, ``training``,
            ``normalize``, ``center``, ``validation_fraction``, ``device``, ``threads``, ``logger``.

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
        beam_width: int = 1,
        **options: Unpack[NeuralOptions],
    ) -> None:
        super().__init__(sizes=level_sizes(levels, codebook_size), beam_width=beam_width, **options)

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


class RQPVAE(RQVAE):
    """RQ-VAE with EMA codebook updates and dead-code revival: codes do not die.

    Args:
        ema_decay: of the moving averages, in (0, 1).
        revive_below: a code whose moving count falls below this share of an even filling is put
            on a residual of the current batch, in [0, 1); 0 never revives.
        **options: as for `RQVAE`.

    Raises:
        UsageError: if a value is out of range.

    Source: DRQ §5.1; moving averages with Laplace smoothing from van den Oord 2017, app. A.1.
    """

    kind: ClassVar[str] = "rqpvae"

    def __init__(
        self,
        *,
        ema_decay: float = 0.99,
        revive_below: float = 0.1,
        **options: Unpack[ResidualOptions],
    ) -> None:
        self.rule = UpdateRule(decay=ema_decay, revive_below=revive_below)
        super().__init__(**options)

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            **super().settings,
            "ema_decay": self.rule.decay,
            "revive_below": self.rule.revive_below,
        }

    def _quantizer(self, latent: int) -> Quantizer:
        return ResidualQuantizer(self.codebook_sizes, latent, rule=self.rule, seed=self.seed)
