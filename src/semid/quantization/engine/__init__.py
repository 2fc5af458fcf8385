"""Exact search by screening: cheap scores, a proven bound, float64 decisions (see README.md).

All files but `plain` import numba, so they are imported when they are first used, as
``engine.search.choose(...)``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semid.quantization.engine import (
        bounded,
        centers,
        gpu,
        keys,
        levels,
        narrow,
        search,
        table,
        vector,
    )

__all__ = ["bounded", "centers", "gpu", "keys", "levels", "narrow", "search", "table", "vector"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return importlib.import_module(f"{__name__}.{name}")
