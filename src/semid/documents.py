"""The type checker, JSON and TOML from outside, and names of the user's data in Markdown.

Whatever is wrong with such a file becomes one sentence that names the place: bytes that are not
UTF-8, nesting without end, numbers that are not finite, keys that occur twice, are missing or
unknown, and values of another type.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
import json
import math
import numbers
import os
import re
import reprlib
import tomllib
import types
import typing
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from semid.errors import ArtefactError, SemidError, nearest_name

Record = TypeVar("Record")

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

COPY_AGAIN = "copy or write it again"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | os.PathLike[str], *, advice: str = COPY_AGAIN) -> Any:
    """Return the document of a JSON file; what is wrong with it is an ArtefactError."""
    return parse_json(_read(path, ArtefactError, advice), where=f"'{path}'", advice=advice)


def parse_json(
    text: bytes | str,
    *,
    where: str,
    error: type[SemidError] = ArtefactError,
    advice: str = COPY_AGAIN,
) -> Any:
    """Return a JSON document; ``where`` is its name in the message, the others as `read_json`."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        document = _DECODER.decode(text)
        if SURROGATE.search(text):  # half a character, which can be neither printed nor written
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as failure:
        raise error(f"{where} is not valid JSON ({_reason(failure)}); {advice}") from None
    return document


def read_toml(path: Any, *, where: str, error: type[SemidError], advice: str) -> dict[str, Any]:
    """Return the tables of a TOML file (a path or a resource of a package); as `parse_json`."""
    try:
        return tomllib.loads(_read(path, error, advice).decode("utf8"))
    except (ValueError, RecursionError) as failure:
        raise error(f"{where} is not valid TOML: {_reason(failure)}; {advice}") from None


def checksum(document: Any) -> str:
    """Return the SHA-256 of a JSON document, whatever the order and layout of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@functools.cache
def type_hints(kind: Any) -> dict[str, Any]:
    """Return the annotations of a class as types; they are worked out once."""
    return typing.get_type_hints(kind)


def record(
    kind: type[Record], values: Any, where: str, *, error: type[SemidError] = ArtefactError
) -> Record:
    """Make a dataclass of a document's table, refusing keys and values it does not have."""
    # Fields without a default have to be in the document.
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    required = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    hints = type_hints(kind)  # type: ignore[arg-type]
    known = {f.name: hints[f.name] for f in fields}
    stored_values = getattr(kind, "stored_values", None)  # results written under other names
    if stored_values is not None and isinstance(values, Mapping):
        values = stored_values(values)
    return kind(**checked(known, values, where, required=required, error=error))


def checked(
    known: Mapping[str, Any],
    values: Any,
    where: str,
    *,
    required: Collection[str] = (),
    error: type[SemidError] = ArtefactError,
) -> dict[str, Any]:
    """Return a table whose keys are known and whose values have their types."""
    if not isinstance(values, Mapping):
        raise error(f"{where} is {_shown(values)}; give a table of names and values")
    # Keys before values: a misspelled key explains the one that seems to be missing.
    for key in values:
        if key not in known:
            name = _shorten(str(key))
            raise error(
                f"{where} has no key '{name}'; its keys are {', '.join(known)}"
                f"{nearest_name(name, list(known))}"
            )
    missing = [name for name in required if name not in values]
    if missing:
        raise error(f"{where} does not say {', '.join(missing)}; add it")
    return {
        key: typed(known[key], value, f"{where}, {key}", error=error)
        for key, value in values.items()
    }


def typed(kind: Any, value: Any, where: str, *, error: type[SemidError] = ArtefactError) -> Any:
    """Return a document's value as an annotation has it."""
    branches = [b for b in alternatives(kind) if _fits(b, value)]
    if not branches:
        raise error(f"{where} is {_shown(value)}; give {described(_document_type(kind))}")
    # A table is checked by the dataclass where there is one.
    branch = next((b for b in branches if dataclasses.is_dataclass(b)), branches[0])
    inner = typing.get_args(branch)
    base = typing.get_origin(branch) or branch
    if dataclasses.is_dataclass(base) and isinstance(value, Mapping):
        return record(typing.cast("type[Any]", base), value, where, error=error)
    if base is float:
        return float(value)
    # A tuple of a fixed length has a type per place, other lists have one for all.
    if base in (list, tuple, Sequence) and inner:
        if base is tuple and inner[-1] is not Ellipsis:
            if len(inner) != len(value):
                raise error(f"{where} is {_shown(value)}; give {len(inner)} values")
            each: Sequence[Any] = inner
        else:
            each = [inner[0]] * len(value)
        items = [
            typed(k, one, f"{where}[{n}]", error=error)
            for n, (k, one) in enumerate(zip(each, value, strict=True))
        ]
        return tuple(items) if base is tuple else items
    if base in (dict, Mapping) and inner:
        as_key = int if inner[0] is int else str  # JSON has no keys but strings
        return {
            as_key(key): typed(inner[1], one, f"{where}, {key}", error=error)
            for key, one in value.items()
        }
    return value


