"""DRQ-VAE: a continuous autoencoder first, residual K-means on its frozen latents after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Unpack

from semid.quantization.kmeans import KMeansOptions
from semid.tokenizers.context import FitContext, level_sizes
from semid.tokenizers.levels import fit_levels
from semid.tokenizers.neural.continuous import ContinuousTokenizer, Objective
from semid.tokenizers.neural.quantized import LatentBlocks
from semid.tokenizers.neural.tokenizer import NeuralOptions, PreparedRows
from semid.training.stages import Stages

__all__ = ["DRQVAE"]

WIDEST = 256


class DRQVAE(ContinuousTokenizer):
    """Representation and quantization decoupled; with pairs, "DRQ-VAE+CL".

    Args:
        levels: codes an item.
        codebook_size: codewords a level (2 to 2**32), or one number a level.
        beam_width: partial codes kept while encoding; 1 is greedy.
        contrastive_weight: lambda of InfoNCE on pairs given to `fit`, 0 or more (ours: 0.1 is a
            good start); 0 learns from embeddings alone.
        temperature: of InfoNCE, above 0 (ours: 0.07).
        pairs_per_step: pairs a step, at least 2.
        uniformity_weight: of the uniformity loss on the pairs' latents, 0 or more.
        kl_weight: of a KL term, 0 or more; the paper's loss has none.
        kmeans: how K-means runs at each level.
        **options: what every neural tokenizer takes, see
            `semid.tokenizers.neural.tokenizer.NeuralOptions`: ``seed``, ``network``, ``training``,
            ``normalize``, ``center``, ``validation_fraction``, ``device``, ``threads``, ``logger``.
            ``latent`` 0 of the network takes 256 or the input's width, whichever is smaller (ours);
            its pre-training and commitment do not apply.

    Raises:
        UsageError: if a value is out of range.

    Source: DRQ §4.1 (``L_rec + lambda L_CL``) and §4.2 (hierarchical K-means on the latents).
    """

    kind: ClassVar[str] = "drqvae"
    hierarchical: ClassVar[bool] = True

    def __init__(
        self,
        *,
        levels: int = 3,
        codebook_size: int | Sequence[int] = 256,
        beam_width: int = 1,
        contrastive_weight: float = 0.0,
        temperature: float = 0.07,
        pairs_per_step: int = 512,
        uniformity_weight: float = 0.0,
        kl_weight: float = 0.0,
        kmeans: KMeansOptions | Mapping[str, Any] | None = None,
        **options: Unpack[NeuralOptions],
    ) -> None:
        self.kmeans = KMeansOptions.of(kmeans)
        super().__init__(
            sizes=level_sizes(levels, codebook_size),
            beam_width=beam_width,
            objective=Objective(
                contrastive_weight=contrastive_weight,
                temperature=temperature,
                pairs_per_step=pairs_per_step,
                uniformity_weight=uniformity_weight,
                kl_weight=kl_weight,
            ),
            **options,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            "levels": self.levels,
            "codebook_size": list(self.codebook_sizes),
            "beam_width": self.beam_width,
            **super().settings,
            **asdict(self.objective),
            "kmeans": asdict(self.kmeans),
        }

    def _latent_width(self, dim: int) -> int:
        return self.network.latent or min(WIDEST, dim)

    def _fit(self, context: FitContext) -> dict[str, Any]:
        prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
        stages = Stages(context.checkpoint)
        autoencoder, details = self._trained(prepared, context, stages)
        encoder = autoencoder.exact_encoder()
        latents = LatentBlocks(
            prepared.train.blocks,
            lambda x: encoder(x, threads=self.threads),
            self._latent_width(prepared.train.dim),
        )
        self._prepared, levels = fit_levels(
            latents,
            self.codebook_sizes,
            seed=self.seed,
            options=self.kmeans,
            weights=context.weights,
            threads=self.threads,
            store=stages.stage("kmeans"),
            progress=context.progress,
        )
        self._preprocess = prepared.preprocess
        self._set_autoencoder(autoencoder)
        protocol = "no pairs" if context.behavior is None else context.behavior.train.protocol
        return {
            "training": details,
            "levels": levels,
            "protocol": protocol,
        }
