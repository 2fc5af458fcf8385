"""Every error semid raises on purpose, in one tree.

A message says what was given, what is allowed and how to put it right, in the user's own words
(the flag, the column, the argument). `UsageError` means the call itself is wrong (exit code 2 on
the command line); everything else means the call was fine and the data or the machine was not
(exit code 1).
"""

from __future__ import annotations

import difflib
import importlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any


class SemidError(Exception):
    """Root of the tree: catch this to catch everything semid raises on purpose."""

    exit_code = 1


class UsageError(SemidError, ValueError):
    """An argument, flag, column or recipe key that does not exist or is out of range."""

    exit_code = 2


class InputError(SemidError, ValueError):
    """Data that cannot be used, with every problem found: one sentence per problem."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class EmbeddingError(InputError):
    """Embeddings that are empty, ragged, not finite, of the wrong width, or unreadable."""


class IdsError(InputError):
    """Item ids that are missing, duplicated, or of another length than the rows."""


class InteractionsError(InputError):
    """Interactions without the needed columns, order or known items."""


class ArtefactError(SemidError):
    """A saved model or ids file that is incomplete, altered, or of an unknown version."""


class FingerprintError(ArtefactError):
    """Codes that were made with another codebook than the one they are used with."""


class OutputExistsError(SemidError, FileExistsError):
    """The output path exists and overwriting was not asked for."""

    exit_code = 2


class OutputBusyError(OutputExistsError):
    """Another run is writing to the output at this moment."""


class MissingExtraError(SemidError, ImportError):
    """An optional dependency is not installed; the message holds the exact pip command."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; "
            f"install it with: pip install 'semid[{extra}]'"
        )


def import_extra(module: str, *, extra: str, purpose: str, package: str = "") -> Any:
    """Return a module of an optional dependency; ``package`` names it where pip's name differs.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(package or module, extra=extra, purpose=purpose) from None


class NotFittedError(SemidError, AttributeError):
    """A tokenizer was used before `fit` (or `semid.load`)."""


class DivergedError(SemidError, ArithmeticError):
    """Training produced a loss that is not finite; the last good checkpoint was kept."""


# Unicode categories that steer a terminal or cannot be encoded: control and format characters,
# surrogates, line and paragraph separators.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """Return a text with everything escaped that steers a terminal; newlines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        ascii(c)[1:-1] if c not in "\n\t" and unicodedata.category(c) in _UNPRINTABLE else c
        for c in text
    )


def brief(error: BaseException) -> str:
    """Return another library's exception in one line: its first, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = printable(lines[0]) if lines else type(error).__name__
    return line if len(line) <= 200 else f"{line[:197]}..."


def nearest_name(name: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def check_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``allowed``; ``name`` is what errors call it."""
    if isinstance(value, str) and value in allowed:
        return value
    listed = ", ".join(f"'{a}'" for a in allowed)
    raise UsageError(f"{name}='{value}' is not one of {listed}{nearest_name(str(value), allowed)}")
