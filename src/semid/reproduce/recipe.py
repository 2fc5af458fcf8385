"""What a reproduction runs: recipes in TOML, read into checked options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semid.data.interactions import TIES
from semid.documents import read_toml, record
from semid.errors import UsageError, check_choice
from semid.options import Options, option
from semid.recommenders.ranking import MODELS
from semid.recommenders.retrieval import MODELS as RETRIEVERS
from semid.registry import find_recipe
from semid.reproduce import METHODS
from semid.tokenizers.factory import TOKENIZERS

PLAIN_RQVAE = "plain-rqvae"
_REVISION = "Raised when code changes what a run computes; runs of another revision do not count."


@dataclass(frozen=True, kw_only=True)
class DataSet(Options):
    """Where items and interactions come from: a folder, or a synthetic catalogue."""

    name: str = option(help="Name in tables.")
    folder: str = option(
        "",
        help="Folder below --data with items.parquet, interactions.parquet and embeddings.f16.npy "
        "or embeddings.npy.",
    )
    codebook_size: int = option(256, help="Codewords per level.")
    seeds: int = option(0, ge=0, help="Number of seeds; 0 takes the recipe's.")
    logs: tuple[str, ...] = option(
        (),
        help="Folders below --data whose interactions join on the item id, where the data set has "
        "none of its own; retrieval and AUCs are then on the items of these logs.",
    )
    ties: str = option(
        "file", choices=TIES, help="Order of interactions of one time, in fits and in figures."
    )
    relations: bool = option(
        False, help="Whether pairs of relations.parquet in the folder are measured beside the log."
    )
    label: str = option("sampled(uniform,1)", help="What a click is, see RankingDataConfig.")
    item_columns: tuple[str, ...] | None = option(
        None, help="Columns of the items with one value; None takes 'brand' if it is there."
    )
    synthetic: int = option(0, ge=0, help="Items of a synthetic catalogue; 0 reads the folder.")

    @property
    def later_options(self) -> dict[str, Any]:
        """Options that came after committed runs, whose keys their defaults must not change."""
        defaults = {"ties": "file", "relations": False}
        values = {name: getattr(self, name) for name in defaults}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def _problems(self) -> list[str]:
        problems = []
        if bool(self.folder) == bool(self.synthetic):
            problems = ['needs folder = "..." or synthetic = ITEMS, one of them']
        if self.synthetic and self.relations:
            problems.append("is synthetic and has no relations")
        if self.logs and self.ties != "file":
            problems.append('joins logs by position: leave ties = "file"')
        return [f"data set '{self.name}' {problem}" for problem in problems]


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec(Options):
    """One row of the DRQ paper's tables."""

    name: str = option(help="Name in the paper.")
    kind: str = option(
        choices=[*sorted(TOKENIZERS), PLAIN_RQVAE],
        help="Name of a tokenizer; 'plain-rqvae' starts at random and returns the last epoch.",
    )
    options: Mapping[str, Any] = option(default_factory=dict, help="Further arguments.")
    variant: str = option("", help="Empty for the paper's row; else what differs, shown apart.")
    data: tuple[str, ...] = option((), help="Names of data sets; empty takes all.")
    behavior: bool = option(False, help="Whether it learns from interactions.")


@dataclass(frozen=True, kw_only=True)
class FittedSpec(TokenizerSpec):
    """A tokenizer, and how much of a log it learns from."""

    users: float = option(1.0, gt=0, le=1, help="Share of the training users it learns from.")


@dataclass(frozen=True, kw_only=True)
class DrqRecipe(Options):
    """Tables 1 to 5 of the DRQ paper, or other views of the same tokenizers."""

    paper: str = option(help="drq or behavior.")
    revision: int = option(1, help=_REVISION)
    quick: bool = option(False, help="Whether this is a toy that must never be quoted.")
    seeds: int = option(3, ge=1, help="Number of seeds; a tokenizer is fitted for each.")
    levels: int = option(3, ge=1, help="Codes per item.")
    geometry_sample: int = option(20_000, ge=1, help="Items whose spectra are taken.")
    flip_sample: int = option(5_000, ge=1, help="Items whose flips are counted.")
    replicates: int = option(1000, ge=1, help="Bootstrap draws of users.")
    neural: Mapping[str, Any] = option(
        default_factory=dict,
        help="Options of every neural tokenizer (network, training), so that none has a wider "
        "latent or a longer training than another.",
    )
    behavior_head: bool = option(
        False,
        help="Whether every tokenizer also gets a decode head into the space of one contrastive "
        "encoder per data set and seed. It only adds figures to a run.",
    )
    tokenizers: tuple[FittedSpec, ...] = option((), help="Rows of the tables.")
    data: tuple[DataSet, ...] = option((), help="Data sets.")


