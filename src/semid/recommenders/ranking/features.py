"""Semantic IDs as features of a ranking model: which rows of which tables an item reads.

Codes are joined to items once, into one ``(items + 1, slots)`` integer array that the network
gathers from. Row 0 of every table belongs to items without codes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt

from semid.codes import SemanticIds
from semid.data.ids import ItemIds
from semid.documents import checked
from semid.errors import IdsError, UsageError
from semid.options import Options, option
from semid.seeds import numpy_generator

logger = logging.getLogger(__name__)

MODES = ("levels", "parallel", "multi", "prefix", "ngram")
_SPAN_MODES = ("prefix", "ngram")  # slots that read several codes
CONTROLS = ("none", "random", "shuffled", "widened")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CodeFeatures(Options):
    """How codes become features; each table is a field.

    A mode says what a table is for. ``levels``: a level (RQ-VAE in MoC §3.2). ``parallel``: a
    codebook (Mixture-of-Codes §4.1); the same tables, refused for hierarchical codes. ``multi``:
    one of ``scale`` tables for the first code (ME, eq. 4). ``prefix``: a prefix length, with an
    injective number per prefix. ``ngram``: a window of ``n`` neighboring codes.

    Pooling ``sum`` adds all tables up into one field (the n-gram sums of Singh et al. 2023 and
    Zheng et al. 2025), as ``ngram`` does by default. Controls: ``random`` (uniform random codes of
    the same shape), ``shuffled`` (the same codes, given to other items) and ``widened`` (no codes:
    an item id widened by as many parameters, in as many fields).
    """

    mode: str = option(
        "levels", choices=MODES, name="--code-mode", help="How codes become features."
    )
    scale: int | None = option(None, ge=1, help="Number of codes that are used; all by default.")
    n: int = option(2, ge=1, help="Codes per window of the mode ngram.")
    levels: tuple[int, ...] | None = option(None, ge=0, help="The only levels that are used.")
    pooling: str | None = option(
        None, choices=("field", "sum"), help="Whether tables are fields or are added up."
    )
    item_id: bool = option(True, help="Use the item id beside the codes.")
    max_rows: int = option(1 << 20, ge=2, help="Largest table of prefixes or n-grams.")
    control: str = option(
        "none",
        choices=CONTROLS,
        name="--control",
        help="Control experiment instead of the codes.",
    )
    seed: int = option(0, help="Seed of the control.")
    rate: float = option(1.0, gt=0, help="Learning rate of the code tables, relative to others.")
    weight_decay: float | None = option(None, ge=0, help="Weight decay of the code tables.")

    @property
    def pooled(self) -> str:
        """How tables become fields, with the mode's own choice filled in."""
        return self.pooling or ("sum" if self.mode == "ngram" else "field")


@dataclass(frozen=True)
class CodeTable:
    """Rows of the code tables that each item reads."""

    rows: Ints  # ``(items + 1, slots)`` row in each slot's table, 0 without codes
    sizes: tuple[int, ...]  # rows of each table, the reserved one included
    fields: tuple[str, ...]  # name of each field
    field_of: tuple[int, ...]  # field of each slot; slots of one field are added up
    without: int  # number of items of the catalogue without codes
    collisions: int  # distinct prefixes or n-grams that share a row with another one
    codebook_fingerprint: str  # fingerprint of the codes' codebooks
    widened: bool = False  # whether the slots stand for a wider item id instead of codes

    @classmethod
    def of(cls, config: Mapping[str, Any], rows: npt.NDArray[Any]) -> CodeTable:
        """Read the config and the rows that an artefact holds."""
        hints = {name: kind for name, kind in get_type_hints(cls).items() if name != "rows"}
        table = cls(rows=rows, **checked(hints, config, "codes"))
        slots = len(table.sizes)
        if rows.dtype.kind != "i" or rows.ndim != 2 or rows.shape[1] != slots:
            raise ValueError(f"codes have shape {rows.shape} and {slots} tables")
        if len(table.field_of) != slots or not set(table.field_of) <= set(range(len(table.fields))):
            raise ValueError(f"the fields {table.field_of} of the codes are not {slots} of them")
        if rows.size and ((rows < 0) | (rows >= np.array(table.sizes))).any():
            raise ValueError("codes lie outside their tables")
        return table


