"""Semantic IDs for recommendation: learn them, know whether they are good, use them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semid.codes import SemanticIds
    from semid.data.embeddings import open_embeddings
    from semid.data.interactions import read_interactions
    from semid.data.synthetic import SyntheticCatalogue
    from semid.errors import SemidError
    from semid.loading import load
    from semid.quantization.kmeans import KMeansOptions
    from semid.report import diagnose
    from semid.tokenizers.rqkmeans import RQKMeans

__all__ = [
    "KMeansOptions",
    "RQKMeans",
    "SemanticIds",
    "SemidError",
    "SyntheticCatalogue",
    "diagnose",
    "load",
    "open_embeddings",
    "read_interactions",
]

# Names are imported when first used, so that `import semid` and `semid --help` stay quick.
_HOME = {
    "KMeansOptions": "semid.quantization.kmeans",
    "RQKMeans": "semid.tokenizers.rqkmeans",
    "SemanticIds": "semid.codes",
    "SemidError": "semid.errors",
    "SyntheticCatalogue": "semid.data.synthetic",
    "diagnose": "semid.report",
    "load": "semid.loading",
    "open_embeddings": "semid.data.embeddings",
    "read_interactions": "semid.data.interactions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'semid' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
