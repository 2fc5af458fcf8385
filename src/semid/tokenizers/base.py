"""The contract of a tokenizer: fit, encode, decode, quantize, save and load.

A tokenizer fills in the methods marked abstract. Opening the data, holding rows out, judging the
result, streaming, fingerprints and artefacts are the same for all and live here.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from semid.artefact import FORMAT_VERSION, fingerprint, read_artefact, write_artefact
from semid.codes import CodesInfo, SemanticIds, code_dtype
from semid.data.embeddings import EmbeddingSource, open_embeddings
from semid.data.ids import ItemIds, held_out_mask
from semid.documents import record
from semid.errors import EmbeddingError, NotFittedError
from semid.options import CheckedArguments
from semid.progress import Progress, QuietProgress
from semid.quantization.blocks import BLOCK_ROWS, prefetched
from semid.quantization.nearest import compile_kernels
from semid.quantization.residual import ResidualCodes
from semid.tokenizers.behavior import Behavior
from semid.tokenizers.context import (
    EncodedBlock,
    FitContext,
    InputScan,
    check_beam,
    check_enough,
    codes_within,
    data_digest,
    item_weights,
    refuse_behavior,
    scan,
    train_weights,
)
from semid.tokenizers.fit_report import FitReport, HealthCounter, card
from semid.tokenizers.stored import check_stored, described, stored_settings
from semid.training.checkpoint import open_checkpoint, run_key

__all__ = ["HELD_OUT_SALT", "Tokenizer"]

Array = npt.NDArray[np.float32]

HELD_OUT_SALT = "semid/items"


class Tokenizer(CheckedArguments, ABC):
    """Base of every tokenizer.

    Attributes:
        kind: name in artefacts and on the command line.
        hierarchical: whether a shared prefix of codes means relatedness.
        report: the `FitReport` of the last fit, or None before it.
    """

    kind: ClassVar[str]
    hierarchical: ClassVar[bool]

    codebook_sizes: tuple[int, ...]
    seed: int
    beam_width: int = 1
    validation_fraction: float = 0.05

    def __init__(self) -> None:
        self.report: FitReport | None = None
        self._dim: int | None = None
        self._fingerprint_version = FORMAT_VERSION

    # What a tokenizer fills in -------------------------------------------------------------

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able; ``cls(**settings)`` makes an equal tokenizer."""

    @abstractmethod
    def _fit(self, context: FitContext) -> dict[str, Any]:
        """Learn from ``context.train``; return JSON-able figures for the report."""

    @abstractmethod
    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        """Encode rows ``(n, dim)``; each row's codes depend on that row alone."""

    @abstractmethod
    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        """Return ``(n, dim)`` float32 reconstructions in the input space."""

    @abstractmethod
    def _quantize_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        """Return ``(n, latent)`` float32 quantized latent vectors."""

    @abstractmethod
    def _latent_block(self, x: Array) -> Array:
        """Return ``(n, latent)`` float32 latent vectors before quantization."""

    @abstractmethod
    def _codebooks(self) -> tuple[Array, ...]:
        """Return one ``(codes, latent)`` float32 array a level."""

    @abstractmethod
    def _tensors(self) -> dict[str, np.ndarray]:
        """Return every learned array by name, the codebooks among them."""

    @abstractmethod
    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take the arrays that `_tensors` gave."""

    # What every tokenizer has --------------------------------------------------------------

    @property
    def needs_behavior(self) -> bool:
        """Whether `fit` cannot do without interactions or pairs."""
        return False

    @property
    def levels(self) -> int:
        """Number of codes an item."""
        return len(self.codebook_sizes)

    @property
    def dim(self) -> int:
        """Width of the embeddings it was fitted on.

        Raises:
            NotFittedError: before `fit`.
        """
        if self._dim is None:
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted; call fit(x) or semid.load(path)"
            )
        return self._dim

    @property
    def codebooks(self) -> tuple[Array, ...]:
        """Codewords of each level: ``(codes, latent)`` float32.

        Raises:
            NotFittedError: before `fit`.
        """
        _ = self.dim
        return self._codebooks()

    @property
    def codebook_fingerprint(self) -> str:
        """SHA-256 of the codebooks; ids carry it."""
        return fingerprint({f"{level:04d}": book for level, book in enumerate(self.codebooks)})

    @property
    def weights_fingerprint(self) -> str:
        """SHA-256 of all learned arrays and of the settings that change codes beside them.

        It stays what it was for a tokenizer of format version 1, whose fingerprint covered the
        arrays alone, so that ids written with it still match.
        """
        _ = self.dim
        if self._fingerprint_version == 1:
            return fingerprint(self._tensors())
        return fingerprint(self._tensors(), settings=self._encoding_settings())

    def _encoding_settings(self) -> dict[str, Any]:
        """Return what decides on codes beside the arrays and the beam width, JSON-able.

        The shape of a network is that of its arrays. A tokenizer with further settings that change
        what equal arrays encode adds them.
        """
        settings = self.settings
        return {
            "kind": self.kind,
            "hierarchical": self.hierarchical,
            **{name: settings[name] for name in ("normalize", "center") if name in settings},
        }

    def fit(
        self,
        source: Any,
        *,
        interactions: Any = None,
        pairs: Any = None,
        ids: Any = None,
        weights: npt.ArrayLike | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Learn the codebooks.

        Args:
            source: embeddings ``(items, dim)``: anything `semid.open_embeddings` reads.
            interactions: user sequences, for tokenizers that learn from behavior.
            pairs: ``(n, 2)`` item pairs, for tokenizers that learn from relations.
            ids: item ids for a source that has none; they decide which items are held out.
            weights: ``(items,)`` non-negative item weights, for example popularity.
            checkpoint: folder for the state of the run, so that it can be continued.
            resume: continue from ``checkpoint`` if it holds a state of this run.
            progress: told about every step; silent by default.

        Returns:
            self, fitted; ``self.report`` holds the verdict.

        Raises:
            EmbeddingError: for NaN, inf, no rows, or fewer distinct rows than codewords.
            UsageError: for arguments this tokenizer cannot use.
            ArtefactError: if the checkpoint belongs to another run.
        """
        began = time.monotonic()
        steps = progress or QuietProgress()
        opened = open_embeddings(source, ids=ids)
        steps.start("prepare kernels")  # once on a machine this takes a minute
        compile_kernels()
        train = ~held_out_mask(opened.ids, self.validation_fraction, salt=HELD_OUT_SALT)
        seen = scan(opened, train, steps)
        check_enough(
            seen.distinct,
            self.codebook_sizes,
            trained=int(train.sum()),
            held_out=self.validation_fraction,
        )
        mass = item_weights(weights, len(opened))
        behavior = self._behavior(interactions, pairs, ids=opened.ids, train=train)
        settings = {"kind": self.kind, **self.settings}
        key = run_key(settings, data_digest(seen.digest, mass, behavior))
        with open_checkpoint(checkpoint, key=key, resume=resume) as store:
            context = FitContext(
                source=opened,
                train=opened if train.all() else opened.subset(train),
                held_out=None if train.all() else opened.subset(~train),
                inputs=getattr(opened, "inputs", (opened.dim,)),
                scan=seen,
                weights=train_weights(mass, train),
                behavior=behavior,
                checkpoint=store,
                progress=steps,
            )
            details = self._fit(context)
        self._dim = opened.dim
        self._fingerprint_version = FORMAT_VERSION
        self.report = self._judge(opened, train, seen, details, steps, began)
        return self

    def _behavior(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behavior | None:
        """Return pairs to learn from; one that learns from embeddings alone refuses any."""
        refuse_behavior(self.kind, interactions=interactions, pairs=pairs)
        return None

    def _judge(
        self,
        source: EmbeddingSource,
        train: npt.NDArray[np.bool_],
        seen: InputScan,
        details: dict[str, Any],
        progress: Progress,
        began: float,
    ) -> FitReport:
        """Encode and decode every row once, and judge the codes and errors."""
        counter = HealthCounter(self.codebook_sizes, seen.mean)
        progress.start("judge", total=len(source))
        for block in self.encode_blocks(source):
            span = slice(block.start, block.start + len(block.x))
            counter.update(
                block.codes,
                block.x,
                self._decode_codes(block.codes),
                latent=self._latent_block(block.x),
                train=train[span],
                row_hashes=seen.row_hashes[span],
            )
            progress.step(len(block.x))
        judged = counter.verdict(self.codebooks)
        return FitReport(
            items=len(source),
            trained_items=int(train.sum()),
            held_out_items=int((~train).sum()),
            seconds=round(time.monotonic() - began, 3),
            details=details,
            health=judged,
            summary=judged.summary(),
        )

    def encode_blocks(
        self, source: EmbeddingSource, *, beam_width: int | None = None, first: int = 0
    ) -> Iterator[EncodedBlock]:
        """Encode in blocks, so that memory does not grow with the catalogue.

        Args:
            source: opened embeddings.
            beam_width: overrides the tokenizer's own.
            first: row to begin at (a multiple of the block size); rows before it are not read.

        Raises:
            EmbeddingError: for rows of another width, or with NaN or inf.
        """
        self._check_width(source)
        width = self.beam_width if beam_width is None else beam_width
        for start, x in prefetched(source.blocks(BLOCK_ROWS, first=first)):
            found = self._encode_block(x, width)
            yield EncodedBlock(start, x, found.codes, found.residual_norms)

    def encode(
        self,
        source: Any,
        *,
        ids: Any = None,
        beam_width: int | None = None,
        progress: Progress | None = None,
    ) -> SemanticIds:
        """Give every row its codes; rows need not have been seen by `fit`.

        Args:
            source: embeddings ``(items, dim)`` as for `fit`; a single ``(dim,)`` vector is one
                item.
            ids: item ids for a source that has none.
            beam_width: partial codes kept a row; None takes the tokenizer's own.
            progress: told about every block; silent by default.

        Returns:
            `SemanticIds` with codes ``(items, levels)``.

        Raises:
            NotFittedError: before `fit`.
            EmbeddingError: for rows of another width, or with NaN or inf.
        """
        info = self.codes_info(beam_width)
        if isinstance(source, np.ndarray) and source.ndim == 1:
            source = source[None]
        opened = open_embeddings(source, ids=ids)
        codes = np.empty((len(opened), self.levels), dtype=code_dtype(self.codebook_sizes))
        norms = np.empty(len(opened), dtype=np.float32)
        steps = progress or QuietProgress()
        steps.start("encode", total=len(opened))
        for block in self.encode_blocks(opened, beam_width=info.beam_width):
            span = slice(block.start, block.start + len(block.x))
            codes[span] = block.codes
            norms[span] = block.residual_norms
            steps.step(len(block.x))
        return SemanticIds(opened.ids, codes, norms, info)

    def codes_info(self, beam_width: int | None = None) -> CodesInfo:
        """Return what ids of this tokenizer carry in their metadata.

        Raises:
            UsageError: if ``beam_width`` is below 1.
        """
        width = self.beam_width if beam_width is None else beam_width
        check_beam(width, kind=self.kind, hierarchical=self.hierarchical)
        return CodesInfo(
            tokenizer=self.kind,
            codebook_sizes=self.codebook_sizes,
            hierarchical=self.hierarchical,
            codebook_fingerprint=self.codebook_fingerprint,
            weights_fingerprint=self.weights_fingerprint,
            beam_width=width,
        )

    def decode(self, codes: Any) -> Array:
        """Return reconstructions ``(n, dim)`` float32 in the input space.

        Args:
            codes: ``(n, levels)`` integers, or `SemanticIds` of this tokenizer; a token appended
                to make them unique is left out.

        Raises:
            InputError: for a wrong shape or codes out of range.
            FingerprintError: for `SemanticIds` of another codebook.
        """
        return self._decode_codes(self._checked(codes))

    def quantize(self, codes: Any) -> Array:
        """Return quantized latent vectors ``(n, latent)`` float32; arguments as for `decode`."""
        return self._quantize_codes(self._checked(codes))

    def latent(self, source: Any) -> Array:
        """Return latent vectors ``(items, latent)`` float32 before quantization."""
        opened = open_embeddings(source)
        self._check_width(opened)
        return np.concatenate([self._latent_block(x) for _, x in opened.blocks(BLOCK_ROWS)])

    def _check_width(self, source: EmbeddingSource) -> None:
        if source.dim != self.dim:
            raise EmbeddingError(
                f"these embeddings have width {source.dim}, the tokenizer was fitted on width "
                f"{self.dim}; give embeddings of the same model"
            )

    def _checked(self, codes: Any) -> npt.NDArray[np.int64]:
        _ = self.dim
        if isinstance(codes, SemanticIds):
            codes.check_codebook(self.codebook_fingerprint)
            # An appended token stands after the model's levels and belongs to no codebook.
            codes = codes.codes[:, : len(codes.info.model_sizes)]
        return codes_within(codes, self.codebook_sizes)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the artefact folder (``config.json``, ``model.safetensors``, ``README.md``).

        Raises:
            NotFittedError: before `fit`.
            OutputExistsError: if ``path`` exists and ``overwrite`` is false.
        """
        config = {
            "kind": self.kind,
            "settings": self.settings,
            "dim": self.dim,
            "codebook_sizes": list(self.codebook_sizes),
            "codebook_fingerprint": self.codebook_fingerprint,
            "weights_fingerprint": self.weights_fingerprint,
            "fingerprint_version": self._fingerprint_version,
            "held_out": {"fraction": self.validation_fraction, "salt": HELD_OUT_SALT},
            "fit_report": None if self.report is None else self.report.to_dict(),
        }
        return write_artefact(
            path,
            config=config,
            tensors=self._tensors(),
            card=card(self.kind, config),
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; encodes exactly as the saved tokenizer did.

        Raises:
            ArtefactError: if the folder is incomplete, altered, or of another kind.
        """
        config, tensors = read_artefact(path, kind=cls.kind)
        with described(path, cls.__name__):
            tokenizer = cls(**stored_settings(cls, config))
            tokenizer._dim = config["dim"]
            tokenizer._fingerprint_version = config.get("fingerprint_version", 1)
            tokenizer._set_tensors(tensors)
            if config["fit_report"] is not None:
                tokenizer.report = record(FitReport, config["fit_report"], "fit_report")
        check_stored(path, config, tokenizer)
        return tokenizer

    def __repr__(self) -> str:
        """Show the settings and whether it is fitted."""
        shown = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        state = "not fitted" if self._dim is None else f"dim={self._dim}"
        return f"{type(self).__name__}({shown}) [{state}]"
