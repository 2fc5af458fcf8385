"""Tokenizers whose codebooks are trained together with the autoencoder, inside its loop."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from semid.quantization.nearest import prepare
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.codebook import Codebook
from semid.tokenizers.neural.initialize import LatentBlocks, initialize_
from semid.tokenizers.neural.model import QuantizedAutoencoder, ReconstructionTrainee
from semid.tokenizers.neural.options import pick_device
from semid.tokenizers.neural.quantizers import Quantizer
from semid.tokenizers.neural.rows import PreparedRows
from semid.tokenizers.neural.tokenizer import NeuralTokenizer
from semid.training.loop import train
from semid.training.stages import Stages

__all__ = ["QuantizedTokenizer"]


class QuantizedTokenizer(NeuralTokenizer):
    """Base of tokenizers with a quantizer inside the autoencoder; a subclass names it."""

    @abstractmethod
    def _quantizer(self, latent: int) -> Quantizer:
        """Make the quantizer, its codebooks still empty."""

    def _fit(self, context: FitContext) -> dict[str, Any]:
        prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
        device = pick_device(self.device)
        autoencoder = self._new_autoencoder(context.inputs)
        autoencoder.standardize_(prepared.mean, prepared.variance)
        latent = self._latent_width(autoencoder.dim)
        model = QuantizedAutoencoder(
            autoencoder,
            self._quantizer(latent),
            commitment_weight=self.network.commitment_weight,
        ).to(device)

        def initialize() -> None:
            encoder = autoencoder.exact_encoder()
            initialize_(
                model.quantizer,
                LatentBlocks(
                    prepared.train.blocks, lambda x: encoder(x, threads=self.threads), latent
                ),
                seed=self.seed,
                batch=self.training.batch_size,
                weights=context.weights,
                threads=self.threads,
            )

        trainee = ReconstructionTrainee(
            model,
            prepared.train,
            prepared.held_out,
            self.training,
            seed=self.seed,
            weights=context.weights,
            pretrain=min(self.network.pretrain_epochs, self.training.epochs - 1),
            initialize=initialize,
            device=device,
        )
        result = train(
            trainee,
            self.training,
            seed=self.seed,
            progress=context.progress,
            store=Stages(context.checkpoint).stage("train"),
            log=self.logger,
        )
        self._preprocess = prepared.preprocess
        self._take(model)
        return {"training": result.to_dict()}

    def _take(self, model: QuantizedAutoencoder) -> None:
        """Keep what encoding and decoding need."""
        books = [book for book in model.quantizer.books if isinstance(book, Codebook)]
        self._prepared = tuple(prepare(book.codewords.detach().cpu()) for book in books)
        self._set_autoencoder(model.autoencoder)
