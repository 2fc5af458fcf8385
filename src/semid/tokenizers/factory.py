"""Make a tokenizer from plain values: a recipe (TOML) and what flags change in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semid.documents import read_toml
from semid.errors import UsageError, nearest_name
from semid.options import argument_types
from semid.registry import Registry, find_recipe
from semid.tokenizers.base import Tokenizer

TOKENIZERS = Registry(
    "semid.tokenizers",
    {
        "barq": "semid.tokenizers.barq:BARQ",
        "codebooks": "semid.tokenizers.from_arrays:Codebooks",
        "drqvae": "semid.tokenizers.drqvae:DRQVAE",
        "fsq": "semid.tokenizers.fsq:FSQ",
        "mocvae": "semid.tokenizers.vqvae:MoCVAE",
        "opq": "semid.tokenizers.product:OPQ",
        "pipeline": "semid.tokenizers.pipeline:Pipeline",
        "pq": "semid.tokenizers.product:PQ",
        "rqgmm": "semid.tokenizers.rqgmm:RQGMM",
        "rqkmeans": "semid.tokenizers.rqkmeans:RQKMeans",
        "rqpvae": "semid.tokenizers.vqvae:RQPVAE",
        "rqvae": "semid.tokenizers.vqvae:RQVAE",
        "vqvae": "semid.tokenizers.vqvae:VQVAE",
    },
)

RECIPES = "recipes"
"""Folder of the recipes that come with semid."""


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Read a recipe: ``tokenizer = "..."`` and the arguments of its class.

    Returns the recipe's keys and values; tables such as ``[training]`` are dictionaries.
    """
    file = find_recipe(name, RECIPES, flag="--recipe")
    recipe = read_toml(file, where=f"recipe '{name}'", error=UsageError, advice="correct the file")
    if not isinstance(recipe.get("tokenizer"), str):
        raise UsageError(f"recipe '{name}' does not say tokenizer = \"...\"; add that line")
    return recipe


def make_tokenizer(
    kind: str, values: Mapping[str, Any], *, threads: int | None = None, logger: Any = None
) -> Tokenizer:
    """Make a tokenizer by name."""
    tokenizer_class = TOKENIZERS.load(kind, flag="--tokenizer")
    names = set(argument_types(tokenizer_class))
    allowed = names - {"threads", "logger"}  # these are not settings
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key == "levels" and "n_codebooks" in allowed:
            key = "n_codebooks"
        # "training.epochs" is an option inside nested options.
        outer, _, inner = key.partition(".")
        if outer not in allowed:
            flag = "--" + (inner or outer).replace("_", "-")
            raise UsageError(
                f"{flag} ({key}) does not apply to {kind}; its options are "
                f"{', '.join(sorted(allowed))}"
                f"{nearest_name(outer, sorted(allowed))}"
            )
        if inner:
            table = arguments.setdefault(outer, {})
            if not isinstance(table, dict):
                raise UsageError(f"{outer} is {table!r} and {key} is given too; give one of them")
            table[inner] = value
        elif isinstance(value, Mapping):
            arguments[outer] = {**value, **arguments.get(outer, {})}
        elif outer in arguments:
            raise UsageError(f"{outer}.{next(iter(arguments[outer]))} is given, and {outer} too")
        else:
            arguments[outer] = value
    if "logger" in names:
        arguments["logger"] = logger
    tokenizer: Tokenizer = tokenizer_class(**arguments, threads=threads)
    return tokenizer
