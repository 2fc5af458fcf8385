"""One tokenizer on the latent of another: `Pipeline`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from semid.data.blocks import RawBlock
from semid.data.ids import ItemIds
from semid.data.source import EmbeddingSource
from semid.errors import UsageError
from semid.lazy import torch
from semid.options import option
from semid.quantization.residual import ResidualCodes
from semid.tokenizers.base import Tokenizer, Weights
from semid.tokenizers.behavior import Behavior
from semid.tokenizers.context import FitContext, Result, check_enough
from semid.training.checkpoint import StateStore, with_prefix, without_prefix

Array = npt.NDArray[np.float32]

ENCODER = "encoder/"
"""Prefix of the encoder's arrays; those of the quantizer bear the names that it gives them."""

SHARED = ("seed", "threads", "validation_fraction")
"""Arguments that both have from the pipeline."""


class LatentSource(EmbeddingSource):
    """Latents of embeddings, computed as they are read."""

    def __init__(self, base: EmbeddingSource, encoder: Tokenizer, dim: int) -> None:
        self.base, self.encoder, self.dim = base, encoder, dim
        self.ids, self.label = base.ids, f"latents of {base.label}"
        self.cheap_rows = base.cheap_rows

    def describe(self) -> dict[str, Any]:
        """Return what a log line needs."""
        return {**self.base.describe(), "kind": "latents", "dim": self.dim}

    def _pieces(self, size: int, first: int) -> Iterator[RawBlock]:
        for _, block in self.base.blocks(size, first=first, copy=False):
            yield RawBlock(self.encoder._latent_block(block))

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        return RawBlock(self.encoder._latent_block(self.base.rows(indices)))


