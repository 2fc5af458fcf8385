"""A new generation that keeps the ids it can: fit again, align, spend a budget of changes.

1. The codebooks are fitted again on the changed catalogue, from the old ones where the tokenizer
   allows it (`semid.catalogue.warm`).
2. Codewords take the numbers of the old ones they go on from (`semid.catalogue.matching`).
3. Items whose new codes are those that were published (for reassigned ids: those the model had)
   keep their id. Of the others, those that gain most move, up to the budget; the rest keep the
   published id at a distortion that the report states.
4. Items that moved and new ones are placed around the ids that stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.additions import check_model
from semid.catalogue.churn import Churn, churn
from semid.catalogue.matching import match_codes, renumbered
from semid.catalogue.uniqueness import place
from semid.catalogue.warm import fit_again
from semid.codes import CodesInfo, SemanticIds
from semid.data.embeddings import EmbeddingSource, open_embeddings
from semid.data.ids import held_out_mask
from semid.errors import InputError, UsageError
from semid.health import ErrorSums, collisions
from semid.progress import Progress, QuietProgress
from semid.quantization.blocks import BLOCK_ROWS
from semid.tokenizers.base import HELD_OUT_SALT, Tokenizer
from semid.tokenizers.context import item_weights, mean_row

__all__ = ["Generation", "Refresh", "RefreshReport", "check_max_churn", "refresh"]

Codes = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Generation:
    """One way to encode the changed catalogue.

    Attributes:
        name: ``previous``, ``refreshed`` (its own codes), ``published`` (what is given out),
            ``fresh`` (a fit from scratch) or ``fresh, matched`` (the same, renumbered).
        error: relative error ``sum |x - x_hat|^2 / sum |x - mean|^2`` over all items, with their
            mean.
        held_out_error: the same over the items that fits hold out, with the same mean; None
            without any.
        collision_rate: ``1 - unique/N`` of these codes.
        shared_share: share of items in shared buckets.
        churn: against the ids published before, without an appended token, and before a
            reassigned last code; None for ``previous``.
    """

    name: str
    error: float
    held_out_error: float | None
    collision_rate: float
    shared_share: float
    churn: Churn | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        moved = None if self.churn is None else self.churn.to_dict()
        return {**self.__dict__, "churn": moved}


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh changed and what it gained.

    Attributes:
        items: items now.
        new: items that were not published before.
        removed: published items that are gone.
        churn: of the published ids, appended tokens included.
        budget: items that were allowed to move; None without a budget.
        held_back: items that kept their id for the budget's sake.
        unplaced: items that found no free place and share an id.
        generations: the ways to encode, side by side.
    """

    items: int
    new: int
    removed: int
    churn: Churn
    budget: int | None
    held_back: int
    unplaced: int
    generations: tuple[Generation, ...]

    def generation(self, name: str) -> Generation:
        """Return one generation by name."""
        return next(each for each in self.generations if each.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {
            **self.__dict__,
            "churn": self.churn.to_dict(),
            "generations": [each.to_dict() for each in self.generations],
        }

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        c = self.churn
        lines = [
            f"{self.items:,} items: {self.new:,} new, {self.removed:,} gone; of {c.items:,} "
            f"published before, {c.moved:,} ids changed ({c.share:.2%})"
        ]
        shown = ", ".join(f"{share:.2%}" for share in c.prefix)
        lines.append(f"  changed by prefix of 1, 2, ... codes: {shown}")
        if c.weighted_prefix is not None:
            shown = ", ".join(f"{share:.2%}" for share in c.weighted_prefix)
            lines.append(f"  the same by popularity: {shown}")
        if self.budget is not None:
            lines.append(
                f"  budget: {self.budget:,} changes; {self.held_back:,} items kept an id that is "
                "no longer their nearest"
            )
        for each in self.generations:
            held = "" if each.held_out_error is None else f", held out {each.held_out_error:.4f}"
            moved = "" if each.churn is None else f"; {each.churn.share:.2%} of ids changed"
            lines.append(
                f"  {each.name}: relative error {each.error:.4f}{held}; 1 - unique/N "
                f"{each.collision_rate:.4f}{moved}"
            )
        if self.unplaced:
            lines.append(f"  {self.unplaced:,} items found no free place and share an id")
        return "\n".join(lines)


@dataclass(frozen=True)
class Refresh:
    """The outcome of `refresh`.

    Attributes:
        tokenizer: the new generation's model.
        ids: its published ids, in the row order of the source.
        report: churn beside quality.
    """

    tokenizer: Tokenizer
    ids: SemanticIds
    report: RefreshReport


def check_max_churn(max_churn: float | None) -> None:
    """Refuse a budget of changes that is no share.

    Raises:
        UsageError: it lies outside [0, 1].
    """
    if max_churn is not None and not 0 <= max_churn <= 1:
        raise UsageError(f"max_churn={max_churn}: give a share in [0, 1]")


def refresh(
    previous: Tokenizer,
    published: SemanticIds,
    source: Any,
    *,
    ids: Any = None,
    popularity: npt.ArrayLike | None = None,
    max_churn: float | None = None,
    warm_start: bool = True,
    compare: bool = False,
    progress: Progress | None = None,
) -> Refresh:
    """Fit again on a changed catalogue and keep the published ids that can be kept.

    Args:
        previous: the model that made ``published``; it stays as it is.
        published: ids given out before.
        source: embeddings of the catalogue now: old items, new ones, some gone.
        ids: item ids for a source that has none.
        popularity: ``(items,)`` weights in the source's row order; they weight the churn that is
            reported and which codes are matched, not the fit.
        max_churn: share of the items in both generations whose id may change, in [0, 1]; None lets
            every item take its new code.
        warm_start: see `semid.catalogue.warm.fit_again`.
        compare: fit from scratch too, and report it with and without renumbering.
        progress: told about the work; silent by default.

    Returns:
        The model, the ids and the report. Ids keep the step (``append`` or ``reassign``) that the
        published ones had.

    Raises:
        UsageError: for a budget out of range or popularity that does not fit.
        FingerprintError: if ``previous`` did not make ``published``.
        InputError: if no item is in both.

    Cost: a fit (two with ``compare``), three passes of encoding, and `match_codes` a level.
    """
    check_max_churn(max_churn)
    check_model(published, previous)
    steps = progress or QuietProgress()
    opened = open_embeddings(source, ids=ids)
    mass = item_weights(popularity, len(opened), name="popularity")
    at = published.items.index_of(opened.ids.strings())
    shared = np.flatnonzero(at >= 0)
    if len(shared) == 0:
        raise InputError(
            f"none of the {len(opened)} items was published before (they are called like "
            f"{opened.ids.example}, the published like {published.items.example}); "
            "give the same ids, or fit a new model"
        )
    # What an item's new codes are held against: its published ones, but for a reassigned last code,
    # which differs from the model's on purpose.
    base = published.encoded if published.info.unique == "reassign" else published.codes
    both = _Both(
        old=base[at[shared], : previous.levels].astype(np.int64),
        rows=shared,
        weights=None if mass is None else mass[shared],
    )
    model = _matched(
        fit_again(previous, opened, warm_start=warm_start, progress=steps),
        previous, opened, both, steps,
    )  # fmt: skip
    plain = model.encode(opened, beam_width=published.info.beam_width, progress=steps)
    stays, budget, held_back = _staying(model, opened, plain, published, at, both, max_churn)
    result, unplaced = _publish(model, opened, plain, published, at, stays, steps)
    ways: list[tuple[str, Tokenizer, Codes]] = [
        ("previous", previous, previous.encode(opened, progress=steps).codes),
        ("refreshed", model, plain.codes),
        ("published", model, result.codes[:, : model.levels]),
    ]
    if compare:
        fresh = fit_again(previous, opened, warm_start=False, progress=steps)
        matched = _matched(fresh, previous, opened, both, steps)
        ways.append(("fresh", fresh, fresh.encode(opened, progress=steps).codes))
        ways.append(("fresh, matched", matched, matched.encode(opened, progress=steps).codes))
    before = published.codes[at[shared]]
    after = result.codes[shared]
    report = RefreshReport(
        items=len(opened),
        new=len(opened) - len(shared),
        removed=len(published) - len(shared),
        churn=churn(before.astype(np.int64), after.astype(np.int64), weights=both.weights),
        budget=budget,
        held_back=held_back,
        unplaced=unplaced,
        generations=_judge(opened, ways, both),
    )
    return Refresh(model, result, report)


@dataclass(frozen=True)
class _Both:
    """Items in both generations: codes before, rows now, weights."""

    old: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64] | None


