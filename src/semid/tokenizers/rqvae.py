"""RQ-VAE and RQP-VAE: residual codebooks inside an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from semid.options import option
from semid.tokenizers.codebooks import ResidualTokenizer
from semid.tokenizers.neural.quantized import QuantizedTokenizer
from semid.tokenizers.neural.quantizers import ResidualQuantizer, UpdateRule


@dataclass(kw_only=True, eq=False, repr=False)
class RQVAE(ResidualTokenizer, QuantizedTokenizer):
    """Encoder, residual levels with a straight-through estimator, decoder; codebooks by gradient.

    The baseline of both papers, without anything that keeps codes alive: it may collapse, and the
    verdict says so. Use `RQPVAE` where it does.

    Raises:
        UsageError: if a value is out of range.

    Source: MoC §2, DRQ §3; loss ``|x - x_hat|^2 + beta sum_l |sg[q_l] - r_l|^2 +
    sum_l |q_l - sg[r_l]|^2``. A step costs the autoencoder's products and O(batch codes latent)
    per level.
    """

    kind: ClassVar[str] = "rqvae"

    def _update_rule(self) -> UpdateRule:
        return UpdateRule(kind="gradient", revive_below=0.0)

    def _quantizer(self, latent: int) -> ResidualQuantizer:
        rule = self._update_rule()
        return ResidualQuantizer(self.codebook_sizes, latent, rule=rule, seed=self.seed)


@dataclass(kw_only=True, eq=False, repr=False)
class RQPVAE(RQVAE):
    """RQ-VAE with EMA codebook updates and dead-code revival: codes do not die.

    Raises:
        UsageError: if a value is out of range.

    Source: DRQ §5.1; moving averages with Laplace smoothing from van den Oord 2017, app. A.1.
    """

    kind: ClassVar[str] = "rqpvae"

    ema_decay: float = option(0.99, gt=0, lt=1, help="Decay of the codewords' moving averages.")
    revive_below: float = option(
        0.1,
        ge=0,
        lt=1,
        help="Share of an even filling below which a code is moved to a residual of the current "
        "batch; 0 never revives.",
    )

    def _update_rule(self) -> UpdateRule:
        return UpdateRule(decay=self.ema_decay, revive_below=self.revive_below)