@dataclass(frozen=True, kw_only=True)
class Variant(Options):
    """A protocol beside the main one, where the paper is silent."""

    name: str = option(help="Name in tables.")
    label: str = option("", help="Another label; empty keeps the data set's.")
    split: str = option("random", help="Another split.")
    width: int = option(0, ge=0, help="Width of an embedding; 0 takes the recipe's.")
    embedding_penalty: tuple[float, ...] = option(
        (), ge=0, help="Penalties of embeddings: each cell takes the best on validation rows."
    )
    training: Mapping[str, Any] = option(
        default_factory=dict, help="Training that differs from the recipe's."
    )


@dataclass(frozen=True, kw_only=True)
class Stage(Options):
    """A part of the grid; stages run in the recipe's order, the most informative first."""

    name: str = option(help="What it is for.")
    kind: str = option(
        "rank",
        choices=("rank", "kept"),
        help="'rank' trains ranking models; 'kept' rebuilds item embeddings from codes (fig. 1).",
    )
    models: tuple[str, ...] = option(
        (), choices=sorted(MODELS), help="Ranking models; none for 'kept'."
    )
    methods: tuple[str, ...] = option(
        (), choices=METHODS, help="Ranking methods; 'vqvae' is the one there is at 1x."
    )
    scales: tuple[int, ...] = option((7,), ge=1, help="M of the methods that have one.")
    fusion: tuple[bool, ...] = option((False, True), help="With, without, or both.")
    parts: tuple[str, ...] = option(
        (),
        choices=("alone", "first"),
        help="'alone': each level of the widest scale by itself (fig. 8a); 'first': its levels "
        "from the lowest up (fig. 8b); empty uses all levels.",
    )
    seeds: int = option(0, ge=0, help="Number of seeds; 0 takes the recipe's.")
    analyze: int = option(0, ge=0, help="Number of seeds with metrics of code embeddings.")
    data: tuple[str, ...] = option((), help="Names of data sets; empty takes all.")
    variant: str = option("", help="Name of a variant; empty is the main protocol.")


@dataclass(frozen=True, kw_only=True)
class MocRecipe(Options):
    """Tables 1 and 2 and the figures of the MoC paper."""

    paper: str = option(help="moc.")
    revision: int = option(1, help=_REVISION)
    quick: bool = option(False, help="Whether this is a toy that must never be quoted.")
    seeds: int = option(
        5, ge=1, help="Number of seeds of tokenizer, start and order; the split stays the same."
    )
    width: int = option(64, ge=1, help="Width of an embedding.")
    fusion_rank: int = option(16, ge=1, help="Rank of the fusion's bottleneck.")
    model: Mapping[str, Any] = option(
        default_factory=dict, help="Options of every ranking model, such as 'hidden'."
    )
    training: Mapping[str, Any] = option(
        default_factory=dict, help="Training of the ranking models, beside their defaults."
    )
    tokenizer: Mapping[str, Any] = option(default_factory=dict, help="Options of every tokenizer.")
    probe: Mapping[str, Any] = option(
        default_factory=dict, help="Training that rebuilds item embeddings (fig. 1)."
    )
    stages: tuple[Stage, ...] = option((), help="The grid.")
    variants: tuple[Variant, ...] = option((), help="Protocols beside the main one.")
    data: tuple[DataSet, ...] = option((), help="Data sets.")

    def _problems(self) -> list[str]:
        # A misspelled name is refused here, before the runs of hours begin.
        for stage in self.stages:
            if stage.variant:
                check_choice("stages.variant", stage.variant, [v.name for v in self.variants])
            for name in stage.data:
                check_choice("stages.data", name, [d.name for d in self.data])
        return []


@dataclass(frozen=True, kw_only=True)
class IdsSpec(TokenizerSpec):
    """Semantic IDs that next-item models read."""

    unique: str = option(
        "none",
        choices=("none", "append", "reassign"),
        help="What is done about items that share an id, as in 'semid unique'.",
    )


@dataclass(frozen=True, kw_only=True)
class RetrieverSpec(Options):
    """A next-item model."""

    name: str = option(help="Name in tables.")
    kind: str = option(choices=sorted(RETRIEVERS), help="Name of a model.")
    options: Mapping[str, Any] = option(default_factory=dict, help="Options of the model.")
    training: Mapping[str, Any] = option(
        default_factory=dict, help="Training that differs from the recipe's."
    )


@dataclass(frozen=True, kw_only=True)
class RetrievalStage(Options):
    """A part of the grid; stages run in the recipe's order, the most informative first."""

    models: tuple[str, ...] = option(help="Names of models.")
    ids: tuple[str, ...] = option((), help="Names of Semantic IDs; empty for models without.")
    ties: tuple[str, ...] = option(
        ("file", "shuffle"), choices=TIES, help="Orders of interactions of one time."
    )
    seeds: int = option(0, ge=0, help="Number of seeds; 0 takes the recipe's.")
    data: tuple[str, ...] = option((), help="Names of data sets; empty takes all.")


