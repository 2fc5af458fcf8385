"""Artefacts on disk: a folder of ``config.json`` + ``model.safetensors`` + ``README.md``.

A folder is written beside its destination and renamed when complete, so a reader never sees half
of one. Tensors carry a checksum; loading verifies it. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from semid.errors import ArtefactError, OutputExistsError, brief

__all__ = [
    "FORMAT_VERSION",
    "atomic_file",
    "atomic_folder",
    "check_output",
    "fingerprint",
    "read_artefact",
    "read_config",
    "write_artefact",
]

FORMAT_VERSION = 1

# Old key -> new key, applied to configs and tensors of older format versions on load.
KEY_RENAMES: dict[str, str] = {}

CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"
CARD_FILE = "README.md"


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and little-endian values, in name order.

    Args:
        tensors: arrays by name; floating ones are hashed as float32.

    Returns:
        64 hexadecimal digits; the same on every platform for equal values.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        kind = "<f4" if array.dtype.kind == "f" else "<i8"
        digest.update(f"{name}:{kind}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array, dtype=kind).tobytes())
    return digest.hexdigest()


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return ``path`` if it may be written.

    Raises:
        OutputExistsError: if it exists and ``overwrite`` is false.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise OutputExistsError(
            f"output '{target}' exists; choose another path or pass --overwrite (overwrite=True)"
        )
    return target


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error.

    Args:
        path: destination folder; its parents are made.
        overwrite: replace an existing destination (it stays readable until the last moment).

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    target = check_output(path, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        if target.exists():
            old = target.parent / f".{target.name}.{os.getpid()}.old"
            target.rename(old)
            work.rename(target)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary file path that becomes ``path`` when the block ends without an error.

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false, or is a folder.
    """
    target = check_output(path, overwrite=overwrite)
    if target.is_dir():
        raise OutputExistsError(f"output '{target}' is a folder; give a file name")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        yield work
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)


def write_artefact(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    card: str,
    overwrite: bool = False,
) -> Path:
    """Write an artefact folder atomically.

    Args:
        path: destination folder.
        config: JSON-able settings; must hold ``kind`` (what `semid.load` dispatches on).
        tensors: arrays by name.
        card: Markdown for the folder's ``README.md``.
        overwrite: replace an existing folder.

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    document = {
        "format_version": FORMAT_VERSION,
        **config,
        "weights_fingerprint": fingerprint(arrays),
        "tensors": {name: list(array.shape) for name, array in sorted(arrays.items())},
    }
    with atomic_folder(path, overwrite=overwrite) as folder:
        save_file(arrays, folder / TENSOR_FILE)
        (folder / CONFIG_FILE).write_text(
            json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf8"
        )
        (folder / CARD_FILE).write_text(card, encoding="utf8")
    return Path(path)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check an artefact's ``config.json``.

    Raises:
        ArtefactError: if the folder or file is missing, unreadable, or of a newer format.
    """
    folder = Path(path)
    file = folder / CONFIG_FILE
    if not file.is_file():
        what = "does not exist" if not folder.exists() else f"holds no {CONFIG_FILE}"
        raise ArtefactError(
            f"'{folder}' {what}; give a folder written by 'semid fit -o' or tokenizer.save()"
        )
    try:
        config = json.loads(file.read_text(encoding="utf8"))
        version = int(config["format_version"])
        str(config["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"'{file}' is not a semid config ({brief(error)}); save the model again"
        ) from None
    if version > FORMAT_VERSION:
        raise ArtefactError(
            f"'{folder}' has format version {version}, this semid reads up to {FORMAT_VERSION}; "
            "upgrade with: pip install -U semid"
        )
    return {KEY_RENAMES.get(key, key): value for key, value in config.items()}


def read_artefact(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read an artefact and verify that no tensor is missing or altered.

    Returns:
        The config and the arrays by name.

    Raises:
        ArtefactError: if anything is missing, truncated or does not match its checksum.
    """
    config = read_config(path)
    file = Path(path) / TENSOR_FILE
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise ArtefactError(f"'{path}' holds no {TENSOR_FILE}; copy the whole folder") from None
    except (SafetensorError, OSError) as error:
        raise ArtefactError(
            f"'{file}' cannot be read ({brief(error)}); it was probably cut short, copy it again"
        ) from None
    expected = config.get("tensors", {})
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    reshaped = sorted(
        name for name in set(expected) & set(tensors) if list(tensors[name].shape) != expected[name]
    )
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unknown", extra), ("other shape", reshaped))
        if names
    ]
    if not problems and fingerprint(tensors) != config.get("weights_fingerprint"):
        problems = ["the values do not match the checksum in config.json"]
    if problems:
        raise ArtefactError(
            f"the tensors of '{file}' are not those that were saved ({'; '.join(problems)}); "
            "copy the folder again or refit"
        )
    return config, {KEY_RENAMES.get(name, name): array for name, array in tensors.items()}
