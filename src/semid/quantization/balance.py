"""Balanced K-means: offsets added to squared distances even out how many rows take each codeword.

A row takes the codeword of least ``|x - c|^2 + p`` (a power diagram): a function of the row alone.
The offset is a coordinate, ``[x, 0]`` and ``[c, sqrt(p)]``, so that the search for the nearest
codeword finds it. Offsets rise for codewords with too many rows and fall for those with too few,
while codewords move to the means of their rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semid.options import MAX_WEIGHT, Options, option
from semid.quantization.blocks import Blocks, read_ahead
from semid.quantization.nearest import assign, index_codebook

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

STEP = 0.1
"""First step of an offset per unit of log size, in mean squared residuals."""
GROW, SHRINK = 1.2, 0.5
"""Factors of a step whose sign stays or turns: those of Rprop."""


@dataclass(frozen=True, kw_only=True)
class BalanceOptions(Options):
    """How codewords of `RQKMeans` are given equal numbers of rows."""

    mode: str = option(
        "off",
        choices=("off", "soft", "hard"),
        name="balance.mode",
        help="off: as K-means has it; hard: offsets without limit, and codewords fitted to groups "
        "of limited size; soft: offsets up to a limit, so that no row goes far.",
    )
    strength: float = option(
        1.0,
        gt=0,
        le=MAX_WEIGHT,
        help="Limit of soft offsets, in mean squared residuals of the level.",
    )
    slack: float = option(
        0.05,
        ge=0,
        le=MAX_WEIGHT,
        help="How much larger than the mean a group may be in hard fitting, as a share.",
    )
    rounds: int = option(40, ge=1, help="Rounds of assignment and update per level.")


@dataclass(frozen=True)
class BalancedLevel:
    """A balanced codebook: ``[c, sqrt(p)]`` ``(codes, dim + 1)``, and the code of each row."""

    codebook: Array
    labels: Labels


def balance_level(
    rows: Blocks,
    centroids: Array,
    *,
    options: BalanceOptions,
    weights: Doubles | None = None,
    threads: int | None = None,
) -> BalancedLevel:
    """Balance a level that K-means has fitted.

    The most even round is the result: the one with the largest entropy of sizes. In hard mode the
    labels are those of groups within the limit; offsets give the same but for the rows that had to
    move to a codeword further away.

    Cost: a search of all rows per round, and in hard mode the distances from the rows of groups
    that are too large to all codewords.

    Shapes: ``rows`` (items, dim), ``centroids`` (codes, dim), ``weights`` (items,).
    """
    count, items = len(centroids), len(rows)
    capacity = math.ceil((1 + options.slack) * items / count)
    offsets = np.zeros(count)
    # The mean squared residual without offsets is the unit of their steps.
    labels, unit = _assign(rows, centroids, offsets, threads)
    limit = options.strength * unit if options.mode == "soft" else np.inf
    best = (_entropy(labels, count), BalancedLevel(_augment(centroids, offsets), labels))
    steps, before = np.full(count, STEP * unit), np.zeros(count)
    for number in range(1, options.rounds + 1):
        # The offset of a codeword with too many rows rises. Each has a step of its own, which
        # grows while its sign stays and shrinks when it turns (Rprop, Riedmiller and Braun 1993):
        # offsets that matter in a dense region are smaller by orders than those in a sparse one.
        excess = np.log1p(np.bincount(labels, minlength=count)) - np.log1p(items / count)
        steps *= np.where(excess * before < 0, SHRINK, np.where(excess * before > 0, GROW, 1.0))
        before = excess
        offsets = np.clip(offsets + steps * np.clip(excess, -1.0, 1.0), 0.0, limit)
        labels, _ = _assign(rows, centroids, offsets, threads)
        entropy = _entropy(labels, count)
        groups = labels
        if options.mode == "hard":
            groups = limit_sizes(rows, labels, centroids, offsets, capacity)
        if entropy > best[0]:
            codebook = _augment(centroids, offsets - offsets.min())
            best = (entropy, BalancedLevel(codebook, groups))
        # Codewords move in the first two thirds of the rounds; then offsets settle around them.
        if 3 * number < 2 * options.rounds:
            centroids = _means(rows, groups, centroids, weights)
    return best[1]


def _augment(centroids: Array, offsets: Doubles) -> Array:
    return np.column_stack([centroids, np.sqrt(offsets)]).astype(np.float32)


def _assign(
    rows: Blocks, centroids: Array, offsets: Doubles, threads: int | None
) -> tuple[Labels, float]:
    """Return the code of each row, and the mean of squared distance plus offset."""
    codebook = index_codebook(_augment(centroids, offsets))
    labels, total = np.empty(len(rows), dtype=np.int64), 0.0
    for start, block in read_ahead(rows):
        codes, distances = assign(np.pad(block, ((0, 0), (0, 1))), codebook, threads=threads)
        labels[start : start + len(block)] = codes
        total += float(distances.sum(dtype=np.float64))
    return labels, total / max(len(rows), 1)


def _means(rows: Blocks, labels: Labels, before: Array, weights: Doubles | None) -> Array:
    """Return the mean of each group's rows; groups without rows keep their codeword."""
    sums, mass = np.zeros(before.shape), np.zeros(len(before))
    for start, block in read_ahead(rows):
        span = slice(start, start + len(block))
        weight = np.ones(len(block)) if weights is None else weights[span]
        np.add.at(sums, labels[span], block * weight[:, None])
        mass += np.bincount(labels[span], weight, minlength=len(before))
    filled = mass > 0
    means = before.copy()
    means[filled] = sums[filled] / mass[filled, None]
    return means


