"""How well numbers of Semantic IDs rank tokenizers by an outcome: statistics on small panels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np
import numpy.typing as npt

from semid.diagnostics.pairs import average_ranks, spearman
from semid.seeds import numpy_generator

Floats = npt.NDArray[np.float64]

MIN_TOKENIZERS = 6
"""Fewer tokenizers than this have no rank correlation worth its name."""

GAPS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Bounds of the classes of pairs, by the difference of their outcomes over the larger one."""


@dataclass(frozen=True)
class Panel:
    """Numbers and one outcome of the tokenizers of one data set, means over seeds.

    Attributes:
        names: of the tokenizers.
        numbers: name -> ``(tokenizers,)``, NaN where it was not measured.
        outcome: ``(tokenizers,)``; higher is better.
        groups: ``(tokenizers, groups)`` sum of the outcome over the users of a group, or None.
        users: ``(groups,)`` users of each group, or None.
    """

    names: tuple[str, ...]
    numbers: Mapping[str, Floats]
    outcome: Floats
    groups: Floats | None = None
    users: Floats | None = None


Panels = Mapping[str, Panel]
"""Data set -> its panel."""


def rank_correlation(x: Floats, y: Floats) -> float | None:
    """Return Spearman's correlation where both are known; None with too few, or one constant."""
    known = ~(np.isnan(x) | np.isnan(y))
    return spearman(x[known], y[known]) if known.sum() >= MIN_TOKENIZERS else None


def rank_correlations(x: Floats, y: Floats) -> Floats:
    """Return `rank_correlation` of every column of ``x`` ``(n, columns)``, NaN where it is None.

    Cost: ``n^2`` comparisons per column, all columns at once.
    """
    known = ~(np.isnan(x) | np.isnan(y)[:, None])

    def centered_ranks(values: Floats) -> Floats:
        # The rank of a value is the number of smaller ones, plus half of its equals and a half.
        other, own = values[None], values[:, None]
        ranks = ((other < own) & known[None]).sum(1) + ((other == own) & known[None]).sum(1) / 2
        centered: Floats = np.where(known, ranks - known.sum(0) / 2, 0.0)
        return centered

    a, b = centered_ranks(x), centered_ranks(np.broadcast_to(y[:, None], x.shape))
    scale = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    defined = (known.sum(0) >= MIN_TOKENIZERS) & (scale > 0)
    correlations: Floats = np.full(x.shape[1], np.nan)
    np.divide((a * b).sum(0), scale, out=correlations, where=defined)
    return correlations


def partial_correlation(x: Floats, y: Floats, given: Sequence[Floats]) -> float | None:
    """Return the correlation of the ranks of two once those of others are regressed out.

    None where fewer than `MIN_TOKENIZERS` degrees of freedom are left, or nothing varies.
    """
    known = ~np.isnan(np.stack([x, y, *given])).any(0)
    count = int(known.sum())
    if count - len(given) < MIN_TOKENIZERS:
        return None
    ranks = [average_ranks(each[known]) - (count + 1) / 2 for each in (x, y, *given)]
    base = np.stack(ranks[2:], axis=1)
    # Ranks are centered, so the regression needs no constant. What is left of a rank that the
    # others decide is rounding, and stands for nothing.
    left = [rank - base @ np.linalg.lstsq(base, rank, rcond=None)[0] for rank in ranks[:2]]
    lengths = [float(np.linalg.norm(each)) for each in left]
    if min(lengths) <= 1e-6 * count:
        return None
    return float(np.clip(left[0] @ left[1] / (lengths[0] * lengths[1]), -1.0, 1.0))


def mean_correlation(panels: Panels, number: str, given: Sequence[str] = ()) -> float | None:
    """Return the mean over data sets of a number's rank correlation with the outcome."""
    values = []
    for panel in panels.values():
        x, others = panel.numbers[number], [panel.numbers[name] for name in given]
        value = (
            partial_correlation(x, panel.outcome, others)
            if given
            else rank_correlation(x, panel.outcome)
        )
        if value is not None:
            values.append(value)
    return fmean(values) if values else None


