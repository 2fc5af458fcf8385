"""RQ-KMeans: K-means on the embeddings, then on what each level leaves (DRQ §4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from semid.lazy import torch
from semid.options import option
from semid.progress import Progress, QuietProgress
from semid.quantization.balance import BalanceOptions, spread_offsets
from semid.quantization.blocks import Blocks, Preprocess
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.refine import ColumnGroup
from semid.quantization.residual import encode_residual
from semid.quantization.sharding import ShardedMatrix
from semid.tokenizers.base import Weights
from semid.tokenizers.codebooks import ResidualTokenizer, fit_levels, training_rows
from semid.tokenizers.context import FitContext
from semid.training.checkpoint import StateStore

Array = npt.NDArray[np.float32]


@dataclass(kw_only=True, eq=False, repr=False)
class RQKMeans(ResidualTokenizer):
    """Residual K-means, no network: deterministic, quick, and hard to beat on reconstruction.

    A beam of 5 lowers the error by a few per cent at 5 times the cost of encoding.

    Raises:
        UsageError: if a value is out of range.

    Source: DRQ §4.2 (hierarchical K-means). A fit costs ``levels`` times K-means over the rows
    trained on: O(iterations items codes dim) time per level.
    """

    kind: ClassVar[str] = "rqkmeans"
    can_warm_start: ClassVar[bool] = True
    fits_shards: ClassVar[bool] = True

    kmeans: KMeansOptions | Mapping[str, Any] | None = option(
        None, help="How K-means runs at each level."
    )

    train_with_beam: bool = option(
        False,
        help="Fit each level on the residuals of all partial codes that the beam keeps, not of "
        "greedy codes alone.",
    )

    balance: BalanceOptions | Mapping[str, Any] | None = option(
        None, help="Even out how many items take each codeword; off by default."
    )

    def _problems(self) -> list[str]:
        if self._balance_options and self.train_with_beam:
            return ["balance and train_with_beam exclude each other: give one of them"]
        if self._balance_options and KMeansOptions.of(self.kmeans).sample_per_code is not None:
            return ["balance counts all rows; leave --sample-per-code (sample_per_code) out"]
        if self.train_with_beam and self.beam_width == 1:
            return [
                "train_with_beam=True and beam_width=1: codes are greedy then; give --beam-width "
                "(beam_width) of 2 or more, such as 5"
            ]
        return []

    def __post_init__(self) -> None:
        """Start from scratch."""
        super().__post_init__()
        self._start: tuple[Array, ...] | None = None

    def _kernels(self) -> set[str]:
        return super()._kernels() | ({"lists"} if self.train_with_beam else set())

    def _fit(self, context: FitContext) -> dict[str, Any]:
        rows = training_rows(context.train, weights=context.weights, threads=self.threads)
        warm = self._start is not None
        # A checkpoint belongs to a fit from scratch: its key does not name the former codebooks.
        store = None if warm else context.checkpoint
        levels = self.fit_rows(rows, store=store, progress=context.progress)
        details: dict[str, Any] = {"levels": levels} | ({"warm_start": True} if warm else {})
        if self._balance_options is not None:
            details["balance"] = self._measure_balance(context.train, context.weights)
            for record, fit in zip(details["balance"], levels, strict=True):
                before = fit["inertia"] / record.pop("mass")
                error = record["mean_squared_error"]
                record |= {"kmeans": before, "price": error / before - 1 if before else 0.0}
        return details

    @property
    def _balance_options(self) -> BalanceOptions | None:
        options = BalanceOptions.of(self.balance)
        return None if options.mode == "off" else options

    def _measure_balance(self, train: Blocks, weights: Weights | None) -> list[dict[str, Any]]:
        """Return the error of greedy codes after each level, and its largest code over the mean."""
        errors, mass = np.zeros(self.levels), 0.0
        sizes = [np.zeros(size) for size in self.codebook_sizes]
        for start, x in train.blocks():
            residual = self._latent_block(x)
            weight = np.ones(len(x)) if weights is None else weights[start : start + len(x)]
            mass += float(weight.sum())
            codes = encode_residual(residual, self._codebook_index, threads=self.threads).codes
            for level, book in enumerate(self._codebooks()):
                residual = residual - book[codes[:, level]]
                squared = np.square(residual[:, : self.dim], dtype=np.float64).sum(axis=1)
                errors[level] += float((squared * weight).sum())
                sizes[level] += np.bincount(codes[:, level], minlength=len(book))
        return [
            {
                "mean_squared_error": float(error / mass),
                "largest_over_mean": float(size.max() / size.mean()),
                "mass": mass,
            }
            for error, size in zip(errors, sizes, strict=True)
        ]

    def _refined_parts(self, dim: int) -> list[ColumnGroup] | None:
        # Offsets are no part of what is fitted.
        return None if self._balance_options is None else [ColumnGroup(slice(0, dim), self.levels)]

    def _refit_decoder(
        self, train: Blocks, held_out: Blocks | None, *, weights: Weights | None
    ) -> dict[str, Any]:
        if self._balance_options is None:
            return {}
        records = self._measure_balance(train, weights)
        return {"balance": [{k: v for k, v in each.items() if k != "mass"} for each in records]}

    def _codeword_width(self, tensors: Mapping[str, np.ndarray]) -> int:
        return self.dim + (0 if self._balance_options is None else self.levels)

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        super()._set_tensors(tensors)
        self._preprocess.padding = 0 if self._balance_options is None else self.levels

    def fit_rows(
        self,
        rows: ShardedMatrix,
        *,
        store: StateStore | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Learn the codebooks from training rows alone; see `Tokenizer.fit_rows`."""
        preprocess = self._preprocess  # a warm start continues in the space of the former fit
        if self._start is None:
            mean = rows.mean().astype(np.float32) if self.center else None
            preprocess = Preprocess(mean=mean, normalize=self.normalize)
        rows.preprocess(preprocess)
        books, levels = fit_levels(
            rows,
            self.codebook_sizes,
            seed=self.seed,
            options=KMeansOptions.of(self.kmeans),
            weights=None,  # the rows bring theirs
            init=self._start,
            beam_width=self.beam_width if self.train_with_beam else 1,
            balance=self._balance_options,
            threads=self.threads,
            store=store,
            progress=progress or QuietProgress(),
        )
        self._preprocess, self._dim, self._start = preprocess, rows.dim, None
        if self._balance_options is not None:
            books = spread_offsets(books)
            preprocess.padding = self.levels
        self._set_codebooks(books)
        return levels

    def _start_from(self, previous: Self) -> None:
        mean = previous._preprocess.mean
        self._preprocess = Preprocess(mean=mean, normalize=self.normalize)
        self._start = tuple(book[:, : previous.dim].copy() for book in previous.codebooks)

    def encoder_module(self) -> torch.nn.Module:
        """Return the preprocessing of rows as a module, see `Tokenizer.encoder_module`."""
        _ = self.dim
        from semid.tokenizers.neural.autoencoder import Prepare

        return Prepare(self._preprocess)
