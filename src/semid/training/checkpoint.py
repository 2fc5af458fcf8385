"""Checkpoints that are whole or absent: of one run, of its stages, of modules and optimizers.

A checkpoint lives in ``<output>.partial/`` beside the output. It holds arrays, a JSON-able record,
and the key of the run (settings and data), so that a resume with other settings or data is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from semid.errors import ArtefactError, OutputExistsError, brief
from semid.lazy import torch
from semid.output import atomic_file
from semid.runs import check_state_folder, hold_path, remove_state_folder
from semid.training.distributed import is_main

STATE_FILE = "state.safetensors"
_UNREADABLE = (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError)

Arrays = dict[str, np.ndarray]


class StateStore(Protocol):
    """Where a computation saves its state."""

    @property
    def state(self) -> tuple[Arrays, dict[str, Any]] | None:
        """The arrays and record to continue from, or None for a fresh start."""
        ...

    def save(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Replace the state atomically."""
        ...


def run_key(settings: Mapping[str, Any], data_digest: str) -> str:
    """Return the SHA-256 of a run's settings and data: equal for runs that may be continued."""
    document = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{document}\n{data_digest}".encode()).hexdigest()


def _checksum(arrays: Mapping[str, np.ndarray], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name, array in sorted(arrays.items()):
        # Type and shape are hashed too: equal bytes may mean other numbers.
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class Checkpoint:
    """The latest state of a run; of several processes, the first one alone writes it."""

    def __init__(self, folder: str | os.PathLike[str], *, key: str, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.key = key
        self.state: tuple[Arrays, dict[str, Any]] | None = None  # to continue from
        self._hold = contextlib.ExitStack()
        file = self.folder / STATE_FILE
        with contextlib.ExitStack() as hold:
            if is_main():
                check_state_folder(self.folder)
                hold.enter_context(hold_path(self.folder))
            # A state is refused unless it is to be continued, and then if its key differs.
            if file.exists() and resume:
                self.state = self._read(file)
            elif file.exists() and is_main():  # else the first process may have begun it already
                raise OutputExistsError(
                    f"'{self.folder}' holds an unfinished run; continue it with --resume "
                    "(resume=True) or delete that folder"
                )
            self._hold = hold.pop_all()

    def _read(self, file: Path) -> tuple[Arrays, dict[str, Any]]:
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

    def save(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Replace the state atomically."""
        if not is_main():
            return
        with atomic_file(self.folder / STATE_FILE, mark=False) as work:
            plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            text = json.dumps(record)
            # Key, record and checksum lie in the file of the arrays, so they are replaced together.
            checksum = _checksum(plain, text)
            save_file(plain, work, metadata={"key": self.key, "record": text, "checksum": checksum})

    def clear(self) -> None:
        """Remove the folder: the run is complete and its result is saved."""
        if is_main():
            remove_state_folder(self.folder)
            self.release()

    def release(self) -> None:
        """Release the folder for other runs; this object writes no more."""
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


class Stages:
    """One store for stages that run one after another: finished ones are kept, one continues."""

    def __init__(self, store: StateStore | None) -> None:
        self.store = store  # None saves nothing
        self.arrays: Arrays = {}  # of finished stages, as ``stage/array``
        self.records: dict[str, dict[str, Any]] = {}
        self._running: tuple[str, tuple[Arrays, dict[str, Any]]] | None = None
        if store is not None and store.state is not None:
            arrays, record = store.state
            self.records, running = record["finished"], record["stage"]
            # Finished stages stay in every later state; the rest is the running stage's.
            for name in self.records:
                self.arrays |= with_prefix(f"{name}/", without_prefix(f"{name}/", arrays))
            self._running = running, (without_prefix(f"{running}/", arrays), record["record"])

    def run(
        self, name: str, function: Callable[[StateStore | None], tuple[Arrays, dict[str, Any]]]
    ) -> tuple[Arrays, dict[str, Any]]:
        """Run a stage, or return what it returned in the run that is continued."""
        result = self.finished(name)
        if result is None:
            result = function(self.stage(name))
            self.finish(name, *result)
        return result

    def finished(self, name: str) -> tuple[Arrays, dict[str, Any]] | None:
        """Return the arrays and record of a finished stage, or None if it has to run."""
        if name not in self.records:
            return None
        return without_prefix(f"{name}/", self.arrays), self.records[name]

    def stage(self, name: str) -> StateStore | None:
        """Return the store of one stage, with its state if it was running; None without a store."""
        if self.store is None:
            return None
        is_running = self._running is not None and self._running[0] == name
        return _Stage(self, name, self._running[1] if self._running and is_running else None)

    def finish(
        self, name: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
    ) -> None:
        """Store the result of a stage; it is written with the first state of the next stage."""
        self.arrays |= with_prefix(f"{name}/", arrays)
        self.records[name] = dict(record)


@dataclass
class _Stage:
    """The store of one stage, which saves the results of finished stages too."""

    stages: Stages
    name: str
    state: tuple[Arrays, dict[str, Any]] | None

    def save(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Replace the state atomically, with the results of the finished stages."""
        assert self.stages.store is not None
        self.stages.store.save(
            {**self.stages.arrays, **with_prefix(f"{self.name}/", arrays)},
            {"stage": self.name, "finished": self.stages.records, "record": dict(record)},
        )


def with_prefix(prefix: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Return the arrays under names that begin with ``prefix``."""
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def without_prefix(prefix: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Return the arrays whose names begin with ``prefix``, without it."""
    return {n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)}


def module_arrays(module: torch.nn.Module) -> Arrays:
    """Return a copy of every parameter and buffer of ``module``."""
    return {
        name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()
    }


def load_module_(module: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Load what `module_arrays` returned; ValueError for arrays that do not fit the module."""
    state = module.state_dict()
    problems = [f"'{name}' is missing" for name in state if name not in arrays]
    for name, array in arrays.items():
        if name not in state:
            problems.append(f"'{name}' is unknown")
            continue
        # A scalar was stored as one number up to format version 1 of artefacts.
        shape = () if array.shape == (1,) and not state[name].shape else array.shape
        if shape != tuple(state[name].shape):
            problems.append(
                f"'{name}' has shape {shape}, the settings ask for {tuple(state[name].shape)}"
            )
        elif array.dtype.kind not in ("f" if state[name].is_floating_point() else "biu"):
            problems.append(f"'{name}' holds {array.dtype}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)
    # A module on the device ``meta`` takes memory here alone, for arrays that fit it.
    on_meta = any(tensor.is_meta for tensor in state.values())
    tensors = {
        name: torch.from_numpy(np.array(array) if on_meta else array)
        .to(state[name].dtype)
        .reshape(state[name].shape)
        for name, array in arrays.items()
    }
    module.load_state_dict(tensors, assign=on_meta)


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> Arrays:
    """Return the optimizer's state by parameter number and name; rates are the schedule's."""
    state: dict[int, dict[str, torch.Tensor]] = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value.detach().cpu().numpy().copy()
        for number, entries in state.items()
        for name, value in entries.items()
    }


def load_optimizer_(optimizer: torch.optim.Optimizer, arrays: Mapping[str, np.ndarray]) -> None:
    """Load what `optimizer_arrays` returned."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, array in arrays.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = torch.from_numpy(array.copy())
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
