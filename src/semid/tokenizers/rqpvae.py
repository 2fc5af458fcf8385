"""RQP-VAE: RQ-VAE whose codewords are moving averages and whose dead codes are revived."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from semid.tokenizers.neural.codebook import UpdateRule
from semid.tokenizers.neural.options import ResidualOptions
from semid.tokenizers.neural.quantizers import Quantizer, ResidualQuantizer
from semid.tokenizers.rqvae import RQVAE

__all__ = ["RQPVAE"]


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
