"""What tokenizers share whose encoder is trained first, without a quantizer in the loop."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from semid.data.ids import ItemIds
from semid.errors import UsageError
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import Autoencoder
from semid.tokenizers.neural.behavior import read_behavior
from semid.tokenizers.neural.decoupled import (
    ContinuousAutoencoder,
    ContinuousTrainee,
    Objective,
)
from semid.tokenizers.neural.options import NeuralOptions, pick_device
from semid.tokenizers.neural.pairs import Behavior
from semid.tokenizers.neural.rows import PreparedRows
from semid.tokenizers.neural.tokenizer import NeuralTokenizer
from semid.training.loop import train
from semid.training.stages import Stages
from semid.training.state import load_module_, module_arrays

__all__ = ["ContinuousTokenizer"]


class ContinuousTokenizer(NeuralTokenizer):
    """Base of tokenizers that freeze a continuous encoder before they quantize (DRQ §4.1).

    Args:
        sizes: codewords of each level.
        beam_width: partial codes kept while encoding; 1 is greedy.
        objective: losses beside reconstruction.
        **options: as for every neural tokenizer.
    """

    def __init__(
        self,
        *,
        sizes: tuple[int, ...],
        beam_width: int,
        objective: Objective,
        **options: Unpack[NeuralOptions],
    ) -> None:
        self.objective = objective
        super().__init__(sizes=sizes, beam_width=beam_width, **options)

    @property
    def needs_behavior(self) -> bool:
        """Whether a loss is over pairs."""
        return self.objective.needs_pairs

    def _behavior(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behavior | None:
        given = interactions is not None or pairs is not None
        if given and not self.needs_behavior:
            raise UsageError(
                "interactions or pairs were given and contrastive_weight=0, so they would not be "
                "used; set --contrastive-weight (contrastive_weight), for example 0.1"
            )
        if self.needs_behavior and not given:
            raise UsageError(
                f"contrastive_weight={self.objective.contrastive_weight:g} needs pairs to learn "
                "from; give --interactions or --pairs (interactions=, pairs=)"
            )
        return read_behavior(interactions, pairs, ids=ids, train=train, threads=self.threads)

    def _trained(
        self, prepared: PreparedRows, context: FitContext, stages: Stages
    ) -> tuple[Autoencoder, dict[str, Any]]:
        """Return the trained autoencoder and a record of its training, as stage ``train``."""
        autoencoder = self._new_autoencoder(context.inputs)
        autoencoder.standardize_(prepared.mean, prepared.variance)
        model = ContinuousAutoencoder(autoencoder, self.objective)
        kept = stages.finished("train")
        if kept is not None:
            load_module_(model, kept[0])
            return autoencoder, kept[1]
        details = self._train(model, prepared, context, stages)
        stages.finish("train", module_arrays(model), details)
        return autoencoder, details

    def _train(
        self,
        model: ContinuousAutoencoder,
        prepared: PreparedRows,
        context: FitContext,
        stages: Stages,
    ) -> dict[str, Any]:
        device = pick_device(self.device)
        model.to(device)
        trainee = ContinuousTrainee(
            model,
            prepared.train,
            prepared.held_out,
            context.behavior,
            self.training,
            seed=self.seed,
            weights=context.weights,
            device=device,
        )
        result = train(
            trainee,
            self.training,
            seed=self.seed,
            progress=context.progress,
            store=stages.stage("train"),
            log=self.logger,
        )
        model.cpu()
        return result.to_dict()