def _fits(kind: Any, value: Any) -> bool:
    """Whether a document's value is of a type, leaving aside what lies inside it."""
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping | typing.cast("type[Any]", kind))
    # A document may write 1 for 1.0, but neither NaN nor infinity.
    if kind is not float or not fits(value, float):
        return fits(value, kind, inside=False)
    if isinstance(value, numbers.Integral):
        return fits(value, int)
    return math.isfinite(value)


def _document_type(kind: Any) -> Any:
    """Return a type as documents write it: a dataclass is a table."""
    members = tuple(Mapping if dataclasses.is_dataclass(b) else b for b in alternatives(kind))
    return typing.Union[members]  # noqa: UP007 - of a tuple


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def fits(value: Any, hint: Any, *, inside: bool = True) -> bool:
    """Whether a value is of the hinted type; hints that cannot be checked fit everything."""
    # numpy's numbers and arrays count as Python's, whole numbers have 64 bits, as in files;
    # ``inside`` checks what a sequence holds too.
    options = alternatives(hint)
    if len(options) > 1:
        return any(fits(value, each, inside=inside) for each in options)
    base = typing.get_origin(hint) or hint
    is_bool = isinstance(value, bool | np.bool_)
    if base is bool:
        return is_bool
    if base is int:
        whole = isinstance(value, numbers.Integral) and not is_bool
        return whole and -(2**63) <= int(value) < 2**64
    if base is float:
        return isinstance(value, numbers.Real) and not is_bool
    if base is None:
        return value is None
    if base in (list, tuple, Sequence):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
            return False
        inner = [each for each in typing.get_args(hint) if each is not Ellipsis]
        return not (inside and inner) or all(
            any(fits(each, kind) for kind in inner) for each in value
        )
    if base is dict:
        return isinstance(value, Mapping)
    checkable = isinstance(base, type) and not getattr(base, "_is_protocol", False)
    return isinstance(value, base) if checkable and base is not Any else True


def described(hint: Any) -> str:
    """Return what values a type hint allows, as the object of "give"."""
    words: list[str] = []
    for each in alternatives(hint):
        base, inner = typing.get_origin(each) or each, typing.get_args(each)
        if each in _NOUNS:
            words.append(_NOUNS[each])
        elif base in (list, tuple, Sequence):
            words.append(f"a list of {_PLURALS.get(inner[0] if inner else None, 'values')}")
        elif base in (dict, Mapping):
            words.append("a mapping")
        else:
            words.append(getattr(each, "__name__", str(each)))
    return " or ".join(dict.fromkeys(words))


def escaped(text: str) -> str:
    """Keep a text from ending its cell or becoming markup of its own."""
    flat = " ".join(text.split())
    for character in "\\|<>`*_[]":
        flat = flat.replace(character, "\\" + character)
    return flat


def html_table(title: str, rows: Sequence[Sequence[Any]]) -> str:
    """Return a title and rows as the HTML that a notebook shows for an object."""
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<p>{html.escape(title)}</p><table>{body}</table>"


def code_span(text: str) -> str:
    """Return a text as inline code, fenced by more backticks than it holds in a row."""
    flat = " ".join(text.split())
    longest = max((len(run) for run in re.findall("`+", flat)), default=0)
    fence = "`" * (longest + 1)
    inner = f" {flat} " if flat.startswith("`") or flat.endswith("`") else flat
    return f"{fence}{inner}{fence}"


def _shown(value: Any) -> str:
    return _shorten(reprlib.repr(value))


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read(path: Any, error: type[SemidError], advice: str) -> bytes:
    try:
        data: bytes = (Path(path) if isinstance(path, str) else path).read_bytes()
    except OSError as failure:
        raise error(f"'{path}' cannot be read ({failure.strerror or failure}); {advice}") from None
    return data


def _reason(failure: Exception) -> str:
    if isinstance(failure, RecursionError):
        return "it is nested too deeply"
    if isinstance(failure, UnicodeDecodeError):
        return f"byte {failure.start} is not UTF-8"
    if isinstance(failure, UnicodeEncodeError):
        return "it holds half a surrogate pair, which is no character"
    return str(failure)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key '{_shorten(twice)}' occurs twice")
    return table


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_refuse_constant
)
