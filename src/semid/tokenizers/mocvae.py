"""Mixture-of-Codes: parallel codebooks that all quantize the same latent (MoC §4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from semid.tokenizers.context import level_sizes
from semid.tokenizers.neural.codebook import UpdateRule
from semid.tokenizers.neural.options import NeuralOptions
from semid.tokenizers.neural.parallel import ParallelTokenizer

__all__ = ["MoCVAE"]


class MoCVAE(ParallelTokenizer):
    """One encoder, several codebooks beside each other; the decoder sees the mean codeword.

    Codes are parallel: each codebook describes the whole item, and a shared first code means no
    more than a shared last one.

    Args:
        n_codebooks: codes an item.
        codebook_size: codewords a codebook (2 to 2**32), or one number a codebook.
        rule: ``ema``: each codebook follows the mean of the latents it was given (MoC §2, "in
            practice"); ``gradient``: all are fitted jointly through their average.
        ema_decay: of the moving averages, in (0, 1).
        revive_below: share of an even filling below which a code is put on a latent of the current
            batch, in [0, 1); 0 never revives (ours: 0.1).
        projection: a learned linear map of the latent for each codebook (ours, after the paper's
            "various spaces"; off in the paper's equations).
        **options: what every neural tokenizer takes, see
            `semid.tokenizers.neural.options.NeuralOptions`: ``seed``, ``network``, ``training``,
            ``normalize``, ``center``, ``validation_fraction``, ``device``, ``threads``, ``logger``.
            Each codebook's K-means start has a child seed of its own.

    Raises:
        UsageError: if a value is out of range.

    Source: MoC §4.1, eq. 7: ``z_q = mean_i q_i``, ``q_i`` the codeword of codebook i nearest to z.
    """

    kind: ClassVar[str] = "mocvae"

    def __init__(
        self,
        *,
        n_codebooks: int = 3,
        codebook_size: int | Sequence[int] = 256,
        rule: str = "ema",
        ema_decay: float = 0.99,
        revive_below: float = 0.1,
        projection: bool = False,
        **options: Unpack[NeuralOptions],
    ) -> None:
        super().__init__(
            sizes=level_sizes(n_codebooks, codebook_size, name="n_codebooks"),
            rule=UpdateRule(kind=rule, decay=ema_decay, revive_below=revive_below),
            projection=bool(projection),
            **options,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            "n_codebooks": self.levels,
            "codebook_size": list(self.codebook_sizes),
            "projection": self.projection,
            **super().settings,
        }