@dataclass(frozen=True, kw_only=True)
class RetrievalRecipe(Options):
    """Next-item models on the ids of several tokenizers."""

    paper: str = option(help="retrieval.")
    revision: int = option(1, help=_REVISION)
    quick: bool = option(False, help="Whether this is a toy that must never be quoted.")
    seeds: int = option(
        3, ge=1, help="Number of seeds of tokenizer, start and order; the split stays the same."
    )
    training: Mapping[str, Any] = option(
        default_factory=dict, help="Training of the models, beside their defaults."
    )
    ids: tuple[IdsSpec, ...] = option((), help="Semantic IDs.")
    models: tuple[RetrieverSpec, ...] = option((), help="Next-item models.")
    stages: tuple[RetrievalStage, ...] = option((), help="The grid.")
    data: tuple[DataSet, ...] = option((), help="Data sets.")

    def _problems(self) -> list[str]:
        _check_stages(self, ("models", "ids", "data"))
        return []


@dataclass(frozen=True, kw_only=True)
class CandidateSpec(TokenizerSpec):
    """Semantic IDs whose numbers are set beside what recommenders make of them."""

    control: str = option(
        "",
        choices=("", "random", "hash", "category", "shuffled"),
        help="Ids without meaning or without a fit: random codes, a hash of the item id, "
        "categories with random codes behind, or the tokenizer on embeddings of other items. The "
        "first three take levels and codebook_size of the options.",
    )
    refined: bool = option(False, help="Whether all levels are refined together after the fit.")


@dataclass(frozen=True, kw_only=True)
class RecommenderSpec(Options):
    """A next-item model or a ranking model with a fixed budget."""

    name: str = option(help="Name in tables.")
    kind: str = option(choices=[*sorted(RETRIEVERS), *sorted(MODELS)], help="Name of a model.")
    options: Mapping[str, Any] = option(default_factory=dict, help="Options of the model.")
    training: Mapping[str, Any] = option(default_factory=dict, help="Training, beside defaults.")
    unique: str = option(
        "append",
        choices=("none", "append"),
        help="What is done about items that share an id before a next-item model reads it.",
    )


@dataclass(frozen=True, kw_only=True)
class PredictStage(Options):
    """A part of the grid; stages run in the recipe's order."""

    models: tuple[str, ...] = option(help="Names of recommenders.")
    tokenizers: tuple[str, ...] = option((), help="Names of tokenizers; empty takes all.")
    seeds: int = option(0, ge=0, help="Number of seeds; 0 takes the recipe's.")
    data: tuple[str, ...] = option((), help="Names of data sets; empty takes all.")


@dataclass(frozen=True, kw_only=True)
class PredictRecipe(Options):
    """Numbers of Semantic IDs, and outcomes of recommenders that read them."""

    paper: str = option(help="predict.")
    revision: int = option(1, help=_REVISION)
    quick: bool = option(False, help="Whether this is a toy that must never be quoted.")
    seeds: int = option(3, ge=1, help="Number of seeds of tokenizer and recommender.")
    cold_items: float = option(
        0.05, ge=0, lt=1, help="Share of the items that no training history of next items holds."
    )
    geometry_sample: int = option(5_000, ge=1, help="Items whose spectra are taken.")
    flip_sample: int = option(2_000, ge=1, help="Items whose flips are counted.")
    neural: Mapping[str, Any] = option(
        default_factory=dict, help="Options of every neural tokenizer, so that all train alike."
    )
    tokenizers: tuple[CandidateSpec, ...] = option((), help="Tokenizers and controls.")
    models: tuple[RecommenderSpec, ...] = option((), help="Recommenders.")
    stages: tuple[PredictStage, ...] = option((), help="The grid.")
    data: tuple[DataSet, ...] = option((), help="Data sets.")

    def _problems(self) -> list[str]:
        _check_stages(self, ("models", "tokenizers", "data"))
        return []


def _check_stages(recipe: Any, parts: tuple[str, ...]) -> None:
    """Refuse a misspelled name before the runs of hours begin."""
    for stage in recipe.stages:
        for what in parts:
            known = [each.name for each in getattr(recipe, what)]
            for name in getattr(stage, what):
                check_choice(f"stages.{what}", name, known)


Recipe = DrqRecipe | MocRecipe | RetrievalRecipe | PredictRecipe
RECIPES: dict[str, type[Recipe]] = {
    "drq": DrqRecipe,
    "behavior": DrqRecipe,
    "moc": MocRecipe,
    "retrieval": RetrievalRecipe,
    "predict": PredictRecipe,
}


def read_experiment(name: str | Path) -> Recipe:
    """Read a recipe."""
    file = find_recipe(name, "reproduce/recipes", flag="recipe")
    where = f"recipe '{name}'"
    values = read_toml(file, where=where, error=UsageError, advice="correct the file")
    paper = check_choice(f"paper of {where}", str(values.get("paper")), sorted(RECIPES))
    recipe: Recipe = record(RECIPES[paper], values, where, error=UsageError)
    return recipe
