"""What an artefact says of a tokenizer, checked before anything is made of it and after."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from semid.documents import checked
from semid.errors import ArtefactError
from semid.options import argument_types

__all__ = ["check_shapes", "check_stored", "described", "stored_settings"]

CONFIG: dict[str, Any] = {
    "settings": dict[str, Any],
    "dim": int,
    "codebook_sizes": list[int],
    "codebook_fingerprint": str,
    "fit_report": dict[str, Any] | None,
}
"""What every config of a tokenizer holds."""


RENAMED = {"behaviour_weight": "behavior_weight", "behaviour_levels": "behavior_levels"}
"""Settings under names they had when older artefacts were written."""
RENAMED_OPTIONS = {
    "kmeans": {
        "iterations": "max_iter",
        "tolerance": "tol",
        "restarts": "n_init",
        "trials": "n_local_trials",
    }
}
"""The same inside nested options."""


def check_shapes(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int | None, ...]]
) -> None:
    """Refuse tensors of other shapes than settings ask for, before anything is made of them.

    Args:
        tensors: arrays by name.
        shapes: the shape of each that is needed; None stands for any length.

    Raises:
        ValueError: naming the first that does not fit or is missing.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"there is no tensor '{name}'")
        actual = tensors[name].shape
        if len(actual) != len(shape) or any(
            length is not None and length != n for n, length in zip(actual, shape, strict=True)
        ):
            raise ValueError(f"tensor '{name}' has shape {actual}, its settings ask for {shape}")
        if tensors[name].dtype.kind == "f" and not np.isfinite(tensors[name]).all():
            raise ValueError(f"tensor '{name}' holds NaN or infinite values")


UNUSABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What constructors raise for settings and tensors that contradict each other."""


@contextlib.contextmanager
def described(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn whatever settings and tensors of an artefact cannot be into one sentence.

    Raises:
        ArtefactError: naming the artefact and the reason.
    """
    try:
        yield
    except (*UNUSABLE, ArtefactError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ArtefactError(
            f"'{path}' does not describe a {what} ({reason}); save the model again"
        ) from None


def stored_settings(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments in a config, of the types that they have there.

    Raises:
        ArtefactError: for a key that is missing or unknown, or a value of another type.
    """
    known = {name: value for name, value in config.items() if name in CONFIG}
    checked(CONFIG, known, "config.json", required=CONFIG)
    settings: dict[str, Any] = {
        RENAMED.get(name, name): value for name, value in config["settings"].items()
    }
    for name, renamed in RENAMED_OPTIONS.items():
        if isinstance(nested := settings.get(name), Mapping):
            settings[name] = {renamed.get(key, key): value for key, value in nested.items()}
    checked(argument_types(kind), settings, "settings")
    return settings


def check_stored(path: str | os.PathLike[str], config: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse tensors that are not those of the config, and settings that were changed in it.

    Args:
        path: of the artefact.
        config: its config.
        tokenizer: what was made of it.

    Raises:
        ArtefactError: naming what differs.
    """
    actual = {
        "codebook_sizes": [len(book) for book in tokenizer.codebooks],
        "codebook_fingerprint": tokenizer.codebook_fingerprint,
    }
    if config["format_version"] > 1:  # before, it was that of the tensors as they were stored
        actual["weights_fingerprint"] = tokenizer.weights_fingerprint
    different = [name for name, value in actual.items() if config.get(name) != value]
    if different:
        raise ArtefactError(
            f"the tensors of '{path}' do not fit its config.json ({', '.join(different)}): one of "
            "them was changed; copy the folder again, or fit a model with other settings"
        )
