"""Product quantization: a codebook for each part of the columns; with a rotation before it, OPQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.codes import MAX_CODEWORDS, MAX_LEVELS
from semid.errors import UsageError
from semid.options import option
from semid.progress import Progress, QuietProgress
from semid.quantization.blocks import Blocks, Preprocess, map_rows
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.product import ProductState, encode_product, fit_product, part_slices
from semid.quantization.residual import ResidualCodes
from semid.quantization.rotation import RotationState, fit_rotation
from semid.quantization.sharding import ShardedMatrix
from semid.tokenizers.codebooks import CodebookTokenizer, training_rows
from semid.tokenizers.context import FitContext, Result, level_sizes
from semid.tokenizers.neural.autoencoder import Prepare, perceptron
from semid.tokenizers.stored import check_shapes
from semid.training.checkpoint import Stages, StateStore

Array = npt.NDArray[np.float32]


@dataclass(kw_only=True, eq=False, repr=False)
class PQ(CodebookTokenizer):
    """Product quantization: columns are cut into parts, and each part has K-means codes of its own.

    Parts lie side by side and are as equally wide as the columns allow: where ``n_codebooks`` does
    not divide the width, the first parts are one column wider. Codes are parallel: none comes
    before another. Codewords that have no different rows to stand for stay dead, with a warning.

    Raises:
        UsageError: if a value is out of range; at `fit`, if there are more codebooks than columns.

    Source: Jégou, Douze, Schmid 2011. A fit reads the rows once per K-means iteration, all parts
    together: O(iterations items codes dim) time.
    """

    kind: ClassVar[str] = "pq"
    hierarchical: ClassVar[bool] = False
    combine: ClassVar[Literal["sum", "mean", "concat"]] = "concat"
    can_warm_start: ClassVar[bool] = True
    fits_shards: ClassVar[bool] = True

    n_codebooks: int = option(
        8, ge=1, le=MAX_LEVELS, help="Codes per item: parts that the columns are cut into."
    )
    codebook_size: int | Sequence[int] = option(
        256,
        ge=2,
        le=MAX_CODEWORDS,
        help="Codewords per codebook (2 to 2**32), or one number for each.",
    )
    kmeans: KMeansOptions | Mapping[str, Any] | None = option(
        None, nested={"n_local_trials": 1}, help="How K-means of the codebooks runs."
    )

    def __post_init__(self) -> None:
        """Start from scratch."""
        super().__post_init__()
        self._start: Self | None = None

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codewords of each codebook."""
        return level_sizes(self.n_codebooks, self.codebook_size, name="n_codebooks")

    def _start_from(self, previous: Self) -> None:
        self._start = previous

    def _parts(self, dim: int) -> tuple[slice, ...]:
        if self.n_codebooks > dim:
            raise UsageError(
                f"n_codebooks={self.n_codebooks} for embeddings of width {dim}: a codebook needs a "
                f"column at least; give {dim} or less"
            )
        return part_slices(dim, self.n_codebooks)

    def _fit(self, context: FitContext) -> dict[str, Any]:
        # Refuses more codebooks than columns before the first pass over the rows.
        self._parts(context.train.dim)
        rows = training_rows(context.train, weights=context.weights, threads=self.threads)
        return self._fit_stages(rows, context.stages, context.progress)

    def fit_rows(
        self,
        rows: ShardedMatrix,
        *,
        store: StateStore | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Learn the codebooks from training rows alone; see `Tokenizer.fit_rows`."""
        details = self._fit_stages(rows, Stages(store), progress or QuietProgress())
        levels: list[dict[str, Any]] = details["levels"]
        return levels

    def _fit_stages(
        self, rows: ShardedMatrix, stages: Stages, progress: Progress
    ) -> dict[str, Any]:
        slices = self._parts(rows.dim)
        if self._start is None:
            mean = rows.mean().astype(np.float32) if self.center else None
            self._preprocess = Preprocess(mean=mean, normalize=self.normalize)
        else:
            # The former preprocessing and rotation: both generations share one space.
            self._preprocess = self._start._preprocess
        rows.preprocess(self._preprocess)
        details, init = self._fit_space(rows, slices, stages, progress)
        arrays, record = stages.run(
            "kmeans",
            lambda store: fit_parts(
                rows,
                slices,
                self.codebook_sizes,
                store=store,
                progress=progress,
                seed=self.seed,
                options=self._resolved("kmeans"),
                init=init,
                threads=self.threads,
            ),
        )
        self._set_codebooks([arrays[f"codebooks.{i}"] for i in range(self.levels)])
        self._dim, self._start = rows.dim, None
        return {**details, **record}

    def _fit_space(
        self, rows: ShardedMatrix, slices: Sequence[slice], stages: Stages, progress: Progress
    ) -> tuple[dict[str, Any], Sequence[Array] | None]:
        """Fit what comes before the codebooks; return details, and codebooks to start from."""
        return {}, None if self._start is None else self._start.codebooks

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        z = self._latent_block(x)
        slices = part_slices(z.shape[1], self.levels)
        return encode_product(z, slices, self._codebook_index, threads=self.threads)

    def encoder_module(self) -> nn.Module:
        """Return the preprocessing of rows as a module, see `Tokenizer.encoder_module`."""
        _ = self.dim
        return Prepare(self._preprocess)


@dataclass(kw_only=True, eq=False, repr=False)
class OPQ(PQ):
    """Product quantization after a rotation that is learned to lower the error.

    The rotation starts at the principal components, shared out among the parts so that each carries
    an equal product of variances; then codes and rotation take turns (non-parametric OPQ). It is
    orthogonal, so distances stay as they are. A refresh keeps the rotation.

    Raises:
        UsageError: if a value is out of range; at `fit`, if there are more codebooks than columns.

    Source: Ge, He, Ke, Sun 2013, sections 4.1 and 4.2. Beyond `PQ`: O(items dim^2 + dim^3) per
    alternation, in one pass.
    """

    kind: ClassVar[str] = "opq"

    rotation_iter: int = option(
        20, ge=0, help="Alternations of codes and rotation; 0 keeps the principal components."
    )

    def __post_init__(self) -> None:
        """Start without a rotation."""
        super().__post_init__()
        self._rotation: Array = np.empty((0, 0), np.float32)

    def _kernels(self) -> set[str]:
        return super()._kernels() | {"dense"}

    @property
    def rotation(self) -> Array:
        """The orthogonal matrix ``(dim, dim)`` that preprocessed rows are multiplied with."""
        _ = self.dim
        return self._rotation

    def _fit_space(
        self, rows: ShardedMatrix, slices: Sequence[slice], stages: Stages, progress: Progress
    ) -> tuple[dict[str, Any], Sequence[Array] | None]:
        if self._start is not None:
            # A refresh keeps the rotation, so that old and new codewords can be compared.
            self._rotation = self._start._rotation
            rows.preprocess(RotateRows(self._rotation))
            return {}, self._start.codebooks

        def run(store: StateStore | None) -> Result:
            progress.start("rotation", total=self.rotation_iter)

            def on_iteration(state: RotationState) -> None:
                if store is not None:
                    store.save(*_rotation_state(state))
                progress.step(1, error=state.error[-1])

            saved = None if store is None else store.state
            state = None
            if saved is not None:
                books = [saved[0][f"codebooks.{i}"] for i in range(self.levels)]
                state = RotationState(
                    saved[1]["iteration"], saved[0]["rotation"], books, saved[1]["error"]
                )
            return _rotation_state(
                fit_rotation(
                    rows,
                    slices,
                    self.codebook_sizes,
                    rotate=rotate_rows,
                    iterations=self.rotation_iter,
                    seed=self.seed,
                    options=self._resolved("kmeans"),
                    threads=self.threads,
                    state=state,
                    on_iteration=on_iteration,
                )
            )

        arrays, record = stages.run("rotation", run)
        self._rotation = arrays["rotation"]
        rows.preprocess(RotateRows(self._rotation))
        # The codebooks of the last alternation fit the rotation: K-means starts from them.
        init = [arrays[f"codebooks.{i}"] for i in range(self.levels)]
        return {"rotation": {"error": record["error"]}}, init

    def _latent_block(self, x: Array) -> Array:
        return rotate_rows(super()._latent_block(x), self._rotation, self.threads)

    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        # The inverse of an orthogonal matrix is its transpose.
        back = np.ascontiguousarray(self._rotation.T)
        return self._preprocess.invert(rotate_rows(self._quantize_codes(codes), back, self.threads))

    def _tensors(self) -> dict[str, np.ndarray]:
        return {**super()._tensors(), "rotation": self._rotation}

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        super()._set_tensors(tensors)
        check_shapes(tensors, {"rotation": (self._dim, self._dim)})
        self._rotation = tensors["rotation"]

    def encoder_module(self) -> nn.Module:
        """Return preprocessing and rotation of rows ``(n, dim)`` as a module for export.

        Raises:
            NotFittedError: before `fit`.
        """
        return nn.Sequential(super().encoder_module(), Rotate(self._rotation))


def rotate_rows(x: Array, rotation: Array, threads: int | None) -> Array:
    """Return rows ``(n, dim)`` times a rotation; each depends on its row alone."""
    return perceptron(x, [(rotation, np.zeros(rotation.shape[1], np.float32))], threads=threads)


@dataclass(frozen=True)
class RotateRows:
    """A rotation ``(dim, dim)`` as a view on rows."""

    rotation: Array

    def view(self, blocks: Blocks) -> Blocks:
        """Return a view of rotated rows."""
        return map_rows(blocks, lambda x: rotate_rows(x, self.rotation, None), blocks.dim)


class Rotate(nn.Module):
    """Rows times a matrix."""

    def __init__(self, rotation: Array) -> None:
        super().__init__()
        self.register_buffer("rotation", torch.from_numpy(rotation.copy()))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate rows ``(batch, dim)``."""
        return x @ self.get_buffer("rotation")


def fit_parts(
    rows: Blocks | ShardedMatrix,
    slices: Sequence[slice],
    sizes: Sequence[int],
    *,
    store: StateStore | None,
    progress: Progress,
    **options: Any,
) -> Result:
    """Fit parallel codebooks from where the store left off; further options are `fit_product`'s."""
    progress.start(f"{len(sizes)} codebooks", total=None)

    def on_iteration(state: ProductState) -> None:
        if store is not None:
            store.save(*_product_state(state))
        inertia = sum(history[-1] for history in state.inertia)
        progress.step(1, restart=state.restart, inertia=inertia)

    books, fits = fit_product(
        rows,
        slices,
        sizes,
        state=None if store is None or store.state is None else _restored(*store.state),
        on_iteration=on_iteration,
        **options,
    )
    arrays = {f"codebooks.{i}": book for i, book in enumerate(books)}
    return arrays, {"levels": [asdict(fit) for fit in fits]}


# States in a checkpoint: arrays by name and a JSON-able record ----------------------------------


def _product_state(state: ProductState) -> Result:
    arrays = {f"book.{i}": book for i, book in enumerate(state.books)}
    arrays |= {f"best.{i}": book for i, book in enumerate(state.best_books)}
    return arrays, {
        "restart": state.restart,
        "iteration": state.iteration,
        "inertia": state.inertia,
        "best_inertia": state.best_inertia,
    }


def _restored(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> ProductState:
    def books(name: str) -> list[Array]:
        count = sum(key.startswith(f"{name}.") for key in arrays)
        return [arrays[f"{name}.{i}"] for i in range(count)]

    return ProductState(**record, books=books("book"), best_books=books("best"))


def _rotation_state(state: RotationState) -> Result:
    arrays = {f"codebooks.{i}": book for i, book in enumerate(state.books)}
    record = {"iteration": state.iteration, "error": state.error}
    return {**arrays, "rotation": state.rotation}, record
