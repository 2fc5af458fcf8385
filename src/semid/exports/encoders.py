"""Encoders for other runtimes: a traceable module, ONNX, ``torch.export`` and FAISS.

A tokenizer takes part by a method ``encoder_module()``: a module from rows ``(batch, dim)`` to
latent vectors ``(batch, latent)`` float32, or a list of them, one per parallel codebook. The
nearest codewords are searched here. Distances are computed in float64 and residuals in float32, as
``encode`` does, so that the codes are equal.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from semid.codes import SemanticIds
from semid.errors import UsageError, import_extra
from semid.exports.formats import ExportFormat
from semid.tokenizers.base import Tokenizer


class CodesGraph(nn.Module):
    """Rows to codes as a module that can be traced: an encoder, then the nearest codewords.

    Raises:
        NotFittedError: before `fit`.
        UsageError: if the tokenizer has no ``encoder_module``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.levels, self.hierarchical = tokenizer.levels, tokenizer.hierarchical
        # Columns of the latent that each parallel codebook quantizes; None means all.
        self.slices = tokenizer.latent_slices if tokenizer.combine == "concat" else None
        self.beam_width, self.nearest = tokenizer.beam_width, tokenizer.encodes_nearest
        for level, codebook in enumerate(tokenizer.codebooks):
            codewords = torch.from_numpy(np.array(codebook, dtype=np.float32))
            self.register_buffer(f"book_{level}", codewords)
            self.register_buffer(f"squares_{level}", codewords.double().square().sum(dim=1))
            if not self.nearest:
                for name, terms in zip("abc", tokenizer.score_terms(level), strict=True):
                    self.register_buffer(f"{name}_{level}", torch.from_numpy(terms.copy()))
        self.encoder = tokenizer.encoder_module()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return codes ``(batch, levels)`` int64 of rows ``(batch, dim)`` float32."""
        latent = self.encoder(x)
        if not self.hierarchical:
            if isinstance(latent, list | tuple):
                spaces = latent
            else:
                spaces = [latent[:, part] for part in self.slices or [slice(None)] * self.levels]
            nearest = [self._distances(z, level).argmin(1) for level, z in enumerate(spaces)]
            return torch.stack(nearest, dim=1)
        if self.beam_width > 1:
            return self._beam_search(latent)
        codes = []
        residual = latent
        for level in range(self.levels):
            # |residual|^2 is the same for all codes of a row and changes no comparison.
            code = self._distances(residual, level).argmin(1)
            codes.append(code)
            residual = residual - self._codebook(level)[code]
        return torch.stack(codes, dim=1)

    def _codebook(self, level: int) -> Tensor:
        return self.get_buffer(f"book_{level}")

    def _distances(self, rows: Tensor, level: int) -> Tensor:
        """Return squared distances ``(batch, codes)`` minus ``|row|^2``, in float64.

        Where codes are not the nearest codewords: the scores of which a code has the least.
        """
        if not self.nearest:
            x, (a, b, c) = rows.double(), (self.get_buffer(f"{name}_{level}") for name in "abc")
            return x.square() @ b.T - 2.0 * (x @ a.T) + c
        product = rows.double() @ self._codebook(level).double().T
        return self.get_buffer(f"squares_{level}") - 2.0 * product

    def _beam_search(self, latent: Tensor) -> Tensor:
        """Keep the ``beam_width`` partial codes with the smallest residuals after every level."""
        residual = latent[:, None, :]  # (batch, beams, latent)
        width = latent.shape[1]
        codes: Tensor | None = None
        for level in range(self.levels):
            beams = residual.shape[1]
            codebook = self._codebook(level)
            flat = residual.reshape(-1, width)
            # Beams have different residuals, so |residual|^2 counts here, unlike for one beam.
            squared_norms = flat.double().square().sum(dim=1, keepdim=True)
            total = (self._distances(flat, level) + squared_norms).reshape(
                -1, beams * len(codebook)
            )
            count = min(self.beam_width, beams * len(codebook))
            # All children of a row's partial codes compete; a number names parent and code.
            best = total.topk(count, dim=1, largest=False).indices
            parent, code = best // len(codebook), best % len(codebook)
            parents = torch.gather(residual, 1, parent[:, :, None].expand(-1, -1, width))
            residual = parents - codebook[code]
            if codes is None:
                codes = code[:, :, None]
            else:
                prefix = torch.gather(codes, 1, parent[:, :, None].expand(-1, -1, level))
                codes = torch.cat([prefix, code[:, :, None]], 2)
        assert codes is not None
        # The best comes first.
        return codes[:, 0]


def write_onnx_graph(
    path: Path,
    graph: nn.Module,
    example: tuple[Tensor, ...],
    *,
    inputs: list[str],
    output: str,
    dynamic: Any,
) -> None:
    """Write a module as one ``.onnx`` file, traced with the example inputs."""
    for module in ("onnx", "onnxscript"):
        import_extra(module, extra="onnx", purpose="the ONNX export")
    exporter_logger = logging.getLogger("torch.onnx")
    level = exporter_logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter do not concern users
        exporter_logger.setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                graph,
                example,
                str(path),
                input_names=inputs,
                output_names=[output],
                dynamic_shapes=dynamic,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        finally:
            exporter_logger.setLevel(level)


def write_program(
    path: Path, graph: nn.Module, example: tuple[Tensor, ...], *, dynamic: Any
) -> None:
    """Write a module as ``torch.export`` does, traced with the example inputs."""
    program = torch.export.export(graph, example, dynamic_shapes=dynamic)
    # Through an open file: for a name that does not end in .pt2, torch would warn.
    with path.open("wb") as file:
        torch.export.save(program, file)


def _write_onnx(path: Path, *, tokenizer: Tokenizer) -> None:
    """Write one ``.onnx`` file with a dynamic batch: ``embeddings`` to ``codes``.

    Codes equal those of ``tokenizer.encode`` except where two codewords are equally near up to
    float32 rounding. Networks before the codebooks add in another order than `encode` does, which
    can change such near-ties too.
    """
    graph, example, dynamic = _traced(tokenizer)
    write_onnx_graph(path, graph, example, inputs=["embeddings"], output="codes", dynamic=dynamic)


def _write_torch_export(path: Path, *, tokenizer: Tokenizer) -> None:
    """Write a ``.pt2``; ``torch.export.load(path).module()(x)`` gives codes of ``(n, dim)``."""
    graph, example, dynamic = _traced(tokenizer)
    write_program(path, graph, example, dynamic=dynamic)


def _traced(tokenizer: Tokenizer) -> tuple[CodesGraph, tuple[Tensor], dict[str, Any]]:
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    return CodesGraph(tokenizer), (torch.zeros((2, tokenizer.dim)),), dynamic


def _write_faiss(path: Path, *, ids: SemanticIds, tokenizer: Tokenizer) -> None:
    """Write a FAISS index with the codebooks, and the codes in row order.

    Residual levels give an ``IndexResidualQuantizer``, codebooks side by side an ``IndexPQ``. It
    works in the latent space, so queries are ``tokenizer.latent(x)``. With beam 1,
    ``index.rq.compute_codes`` gives the tokenizer's greedy codes, bit-packed.
    """
    faiss = import_extra("faiss", package="faiss-cpu", extra="faiss", purpose="the FAISS export")
    sizes = tokenizer.codebook_sizes
    if not tokenizer.encodes_nearest:
        raise UsageError(
            f"{tokenizer.kind} takes the most probable code and FAISS the nearest codeword, so its "
            "index would encode otherwise: export to onnx or torch-export, or fit rqkmeans"
        )
    if not tokenizer.hierarchical and tokenizer.combine != "concat":
        raise UsageError(
            f"{tokenizer.kind} has parallel codebooks of one latent; FAISS's indexes hold residual "
            "or product codes: export to torcheasyrec or onnx, or fit rqkmeans or pq"
        )
    if any(size & (size - 1) for size in sizes):
        raise UsageError(
            f"codebook sizes are {list(sizes)}; FAISS packs codes into whole bits, so they must be "
            "powers of two: fit with --codebook-size 256, 1024 or 4096, or export to onnx"
        )
    codebooks = tokenizer.codebooks
    bits = np.array([size.bit_length() - 1 for size in sizes])
    # An appended token belongs to no codebook and is left out.
    codes = np.ascontiguousarray(ids.codes[:, : len(sizes)], dtype=np.int32)
    packed = faiss.pack_bitstrings(codes, bits.tolist())
    if tokenizer.combine == "concat":
        index = _product_index(tokenizer, int(bits[0]))
        if len(codes):
            index.add_sa_codes(packed)
        faiss.write_index(index, str(path))
        return
    bit_vector = faiss.UInt64Vector()
    faiss.copy_array_to_vector(bits.astype(np.uint64), bit_vector)
    index = faiss.IndexResidualQuantizer(codebooks[0].shape[1], bit_vector)
    faiss.copy_array_to_vector(np.concatenate(codebooks).ravel(), index.rq.codebooks)
    index.rq.max_beam_size = 1
    index.rq.is_trained = index.is_trained = True
    if len(codes):
        index.add_sa_codes(packed)
    faiss.write_index(index, str(path))


def _product_index(tokenizer: Tokenizer, bits: int) -> Any:
    """Return a FAISS ``IndexPQ`` with the codebooks, without codes."""
    import faiss

    books, dim = tokenizer.codebooks, tokenizer.latent_dim
    if len({book.shape for book in books}) > 1:
        whole = [parts for parts in range(1, dim + 1) if dim % parts == 0]
        nearest = min(whole, key=lambda parts: abs(parts - len(books)))
        raise UsageError(
            f"FAISS needs codebooks of equal size and width, and {len(books)} of them cut {dim} "
            f"columns unequally: fit with --levels {nearest} (n_codebooks=) and one --codebook-size"
        )
    index = faiss.IndexPQ(dim, len(books), bits)
    faiss.copy_array_to_vector(np.stack(books).ravel(), index.pq.centroids)
    index.is_trained = True
    return index


ONNX = ExportFormat(_write_onnx, ids=False, model="required")
TORCH_EXPORT = ExportFormat(_write_torch_export, ids=False, model="required")
FAISS = ExportFormat(_write_faiss, model="required")
