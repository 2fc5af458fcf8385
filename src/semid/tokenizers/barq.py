"""BARQ: behavior-aware residual quantization, all levels refined together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from semid.data.blocks import Moments
from semid.data.ids import ItemIds
from semid.errors import UsageError
from semid.options import MAX_WEIGHT
from semid.quantization.blocks import Blocks, in_memory
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.least_squares import Tables, fit_tables
from semid.quantization.nearest import index_codebook
from semid.quantization.refine import ColumnGroup, RefineOptions
from semid.quantization.residual import ResidualCodes, dequantize, encode_residual
from semid.tokenizers.barq_fit import Blend, BlendFit, BlendGraph, Content
from semid.tokenizers.behavior import Behavior
from semid.tokenizers.context import FitContext, level_sizes
from semid.tokenizers.neural.autoencoder import EncoderGraph, Prepare
from semid.tokenizers.neural.continuous import ContinuousTokenizer, Objective
from semid.tokenizers.neural.quantized import LatentBlocks
from semid.tokenizers.neural.tokenizer import NeuralOptions, PreparedRows
from semid.tokenizers.stored import check_shapes
from semid.training.stages import Stages

__all__ = ["BARQ"]

Array = npt.NDArray[np.float32]

OBJECTIVE = {"contrastive_weight": 1.0, "pairs_per_step": 1024}
LATENT = 64
MEMORY = 1 << 30


STORED = {"content": "content", "behavior": "behaviour"}
"""Decoding tables -> names of their tensors in an artefact, part of the weights fingerprint."""


class BARQ(ContinuousTokenizer):
    """Behavior decides the first code, content the others, and all levels are fitted together.

    A contrastive encoder ``u`` of the embedding is trained on pairs. With ``P`` the leading
    principal components, level 1 clusters ``[P'x, s u(x)]``, deeper levels what level 1 leaves of
    ``P'x``; then beam encoding and ridge least squares of all codebooks take turns. Tables fitted
    to the codes decode them to whole embeddings and to behavior. Codes are a function of the
    embedding alone, so items without behavior are served like the others.

    Args:
        levels: codes an item.
        codebook_size: codewords a level (2 to 2**32), or one number a level.
        beam_width: partial codes kept while encoding.
        behavior_weight: variance of ``s u(x)`` in variances of ``P'x``, 0 or more; 2 was chosen on
            users kept for selection (``benchmarks/choice.py``). 0 leaves behavior out, and `fit`
            then takes no pairs.
        behavior_levels: levels that see ``u``, 1 to ``levels``.
        content_variance: share of the embeddings' variance in the components that are quantized,
            in (0, 1]; 1 quantizes embeddings whole. A smaller share evens out usage and is faster:
            0.95 at no more error, less for some (``benchmarks/choice.py``).
        size_limit: highest price of a codeword in mean squared residuals, 0 or more: evens out
            usage at some error (see `semid.quantization.prices`).
        objective: losses of the encoder beside reconstruction, see
            `semid.tokenizers.neural.continuous.Objective`; here ``contrastive_weight`` is 1 and
            ``pairs_per_step`` 1024.
        refine: how codebooks are refined.
        kmeans: how K-means runs at each level.
        **options: what every neural tokenizer takes, see
            `semid.tokenizers.neural.tokenizer.NeuralOptions`; ``latent`` 0 of the network takes 64.

    Raises:
        UsageError: if a value is out of range.

    Source: ours; `docs/barq.md` has the mathematics and what each part brings.
    """

    kind: ClassVar[str] = "barq"
    hierarchical: ClassVar[bool] = True

    def __init__(
        self,
        *,
        levels: int = 3,
        codebook_size: int | Sequence[int] = 256,
        beam_width: int = 8,
        behavior_weight: float = 2.0,
        behavior_levels: int = 1,
        content_variance: float = 0.95,
        size_limit: float = 0.0,
        objective: Objective | Mapping[str, Any] | None = None,
        refine: RefineOptions | Mapping[str, Any] | None = None,
        kmeans: KMeansOptions | Mapping[str, Any] | None = None,
        **options: Unpack[NeuralOptions],
    ) -> None:
        for name, value in (("behavior_weight", behavior_weight), ("size_limit", size_limit)):
            if not 0 <= value <= MAX_WEIGHT:
                raise UsageError(f"{name}={value}: give 0 to {MAX_WEIGHT:,}")
        if not 1 <= behavior_levels <= levels:
            raise UsageError(f"behavior_levels={behavior_levels}: give 1 to levels={levels}")
        if not 0 < content_variance <= 1:
            raise UsageError(f"content_variance={content_variance}: give a share in (0, 1]")
        self.behavior_weight = float(behavior_weight)
        self.behavior_levels = int(behavior_levels)
        self.content_variance = float(content_variance)
        self.size_limit = float(size_limit)
        self.refine = RefineOptions.of(refine)
        self.kmeans = KMeansOptions.of(kmeans)
        if objective is None or isinstance(objective, Mapping):
            objective = {**OBJECTIVE, **(objective or {})}
        super().__init__(
            sizes=level_sizes(levels, codebook_size),
            beam_width=beam_width,
            objective=Objective.of(objective),
            **options,
        )
        self._content = Content(threads=self.threads)
        self._tables: dict[str, tuple[Array, ...]] = {}
        self._blend = self._make_blend(1.0)

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            "levels": self.levels,
            "codebook_size": list(self.codebook_sizes),
            "beam_width": self.beam_width,
            "behavior_weight": self.behavior_weight,
            "behavior_levels": self.behavior_levels,
            "content_variance": self.content_variance,
            "size_limit": self.size_limit,
            "objective": asdict(self.objective),
            "refine": {**asdict(self.refine), "ridges": list(self.refine.ridges)},
            "kmeans": asdict(self.kmeans),
            **super().settings,
        }

    def _latent_width(self, dim: int) -> int:
        return self.network.latent or LATENT

    @property
    def needs_behavior(self) -> bool:
        """Whether behavior has a weight."""
        return self.behavior_weight > 0

    def _behavior(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behavior | None:
        given = interactions is not None or pairs is not None
        if given and not self.needs_behavior:
            raise UsageError(
                "interactions or pairs were given and behavior_weight=0, so they would not be "
                "used; give --behavior-weight 2 (behavior_weight=), or leave them out"
            )
        if self.needs_behavior and not given:
            raise UsageError(
                "barq learns from behavior; give --interactions or --pairs (interactions=, "
                "pairs=), or --behavior-weight 0 (behavior_weight=) to learn without them"
            )
        return super()._behavior(interactions, pairs, ids=ids, train=train) if given else None

    def _fit(self, context: FitContext) -> dict[str, Any]:
        prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
        stages = Stages(context.checkpoint)
        details: dict[str, Any] = {"protocol": "no pairs"}
        self._preprocess = prepared.preprocess
        if context.behavior is not None:
            autoencoder, details["training"] = self._trained(prepared, context, stages)
            details["protocol"] = context.behavior.train.protocol
            self._set_autoencoder(autoencoder)
        train = prepared.train.blocks
        held = None if prepared.held_out is None else prepared.held_out.blocks
        self._set_content(prepared, stages)
        self._set_scale(train)
        fit = BlendFit(
            rows=self._space(train),
            judged=None if held is None else self._space(held),
            parts=self._parts(train.dim),
            prices=self._blend.prices,
            sizes=self.codebook_sizes,
            seed=self.seed,
            weights=context.weights,
            threads=self.threads,
            progress=context.progress,
        )
        books, details["levels"] = fit.levels(self.kmeans, stages)
        books, rounds = fit.refined(books, self.refine)
        if self.size_limit:  # last, since refinement makes usage uneven again
            books = fit.priced(books, limit=self.size_limit, beam_width=self.beam_width)
        details["refine"] = [asdict(one) for one in rounds]
        self._prepared = tuple(index_codebook(torch.from_numpy(book)) for book in books)
        return details | self._follow_codes(train, held, weights=context.weights)

    def _set_content(self, prepared: PreparedRows, stages: Stages) -> None:
        """Find the components, once for a run that is resumed."""
        kept = stages.finished("components")
        if kept is not None:
            self._content = Content.read(kept[0], threads=self.threads)
            return
        self._content = Content.of(
            prepared.train.blocks,
            prepared.mean,
            share=self.content_variance,
            threads=self.threads,
        )
        stages.finish("components", self._content.tensors(), {})

    def _parts(self, dim: int) -> list[ColumnGroup]:
        content = self._content.width(dim)
        parts = [ColumnGroup(slice(0, content), self.levels)]
        if self._autoencoder is not None:
            end = content + self._latent_width(dim)
            parts.append(ColumnGroup(slice(content, end), self.behavior_levels))
        return parts

    def _set_scale(self, train: Blocks) -> None:
        """Let the directions' variance be ``behavior_weight`` times that of the content."""
        self._blend = self._make_blend(1.0)
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
        self._blend = self._make_blend(float(np.sqrt(self.behavior_weight * ratio)))

    def _make_blend(self, scale: float) -> Blend:
        return Blend(
            None if self._autoencoder is None else self._encoder,
            content=self._content,
            scale=scale,
            prices=self.levels if self.size_limit else 0,
            threads=self.threads,
        )

    def _space(self, blocks: Blocks) -> Blocks:
        """Return the blend of rows, held in memory where it fits a gigabyte."""
        width = self._parts(blocks.dim)[-1].columns.stop + self._blend.prices
        return in_memory(LatentBlocks(blocks, self._blend, width), limit_bytes=MEMORY)

    def _follow_codes(
        self,
        train: Blocks,
        held: Blocks | None,
        *,
        weights: npt.NDArray[np.float64] | None = None,
    ) -> dict[str, Any]:
        """Fit what the codes stand for: whole rows, and directions of behavior."""
        codes = self._codes(train)
        judged = None if held is None else self._codes(held)

        def fitted(target: Callable[[Array], Array], width: int) -> Tables:
            def pairs(blocks: Blocks, codes: npt.NDArray[np.int64]) -> Any:
                return ((codes[at : at + len(x)], target(x)) for at, x in blocks.blocks())

            return fit_tables(
                pairs(train, codes),
                self.codebook_sizes,
                width,
                judged=None if held is None or judged is None else lambda: pairs(held, judged),
                ridges=self.refine.ridges,
                weights=weights,
                threads=self.threads,
            )

        found = {"content": fitted(lambda x: x, train.dim)}
        if self._autoencoder is not None:
            found["behavior"] = fitted(self._blend.directions, self._latent_width(train.dim))
        self._tables = {name: made.tables for name, made in found.items()}
        return {
            f"{name}_tables": {"ridge": made.ridge, "relative_error": made.error}
            for name, made in found.items()
        }

    def _codes(self, blocks: Blocks) -> npt.NDArray[np.int64]:
        """Return the codes of preprocessed rows, as `encode` gives them."""
        parts = [self._encode_prepared(x, self.beam_width).codes for _, x in blocks.blocks()]
        return np.concatenate(parts or [np.empty((0, self.levels), np.int64)])

    def _encode_prepared(self, x: Array, beam_width: int) -> ResidualCodes:
        return encode_residual(
            self._blend(x), self._prepared, beam_width=beam_width, threads=self.threads
        )

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        return self._encode_prepared(self._preprocess.apply(x), beam_width)

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
            prices=self._blend.prices,
        )

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = super()._tensors()
        tensors["blend.scale"] = np.array([self._blend.scale], dtype=np.float32)
        tensors |= {f"content.{name}": each for name, each in self._content.tensors().items()}
        for name, tables in self._tables.items():
            tensors |= {f"{STORED[name]}.{level}": table for level, table in enumerate(tables)}
        return tensors

    def _quantized_width(self, dim: int, tensors: Mapping[str, np.ndarray]) -> int:
        components = tensors.get("content.components")
        content = dim if components is None else components.shape[1]
        encoder = any(name.startswith("autoencoder.") for name in tensors)
        return content + (self._latent_width(dim) if encoder else 0) + self._blend.prices

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
        self._blend = self._make_blend(float(tensors["blend.scale"][0]))
        self._tables = {
            name: tuple(tensors[f"{stored}.{level}"] for level in range(self.levels))
            for name, stored in STORED.items()
            if name == "content" or f"{stored}.0" in tensors
        }
