"""The ranking models, from field embeddings to a logit, and the table of their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from semid.options import MAX_WIDTH, Options, option
from semid.recommenders.ranking import MODELS
from semid.recommenders.ranking.layers import (
    ATTENTION_PRESETS,
    CrossLayer,
    ExpertCrossLayer,
    FactorizationMachine,
    FieldAttention,
    Perceptron,
    SymmetricPolynomials,
)

STRUCTURES = ("parallel", "stacked")

MAX_LAYERS = 128
"""Largest number of layers, heads and the like; the papers have three."""


@dataclass(frozen=True, kw_only=True)
class DeepFMOptions(Options):
    """Options of `DeepFM`; those of the perceptron that every model has."""

    hidden: tuple[int, ...] = option(
        (400, 400),
        ge=1,
        le=MAX_WIDTH,
        name="--hidden",
        help="Widths of the perceptron's hidden layers.",
    )
    batch_norm: bool = option(True, help="Batch normalization in the perceptron.")
    dropout: float = option(
        0.2, ge=0, lt=1, name="--dropout", help="Dropout rate of the perceptron."
    )

    def _problems(self) -> list[str]:
        if len(self.hidden) > MAX_LAYERS:
            return [f"hidden= has {len(self.hidden)} layers: give at most {MAX_LAYERS}"]
        return []


@dataclass(frozen=True, kw_only=True)
class DeepIMOptions(DeepFMOptions):
    """Options of `DeepIM`."""

    order: int = option(
        3, ge=1, le=MAX_LAYERS, help="Largest number of fields in a product of embeddings."
    )
    polynomial_norm: bool = option(True, help="Batch normalization of the polynomials.")


@dataclass(frozen=True, kw_only=True)
class AutoIntOptions(DeepFMOptions):
    """Options of `AutoInt`; None follows the preset."""

    layers: int = option(3, ge=1, le=MAX_LAYERS, help="Attention layers.")
    heads: int = option(2, ge=1, le=MAX_LAYERS, help="Attention heads per layer.")
    head_width: int = option(32, ge=1, le=MAX_WIDTH, help="Width of each attention head.")
    preset: str = option(
        "authors",
        choices=ATTENTION_PRESETS,
        help="Attention as in the authors' code or as the paper prints it.",
    )
    relu_projections: bool | None = option(None, help="ReLU on the projections of the attention.")
    layer_norm: bool | None = option(None, help="Layer normalization after the attention.")
    scale: bool = option(True, help="Divide attention scores by the square root of the width.")
    residual: bool = option(True, help="Residual map of the attention layers.")
    plus: bool = option(True, help="Perceptron in parallel (AutoInt+).")


@dataclass(frozen=True, kw_only=True)
class DCNv2Options(DeepFMOptions):
    """Options of `DCNv2`."""

    layers: int = option(3, ge=1, le=MAX_LAYERS, help="Cross layers.")
    rank: int | None = option(
        None, ge=1, le=MAX_WIDTH, help="Rank of the cross matrices; full by default."
    )
    experts: int = option(
        1, ge=1, le=MAX_LAYERS, help="Low-rank experts per layer; above 1 a rank is needed."
    )
    structure: str = option(
        "parallel",
        choices=STRUCTURES,
        help="Perceptron in parallel to the cross layers or stacked on them.",
    )

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.experts > 1 and self.rank is None:
            problems.append(f"experts={self.experts} are low-rank: give a rank too")
        return problems


class Model(nn.Module):
    """Base of the models, also of those of other packages.

    ``model(e, first)`` returns logits ``(batch,)``.

    ``e`` are field embeddings ``(batch, fields, width)``; ``first`` are first-order weights
    ``(batch, fields)`` for models that read them, else None.

    Attributes:
        options: class of the model's options.
        first_order: whether the model reads a weight per field from tables of width 1.
    """

    options: ClassVar[type[Options]]
    first_order: ClassVar[bool] = False

    def __init__(self, fields: int, width: int, options: Any) -> None:
        super().__init__()


def _perceptron(width: int, options: DeepFMOptions, *, out: int | None = 1) -> Perceptron:
    return Perceptron(
        width, options.hidden, out=out, batch_norm=options.batch_norm, dropout=options.dropout
    )


class DeepFM(Model):
    """``b + sum_f w_f + 1/2 sum_d [(sum_f e_fd)^2 - sum_f e_fd^2] + MLP(concat e)``.

    The hidden widths 400-400 are ours: the MoC paper prints none.

    Source: Guo et al., IJCAI 2017 (arXiv 1703.04247), eq. 1 to 4.
    """

    options = DeepFMOptions
    first_order = True

    def __init__(self, fields: int, width: int, options: DeepFMOptions) -> None:
        super().__init__(fields, width, options)
        self.bias = nn.Parameter(torch.zeros(()))
        self.fm = FactorizationMachine()
        self.deep = _perceptron(fields * width, options)

    def forward(self, e: Tensor, first: Tensor | None = None) -> Tensor:
        """Return logits ``(batch,)``; ``first`` is ``(batch, fields)``."""
        logits: Tensor = self.bias + self.fm(e) + self.deep(e.flatten(1))[:, 0]
        return logits if first is None else logits + first.sum(1)


class DeepIM(Model):
    """``Linear([e_1; ...; e_K]) + MLP(concat e)``, e_k the k-th symmetric polynomial.

    Source: Yu et al., CIKM 2020.
    """

    options = DeepIMOptions

    def __init__(self, fields: int, width: int, options: DeepIMOptions) -> None:
        super().__init__(fields, width, options)
        # A linear map weighs the products of each order; the perceptron reads the embeddings.
        self.polynomials = SymmetricPolynomials(
            width, order=options.order, batch_norm=options.polynomial_norm
        )
        self.linear = nn.Linear(options.order * width, 1)
        self.deep = _perceptron(fields * width, options)

    def forward(self, e: Tensor, first: Tensor | None = None) -> Tensor:
        """Return logits ``(batch,)``; ``first`` is not read."""
        logits: Tensor = self.linear(self.polynomials(e)) + self.deep(e.flatten(1))
        return logits[:, 0]


class AutoInt(Model):
    """Layers of `FieldAttention`, flattened into a linear map, plus a parallel perceptron.

    Source: Song et al., CIKM 2019 (arXiv 1810.11921).
    """

    options = AutoIntOptions

    def __init__(self, fields: int, width: int, options: AutoIntOptions) -> None:
        super().__init__(fields, width, options)
        # Each layer reads what the one before returns: heads * head_width per field.
        ours = {f.name for f in dataclasses.fields(DeepFMOptions)} | {"layers", "plus"}
        attention = {name: value for name, value in vars(options).items() if name not in ours}
        out = options.heads * options.head_width
        self.attention = nn.Sequential(
            *(FieldAttention(out if n else width, **attention) for n in range(options.layers))
        )
        self.linear = nn.Linear(fields * out, 1)
        self.deep = _perceptron(fields * width, options) if options.plus else None

    def forward(self, e: Tensor, first: Tensor | None = None) -> Tensor:
        """Return logits ``(batch,)``; ``first`` is not read."""
        logits: Tensor = self.linear(self.attention(e).flatten(1))[:, 0]
        return logits if self.deep is None else logits + self.deep(e.flatten(1))[:, 0]


class DCNv2(Model):
    """Cross layers ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l`` and a perceptron.

    In parallel, both read the embeddings and a linear map reads both; stacked, the perceptron
    reads the crosses.

    Source: Wang et al., WWW 2021 (arXiv 2008.13535).
    """

    options = DCNv2Options

    def __init__(self, fields: int, width: int, options: DCNv2Options) -> None:
        super().__init__(fields, width, options)
        self.parallel = options.structure == "parallel"
        size = fields * width
        rank, experts = options.rank, options.experts
        self.cross = nn.ModuleList(
            CrossLayer(size, rank=rank)
            if rank is None or experts == 1
            else ExpertCrossLayer(size, rank=rank, experts=experts)
            for _ in range(options.layers)
        )
        self.deep = _perceptron(size, options, out=None)
        self.linear = nn.Linear(self.deep.width + (size if self.parallel else 0), 1)

    def forward(self, e: Tensor, first: Tensor | None = None) -> Tensor:
        """Return logits ``(batch,)``; ``first`` is not read."""
        # Each cross layer multiplies by the input once more, so degrees rise by one.
        x0 = e.flatten(1)
        x = x0
        for layer in self.cross:
            x = layer(x0, x)
        x = torch.cat([x, self.deep(x0)], 1) if self.parallel else self.deep(x)
        logits: Tensor = self.linear(x)
        return logits[:, 0]


def make_model(
    name: str, *, fields: int, width: int, options: Mapping[str, Any] | None = None
) -> Model:
    """Return a new model; ``options`` by name are those of ``MODELS[name].options``."""
    kind: type[Model] = MODELS.load(name, flag="--model (model=)")
    return kind(fields, width, kind.options.of(options))
