"""A new generation that keeps the ids it can.

1. The codebooks are fitted again on the changed catalogue, from the old ones where possible.
2. Codewords take the numbers of the old ones by assignment.
3. Items whose new codes are the published ones (for reassigned ids: those the model had) keep their
   id. Of the others, those whose error falls most move, up to the budget; the rest keep the
   published id at a distortion that the report states.
4. Items that move and new ones are placed around the ids that stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.additions import check_model
from semid.catalogue.matching import Churn, churn, match_codes
from semid.catalogue.uniqueness import capacity_of, place
from semid.codes import SemanticIds
from semid.data.blocks import squared_norms
from semid.data.embeddings import open_embeddings
from semid.data.ids import held_out_mask
from semid.data.source import EmbeddingSource
from semid.errors import InputError, UsageError
from semid.health import ErrorSums, collisions
from semid.progress import Progress, ProgressArgument, QuietProgress, with_progress
from semid.quantization.blocks import BLOCK_ROWS
from semid.results import Result
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import item_weights, mean_row
from semid.tokenizers.stored import HELD_OUT_SALT

Codes = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Generation(Result):
    """Quality of one set of codes for the changed catalogue.

    Attributes:
        name: ``previous``, ``refreshed`` (its own codes), ``published`` (the result), ``fresh`` (a
            fit from scratch) or ``fresh, matched`` (the same, renumbered).
        error: relative error ``sum |x - x_hat|^2 / sum |x - mean|^2`` over all items.
        held_out_error: the same over held-out items, with the mean of all; None without any.
        collision_rate: ``1 - unique/N`` of these codes.
        colliding_item_rate: share of items in shared buckets.
        churn: against the published ids, without an appended token and before a reassigned last
            code; None for ``previous``.
    """

    name: str
    error: float
    held_out_error: float | None
    collision_rate: float
    colliding_item_rate: float
    churn: Churn | None


@dataclass(frozen=True)
class RefreshReport(Result):
    """Effect of `refresh` on a catalogue.

    Attributes:
        items: items now.
        new: items that were not published before.
        removed: published items that are not in the catalogue any more.
        churn: of the published ids, appended tokens included.
        budget: number of items allowed to move; None without a budget.
        held_back: items that keep their id only because of the budget.
        unplaced: items without a free code or token; they share an id.
        generations: quality before and after, side by side.
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
        return next(entry for entry in self.generations if entry.name == name)

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        c = self.churn
        lines = [
            f"{self.items:,} items: {self.new:,} new, {self.removed:,} gone; of {c.items:,} "
            f"published before, {c.moved:,} ids changed ({c.share:.2%})"
        ]
        for name, shares in (
            ("changed by prefix of 1, 2, ... codes", c.prefix),
            ("the same by popularity", c.weighted_prefix),
        ):
            if shares is not None:
                lines.append(f"  {name}: {', '.join(f'{share:.2%}' for share in shares)}")
        if self.budget is not None:
            lines.append(
                f"  budget: {self.budget:,} changes; {self.held_back:,} items kept an id that is "
                "no longer their nearest"
            )
        for entry in self.generations:
            error = entry.held_out_error
            held_out = "" if error is None else f", held out {error:.4f}"
            moved = "" if entry.churn is None else f"; {entry.churn.share:.2%} of ids changed"
            lines.append(
                f"  {entry.name}: relative error {entry.error:.4f}{held_out}; 1 - unique/N "
                f"{entry.collision_rate:.4f}{moved}"
            )
        if self.unplaced:
            lines.append(f"  {self.unplaced:,} items have no free place and share an id")
        return "\n".join(lines)


@dataclass(frozen=True)
class Refresh:
    """The result of `refresh`.

    Attributes:
        tokenizer: model of the new generation.
        ids: its published ids, in the row order of the source.
        report: churn and quality.
    """

    tokenizer: Tokenizer
    ids: SemanticIds
    report: RefreshReport


def check_max_churn(max_churn: float | None) -> None:
    """Raise `UsageError` unless a budget of changes lies in [0, 1]."""
    if max_churn is not None and not 0 <= max_churn <= 1:
        raise UsageError(f"max_churn={max_churn}: give a share in [0, 1]")