def _matched(
    model: Tokenizer, previous: Tokenizer, source: EmbeddingSource, both: _Both, steps: Progress
) -> Tokenizer:
    """Renumber a model's codewords after the previous generation's."""
    new = model.encode(source, progress=steps).codes[both.rows]
    weights = both.weights
    if weights is not None:  # items nobody asked for count a little, so that they are matched too
        weights = weights + 1e-3 * max(float(weights.mean()), 1e-12)
    numbers = [
        match_codes(both.old[:, level], new[:, level], old_book, new_book, weights=weights)
        for level, (old_book, new_book) in enumerate(
            zip(previous.codebooks, model.codebooks, strict=True)
        )
    ]
    return renumbered(model, numbers)


def _staying(
    model: Tokenizer,
    source: EmbeddingSource,
    plain: SemanticIds,
    published: SemanticIds,
    at: npt.NDArray[np.int64],
    both: _Both,
    max_churn: float | None,
) -> tuple[npt.NDArray[np.int64], int | None, int]:
    """Rows that keep their published id, the budget in items, and how many it holds back."""
    now = plain.codes[both.rows]
    moving = (now != both.old).any(axis=1)
    if published.info.unique == "reassign":  # one that a budget held under another prefix
        moving |= (now[:, :-1] != published.codes[at[both.rows], :-1]).any(axis=1)
    if max_churn is None:
        return both.rows[~moving], None, 0
    budget = int(max_churn * len(both.rows))
    movers = both.rows[moving]
    if len(movers) <= budget:
        return both.rows[~moving], budget, 0
    gain = np.empty(len(movers))
    for start in range(0, len(movers), BLOCK_ROWS):
        part = movers[start : start + BLOCK_ROWS]
        kept = published.codes[at[part], : model.levels]
        left = model.latent(source.rows(part)) - model.quantize(kept)
        squared = np.einsum("nd,nd->n", left, left, dtype=np.float64)
        gain[start : start + len(part)] = squared - plain.residual_norms[part].astype(float) ** 2
    names = source.ids.take(movers).hash64()
    order = np.lexsort((names, -gain))
    kept = np.concatenate([both.rows[~moving], movers[order[budget:]]]).astype(np.int64)
    return np.sort(kept), budget, len(movers) - budget