@dataclass(kw_only=True, eq=False, repr=False)
class Pipeline(Tokenizer):
    """A tokenizer that quantizes the latent of another: what DRQ does, for any two.

    The encoder is fitted first and then frozen; its latents are the embeddings of the quantizer.
    The codes, and what they mean, are the quantizer's. The encoder's own codebooks are fitted as
    well and not used: with ``levels=1`` they cost little. A refresh keeps the encoder.

    Both are given unfitted, and stay so; or as a table with the key ``tokenizer`` and arguments,
    which is how a recipe writes them. ``seed``, ``threads`` and ``validation_fraction`` of the
    pipeline count for both.

    Raises:
        UsageError: for what is no tokenizer, or an encoder without a decoder of latents.

    Source: DRQ §4 (representation and quantization decoupled).

    Example:
        >>> model = semid.Pipeline(
        ...     encoder=semid.DRQVAE(levels=1, contrastive_weight=0.1),
        ...     quantizer=semid.OPQ(n_codebooks=16),
        ... ).fit(embeddings, interactions=log)
    """

    kind: ClassVar[str] = "pipeline"
    can_warm_start: ClassVar[bool] = True  # the encoder stays, whatever the quantizer can

    # Tokenizers, or tables of their arguments; `_new` checks which.
    encoder: Any = option(None, help="Tokenizer whose latent is quantized.")
    quantizer: Any = option(None, help="Tokenizer that quantizes it.")

    def __post_init__(self) -> None:
        """Start unfitted, from copies of both."""
        self._encoder, self._quantizer = self._new("encoder"), self._new("quantizer")
        super().__post_init__()
        self._start: Self | None = None
        if not self._encoder.has_decoder:
            raise UsageError(
                f"encoder is a {self._encoder.kind}, which decodes no latents; give one with a "
                "network, such as drqvae"
            )

    def _new(self, name: str) -> Tokenizer:
        """Return an unfitted tokenizer of the settings of one, with the pipeline's own in both."""
        from semid.tokenizers.factory import make_tokenizer

        part = getattr(self, name)
        shared = {each: getattr(self, each) for each in SHARED}
        if isinstance(part, Mapping):
            values = {
                key: value for key, value in part.items() if key not in ("tokenizer", *SHARED)
            }
            if not isinstance(part.get("tokenizer"), str):
                raise UsageError(f"{name} does not say tokenizer; give its name under that key")
            part = make_tokenizer(part["tokenizer"], values)
        if not isinstance(part, Tokenizer) or isinstance(part, Pipeline):
            raise UsageError(
                f"{name} is {type(part).__name__}; give a tokenizer, such as "
                f"{name}=semid.{'DRQVAE(levels=1)' if name == 'encoder' else 'OPQ()'}"
            )
        # Both parts have the pipeline's seed and split, so that they hold out the same items.
        return type(part)(**{**part.get_params(deep=False), **shared})

    def _resolved(self, name: str) -> Any:
        if name not in ("encoder", "quantizer"):
            return super()._resolved(name)
        part = self._new(name)
        settings = {key: value for key, value in part.settings.items() if key not in SHARED}
        return {"tokenizer": part.kind, **settings}

    # The quantizer says what codes are -------------------------------------------------------

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codewords of each level."""
        return self._quantizer.codebook_sizes

    @property
    def hierarchical(self) -> bool:  # type: ignore[override]
        """Whether a shared prefix of codes means relatedness."""
        return self._quantizer.hierarchical

    @property
    def combine(self) -> Any:  # type: ignore[override]
        """How the codewords of an item make its quantized vector."""
        return self._quantizer.combine

    @property
    def encodes_nearest(self) -> bool:  # type: ignore[override]
        """Whether a code is the nearest codeword to what its codebook quantizes."""
        return self._quantizer.encodes_nearest

    def score_terms(self, level: int) -> tuple[Weights, Weights, Weights]:
        """Return what decides a code, see `Tokenizer.score_terms`."""
        return self._quantizer.score_terms(level)

    @property
    def beam_width(self) -> int:
        """Partial codes kept while encoding."""
        return self._quantizer.beam_width

    @beam_width.setter
    def beam_width(self, width: int) -> None:
        """Set the beam of the tokenizer of the latent."""
        self._quantizer.beam_width = width

    def _encoding_settings(self) -> dict[str, Any]:
        return {
            **super()._encoding_settings(),
            "encoder": self._encoder._encoding_settings(),
            "quantizer": self._quantizer._encoding_settings(),
        }

    # Fit -------------------------------------------------------------------------------------

    @property
    def needs_behavior(self) -> bool:
        """Whether the encoder cannot do without interactions or pairs."""
        return self._encoder.needs_behavior

    @property
    def behavior_weights(self) -> tuple[str, ...]:  # type: ignore[override]
        """The encoder's."""
        return self._encoder.behavior_weights

    def _check_behavior(self, interactions: Any, pairs: Any) -> None:
        self._encoder._check_behavior(interactions, pairs)

    def _behavior(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behavior | None:
        return self._encoder._behavior(interactions, pairs, ids=ids, train=train)

    def _start_from(self, previous: Self) -> None:
        self._start = previous

    def _fit(self, context: FitContext) -> dict[str, Any]:
        start, dim = self._start, context.train.dim
        self._encoder, self._quantizer = self._new("encoder"), self._new("quantizer")
        if start is not None:
            # With the former encoder both generations quantize the same latents.
            self._encoder = start._encoder
            if self._quantizer.can_warm_start:
                self._quantizer._start_from(start._quantizer)
            training: dict[str, Any] = {"kept": True}
        else:
            # The rows were counted for the quantizer's codewords alone.
            rows = min(context.scan.distinct, len(context.train))
            check_enough(rows, self._encoder.codebook_sizes)
            training = self._fit_part(context, "encoder", self._encoder, dim)
        self._encoder._dim = dim
        # The width of the latent is found by encoding one row.
        width = self._encoder._latent_block(context.train.rows(np.arange(1))).shape[1]

        def latents(source: EmbeddingSource) -> EmbeddingSource:
            return LatentSource(source, self._encoder, width)

        # What the quantizer sees is embeddings of another width, without behavior.
        inner = replace(
            context,
            source=latents(context.source),
            train=latents(context.train),
            held_out=None if context.held_out is None else latents(context.held_out),
            inputs=(width,),
            behavior=None,
        )
        quantized = self._fit_part(inner, "quantizer", self._quantizer, width, stages=context)
        self._start = None
        return {"encoder": training, "quantizer": quantized}

    @staticmethod
    def _fit_part(
        context: FitContext, name: str, part: Tokenizer, dim: int, stages: FitContext | None = None
    ) -> dict[str, Any]:
        """Fit one of the two as a stage of the whole fit, with a checkpoint of its own inside."""

        def run(store: StateStore | None) -> Result:
            details = part._fit(replace(context, checkpoint=store))
            part._dim = dim
            return part._tensors(), {"details": details}

        arrays, record = (stages or context).stage(name, run)
        # A continued run takes a finished part from the checkpoint, without `run`.
        part._dim = dim
        part._set_tensors(arrays)
        details: dict[str, Any] = record["details"]
        return details

    # Rows to codes and back ------------------------------------------------------------------

    def _latent_block(self, x: Array) -> Array:
        return self._quantizer._latent_block(self._encoder._latent_block(x))

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        return self._quantizer._encode_block(self._encoder._latent_block(x), beam_width)

    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        return self._encoder.decode_latent(self._quantizer._decode_codes(codes))

    def _quantize_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        return self._quantizer._quantize_codes(codes)

    @property
    def has_encoder_module(self) -> bool:
        """Whether `encoder_module` works: where it does for both."""
        return self._encoder.has_encoder_module and self._quantizer.has_encoder_module

    def encoder_module(self) -> torch.nn.Module:
        """Return both encoders, one after the other, as a module.

        Raises:
            NotFittedError: before `fit`.
            UsageError: if one of them has no module.
        """
        _ = self.dim
        return torch.nn.Sequential(self._encoder.encoder_module(), self._quantizer.encoder_module())

    # Arrays ----------------------------------------------------------------------------------

    def _codebooks(self) -> tuple[Array, ...]:
        return self._quantizer._codebooks()

    def _code_tensors(self, level: int) -> Sequence[str]:
        return self._quantizer._code_tensors(level)

    def _tensors(self) -> dict[str, np.ndarray]:
        # The quantizer's names stay: the contract looks for codebooks by theirs.
        return {**self._quantizer._tensors(), **with_prefix(ENCODER, self._encoder._tensors())}

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._encoder._dim = self._dim
        self._encoder._set_tensors(without_prefix(ENCODER, tensors))
        # The encoder comes first: its latent width is the input width of the quantizer.
        row = np.zeros((1, self.dim), np.float32)
        self._quantizer._dim = self._encoder._latent_block(row).shape[1]
        self._quantizer._set_tensors(
            {name: each for name, each in tensors.items() if not name.startswith(ENCODER)}
        )
