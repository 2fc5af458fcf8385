"""Options: how arguments and settings are checked, the same for every class that takes some.

`CheckedArguments` refuses unknown arguments and values of a wrong type when an object is made.
`Options` is the base of frozen dataclasses whose fields also carry a range or choices (`option`).
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import reprlib
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from semid.errors import UsageError, nearest_name

__all__ = [
    "MAX_BEAM",
    "MAX_WEIGHT",
    "MAX_WIDTH",
    "CheckedArguments",
    "Options",
    "argument_types",
    "check_arguments",
    "option",
]

# Tokenizers with residual levels and tokenizers with parallel codebooks count their codes under
# these two names.
_SYNONYMS = {"levels": "n_codebooks", "n_codebooks": "levels"}

_NOUNS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    type(None): "None",
}
_PLURALS: dict[Any, str] = {
    int: "whole numbers",
    float: "numbers",
    bool: "truth values",
    str: "strings",
}

MAX_WIDTH = 16_384
"""Widest layer or embedding: a square matrix of it takes 1 GiB."""

MAX_WEIGHT = 1_000_000
"""Largest weight of a loss, rate or temperature: beside larger ones float32 drops the rest."""

MAX_BEAM = 1024
"""Widest beam: partial codes are held for each row of a block."""

_MAX_INT = 2**31 - 1
"""Largest whole number of an option without a limit of its own; counters are 32 or 64 bits."""


class CheckedArguments:
    """Base of classes whose arguments are checked by name and type when an object is made.

    Raises:
        UsageError: naming the class, the argument and what is allowed.
    """

    def __new__(cls, *positional: Any, **arguments: Any) -> Self:
        """Check the arguments before ``__init__`` sees them."""
        # Copying and unpickling make an object without arguments, which passes.
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        open_ended = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        if len(positional) > len(names) and not open_ended:
            first = next(iter(argument_types(cls)))
            raise UsageError(
                f"{cls.__name__} takes {len(names)} arguments by position and was given "
                f"{len(positional)}; give the others by name, such as {first}=..."
            )
        check_arguments(cls, {**dict(zip(names, positional, strict=False)), **arguments})
        return super().__new__(cls)


def argument_types(kind: Any) -> dict[str, Any]:
    """Return the type hint of each constructor argument, those of its ``**options`` among them."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    init = kind.__init__
    hints = typing.get_type_hints(init)
    arguments: dict[str, Any] = {}
    for parameter in list(inspect.signature(init).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            (shared,) = typing.get_args(hints[parameter.name])  # Unpack[a TypedDict]
            arguments |= typing.get_type_hints(shared)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments[parameter.name] = hints.get(parameter.name, Any)
    return arguments


def check_arguments(kind: type, arguments: Mapping[str, Any]) -> None:
    """Check arguments by name and type.

    Args:
        kind: the class they are for.
        arguments: name -> value.

    Raises:
        UsageError: listing every argument that does not exist or has a value of a wrong type.
    """
    allowed = argument_types(kind)
    problems = []
    for name, value in arguments.items():
        if name not in allowed:
            problems.append(
                f"{kind.__name__} has no argument '{name}'{_nearest(name, allowed)}; "
                f"its arguments are {', '.join(allowed)}"
            )
        elif not _fits(value, allowed[name]):
            a_type = "" if isinstance(value, float) else f" ({type(value).__name__})"
            long = isinstance(value, int) and not -(2**63) <= value < 2**64
            problems.append(
                f"{kind.__name__}: {name}={reprlib.repr(value)}{a_type}: "
                f"give {_described(allowed[name])}{' of at most 64 bits' if long else ''}"
            )
    if problems:
        raise UsageError("; ".join(problems))


def option(
    default: Any = dataclasses.MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] = (),
    name: str | None = None,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field of an `Options` dataclass.

    Args:
        default: value where none is given.
        ge: smallest value.
        gt: number that values exceed.
        le: largest value; without ``le`` and ``lt`` whole numbers end at 2**31 - 1.
        lt: number that values stay below.
        choices: the texts that are allowed.
        name: what errors call it; the field's name by default.
        default_factory: makes the default, as for `dataclasses.field`.

    A field that may be None or holds several values checks the values that are there.
    """
    return dataclasses.field(
        default=default,
        default_factory=default_factory,
        metadata={"rule": _Rule(ge, gt, le, lt, tuple(choices), name)},
    )


@dataclass(frozen=True, kw_only=True)
class Options(CheckedArguments):
    """Base of frozen dataclasses that hold settings; a value out of range is a `UsageError`."""

    def __post_init__(self) -> None:
        """Check ranges and choices.

        Raises:
            UsageError: listing every value out of range.
        """
        hints = argument_types(type(self))
        problems = []
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
            rule = field.metadata.get("rule")
            if rule is not None:
                problems += rule.problems(field.name, value, hints[field.name])
        problems += self._problems()
        if problems:
            raise UsageError("; ".join(problems))

    def _problems(self) -> list[str]:
        """Return what is wrong with the values together; a subclass fills it in."""
        return []

    @classmethod
    def of(cls, value: Self | Mapping[str, Any] | None) -> Self:
        """Return options from an object, from a mapping of their names, or the defaults.

        Raises:
            UsageError: an unknown name, or a value of a wrong type or out of range.
        """
        if isinstance(value, cls):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise UsageError(
                f"{reprlib.repr(value)} ({type(value).__name__}) holds no options; give "
                f"{cls.__name__}(...) or a mapping such as {{'{next(iter(argument_types(cls)))}': "
                "...}"
            )
        return cls(**{str(name): each for name, each in (value or {}).items()})


@dataclass(frozen=True)
class _Rule:
    """Range or choices of one field, see `option`."""

    ge: float | None
    gt: float | None
    le: float | None
    lt: float | None
    choices: tuple[str, ...]
    name: str | None

    def problems(self, field: str, value: Any, hint: Any) -> Iterator[str]:
        several = isinstance(value, tuple)
        if value is None or all(self._allows(each) for each in (value if several else (value,))):
            return
        unlimited = self.le is None and self.lt is None
        too_large = isinstance(value, int) and value > _MAX_INT and unlimited
        allowed = f"at most {_MAX_INT}" if too_large else self._text(_is_whole(hint))
        nearest = nearest_name(str(value), self.choices) if self.choices else ""
        optional = ", or None" if type(None) in typing.get_args(hint) else ""
        said = f"{self.name or field}={reprlib.repr(value)}:"
        if self.name is not None and self.name.startswith("--"):
            said = f"{self.name} is {reprlib.repr(value)};"
        yield f"{said} give {allowed}{optional}{nearest}"

    def _allows(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        most = self.le
        if most is None and self.lt is None and isinstance(value, int):
            most = _MAX_INT
        return (
            abs(value) <= sys.float_info.max
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (most is None or value <= most)
            and (self.lt is None or value < self.lt)
        )

    def _text(self, whole: bool) -> str:
        if self.choices:
            return " or ".join(self.choices)
        low, high = (
            each if each is not None else other
            for each, other in ((self.ge, self.gt), (self.le, self.lt))
        )
        if low is not None and high is not None:
            opening, closing = "[("[self.ge is None], "])"[self.le is None]
            if whole:
                return f"{low:,} to {high:,}"
            if (low, high) == (0, 1):
                return f"a share in {opening}0, 1{closing}"
            return f"a number {'above ' if opening == '(' else 'from '}{low:g} to {high:,}"
        if low is None:
            return "a finite number" if high is None else f"at most {high:,}"
        if self.gt is not None:
            return f"a number above {low:g}"
        return "0 or more" if low == 0 else f"at least {low:,}"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _is_whole(hint: Any) -> bool:
    return any(each is int or int in typing.get_args(each) for each in _alternatives(hint))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the hinted type; hints that cannot be checked fit everything."""
    alternatives = _alternatives(hint)
    if len(alternatives) > 1:
        return any(_fits(value, each) for each in alternatives)
    origin = typing.get_origin(hint)
    if hint is bool:
        return _is_bool(value)
    if hint is int:  # files hold 64 bits
        whole = isinstance(value, numbers.Integral) and not _is_bool(value)
        return whole and -(2**63) <= int(value) < 2**64
    if hint is float:
        return isinstance(value, numbers.Real) and not _is_bool(value)
    if origin in (tuple, Sequence):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
            return False
        inner = [each for each in typing.get_args(hint) if each is not Ellipsis]
        return all(any(_fits(each, kind) for kind in inner) for each in value)
    if origin is not None:
        return not isinstance(origin, type) or isinstance(value, origin)
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True


def _described(hint: Any) -> str:
    described = []
    for each in _alternatives(hint):
        origin, inner = typing.get_origin(each), typing.get_args(each)
        if each in _NOUNS:
            described.append(_NOUNS[each])
        elif origin in (tuple, Sequence):
            described.append(f"a list of {_PLURALS.get(inner[0], 'values')}")
        elif origin is Mapping:
            described.append("a mapping")
        else:
            described.append(getattr(each, "__name__", str(each)))
    return " or ".join(dict.fromkeys(described))


def _nearest(name: str, allowed: Mapping[str, Any]) -> str:
    """Return the allowed argument that was probably meant, also one inside nested options."""
    if _SYNONYMS.get(name) in allowed:
        return f"; did you mean '{_SYNONYMS[name]}'?"
    for outer, hint in allowed.items():  # is it a setting of nested options?
        for each in _alternatives(hint):
            nested = isinstance(each, type) and issubclass(each, Options)
            if nested and name in argument_types(each):
                return f"; did you mean {outer}={{'{name}': ...}}?"
    return nearest_name(name, allowed)


def _plain(value: Any, hint: Any) -> Any:
    """Return Python numbers for numpy's, and a tuple where one is declared."""
    if any(typing.get_origin(each) is tuple for each in _alternatives(hint)) and value is not None:
        return tuple(_plain(each, Any) for each in value)
    return value.item() if isinstance(value, np.generic) else value
