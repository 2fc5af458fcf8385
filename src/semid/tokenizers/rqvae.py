"""RQ-VAE: residual codebooks inside an autoencoder, learned by gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from semid.tokenizers.context import level_sizes
from semid.tokenizers.neural.codebook import UpdateRule
from semid.tokenizers.neural.options import NeuralOptions
from semid.tokenizers.neural.quantized import QuantizedTokenizer
from semid.tokenizers.neural.quantizers import Quantizer, ResidualQuantizer

__all__ = ["RQVAE"]


class RQVAE(QuantizedTokenizer):
    """Encoder, residual levels with a straight-through estimator, decoder; codebooks by gradient.

    The baseline of both papers, without anything that keeps codes alive: it may collapse, and the
    verdict says so. Use `RQPVAE` where it does.

    Args:
        levels: codes an item.
        codebook_size: codewords a level (2 to 2**32), or one number a level.
        beam_width: partial codes kept while encoding; 1 is greedy.
        **options: what every neural tokenizer takes, see
            `semid.tokenizers.neural.options.NeuralOptions`: ``seed``, ``network``, ``training``,
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
