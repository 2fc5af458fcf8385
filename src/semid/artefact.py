"""Artefacts on disk: a folder of ``config.json`` + ``model.safetensors`` + ``README.md``.

A folder is written beside its destination and renamed when complete, so a reader never sees half
of one. The tensors and the config each carry a checksum; loading verifies both. Nothing is pickled.

Format versions: 1 had no checksum of the config, and the fingerprint of a tokenizer's weights did
not cover its settings. Both are still read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from semid.documents import checksum, read_json, typed
from semid.errors import ArtefactError
from semid.output import atomic_folder

FORMAT_VERSION = 2

# Old key -> new key, applied to configs and tensors of older format versions on load.
KEY_RENAMES: dict[str, str] = {}

CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"
CARD_FILE = "README.md"
CHECKSUM = "config_fingerprint"
_NUMBERS = "numbers are float16, float32, float64 or integers"


def fingerprint(
    tensors: Mapping[str, np.ndarray], *, settings: Mapping[str, Any] | None = None
) -> str:
    """SHA-256 over names, shapes and little-endian values, in name order; 64 hexadecimal digits."""
    # Floating arrays are hashed as float32; settings are those that change what they compute.
    digest = hashlib.sha256()
    # Names and shapes are hashed too: the same bytes under another name are another model.
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        kind = "<f4" if array.dtype.kind == "f" else "<i8"
        digest.update(f"{name}:{kind}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array, dtype=kind).tobytes())
    if settings is not None:
        # Tokenizers keep their arguments as given, numpy's numbers among them.
        text = json.dumps(settings, sort_keys=True, default=_plain_number)
        digest.update(f"settings:{text}".encode())
    return digest.hexdigest()


def _plain_number(value: Any) -> Any:
    if not isinstance(value, np.generic):
        raise TypeError(f"{type(value).__name__} is no value of JSON")
    return value.item()


def write_artefact(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    card: str,
    overwrite: bool = False,
) -> Path:
    """Write an artefact folder atomically."""
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    document = {
        "format_version": FORMAT_VERSION,
        **config,
        "tensors_fingerprint": fingerprint(arrays),
        "tensors": {name: list(array.shape) for name, array in sorted(arrays.items())},
    }
    # Checked as it will be read: tuples are lists then, and keys are texts.
    document = json.loads(json.dumps(document, allow_nan=False, default=_plain_number))
    document[CHECKSUM] = checksum(document)
    with atomic_folder(path, overwrite=overwrite) as folder:
        save_file(arrays, folder / TENSOR_FILE)
        (folder / CONFIG_FILE).write_text(
            json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf8"
        )
        (folder / CARD_FILE).write_text(card, encoding="utf8")
    return Path(path)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check an artefact's ``config.json``."""
    folder = Path(path)
    file = folder / CONFIG_FILE
    if not file.is_file():
        what = "does not exist" if not folder.exists() else f"holds no {CONFIG_FILE}"
        raise ArtefactError(
            f"'{folder}' {what}; give a folder written by 'semid fit -o' or tokenizer.save()"
        )
    document = read_json(file, advice="it is not a semid config; save the model again")
    config = typed(dict[str, Any], document, f"'{file}'")
    for name, kind in (("format_version", int), ("kind", str)):
        if name not in config:
            raise ArtefactError(
                f"'{file}' is not a semid config: it does not say {name}; save the model again"
            )
        typed(kind, config[name], f"'{file}', {name}")
    # The version comes first: a newer format may be checked in another way.
    check_version(config["format_version"], FORMAT_VERSION, where=f"'{folder}'")
    if config["format_version"] > 1 and config.pop(CHECKSUM, None) != checksum(config):
        raise ArtefactError(
            f"'{file}' is not what was saved: its values do not match its checksum; copy the "
            "folder again, or fit or save the model with other settings instead of editing them"
        )
    return {KEY_RENAMES.get(key, key): value for key, value in config.items()}


def check_version(version: int, newest: int, *, where: str) -> None:
    """Refuse a file of a format version that this semid does not know."""
    if version < 1:
        raise ArtefactError(f"{where} has format version {version}, which never was; copy it again")
    if version > newest:
        raise ArtefactError(
            f"{where} has format version {version}, this semid reads up to {newest}; "
            "upgrade with: pip install -U semid"
        )


def read_tensors(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a safetensors file."""
    path = Path(file)
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ArtefactError(
            f"'{path.parent}' holds no {path.name}; copy the whole folder"
        ) from None
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ArtefactError(
            f"'{path}' cannot be read ({error}); it was probably cut short, copy it again"
        ) from None
    except (TypeError, AttributeError, KeyError) as error:  # types that numpy does not have
        raise ArtefactError(
            f"'{path}' holds tensors of a type that semid does not read ({error}); {_NUMBERS}"
        ) from None
    for name, array in sorted(tensors.items()):
        if array.dtype.kind not in "fiub":
            raise ArtefactError(f"'{path}' holds {array.dtype} in '{name}'; {_NUMBERS}")
    return tensors


def read_artefact(
    path: str | os.PathLike[str], *, kind: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read an artefact: config and arrays by name, verified to be complete and unaltered."""
    config = read_config(path)
    if kind not in (None, config["kind"]):
        raise ArtefactError(
            f"'{path}' holds a '{config['kind']}', not a '{kind}'; open it with semid.load"
        )
    file = Path(path) / TENSOR_FILE
    where = f"'{Path(path) / CONFIG_FILE}'"
    expected = typed(dict[str, list[int]], config.get("tensors", {}), f"{where}, tensors")
    digest = "weights_fingerprint" if config["format_version"] == 1 else "tensors_fingerprint"
    tensors = read_tensors(file)
    both = expected.keys() & tensors.keys()
    differences = {
        "missing": expected.keys() - both,
        "unknown": tensors.keys() - both,
        "other shape": {name for name in both if list(tensors[name].shape) != expected[name]},
    }
    problems = [
        f"{what}: {', '.join(sorted(names))}" for what, names in differences.items() if names
    ]
    if not problems and fingerprint(tensors) != config.get(digest):
        problems = ["the values do not match the checksum in config.json"]
    if problems:
        raise ArtefactError(
            f"the tensors of '{file}' are not those that were saved ({'; '.join(problems)}); "
            "copy the folder again or refit"
        )
    return config, {KEY_RENAMES.get(name, name): array for name, array in tensors.items()}
