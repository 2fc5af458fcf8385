"""The contract of a tokenizer: fit, encode, decode, quantize, save and load.

A tokenizer fills in the methods marked abstract. Opening the data, holding rows out, evaluating the
result, streaming, fingerprints and artefacts are the same for all and live here. The rest of the
library asks a tokenizer by this contract alone and never by its class.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from semid.artefact import FORMAT_VERSION
from semid.codes import CodesInfo, SemanticIds, code_dtype
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds, held_out_mask
from semid.data.source import EmbeddingSource
from semid.errors import EmbeddingError, UsageError
from semid.progress import Progress, ProgressArgument, QuietProgress, with_progress
from semid.quantization.blocks import BLOCK_ROWS, Blocks, prefetched
from semid.quantization.refine import ColumnGroup
from semid.quantization.residual import ResidualCodes, dequantize
from semid.tokenizers.behavior import Behavior, check_behavior
from semid.tokenizers.context import (
    EncodedBlock,
    FitContext,
    InputScan,
    check_beam_width,
    check_enough,
    codes_within,
    compile_kernels,
    data_digest,
    item_weights,
    scan,
    train_weights,
)
from semid.tokenizers.fit_report import FitReport, HealthCounter
from semid.tokenizers.protocol import Transformer
from semid.tokenizers.stored import HELD_OUT_SALT
from semid.training.checkpoint import open_checkpoint, run_key
from semid.training.distributed import explained_ends

if TYPE_CHECKING:
    from torch import nn

    from semid.quantization.sharding import ShardedMatrix
    from semid.training.checkpoint import StateStore


Array = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float64]


@dataclass(kw_only=True, eq=False, repr=False)
class Tokenizer(Transformer):
    """Base of every tokenizer; constructor arguments are fields, see `semid.options`.

    It follows scikit-learn: ``clone``, ``set_params``, `fit_transform` and ``Pipeline`` work.

    Attributes:
        kind: name in artefacts and on the command line.
        hierarchical: whether a shared prefix of codes means relatedness.
        combine: how the codewords of an item make its quantized vector: ``sum``, ``mean`` or
            ``concat``. `latent_slices` says which columns of the latent each codebook quantizes.
        encodes_nearest: whether a code is the nearest codeword to what its codebook quantizes;
            `score_terms` says what decides where it is not.
        behavior_weights: arguments that turn learning from behavior on where one is above 0.
        has_decoder: whether `decode_latent` works.
        can_warm_start: whether `fit_again` can start from the codebooks of the fit before.
        fits_shards: whether `fit_rows` fits rows that lie in several processes or machines.
        report: the `FitReport` of the last fit, or None before it.
    """

    behavior_weights: ClassVar[tuple[str, ...]] = ()
    has_decoder: ClassVar[bool] = False
    can_warm_start: ClassVar[bool] = False
    fits_shards: ClassVar[bool] = False

    # No annotation: not an argument of every tokenizer, see `semid.tokenizers.codebooks`.
    beam_width = 1

    # What a tokenizer fills in -------------------------------------------------------------

    @abstractmethod
    def _fit(self, context: FitContext) -> dict[str, Any]:
        """Learn from ``context.train``; return JSON-able figures for the report."""

    @abstractmethod
    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        """Encode rows ``(n, dim)``; each row's codes depend on that row alone."""

    @abstractmethod
    def _latent_block(self, x: Array) -> Array:
        """Return ``(n, latent)`` float32 latent vectors before quantization."""

    @abstractmethod
    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        """Return ``(n, dim)`` float32 reconstructions in the input space."""

    # What a tokenizer may fill in ----------------------------------------------------------

    @property
    def needs_behavior(self) -> bool:
        """Whether `fit` cannot do without interactions or pairs."""
        return any(getattr(self, name) > 0 for name in self.behavior_weights)

    @property
    def decodes_behavior(self) -> bool:
        """Whether `decode_behavior` works."""
        return False

    def _check_behavior(self, interactions: Any, pairs: Any) -> None:
        """Refuse interactions or pairs that would not be used, and a fit that lacks them."""
        weights = {name: getattr(self, name) for name in self.behavior_weights}
        check_behavior(self.kind, weights, interactions=interactions, pairs=pairs)

    def _behavior(
        self, interactions: Any, pairs: Any, *, ids: ItemIds, train: npt.NDArray[np.bool_]
    ) -> Behavior | None:
        """Return pairs to learn from, if any."""
        return None

    def _kernels(self) -> set[str]:
        """Return which kernels `fit` takes beyond those of all, see `compile_kernels`."""
        return {"product"} if self.combine == "concat" else set()

    def _start_from(self, previous: Self) -> None:
        """Let the next `fit` start from the codebooks of ``previous`` (`can_warm_start`)."""
        raise NotImplementedError

    def fit_rows(
        self,
        rows: ShardedMatrix,
        *,
        store: StateStore | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Fit training rows ``(items, dim)`` that lie in several processes (`fits_shards`).

        Nothing is held out and nothing evaluated; ``store`` keeps the state after every iteration.
        Returns a JSON-able record of how each level ended.
        """
        raise UsageError(f"{self.kind} cannot fit rows that lie in several processes")

    def _quantize_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        """Return ``(n, latent)`` float32 quantized latent vectors."""
        if self.combine == "concat":
            books = enumerate(self._codebooks())
            return np.concatenate([book[codes[:, level]] for level, book in books], axis=1)
        total = dequantize(codes, self._codebooks())
        return total / np.float32(self.levels) if self.combine == "mean" else total

    def decode_latent(self, z: npt.ArrayLike) -> Array:
        """Return reconstructions ``(n, dim)`` of latents ``(n, latent)`` without quantization."""
        raise UsageError(f"{self.kind} has no decoder of latents")

    def decode_behavior(self, codes: Any) -> Array:
        """Return directions of behavior ``(n, latent)`` that codes stand for."""
        raise UsageError(f"{self.kind} decodes no behavior; fit barq with interactions or pairs")

    @property
    def has_encoder_module(self) -> bool:
        """Whether `encoder_module` works."""
        return type(self).encoder_module is not Tokenizer.encoder_module

    def encoder_module(self) -> nn.Module:
        """Return the module from rows ``(batch, dim)`` to latents ``(batch, latent)``, for export.

        Parallel codebooks with a latent each give a list of them.

        Raises:
            NotFittedError: before `fit`.
            UsageError: if the tokenizer has no such module.
        """
        raise UsageError(
            f"{self.kind} gives no encoder graph; give it a method encoder_module(), or "
            "export another tokenizer"
        )

    def _refined_parts(self, dim: int) -> list[ColumnGroup] | None:
        """Return which latent columns a refinement fits together; None for all at once."""
        return None

    def _refit_decoder(
        self, train: Blocks, held_out: Blocks | None, *, weights: Weights | None
    ) -> dict[str, Any]:
        """Fit again what is fitted to codes, after codebooks changed; return details of it."""
        return {}

    # What every tokenizer has --------------------------------------------------------------

    @with_progress
    @explained_ends()
    def fit(
        self,
        source: Any,
        y: None = None,
        *,
        interactions: Any = None,
        pairs: Any = None,
        ids: Any = None,
        weights: npt.ArrayLike | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: ProgressArgument = None,
    ) -> Self:
        """Learn the codebooks.

        Args:
            source: embeddings ``(items, dim)``: anything `semid.open_embeddings` reads.
            y: not used; scikit-learn passes it.
            interactions: user sequences, for tokenizers that learn from behavior.
            pairs: ``(n, 2)`` item pairs, for tokenizers that learn from relations.
            ids: item ids for a source that has none; they decide which items are held out.
            weights: ``(items,)`` non-negative item weights, for example popularity.
            checkpoint: folder for the state of the run, so that it can be continued.
            resume: continue from ``checkpoint`` if it holds a state of this run.
            progress: callback that receives progress events.

        Returns:
            self, fitted; ``self.report`` holds the verdict.

        Raises:
            EmbeddingError: for NaN, inf, no rows, or fewer distinct rows than codewords.
            UsageError: for arguments this tokenizer cannot use.
            ArtefactError: if the checkpoint belongs to another run.
        """
        started = time.monotonic()
        progress = progress or QuietProgress()
        self._check_behavior(interactions, pairs)
        opened = open_embeddings(source, ids=ids)
        compile_kernels(progress, self._kernels())
        # A hash of the id holds an item out, so later fits and reports agree on which they are.
        train = ~held_out_mask(opened.ids, self.validation_fraction, salt=HELD_OUT_SALT)
        # Every row is read once before anything is learned: bad rows show now, not after an hour.
        scanned = scan(opened, train, progress)
        check_enough(
            scanned.distinct,
            self.codebook_sizes,
            trained=int(train.sum()),
            held_out=self.validation_fraction,
        )
        mass = item_weights(weights, len(opened))
        behavior = self._behavior(interactions, pairs, ids=opened.ids, train=train)
        # A checkpoint continues a run of equal settings on equal data alone.
        settings = {"kind": self.kind, **self.settings}
        key = run_key(settings, data_digest(scanned.digest, mass, behavior))
        with open_checkpoint(checkpoint, key=key, resume=resume) as store:
            context = FitContext(
                source=opened,
                train=opened if train.all() else opened.subset(train),
                held_out=None if train.all() else opened.subset(~train),
                inputs=getattr(opened, "inputs", (opened.dim,)),
                scan=scanned,
                weights=train_weights(mass, train),
                behavior=behavior,
                checkpoint=store,
                progress=progress,
            )
            details = self._fit(context)
        self._dim = opened.dim
        self.text_model = opened.text_model
        self._fingerprint_version = FORMAT_VERSION
        self.report = self._evaluate(opened, train, scanned, details, progress, started)
        return self

    @with_progress
    def fit_again(
        self,
        source: Any,
        *,
        warm_start: bool = True,
        weights: npt.ArrayLike | None = None,
        progress: ProgressArgument = None,
    ) -> Self:
        """Return a tokenizer of the same settings, fitted on a changed catalogue.

        Args:
            source: the catalogue now, as for `fit`.
            warm_start: start from these codebooks where `can_warm_start`; preprocessing stays as it
                is then, so that both generations share one space. Otherwise fit from scratch.
            weights: ``(items,)`` item weights.
            progress: callback that receives progress events.
        """
        again = type(self)(**self.get_params(deep=False))
        if warm_start and self.can_warm_start:
            again._start_from(self)
        return again.fit(source, weights=weights, progress=progress)

    def _evaluate(
        self,
        source: EmbeddingSource,
        train: npt.NDArray[np.bool_],
        scanned: InputScan,
        details: dict[str, Any],
        progress: Progress,
        started: float,
    ) -> FitReport:
        """Encode and decode every row once, and report the health of codes and errors."""
        counter = HealthCounter(self.codebook_sizes, scanned.mean)
        progress.start("evaluate", total=len(source))
        for block in self.encode_blocks(source):
            span = slice(block.start, block.start + len(block.x))
            self._count_block(counter, block, train[span], scanned.row_hashes[span])
            progress.step(len(block.x))
        return FitReport.of(
            counter.verdict(self.codebooks),
            items=len(source),
            trained_items=int(train.sum()),
            seconds=time.monotonic() - started,
            details=details,
        )

    def _count_block(
        self,
        counter: HealthCounter,
        block: EncodedBlock,
        train: npt.NDArray[np.bool_],
        row_hashes: npt.NDArray[np.uint64],
    ) -> None:
        counter.update(
            block.codes, block.x, self._decode_codes(block.codes),
            latent=self._latent_block(block.x), train=train, row_hashes=row_hashes,
        )  # fmt: skip

    def encode_blocks(
        self, source: EmbeddingSource, *, beam_width: int | None = None, first: int = 0
    ) -> Iterator[EncodedBlock]:
        """Encode in blocks from row ``first`` (a multiple of the block size), one at a time.

        Memory does not grow with the catalogue; rows before ``first`` are not read.

        Raises:
            EmbeddingError: for rows of another width, or with NaN or inf.
        """
        self._check_width(source)
        width = self.beam_width if beam_width is None else beam_width
        blocks = source.blocks(BLOCK_ROWS, first=first)
        for start, x in prefetched(blocks) if len(source) - first > BLOCK_ROWS else blocks:
            encoded = self._encode_block(x, width)
            yield EncodedBlock(start, x, encoded.codes, encoded.residual_norms)

    @with_progress
    def encode(
        self,
        source: Any,
        *,
        ids: Any = None,
        beam_width: int | None = None,
        progress: ProgressArgument = None,
    ) -> SemanticIds:
        """Give every row its codes; rows need not have been seen by `fit`.

        Args:
            source: embeddings ``(items, dim)`` as for `fit`, or the ``(dim,)`` vector of one item.
            ids: item ids for a source that has none.
            beam_width: partial codes kept per row; None takes the tokenizer's own.
            progress: callback that receives progress events.

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
        progress = progress or QuietProgress()
        progress.start("encode", total=len(opened))
        for block in self.encode_blocks(opened, beam_width=info.beam_width):
            span = slice(block.start, block.start + len(block.x))
            codes[span] = block.codes
            norms[span] = block.residual_norms
            progress.step(len(block.x))
        return SemanticIds(opened.ids, codes, norms, info)

    def codes_info(self, beam_width: int | None = None) -> CodesInfo:
        """Return the metadata of this tokenizer's ids.

        Raises:
            UsageError: if ``beam_width`` is below 1, or above 1 for parallel codebooks.
        """
        width = self.beam_width if beam_width is None else beam_width
        check_beam_width(width)
        if width > 1 and not (self.hierarchical and self.encodes_nearest):
            probable = f"{self.kind} takes the most probable code of each level, and has no beam"
            nearest = f"the codebooks of {self.kind} are parallel; each takes its nearest codeword"
            reason = probable if self.hierarchical else nearest
            raise UsageError(f"beam_width={width}: {reason}; leave --beam-width (beam_width) out")
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
        self._warn_of_other(source.text_model, source.label)

    def _checked(self, codes: Any) -> npt.NDArray[np.int64]:
        _ = self.dim
        if isinstance(codes, SemanticIds):
            codes.check_codebook(self.codebook_fingerprint)
            codes = codes.codes[:, : len(codes.info.model_sizes)]  # without an appended token
        return codes_within(codes, self.codebook_sizes)