def _entropy(labels: Labels, count: int) -> float:
    shares = np.bincount(labels, minlength=count) / len(labels)
    shares = shares[shares > 0]
    return -float((shares * np.log(shares)).sum())


def limit_sizes(
    rows: Blocks, labels: Labels, centroids: Array, offsets: Doubles, capacity: int
) -> Labels:
    """Move rows out of groups above ``capacity``, those first that lose least by it.

    Returns labels ``(items,)`` of groups of at most ``capacity`` rows, which have room for all.
    """
    labels = labels.copy()
    sizes = np.bincount(labels, minlength=len(centroids))
    wide = centroids.astype(np.float64)
    squares = np.einsum("kd,kd->k", wide, wide) + offsets
    for group in np.argsort(-sizes, kind="stable"):
        excess = int(sizes[group]) - capacity
        if excess <= 0:
            break
        members = np.flatnonzero(labels == group)
        # Distances without |x|^2, which is the same for all codewords of a row.
        costs = squares - 2.0 * (rows.rows(members).astype(np.float64) @ wide.T)
        at_group = costs[:, group].copy()
        while excess:
            open_groups = np.flatnonzero(sizes < capacity)
            choice = costs[:, open_groups].argmin(axis=1)
            losses = costs[np.arange(len(members)), open_groups[choice]] - at_group
            # In the order of the loss; who finds its group filled meanwhile chooses again.
            moved = _move(
                np.argsort(losses, kind="stable"), open_groups[choice], sizes, capacity, excess
            )
            labels[members[moved]] = open_groups[choice[moved]]
            excess -= len(moved)
            sizes[group] -= len(moved)
            stays = np.setdiff1d(np.arange(len(members)), moved)
            members, costs, at_group = members[stays], costs[stays], at_group[stays]
    return labels


def _move(
    order: Labels, targets: Labels, sizes: Labels, capacity: int, most: int
) -> npt.NDArray[np.int64]:
    """Return which rows move to their targets, whose sizes grow in place."""
    moved: list[int] = []
    for row in order.tolist():
        if len(moved) == most:
            break
        if sizes[targets[row]] < capacity:
            sizes[targets[row]] += 1
            moved.append(row)
    return np.array(moved, dtype=np.int64)


def spread_offsets(codebooks: Sequence[Array]) -> list[Array]:
    """Give the offset of each level a column of its own: ``(codes, dim + levels)``.

    The offset of a level stays as a constant in the residual, so deeper levels do not see it and a
    beam adds up the offsets of all levels.
    """
    levels, dim = len(codebooks), codebooks[0].shape[1] - 1
    spread = []
    for level, codebook in enumerate(codebooks):
        book = np.zeros((len(codebook), dim + levels), dtype=np.float32)
        book[:, :dim], book[:, dim + level] = codebook[:, :dim], codebook[:, dim]
        spread.append(book)
    return spread
