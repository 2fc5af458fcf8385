"""Registries: names of things that are imported when they are used, also from other packages.

A package outside semid adds a tokenizer, a ranking model or an export format by an entry point of
the groups ``semid.tokenizers``, ``semid.recommenders`` and ``semid.exports``::

    [project.entry-points."semid.tokenizers"]
    mine = "my_package.tokenizer:MyTokenizer"
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from semid.errors import MissingExtraError, UsageError, brief, check_choice, nearest_name


class Registry:
    """Objects by name, those of semid and those of a group of entry points.

    ``targets`` maps names, which no entry point can take, to ``module:attribute`` or to objects.
    """

    def __init__(self, group: str, targets: Mapping[str, Any]) -> None:
        self.group = group
        self.targets = dict(targets)

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted({*self.targets, *(each.name for each in self._entry_points())})

    def check(self, name: str, *, flag: str = "name") -> None:
        """Refuse a name that is not registered, importing nothing; ``flag`` as for `load`."""
        # Entry points are looked up only for names that are not semid's own: this takes a while.
        if name not in self.targets:
            check_choice(flag, name, self.names())

    def load(self, name: str, *, flag: str = "name") -> Any:
        """Return the object of a name; ``flag`` is what errors call the argument that held it."""
        self.check(name, flag=flag)
        if name in self.targets:
            target = self.targets[name]
            return import_target(target) if isinstance(target, str) else target
        (point, *_) = [each for each in self._entry_points() if each.name == name]
        try:
            return point.load()
        except MissingExtraError:
            raise
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"the entry point {name} = {point.value} of {self.group} cannot be imported "
                f"({brief(error)}); install its package again, or remove it"
            ) from error

    def __getitem__(self, name: str) -> Any:
        """Return the object of a name, as `load`."""
        return self.load(name)

    def _entry_points(self) -> metadata.EntryPoints:
        return metadata.entry_points(group=self.group)

    def __contains__(self, name: object) -> bool:
        """Whether a name is registered."""
        return name in self.targets or any(each.name == name for each in self._entry_points())

    def __iter__(self) -> Iterator[str]:
        """Iterate over all names, sorted."""
        return iter(self.names())


def import_target(target: str) -> Any:
    """Return the attribute that ``module:attribute`` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def recipe_names(folder: str) -> list[str]:
    """Return the names of the recipes (TOML files) in a folder of the semid package."""
    files = resources.files("semid").joinpath(folder).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def find_recipe(name: str | Path, folder: str, *, flag: str) -> Any:
    """Return the file of a recipe: a name in a folder of the semid package, or a path."""
    names = recipe_names(folder)
    if str(name) in names:
        return resources.files("semid").joinpath(folder, f"{name}.toml")
    if not Path(name).is_file():
        raise UsageError(
            f"{flag} '{name}' is neither a file nor one of {', '.join(names)}"
            f"{nearest_name(str(name), names)}"
        )
    return Path(name)
