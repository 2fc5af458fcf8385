"""Semantic IDs as features of a ranking model: which rows of which tables an item reads.

Codes are joined to items once. What comes out is one ``(items + 1, slots)`` integer array that the
network holds as a buffer and gathers from, so a row of data stays user, item and context, and
candidates and histories use the same array. Row 0 of every table belongs to items without codes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt

from semid.codes import SemanticIds
from semid.data.ids import ItemIds
from semid.documents import checked
from semid.errors import IdsError, UsageError
from semid.options import Options, option
from semid.seeds import numpy_generator

__all__ = ["CONTROLS", "MODES", "CodeFeatures", "CodeTable", "code_table"]

logger = logging.getLogger(__name__)

MODES = ("levels", "parallel", "multi", "prefix", "ngram")
CONTROLS = ("none", "random", "shuffled", "widened")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CodeFeatures(Options):
    """How codes become features.

    Attributes:
        mode: ``levels``: a table a level (RQ-VAE in MoC §3.2). ``parallel``: a table a codebook
            (Mixture-of-Codes §4.1); the same tables, refused for codes that are hierarchical.
            ``multi``: ``scale`` tables for the first code (ME, eq. 4). ``prefix``: a table a
            prefix length, an injective number a prefix. ``ngram``: a table a window of ``n``
            neighboring codes.
        scale: codes to use, from the first; for ``multi`` the number of tables. None takes all.
        n: codes in a window of ``ngram``.
        levels: use these levels alone (from 0), for example ``(1,)`` for fig. 8a; None uses the
            first ``scale``.
        pooling: ``field``: a field a table; ``sum``: all tables are added up into one field (the
            n-gram sums of Singh et al. 2023 and Zheng et al. 2025). None takes ``sum`` for
            ``ngram`` and ``field`` else.
        item_id: whether the item id keeps a field of its own beside the codes.
        max_rows: rows a prefix or n-gram table may have; more distinct ones are hashed into it.
        control: ``none``; ``random`` (even random codes of the same shape), ``shuffled`` (the same
            codes, dealt to other items) or ``widened`` (no codes: an item id widened by as many
            parameters, in as many fields).
        seed: of the control.
        rate: learning rate of the code tables as a multiple of the others'.
        weight_decay: decoupled decay of the code tables; None takes the others'.
    """

    mode: str = option("levels", choices=MODES, name="--code-mode (mode=)")
    scale: int | None = option(None, ge=1)
    n: int = option(2, ge=1)
    levels: tuple[int, ...] | None = option(None, ge=0)
    pooling: str | None = option(None, choices=("field", "sum"))
    item_id: bool = True
    max_rows: int = option(1 << 20, ge=2)
    control: str = option("none", choices=CONTROLS, name="--control (control=)")
    seed: int = 0
    rate: float = option(1.0, gt=0)
    weight_decay: float | None = option(None, ge=0)

    @property
    def pooled(self) -> str:
        """How tables become fields, with the mode's own choice filled in."""
        return self.pooling or ("sum" if self.mode == "ngram" else "field")


@dataclass(frozen=True)
class CodeTable:
    """Which rows an item reads.

    Attributes:
        rows: ``(items + 1, slots)`` row in each slot's table, 0 without codes.
        sizes: rows of each table, the reserved one included.
        fields: name of each field.
        field_of: field of each slot; slots of one field are added up.
        without: items of the catalogue that have no codes.
        collisions: distinct prefixes or n-grams that share a row with another one.
        codebook_fingerprint: of the codes.
        widened: whether the slots stand for a wider item id instead of codes.
    """

    rows: Ints
    sizes: tuple[int, ...]
    fields: tuple[str, ...]
    field_of: tuple[int, ...]
    without: int
    collisions: int
    codebook_fingerprint: str
    widened: bool = False

    @property
    def parameters(self) -> int:
        """Rows of all tables together; times the width it is their number of parameters."""
        return sum(self.sizes)

    @classmethod
    def of(cls, config: Mapping[str, Any], rows: npt.NDArray[Any]) -> CodeTable:
        """Read what an artefact holds of it.

        Raises:
            ValueError: rows outside their tables, or fields that do not exist.
            ArtefactError: a value of another type.
        """
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
    """Join codes to a catalogue.

    Args:
        ids: Semantic IDs, in any order; items may be missing.
        catalogue: the items.
        features: how the codes are used.

    Returns:
        The table; items without codes read row 0 of every slot and are counted.

    Raises:
        IdsError: not one item has codes.
        UsageError: the codes cannot be used this way (too few levels, ``parallel`` for residual
            codes).
    """
    _fits(ids, features)
    if len(ids) == 0:
        raise IdsError("the ids hold no items; encode the catalogue first")
    at = ids.items.index_of(catalogue.strings())
    known = at >= 0
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
    codes[known] = ids.codes[at[known]]
    codes, sizes = _controlled(codes, known, ids.info.codebook_sizes, features)
    columns, rows_of, names, collisions = _slots(codes, known, sizes, features)
    table = np.zeros((len(catalogue) + 1, len(columns)), dtype=np.int64)
    for slot, column in enumerate(columns):
        table[1:, slot][known] = column[known] + 1
    summed = features.pooled == "sum"
    return CodeTable(
        rows=table,
        sizes=tuple(size + 1 for size in rows_of),
        fields=("code:sum",) if summed else tuple(names),
        field_of=tuple(0 if summed else slot for slot in range(len(columns))),
        without=without,
        collisions=collisions,
        codebook_fingerprint=ids.info.codebook_fingerprint,
        widened=features.control == "widened",
    )


