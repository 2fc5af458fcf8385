"""What several formats share: the letters of the levels, and ids without a model of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from semid.codes import MAX_CODEWORDS, MAX_LEVELS, CodesInfo, SemanticIds
from semid.data.ids import ItemIds
from semid.errors import InputError
from semid.health import check_codes
from semid.tokenizers.base import Tokenizer

__all__ = ["IMPORTED", "imported", "level_letter", "token_strings"]

IMPORTED = "imported"
"""Stands for the fingerprint of ids whose codebook is not known; no model accepts it."""


def level_letter(level: int) -> str:
    """Return ``a`` to ``z``, then ``aa``, ``ab`` and so on, for levels from 0."""
    name = ""
    number = level + 1
    while number:
        number, digit = divmod(number - 1, 26)
        name = chr(ord("a") + digit) + name
    return name


def token_strings(sizes: tuple[int, ...]) -> list[list[str]]:
    """Return a token a code, a list a level: ``<a_0>``, ``<a_1>``, ... ``<b_0>``, ..."""
    return [
        [f"<{level_letter(level)}_{code}>" for code in range(size)]
        for level, size in enumerate(sizes)
    ]


def imported(
    codes: npt.NDArray[Any], *, items: Any = None, tokenizer: Tokenizer | None = None
) -> SemanticIds:
    """Wrap codes that another program wrote.

    Args:
        codes: ``(items, levels)``. One level more than the model has is taken as an appended token.
        items: item ids in row order; None numbers the rows.
        tokenizer: the model whose codes they are, or None.

    Returns:
        Semantic IDs; residual norms are not known and NaN.

    Raises:
        InputError: if the codes do not fit the model, or the items not the rows.
    """
    check_codes(codes)
    if codes.shape[1] > MAX_LEVELS or codes.max() >= MAX_CODEWORDS:
        raise InputError(
            f"codes up to {codes.max()} on {codes.shape[1]} levels; Semantic IDs have codes below "
            f"2**32 on at most {MAX_LEVELS} levels: is this another kind of file?"
        )
    named = ItemIds.range(len(codes)) if items is None else ItemIds(items)
    if len(named) != len(codes):
        raise InputError(f"{len(named)} item ids for {len(codes)} rows of codes; give one a row")
    tops = [int(top) + 1 for top in codes.max(axis=0)]
    kept = None
    if tokenizer is None:
        info = CodesInfo(
            tokenizer=IMPORTED,
            codebook_sizes=tuple(tops),
            hierarchical=True,
            codebook_fingerprint=IMPORTED,
            weights_fingerprint=IMPORTED,
        )
    else:
        info = tokenizer.codes_info()
        if codes.shape[1] == tokenizer.levels + 1:
            kept = codes[:, :-1]
            sizes = (*info.codebook_sizes, max(tops[-1], 256))
            info = CodesInfo(**{**info.__dict__, "codebook_sizes": sizes, "unique": "append"})
        check_codes(codes, info.codebook_sizes)
    norms = np.full(len(codes), np.nan, dtype=np.float32)
    return SemanticIds(named, codes, norms, info, kept)
