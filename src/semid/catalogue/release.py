"""A release gate: may these ids replace the published ones?"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.bundle import read_catalogue
from semid.catalogue.drift import usage_shift
from semid.catalogue.matching import churn
from semid.codes import SemanticIds
from semid.documents import read_toml
from semid.errors import InputError, UsageError, nearest_name
from semid.health import bucket_keys, collisions, usage
from semid.results import Result

DECLARED: dict[str, dict[str, Any]] = tomllib.loads(
    resources.files("semid.catalogue").joinpath("release.toml").read_text("utf8")
)
"""Maximum and meaning of each figure, as `release.toml` declares them."""


@dataclass(frozen=True)
class ReleaseFigure(Result):
    """One figure of the gate."""

    derived = ("passed",)

    name: str  # as in `release.toml`
    value: float | None  # None where it cannot be known
    maximum: float | None  # None where it decides nothing
    meaning: str  # the figure in words

    @property
    def passed(self) -> bool:
        """Whether the value is known and at most the maximum, or decides nothing."""
        return self.value is None or self.maximum is None or self.value <= self.maximum


@dataclass(frozen=True)
class ReleaseCheck(Result):
    """The results of `check_release`.

    Attributes:
        items_before, items_after: items of each release.
        figures: in the order of `release.toml`.
        notes: what could not be compared, in sentences.
    """

    derived = ("passed",)

    items_before: int
    items_after: int
    figures: tuple[ReleaseFigure, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every figure passed."""
        return all(figure.passed for figure in self.figures)

    def figure(self, name: str) -> ReleaseFigure:
        """Return a figure by its name."""
        return next(figure for figure in self.figures if figure.name == name)

    def summary(self) -> str:
        """Return a line per figure for a terminal."""
        outcome = "passed" if self.passed else "failed"
        lines = [f"check: {outcome} ({self.items_before:,} -> {self.items_after:,} items)"]
        for f in self.figures:
            value = "unknown" if f.value is None else f"{f.value:.4f}"
            maximum = "-" if f.maximum is None else f"{f.maximum:g}"
            mark = "ok  " if f.passed else "FAIL"
            lines.append(f"  {mark} {f.name:17} {value:>8}  at most {maximum:5} {f.meaning}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def read_maxima(path: str | os.PathLike[str]) -> dict[str, float | None]:
    """Read a TOML file of maxima; False turns a figure off.

    Raises:
        UsageError: for an unknown figure, or a value that is no number of 0 or more and not False.
    """
    where = f"thresholds '{path}'"
    document = read_toml(Path(path), where=where, error=UsageError, advice="correct the file")
    return check_maxima(document, where=where)


def check_maxima(values: Mapping[str, Any], *, where: str = "maxima") -> dict[str, float | None]:
    """Return maxima by name, None where False was given."""
    result: dict[str, float | None] = {}
    for name, value in values.items():
        if name not in DECLARED:
            raise UsageError(
                f"{where}: no figure '{name}'{nearest_name(name, DECLARED)}; there are "
                f"{', '.join(DECLARED)}"
            )
        if value is not False and (
            isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0
        ):
            raise UsageError(f"{where}: {name}={value!r}; give a number of 0 or more, or false")
        result[name] = None if value is False else float(value)
    return result


def read_release(path: str | os.PathLike[str]) -> SemanticIds:
    """Read the ids of a release: an ids file, a bundle, or the folder of 'semid refresh'."""
    inner = Path(path) / "ids.parquet"
    return read_catalogue(inner if inner.is_file() else path)


def check_release(
    old: SemanticIds,
    new: SemanticIds,
    *,
    popularity: npt.ArrayLike | None = None,
    maxima: Mapping[str, float | bool | None] | None = None,
) -> ReleaseCheck:
    """Compare ids with the published ones, and say whether they may replace them.

    Args:
        old: the published ids.
        new: the ids to release.
        popularity: ``(old items,)`` interactions of each published item, for ``churn_popular``.
        maxima: figure -> largest allowed value, in place of those of ``release.toml``; False or
            None leaves a figure out of the decision.

    Raises:
        InputError: if either is empty.
        UsageError: for ids of another number of levels, or an unknown figure.

    Cost: sorts of the items per level.
    """
    if not len(old) or not len(new):
        raise InputError(f"the releases have {len(old)} and {len(new)} items; give some in both")
    if old.levels != new.levels:
        raise UsageError(
            f"the published ids have {old.levels} codes and the new ones {new.levels}: no model of "
            "the old ids can read them; give releases of equal length, for example both after "
            "'semid unique'"
        )
    own_maxima = {k: False if v is None else v for k, v in (maxima or {}).items()}
    limits = {name: entry["maximum"] for name, entry in DECLARED.items()} | check_maxima(own_maxima)
    notes: list[str] = []
    values = {
        **_item_figures(old, new, popularity),
        **_id_figures(old, new),
        **_quality_figures(old, new, notes),
    }
    figures = tuple(
        ReleaseFigure(name, values[name], limits[name], entry["meaning"])
        for name, entry in DECLARED.items()
    )
    return ReleaseCheck(len(old), len(new), figures, tuple(notes))


def _item_figures(
    old: SemanticIds, new: SemanticIds, popularity: npt.ArrayLike | None
) -> dict[str, float | None]:
    """Return how many of the published items changed their id or lost it."""
    rows = new.items.index_of(old.items.strings())
    shared = rows >= 0
    weights = None if popularity is None else np.asarray(popularity, dtype=np.float64)[shared]
    codes = old.codes[shared].astype(np.int64), new.codes[rows[shared]].astype(np.int64)
    moved = churn(*codes, weights=weights)
    return {
        "churn": moved.share,
        "churn_popular": None if moved.weighted_prefix is None else moved.weighted_prefix[-1],
        "removed": float((~shared).mean()),
        "reassigned": _reassigned(old, new),
    }


def _reassigned(old: SemanticIds, new: SemanticIds) -> float:
    """Return the share of published ids that exist, and all of whose items are others."""
    rows = new.items.index_of(old.items.strings())
    old_keys, new_keys = _keys(old.codes, new.codes)
    stays = (rows >= 0) & (new_keys[np.maximum(rows, 0)] == old_keys)
    ids = np.unique(old_keys)
    taken = np.isin(ids, new_keys) & ~np.isin(ids, old_keys[stays])
    return float(taken.mean())


def _keys(old: npt.NDArray[Any], new: npt.NDArray[Any]) -> tuple[Any, Any]:
    """Return one number per row of codes; equal codes have equal numbers in both releases."""
    keys = bucket_keys(np.concatenate([old.astype(np.int64), new.astype(np.int64)]))
    return keys[: len(old)], keys[len(old) :]


def _id_figures(old: SemanticIds, new: SemanticIds) -> dict[str, float | None]:
    """Return what the ids themselves gained and lost."""
    invalid = []
    for depth in range(1, old.levels + 1):
        before, after = _keys(old.codes[:, :depth], new.codes[:, :depth])
        invalid.append(float((~np.isin(np.unique(before), after)).mean()))
    used = fresh = 0
    for level in range(old.levels):
        now = np.unique(new.codes[:, level])
        used += len(now)
        fresh += int((~np.isin(now, old.codes[:, level])).sum())
    sizes = sum(old.info.codebook_sizes), sum(new.info.codebook_sizes)
    return {
        "invalid_prefixes": max(invalid),
        "new_tokens": fresh / used,
        "vocabulary_growth": max(sizes[1] / sizes[0] - 1, 0.0),
    }


def _quality_figures(
    old: SemanticIds, new: SemanticIds, notes: list[str]
) -> dict[str, float | None]:
    """Return collisions, usage and errors against before."""
    before, after = collisions(old.codes), collisions(new.codes)
    unresolved = None
    if new.info.unique != "none":
        sizes = np.unique(bucket_keys(new.codes), return_counts=True)[1]
        unresolved = float(np.maximum(sizes - new.info.capacity, 0).sum() / len(new))
    else:
        notes.append("The new ids were not made unique, so there are no unresolved ids to count")
    shift = None
    if old.info.codebook_sizes == new.info.codebook_sizes:
        sizes_of_all = old.info.codebook_sizes
        usages = (usage(old.codes, sizes_of_all), usage(new.codes, sizes_of_all))
        rows = new.items.index_of(old.items.strings())
        same = (old.codes[rows >= 0] == new.codes[rows[rows >= 0]]).sum(axis=0)
        shifts = [
            usage_shift(a, b, shared=int(count)) for a, b, count in zip(*usages, same, strict=True)
        ]
        shift = max(max(variation - chance, 0.0) for variation, chance in shifts)
    else:
        notes.append("The codebook sizes differ, so usage cannot be compared code by code")
    squares = [float(np.square(ids.residual_norms, dtype=np.float64).mean()) for ids in (old, new)]
    growth = None
    if np.isfinite(squares).all() and squares[0] > 0:
        growth = max(squares[1] / squares[0] - 1, 0.0)
    else:
        notes.append("Residual norms are unknown, so errors cannot be compared")
    return {
        "collisions": max(after.colliding_item_rate - before.colliding_item_rate, 0.0),
        "unresolved": unresolved,
        "usage_shift": shift,
        "error_growth": growth,
    }
