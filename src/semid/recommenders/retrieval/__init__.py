"""Models that recommend the next item."""

from __future__ import annotations

from semid.registry import Registry

MODELS = Registry(
    "semid.retrievers",
    {
        "popularity": "semid.recommenders.retrieval.controls:Popularity",
        "text-knn": "semid.recommenders.retrieval.controls:TextKNN",
        "sasrec": "semid.recommenders.retrieval.networks:SASRec",
        "composed": "semid.recommenders.retrieval.networks:Composed",
        "parallel": "semid.recommenders.retrieval.networks:Parallel",
        "generative": "semid.recommenders.retrieval.generative:Generative",
        "tiger": "semid.recommenders.retrieval.generative:Tiger",
    },
)
"""Next-item models by name; entry points add others."""
