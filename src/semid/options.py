"""Options: one way to declare, check and show arguments and settings.

Frozen settings derive from `Options`, classes that are configured and then used (tokenizers)
from `Parameters`; both are keyword-only dataclasses whose fields are declared with `option`::

    @dataclass(frozen=True, kw_only=True)
    class KMeansOptions(Options):
        max_iter: int = option(25, ge=1, help="Maximum number of Lloyd iterations.")


    @dataclass(kw_only=True, eq=False, repr=False)
    class MyTokenizer(Tokenizer):  # Tokenizer derives from Parameters
        kind: ClassVar[str] = "mine"

        codebook_size: int | Sequence[int] = option(256, ge=2, help="Codewords per level.")
        kmeans: KMeansOptions | Mapping[str, Any] | None = option(None, help="K-means options.")
        threads: int | None = option(None, ge=1, help="CPU threads.", setting=False)

The constructor, the checks of names, types and ranges, ``settings``, ``get_params``,
``set_params``, the representation and the flags of the command line come from the fields.
Arguments are stored as they were given. What is computed from them is a property:
``KMeansOptions.of(self.kmeans)`` is the options object behind a ``kmeans`` argument. A subclass
inherits fields and declares one again to change its default. State that `fit` sets belongs in
``__post_init__`` (call ``super().__post_init__()`` first), not among the annotated fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import reprlib
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from semid.documents import alternatives, described, fits, type_hints
from semid.errors import UsageError, nearest_name

# Tokenizers with residual levels and tokenizers with parallel codebooks count their codes under
# these two names.
_SYNONYMS = {"levels": "n_codebooks", "n_codebooks": "levels"}

MAX_WIDTH = 16_384
"""Widest layer or embedding: a square matrix of it takes 1 GiB."""

MAX_WEIGHT = 1_000_000
"""Largest weight of a loss, rate or temperature: beside larger ones float32 drops the rest."""

MAX_BEAM = 1024
"""Widest beam: partial codes are held for each row of a block."""

_MAX_INT = 2**31 - 1
"""Largest whole number of an option with a lower limit alone; counters are 32 or 64 bits."""


# Declaring -----------------------------------------------------------------------------------


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",  # noqa: A002 - the name that argparse, click and typer have
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] = (),
    name: str | None = None,
    setting: bool = True,
    nested: Mapping[str, Any] | None = None,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field of an `Options` or `Parameters` dataclass.

    A field that may be None or holds several values checks the values that are there.

    Args:
        default: value if none is given.
        help: one sentence for the command line.
        ge: smallest value.
        gt: exclusive lower limit.
        le: largest value; whole numbers with a lower limit alone end at 2**31 - 1.
        lt: exclusive upper limit.
        choices: allowed strings.
        name: name in error messages, or the flag they show beside the field's name.
        setting: whether the value changes the result and is part of ``settings``.
        nested: for a field of nested options, defaults that replace those of its class.
        default_factory: function that makes the default, as for `dataclasses.field`.
    """
    declared = Option(help, ge, gt, le, lt, tuple(choices), name, setting, dict(nested or {}))
    return dataclasses.field(
        default=default, default_factory=default_factory, metadata={"option": declared}
    )


