"""BARQ: behaviour-aware residual quantization, all levels refined together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from semid.data.ids import ItemIds
from semid.errors import UsageError
from semid.quantization.blocks import Blocks, ResidualBlocks, in_memory
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.nearest import prepare
from semid.quantization.prices import priced, size_prices, with_room
from semid.quantization.refine import Part, RefineOptions, RefineRound, refine_residual
from semid.quantization.residual import ResidualCodes, dequantize, encode_residual
from semid.quantization.tables import fit_tables
from semid.seeds import child_seed
from semid.tokenizers.context import FitContext, level_sizes
from semid.tokenizers.levels import fit_levels
from semid.tokenizers.neural.blend import Blend, BlendGraph, Columns
from semid.tokenizers.neural.continuous import ContinuousTokenizer
from semid.tokenizers.neural.decoupled import Objective
from semid.tokenizers.neural.graph import EncoderGraph, Prepare
from semid.tokenizers.neural.initialise import LatentBlocks
from semid.tokenizers.neural.options import NeuralOptions
from semid.tokenizers.neural.pairs import Behaviour
from semid.tokenizers.neural.rows import PreparedRows
from semid.training.stages import Stages

__all__ = ["BARQ"]

Array = npt.NDArray[np.float32]

OBJECTIVE = {"contrastive_weight": 1.0, "pairs_per_step": 1024}
LATENT = 64
MEMORY = 1 << 30


class BARQ(ContinuousTokenizer):
    """Behaviour decides the first code, content the others, and all levels are fitted together.

    A contrastive encoder ``u`` of the embedding is trained on pairs. Level 1 clusters
    ``[x, s u(x)]``, deeper levels what level 1 leaves of ``x``; then beam encoding and ridge least
    squares of all codebooks take turns. Codes are a function of the embedding alone, so items
    without behaviour are served like the others.

    Args:
        levels: codes an item.
        codebook_size: codewords a level (2 to 2**32), or one number a level.
        beam_width: partial codes kept while encoding.
        behaviour_weight: variance of ``s u(x)`` in variances of ``x``, 0 or more; 2 was chosen on
            users kept for selection (``benchmarks/choice.py``). 0 leaves behaviour out, and `fit`
            then takes no pairs.
        behaviour_levels: levels that see ``u``, 1 to ``levels``.
        size_limit: highest price of a codeword in mean squared residuals, 0 or more: evens out
            usage at some error (see `semid.quantization.prices`).
        objective: losses of the encoder beside reconstruction, see
            `semid.tokenizers.neural.decoupled.Objective`; here ``contrastive_weight`` is 1 and
            ``pairs_per_step`` 1024.
        refine: how codebooks are refined.
        kmeans: how K-means runs at each level.
        **options: what every neural tokenizer takes, see
            `semid.tokenizers.neural.options.NeuralOptions`; ``latent`` 0 of the network takes 64.

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
        behaviour_weight: float = 2.0,
        behaviour_levels: int = 1,
        size_limit: float = 0.0,
        objective: Objective | Mapping[str, Any] | None = None,
        refine: RefineOptions | Mapping[str, Any] | None = None,
        kmeans: KMeansOptions | Mapping[str, Any] | None = None,
        **options: Unpack[NeuralOptions],
    ) -> None:
        for name, value in (("behaviour_weight", behaviour_weight), ("size_limit", size_limit)):
            if not 0 <= value < float("inf"):
                raise UsageError(f"{name}={value}: give 0 or more")
        if not 1 <= behaviour_levels <= levels:
            raise UsageError(f"behaviour_levels={behaviour_levels}: give 1 to levels={levels}")
        self.behaviour_weight = float(behaviour_weight)
        self.behaviour_levels = int(behaviour_levels)
        self.size_limit = float(size_limit)
        self.refine = (
            refine if isinstance(refine, RefineOptions) else RefineOptions(**(refine or {}))
        )
        self.kmeans = (
            kmeans if isinstance(kmeans, KMeansOptions) else KMeansOptions(**(kmeans or {}))
        )
        if not isinstance(objective, Objective):
            objective = Objective(**{**OBJECTIVE, **(objective or {})})
        super().__init__(
            sizes=level_sizes(levels, codebook_size),
            beam_width=beam_width,
            objective=objective,
            **options,
        )
        self._scale = 1.0
        self._heads: tuple[Array, ...] = ()
        self._blend = self._make_blend(1.0)

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            "levels": self.levels,
            "codebook_size": list(self.codebook_sizes),
            "beam_width": self.beam_width,
            "behaviour_weight": self.behaviour_weight,
            "behaviour_levels": self.behaviour_levels,
            "size_limit": self.size_limit,
            "objective": asdict(self.objective),
            "refine": {**asdict(self.refine), "ridges": list(self.refine.ridges)},
            "kmeans": asdict(self.kmeans),
            **super().settings,
        }

    def _latent_width(self, dim: int) -> int:
        return self.network.latent or LATENT

    @property
    def needs_behaviour(self) -> bool:
        """Whether behaviour has a weight."""
        return self.behaviour_weight > 0

    def _behaviour(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behaviour | None:
        given = interactions is not None or pairs is not None
        if given and not self.needs_behaviour:
            raise UsageError(
                "interactions or pairs were given and behaviour_weight=0, so they would not be "
                "used; give --behaviour-weight 2 (behaviour_weight=), or leave them out"
            )
        if self.needs_behaviour and not given:
            raise UsageError(
                "barq learns from behaviour; give --interactions or --pairs (interactions=, "
                "pairs=), or --behaviour-weight 0 (behaviour_weight=) to learn without them"
            )
        return super()._behaviour(interactions, pairs, ids=ids, train=train) if given else None

    def _fit(self, context: FitContext) -> dict[str, Any]:
        prepared = PreparedRows.of(context, center=self.center, normalize=self.normalize)
        stages = Stages(context.checkpoint)
        details: dict[str, Any] = {"protocol": "no pairs"}
        self._preprocess = prepared.preprocess
        if context.behaviour is not None:
            autoencoder, details["training"] = self._trained(prepared, context, stages)
            details["protocol"] = context.behaviour.train.protocol
            self._set_autoencoder(autoencoder)
        self._set_scale(prepared)
        rows = self._space(prepared.train.blocks)
        books, details["levels"] = self._levels(rows, prepared.train.dim, context, stages)
        books, rounds = self._refined(rows, books, prepared, context)
        if self.size_limit:  # last, since refinement makes usage uneven again
            books = self._priced(rows, books, prepared.train.dim)
        details["refine"] = [asdict(one) for one in rounds]
        self._prepared = tuple(prepare(torch.from_numpy(book)) for book in books)
        details["behaviour_head"] = self._fit_heads(prepared)
        return details

    def _set_scale(self, prepared: PreparedRows) -> None:
        """Let the directions' variance be ``behaviour_weight`` times that of the rows."""
        self._scale = 1.0
        if self._autoencoder is not None:
            self._blend = self._make_blend(1.0)
            total = np.zeros(self._latent_width(0))
            for _, block in prepared.train.blocks.blocks():
                total += self._blend.directions(block).sum(axis=0, dtype=np.float64)
            mean = total / len(prepared.train)
            spread = max(1.0 - float(mean @ mean), 1e-12)  # directions have length 1
            self._scale = float(
                np.float32(np.sqrt(self.behaviour_weight * prepared.variance / spread))
            )
        self._blend = self._make_blend(self._scale)

    def _make_blend(self, scale: float) -> Blend:
        return Blend(
            None if self._autoencoder is None else self._encoder,
            scale=scale,
            prices=self.levels if self.size_limit else 0,
            threads=self.threads,
        )

    def _space(self, blocks: Blocks) -> Blocks:
        """Return the blend of rows, held in memory where it fits a gigabyte."""
        return in_memory(
            LatentBlocks(blocks, self._blend, self._width(blocks.dim)), limit_bytes=MEMORY
        )

    def _width(self, dim: int) -> int:
        behaviour = 0 if self._autoencoder is None else self._latent_width(dim)
        return dim + behaviour + self._blend.prices

    def _levels(
        self, rows: Blocks, dim: int, context: FitContext, stages: Stages
    ) -> tuple[list[Array], list[dict[str, Any]]]:
        """K-means of the levels that see behaviour, then of the others on what is left of ``x``."""
        first = self.levels if self._autoencoder is None else self.behaviour_levels
        books: list[Array] = []
        records: list[dict[str, Any]] = []
        for name, at, stop in (("blend", 0, first), ("content", first, self.levels)):
            if at == stop:
                continue
            kept = stages.finished(name)
            if kept is None:
                seen = (
                    rows
                    if not at
                    else Columns(ResidualBlocks(rows, self._labels(rows, books), books), dim)
                )
                found, fits = fit_levels(
                    seen,
                    self.codebook_sizes[at:stop],
                    seed=child_seed(self.seed, name) if at else self.seed,
                    options=self.kmeans,
                    weights=context.weights,
                    threads=self.threads,
                    store=stages.stage(name),
                    progress=context.progress,
                )
                words = [book.codewords.numpy() for book in found]
                stages.finish(name, {str(i): word for i, word in enumerate(words)}, {"fits": fits})
            else:
                words = [kept[0][str(i)] for i in range(stop - at)]
                fits = kept[1]["fits"]
            books += [with_room(word, rows.dim - word.shape[1]) for word in words]
            records += fits
        return books, records

    def _labels(self, rows: Blocks, books: Sequence[Array]) -> list[npt.NDArray[np.int64]]:
        """Return the greedy codes of all rows, level by level."""
        ready = [prepare(torch.from_numpy(book)) for book in books]
        parts = [encode_residual(x, ready, threads=self.threads).codes for _, x in rows.blocks()]
        return list(np.ascontiguousarray(np.concatenate(parts).T))

    def _priced(self, rows: Blocks, books: Sequence[Array], dim: int) -> list[Array]:
        """Give refined codewords the prices that even out usage, for all levels together."""
        content = rows.dim - self.levels
        plain = [np.ascontiguousarray(book[:, :content]) for book in books]
        prices = size_prices(
            Columns(rows, content),
            plain,
            limit=self.size_limit,
            columns=dim,
            beam_width=self.beam_width,
            threads=self.threads,
        )
        return [
            priced(book, paid, level=level, levels=self.levels)
            for level, (book, paid) in enumerate(zip(plain, prices, strict=True))
        ]

    def _refined(
        self, rows: Blocks, books: list[Array], prepared: PreparedRows, context: FitContext
    ) -> tuple[list[Array], list[RefineRound]]:
        dim, end = prepared.train.dim, rows.dim - self._blend.prices
        parts = [Part(slice(0, dim), self.levels)]
        if end > dim:
            parts.append(Part(slice(dim, end), self.behaviour_levels))
        progress = context.progress
        progress.start("refine", total=self.refine.most_rounds)
        held = prepared.held_out
        return refine_residual(
            rows,
            books,
            judged=None if held is None else self._space(held.blocks),
            parts=parts,
            options=self.refine,
            weights=context.weights,
            seed=child_seed(self.seed, "refine"),
            threads=self.threads,
            on_round=lambda one: progress.step(1, error=one.error, ridge=one.ridge),
        )

    def _fit_heads(self, prepared: PreparedRows) -> dict[str, Any] | None:
        """Fit tables from codes to directions of behaviour."""
        if self._autoencoder is None:
            return None

        def coded(blocks: Blocks) -> list[tuple[npt.NDArray[np.int64], Array]]:
            return [
                (self._encode_prepared(x, self.beam_width).codes, self._blend.directions(x))
                for _, x in blocks.blocks()
            ]

        width = self._latent_width(prepared.train.dim)
        held = [] if prepared.held_out is None else coded(prepared.held_out.blocks)
        judged = (
            np.concatenate([codes for codes, _ in held] or [np.empty((0, self.levels), np.int64)]),
            np.concatenate([rows for _, rows in held] or [np.empty((0, width), np.float32)]),
        )
        found = fit_tables(
            coded(prepared.train.blocks),
            self.codebook_sizes,
            width,
            judged=judged,
            ridges=self.refine.ridges,
            threads=self.threads,
        )
        self._heads = found.tables
        return {"ridge": found.ridge, "relative_error": found.error}

    def _encode_prepared(self, x: Array, beam_width: int) -> ResidualCodes:
        return encode_residual(
            self._blend(x), self._prepared, beam_width=beam_width, threads=self.threads
        )

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        return self._encode_prepared(self._preprocess.apply(x), beam_width)

    def _latent_block(self, x: Array) -> Array:
        return self._blend(self._preprocess.apply(x))

    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        return self.decode_latent(self._quantize_codes(codes))

    def decode_latent(self, z: npt.ArrayLike) -> Array:
        """Return the content part ``(n, dim)`` of latents ``(n, latent)``, preprocessing undone.

        Raises:
            NotFittedError: before `fit`.
        """
        rows = np.ascontiguousarray(np.asarray(z, dtype=np.float32)[:, : self.dim])
        return self._preprocess.invert(rows)

    @property
    def decodes_behaviour(self) -> bool:
        """Whether it was fitted with behaviour, so that `decode_behaviour` works."""
        return bool(self._heads)

    def decode_behaviour(self, codes: Any) -> Array:
        """Return directions of behaviour ``(n, latent)`` float32 that codes stand for.

        Cosines between them say which items go together in sequences. They are least-squares
        predictions of the encoder's directions and not scaled to length 1.

        Raises:
            UsageError: if the tokenizer was fitted without behaviour.
            InputError: as for `decode`.
        """
        checked = self._checked(codes)
        if not self._heads:
            raise UsageError("this barq was fitted without behaviour; fit it with interactions")
        return dequantize(checked, self._heads)

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
            Prepare(self._preprocess), encoder, scale=self._scale, prices=self._blend.prices
        )

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = super()._tensors()
        tensors["blend.scale"] = np.array([self._scale], dtype=np.float32)
        return tensors | {f"behaviour.{i}": table for i, table in enumerate(self._heads)}

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        super()._set_tensors(tensors)
        self._scale = float(tensors["blend.scale"][0])
        self._blend = self._make_blend(self._scale)
        self._heads = tuple(
            tensors[f"behaviour.{i}"] for i in range(self.levels) if f"behaviour.{i}" in tensors
        )
