"""TorchEasyRec: Parquet of ``item_id`` and ``codes`` list<int64>, optional ``candidate_codes``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from semid.catalogue.placement import last_level_inputs
from semid.catalogue.uniqueness import rows_of
from semid.codes import SemanticIds
from semid.data.embeddings import open_embeddings
from semid.errors import UsageError
from semid.output import atomic_file
from semid.quantization.nearest import nearest_m, prepare
from semid.tokenizers.base import Tokenizer

__all__ = ["candidate_codes", "write_torcheasyrec"]

BLOCK_ROWS = 65_536


def write_torcheasyrec(
    ids: SemanticIds,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    embeddings: Any = None,
    embedding_ids: Any = None,
    candidates: int = 0,
    overwrite: bool = False,
) -> None:
    """Write the table in row order.

    Args:
        ids: Semantic IDs.
        path: Parquet file.
        tokenizer: the model, for candidates.
        embeddings: the items' embeddings, for candidates.
        embedding_ids: item ids for embeddings that have none.
        candidates: ids per item in the column ``candidate_codes``, a flat list<int64> of
            candidates * levels codes: the model's prefix with the nearest last codes, nearest
            first, its own among them. 0 leaves the column out.
        overwrite: replace an existing file.

    Raises:
        UsageError: if candidates are asked for without a model and embeddings.
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    columns = {"item_id": ids.items.to_arrow(), "codes": _lists(ids.codes)}
    if candidates:
        if tokenizer is None or embeddings is None:
            raise UsageError(
                f"candidates={candidates} are nearest codewords: give --model and --embeddings "
                "(tokenizer=, embeddings=)"
            )
        codes = candidate_codes(ids, tokenizer, embeddings, candidates, embedding_ids=embedding_ids)
        columns["candidate_codes"] = _lists(codes.reshape(len(ids), -1))
    with atomic_file(path, overwrite=overwrite) as work:
        pq.write_table(pa.table(columns), work)


def candidate_codes(
    ids: SemanticIds,
    tokenizer: Tokenizer,
    embeddings: Any,
    candidates: int,
    *,
    embedding_ids: Any = None,
) -> npt.NDArray[np.int64]:
    """Return ``(items, candidates, levels)`` ids that share the model's prefix, nearest first.

    Raises:
        UsageError: if more candidates are asked for than the last codebook has codewords.
        IdsError: if an item has no embedding.
    """
    last = tokenizer.codebooks[-1]
    if not 1 <= candidates <= len(last):
        raise UsageError(f"candidates={candidates}: give 1 to {len(last)}, the last codebook's")
    source = open_embeddings(embeddings, ids=embedding_ids)
    rows, book = rows_of(ids.items, source), prepare(torch.from_numpy(last))
    model = ids.encoded.astype(np.int64)
    result = np.repeat(model[:, None, :], candidates, axis=1)
    for start in range(0, len(ids), BLOCK_ROWS):
        span = slice(start, start + BLOCK_ROWS)
        latent = tokenizer.latent(source.rows(rows[span]))
        inputs = torch.from_numpy(last_level_inputs(tokenizer, latent, model[span]))
        result[span, :, -1] = nearest_m(inputs.contiguous(), book, candidates).labels.numpy()
    return result


def _lists(codes: npt.NDArray[Any]) -> pa.ListArray:
    offsets = pa.array(np.arange(len(codes) + 1, dtype=np.int32) * codes.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(codes.astype(np.int64).reshape(-1)))
