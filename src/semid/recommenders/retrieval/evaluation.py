"""Ranks of users' next items among the whole catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.catalogue.beams import Buckets
from semid.catalogue.prefixes import PrefixIndex
from semid.errors import DivergedError
from semid.recommenders.retrieval.data import Ints, pack
from semid.recommenders.retrieval.metrics import LIST, MISSING, RECALLS, Ranks
from semid.recommenders.retrieval.networks import SCORES, NextItemModel


class TargetRanks(NamedTuple):
    """Ranks of targets.

    Attributes:
        items: among all items.
        without_history: among the items outside each user's history.
        ids: of the target's id among all ids; None without codes.
        listed: ``(items,)`` bool: which items any user's first `LIST` hold; none without lists.
    """

    items: Ranks
    without_history: Ranks
    ids: Ranks | None
    listed: npt.NDArray[np.bool_]


def class_buckets(network: NextItemModel, counts: Ints, **options: Any) -> Buckets:
    """Return the order of the items within each class; options as for `Buckets`."""
    index = PrefixIndex.build(network.classes.cpu().numpy()[:, None])
    return Buckets(index, popularity=counts, **options)


@torch.no_grad()
def target_ranks(
    network: NextItemModel,
    histories: Sequence[Ints],
    targets: Ints,
    *,
    counts: Ints,
    device: torch.device,
    lists: bool = True,
) -> TargetRanks:
    """Rank each history's target ``(users,)`` among all items of the catalogue.

    ``counts`` ``(items,)`` are the training interactions: they decide which items of one id come
    first in the lists; without ``lists`` none are made. Cost: users times classes; memory: `SCORES`
    scores.
    """
    was_training = network.training
    network.eval()
    buckets = class_buckets(network, counts) if lists else None
    classes = network.classes.cpu()
    item_sizes = torch.bincount(classes)
    listed = np.zeros(len(classes), dtype=bool)
    # Made once: small results kept between large passing ones would hold all of their memory.
    ranks = np.empty((6, len(histories)), np.int64)
    # Histories of similar length share a batch, so that packing leaves few gaps.
    order = np.argsort([len(history) for history in histories], kind="stable")
    size = max(1, SCORES // len(item_sizes)) if network.exact else network.batch
    for start in range(0, len(histories), size):
        rows = order[start : start + size]
        batch = pack([histories[row] for row in rows]).to(device)
        target = classes[torch.from_numpy(targets[rows])][:, None]
        past, repeated = _past_items([histories[row] for row in rows], targets[rows])
        past_class = classes[past.clamp(min=0)]
        if network.exact:
            scores = network.scores(batch).cpu()
            sizes = item_sizes
            at_target, at_past = scores.gather(1, target), scores.gather(1, past_class)
            length = min(LIST, scores.shape[1])
            best = scores.topk(length) if lists else scores.max(1, keepdim=True)
            best_scores, best_classes = best.values, best.indices
        else:
            # A search lists some classes; all others have no score.
            best_scores, best_classes = (each.cpu() for each in network.top(batch, max(RECALLS)))
            scores, sizes = best_scores, item_sizes[best_classes]
            at_target = _listed_scores(scores, best_classes, target)
            at_past = _listed_scores(scores, best_classes, past_class)
        if torch.isnan(best_scores).any():  # the largest of a row is NaN if any is
            raise DivergedError("the model's scores are not numbers; train it again")
        counted = _count_ranks(scores, sizes, at_target, at_past, past >= 0, repeated)
        ranks[:, rows] = torch.stack(counted).numpy()
        if buckets is not None:
            leaves = best_classes.masked_fill(torch.isneginf(best_scores), -1).numpy()
            items, _ = buckets.first_items(leaves, LIST)
            listed[items[items >= 0]] = True
    network.train(was_training)
    above, ties, above_new, ties_new, above_ids, ties_ids = ranks
    ids = None if network.by_item else Ranks(above_ids, ties_ids)
    return TargetRanks(Ranks(above, ties), Ranks(above_new, ties_new), ids, listed)


def _past_items(histories: Sequence[Ints], targets: Ints) -> tuple[Tensor, Tensor]:
    """Return each history's distinct items but the target, padded with -1, and who repeats it."""
    distinct = [np.unique(history) for history in histories]
    width = max(map(len, distinct))
    past = np.full((len(histories), width), -1, np.int64)
    for row, items in enumerate(distinct):
        past[row, : len(items)] = items
    # The target itself is not left out of the candidates as a part of the history.
    is_target = past == targets[:, None]
    past[is_target] = -1
    return torch.from_numpy(past), torch.from_numpy(is_target.any(1))


def _listed_scores(scores: Tensor, classes: Tensor, asked: Tensor) -> Tensor:
    """Return the score ``(users, n)`` of each class asked for in the user's list, -inf outside."""
    match = classes[:, None, :] == asked[:, :, None]
    return torch.where(match, scores[:, None, :], -torch.inf).amax(2)


def _count_ranks(
    scores: Tensor,
    sizes: Tensor,
    at_target: Tensor,
    at_past: Tensor,
    is_past: Tensor,
    repeated: Tensor,
) -> tuple[Tensor, ...]:
    """Count what scores higher than the target and what the same.

    Args:
        scores: ``(users, n)`` of classes.
        sizes: ``(n,)`` or ``(users, n)`` items of each of these classes.
        at_target: ``(users, 1)`` score of the target's class.
        at_past: ``(users, past)`` scores of the classes of a history's items.
        is_past: ``(users, past)`` which of them are items and not padding.
        repeated: ``(users,)`` whose target is in the history.

    Returns:
        ``above`` and ``ties`` among all items, among those outside the history, and among classes.
    """
    # Comparisons are written as 0 and 1: a product adds them up quicker than a sum of truth values.
    number = torch.float32 if int(sizes.sum()) < 1 << 24 else torch.float64  # exact sums
    mask = torch.empty(scores.shape, dtype=number)
    above, above_ids = _counted(torch.gt(scores, at_target, out=mask), sizes)
    ties, ties_ids = _counted(torch.eq(scores, at_target, out=mask), sizes)
    # Without the history: its items that stand above or beside the target count no more.
    above_new = above - ((at_past > at_target) & is_past).sum(1)
    ties_new = ties - ((at_past == at_target) & is_past).sum(1)
    # What the model does not score stands nowhere in the list.
    unlisted = torch.isneginf(at_target[:, 0])
    pairs = [
        (above, ties, unlisted),
        (above_new, ties_new, unlisted | repeated),
        (above_ids, ties_ids, unlisted),
    ]
    counts = []
    for count, same, missing in pairs:
        counts += [count.masked_fill(missing, MISSING), same.masked_fill(missing, 1)]
    return tuple(counts)


def _counted(mask: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Count the items and the classes, ``(users,)`` each, where the mask ``(users, n)`` is 1."""
    if sizes.ndim > 1:
        return (mask * sizes).sum(1).long(), mask.sum(1).long()
    items = (mask @ sizes.to(mask.dtype)).long()
    if int(sizes.max()) == 1:
        return items, items
    return items, (mask @ torch.ones_like(sizes, dtype=mask.dtype)).long()