def _publish(
    model: Tokenizer,
    source: EmbeddingSource,
    plain: SemanticIds,
    published: SemanticIds,
    at: npt.NDArray[np.int64],
    stays: npt.NDArray[np.int64],
    steps: Progress,
) -> tuple[SemanticIds, int]:
    """Place the items that move or are new around those that stay."""
    info = published.info
    target: CodesInfo = replace(plain.info, unique=info.unique, capacity=info.capacity)
    fixed = np.zeros(len(plain), bool)
    fixed[stays] = True
    codes = np.zeros((len(plain), published.levels), published.codes.dtype)
    codes[stays] = published.codes[at[stays]]
    if target.unique == "none":
        given = np.where(fixed[:, None], codes, plain.codes)
        if np.array_equal(given, plain.codes):
            return plain, 0
        return replace(plain, codes=given, model_codes=plain.codes), 0
    done = place(
        plain,
        target,
        published=fixed,
        codes=codes,
        capacity=info.codebook_sizes[-1] if info.unique == "append" else info.capacity,
        tokenizer=model,
        embeddings=source,
        progress=steps,
    )
    return done.ids, done.report.unplaced


def _judge(
    source: EmbeddingSource, ways: list[tuple[str, Tokenizer, Codes]], both: _Both
) -> tuple[Generation, ...]:
    """Measure the errors of all ways; the first pass over the embeddings is for their mean."""
    held = held_out_mask(source.ids, ways[0][1].validation_fraction, salt=HELD_OUT_SALT)
    mean = mean_row(source)
    errors = [(ErrorSums(), ErrorSums()) for _ in ways]
    for start, x in source.blocks(BLOCK_ROWS):
        span = slice(start, start + len(x))
        spread = _squared_norms(x - mean)
        for (whole, held_out), (_, tokenizer, codes) in zip(errors, ways, strict=True):
            squared = _squared_norms(x - tokenizer.decode(codes[span].astype(np.int64)))
            for sums, rows in ((whole, slice(None)), (held_out, held[span])):
                each = float(squared[rows].sum()), float(spread[rows].sum())
                sums.add_(ErrorSums(len(squared[rows]), *each))
    result = []
    for (whole, held_out), (name, _, codes) in zip(errors, ways, strict=True):
        counted = collisions(codes)
        moved = churn(both.old, codes[both.rows].astype(np.int64), weights=both.weights)
        result.append(
            Generation(
                name=name,
                error=whole.relative or 0.0,
                held_out_error=held_out.relative,
                collision_rate=counted.collision_rate,
                shared_share=counted.shared_share,
                churn=None if name == "previous" else moved,
            )
        )
    return tuple(result)


def _squared_norms(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    norms: npt.NDArray[np.float64] = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    return norms
