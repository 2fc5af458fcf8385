"""Results as typed data: frozen dataclasses that turn into JSON and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from semid.documents import record
from semid.errors import InputError


class Result:
    """Base of frozen dataclasses that hold results.

    Fields with ``compare=False`` are arrays, often too large for a document. They need a default,
    since `to_dict` leaves them out unless asked and `from_dict` does not read them.
    """

    derived: ClassVar[tuple[str, ...]] = ()  # properties that `to_dict` adds after the fields
    omit_none: ClassVar[tuple[str, ...]] = ()  # fields that it leaves out where they are None
    renamed: ClassVar[Mapping[str, str]] = {}  # key in files written before -> name of the field

    def to_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """Return a JSON-able dict; ``arrays=True`` adds the arrays as lists."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        names = [f.name for f in fields if f.compare or arrays]
        values = {name: getattr(self, name) for name in (*names, *self.derived)}
        return {
            name: _json_value(value, arrays)
            for name, value in values.items()
            if value is not None or name not in self.omit_none
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned."""
        return record(cls, data, cls.__name__, error=InputError)

    @classmethod
    def stored_values(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return a document's values under the names of the fields, without derived ones."""
        arrays = {f.name for f in dataclasses.fields(cls) if not f.compare}  # type: ignore[arg-type]
        named = {cls.renamed.get(key, key): value for key, value in data.items()}
        stored = {k: v for k, v in named.items() if k not in arrays and k not in cls.derived}
        return {**dict.fromkeys(cls.omit_none), **stored}


def _json_value(value: Any, arrays: bool) -> Any:
    if isinstance(value, Result):
        return value.to_dict(arrays=arrays)
    if isinstance(value, list | tuple):
        return [_json_value(each, arrays) for each in value]
    if isinstance(value, Mapping):  # JSON has no keys but strings
        return {str(key): _json_value(each, arrays) for key, each in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
