"""BARQ: behavior-aware residual quantization, all levels refined together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import nn

from semid.errors import UsageError
from semid.options import MAX_BEAM, MAX_WEIGHT, option
from semid.quantization.blocks import (
    Blocks,
    first_columns,
    in_memory,
    map_rows,
    residuals,
)
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.least_squares import fit_tables
from semid.quantization.nearest import index_codebook
from semid.quantization.refine import (
    ColumnGroup,
    RefineOptions,
    add_penalties,
    balance_penalties,
    pad_columns,
    refine_residual,
)
from semid.quantization.residual import dequantize
from semid.seeds import child_seed
from semid.tokenizers.barq_choice import HALVINGS, WeightSearch, without_pairs
from semid.tokenizers.barq_head import train_tables
from semid.tokenizers.barq_space import (
    Blend,
    BlendGraph,
    Content,
    code_targets,
    encode_rows,
)
from semid.tokenizers.base import Weights
from semid.tokenizers.behavior import Behavior, TablePairs
from semid.tokenizers.codebooks import fit_levels
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import EncoderGraph, Prepare
from semid.tokenizers.neural.continuous import ContinuousTokenizer, Objective
from semid.tokenizers.neural.tokenizer import PreparedRows
from semid.tokenizers.stored import check_shapes
from semid.training.checkpoint import StateStore

Array = npt.NDArray[np.float32]

DEFAULT_LATENT = 64

STORED = {"content": "content", "behavior": "behaviour"}
"""Decoding tables -> names of their tensors in an artefact, part of the weights fingerprint."""


@dataclass(kw_only=True, eq=False, repr=False)
class BARQ(ContinuousTokenizer):
    """Behavior decides the first code, content the others, and all levels are fitted together.

    A contrastive encoder ``u`` of the embedding is trained on pairs. With ``P`` the leading
    principal components, level 1 clusters ``[P'x, s u(x)]``, deeper levels what level 1 leaves of
    ``P'x``; then beam encoding and ridge least squares of all codebooks take turns. Tables fitted
    to the codes decode them to whole embeddings and to behavior. Codes are a function of the
    embedding alone, so items without behavior are served like the others.

    With a ``behavior_weight`` of 0, `fit` takes no pairs. Otherwise users kept for selection decide
    between it, its half, its quarter and 0 (``check_behavior``, `semid.tokenizers.barq_choice`);
    with pairs instead of interactions it is taken as it is. A ``content_variance`` below 1 evens
    out usage and is faster. A ``latent`` of 0 in ``network`` takes 64.

    Raises:
        UsageError: if a value is out of range.

    Source: ours; `docs/barq.md` has the mathematics and what each part brings.
    """

    kind: ClassVar[str] = "barq"
    behavior_weights: ClassVar[tuple[str, ...]] = ("behavior_weight",)

    beam_width: int = option(
        8, ge=1, le=MAX_BEAM, help="Partial codes kept while encoding; 1 is greedy."
    )
    behavior_weight: float = option(
        2.0,
        ge=0,
        le=MAX_WEIGHT,
        help="Highest variance of behavior relative to that of content; 0 leaves behavior out.",
    )
    behavior_levels: int = option(1, ge=1, help="Number of levels that use behavior.")
    content_variance: float = option(
        0.95, gt=0, le=1,
        help="Share of the embeddings' variance in the components that are quantized; 1 quantizes "
        "embeddings whole.",
    )  # fmt: skip
    balance_strength: float = option(
        0.0, ge=0, le=MAX_WEIGHT,
        help="Highest penalty of a codeword in mean squared residuals; evens out usage.",
    )  # fmt: skip
    check_behavior: bool = option(
        True,
        help="Let users kept for selection choose the behavior weight: the highest one, its half, "
        "its quarter, or 0 if behavior finds no more next items than it costs content.",
    )
    objective: Objective | Mapping[str, Any] | None = option(
        None,
        nested={"contrastive_weight": 1.0, "pairs_per_step": 1024},
        help="Losses of the encoder beside reconstruction.",
    )
    refine: RefineOptions | Mapping[str, Any] | None = option(
        None, help="How codebooks are refined."
    )
    kmeans: KMeansOptions | Mapping[str, Any] | None = option(
        None, help="How K-means runs at each level."
    )

    def __post_init__(self) -> None:
        """Start without components and tables."""
        super().__post_init__()
        self._tables: dict[str, tuple[Array, ...]] = {}
        self._blend = self._new_blend(Content(threads=self.threads), 1.0)

    def _problems(self) -> list[str]:
        if self.behavior_levels > self.levels:
            return [f"behavior_levels={self.behavior_levels}: give 1 to levels={self.levels}"]
        return []

    def _objective(self) -> Objective:
        objective: Objective = self._resolved("objective")
        return objective

    def _latent_width(self, dim: int) -> int:
        return self._config.latent or DEFAULT_LATENT

    def _kernels(self) -> set[str]:
        return super()._kernels() | {"tables"}

    def _fit(self, context: FitContext) -> dict[str, Any]:
        details: dict[str, Any] = {"protocol": "no pairs"}
        weight = self.behavior_weight
        # 1. The behavior encoder u, trained on pairs; frozen from here on.
        if context.behavior is None:
            prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
            self._preprocess = prepared.preprocess
        else:
            prepared, details["training"] = self._train_autoencoder(context)
            details["protocol"] = context.behavior.train.protocol
        train = prepared.train.blocks
        held_out = None if prepared.held_out is None else prepared.held_out.blocks
        # 2. The space [P'x, s u(x)] in which codebooks are fitted.
        self._find_content(prepared, context)
        if context.behavior is not None:
            details["behavior"] = self._choose_weight(train, held_out, context)
            weight = details["behavior"]["weight"]
            if not weight:
                self._autoencoder = None
        # 3. K-means level by level, then all levels together: content over all of them, behavior
        # over the first.
        space, books, details["levels"] = self._fit_levels(train, weight, context)
        groups = self._refined_parts(train.dim)
        refine: RefineOptions = self._resolved("refine")
        progress = context.progress
        progress.start("refine", total=refine.most_rounds)
        books, rounds = refine_residual(
            space,
            books,
            held_out=None if held_out is None else self._space(held_out),
            groups=groups,
            options=refine,
            weights=context.weights,
            seed=child_seed(self.seed, "refine"),
            threads=self.threads,
            on_round=lambda done: progress.step(1, error=done.error, ridge=done.ridge),
        )
        # 4. Penalties come last, since refinement makes usage uneven again.
        if self.balance_strength:
            books = self._balanced(space, books, content=groups[0].columns.stop)
        details["refine"] = [asdict(each) for each in rounds]
        self._set_codebooks(books)
        # 5. Tables that decode the codes as they are now.
        return details | self._fit_tables(
            train, held_out, weights=context.weights, behavior=context.behavior
        )

    def _choose_weight(
        self, train: Blocks, held_out: Blocks | None, context: FitContext
    ) -> dict[str, Any]:
        """Return the weight of behavior, and what K-means with others gives, where it is tried."""
        behavior = context.behavior
        if behavior is None or not self.check_behavior or isinstance(behavior.train, TablePairs):
            return {"weight": self.behavior_weight}
        if behavior.select is None:
            return without_pairs()
        search = WeightSearch(behavior.select, len(train), seed=self.seed, threads=self.threads)
        for weight in (0.0, *(self.behavior_weight / 2**n for n in HALVINGS)):
            space, books, _ = self._fit_levels(train, weight, context)
            judged = space if held_out is None else self._space(held_out)
            content = self._blend.content.width(train.dim)
            if not search.add(weight, books, space, judged, content=content):
                break
        return search.choose()

    def _find_content(self, prepared: PreparedRows, context: FitContext) -> None:
        """Find the principal components that are quantized."""
        train = prepared.train.blocks

        def run(store: StateStore | None) -> tuple[dict[str, Array], dict[str, Any]]:
            share, threads = self.content_variance, self.threads
            content = Content.of(train, prepared.mean, share=share, threads=threads)
            return content.tensors(), {}

        arrays, _ = context.stage("components", run)
        self._blend = self._new_blend(Content(**arrays, threads=self.threads), 1.0)

    def _new_blend(self, content: Content, scale: float) -> Blend:
        encoder = None if self._autoencoder is None else self._encoder
        return Blend(content, encoder, scale, self.levels if self.balance_strength else 0)

    def _refined_parts(self, dim: int) -> list[ColumnGroup]:
        content = self._blend.content.width(dim)
        parts = [ColumnGroup(slice(0, content), self.levels)]
        if self._blend.encoder is not None:
            end = content + self._latent_width(dim)
            parts.append(ColumnGroup(slice(content, end), self.behavior_levels))
        return parts

    def _blended(self, blocks: Blocks) -> Blocks:
        """Return the blend of preprocessed rows, computed as it is read."""
        width = self._refined_parts(blocks.dim)[-1].columns.stop + self._blend.penalty_columns
        return map_rows(blocks, self._blend, width)

    def _space(self, blocks: Blocks) -> Blocks:
        """Return the blend of preprocessed rows, held in memory where it fits a gigabyte."""
        return in_memory(self._blended(blocks))

    def _fit_levels(
        self, train: Blocks, weight: float, context: FitContext
    ) -> tuple[Blocks, list[Array], list[dict[str, Any]]]:
        """K-means of the levels with behavior, then of the others on the rest of the content.

        Returns the blend of rows with behavior of ``weight``, its codebooks, and their records.
        """
        blend = self._new_blend(self._blend.content, 1.0)
        self._blend = blend.weighted(train, weight)
        space, groups = self._space(train), self._refined_parts(train.dim)
        first, content = groups[-1].levels, groups[0].columns.stop
        # The first levels cluster content and behavior together: an item's first code says what
        # it goes with.
        books, records = self._fit_stage(f"blend {weight}", space, slice(first), self.seed, context)
        if first < self.levels:
            # Deeper levels quantize the content that greedy codes of the first ones leave.
            index = [index_codebook(book) for book in books]
            labels = list(np.ascontiguousarray(encode_rows(space, index, threads=self.threads).T))
            rest = first_columns(residuals(space, labels, books), content)
            seed = child_seed(self.seed, "content")
            name, deeper = f"content {weight}", slice(first, None)
            more, fits = self._fit_stage(name, rest, deeper, seed, context)
            books, records = books + more, records + fits
        # Codewords of deeper levels are 0 in the columns that they lack.
        return space, [pad_columns(book, space.dim - book.shape[1]) for book in books], records

    def _fit_stage(
        self, name: str, rows: Blocks, levels: slice, seed: int, context: FitContext
    ) -> tuple[list[Array], list[dict[str, Any]]]:
        """Fit some levels as one stage of the run."""

        def run(store: StateStore | None) -> tuple[dict[str, Array], dict[str, Any]]:
            books, fits = fit_levels(
                rows,
                self.codebook_sizes[levels],
                seed=seed,
                options=KMeansOptions.of(self.kmeans),
                weights=context.weights,
                threads=self.threads,
                store=store,
                progress=context.progress,
            )
            return {str(level): book for level, book in enumerate(books)}, {"fits": fits}

        arrays, record = context.stage(name, run)
        return [arrays[str(level)] for level in range(len(arrays))], record["fits"]

    def _balanced(self, space: Blocks, books: Sequence[Array], *, content: int) -> list[Array]:
        """Give codewords the penalties that even out usage, for all levels together."""
        width = space.dim - self._blend.penalty_columns
        books = [np.ascontiguousarray(book[:, :width]) for book in books]
        penalties = balance_penalties(
            first_columns(space, width),
            books,
            strength=self.balance_strength,
            columns=content,
            beam_width=self.beam_width,
            threads=self.threads,
        )
        return [
            add_penalties(book, penalty, level=level, levels=self.levels)
            for level, (book, penalty) in enumerate(zip(books, penalties, strict=True))
        ]

    def _refit_decoder(
        self, train: Blocks, held_out: Blocks | None, *, weights: Weights | None
    ) -> dict[str, Any]:
        held_out = None if held_out is None else self._preprocess.view(held_out)
        return self._fit_tables(self._preprocess.view(train), held_out, weights=weights)

    def _fit_tables(
        self,
        train: Blocks,
        held_out: Blocks | None,
        *,
        weights: Weights | None,
        behavior: Behavior | None = None,
    ) -> dict[str, Any]:
        """Fit what codes of preprocessed rows stand for: whole rows, and behavior directions."""

        def with_codes(blocks: Blocks) -> tuple[Blocks, npt.NDArray[np.int64]]:
            rows, width = self._blended(blocks), self.beam_width
            index, threads = self._codebook_index, self.threads
            return blocks, encode_rows(rows, index, beam_width=width, threads=threads)

        # Codebooks are fitted to encode; a row's codes say more of it than their sum. The tables
        # are what the codes predict best, of components that were not quantized too.
        fitted = with_codes(train)
        validation = None if held_out is None else with_codes(held_out)
        targets: dict[str, tuple[Callable[[Array], Array], int]] = {
            "content": (lambda x: x, train.dim)
        }
        if self._blend.encoder is not None:
            targets["behavior"] = (self._blend.directions, self._latent_width(train.dim))
        details: dict[str, Any] = {}
        self._tables = {}
        for name, (target, width) in targets.items():
            fit = fit_tables(
                code_targets(*fitted, target),
                self.codebook_sizes,
                width,
                held_out=None if validation is None else partial(code_targets, *validation, target),
                ridges=self._resolved("refine").ridges,
                weights=weights,
                threads=self.threads,
            )
            self._tables[name] = fit.tables
            details[f"{name}_tables"] = {"ridge": fit.ridge, "relative_error": fit.error}
        if behavior is not None and "behavior" in self._tables:
            temperature, seed = self._objective().temperature, child_seed(self.seed, "head")
            self._tables["behavior"], losses = train_tables(
                self._tables["behavior"], fitted[1], behavior, temperature=temperature, seed=seed
            )
            details["behavior_tables"] |= losses
        return details

    def _latent_block(self, x: Array) -> Array:
        return self._blend(self._preprocess.apply(x))

    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        return self._preprocess.invert(dequantize(codes, self._tables["content"]))

    def decode_latent(self, z: npt.ArrayLike) -> Array:
        """Return rows ``(n, dim)`` that have the content of latents ``(n, latent)``.

        Components that are not quantized are at their mean. `decode` knows more of them: its tables
        hold what codes say of whole rows.

        Raises:
            NotFittedError: before `fit`.
        """
        content = self._blend.content
        z = np.asarray(z, dtype=np.float32)[:, : content.width(self.dim)]
        return self._preprocess.invert(content.rows(np.ascontiguousarray(z)))

    @property
    def decodes_behavior(self) -> bool:
        """Whether it was fitted with behavior, so that `decode_behavior` works."""
        return "behavior" in self._tables

    def decode_behavior(self, codes: Any) -> Array:
        """Return directions of behavior ``(n, latent)`` float32 that codes stand for.

        Cosines between them say which items go together in sequences: they are trained on the
        pairs of the fit (after `semid.refine`, which has none, they are least-squares predictions
        of the encoder's directions), and not scaled to length 1.

        Raises:
            UsageError: if the tokenizer was fitted without behavior.
            InputError: as for `decode`.
        """
        checked = self._checked(codes)
        if not self.decodes_behavior:
            raise UsageError("this barq was fitted without behavior; fit it with interactions")
        return dequantize(checked, self._tables["behavior"])

    def encoder_module(self) -> nn.Module:
        """Return the map from rows to the blend, see `Tokenizer.encoder_module`."""
        _ = self.dim
        encoder = None
        if self._autoencoder is not None:
            encoder = EncoderGraph(self._preprocess, self._autoencoder)
        return BlendGraph(self._blend, Prepare(self._preprocess), encoder)

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = super()._tensors()
        tensors["blend.scale"] = np.array([self._blend.scale], dtype=np.float32)
        content = self._blend.content.tensors()
        tensors |= {f"content.{name}": array for name, array in content.items()}
        for name, tables in self._tables.items():
            tensors |= {f"{STORED[name]}.{level}": table for level, table in enumerate(tables)}
        return tensors

    def _codeword_width(self, tensors: Mapping[str, np.ndarray]) -> int:
        components = tensors.get("content.components")
        content = self.dim if components is None else int(components.shape[1])
        behavior = self._latent_width(self.dim) if self._autoencoder is not None else 0
        return content + behavior + self._blend.penalty_columns

    def _code_tensors(self, level: int) -> Sequence[str]:
        tables = [f"{STORED[name]}.{level}" for name in self._tables]
        return [*super()._code_tensors(level), *tables]

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        shapes: dict[str, tuple[int | None, ...]] = {"blend.scale": (1,)}
        if "content.components" in tensors:
            shapes |= {"content.components": (self._dim, None), "content.rest": (self._dim,)}
        for level, size in enumerate(self.codebook_sizes):
            shapes[f"content.{level}"] = (size, self._dim)
            if f"{STORED['behavior']}.0" in tensors:
                shapes[f"{STORED['behavior']}.{level}"] = (size, None)
        check_shapes(tensors, shapes)
        super()._set_tensors(tensors)
        components, rest = tensors.get("content.components"), tensors.get("content.rest")
        content = Content(components, rest, self.threads)
        self._blend = self._new_blend(content, float(tensors["blend.scale"][0]))
        self._tables = {
            name: tuple(tensors[f"{stored}.{level}"] for level in range(self.levels))
            for name, stored in STORED.items()
            if name == "content" or f"{stored}.0" in tensors
        }
