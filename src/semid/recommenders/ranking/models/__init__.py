"""The ranking models, one file each, and how they are found by name."""

from semid.recommenders.ranking.models.registry import MODELS, Model, make_model

__all__ = ["MODELS", "Model", "make_model"]
