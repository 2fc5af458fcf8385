"""New items: they get ids beside the published ones, and no published id moves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.catalogue.novelty import NOVEL, norm_quantiles, novelty
from semid.catalogue.uniqueness import place
from semid.codes import SemanticIds
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds, cast_ids
from semid.errors import FingerprintError, UsageError
from semid.output import atomic_file
from semid.progress import Progress
from semid.tokenizers.base import Tokenizer

__all__ = [
    "AdditionReport",
    "Additions",
    "add_items",
    "check_model",
    "check_threshold",
    "joined_items",
]


@dataclass(frozen=True, kw_only=True)
class AdditionReport:
    """What adding items found.

    Attributes:
        given: rows given.
        known: of them published before; they keep their id.
        stale: known items whose embedding would get other codes today.
        new: items added.
        novel: new items beyond ``threshold`` of the reference.
        threshold: share of the reference beyond which an item is novel.
        unplaced: new items that found no free place and share an id.
        items: ids of the new items ``(new,)``.
        norms: ``(new,)`` residual norms.
        novelty: ``(new,)`` share of the reference below each.
        shared: ``(new,)`` bool, the unplaced.
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

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able figures."""
        return {k: v for k, v in self.__dict__.items() if isinstance(v, int | float)}

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
            lines.append(f"  {self.unplaced:,} new items found no free place and share an id")
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
    """The outcome of `add_items`.

    Attributes:
        ids: the published items in their order, then the new ones in theirs.
        report: figures, and the novelty of each new item.
    """

    ids: SemanticIds
    report: AdditionReport


def check_threshold(threshold: float) -> None:
    """Refuse a threshold of novelty that is no share.

    Raises:
        UsageError: it lies outside (0, 1).
    """
    if not 0 < threshold < 1:
        raise UsageError(f"threshold={threshold} (--novel-beyond): give a share between 0 and 1")


def add_items(
    catalogue: SemanticIds,
    tokenizer: Tokenizer,
    source: Any,
    *,
    ids: Any = None,
    threshold: float = NOVEL,
    progress: Progress | None = None,
) -> Additions:
    """Encode items into a published catalogue.

    New items get what the catalogue's own step gives them: the next token of their bucket after
    ``append``, the nearest free codes after ``reassign`` (exact among the new items), their plain
    codes after neither. Items published before are left as they are, whatever their embedding.

    Args:
        catalogue: published ids.
        tokenizer: the model that made them.
        source: embeddings of new items, and of old ones if that is easier.
        ids: item ids for a source that has none.
        threshold: share of the training distribution's residual norms beyond which an item is
            novel, in (0, 1).
        progress: told about the work; silent by default.

    Returns:
        All items, and a report.

    Raises:
        UsageError: for a threshold out of range.
        FingerprintError: if the model did not make the catalogue.
        IdsError: if the new ids cannot be written in the catalogue's type.
    """
    check_threshold(threshold)
    check_model(catalogue, tokenizer)
    opened = open_embeddings(source, ids=ids)
    quantiles = norm_quantiles(catalogue, tokenizer)
    encoded = tokenizer.encode(opened, beam_width=catalogue.info.beam_width, progress=progress)
    at = catalogue.items.index_of(opened.ids.strings())
    known, new = np.flatnonzero(at >= 0), np.flatnonzero(at < 0)
    stale = (encoded.codes[known] != catalogue.encoded[at[known]]).any(axis=1)
    fresh = encoded.take(new)
    old = len(catalogue)
    plain = SemanticIds(
        joined_items(catalogue.items, fresh.items),
        np.concatenate([catalogue.encoded, fresh.codes]),
        np.concatenate([catalogue.residual_norms, fresh.residual_norms]),
        catalogue.info.model,
    )
    published = np.arange(len(plain)) < old
    target = replace(catalogue.info, norm_quantiles=quantiles)
    shared = np.zeros(len(new), bool)
    if target.unique == "none":
        joined = replace(plain, info=target)
        if catalogue.model_codes is not None:
            codes = np.concatenate([catalogue.codes, fresh.codes])
            joined = replace(joined, codes=codes, model_codes=plain.codes)
    else:
        room = np.zeros((len(new), catalogue.levels), catalogue.codes.dtype)
        done = place(
            plain,
            target,
            published=published,
            codes=np.concatenate([catalogue.codes, room]),
            capacity=target.codebook_sizes[-1] if target.unique == "append" else target.capacity,
            tokenizer=tokenizer,
            embeddings=opened,
            progress=progress,
        )
        joined = done.ids
        rows = done.report.unplaced_rows
        shared[rows[rows >= old] - old] = True
    score = novelty(fresh.residual_norms, quantiles)
    report = AdditionReport(
        given=len(opened),
        known=len(known),
        stale=int(stale.sum()),
        new=len(new),
        novel=int((score > threshold).sum()),
        threshold=threshold,
        unplaced=int(shared.sum()),
        items=fresh.items,
        norms=fresh.residual_norms,
        novelty=score,
        shared=shared,
    )
    return Additions(joined, report)


def check_model(catalogue: SemanticIds, tokenizer: Tokenizer) -> None:
    """Refuse a model with another codebook, or another encoder before the same codebook.

    Raises:
        FingerprintError: if either differs.
    """
    catalogue.check_codebook(tokenizer.codebook_fingerprint)
    if catalogue.info.weights_fingerprint != tokenizer.weights_fingerprint:
        raise FingerprintError(
            "these ids were made with the same codebooks but other weights before them; load the "
            "model that made the ids"
        )


def joined_items(first: ItemIds, second: ItemIds) -> ItemIds:
    """Return the ids of both in the first one's type.

    Raises:
        IdsError: if the second's cannot be written in it, or an id is in both.
    """
    ours = first.to_arrow()
    kind = ours.type.value_type if pa.types.is_dictionary(ours.type) else ours.type
    theirs = cast_ids(second, kind, source="the new item ids")
    return ItemIds(pa.chunked_array([ours.cast(kind), theirs]), source="old and new item ids")
