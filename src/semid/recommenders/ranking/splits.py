"""Which rows train, which choose the checkpoint, which are tested, and which items nobody saw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from semid.data.interactions import Interactions
from semid.errors import InteractionsError, UsageError, check_choice
from semid.seeds import numpy_generator

__all__ = ["COLD", "PARTS", "SPLITS", "check_fractions", "split_rows"]

SPLITS = ("random", "leave-last-out", "time")
PARTS = ("train", "validation", "test", "cold")
TRAIN, VALIDATION, TEST, COLD = range(4)

Parts = npt.NDArray[np.int8]


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Return the shares of train, validation and test.

    Raises:
        UsageError: they are not three positive numbers that add up to 1.
    """
    shares = tuple(float(share) for share in fractions)
    if len(shares) != 3 or not (min(shares) > 0 and abs(sum(shares) - 1) <= 1e-6):  # NaN fails too
        raise UsageError(
            f"--fractions (fractions=) is {list(shares)}; give three positive "
            "shares that add up to 1, for example 0.8,0.1,0.1"
        )
    return shares[0], shares[1], shares[2]


def split_rows(
    log: Interactions,
    how: str,
    *,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    cold_items: npt.NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Parts:
    """Give every interaction its part.

    Args:
        log: the interactions.
        how: ``random`` (a pair of user and item that occurs several times stays together),
            ``leave-last-out`` (a user's last is tested, the one before it validates; a user with
            one stays in training, one with two has no validation) or ``time`` (the earliest share
            trains, the latest is tested; equal times stay together).
        fractions: shares of train, validation and test, for ``random`` and ``time``.
        cold_items: ``(log items,)`` True for items none of whose interactions may be learned from;
            all of theirs go to the part ``cold``.
        seed: decides ``random``.

    Returns:
        ``(interactions,)`` 0 train, 1 validation, 2 test, 3 cold.

    Raises:
        UsageError: an unknown split, or one that needs an order that the log does not have.
        InteractionsError: a part would be empty.
    """
    check_choice("--split (split=)", how, SPLITS)
    shares = check_fractions(fractions)
    part = np.full(len(log), TRAIN, dtype=np.int8)
    cold = np.zeros(len(log), dtype=bool) if cold_items is None else cold_items[log.items]
    part[cold] = COLD
    rows = np.flatnonzero(~cold)
    if how == "random":
        part[rows] = _random(log, rows, shares, seed)
    elif log.order is None:
        raise UsageError(
            f"--split {how} (split=) needs to know what came first, and {log.label} has no column "
            "'position' or 'timestamp'; name one with --time-column, or take --split random"
        )
    elif how == "time":
        if log.order_column == "position":
            raise UsageError(
                "--split time (split=) needs times that can be compared between users; 'position' "
                "counts within a user: name a time with --time-column"
            )
        part[rows] = _time(log.order[rows], shares)
    else:
        part[rows] = _leave_last_out(log.users[rows], log.order[rows])
    for number in (TRAIN, VALIDATION, TEST):
        if not (part == number).any():
            raise InteractionsError(
                f"--split {how} (split=) of {len(log)} interactions leaves no row for "
                f"{PARTS[number]}; give more interactions or other fractions"
            )
    return part


def _random(
    log: Interactions, rows: npt.NDArray[np.int64], shares: Sequence[float], seed: int
) -> Parts:
    pairs = log.users[rows].astype(np.int64) * len(log.item_ids) + log.items[rows]
    unique, inverse = np.unique(pairs, return_inverse=True)
    place = np.empty(len(unique), dtype=np.int64)
    place[numpy_generator(seed, "split").permutation(len(unique))] = np.arange(len(unique))
    cut = [round(shares[0] * len(unique)), round((shares[0] + shares[1]) * len(unique))]
    return np.searchsorted(cut, place[inverse], side="right").astype(np.int8)


def _time(order: npt.NDArray[np.generic], shares: Sequence[float]) -> Parts:
    ranked = np.sort(order)
    last = len(ranked) - 1
    cuts = [
        ranked[min(round(shares[0] * len(ranked)), last)],
        ranked[min(round((shares[0] + shares[1]) * len(ranked)), last)],
    ]
    return np.searchsorted(np.array(cuts), order, side="right").astype(np.int8)


def _leave_last_out(users: npt.NDArray[np.int32], order: npt.NDArray[np.generic]) -> Parts:
    by_time = np.argsort(order, kind="stable")
    ranks = by_time[np.argsort(users[by_time], kind="stable")]
    counts = np.bincount(users)
    ends = np.cumsum(counts)[users[ranks]]
    from_end = ends - 1 - np.arange(len(ranks))
    length = counts[users[ranks]]
    part = np.full(len(users), TRAIN, dtype=np.int8)
    part[ranks[(from_end == 0) & (length >= 2)]] = TEST
    part[ranks[(from_end == 1) & (length >= 3)]] = VALIDATION
    return part
