"""An extension of griffe for the documentation site: arguments that come from option fields.

The site reads sources. `semid.options` adds the arguments to a docstring when a class is made, so
that they are not in the source.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

from semid.options import CheckedArguments


class GeneratedArguments(griffe.Extension):
    """Takes docstrings of options and tokenizers from the classes, and defaults of their fields."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Replace the docstring of a class whose arguments are declared as fields."""
        if cls.docstring is not None and any("dataclass" in str(d.value) for d in cls.decorators):
            actual: Any = griffe.dynamic_import(cls.path)
            if issubclass(actual, CheckedArguments):
                # The site has a column of its own for defaults.
                text = inspect.getdoc(actual) or ""
                cls.docstring.value = re.sub(r" \(default: .*\)$", "", text, flags=re.MULTILINE)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Show the default of a field instead of the call that declares it."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "option":
            default = call.arguments[0]
            attr.value = None if isinstance(default, griffe.ExprKeyword) else default