@with_progress
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
    progress: ProgressArgument = None,
) -> Refresh:
    """Fit again on a changed catalogue and keep the published ids that can be kept.

    Args:
        previous: the model that made ``published``; it is not changed.
        published: published ids.
        source: embeddings of the catalogue now: old and new items.
        ids: item ids for a source that has none.
        popularity: ``(items,)`` weights in the row order of the source. They weight the reported
            churn and the matching of codes, not the fit.
        max_churn: share of the items in both generations whose id may change, in [0, 1]; None lets
            every item take its new code.
        warm_start: start from the old codebooks where the tokenizer supports it; the result is
            usually closer to the published ids.
        compare: fit from scratch too, and report it with and without renumbering.
        progress: callback that receives progress events.

    Returns:
        The model, the ids and the report. Ids are made unique by the method (``append`` or
        ``reassign``) of the published ones.

    Raises:
        UsageError: for a budget out of range or popularity that does not fit.
        FingerprintError: if ``previous`` did not make ``published``.
        InputError: if no item is in both.

    Example:
        >>> result = semid.refresh(model, ids, embeddings, ids=names, max_churn=0.1)
        >>> print(result.report.summary())

    Cost: a fit (two with ``compare``), three passes of encoding, and per level an assignment of
    ``O(codes^3)`` at worst.
    """
    check_max_churn(max_churn)
    check_model(published, previous)
    opened = open_embeddings(source, ids=ids)
    weights = item_weights(popularity, len(opened), name="popularity")
    run = _Run(previous, published, opened, weights, progress or QuietProgress())
    # Steps 1 and 2: fit again and renumber.
    model = run.renumbered(run.fit_again(warm_start=warm_start))
    plain = model.encode(opened, beam_width=published.info.beam_width, progress=run.progress)
    # Step 3: decide which rows keep their id. Step 4: place the others around them.
    stays, budget, held_back = run.unmoved_rows(model, plain, max_churn)
    result, unplaced = run.publish(model, plain, stays)

    candidates: list[tuple[str, Tokenizer, Codes]] = [
        ("previous", previous, run.encode(previous)),
        ("refreshed", model, plain.codes),
        ("published", model, result.codes[:, : model.levels]),
    ]
    if compare:
        fresh = run.fit_again(warm_start=False)
        matched = run.renumbered(fresh)
        candidates.append(("fresh", fresh, run.encode(fresh)))
        candidates.append(("fresh, matched", matched, run.encode(matched)))
    before = published.codes[run.published_rows].astype(np.int64)
    after = result.codes[run.rows].astype(np.int64)
    report = RefreshReport(
        items=len(opened),
        new=len(opened) - len(run.rows),
        removed=len(published) - len(run.rows),
        churn=churn(before, after, weights=run.weights),
        budget=budget,
        held_back=held_back,
        unplaced=unplaced,
        generations=run.measure(candidates),
    )
    return Refresh(model, result, report)


