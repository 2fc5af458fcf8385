"""LC-Rec, LETTER and MiniOneRec: ``{"0": ["<a_236>", "<b_231>", "<c_226>"], ...}``.

Keys are row numbers as strings, counted from 0; a letter a level.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from semid.artefact import atomic_file
from semid.codes import SemanticIds
from semid.errors import ArtefactError, brief
from semid.export.tokens import imported, level_letter, token_strings
from semid.tokenizers.base import Tokenizer

__all__ = ["read_lcrec", "write_lcrec"]

TOKEN = re.compile(r"<([a-z]+)_(\d+)>")


def write_lcrec(ids: SemanticIds, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the index JSON; rows are numbered in the order of ``ids``.

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    names = token_strings(ids.info.codebook_sizes)
    with (
        atomic_file(path, overwrite=overwrite) as work,
        work.open("w", encoding="utf8") as file,
    ):
        file.write("{")
        for row, codes in enumerate(ids.codes.tolist()):
            tokens = [names[level][code] for level, code in enumerate(codes)]
            file.write(f"{',' if row else ''}\n{json.dumps(str(row))}: {json.dumps(tokens)}")
        file.write("\n}\n")


def read_lcrec(
    path: str | os.PathLike[str], *, items: Any = None, tokenizer: Tokenizer | None = None
) -> SemanticIds:
    """Read an index JSON; see `semid.export.formats.import_ids`.

    Raises:
        ArtefactError: naming the first entry that is not of the format.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"'{path}' cannot be read as JSON ({brief(error)})") from None
    if not isinstance(document, dict) or not document:
        raise ArtefactError(f"'{path}' holds no object of row numbers; is it an .index.json?")
    codes: list[list[int]] = []
    for row in range(len(document)):
        tokens = document.get(str(row))
        if not isinstance(tokens, list):
            raise ArtefactError(
                f"'{path}' has {len(document)} entries but none for row '{row}'; keys are row "
                "numbers from 0"
            )
        codes.append([_code(path, row, level, token) for level, token in enumerate(tokens)])
        if len(codes[-1]) != len(codes[0]) or not codes[0]:
            raise ArtefactError(
                f"'{path}': row '{row}' has {len(codes[-1])} tokens, row '0' {len(codes[0])}; "
                "every item needs the same number, at least one"
            )
    return imported(np.array(codes, dtype=np.int64), items=items, tokenizer=tokenizer)


def _code(path: str | os.PathLike[str], row: int, level: int, token: Any) -> int:
    found = TOKEN.fullmatch(token) if isinstance(token, str) else None
    if found is None or found[1] != level_letter(level):
        raise ArtefactError(
            f"'{path}': row '{row}' holds {token!r} at level {level}; "
            f"'<{level_letter(level)}_NUMBER>' is expected"
        )
    return int(found[2])