@dataclass(frozen=True)
class Option:
    """What `option` declares about one field."""

    help: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    name: str | None = None
    setting: bool = True
    nested: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def problems(self, field: str, value: Any, hint: Any) -> Iterator[str]:
        """Yield a sentence if a value is out of range."""
        # Of a list, every element has to be in range.
        several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
        values = value if several else (value,)
        wrong = [each for each in values if value is not None and not self._allows(each)]
        if not wrong:
            return
        too_large = isinstance(value, int) and self._maximum(value) == _MAX_INT < value
        allowed = f"at most {_MAX_INT}" if too_large else self.allowed(hint)
        # Of names, the one that is wrong is shown; of numbers all, since each has a place.
        nearest = nearest_name(str(wrong[0]), self.choices) if self.choices else ""
        shown = reprlib.repr(wrong[0] if self.choices else value)
        optional = ", or None" if type(None) in typing.get_args(hint) else ""
        subject = f"{self.name or field}={shown}:"
        if self.name is not None and self.name.startswith("--"):
            subject = f"{self.name} ({field}=) is {shown};"
        yield f"{subject} give {allowed}{optional}{nearest}"

    def _maximum(self, value: Any) -> float | None:
        """Return the largest allowed value."""
        capped = self.le is None and self.lt is None and (self.ge, self.gt) != (None, None)
        return _MAX_INT if capped and isinstance(value, int) else self.le

    def _allows(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if not isinstance(value, numbers.Real) or isinstance(value, bool | np.bool_):
            return True  # strings, truth values and nested options have no range
        if isinstance(value, numbers.Integral):
            value = int(value)
        most = self._maximum(value)
        return bool(
            abs(value) <= sys.float_info.max
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (most is None or value <= most)
            and (self.lt is None or value < self.lt)
        )

    def allowed(self, hint: Any) -> str:
        """Return what values are allowed, as the object of "give"."""
        if self.choices:
            return " or ".join(self.choices)
        low, high = (
            each if each is not None else other
            for each, other in ((self.ge, self.gt), (self.le, self.lt))
        )
        if low is not None and high is not None:
            opening, closing = "[("[self.ge is None], "])"[self.le is None]
            if any(each is int or int in typing.get_args(each) for each in alternatives(hint)):
                return f"{low:,} to {high:,}"
            if (low, high) == (0, 1):
                return f"a share in {opening}0, 1{closing}"
            return f"a number {'above ' if opening == '(' else 'from '}{low:g} to {high:,}"
        if low is None:
            return "a finite number" if high is None else f"at most {high:,}"
        if self.gt is not None:
            return f"a number above {low:g}"
        return "0 or more" if low == 0 else f"at least {low:,}"


def declared_options(kind: Any) -> dict[str, Option]:
    """Return the `Option` of each field of a dataclass; an empty one where none is declared."""
    return {
        field.name: field.metadata.get("option", Option())
        for field in dataclasses.fields(kind)
        if field.init
    }


def nested_options(hint: Any) -> type[Options] | None:
    """Return the `Options` class among the alternatives of a type hint."""
    for each in alternatives(hint):
        if isinstance(each, type) and issubclass(each, Options):
            return each
    return None


# Bases ---------------------------------------------------------------------------------------


class CheckedArguments:
    """Base of classes whose arguments are checked by name and type when an object is made.

    Raises:
        UsageError: naming the class, the argument and what is allowed.
    """

    def __init_subclass__(cls) -> None:
        """Add the arguments and their help texts to the docstring, unless it lists them itself."""
        super().__init_subclass__()
        text = inspect.cleandoc(vars(cls).get("__doc__") or "")
        if text and "Args:\n" not in text and "Attributes:\n" not in text:
            # `dataclass` runs after this method: fields of the class are still among its values.
            fields: dict[str, Any] = {}
            for kind in (*reversed(cls.__mro__[1:]), cls):
                fields |= getattr(kind, "__dataclass_fields__", {})
                fields |= {n: f for n, f in vars(kind).items() if isinstance(f, dataclasses.Field)}
            lines = [
                f"    {name}: {field.metadata['option'].help}{_default_text(field)}"
                for name, field in fields.items()
                if field.init and "option" in field.metadata
            ]
            # Sections that follow the arguments stay behind them.
            head, raises, tail = text.partition("\n\nRaises:\n")
            cls.__doc__ = "\n".join([head, "", "Args:", *lines]) + raises + tail

    def __new__(cls, *positional: Any, **arguments: Any) -> Self:
        """Check the arguments before ``__init__`` sees them."""
        # Copying and unpickling make an object without arguments, which passes.
        if positional:
            first = next(iter(argument_types(cls)))
            raise UsageError(
                f"{cls.__name__} takes 0 arguments by position and was given {len(positional)}; "
                f"give them by name, such as {first}=..."
            )
        check_arguments(cls, arguments)
        return super().__new__(cls)

    def _problems(self) -> list[str]:
        """Return what is wrong with the values together; a subclass fills it in."""
        return []

    def _check_ranges(self) -> None:
        hints = argument_types(type(self))
        problems = [
            problem
            for name, declared in declared_options(type(self)).items()
            for problem in declared.problems(name, getattr(self, name), hints[name])
        ]
        problems += self._problems()
        if problems:
            raise UsageError("; ".join(problems))


def _default_text(field: dataclasses.Field[Any]) -> str:
    """Return the default in brackets, as a docstring shows it."""
    return "" if field.default is dataclasses.MISSING else f" (default: {field.default!r})"


@dataclass(frozen=True, kw_only=True)
class Options(CheckedArguments):
    """Base of frozen dataclasses that hold settings; a value out of range is a `UsageError`."""

    def __post_init__(self) -> None:
        """Convert numpy's numbers and lists, then check ranges and choices."""
        hints = argument_types(type(self))
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        self._check_ranges()

    @classmethod
    def of(
        cls, value: Self | Mapping[str, Any] | None, *, defaults: Mapping[str, Any] | None = None
    ) -> Self:
        """Return options from an object, from a mapping of their names, or the defaults."""
        if isinstance(value, cls):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise UsageError(
                f"{reprlib.repr(value)} ({type(value).__name__}) holds no options; give "
                f"{cls.__name__}(...) or a mapping such as {{'{next(iter(argument_types(cls)))}': "
                "...}"
            )
        merged = {**(defaults or {}), **(value or {})}
        return cls(**{str(name): each for name, each in merged.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON-able values."""
        return {
            field.name: _jsonable(getattr(self, field.name)) for field in dataclasses.fields(self)
        }


@dataclass(kw_only=True, eq=False, repr=False)
class Parameters(CheckedArguments):
    """Base of classes whose constructor arguments are declared as fields, see the module.

    It follows scikit-learn: arguments are stored unmodified, and `get_params`, `set_params` and
    ``sklearn.base.clone`` work. Nested options are reached as ``kmeans__max_iter``.

    Raises:
        UsageError: for an unknown argument, or a value of a wrong type or out of range.
    """

    def __post_init__(self) -> None:
        """Check the values; a subclass adds its state after calling this."""
        hints = argument_types(type(self))
        for name, declared in declared_options(type(self)).items():
            nested = nested_options(hints[name])
            if nested is not None:
                nested.of(getattr(self, name), defaults=declared.nested)
        self._check_ranges()

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that change the result, JSON-able, nested options complete."""
        declared = declared_options(type(self))
        return {
            name: _jsonable(self._resolved(name)) for name in declared if declared[name].setting
        }

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments as they were given; with ``deep`` also nested options."""
        params = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if deep:
            for name in list(params):
                resolved = self._resolved(name)
                if isinstance(resolved, Options):
                    for field in dataclasses.fields(resolved):
                        params[f"{name}__{field.name}"] = getattr(resolved, field.name)
        return params

    def set_params(self, **params: Any) -> Self:
        """Change arguments, for example ``kmeans__max_iter=10``; what was fitted stays."""
        changed: dict[str, Any] = {}
        for key, value in params.items():
            name, _, inner = key.partition("__")
            if inner and name in argument_types(type(self)):
                current = changed.get(name, self._resolved(name))
                if isinstance(current, Options):
                    check_arguments(type(current), {inner: value})
                    changed[name] = dataclasses.replace(current, **{inner: value})
                    continue
            changed[key] = value
        # Nothing changes unless everything fits: an object of all values raises first.
        type(self)(**{**self.get_params(deep=False), **changed})
        for name, value in changed.items():
            setattr(self, name, value)
        return self

    def _resolved(self, name: str) -> Any:
        """Return an argument; for nested options given as a mapping or None, the options."""
        hint, value = argument_types(type(self))[name], getattr(self, name)
        nested = nested_options(hint)
        if nested is None:
            return value
        return nested.of(value, defaults=declared_options(type(self))[name].nested)

    def __repr__(self) -> str:
        """Show the arguments that differ from their defaults."""
        shown = []
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if repr(value) != repr(default):
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _jsonable(value: Any) -> Any:
    """Return plain values of options, numpy's numbers and sequences."""
    if isinstance(value, Options):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(name): _jsonable(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_jsonable(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def _plain(value: Any, hint: Any) -> Any:
    """Return Python numbers for numpy's, and a tuple where one is declared."""
    if any(typing.get_origin(each) is tuple for each in alternatives(hint)) and value is not None:
        return tuple(_plain(each, Any) for each in value)
    return value.item() if isinstance(value, np.generic) else value


# Checking names and types --------------------------------------------------------------------


def argument_types(kind: Any) -> dict[str, Any]:
    """Return the type hint of each constructor argument of a dataclass."""
    hints = type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def check_arguments(kind: type, arguments: Mapping[str, Any]) -> None:
    """Check arguments by name and type."""
    allowed = argument_types(kind)
    problems = []
    for name, value in arguments.items():
        if name not in allowed:
            problems.append(
                f"{kind.__name__} has no argument '{name}'{_nearest(name, allowed)}; "
                f"its arguments are {', '.join(allowed)}"
            )
        elif not fits(value, allowed[name]):
            a_type = "" if isinstance(value, float) else f" ({type(value).__name__})"
            long = isinstance(value, int) and not -(2**63) <= value < 2**64
            problems.append(
                f"{kind.__name__}: {name}={reprlib.repr(value)}{a_type}: "
                f"give {described(allowed[name])}{' of at most 64 bits' if long else ''}"
            )
    if problems:
        raise UsageError("; ".join(problems))


def _nearest(name: str, allowed: Mapping[str, Any]) -> str:
    """Return the allowed argument that was probably meant, also one inside nested options."""
    if _SYNONYMS.get(name) in allowed:
        return f"; did you mean '{_SYNONYMS[name]}'?"
    for outer, hint in allowed.items():  # is it a setting of nested options?
        nested = nested_options(hint)
        if nested is not None and name in argument_types(nested):
            return f"; did you mean {outer}={{'{name}': ...}}?"
    return nearest_name(name, allowed)