def _fits(ids: SemanticIds, features: CodeFeatures) -> None:
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
    wanted = features.levels or ()
    outside = [level for level in wanted if not 0 <= level < ids.levels]
    if outside or (features.mode != "multi" and (features.scale or 1) > ids.levels):
        raise UsageError(
            f"levels={outside or features.scale} (scale=) asks for more than the {ids.levels} "
            "codes an item has; fit a tokenizer with more levels"
        )
    if features.mode == "ngram" and features.n > _count(ids.levels, features):
        raise UsageError(
            f"n={features.n}: windows are longer than the {_count(ids.levels, features)} codes used"
        )


def _count(levels: int, features: CodeFeatures) -> int:
    return len(features.levels) if features.levels else (features.scale or levels)


def _controlled(
    codes: Ints, known: npt.NDArray[np.bool_], sizes: Sequence[int], features: CodeFeatures
) -> tuple[Ints, tuple[int, ...]]:
    """Keep the levels asked for and replace the codes where a control wants it."""
    if features.mode == "multi":
        used = [0]
    elif features.levels is not None:
        used = list(features.levels)
    else:
        used = list(range(features.scale or codes.shape[1]))
    codes, kept = codes[:, used].copy(), tuple(int(sizes[level]) for level in used)
    generator = numpy_generator(features.seed, "control", features.control)
    if features.control == "random":
        for level, size in enumerate(kept):
            codes[:, level] = generator.integers(0, size, len(codes))
    elif features.control == "shuffled":
        rows = np.flatnonzero(known)
        codes[rows] = codes[generator.permutation(rows)]
    return codes, kept


def _slots(
    codes: Ints, known: npt.NDArray[np.bool_], sizes: tuple[int, ...], features: CodeFeatures
) -> tuple[list[Ints], list[int], list[str], int]:
    """Return a number an item, the table's size and a name for every slot; and the collisions."""
    levels = features.levels or tuple(range(codes.shape[1]))
    if features.mode == "multi":
        tables = features.scale or 1
        return (
            [codes[:, 0]] * tables,
            [sizes[0]] * tables,
            [f"code:1#{copy + 1}" for copy in range(tables)],
            0,
        )
    if features.mode in ("levels", "parallel"):
        names = [f"code:{level + 1}" for level in levels]
        return [codes[:, place] for place in range(codes.shape[1])], list(sizes), names, 0
    if features.mode == "prefix":
        spans = [(0, end) for end in range(1, codes.shape[1] + 1)]
    else:
        width = codes.shape[1] - features.n + 1
        spans = [(start, start + features.n) for start in range(width)]
    columns, counts, names, collisions = [], [], [], 0
    for start, end in spans:
        column, count, clash = _numbers(codes[:, start:end], known, features.max_rows - 1)
        columns.append(column)
        counts.append(count)
        names.append(f"code:{start + 1}-{end}")
        collisions += clash
    if collisions:
        logger.warning(
            "%d distinct prefixes or n-grams share a row: max_rows=%d is too few",
            collisions,
            features.max_rows,
        )
    return columns, counts, names, collisions


def _numbers(codes: Ints, known: npt.NDArray[np.bool_], budget: int) -> tuple[Ints, int, int]:
    """Number the distinct rows of ``codes``; hash them into ``budget`` numbers if there are more.

    Returns:
        A number an item, how many there are, and how many distinct rows share one.
    """
    unique, inverse = np.unique(codes[known], axis=0, return_inverse=True)
    numbers = np.zeros(len(codes), dtype=np.int64)
    if len(unique) <= budget:
        numbers[known] = inverse.reshape(-1)
        return numbers, max(len(unique), 1), 0
    # splitmix64 over the codes: even, the same on every platform.
    mixed = np.zeros(len(unique), dtype=np.uint64)
    for column in unique.T.astype(np.uint64):
        mixed += column + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    row_of = (mixed % np.uint64(budget)).astype(np.int64)
    numbers[known] = row_of[inverse.reshape(-1)]
    return numbers, budget, len(unique) - len(np.unique(row_of))
