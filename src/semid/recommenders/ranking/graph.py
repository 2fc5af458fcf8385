"""The whole ranking model as one graph, raw row numbers in, probability out."""

from __future__ import annotations

import logging
import os
import warnings

import torch
from torch import Tensor, nn

from semid.errors import MissingExtraError
from semid.output import atomic_file
from semid.recommenders.ranking.ranker import Ranker
from semid.recommenders.ranking.schema import Inputs, Schema


def input_names(schema: Schema) -> list[str]:
    """Return the names of the graph's inputs, in order.

    ``user`` and ``item`` are int64 ``(batch,)`` rows of the vocabularies (0 is unknown). Models
    that use them have also ``context`` int64 ``(batch, columns)``, ``dense`` float32
    ``(batch, columns)`` and ``history`` int64 ``(batch, length)``.
    """
    present = {
        "context": bool(schema.context),
        "dense": bool(schema.dense),
        "history": schema.history > 0,
    }
    return ["user", "item", *(name for name, used in present.items() if used)]


class RankingGraph(nn.Module):
    """Probabilities ``(batch,)`` from the tensors that `input_names` lists.

    Codes and item attributes are gathered inside, so a server sends item rows alone.

    Args:
        ranker: trained model.
    """

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.network = ranker.network.eval()
        self.names = input_names(ranker.schema)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Score a batch."""
        inputs = dict(zip(self.names, tensors, strict=True))
        # Inputs that the model does not read have no columns.
        empty = inputs["item"].new_zeros((inputs["item"].shape[0], 0))
        defaults = {"context": empty, "dense": empty.float(), "history": empty}
        return self.network.logits(Inputs(**{**defaults, **inputs})).sigmoid()


def _example(schema: Schema) -> tuple[Tensor, ...]:
    batch = 3  # neither 0 nor 1, which the exporter would take for a constant
    inputs = {
        "user": torch.zeros(batch, dtype=torch.int64),
        "item": torch.zeros(batch, dtype=torch.int64),
        "context": torch.zeros((batch, len(schema.context)), dtype=torch.int64),
        "dense": torch.zeros((batch, len(schema.dense))),
        "history": torch.zeros((batch, schema.history), dtype=torch.int64),
    }
    return tuple(inputs[name] for name in input_names(schema))


def _dynamic(schema: Schema) -> tuple[tuple[dict[int, torch.export.Dim], ...]]:
    batch = torch.export.Dim("batch")
    return (tuple({0: batch} for _ in input_names(schema)),)


def write_torch_export(
    path: str | os.PathLike[str], *, ranker: Ranker, overwrite: bool = False
) -> None:
    """Write the model; ``torch.export.load(path).module()(user, item, ...)`` gives probabilities.

    Args:
        path: file, usually ``.pt2``.
        ranker: trained model.
        overwrite: replace an existing file.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is false.
    """
    program = torch.export.export(
        RankingGraph(ranker), _example(ranker.schema), dynamic_shapes=_dynamic(ranker.schema)
    )
    with atomic_file(path, overwrite=overwrite) as work, work.open("wb") as file:
        torch.export.save(program, file)


def write_onnx(path: str | os.PathLike[str], *, ranker: Ranker, overwrite: bool = False) -> None:
    """Write the model as one ``.onnx`` file with a dynamic batch, output ``probability``.

    Args:
        path: file.
        ranker: trained model.
        overwrite: replace an existing file.

    Raises:
        MissingExtraError: without onnx and onnxscript.
        OutputExistsError: ``path`` exists and ``overwrite`` is false.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            error.name or "onnx", extra="onnx", purpose="the ONNX export"
        ) from None
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    with atomic_file(path, overwrite=overwrite) as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        exporter_log.setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                RankingGraph(ranker),
                _example(ranker.schema),
                str(work),
                input_names=input_names(ranker.schema),
                output_names=["probability"],
                dynamic_shapes=_dynamic(ranker.schema),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        finally:
            exporter_log.setLevel(level)
