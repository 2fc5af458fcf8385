"""Give a new generation's codewords the numbers of the old codewords that they go on from.

Codewords of a level may be numbered in any way without changing what they encode. Choosing the
numbers by assignment keeps as many published codes as numbering alone can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.assignment import assign_rows
from semid.errors import UsageError
from semid.tokenizers.base import Tokenizer

__all__ = ["match_codes", "renumbered"]

Array = npt.NDArray[np.float32]


def match_codes(
    old: npt.NDArray[np.integer[Any]],
    new: npt.NDArray[np.integer[Any]],
    old_book: Array,
    new_book: Array,
    *,
    weights: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """Match the codes of one level by the items that two generations share.

    Args:
        old: ``(shared,)`` codes of the items in the old generation.
        new: ``(shared,)`` codes of the same items in the new one.
        old_book: ``(codes, latent)`` codewords.
        new_book: ``(codes, latent)`` codewords; as many as before.
        weights: ``(shared,)`` what an item counts, for example its popularity; None counts once.

    Returns:
        ``(codes,)`` int64, the number that each new codeword should carry, a permutation: the one
        under which the most items keep their code at this level, exactly; among equals (dead codes
        above all) the one with the smallest sum of squared distances between old and new codewords.

    Raises:
        UsageError: if the codebooks differ in shape.

    Cost: ``O(codes^2)`` memory, ``O(codes^3)`` time at worst.
    """
    if old_book.shape != new_book.shape:
        raise UsageError(
            f"codebooks have shapes {old_book.shape} and {new_book.shape}; a refresh keeps the "
            "codebook sizes and the width"
        )
    codes = len(new_book)
    pair = new.astype(np.int64) * codes + old.astype(np.int64)
    together = np.bincount(pair, weights=weights, minlength=codes * codes).reshape(codes, codes)
    a, b = new_book.astype(np.float64), old_book.astype(np.float64)
    distance = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * (a @ b.T)
    largest = max(float(distance.max()), 1e-300)
    least = 1.0 if weights is None else float(together[together > 0].min(initial=1.0))
    # All distances together count less than half of the lightest item.
    return assign_rows(-together + np.maximum(distance, 0.0) * (0.5 * least / codes / largest))


def renumbered(tokenizer: Tokenizer, numbers: Sequence[npt.NDArray[np.int64]]) -> Tokenizer:
    """Return the same tokenizer with its codewords numbered anew.

    Args:
        tokenizer: fitted; it stays as it is.
        numbers: ``(codes,)`` a level, the number each codeword gets, a permutation.

    Raises:
        UsageError: if the tokenizer does not keep its codebooks under ``codebooks.LEVEL``.
    """
    tensors = dict(tokenizer._tensors())
    for level, (book, number) in enumerate(zip(tokenizer.codebooks, numbers, strict=True)):
        name = f"codebooks.{level}"
        if name not in tensors or not np.array_equal(tensors[name], book):
            raise UsageError(
                f"{tokenizer.kind} keeps no codebook under '{name}', so its codes cannot be "
                "renumbered"
            )
        moved = np.empty_like(book)
        moved[number] = book
        tensors[name] = moved
    made = type(tokenizer)(**tokenizer.settings)
    made._set_tensors(tensors)
    made._dim = tokenizer.dim
    made.report = tokenizer.report
    if hasattr(tokenizer, "threads"):
        made.threads = tokenizer.threads  # type: ignore[attr-defined]
    return made
