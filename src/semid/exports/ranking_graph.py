"""The whole ranking model as one graph, raw row numbers in, probability out."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from semid.exports.encoders import write_onnx_graph, write_program
from semid.output import atomic_file
from semid.recommenders.ranking.ranker import Ranker
from semid.recommenders.ranking.schema import Inputs, Schema


def input_names(schema: Schema) -> list[str]:
    """Return the names of the graph's inputs, in order.

    ``user`` and ``item`` are int64 ``(batch,)`` rows of the vocabularies (0 is unknown). Models
    that use them have also ``context`` int64 ``(batch, columns)``, ``dense`` float32
    ``(batch, columns)`` and ``history`` int64 ``(batch, length)``.
    """
    return list(_example(schema))


def _example(schema: Schema) -> dict[str, Tensor]:
    """Return a batch of inputs to trace the graph with."""
    batch = 3  # neither 0 nor 1, which the exporter would take for a constant
    inputs = {name: torch.zeros(batch, dtype=torch.int64) for name in ("user", "item")}
    widths = (len(schema.context), len(schema.dense), schema.history)
    for name, width in zip(("context", "dense", "history"), widths, strict=True):
        if width:
            dtype = torch.float32 if name == "dense" else torch.int64
            inputs[name] = torch.zeros((batch, width), dtype=dtype)
    return inputs


class RankingGraph(nn.Module):
    """Probabilities ``(batch,)`` from the tensors that `input_names` lists.

    Codes and item attributes are gathered inside, so a server sends item rows alone.
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


def _dynamic(schema: Schema) -> tuple[tuple[dict[int, torch.export.Dim], ...]]:
    """Declare the batch of every input as of any size."""
    batch = torch.export.Dim("batch")
    return (tuple({0: batch} for _ in input_names(schema)),)


def write_torch_export(
    path: str | os.PathLike[str], *, ranker: Ranker, overwrite: bool = False
) -> None:
    """Write a ``.pt2`` file.

    ``torch.export.load(path).module()(user, item, ...)`` gives probabilities.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is false.
    """
    schema = ranker.schema
    with atomic_file(path, overwrite=overwrite) as work:
        write_program(
            work, RankingGraph(ranker), tuple(_example(schema).values()), dynamic=_dynamic(schema)
        )


def write_onnx(path: str | os.PathLike[str], *, ranker: Ranker, overwrite: bool = False) -> None:
    """Write the model as one ``.onnx`` file with a dynamic batch, output ``probability``.

    Raises:
        MissingExtraError: without onnx and onnxscript.
        OutputExistsError: ``path`` exists and ``overwrite`` is false.
    """
    schema = ranker.schema
    with atomic_file(path, overwrite=overwrite) as work:
        write_onnx_graph(
            work,
            RankingGraph(ranker),
            tuple(_example(schema).values()),
            inputs=input_names(schema),
            output="probability",
            dynamic=_dynamic(schema),
        )