class _Run:
    """What the steps of a refresh share: both generations and the items that are in both.

    Attributes:
        rows: ``(shared,)`` rows of these items in the source.
        published_rows: ``(shared,)`` their rows in the published ids.
        old: ``(shared, levels)`` their codes before.
        weights: ``(shared,)`` their popularity, or None.
    """

    def __init__(
        self,
        previous: Tokenizer,
        published: SemanticIds,
        source: EmbeddingSource,
        weights: npt.NDArray[np.float64] | None,
        progress: Progress,
    ) -> None:
        self.previous, self.published = previous, published
        self.source, self.progress = source, progress
        self.position = published.items.index_of(source.ids.strings())
        self.rows = np.flatnonzero(self.position >= 0)
        if len(self.rows) == 0:
            raise InputError(
                f"none of the {len(source)} items was published before (they are called like "
                f"{source.ids.example}, the published like {published.items.example}); "
                "give the same ids, or fit a new model"
            )
        self.published_rows = self.position[self.rows]
        # New codes are compared with the published ones; for reassigned ids with the model's,
        # because a reassigned last code differs from them on purpose.
        base = published.encoded if published.info.unique == "reassign" else published.codes
        self.old = base[self.published_rows, : previous.levels].astype(np.int64)
        self.weights = None if weights is None else weights[self.rows]

    def encode(self, model: Tokenizer) -> Codes:
        """Return a model's codes ``(items, levels)``."""
        return model.encode(self.source, progress=self.progress).codes

    def fit_again(self, *, warm_start: bool) -> Tokenizer:
        """Fit the model of the next generation."""
        return self.previous.fit_again(self.source, warm_start=warm_start, progress=self.progress)

    def renumbered(self, model: Tokenizer) -> Tokenizer:
        """Renumber a model's codewords after the previous generation's."""
        # Numbers are free: a level's codewords take those of the old ones that share most items.
        new, weights = self.encode(model)[self.rows], self.weights
        if weights is not None:  # items without popularity count a little, to be matched too
            weights = weights + 1e-3 * max(float(weights.mean()), 1e-12)
        books = zip(self.previous.codebooks, model.codebooks, strict=True)
        return model.renumbered(
            [
                match_codes(self.old[:, level], new[:, level], *pair, weights=weights)
                for level, pair in enumerate(books)
            ]
        )

    def unmoved_rows(
        self, model: Tokenizer, plain: SemanticIds, max_churn: float | None
    ) -> tuple[npt.NDArray[np.int64], int | None, int]:
        """Return the rows that keep their id, the budget in items, and how many it holds back."""
        new = plain.codes[self.rows]
        moving = (new != self.old).any(axis=1)
        if self.published.info.unique == "reassign":
            # An earlier budget may have kept an id whose prefix is not the model's.
            prefix = self.published.codes[self.published_rows, :-1]
            moving |= (new[:, :-1] != prefix).any(axis=1)
        unmoved, movers = self.rows[~moving], self.rows[moving]
        if max_churn is None:
            return unmoved, None, 0
        budget = int(max_churn * len(self.rows))
        if len(movers) <= budget:
            return unmoved, budget, 0
        # The budget goes to the items whose squared error falls most: error at the published codes
        # in the new codebooks, minus error at the new codes. Ties: a hash of the item id decides.
        gain = np.empty(len(movers))
        for start in range(0, len(movers), BLOCK_ROWS):
            span = slice(start, start + BLOCK_ROWS)
            rows = movers[span]
            codes = self.published.codes[self.position[rows], : model.levels]
            residual = model.latent(self.source.rows(rows)) - model.quantize(codes)
            gain[span] = squared_norms(residual) - plain.residual_norms[rows].astype(float) ** 2
        order = np.lexsort((self.source.ids.take(movers).hash64(), -gain))
        stays = np.concatenate([unmoved, movers[order[budget:]]]).astype(np.int64)
        return np.sort(stays), budget, len(movers) - budget

    def publish(
        self, model: Tokenizer, plain: SemanticIds, stays: npt.NDArray[np.int64]
    ) -> tuple[SemanticIds, int]:
        """Place the items that move or are new around those that stay."""
        info = self.published.info
        target = replace(plain.info, unique=info.unique, capacity=info.capacity)
        fixed = np.zeros(len(plain), bool)
        fixed[stays] = True
        codes = np.zeros((len(plain), self.published.levels), self.published.codes.dtype)
        codes[stays] = self.published.codes[self.position[stays]]
        unique = place(
            plain,
            target,
            published=fixed,
            codes=codes,
            capacity=capacity_of(info),
            tokenizer=model,
            source=self.source,
            progress=self.progress,
        )
        return unique.ids, unique.report.unplaced

    def measure(self, candidates: list[tuple[str, Tokenizer, Codes]]) -> tuple[Generation, ...]:
        """Measure errors, collisions and churn of candidates in two passes over the embeddings."""
        fraction = self.previous.validation_fraction
        held_out = held_out_mask(self.source.ids, fraction, salt=HELD_OUT_SALT)
        mean = mean_row(self.source)
        sums = [(ErrorSums(), ErrorSums()) for _ in candidates]
        for start, x in self.source.blocks(BLOCK_ROWS):
            span = slice(start, start + len(x))
            # Errors are relative to the distance from the mean: 1 is what a constant would give.
            variance = squared_norms(x - mean)
            for totals, (_, tokenizer, codes) in zip(sums, candidates, strict=True):
                squared = squared_norms(x - tokenizer.decode(codes[span].astype(np.int64)))
                subset = squared[held_out[span]], variance[held_out[span]]
                for total, (a, b) in zip(totals, ((squared, variance), subset), strict=True):
                    total.add_(ErrorSums(len(a), float(a.sum()), float(b.sum())))
        generations = []
        for (error, held_out_error), (name, _, codes) in zip(sums, candidates, strict=True):
            buckets = collisions(codes)
            changed = churn(self.old, codes[self.rows].astype(np.int64), weights=self.weights)
            generations.append(
                Generation(
                    name=name,
                    error=error.relative or 0.0,
                    held_out_error=held_out_error.relative,
                    collision_rate=buckets.collision_rate,
                    colliding_item_rate=buckets.colliding_item_rate,
                    churn=None if name == "previous" else changed,
                )
            )
        return tuple(generations)
