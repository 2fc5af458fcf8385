"""DRQ-VAE: a continuous autoencoder first, residual K-means on its frozen latents after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from semid.options import MAX_WEIGHT, argument_types, option
from semid.quantization.kmeans import KMeansOptions
from semid.tokenizers.codebooks import fit_levels
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.continuous import ContinuousTokenizer, Objective

MAX_LATENT = 256


@dataclass(kw_only=True, eq=False, repr=False)
class DRQVAE(ContinuousTokenizer):
    """Representation and quantization decoupled; with pairs, "DRQ-VAE+CL".

    A ``latent`` of 0 in ``network`` takes 256 or the input's width, whichever is smaller (ours);
    the network's pre-training and commitment do not apply. The paper's loss has no KL term.

    Raises:
        UsageError: if a value is out of range.

    Source: DRQ §4.1 (``L_rec + lambda L_CL``) and §4.2 (hierarchical K-means on the latents).
    """

    kind: ClassVar[str] = "drqvae"
    behavior_weights: ClassVar[tuple[str, ...]] = ("contrastive_weight", "uniformity_weight")

    contrastive_weight: float = option(
        0.0,
        ge=0,
        le=MAX_WEIGHT,
        help="Weight lambda of InfoNCE on pairs (0.1 is a good start); 0 learns from embeddings "
        "alone.",
    )
    temperature: float = option(0.07, gt=0, le=MAX_WEIGHT, help="InfoNCE temperature.")
    pairs_per_step: int = option(512, ge=2, le=65_536, help="Pairs per training step.")
    uniformity_weight: float = option(
        0.0, ge=0, le=MAX_WEIGHT, help="Weight of the uniformity loss on the pairs' latents."
    )
    kl_weight: float = option(0.0, ge=0, le=MAX_WEIGHT, help="Weight of a KL term.")
    kmeans: KMeansOptions | Mapping[str, Any] | None = option(
        None, help="How K-means runs at each level."
    )

    def _objective(self) -> Objective:
        return Objective(**{name: getattr(self, name) for name in argument_types(Objective)})

    def _latent_width(self, dim: int) -> int:
        return self._config.latent or min(MAX_LATENT, dim)

    def _fit(self, context: FitContext) -> dict[str, Any]:
        prepared, training = self._train_autoencoder(context)
        books, levels = fit_levels(
            self._latents(prepared.train.blocks, self._encoder),
            self.codebook_sizes,
            seed=self.seed,
            options=KMeansOptions.of(self.kmeans),
            weights=context.weights,
            threads=self.threads,
            store=context.stages.stage("kmeans"),
            progress=context.progress,
        )
        self._set_codebooks(books)
        protocol = "no pairs" if context.behavior is None else context.behavior.train.protocol
        return {"training": training, "levels": levels, "protocol": protocol}
