"""New items: they get ids beside the published ones, and no published id changes.

Novelty compares a residual norm with the training distribution. The reference are the held-out
items of the fit, where there are enough of them: codewords lie closer to the rows they were trained
on, so training rows would mark too many new items as novel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.catalogue.uniqueness import capacity_of, place
from semid.codes import SemanticIds
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds, cast_ids, held_out_mask
from semid.errors import FingerprintError, UsageError
from semid.output import atomic_file
from semid.progress import ProgressArgument, with_progress
from semid.results import Result
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.stored import HELD_OUT_SALT

NOVEL = 0.99
"""Share of the reference beyond which an item is novel: one in a hundred of a like catalogue."""

MIN_REFERENCE = 200
"""Number of held-out items (of which two lie beyond `NOVEL`) below which all items are used."""

QUANTILES = 201


@dataclass(frozen=True, kw_only=True)
class AdditionReport(Result):
    """Figures of `add_items`.

    Attributes:
        given: rows of the source.
        known: rows of items that were published before; they keep their id.
        stale: known items whose embedding would get other codes today.
        new: items added.
        novel: new items beyond ``threshold`` of the reference.
        threshold: share of the reference beyond which an item is novel.
        unplaced: new items without a free code or token; they share an id.
        items: ids of the new items ``(new,)``.
        norms: ``(new,)`` residual norms.
        novelty: ``(new,)`` share of the reference below each norm.
        shared: ``(new,)`` bool, whether an item is unplaced.
    """

    given: int
    known: int
    stale: int
    new: int
    novel: int
    threshold: float
    unplaced: int
    items: ItemIds = field(repr=False, compare=False)
    norms: npt.NDArray[np.float32] = field(repr=False, compare=False)
    novelty: npt.NDArray[np.float64] = field(repr=False, compare=False)
    shared: npt.NDArray[np.bool_] = field(repr=False, compare=False)

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        lines = [f"{self.new:,} new items; {self.known:,} were published and keep their ids"]
        if self.stale:
            lines.append(
                f"  {self.stale:,} published items have embeddings that would get other codes today"
            )
        if self.new:
            lines.append(
                f"  {self.novel:,} of the new ({self.novel / self.new:.1%}) lie beyond "
                f"{self.threshold:.0%} of the training distribution: the codebook does not cover "
                "them; see 'semid drift' and 'semid refresh'"
            )
        if self.unplaced:
            lines.append(f"  {self.unplaced:,} new items have no free place and share an id")
        return "\n".join(lines)

    def write(self, path: Any, *, overwrite: bool = False) -> None:
        """Write Parquet of the new items: item_id, residual_norm, novelty, novel, unplaced."""
        table = pa.table(
            {
                "item_id": self.items.to_arrow(),
                "residual_norm": self.norms,
                "novelty": self.novelty,
                "novel": self.novelty > self.threshold,
                "unplaced": self.shared,
            }
        )
        with atomic_file(path, overwrite=overwrite) as work:
            pq.write_table(table, work)


@dataclass(frozen=True)
class Additions:
    """The result of `add_items`.

    Attributes:
        ids: the published items in their order, then the new ones in theirs.
        report: figures, and the novelty of each new item.
    """

    ids: SemanticIds
    report: AdditionReport


@with_progress
def add_items(
    catalogue: SemanticIds,
    tokenizer: Tokenizer,
    source: Any,
    *,
    ids: Any = None,
    threshold: float = NOVEL,
    progress: ProgressArgument = None,
) -> Additions:
    """Encode new items into a published catalogue.

    New items get what the catalogue's own uniqueness method gives them: the next token of their
    bucket (``append``), the nearest free codes (``reassign``, exact among the new items), or their
    plain codes. Published items keep their id, whatever their embedding is now.

    Args:
        catalogue: published ids.
        tokenizer: the model that made them.
        source: embeddings of new items; items already published are allowed.
        ids: item ids for a source that has none.
        threshold: share of the training distribution's residual norms beyond which an item is
            novel, in (0, 1).
        progress: callback that receives progress events.

    Returns:
        All items, and a report.

    Raises:
        UsageError: for a threshold out of range.
        FingerprintError: if the model did not make the catalogue.
        IdsError: if the new ids cannot be written in the catalogue's type.

    Example:
        >>> added = semid.add_items(ids, model, new_embeddings, ids=new_names)
        >>> added.ids.write("ids-2.parquet")
    """
    check_threshold(threshold)
    check_model(catalogue, tokenizer)
    opened = open_embeddings(source, ids=ids)
    # The reference of novelty is fixed at the first addition and travels with the ids.
    quantiles = norm_quantiles(catalogue, tokenizer)
    encoded = tokenizer.encode(opened, beam_width=catalogue.info.beam_width, progress=progress)
    # Items that were published keep their id; those whose codes would differ today are counted.
    position = catalogue.items.index_of(opened.ids.strings())
    known, new = np.flatnonzero(position >= 0), np.flatnonzero(position < 0)
    stale = (encoded.codes[known] != catalogue.encoded[position[known]]).any(axis=1)
    added = encoded.take(new)
    old = len(catalogue)
    # All items with the model's own codes: the published ones in their order, then the new ones.
    plain = SemanticIds(
        joined_items(catalogue.items, added.items),
        np.concatenate([catalogue.encoded, added.codes]),
        np.concatenate([catalogue.residual_norms, added.residual_norms]),
        catalogue.info.model,
    )
    # New rows are placed around the published ones, whose codes are given and stay.
    placeholder = np.zeros((len(new), catalogue.levels), catalogue.codes.dtype)
    unique = place(
        plain,
        replace(catalogue.info, norm_quantiles=quantiles),
        published=np.arange(len(plain)) < old,
        codes=np.concatenate([catalogue.codes, placeholder]),
        capacity=capacity_of(catalogue.info),
        tokenizer=tokenizer,
        source=opened,
        progress=progress,
    )
    # Published items may share an id from before; only the new ones are reported.
    rows = unique.report.unplaced_rows
    shared = np.zeros(len(new), bool)
    shared[rows[rows >= old] - old] = True
    scores = novelty(added.residual_norms, quantiles)
    report = AdditionReport(
        given=len(opened),
        known=len(known),
        stale=int(stale.sum()),
        new=len(new),
        novel=int((scores > threshold).sum()),
        threshold=threshold,
        unplaced=int(shared.sum()),
        items=added.items,
        norms=added.residual_norms,
        novelty=scores,
        shared=shared,
    )
    return Additions(unique.ids, report)


def check_threshold(threshold: float) -> None:
    """Raise `UsageError` unless a novelty threshold lies in (0, 1)."""
    if not 0 < threshold < 1:
        raise UsageError(f"threshold={threshold} (--novel-beyond): give a share between 0 and 1")


def check_model(catalogue: SemanticIds, tokenizer: Tokenizer) -> None:
    """Raise `FingerprintError` unless a tokenizer has the weights that made the ids."""
    catalogue.check_codebook(tokenizer.codebook_fingerprint)
    if catalogue.info.weights_fingerprint != tokenizer.weights_fingerprint:
        raise FingerprintError(
            "these ids were made with the same codebooks but other weights before them; load the "
            "model that made the ids"
        )


def joined_items(first: ItemIds, second: ItemIds) -> ItemIds:
    """Return the ids of both in the type of the first; `IdsError` where that is impossible."""
    before = first.to_arrow()
    kind = before.type.value_type if pa.types.is_dictionary(before.type) else before.type
    after = cast_ids(second, kind, source="the new item ids")
    return ItemIds(pa.chunked_array([before.cast(kind), after]), source="old and new item ids")


def norm_quantiles(ids: SemanticIds, tokenizer: Tokenizer) -> tuple[float, ...]:
    """Return 201 evenly spaced quantiles of the residual norms that novelty refers to.

    A reference that the catalogue carries from an earlier addition is returned unchanged, so that
    it does not move as items come in.
    """
    if ids.info.norm_quantiles is not None:
        return ids.info.norm_quantiles
    # The codewords lie closer to the rows they were fitted on, so held-out rows are the reference.
    held_out = held_out_mask(ids.items, tokenizer.validation_fraction, salt=HELD_OUT_SALT)
    norms = ids.residual_norms
    if held_out.sum() >= MIN_REFERENCE:
        norms = norms[held_out]
    norms = norms[np.isfinite(norms)]
    if len(norms) == 0:
        raise UsageError(
            "the catalogue knows no residual norms, so novelty cannot be judged; encode it with "
            "'semid encode' instead of importing it"
        )
    return tuple(np.quantile(norms.astype(np.float64), np.linspace(0, 1, QUANTILES)).tolist())


def novelty(
    norms: npt.NDArray[np.float32], quantiles: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """Return the share of the reference below each residual norm: ``(items,)`` in [0, 1]."""
    grid = np.linspace(0, 1, len(quantiles))
    points = np.asarray(quantiles)
    # Where quantiles repeat, the highest share counts: as many lie at or below.
    last = np.append(points[1:] != points[:-1], True)
    scores: npt.NDArray[np.float64] = np.interp(
        norms.astype(np.float64), points[last], grid[last], left=0.0, right=1.0
    )
    return scores
