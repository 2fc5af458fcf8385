"""VQ-VAE: one codebook inside an autoencoder."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from semid.tokenizers.context import level_sizes
from semid.tokenizers.neural.codebook import UpdateRule
from semid.tokenizers.neural.options import NeuralOptions
from semid.tokenizers.neural.parallel import ParallelTokenizer

__all__ = ["VQVAE"]


class VQVAE(ParallelTokenizer):
    """One code an item: the 1x point of every Mixture-of-Codes curve, and what many embeddings use.

    It is `MoCVAE` with one codebook.

    Args:
        codebook_size: codewords (2 to 2**32).
        rule: ``ema`` (moving averages) or ``gradient``.
        ema_decay: of the moving averages, in (0, 1).
        revive_below: share of an even filling below which a code is revived; 0 never.
        **options: what every neural tokenizer takes, see
            `semid.tokenizers.neural.options.NeuralOptions`: ``seed``, ``network``, ``training``,
            ``normalize``, ``center``, ``validation_fraction``, ``device``, ``threads``, ``logger``.

    Raises:
        UsageError: if a value is out of range.

    Source: van den Oord 2017; MoC §2: ``|x - x_hat|^2 + beta |sg[q] - z|^2 (+ |q - sg[z]|^2)``.
    """

    kind: ClassVar[str] = "vqvae"

    def __init__(
        self,
        *,
        codebook_size: int = 256,
        rule: str = "ema",
        ema_decay: float = 0.99,
        revive_below: float = 0.1,
        **options: Unpack[NeuralOptions],
    ) -> None:
        super().__init__(
            sizes=level_sizes(1, codebook_size),
            rule=UpdateRule(kind=rule, decay=ema_decay, revive_below=revive_below),
            projection=False,
            **options,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {"codebook_size": self.codebook_sizes[0], **super().settings}
