"""``torch.export``: the encoder graph as a ``.pt2`` file."""

from __future__ import annotations

import os

import torch

from semid.exports.graph import codes_graph
from semid.output import atomic_file
from semid.tokenizers.base import Tokenizer

__all__ = ["write_torch_export"]


def write_torch_export(
    path: str | os.PathLike[str], *, tokenizer: Tokenizer, overwrite: bool = False
) -> None:
    """Write the encoder; ``torch.export.load(path).module()(x)`` gives codes of rows ``(n, dim)``.

    Args:
        path: file; ``.pt2`` by custom.
        tokenizer: a fitted tokenizer.
        overwrite: replace an existing file.

    Raises:
        UsageError: if the tokenizer offers no graph.
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    graph = codes_graph(tokenizer)
    example = torch.zeros((2, tokenizer.dim))
    program = torch.export.export(
        graph, (example,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}
    )
    # Through an open file: given a name that does not end in .pt2, torch would warn.
    with atomic_file(path, overwrite=overwrite) as work, work.open("wb") as file:
        torch.export.save(program, file)
