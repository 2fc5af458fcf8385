"""Ranking (CTR) models that read Semantic IDs: data, features, models, training, analysis."""

from __future__ import annotations

from semid.registry import Registry

MODELS = Registry(
    "semid.recommenders",
    {
        "autoint": "semid.recommenders.ranking.models:AutoInt",
        "dcnv2": "semid.recommenders.ranking.models:DCNv2",
        "deepfm": "semid.recommenders.ranking.models:DeepFM",
        "deepim": "semid.recommenders.ranking.models:DeepIM",
    },
)
"""Models by their names on the command line; entry points of the group add others."""
