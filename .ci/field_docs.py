"""An extension of griffe for the documentation site: what fields of dataclasses say of themselves.

The site reads sources. `semid.options` adds arguments to a docstring when a class is made, so that
they are not in the source, and fields of results are described by comments.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import griffe

from semid.options import CheckedArguments


class FieldDocs(griffe.Extension):
    """Takes docstrings of options from the classes, and of other fields from their comments."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Replace the docstring of a class whose arguments are declared as fields."""
        if cls.docstring is not None and any("dataclass" in str(d.value) for d in cls.decorators):
            actual: Any = griffe.dynamic_import(cls.path)
            if issubclass(actual, CheckedArguments):
                # The site has a column of its own for defaults.
                text = inspect.getdoc(actual) or ""
                cls.docstring.value = re.sub(r" \(default: .*\)$", "", text, flags=re.MULTILINE)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Show the default of a field instead of its declaration, and the comment on it."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "option":
            default = call.arguments[0]
            attr.value = None if isinstance(default, griffe.ExprKeyword) else default
        elif attr.docstring is None and attr.annotation and attr.parent and attr.parent.is_class:
            comment = _comment_on(attr)
            attr.docstring = griffe.Docstring(f"{comment}.", parent=attr) if comment else None


def _comment_on(attr: griffe.Attribute) -> str:
    """Return the comment behind a field, else the lines of comment above it."""
    first, last = attr.lineno or 0, attr.endlineno or 0
    lines = Path(str(attr.filepath)).read_text(encoding="utf8").splitlines()
    if match := re.search(r"  # (.+)$", lines[last - 1]):
        return match[1]
    above: list[str] = []
    while match := re.match(r"    # (.+)$", lines[first - 2 - len(above)]):
        above.insert(0, match[1])
    return " ".join(above)