def code_table(ids: SemanticIds, catalogue: ItemIds, features: CodeFeatures) -> CodeTable:
    """Join codes to a catalogue; items without codes read row 0 of every slot and are counted."""
    # Join: the position of every catalogue item among the ids, -1 without codes.
    _check_codes(ids, features)
    if len(ids) == 0:
        raise IdsError("the ids hold no items; encode the catalogue first")
    positions = ids.items.index_of(catalogue.strings())
    known = positions >= 0
    if len(catalogue) and not known.any():
        raise IdsError(
            f"none of the {len(catalogue)} items has codes: they are called like "
            f"{catalogue.example}, those of the ids file like {ids.items.example}; "
            "give the ids of this catalogue"
        )
    without = int((~known).sum())
    if without:
        logger.warning(
            "%d of %d items have no codes (first: '%s') and read the reserved row",
            without,
            len(catalogue),
            catalogue[int(np.argmax(~known))],
        )
    codes = np.zeros((len(catalogue), ids.levels), dtype=np.int64)
    codes[known] = ids.codes[positions[known]]
    # Codes to one number per slot; row 0 is reserved, so numbers of known items move up by 1.
    codes, sizes = _apply_control(codes, known, ids.info.codebook_sizes, features)
    slots = _slots(codes.shape[1], features)
    table = np.zeros((len(catalogue) + 1, len(slots)), dtype=np.int64)
    counts, collisions = [], 0
    for slot, (_, start, end) in enumerate(slots):
        numbers, count, clashes = codes[known, start], sizes[start], 0
        if features.mode in _SPAN_MODES:
            numbers, count, clashes = _numbers(codes[known, start:end], features.max_rows - 1)
        table[1:, slot][known] = numbers + 1
        counts.append(count)
        collisions += clashes
    if collisions:
        logger.warning(
            "%d distinct prefixes or n-grams share a row: max_rows=%d is too few",
            collisions,
            features.max_rows,
        )
    summed = features.pooled == "sum"
    return CodeTable(
        rows=table,
        sizes=tuple(count + 1 for count in counts),
        fields=("code:sum",) if summed else tuple(name for name, _, _ in slots),
        field_of=tuple(0 if summed else slot for slot in range(len(slots))),
        without=without,
        collisions=collisions,
        codebook_fingerprint=ids.info.codebook_fingerprint,
        widened=features.control == "widened",
    )


def _check_codes(ids: SemanticIds, features: CodeFeatures) -> None:
    if features.mode == "parallel" and ids.info.hierarchical:
        raise UsageError(
            f"--code-mode parallel (mode=) is for parallel codebooks, and these codes are residual "
            f"({ids.info.tokenizer}); take levels"
        )
    if features.mode == "prefix" and not ids.info.hierarchical:
        raise UsageError(
            f"--code-mode prefix (mode=) needs residual codes, and those of {ids.info.tokenizer} "
            "are parallel: a shared prefix means nothing; take parallel"
        )
    outside = [level for level in features.levels or () if not 0 <= level < ids.levels]
    if outside or (features.mode != "multi" and (features.scale or 1) > ids.levels):
        raise UsageError(
            f"levels={outside or features.scale} (scale=) asks for more than the {ids.levels} "
            "codes per item; fit a tokenizer with more levels"
        )
    used = len(_used_levels(ids.levels, features))
    if features.mode == "ngram" and features.n > used:
        raise UsageError(f"n={features.n}: windows are longer than the {used} codes used")


def _used_levels(levels: int, features: CodeFeatures) -> list[int]:
    if features.mode == "multi":
        return [0]
    return list(features.levels or range(features.scale or levels))


