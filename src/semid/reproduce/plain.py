"""RQ-VAE as the DRQ paper describes it: a baseline that can collapse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from semid.seeds import torch_generator
from semid.tokenizers.neural.quantized import QuantizedAutoencoder, ReconstructionTask
from semid.tokenizers.neural.tokenizer import RowsTask
from semid.tokenizers.vqvae import RQVAE
from semid.training.loop import Evaluation, TrainResult


class LastEpochTask(ReconstructionTask):
    """Reconstruction whose last epoch is returned, whatever its error and its usage."""

    def evaluate(self, epoch: int) -> Evaluation:
        """Return an evaluation that is better than those of all epochs before."""
        usual = super().evaluate(epoch)
        logs = {**usual.logs, "relative_error": usual.score}
        return replace(usual, score=float(epoch), higher_is_better=True, healthy=True, logs=logs)


@dataclass(kw_only=True, eq=False, repr=False)
class PlainRQVAE(RQVAE):
    """RQ-VAE with a random start, no pre-training, and the last epoch.

    The paper prints no start; codewords uniform in ``[-1/K, 1/K]``, as in the authors' code of
    VQ-VAE, are ours.
    """

    def _train(
        self, task: type[RowsTask], model: nn.Module, *arguments: Any, **options: Any
    ) -> TrainResult:
        assert isinstance(model, QuantizedAutoencoder)
        start: Callable[[], None] = lambda: self._start_codebooks(model)  # noqa: E731
        options |= {"pretrain": 0, "initialize": start}
        return super()._train(LastEpochTask, model, *arguments, **options)

    def _start_codebooks(self, model: QuantizedAutoencoder) -> None:
        for level, codebook in enumerate(model.quantizer.codebooks):
            size, width = codebook.codewords.shape
            generator = torch_generator(self.seed, "random start", level)
            codewords = (2 * torch.rand(size, width, generator=generator) - 1) / size
            shares = torch.full((size,), 1 / size)
            codebook.initialize_(codewords, shares, batch=self._train_options.batch_size)
