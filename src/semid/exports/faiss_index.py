"""FAISS: an ``IndexResidualQuantizer`` with our codebooks, beam 1, and the same codes.

The index lives in the latent space: for tokenizers with an encoder or a preprocessing, give it
``tokenizer.latent(x)``. Items stand in row order; their codes are stored, nothing is encoded again.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from semid.codes import SemanticIds
from semid.errors import MissingExtraError, UsageError
from semid.output import atomic_file
from semid.tokenizers.base import Tokenizer

__all__ = ["faiss_index", "write_faiss"]


def faiss_index(ids: SemanticIds, *, tokenizer: Tokenizer) -> Any:
    """Build the index in memory.

    Returns:
        ``faiss.IndexResidualQuantizer`` that holds the items; ``index.rq.compute_codes`` gives the
        tokenizer's greedy codes, bit-packed.

    Raises:
        UsageError: for parallel tokenizers, or codebook sizes that are not powers of two.
        FingerprintError: if the ids are of another codebook.
        MissingExtraError: without faiss.
    """
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss-cpu", extra="faiss", purpose="the FAISS export") from None
    sizes = tokenizer.codebook_sizes
    if not tokenizer.hierarchical:
        raise UsageError(
            f"{tokenizer.kind} has parallel codebooks; FAISS's IndexResidualQuantizer holds "
            "residual ones: export to torcheasyrec or onnx, or fit a residual tokenizer"
        )
    if any(size & (size - 1) for size in sizes):
        raise UsageError(
            f"codebook sizes are {list(sizes)}; FAISS packs codes into whole bits, so they must be "
            "powers of two: fit with --codebook-size 256, 1024 or 4096, or export to onnx"
        )
    ids.check_codebook(tokenizer.codebook_fingerprint)
    books = tokenizer.codebooks
    bits = np.array([size.bit_length() - 1 for size in sizes])
    widths = faiss.UInt64Vector()
    faiss.copy_array_to_vector(bits.astype(np.uint64), widths)
    make: Any = faiss.IndexResidualQuantizer  # its stubs lack the one for widths that differ
    index = make(books[0].shape[1], widths)
    faiss.copy_array_to_vector(np.concatenate(books).ravel(), index.rq.codebooks)
    index.rq.max_beam_size = 1
    index.rq.is_trained = index.is_trained = True
    codes = np.ascontiguousarray(ids.codes[:, : len(sizes)], dtype=np.int32)
    if len(codes):
        index.add_sa_codes(faiss.pack_bitstrings(codes, bits.tolist()))
    return index


def write_faiss(
    ids: SemanticIds,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer,
    overwrite: bool = False,
) -> None:
    """Write the index; ``faiss.read_index`` opens it. Errors as for `faiss_index`."""
    index = faiss_index(ids, tokenizer=tokenizer)
    import faiss

    with atomic_file(path, overwrite=overwrite) as work:
        faiss.write_index(index, str(work))
