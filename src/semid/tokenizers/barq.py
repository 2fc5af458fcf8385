"""BARQ: behavior-aware residual quantization, all levels refined together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import nn

from semid.data.blocks import Moments
from semid.data.ids import ItemIds
from semid.errors import UsageError
from semid.options import MAX_BEAM, MAX_WEIGHT, option
from semid.quantization.blocks import Blocks, PreprocessedBlocks, in_memory
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.least_squares import Tables, fit_tables
from semid.quantization.refine import ColumnGroup, RefineOptions
from semid.quantization.residual import dequantize, encode_residual
from semid.tokenizers.barq_fit import Blend, BlendFit, BlendGraph, Content
from semid.tokenizers.behavior import Behavior
from semid.tokenizers.context import FitContext
from semid.tokenizers.neural.autoencoder import EncoderGraph, Prepare
from semid.tokenizers.neural.continuous import ContinuousTokenizer, Objective
from semid.tokenizers.neural.tokenizer import LatentBlocks, PreparedRows
from semid.tokenizers.stored import check_shapes
from semid.training.checkpoint import StateStore

Array = npt.NDArray[np.float32]

DEFAULT_LATENT = 64

MEMORY_BYTES = 1 << 30
"""The blend of the training rows is held in memory up to this size."""

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

    A ``behavior_weight`` of 2 was chosen on users kept for selection (``benchmarks/choice.py``);
    with 0, `fit` takes no pairs. A ``content_variance`` below 1 evens out usage and is faster: 0.95
    at no more error, less for some. ``balance_strength`` evens out usage at some error, see
    `semid.quantization.balance`. A ``latent`` of 0 in ``network`` takes 64.

    Raises:
        UsageError: if a value is out of range.

    Source: ours; `docs/barq.md` has the mathematics and what each part brings.
    """

    kind: ClassVar[str] = "barq"
    behavior_argument: ClassVar[str | None] = "behavior_weight"

    beam_width: int = option(
        8, ge=1, le=MAX_BEAM, help="Partial codes kept while encoding; 1 is greedy."
    )
    behavior_weight: float = option(
        2.0,
        ge=0,
        le=MAX_WEIGHT,
        help="Variance of behavior relative to that of content; 0 leaves behavior out.",
    )
    behavior_levels: int = option(1, ge=1, help="Number of levels that use behavior.")
    content_variance: float = option(
        0.95,
        gt=0,
        le=1,
        help="Share of the embeddings' variance in the components that are quantized; 1 quantizes "
        "embeddings whole.",
    )
    balance_strength: float = option(
        0.0,
        ge=0,
        le=MAX_WEIGHT,
        help="Highest penalty of a codeword in mean squared residuals; evens out usage.",
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
        self._content = Content(threads=self.threads)
        self._tables: dict[str, tuple[Array, ...]] = {}
        self._blend = self._new_blend(1.0)

    def _problems(self) -> list[str]:
        if self.behavior_levels > self.levels:
            return [f"behavior_levels={self.behavior_levels}: give 1 to levels={self.levels}"]
        return []

    def _objective(self) -> Objective:
        objective: Objective = self._resolved("objective")
        return objective

    def _latent_width(self, dim: int) -> int:
        return self._config.latent or DEFAULT_LATENT

    @property
    def needs_behavior(self) -> bool:
        """Whether behavior has a weight."""
        return self.behavior_weight > 0

    def _behavior(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behavior | None:
        has_pairs = interactions is not None or pairs is not None
        if has_pairs and not self.needs_behavior:
            raise UsageError(
                "interactions or pairs were given and behavior_weight=0, so they would not be "
                "used; give --behavior-weight 2 (behavior_weight=), or leave them out"
            )
        if self.needs_behavior and not has_pairs:
            raise UsageError(
                "barq learns from behavior; give --interactions or --pairs (interactions=, "
                "pairs=), or --behavior-weight 0 (behavior_weight=) to learn without them"
            )
        return super()._behavior(interactions, pairs, ids=ids, train=train) if has_pairs else None

    def _fit(self, context: FitContext) -> dict[str, Any]:
        prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
        details: dict[str, Any] = {"protocol": "no pairs"}
        self._preprocess = prepared.preprocess
        # 1. The behavior encoder u, trained on pairs; frozen from here on.
        if context.behavior is not None:
            autoencoder, details["training"] = self._train_autoencoder(prepared, context)
            details["protocol"] = context.behavior.train.protocol
            self._set_autoencoder(autoencoder)
        train = prepared.train.blocks
        held_out = None if prepared.held_out is None else prepared.held_out.blocks
        # 2. The space [P'x, s u(x)] in which codebooks are fitted.
        self._content = self._find_content(prepared, context)
        self._set_scale(train)
        refine: RefineOptions = self._resolved("refine")
        fit = BlendFit(
            rows=self._space(train),
            held_out=None if held_out is None else self._space(held_out),
            parts=self._refined_parts(train.dim),
            penalty_columns=self._blend.penalty_columns,
            context=context,
            sizes=self.codebook_sizes,
            seed=self.seed,
            threads=self.threads,
        )
        # 3. K-means level by level, then all levels together.
        books, details["levels"] = fit.levels(KMeansOptions.of(self.kmeans))
        books, rounds = fit.refined(books, refine)
        # 4. Penalties come last, since refinement makes usage uneven again.
        if self.balance_strength:
            books = fit.balanced(books, strength=self.balance_strength, beam_width=self.beam_width)
        details["refine"] = [asdict(each) for each in rounds]
        self._set_codebooks(books)
        # 5. Tables that decode the codes as they are now.
        return details | self._fit_tables(train, held_out, weights=context.weights)

    def _find_content(self, prepared: PreparedRows, context: FitContext) -> Content:
        """Find the principal components, once for a run that is resumed."""

        def run(store: StateStore | None) -> tuple[dict[str, Array], dict[str, Any]]:
            content = Content.of(
                prepared.train.blocks,
                prepared.mean,
                share=self.content_variance,
                threads=self.threads,
            )
            return content.tensors(), {}

        arrays, _ = context.stage("components", run)
        return Content.read(arrays, threads=self.threads)

    def _refined_parts(self, dim: int) -> list[ColumnGroup]:
        content = self._content.width(dim)
        parts = [ColumnGroup(slice(0, content), self.levels)]
        if self._autoencoder is not None:
            end = content + self._latent_width(dim)
            parts.append(ColumnGroup(slice(content, end), self.behavior_levels))
        return parts

    def _set_scale(self, train: Blocks) -> None:
        """Let the directions' variance be ``behavior_weight`` times that of the content."""
        self._blend = self._new_blend(1.0)
        if self._autoencoder is None:
            return
        parts = (
            (self._content, self._content.width(train.dim)),
            (self._blend.directions, self._latent_width(train.dim)),
        )
        content, directions = (
            Moments.of(LatentBlocks(train, *part).blocks()).variance for part in parts
        )
        ratio = content / max(directions, 1e-12)
        self._blend = self._new_blend(float(np.sqrt(self.behavior_weight * ratio)))

    def _new_blend(self, scale: float) -> Blend:
        return Blend(
            None if self._autoencoder is None else self._encoder,
            content=self._content,
            scale=scale,
            penalty_columns=self.levels if self.balance_strength else 0,
            threads=self.threads,
        )

    def _space(self, blocks: Blocks) -> Blocks:
        """Return the blend of rows, held in memory where it fits a gigabyte."""
        width = self._refined_parts(blocks.dim)[-1].columns.stop + self._blend.penalty_columns
        return in_memory(LatentBlocks(blocks, self._blend, width), limit_bytes=MEMORY_BYTES)

    def _refit_decoder(
        self,
        train: Blocks,
        held_out: Blocks | None,
        *,
        weights: npt.NDArray[np.float64] | None,
    ) -> dict[str, Any]:
        return self._fit_tables(
            PreprocessedBlocks(train, self._preprocess),
            None if held_out is None else PreprocessedBlocks(held_out, self._preprocess),
            weights=weights,
        )

    def _fit_tables(
        self,
        train: Blocks,
        held_out: Blocks | None,
        *,
        weights: npt.NDArray[np.float64] | None,
    ) -> dict[str, Any]:
        """Fit what codes of preprocessed rows stand for: whole rows, and behavior directions."""
        train_codes = self._codes(train)
        held_codes = None if held_out is None else self._codes(held_out)

        def fit(target: Callable[[Array], Array], width: int) -> Tables:
            def pairs(blocks: Blocks, codes: npt.NDArray[np.int64]) -> Any:
                return ((codes[at : at + len(x)], target(x)) for at, x in blocks.blocks())

            def held_pairs() -> Any:
                return pairs(held_out, held_codes)  # type: ignore[arg-type] # called with rows only

            return fit_tables(
                pairs(train, train_codes),
                self.codebook_sizes,
                width,
                judged=None if held_out is None else held_pairs,
                ridges=self._resolved("refine").ridges,
                weights=weights,
                threads=self.threads,
            )

        fits = {"content": fit(lambda x: x, train.dim)}
        if self._autoencoder is not None:
            fits["behavior"] = fit(self._blend.directions, self._latent_width(train.dim))
        self._tables = {name: each.tables for name, each in fits.items()}
        return {
            f"{name}_tables": {"ridge": each.ridge, "relative_error": each.error}
            for name, each in fits.items()
        }

    def _codes(self, blocks: Blocks) -> npt.NDArray[np.int64]:
        """Return the codes of preprocessed rows, as `encode` gives them."""
        parts = [
            encode_residual(
                self._blend(x), self._prepared, beam_width=self.beam_width, threads=self.threads
            ).codes
            for _, x in blocks.blocks()
        ]
        return np.concatenate(parts or [np.empty((0, self.levels), np.int64)])

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
        content = np.asarray(z, dtype=np.float32)[:, : self._content.width(self.dim)]
        return self._preprocess.invert(self._content.rows(np.ascontiguousarray(content)))

    @property
    def decodes_behavior(self) -> bool:
        """Whether it was fitted with behavior, so that `decode_behavior` works."""
        return "behavior" in self._tables

    def decode_behavior(self, codes: Any) -> Array:
        """Return directions of behavior ``(n, latent)`` float32 that codes stand for.

        Cosines between them say which items go together in sequences. They are least-squares
        predictions of the encoder's directions and not scaled to length 1.

        Raises:
            UsageError: if the tokenizer was fitted without behavior.
            InputError: as for `decode`.
        """
        checked = self._checked(codes)
        if not self.decodes_behavior:
            raise UsageError("this barq was fitted without behavior; fit it with interactions")
        return dequantize(checked, self._tables["behavior"])

    def encoder_module(self) -> nn.Module:
        """Return the map from rows ``(n, dim)`` to the blend, for export.

        Raises:
            NotFittedError: before `fit`.
        """
        _ = self.dim
        encoder = (
            None if self._autoencoder is None else EncoderGraph(self._preprocess, self._autoencoder)
        )
        return BlendGraph(
            Prepare(self._preprocess),
            encoder,
            components=self._content.components,
            scale=float(self._blend.scale),
            penalty_columns=self._blend.penalty_columns,
        )

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = super()._tensors()
        tensors["blend.scale"] = np.array([self._blend.scale], dtype=np.float32)
        tensors |= {f"content.{name}": each for name, each in self._content.tensors().items()}
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
        prefix = "content."
        content = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self._content = Content.read(content, threads=self.threads)
        self._blend = self._new_blend(float(tensors["blend.scale"][0]))
        self._tables = {
            name: tuple(tensors[f"{stored}.{level}"] for level in range(self.levels))
            for name, stored in STORED.items()
            if name == "content" or f"{stored}.0" in tensors
        }
