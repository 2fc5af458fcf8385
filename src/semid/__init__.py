"""Semantic IDs for recommendation: learn them, know whether they are good, use them.

The public names are those of ``__init__.pyi``, a line each. They are imported when first used, so
that ``import semid`` and ``semid --help`` stay quick.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^from (\S+) import (\w+) as \2$", re.MULTILINE)
_STUB = Path(__file__).with_name("__init__.pyi").read_text(encoding="utf8")
_HOME = {name: module for module, name in _LINE.findall(_STUB)}

__all__ = sorted(_HOME, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("semid")
    if name not in _HOME:
        raise AttributeError(f"module 'semid' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
