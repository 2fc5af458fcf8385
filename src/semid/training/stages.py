"""A run of several stages in one checkpoint: what is finished is kept, what runs is continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

__all__ = ["Kept", "Stage", "Stages", "StateStore"]

Arrays = dict[str, np.ndarray]


class StateStore(Protocol):
    """Where a piece of work keeps its state."""

    @property
    def state(self) -> tuple[Arrays, dict[str, Any]] | None:
        """The arrays and record to continue from, or None for a fresh start."""
        ...

    def save(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Replace the state atomically."""
        ...


class Kept(NamedTuple):
    """Arrays (named ``stage/array``) and records of the stages that are finished."""

    arrays: Arrays
    records: dict[str, dict[str, Any]]


class Stages:
    """Splits a store between stages that run one after another.

    Args:
        store: where everything is kept; None keeps nothing.
    """

    def __init__(self, store: StateStore | None) -> None:
        self._store = store
        self._kept = Kept({}, {})
        self._running: tuple[str, Arrays, dict[str, Any]] | None = None
        found = None if store is None else store.state
        if found is None:
            return
        arrays, record = found
        finished, running = record["finished"], record["stage"]
        self._kept = Kept(
            {key: array for key, array in arrays.items() if key.split("/", 1)[0] in finished},
            finished,
        )
        own = {
            key.removeprefix(f"{running}/"): array
            for key, array in arrays.items()
            if key.startswith(f"{running}/")
        }
        self._running = (running, own, record["record"])

    def finished(self, name: str) -> tuple[Arrays, dict[str, Any]] | None:
        """Return the arrays and record a finished stage left, or None if it has to run."""
        if name not in self._kept.records:
            return None
        prefix = f"{name}/"
        arrays = {
            key.removeprefix(prefix): array
            for key, array in self._kept.arrays.items()
            if key.startswith(prefix)
        }
        return arrays, self._kept.records[name]

    def stage(self, name: str) -> Stage | None:
        """Return the store of one stage, with its state if it was running; None without a store."""
        if self._store is None:
            return None
        state = None
        if self._running is not None and self._running[0] == name:
            state = (self._running[1], self._running[2])
        return Stage(self._store, name, self._kept, state)

    def finish(
        self, name: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
    ) -> None:
        """Keep what a stage made; it is written with the first state of the next stage."""
        self._kept.arrays.update({f"{name}/{key}": array for key, array in arrays.items()})
        self._kept.records[name] = dict(record)


class Stage:
    """The store of one stage."""

    def __init__(
        self,
        store: StateStore,
        name: str,
        kept: Kept,
        state: tuple[Arrays, dict[str, Any]] | None,
    ) -> None:
        self._store, self._name, self._kept = store, name, kept
        self._state = state

    @property
    def state(self) -> tuple[Arrays, dict[str, Any]] | None:
        """The arrays and record to continue from, or None for a fresh start."""
        return self._state

    def save(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Replace the state atomically, keeping what finished stages left."""
        self._store.save(
            {
                **self._kept.arrays,
                **{f"{self._name}/{key}": array for key, array in arrays.items()},
            },
            {"stage": self._name, "finished": self._kept.records, "record": dict(record)},
        )
