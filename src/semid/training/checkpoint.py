"""One-file checkpoints that are whole or absent, and belong to one run.

A checkpoint lives in ``<output>.partial/`` beside the output. It holds arrays and a JSON-able
record, and the key of the run (settings and data), so that a resume with other settings or data
is refused instead of mixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from semid.errors import ArtefactError, OutputExistsError, brief
from semid.output import atomic_file
from semid.runs import check_state_folder, hold_path, remove_state_folder
from semid.training.distributed import is_main

__all__ = ["Checkpoint", "open_checkpoint", "run_key"]

STATE_FILE = "state.safetensors"
_UNREADABLE = (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError)


def run_key(settings: Mapping[str, Any], data_digest: str) -> str:
    """Return the SHA-256 of a run's settings and data: equal for runs that may be continued."""
    document = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{document}\n{data_digest}".encode()).hexdigest()


def _checksum(arrays: Mapping[str, np.ndarray], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class Checkpoint:
    """The latest state of a run; of several processes, the first one alone writes it.

    Args:
        folder: where it lives; made when the first state is saved.
        key: the run's `run_key`.
        resume: continue from the state in ``folder``; without one the run starts afresh.

    Raises:
        OutputExistsError: if ``folder`` holds a state and ``resume`` is false.
        ArtefactError: if the state belongs to other settings or data, or cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, key: str, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.key = key
        self._state: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None
        self._hold = contextlib.ExitStack()
        if is_main():
            check_state_folder(self.folder)
            self._hold.enter_context(hold_path(self.folder))
        try:
            self._open(resume)
        except BaseException:
            self.release()
            raise

    def _open(self, resume: bool) -> None:
        file = self.folder / STATE_FILE
        if file.exists() and resume:
            self._state = self._read(file)
        elif file.exists() and is_main():  # else the first process may have begun it already
            raise OutputExistsError(
                f"'{self.folder}' holds an unfinished run; continue it with --resume "
                "(resume=True) or delete that folder"
            )

    def _read(self, file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        try:
            with safe_open(file, framework="numpy") as stored:
                metadata = stored.metadata() or {}
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            record = json.loads(metadata["record"])
            key = metadata["key"]
            if metadata["checksum"] != _checksum(arrays, metadata["record"]):
                raise ValueError("its values do not match its checksum")
        except _UNREADABLE as error:
            raise ArtefactError(
                f"the checkpoint '{file}' cannot be read ({brief(error)}); delete '{self.folder}' "
                "and start again"
            ) from None
        if key != self.key:
            raise ArtefactError(
                f"the checkpoint in '{self.folder}' belongs to other settings or data; repeat the "
                "command that began it, or delete that folder"
            )
        return arrays, record

    @property
    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays and record to continue from, or None for a fresh run."""
        return self._state

    def save(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Replace the state atomically."""
        if not is_main():
            return
        with atomic_file(self.folder / STATE_FILE, mark=False) as work:
            plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            text = json.dumps(record)
            checksum = _checksum(plain, text)
            save_file(plain, work, metadata={"key": self.key, "record": text, "checksum": checksum})

    def clear(self) -> None:
        """Remove the folder: the run is complete and its result is saved."""
        if not is_main():
            return
        remove_state_folder(self.folder)
        self.release()

    def release(self) -> None:
        """Let other runs have the folder; this object writes no more."""
        self._hold.close()


@contextlib.contextmanager
def open_checkpoint(
    folder: str | os.PathLike[str] | None, *, key: str, resume: bool
) -> Iterator[Checkpoint | None]:
    """Hold the checkpoint of a run for the length of the block; None without a folder."""
    if folder is None:
        yield None
        return
    store = Checkpoint(folder, key=key, resume=resume)
    try:
        yield store
    finally:
        store.release()