def bootstrap_correlations(
    panels: Panels, numbers: Sequence[str], *, draws: int, seed: int
) -> dict[str, tuple[float, float] | None]:
    """Return 95 % percentile intervals of `mean_correlation`.

    Each draw takes tokenizers with replacement, the same on every data set, and groups of users
    where there are any: both the choice of tokenizers and the users are samples.

    Cost: ``draws`` correlations per number and data set.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel.names))
    columns = {
        data: np.stack([panel.numbers[number] for number in numbers], axis=1)
        for data, panel in panels.items()
    }
    rng = numpy_generator(seed, "tokenizers and users")
    correlations = np.empty((draws, len(panels), len(numbers)))
    for draw in range(draws):
        drawn = rng.integers(0, len(names), len(names))
        for place, (data, panel) in enumerate(panels.items()):
            row_of = {name: row for row, name in enumerate(panel.names)}
            rows = [row_of[names[n]] for n in drawn if names[n] in row_of]
            outcome = panel.outcome
            if panel.groups is not None and panel.users is not None:
                count = len(panel.users)
                weights = np.bincount(rng.integers(0, count, count), minlength=count)
                outcome = panel.groups @ weights / max(float(panel.users @ weights), 1.0)
            correlations[draw, place] = rank_correlations(columns[data][rows], outcome[rows])
    intervals: dict[str, tuple[float, float] | None] = {}
    for column, number in enumerate(numbers):
        draw_values = correlations[:, :, column]
        draw_values = draw_values[~np.isnan(draw_values).all(1)]
        # A number that half of the draws cannot rank has no interval.
        intervals[number] = None
        if len(draw_values) > draws / 2:
            low, high = np.quantile(np.nanmean(draw_values, axis=1), [0.025, 0.975])
            intervals[number] = float(low), float(high)
    return intervals


def ranked_pairs(score: Floats, outcome: Floats) -> Iterator[tuple[float, float]]:
    """Yield for each pair of tokenizers how far apart they are, and whether they are ranked right.

    The first is the difference of the outcomes over the larger one, the second 1 where the better
    of the two has the higher score, 0.5 where the scores are equal. Pairs of equal outcome, and
    those without a score, are left out.
    """
    for a, b in combinations(range(len(score)), 2):
        gap, lead = outcome[a] - outcome[b], score[a] - score[b]
        if gap and not np.isnan(lead):
            larger = max(abs(outcome[a]), abs(outcome[b]))
            yield abs(gap) / larger, 0.5 + 0.5 * float(np.sign(gap) * np.sign(lead))


def scaled_ranks(panel: Panel, signs: Mapping[str, float]) -> dict[str, Floats]:
    """Return the signed ranks of numbers over their count ``(tokenizers,)``, NaN where unknown."""
    scaled = {}
    for name, sign in signs.items():
        known = ~np.isnan(panel.numbers[name])
        scaled[name] = np.full(len(known), np.nan)
        if known.any():
            ranks = average_ranks(panel.numbers[name][known])
            scaled[name][known] = sign * ranks / known.sum()
    return scaled


@dataclass(frozen=True)
class LeftOut:
    """The numbers that rank best on some data sets, tried on one that they were not chosen on."""

    data: str
    signs: Mapping[str, float]  # number -> 1 where higher is better, else -1
    correlation: float | None  # of their combined score with the outcome there
    pairs: tuple[tuple[float, float], ...]  # see `ranked_pairs`


def sign_of(panels: Panels, number: str) -> float | None:
    """Return 1 where higher values of a number go with better outcomes, -1 where lower do."""
    value = mean_correlation(panels, number)
    return None if value is None or value == 0 else float(np.sign(value))


def try_left_out(panels: Panels, candidates: Sequence[Sequence[str]]) -> list[LeftOut]:
    """Choose among candidates on all data sets but one, and try the choice on that one.

    Args:
        panels: at least two data sets; with fewer there is nothing to leave out.
        candidates: sets of numbers; the score of a set is the sum of their signed ranks.

    Returns:
        A trial per data set, in order.
    """
    trials = []
    for data, panel in panels.items():
        others = {name: each for name, each in panels.items() if name != data}
        # Signs are those of the other data sets too: nothing here has seen this one.
        names = dict.fromkeys(name for candidate in candidates for name in candidate)
        signs = {name: sign for name in names if (sign := sign_of(others, name)) is not None}
        usable = [each for each in candidates if all(name in signs for name in each)]
        if not usable:
            continue
        # The score of a candidate is the sum of the signed ranks of its numbers.
        correlations = []
        for other in others.values():
            ranks = scaled_ranks(other, signs)
            scores = np.stack([sum(ranks[name] for name in each) for each in usable], axis=1)
            correlations.append(rank_correlations(scores, other.outcome))
        # A candidate must have a correlation on every one of the other data sets.
        means = np.nan_to_num(np.mean(correlations, axis=0), nan=-np.inf)
        best = {name: signs[name] for name in usable[int(means.argmax())]}
        score = np.sum(list(scaled_ranks(panel, best).values()), axis=0)
        pairs = tuple(ranked_pairs(score, panel.outcome))
        trials.append(LeftOut(data, best, rank_correlation(score, panel.outcome), pairs))
    return trials


def share_right(trials: Sequence[LeftOut], low: float = 0.0, high: float = np.inf) -> float | None:
    """Return the share of pairs ranked right whose distance lies in ``(low, high]``."""
    right = [good for trial in trials for gap, good in trial.pairs if low < gap <= high]
    return fmean(right) if right else None
