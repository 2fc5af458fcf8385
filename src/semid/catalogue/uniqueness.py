"""Unique ids, as an explicit step after encoding that can be undone.

Encoding stays a function of the embedding. Items that share codes get different ids here, and the
model's own codes are kept beside the published ones (`SemanticIds.encoded`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.placement import (
    append_tokens,
    bucket_sizes,
    group_numbers,
    reassign_codes,
    token_count,
)
from semid.codes import UNIQUE_METHODS, CodesInfo, SemanticIds
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds
from semid.data.source import EmbeddingSource
from semid.errors import IdsError, UsageError, check_choice
from semid.progress import Progress, ProgressArgument, QuietProgress, with_progress
from semid.quantization.blocks import BLOCK_ROWS
from semid.results import Result
from semid.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class UniqueReport(Result):
    """Effect of `make_unique` on a catalogue; ``before`` refers to the model's own codes.

    Attributes:
        method: ``append``, ``reassign`` or ``none``.
        capacity: items per id (``reassign``), or tokens of the added level (``append``).
        items: number of items.
        unique_before, unique_after: distinct ids.
        shared_before, shared_after: items that share their id.
        moved: items whose codes differ from the model's; 0 with ``append``.
        unplaced: items without a free code or token; they share an id.
        unplaced_rows: their rows, ascending.
        distortion_before: mean squared quantization error over all items; NaN for imported ids,
            whose residual norms are unknown.
        distortion_after: the same for the published codes.
        largest_extra: largest squared distance that one item was moved by.
    """

    method: str
    capacity: int
    items: int
    unique_before: int
    unique_after: int
    shared_before: int
    shared_after: int
    moved: int
    unplaced: int
    distortion_before: float
    distortion_after: float
    largest_extra: float
    unplaced_rows: npt.NDArray[np.int64] = field(repr=False, compare=False)
    derived = ("distortion_increase",)

    @property
    def distortion_increase(self) -> float:
        """Relative increase of the quantization error."""
        if self.distortion_before <= 0:
            return 0.0 if self.distortion_after <= 0 else float("inf")
        return self.distortion_after / self.distortion_before - 1.0

    def to_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """Return JSON-able figures; None for unknown ones."""
        figures = super().to_dict(arrays=arrays)
        return {key: None if value != value else value for key, value in figures.items()}  # NaN

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        lines = [
            f"{self.method}: {self.unique_before:,} -> {self.unique_after:,} distinct ids of "
            f"{self.items:,} items; items in shared buckets {self.shared_before:,} -> "
            f"{self.shared_after:,}"
        ]
        if self.method == "append":
            lines.append(f"  one more level of {self.capacity} tokens; no model code changed")
        if self.method == "reassign":
            lines.append(
                f"  {self.moved:,} items moved to another last code; quantization error "
                f"{self.distortion_before:.6g} -> {self.distortion_after:.6g} "
                f"(+{self.distortion_increase:.3%}), at most {self.largest_extra:.4g} for one item"
            )
        if self.unplaced:
            lines.append(
                f"  {self.unplaced:,} items have no place and share an id: use --method append, "
                "a larger --capacity, or a model with a larger last codebook"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class UniqueIds:
    """The result of `make_unique`.

    Attributes:
        ids: Semantic IDs in the row order of the input, with the model's codes beside.
        report: distortion added, and items without a place.
    """

    ids: SemanticIds
    report: UniqueReport


@with_progress
def make_unique(
    ids: SemanticIds,
    *,
    method: str = "append",
    tokenizer: Tokenizer | None = None,
    embeddings: Any = None,
    embedding_ids: Any = None,
    capacity: int | None = None,
    progress: ProgressArgument = None,
) -> UniqueIds:
    """Give items with equal ids different ids.

    The step starts from the model's own codes: applying it twice changes nothing, ``none`` undoes
    it, and one method can replace another. The result does not depend on the order of the rows.

    Args:
        ids: Semantic IDs of a catalogue.
        method: ``append`` adds one token, the position of the item in its bucket, closest to the
            centroid first (ties by item id); ``reassign`` moves items to the next-nearest free
            codes of the last level at the least total distortion; ``none`` returns the model's
            codes.
        tokenizer: model that made the ids; required by ``reassign``.
        embeddings: embeddings of the items, anything `semid.open_embeddings` reads, in any order;
            required by ``reassign``.
        embedding_ids: item ids for embeddings that have none.
        capacity: ``reassign``: items per id; by default as many as before, or 1. ``append``:
            tokens of the new level; by default 256, or the next power of two that holds the
            largest bucket.
        progress: callback that receives progress events.

    Returns:
        The ids, and a report of the added distortion. An item without a place keeps the model's
        codes (``reassign``) or takes the last token (``append``).

    Raises:
        UsageError: for an unknown method, a capacity out of range, or a missing model.
        FingerprintError: if the ids are of another codebook.
        IdsError: if an item has no embedding.

    Example:
        >>> unique = semid.make_unique(ids)
        >>> unique.ids.write("ids.parquet")

    Cost: a sort of the items; ``reassign`` also solves one assignment problem per prefix with
    collisions. Source of ``append``: TIGER (arXiv 2305.05065), section 3.1.
    """
    check_choice("method", method, UNIQUE_METHODS)
    if capacity is not None and capacity < 1:
        raise UsageError(f"capacity={capacity}: give at least 1")
    if capacity is not None and method == "none":
        raise UsageError("capacity goes with the methods append and reassign, not with none")
    # Repeated without a capacity, the step gives the same ids again.
    if capacity is None and ids.info.unique == method == "reassign":
        capacity = ids.info.capacity
    plain = SemanticIds(ids.items, ids.encoded, ids.residual_norms, ids.info.model)
    if method == "none":
        return place(plain, plain.info)
    target = replace(plain.info, unique=method, norm_quantiles=ids.info.norm_quantiles)
    source = None
    if method == "reassign" and embeddings is not None:
        source = open_embeddings(embeddings, ids=embedding_ids)
    return place(
        plain, target, capacity=capacity, tokenizer=tokenizer, source=source, progress=progress
    )


def place(
    plain: SemanticIds,
    target: CodesInfo,
    *,
    published: npt.NDArray[np.bool_] | None = None,
    codes: npt.NDArray[np.integer[Any]] | None = None,
    capacity: int | None = None,
    tokenizer: Tokenizer | None = None,
    source: EmbeddingSource | None = None,
    progress: ProgressArgument = None,
) -> UniqueIds:
    """Make ids unique by the method ``target.unique``, while published ids stay as they are.

    ``plain`` holds the model's own codes of all items. ``published`` marks the rows ``(items,)``
    that keep ``codes`` ``(items, levels)``. The source needs only the other items.
    """
    if target.unique == "append":
        return _append(plain, target, published, codes, capacity)
    if target.unique == "none":
        ids = replace(plain, info=target)
        if published is not None and codes is not None:
            mixed = np.where(published[:, None], codes, plain.codes)
            if not np.array_equal(mixed, plain.codes):
                ids = replace(ids, codes=mixed, model_codes=plain.codes)
        return UniqueIds(ids, _report(plain, ids, "none", 1, np.zeros(len(ids), bool), 0.0))
    if tokenizer is None or source is None:
        raise UsageError(
            "reassign looks for the next-nearest codewords: give the model and the embeddings "
            "(--model and --embeddings; tokenizer=, embeddings=)"
        )
    plain.check_codebook(tokenizer.codebook_fingerprint)
    published = np.zeros(len(plain), bool) if published is None else published
    steps = progress or QuietProgress()
    return _reassign(plain, target, published, codes, capacity or 1, tokenizer, source, steps)


def _reassign(
    plain: SemanticIds,
    target: CodesInfo,
    published: npt.NDArray[np.bool_],
    codes: npt.NDArray[np.integer[Any]] | None,
    capacity: int,
    tokenizer: Tokenizer,
    source: EmbeddingSource,
    progress: Progress,
) -> UniqueIds:
    # Published rows need no embedding: their codes are fixed and are never compared.
    rows = np.full(len(plain), -1, np.int64)
    new = np.flatnonzero(~published)
    rows[new] = rows_of(plain.items.take(new), source)
    placed, unplaced, extra = reassign_codes(
        tokenizer,
        source,
        rows,
        plain,
        capacity=capacity,
        published=published,
        codes=codes,
        progress=progress,
    )
    ids = SemanticIds(
        plain.items,
        placed.astype(plain.codes.dtype),
        plain.residual_norms,
        replace(target, capacity=capacity),
        plain.codes,
    )
    moved = np.flatnonzero((ids.codes != plain.codes).any(axis=1) & ~published)
    # The squared quantization error that the moved items add.
    added = 0.0
    for start in range(0, len(moved), BLOCK_ROWS):
        part = moved[start : start + BLOCK_ROWS]
        latent = tokenizer.latent(source.rows(rows[part]))
        for sign, part_codes in ((1.0, ids.codes[part]), (-1.0, plain.codes[part])):
            residual = latent - tokenizer.quantize(part_codes)
            added += sign * float(np.einsum("nd,nd->", residual, residual, dtype=np.float64))
    report = _report(
        plain, ids, "reassign", capacity, unplaced, added, float(extra.max(initial=0.0))
    )
    return UniqueIds(ids, report)


def capacity_of(info: CodesInfo) -> int | None:
    """Return the capacity with which published ids were made unique."""
    return info.codebook_sizes[-1] if info.unique == "append" else info.capacity


def rows_of(items: ItemIds, source: EmbeddingSource) -> npt.NDArray[np.int64]:
    """Return the row of each item in a source: ``(items,)`` int64; all need an embedding."""
    rows: npt.NDArray[np.int64] = source.ids.index_of(items.strings())
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise IdsError(
            f"{len(missing)} of {len(items)} items have no embedding in {source.label} (first: "
            f"'{items[int(missing[0])]}'); give the embeddings that were encoded, or name their "
            "ids with --ids and --id-column"
        )
    return rows


def _append(
    plain: SemanticIds,
    target: CodesInfo,
    published: npt.NDArray[np.bool_] | None,
    codes: npt.NDArray[np.integer[Any]] | None,
    capacity: int | None,
) -> UniqueIds:
    # A published row keeps its codes and its token; its bucket is the one it was published in.
    prefix = plain.codes
    if published is not None and codes is not None:
        prefix = prefix.copy()
        prefix[published] = codes[published, :-1]
    tokens = append_tokens(
        prefix,
        plain.residual_norms,
        plain.items,
        published=published,
        tokens=None if codes is None else codes[:, -1],
    )
    size = capacity or token_count(tokens)
    # With a capacity that is too small the last items of a bucket share the last token.
    unplaced = tokens >= size
    extended = np.concatenate([prefix, np.minimum(tokens, size - 1)[:, None]], axis=1)
    info = replace(target, codebook_sizes=(*plain.info.codebook_sizes, size))
    ids = SemanticIds(plain.items, extended, plain.residual_norms, info, plain.codes)
    return UniqueIds(ids, _report(plain, ids, "append", size, unplaced, 0.0))


def _report(
    plain: SemanticIds,
    ids: SemanticIds,
    method: str,
    capacity: int,
    unplaced: npt.NDArray[np.bool_],
    extra: float,
    largest: float = 0.0,
) -> UniqueReport:
    before, after = group_numbers(plain.codes), group_numbers(ids.codes)
    squares = plain.residual_norms.astype(np.float64) ** 2
    items = max(len(ids), 1)
    return UniqueReport(
        method=method,
        capacity=capacity,
        items=len(ids),
        # Buckets are numbered from 0 without gaps.
        unique_before=int(before.max(initial=-1)) + 1,
        unique_after=int(after.max(initial=-1)) + 1,
        shared_before=int((bucket_sizes(before) > 1).sum()),
        shared_after=int((bucket_sizes(after) > 1).sum()),
        moved=int((ids.codes[:, : plain.levels] != plain.codes).any(axis=1).sum()),
        unplaced=int(unplaced.sum()),
        distortion_before=float(squares.sum()) / items,
        distortion_after=(float(squares.sum()) + extra) / items,
        largest_extra=largest,
        unplaced_rows=np.flatnonzero(unplaced),
    )
