"""LC-Rec, LETTER and MiniOneRec: ``{"0": ["<a_236>", "<b_231>", "<c_226>"], ...}``.

Keys are row numbers as strings, counted from 0; a letter per level. UniGenRec has the tokens of an
item in one text, ``"<a_236><b_231><c_226>"``, which is read too.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from typing import Any

import numpy as np

from semid.codes import SemanticIds
from semid.documents import read_json
from semid.errors import ArtefactError
from semid.exports.tokens import imported, level_letter
from semid.output import atomic_file
from semid.tokenizers.base import Tokenizer

__all__ = ["read_lcrec", "write_lcrec"]

TOKEN = re.compile(r"<([a-z]+)_([0-9]{1,10})>")
"""Ten digits: codes are below 2**32."""


def write_lcrec(ids: SemanticIds, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the index JSON; rows are numbered in the order of ``ids``.

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    letters = [level_letter(level) for level in range(ids.levels)]
    with (
        atomic_file(path, overwrite=overwrite) as work,
        work.open("w", encoding="utf8") as file,
    ):
        file.write("{")
        for row, codes in enumerate(ids.codes.tolist()):
            tokens = [f"<{letter}_{code}>" for letter, code in zip(letters, codes, strict=True)]
            file.write(f"{',' if row else ''}\n{json.dumps(str(row))}: {json.dumps(tokens)}")
        file.write("\n}\n")


def read_lcrec(
    path: str | os.PathLike[str], *, items: Any = None, tokenizer: Tokenizer | None = None
) -> SemanticIds:
    """Read an index JSON; see `semid.exports.formats.import_ids`.

    Raises:
        ArtefactError: naming the first entry that is not of the format.
    """
    document = read_json(path, advice="give the .index.json that LC-Rec or semid export wrote")
    if not isinstance(document, dict) or not document:
        raise ArtefactError(f"'{path}' holds no object of row numbers; is it an .index.json?")
    codes: list[list[int]] = []
    for row in range(len(document)):
        if str(row) not in document:
            raise ArtefactError(
                f"'{path}' has {len(document)} entries but none for row '{row}'; keys are row "
                "numbers from 0"
            )
        tokens = document[str(row)]
        if isinstance(tokens, str):  # as UniGenRec writes them: "<a_1><b_2>"
            tokens = [f"{token}>" for token in tokens.removesuffix(">").split(">")]
        if not isinstance(tokens, list):
            raise ArtefactError(
                f"'{path}': row '{row}' holds {reprlib.repr(tokens)}; a list of tokens such as "
                '["<a_1>", "<b_2>"] or their text "<a_1><b_2>" is expected'
            )
        codes.append([_code(path, row, level, token) for level, token in enumerate(tokens)])
        if len(codes[-1]) != len(codes[0]) or not codes[0]:
            raise ArtefactError(
                f"'{path}': row '{row}' has {len(codes[-1])} tokens, row '0' {len(codes[0])}; "
                "every item needs the same number, at least one"
            )
    return imported(np.array(codes, dtype=np.int64), items=items, tokenizer=tokenizer)


def _code(path: str | os.PathLike[str], row: int, level: int, token: Any) -> int:
    match = TOKEN.fullmatch(token) if isinstance(token, str) else None
    if match is None or match[1] != level_letter(level):
        raise ArtefactError(
            f"'{path}': row '{row}' holds {reprlib.repr(token)} at level {level}; "
            f"'<{level_letter(level)}_NUMBER>' is expected, its number below 2**32"
        )
    return int(match[2])
