"""RQ-GMM: residual Gaussian mixtures, fitted softly, assigned by the highest posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from semid.lazy import torch
from semid.options import option
from semid.progress import Progress, QuietProgress
from semid.quantization.blocks import Preprocess
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.mixture import (
    COVARIANCES,
    HardAssignment,
    Mixture,
    MixtureState,
    MostProbable,
    fit_mixture,
    hard_start,
)
from semid.quantization.residual import ResidualCodes
from semid.quantization.sharding import ShardedMatrix
from semid.seeds import child_seed
from semid.tokenizers.base import Weights
from semid.tokenizers.codebooks import LevelTokenizer, fit_levels, training_rows
from semid.tokenizers.context import FitContext, Result
from semid.tokenizers.stored import check_shapes
from semid.training.checkpoint import Stages, StateStore

Array = npt.NDArray[np.float32]

LEAST_FLOOR = 1e-12
"""Least floor, as a share of the first level's variance: a level may leave nothing of the rows."""


@dataclass(kw_only=True, eq=False, repr=False)
class RQGMM(LevelTokenizer):
    """Residual quantization by Gaussian mixtures: each level knows how far each code reaches.

    A level starts from K-means and is fitted by expectation maximization, in which every row
    belongs to all components by their posterior. ``encode`` takes the component of highest
    posterior, ``log w_k + log N(r; m_k, S_k)``, which need not be the nearest mean; the next level
    gets ``r - m_k``. Use it where noise differs between columns or clusters differ in size and
    spread, which K-means takes for equal.

    ``variance_floor`` times the mean variance of a level's rows is added to every variance, so that
    no covariance is singular.

    Raises:
        UsageError: if a value is out of range.

    Source: RQ-GMM, arXiv 2602.12593; the floor, and residuals of hard assignments also in training,
    are ours. An iteration costs two to four products of ``items x codes x dim`` per level.
    """

    kind: ClassVar[str] = "rqgmm"
    encodes_nearest: ClassVar[bool] = False
    fits_shards: ClassVar[bool] = True

    covariance: str = option(
        "diagonal",
        choices=COVARIANCES,
        help="diagonal: a variance per column and code; spherical: one per code.",
    )
    max_em_iter: int = option(20, ge=1, help="Maximum iterations of the mixture per level.")
    em_tol: float = option(
        1e-3, ge=0, le=1e6, help="Stop when the mean log-likelihood per row rises by less (nats)."
    )
    variance_floor: float = option(
        0.05, gt=0, le=1, help="Added to every variance, as a share of the level's mean variance."
    )
    kmeans: KMeansOptions | Mapping[str, Any] | None = option(
        None, help="How K-means starts each level."
    )

    def __post_init__(self) -> None:
        """Start without mixtures."""
        super().__post_init__()
        self._mixtures: tuple[Mixture, ...] = ()
        self._assignments: tuple[HardAssignment, ...] = ()

    def _kernels(self) -> set[str]:
        return super()._kernels() | {"lists"}

    def _fit(self, context: FitContext) -> dict[str, Any]:
        rows = training_rows(context.train, weights=context.weights, threads=self.threads)
        return {"levels": self._fit_stages(rows, context.stages, context.progress)}

    def fit_rows(
        self,
        rows: ShardedMatrix,
        *,
        store: StateStore | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Learn the mixtures from training rows alone; see `Tokenizer.fit_rows`."""
        return self._fit_stages(rows, Stages(store), progress or QuietProgress())

    def _fit_stages(
        self, rows: ShardedMatrix, stages: Stages, progress: Progress
    ) -> list[dict[str, Any]]:
        mean = rows.mean().astype(np.float32) if self.center else None
        self._preprocess = Preprocess(mean=mean, normalize=self.normalize)
        rows.preprocess(self._preprocess)
        mixtures: list[Mixture] = []
        details: list[dict[str, Any]] = []
        first_variance = 0.0
        for level in range(self.levels):
            # 1. What hard codes of the levels before leave, as in `encode`.
            if level:
                rows.subtract_codewords(mixtures[-1].means, MostProbable(mixtures[-1]))
            variance = rows.variance()
            first_variance = first_variance or variance
            # The floor follows the level: residuals have less variance than the level before.
            floor = max(self.variance_floor * variance, LEAST_FLOOR * first_variance)
            # 2. K-means, then the mixture from where it ended.
            start, record = stages.run(
                f"start {level}", partial(self._start, rows, level, progress)
            )
            fitted, figures = stages.run(
                f"mixture {level}", partial(self._mix, rows, start["codebook"], floor, progress)
            )
            mixtures.append(Mixture(**fitted))
            details.append({**record["kmeans"], **figures, "floor": floor})
        self._dim = rows.dim
        self._set_mixtures(mixtures)
        return details

    def _start(
        self, rows: ShardedMatrix, level: int, progress: Progress, store: StateStore | None
    ) -> Result:
        """Cluster a level's rows by K-means."""
        books, fits = fit_levels(
            rows,
            [self.codebook_sizes[level]],
            seed=child_seed(self.seed, "level", level),
            options=KMeansOptions.of(self.kmeans),
            threads=self.threads,
            store=store,
            progress=progress,
        )
        return {"codebook": books[0]}, {"kmeans": fits[0]}

    def _mix(
        self, rows: ShardedMatrix, codebook: Array, floor: float, progress: Progress,
        store: StateStore | None,
    ) -> Result:  # fmt: skip
        """Fit a level's mixture from the clusters of K-means."""
        progress.start("mixture", total=None)
        state: MixtureState | None = None
        if store is not None and store.state is not None:
            arrays, record = store.state
            state = MixtureState(Mixture(**arrays), list(record["history"]))

        def on_iteration(run: MixtureState) -> None:
            if store is not None:
                store.save(vars(run.mixture), {"history": run.history})
            progress.step(1, log_likelihood=run.history[-1])

        # A continued run has its mixture already and needs no pass for the start.
        start = (
            hard_start(rows, codebook, covariance=self.covariance, floor=floor)
            if state is None
            else state.mixture
        )
        run = fit_mixture(
            rows,
            start,
            floor=floor,
            max_iter=self.max_em_iter,
            tol=self.em_tol,
            state=state,
            on_iteration=on_iteration,
        )
        record = {"log_likelihood": run.history[-1], "mixture_iterations": len(run.history)}
        return dict(vars(run.mixture)), record

    def _set_mixtures(self, mixtures: Sequence[Mixture]) -> None:
        self._mixtures = tuple(mixtures)
        self._assignments = tuple(HardAssignment(mixture) for mixture in mixtures)
        self._set_codebooks([mixture.means for mixture in mixtures])

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        residual = self._latent_block(x)
        codes = np.empty((len(x), self.levels), dtype=np.int64)
        for level, (assignment, mixture) in enumerate(
            zip(self._assignments, self._mixtures, strict=True)
        ):
            codes[:, level] = assignment(residual, threads=self.threads)
            # Residuals of hard assignments, as in training.
            residual = residual - mixture.means[codes[:, level]]
        return ResidualCodes.of(codes, residual)

    def encoder_module(self) -> torch.nn.Module:
        """Return the preprocessing of rows as a module, see `Tokenizer.encoder_module`."""
        _ = self.dim
        from semid.tokenizers.neural.autoencoder import Prepare

        return Prepare(self._preprocess)

    def score_terms(self, level: int) -> tuple[Weights, Weights, Weights]:
        """Return what a row's code of a level is searched by, see `Tokenizer.score_terms`."""
        # Minus twice the log density turns the largest posterior into the least score.
        linear, precisions, offset = self._mixtures[level].terms()
        return linear, precisions, -2.0 * offset

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = super()._tensors()
        for level, mixture in enumerate(self._mixtures):
            tensors[f"variances.{level}"] = mixture.variances
            tensors[f"log_weights.{level}"] = mixture.log_weights
        return tensors

    def _code_tensors(self, level: int) -> Sequence[str]:
        return [f"{name}.{level}" for name in ("codebooks", "variances", "log_weights")]

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        columns = self._dim if self.covariance == "diagonal" else 1
        shapes: dict[str, tuple[int | None, ...]] = {}
        for level, size in enumerate(self.codebook_sizes):
            shapes[f"variances.{level}"] = (size, columns)
            shapes[f"log_weights.{level}"] = (size,)
        check_shapes(tensors, shapes)
        super()._set_tensors(tensors)
        for level in range(self.levels):
            if not (tensors[f"variances.{level}"] > 0).all():
                raise ValueError(f"variances.{level} holds values that are not above 0")
        self._set_mixtures(
            [
                Mixture(book, tensors[f"variances.{level}"], tensors[f"log_weights.{level}"])
                for level, book in enumerate(self._codebooks())
            ]
        )