def _slots(width: int, features: CodeFeatures) -> list[tuple[str, int, int]]:
    """Return the name of each slot and the span of used codes that it reads."""
    if features.mode == "multi":
        return [(f"code:1#{copy + 1}", 0, 1) for copy in range(features.scale or 1)]
    if features.mode == "prefix":
        return [(f"code:1-{end}", 0, end) for end in range(1, width + 1)]
    if features.mode == "ngram":
        starts = range(width - features.n + 1)
        return [(f"code:{s + 1}-{s + features.n}", s, s + features.n) for s in starts]
    levels = features.levels or range(width)
    return [(f"code:{level + 1}", n, n + 1) for n, level in enumerate(levels)]


def _apply_control(
    codes: Ints, known: npt.NDArray[np.bool_], sizes: Sequence[int], features: CodeFeatures
) -> tuple[Ints, tuple[int, ...]]:
    """Select the used levels and replace the codes if a control asks for it."""
    levels = _used_levels(codes.shape[1], features)
    codes, used = codes[:, levels].copy(), tuple(int(sizes[level]) for level in levels)
    generator = numpy_generator(features.seed, "control", features.control)
    if features.control == "random":
        for level, size in enumerate(used):
            codes[:, level] = generator.integers(0, size, len(codes))
    elif features.control == "shuffled":  # items without codes stay without
        rows = np.flatnonzero(known)
        codes[rows] = codes[generator.permutation(rows)]
    return codes, used


def _numbers(codes: Ints, budget: int) -> tuple[Ints, int, int]:
    """Number distinct rows of codes; return numbers, their count and how many rows share one."""
    # More than ``budget`` distinct rows are hashed.
    # Without hashing, the number of a row is its place among the sorted distinct rows.
    unique, inverse = np.unique(codes, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    if len(unique) <= budget:
        return inverse, max(len(unique), 1), 0
    # splitmix64 over the codes: uniform, and the same on every platform.
    # The distinct rows are hashed, not the items, so that the number of collisions is known.
    mixed = np.zeros(len(unique), dtype=np.uint64)
    for column in unique.T.astype(np.uint64):
        mixed += column + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    row_of = (mixed % np.uint64(budget)).astype(np.int64)
    return row_of[inverse], budget, len(unique) - len(np.unique(row_of))


def extend_codes(
    table: CodeTable,
    features: CodeFeatures,
    catalogue: ItemIds,
    new: ItemIds,
    ids: SemanticIds | None,
) -> CodeTable:
    """Append the rows of new items to the table of a trained model.

    ``ids`` holds the codes of the new items, for prefixes and n-grams those of the catalogue too;
    None leaves new items without codes.
    """
    rows = np.zeros((len(new), table.rows.shape[1]), np.int64)
    if ids is None:
        return replace(table, rows=np.concatenate([table.rows, rows]))
    if features.control != "none":
        raise UsageError(
            f"this model is a control ({features.control}): real codes mean nothing to it"
        )
    positions, trained = (ids.items.index_of(items.strings()) for items in (new, catalogue))
    known, has_codes = positions >= 0, trained >= 0
    codes = ids.codes.astype(np.int64)[:, _used_levels(ids.levels, features)]
    for slot, (_, start, end) in enumerate(_slots(codes.shape[1], features)):
        # A single code is its own number; a prefix or n-gram has the number it got in training.
        span = codes[:, start:end]
        if features.mode not in _SPAN_MODES:
            rows[known, slot] = span[positions[known], 0] + 1
            continue
        # A new item takes the row of an item that shares its span, and the reserved row if none
        # does: equal spans get equal numbers, and each remembers the row of a trained item, else 0.
        both = np.concatenate([span[trained[has_codes]], span[positions[known]]])
        unique, inverse = np.unique(both, axis=0, return_inverse=True)
        of_trained, of_new = np.split(inverse.reshape(-1), [int(has_codes.sum())])
        row_of = np.zeros(len(unique), np.int64)
        row_of[of_trained] = table.rows[1:][has_codes, slot]
        rows[known, slot] = row_of[of_new]
    return replace(
        table,
        rows=np.concatenate([table.rows, rows]),
        without=table.without + int((~known).sum()),
    )
