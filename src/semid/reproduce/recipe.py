"""What a reproduction runs: recipes in TOML, read into frozen records that know their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semid.documents import read_toml, record
from semid.errors import UsageError, check_choice
from semid.recommenders.ranking.models import MODELS
from semid.registry import find_recipe
from semid.reproduce.ranking_grid import METHODS
from semid.tokenizers.factory import TOKENIZERS

__all__ = [
    "DataSet",
    "DrqRecipe",
    "MocRecipe",
    "Stage",
    "TokenizerSpec",
    "Variant",
    "read_experiment",
]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Where items and interactions come from.

    Attributes:
        name: what tables call it.
        folder: below ``--data``, with ``items.parquet``, ``interactions.parquet`` and
            ``embeddings.f16.npy`` or ``embeddings.npy``; empty for a synthetic catalogue.
        codebook_size: codewords a level.
        seeds: seeds 0 to this number; 0 takes the recipe's.
        logs: folders below ``--data`` whose interactions join on the item id, where the data set
            has none of its own; retrieval and AUCs are then on the items of these logs.
        label: what a click is, as `semid.recommenders.ranking.data.RankingDataConfig` has it.
        item_columns: columns of the items with one value; None takes ``brand`` if it is there.
        synthetic: items of a synthetic catalogue that is made instead; 0 reads ``folder``.
    """

    name: str
    folder: str = ""
    codebook_size: int = 256
    seeds: int = 0
    logs: tuple[str, ...] = ()
    label: str = "sampled(uniform,1)"
    item_columns: tuple[str, ...] | None = None
    synthetic: int = 0

    def __post_init__(self) -> None:
        """Check that there is one origin.

        Raises:
            UsageError: neither or both of ``folder`` and ``synthetic``.
        """
        if bool(self.folder) == bool(self.synthetic):
            raise UsageError(
                f"data set '{self.name}' needs folder = \"...\" or synthetic = ITEMS, one of them"
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """One row of the DRQ paper's tables.

    Attributes:
        name: the paper's name.
        kind: key of `semid.tokenizers.factory.TOKENIZERS`.
        options: further arguments of its class.
        variant: empty for the paper's row; else what was chosen otherwise, shown apart.
        data: names of data sets; empty takes all.
        behavior: whether it learns from interactions.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    data: tuple[str, ...] = ()
    behavior: bool = False

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            UsageError: no such tokenizer.
        """
        check_choice("tokenizers.kind", self.kind, sorted(TOKENIZERS))


@dataclass(frozen=True, kw_only=True)
class DrqRecipe:
    """Tables 1 to 5 of the DRQ paper.

    Attributes:
        paper: ``drq``.
        revision: raised when code changes what a run computes; runs of another one do not count.
        quick: whether this is a toy that must never be quoted.
        seeds: seeds 0 to this number; a tokenizer is fitted anew for each.
        levels: codes an item.
        geometry_sample: items whose spectra are taken.
        flip_sample: items whose flips are counted.
        replicates: bootstrap draws of users.
        neural: options of every neural tokenizer (``network``, ``training``), so that none has a
            wider latent or a longer training than another.
        tokenizers: the rows.
        data: the data sets.
    """

    paper: str
    revision: int = 1
    quick: bool = False
    seeds: int = 3
    levels: int = 3
    geometry_sample: int = 20_000
    flip_sample: int = 5_000
    replicates: int = 1000
    neural: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: tuple[TokenizerSpec, ...] = ()
    data: tuple[DataSet, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A protocol beside the main one, where the paper is silent.

    Attributes:
        name: what tables call it.
        label: another label; empty keeps the data set's.
        split: another split.
    """

    name: str
    label: str = ""
    split: str = "random"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the grid; stages run in the recipe's order, the most informative first.

    Attributes:
        name: what it is for.
        kind: ``rank`` trains ranking models; ``kept`` rebuilds item embeddings from codes (fig. 1).
        models: ranking models; none for ``kept``.
        methods: of `METHODS` of the ranking methods; ``vqvae`` is the one method there is at 1x.
        scales: M of the methods that have one.
        fusion: with, without, or both.
        parts: ``alone``: each level of the widest scale by itself (fig. 8a); ``first``: its
            levels from the lowest up (fig. 8b). Empty uses all levels.
        seeds: seeds 0 to this number; 0 takes the recipe's.
        analyze: seeds below this also keep the paper's metrics of code embeddings.
        data: names of data sets; empty takes all.
        variant: name of a `Variant`; empty is the main protocol.
    """

    name: str
    kind: str = "rank"
    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    scales: tuple[int, ...] = (7,)
    fusion: tuple[bool, ...] = (False, True)
    parts: tuple[str, ...] = ()
    seeds: int = 0
    analyze: int = 0
    data: tuple[str, ...] = ()
    variant: str = ""

    def __post_init__(self) -> None:
        """Check choices.

        Raises:
            UsageError: an unknown kind, model, method or part.
        """
        check_choice("stages.kind", self.kind, ("rank", "kept"))
        for name in self.models:
            check_choice("stages.models", name, sorted(MODELS))
        for name in self.methods:
            check_choice("stages.methods", name, METHODS)
        for name in self.parts:
            check_choice("stages.parts", name, ("alone", "first"))


@dataclass(frozen=True, kw_only=True)
class MocRecipe:
    """Tables 1 and 2 and the figures of the MoC paper.

    Attributes:
        paper: ``moc``.
        revision: raised when code changes what a run computes; runs of another one do not count.
        quick: whether this is a toy that must never be quoted.
        seeds: seeds 0 to this number; tokenizer, start and order follow the seed, the split does
            not.
        width: of an embedding.
        fusion_rank: of the fusion's bottleneck.
        model: options of every ranking model, such as ``hidden``.
        training: of the ranking models, beside `semid.recommenders.ranking.training.TRAINING`.
        tokenizer: options of every tokenizer.
        kept: training options of the embeddings' rebuilding (fig. 1).
        stages: the grid.
        variants: protocols beside the main one.
        data: the data sets.
    """

    paper: str
    revision: int = 1
    quick: bool = False
    seeds: int = 5
    width: int = 64
    fusion_rank: int = 16
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    variants: tuple[Variant, ...] = ()
    data: tuple[DataSet, ...] = ()

    def __post_init__(self) -> None:
        """Check that stages name what there is.

        Raises:
            UsageError: an unknown variant or data set.
        """
        for stage in self.stages:
            if stage.variant:
                check_choice("stages.variant", stage.variant, [v.name for v in self.variants])
            for name in stage.data:
                check_choice("stages.data", name, [d.name for d in self.data])


RECIPES: dict[str, type[DrqRecipe] | type[MocRecipe]] = {"drq": DrqRecipe, "moc": MocRecipe}


def read_experiment(name: str | Path) -> DrqRecipe | MocRecipe:
    """Read a recipe.

    Args:
        name: one that comes with semid (``drq``, ``moc``, ``drq-quick``, ``moc-quick``), or a
            TOML file.

    Raises:
        UsageError: no such recipe, no TOML, or a key or value that is not allowed.
    """
    file = find_recipe(name, "reproduce/recipes", flag="recipe")
    where = f"recipe '{name}'"
    values = read_toml(file, where=where, error=UsageError, advice="correct the file")
    paper = check_choice(f"paper of {where}", str(values.get("paper")), sorted(RECIPES))
    recipe: DrqRecipe | MocRecipe = record(RECIPES[paper], values, where, error=UsageError)
    return recipe
