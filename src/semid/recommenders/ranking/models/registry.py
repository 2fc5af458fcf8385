"""Ranking models by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from semid.errors import UsageError
from semid.options import check_arguments
from semid.registry import Registry

__all__ = ["MODELS", "Model", "make_model"]

MODELS = Registry(
    "semid.recommenders",
    {
        "autoint": "semid.recommenders.ranking.models.autoint:AutoInt",
        "dcnv2": "semid.recommenders.ranking.models.dcnv2:DCNv2",
        "deepfm": "semid.recommenders.ranking.models.deepfm:DeepFM",
        "deepim": "semid.recommenders.ranking.models.deepim:DeepIM",
    },
)


COUNTS = {"experts", "heads", "hidden", "layers", "order"}
"""Options that say how many modules a model has."""

MAX_LAYERS = 128
"""The papers have three."""


class Model(Protocol):
    """What turns field embeddings into a logit.

    Attributes:
        first_order: whether the model also reads a weight of its own for every field, from tables
            of width 1.
    """

    first_order: ClassVar[bool]

    def __call__(self, e: Tensor, first: Tensor | None = None) -> Tensor:
        """Return logits ``(batch,)``.

        Args:
            e: ``(batch, fields, width)``.
            first: ``(batch, fields)`` first-order weights, for models that read them.
        """
        ...


def make_model(
    name: str, *, fields: int, width: int, options: Mapping[str, Any] | None = None
) -> Any:
    """Make a model.

    Args:
        name: key of `MODELS`.
        fields: number of fields.
        width: of a field's embedding.
        options: keyword arguments of its class; see its docstring.

    Raises:
        UsageError: an unknown model or option.
    """
    made = MODELS.load(name, flag="--model (model=)")
    check_arguments(made, options or {})
    for key in COUNTS & set(options or {}):
        value = (options or {})[key]
        if (value if isinstance(value, int) else len(value)) > MAX_LAYERS:
            raise UsageError(f"{key}={value} of {name}: give at most {MAX_LAYERS}")
    return made(fields, width, **(options or {}))
