"""Search by codes: exact scans of a catalogue's quantized vectors, by tables and additions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from semid.codes import SemanticIds
from semid.data.embeddings import open_embeddings
from semid.errors import UsageError, check_choice
from semid.lazy import kernel
from semid.quantization.blocks import BLOCK_ROWS
from semid.quantization.threads import map_blocks
from semid.tokenizers.base import Tokenizer

MAX_NEIGHBORS = 500
"""Largest ``k``."""


class CodeMatches(NamedTuple):
    """Result of `search_codes`.

    Attributes:
        rows: ``(queries, k)`` int64 rows of the ids, best first; equal scores in row order.
        scores: ``(queries, k)`` float32: squared distances, rising, or inner products, falling.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@kernel()
def scan_sums(codes: Any, table: Any, starts: Any, offsets: Any, rows: Any, scores: Any) -> None:
    """Sum ``table[starts[l] + codes[i, l]]`` over l for every item, and keep the smallest sums.

    ``offsets`` ``(items,)`` is added to the sums, empty for none; ``rows`` and ``scores`` ``(k,)``
    are written, the smallest first.
    """
    items, levels = codes.shape
    k, count = len(rows), 0
    for item in range(items):
        total = np.float32(0) if len(offsets) == 0 else offsets[item]
        for level in range(levels):
            total += table[starts[level] + codes[item, level]]
        if count == k and not total < scores[k - 1]:
            continue
        # Insert behind equal sums: the earlier row comes first.
        place = count if count < k else k - 1
        while place > 0 and scores[place - 1] > total:
            scores[place], rows[place] = scores[place - 1], rows[place - 1]
            place -= 1
        scores[place], rows[place] = total, item
        count = min(count + 1, k)


class CodeScan:
    """The quantized vectors of a catalogue, prepared once for many searches; see `search_codes`."""

    def __init__(self, tokenizer: Tokenizer, ids: SemanticIds) -> None:
        ids.check_codebook(tokenizer.codebook_fingerprint)
        self.tokenizer = tokenizer
        self._books = [book.astype(np.float64) for book in tokenizer.codebooks]
        self._starts = np.cumsum([0, *(len(book) for book in self._books[:-1])])
        self._codes = np.ascontiguousarray(ids.codes[:, : tokenizer.levels])
        self._lengths: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self._codes)

    def _squared_lengths(self) -> npt.NDArray[np.float32]:
        """Squared lengths of the quantized vectors ``(items,)``, computed at the first use."""
        if self._lengths is None:
            lengths = np.empty(len(self), np.float32)
            for start in range(0, len(self), BLOCK_ROWS):
                codes = self._codes[start : start + BLOCK_ROWS].astype(np.int64)
                quantized = self.tokenizer.quantize(codes).astype(np.float64)
                lengths[start : start + BLOCK_ROWS] = (quantized**2).sum(axis=1)
            self._lengths = lengths
        return self._lengths

    def search(
        self,
        latents: npt.NDArray[Any],
        k: int,
        *,
        metric: str = "l2",
        threads: int | None = None,
    ) -> CodeMatches:
        """Find the items whose quantized vectors are nearest to latents ``(queries, latent)``.

        Raises:
            UsageError: for ``k`` or ``metric`` out of range.
        """
        check_choice("metric", metric, ("l2", "ip"))
        if not 1 <= k <= min(MAX_NEIGHBORS, len(self)):
            raise UsageError(f"k={k}: give 1 to {min(MAX_NEIGHBORS, len(self))}")
        latents = latents.astype(np.float64)
        share = 1.0 / self.tokenizer.levels if self.tokenizer.combine == "mean" else 1.0
        slices = self.tokenizer.latent_slices
        side_by_side = self.tokenizer.combine == "concat"
        # |q - sum c|^2 = |q|^2 - 2 sum q.c + |sum c|^2: where codewords overlap, the last term is
        # not a sum over codes.
        by_length = metric == "l2" and not side_by_side
        lengths = self._squared_lengths() if by_length else np.empty(0, np.float32)
        rows = np.empty((len(latents), k), np.int64)
        scores = np.empty((len(latents), k), np.float32)

        def work(query: int) -> None:
            z = latents[query]
            parts = []
            for book, columns in zip(self._books, slices, strict=True):
                if metric == "l2" and side_by_side:
                    parts.append(((z[columns] - book) ** 2).sum(axis=1))
                else:
                    parts.append((-2.0 if metric == "l2" else -1.0) * share * (book @ z[columns]))
            table = np.concatenate(parts).astype(np.float32)
            scan_sums(self._codes, table, self._starts, lengths, rows[query], scores[query])
            if metric == "ip":
                scores[query] = -scores[query]
            elif not side_by_side:
                scores[query] = np.maximum(scores[query] + np.float32(z @ z), 0)

        map_blocks(work, range(len(latents)), threads=threads)
        return CodeMatches(rows, scores)


def search_codes(
    tokenizer: Tokenizer,
    ids: SemanticIds,
    queries: Any,
    k: int = 10,
    *,
    metric: str = "l2",
    threads: int | None = None,
) -> CodeMatches:
    """Find the items whose quantized vectors are nearest to queries that are not quantized.

    Per query a table holds what each codeword adds to the distance; an item costs one addition per
    code (asymmetric distances, Jégou et al. 2011). No item is left out. Works for every tokenizer:
    where codewords are summed, the quantized vectors' lengths are computed once.

    Args:
        tokenizer: the model that made the ids.
        ids: Semantic IDs of the catalogue.
        queries: embeddings ``(queries, dim)``: anything `semid.open_embeddings` reads.
        k: items per query, 1 to 500.
        metric: ``l2`` or ``ip``, between latents.
        threads: number of CPU threads; None uses all available. The result does not depend on it.

    Raises:
        UsageError: for ``k`` or ``metric`` out of range.
        FingerprintError: if the ids are of another codebook.
        EmbeddingError: for queries of another width.

    Cost: O(queries (items levels + codes latent)) time.

    Example:
        >>> semid.search_codes(model, ids, embeddings[:5], k=20).rows
    """
    check_choice("metric", metric, ("l2", "ip"))
    scan = CodeScan(tokenizer, ids)
    latents = tokenizer.latent(open_embeddings(queries))
    return scan.search(latents, k, metric=metric, threads=threads)
