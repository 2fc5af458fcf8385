"""ONNX: the encoder graph, input ``embeddings`` (batch, dim), output ``codes`` (batch, levels)."""

from __future__ import annotations

import logging
import os
import warnings

import torch

from semid.errors import MissingExtraError
from semid.exports.graph import codes_graph
from semid.output import atomic_file
from semid.tokenizers.base import Tokenizer

__all__ = ["write_onnx"]


def write_onnx(
    path: str | os.PathLike[str], *, tokenizer: Tokenizer, overwrite: bool = False
) -> None:
    """Write the encoder as one ``.onnx`` file with a dynamic batch.

    Codes equal those of ``tokenizer.encode`` but where two codewords are equally near to float32
    rounding; networks before the codebooks add in another order there than `encode` does, which can
    move such near-ties too.

    Args:
        path: file.
        tokenizer: a fitted tokenizer.
        overwrite: replace an existing file.

    Raises:
        MissingExtraError: without onnx and onnxscript.
        UsageError: if the tokenizer offers no graph.
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            error.name or "onnx", extra="onnx", purpose="the ONNX export"
        ) from None
    graph = codes_graph(tokenizer)
    example = torch.zeros((2, tokenizer.dim))
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    with atomic_file(path, overwrite=overwrite) as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations say nothing to a user
        noisy.setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                graph,
                (example,),
                str(work),
                input_names=["embeddings"],
                output_names=["codes"],
                dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        finally:
            noisy.setLevel(level)
