"""Drift: two snapshots of a catalogue's embeddings under one codebook.

A shift of usage counts only beyond what two samples of these sizes show by chance. The thresholds
are ours and not calibrated; the figures are reported beside the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.additions import NOVEL, norm_quantiles, novelty
from semid.data.blocks import Moments
from semid.data.embeddings import open_embeddings
from semid.diagnostics.overlap import REPORT_SCALE, overlap_levels
from semid.errors import InputError
from semid.health import LevelUsage, usage
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.quantization.blocks import BLOCK_ROWS
from semid.results import Result
from semid.tokenizers.base import Tokenizer

# Growth of the quantization error. A tenth is what a coarser codebook would cost; a quarter is most
# of what one more level of codewords gains.
ERROR_WATCH, ERROR_REFRESH = 1.1, 1.25
# Total variation beyond chance: the share of items with other codes.
SHIFT_WATCH, SHIFT_REFRESH = 0.1, 0.25
# Share of novel items among the new ones; 1 % is expected without drift.
NOVEL_WATCH, NOVEL_REFRESH = 0.03, 0.1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class LevelDrift(Result):
    """Usage of one level in two snapshots.

    Attributes:
        level: level, counted from 0.
        total_variation: half the sum of absolute differences of the code shares, in [0, 1].
        expected: mean ``total_variation`` of two samples of these sizes from one distribution,
            with as many common items of equal codes.
        excess: ``total_variation`` beyond ``expected``, not below 0.
        jensen_shannon: Jensen-Shannon divergence of the code shares in bits, in [0, 1].
        perplexity_before, perplexity_after: ``exp(H)`` of the code shares.
        effective_before, effective_after: effective codebook size at noise 0.1 (DRQ eq. 12).
        dead_before, dead_after: number of codes without an item.
    """

    level: int
    total_variation: float
    expected: float
    excess: float
    jensen_shannon: float
    perplexity_before: float
    perplexity_after: float
    effective_before: float
    effective_after: float
    dead_before: int
    dead_after: int


@dataclass(frozen=True)
class Drift(Result):
    """Two snapshots of a catalogue under one codebook.

    Attributes:
        verdict: ``none``, ``watch`` or ``refresh``: that of the worst reason.
        reasons: arguments for a refresh, with figures; empty for ``none``.
        items_before, items_after: items of each snapshot.
        shared: items in both.
        changed: share of the shared items whose codes differ; None without any.
        error_before, error_after: mean squared quantization error over the latent variance of the
            first snapshot.
        norm_quantiles_before, norm_quantiles_after: residual norms at 5, 25, 50, 75, 95 and 99 %.
        novel_after: share of the second snapshot beyond 99 % of the training distribution.
        novel_new: the same among items that are not in the first; None without any.
        levels: usage by level.
    """

    verdict: str
    reasons: tuple[str, ...]
    items_before: int
    items_after: int
    shared: int
    changed: float | None
    error_before: float
    error_after: float
    norm_quantiles_before: tuple[float, ...]
    norm_quantiles_after: tuple[float, ...]
    novel_after: float
    novel_new: float | None
    levels: tuple[LevelDrift, ...]

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        lines = [
            f"drift: {self.verdict} ({self.items_before:,} -> {self.items_after:,} items, "
            f"{self.shared:,} in both)"
        ]
        lines += [
            f"  level {level.level + 1}: usage shift {level.total_variation:.3f} (chance "
            f"{level.expected:.3f}), Jensen-Shannon {level.jensen_shannon:.3f} bits, "
            f"perplexity {level.perplexity_before:.1f} -> {level.perplexity_after:.1f}, "
            f"effective size {level.effective_before:.1f} -> {level.effective_after:.1f}"
            for level in self.levels
        ]
        lines.append(
            f"  quantization error over the first snapshot's variance: {self.error_before:.4f} -> "
            f"{self.error_after:.4f}"
        )
        new = "" if self.novel_new is None else f", {self.novel_new:.1%} of the new ones"
        lines.append(f"  beyond 99 % of the training distribution: {self.novel_after:.1%}{new}")
        if self.changed is not None:
            lines.append(f"  items in both whose codes differ: {self.changed:.2%}")
        return "\n".join([*lines, *(f"  {reason}" for reason in self.reasons)])


@with_progress
def drift(
    tokenizer: Tokenizer,
    before: Any,
    after: Any,
    *,
    before_ids: Any = None,
    after_ids: Any = None,
    progress: ProgressArgument = None,
) -> Drift:
    """Compare two snapshots of a catalogue's embeddings under one codebook.

    Args:
        tokenizer: a fitted tokenizer.
        before: embeddings as they were, best those it was fitted on.
        after: embeddings as they are.
        before_ids: item ids for a source that has none.
        after_ids: the same for the second.
        progress: callback that receives progress events.

    Returns:
        The figures and a verdict: ``refresh`` when the error grew by a quarter, the usage of a
        level shifted by a quarter beyond chance, or a tenth of the new items are novel; ``watch``
        at 1.1 times, a tenth and 3 %.

    Raises:
        InputError: if a snapshot has no items.
        EmbeddingError: for rows of another width.

    Example:
        >>> print(semid.drift(model, old_embeddings, new_embeddings).summary())

    Cost: two passes over each snapshot; ``O(codes^2)`` per level for the effective sizes.
    """
    steps = progress or QuietProgress()
    old = open_embeddings(before, ids=before_ids)
    new = open_embeddings(after, ids=after_ids)
    if not len(old) or not len(new):
        raise InputError(f"the snapshots have {len(old)} and {len(new)} items; give some in both")
    first, second = tokenizer.encode(old, progress=steps), tokenizer.encode(new, progress=steps)
    # Mean squared distance of latents to their mean, and standard deviation per element.
    latents = Moments.of((start, tokenizer.latent(x)) for start, x in old.blocks(BLOCK_ROWS))
    variance = max(latents.variance, 1e-300)
    std = float(np.sqrt(variance / latents.total.size))
    usages = [usage(ids.codes, tokenizer.codebook_sizes) for ids in (first, second)]
    overlaps = [
        overlap_levels(tokenizer.codebooks, levels, latent_std=std, scales=(REPORT_SCALE,))
        for levels in usages
    ]
    sizes = [[level.at(REPORT_SCALE).effective_size for level in levels] for levels in overlaps]
    # Items in both snapshots show whether embeddings moved; the others are new.
    position = first.items.index_of(second.items.strings())
    shared = position >= 0
    same = first.codes[position[shared]] == second.codes[shared]
    levels = tuple(
        _level(a, b, size_a, size_b, shared=int(count))
        for a, b, size_a, size_b, count in zip(*usages, *sizes, same.sum(axis=0), strict=True)
    )
    novel = novelty(second.residual_norms, norm_quantiles(first, tokenizer)) > NOVEL
    novel_new = float(novel[~shared].mean()) if (~shared).any() else None
    norms = [ids.residual_norms.astype(np.float64) for ids in (first, second)]
    errors = [float((each**2).mean()) / variance for each in norms]
    quantiles = [tuple(np.quantile(each, QUANTILES).tolist()) for each in norms]
    verdict, reasons = _verdict(levels, errors, novel_new, float(novel.mean()))
    return Drift(
        verdict=verdict,
        reasons=reasons,
        items_before=len(first),
        items_after=len(second),
        shared=int(shared.sum()),
        changed=float((~same).any(axis=1).mean()) if shared.any() else None,
        error_before=errors[0],
        error_after=errors[1],
        norm_quantiles_before=quantiles[0],
        norm_quantiles_after=quantiles[1],
        novel_after=float(novel.mean()),
        novel_new=novel_new,
        levels=levels,
    )


def usage_shift(a: LevelUsage, b: LevelUsage, *, shared: int) -> tuple[float, float]:
    """Return the total variation of a level's code shares, and its mean by chance.

    ``shared`` is the number of items in both whose code at this level is the same.
    """
    # Total variation of the shares of the codes: the share of items that would have to change.
    p, q = a.probabilities, b.probabilities
    pooled = (a.counts + b.counts) / (a.items + b.items)
    variation = 0.5 * float(np.abs(p - q).sum())
    # Mean of |p - q| for two multinomial samples, by the normal approximation. Items in both with
    # the same code add equally to p and q, so their covariance is subtracted.
    factor = 1.0 / a.items + 1.0 / b.items - 2.0 * shared / (float(a.items) * b.items)
    difference_variance = pooled * (1.0 - pooled) * max(factor, 0.0)
    return variation, 0.5 * float(np.sqrt(2.0 / np.pi * difference_variance).sum())


def _level(
    a: LevelUsage, b: LevelUsage, size_a: float, size_b: float, *, shared: int
) -> LevelDrift:
    variation, expected = usage_shift(a, b, shared=shared)
    p, q = a.probabilities, b.probabilities
    divergence = _entropy(0.5 * (p + q)) - 0.5 * (_entropy(p) + _entropy(q))
    return LevelDrift(
        level=a.level,
        total_variation=variation,
        expected=expected,
        excess=max(variation - expected, 0.0),
        jensen_shannon=max(divergence, 0.0),
        perplexity_before=a.perplexity,
        perplexity_after=b.perplexity,
        effective_before=size_a,
        effective_after=size_b,
        dead_before=a.dead,
        dead_after=b.dead,
    )


def _entropy(p: npt.NDArray[np.float64]) -> float:
    positive = p[p > 0]
    return float(-(positive * np.log2(positive)).sum())


def _verdict(
    levels: tuple[LevelDrift, ...], errors: list[float], novel_new: float | None, novel: float
) -> tuple[str, tuple[str, ...]]:
    growth = errors[1] / errors[0] if errors[0] > 0 else 1.0
    worst = max(levels, key=lambda level: level.excess)
    share, group = (novel, "the items") if novel_new is None else (novel_new, "the new items")
    checks = [
        (
            growth, ERROR_WATCH, ERROR_REFRESH,
            f"the quantization error is {growth:.2f} times what it was",
        ),
        (
            worst.excess, SHIFT_WATCH, SHIFT_REFRESH,
            f"level {worst.level + 1}: {worst.excess:.1%} of the items have other codes than "
            "before, beyond chance",
        ),
        (
            share, NOVEL_WATCH, NOVEL_REFRESH,
            f"{share:.1%} of {group} lie where the codebook has no codewords (1 % is usual)",
        ),
    ]  # fmt: skip
    reasons = tuple(reason for value, watch, _, reason in checks if value > watch)
    if any(value > refresh for value, _, refresh, _ in checks):
        return "refresh", reasons
    return "watch" if reasons else "none", reasons
