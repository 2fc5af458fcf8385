"""Codebooks that exist already, as a tokenizer: `from_codebooks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.data.blocks import MAX_NORM
from semid.data.source import EmbeddingSource
from semid.errors import UsageError, check_choice
from semid.options import option
from semid.quantization.blocks import Blocks, Preprocess, map_rows
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.nearest import assign
from semid.quantization.product import encode_product, part_slices
from semid.quantization.residual import ResidualCodes, encode_residual
from semid.tokenizers.codebooks import ResidualTokenizer, fit_levels
from semid.tokenizers.context import FitContext, Result
from semid.tokenizers.neural.autoencoder import Prepare, perceptron
from semid.tokenizers.product import fit_parts
from semid.tokenizers.stored import check_shapes
from semid.training.checkpoint import StateStore

Array = npt.NDArray[np.float32]

COMBINE = ("sum", "mean", "concat")
UNIT = Preprocess(normalize=True)


@dataclass(kw_only=True, eq=False, repr=False)
class Codebooks(ResidualTokenizer):
    """Codebooks of any origin, combined as said; `from_codebooks` makes one without a fit.

    With ``sum`` each level quantizes what the levels before left, with ``mean`` every codebook
    quantizes the whole latent, with ``concat`` columns of its own. `fit` runs K-means for them, and
    a refresh continues from the codebooks there are, behind the same preprocessing and map.

    Raises:
        UsageError: if a value is out of range, or options contradict each other.
    """

    kind: ClassVar[str] = "codebooks"
    can_warm_start: ClassVar[bool] = True

    combine: str = option(  # type: ignore[misc, assignment]
        "sum",
        choices=COMBINE,
        help="How codewords make a vector: residual levels (sum) or parallel codebooks.",
    )
    normalize_residuals: bool = option(
        False, help="Scale what a level quantizes to unit length, as GRID does; sum alone."
    )
    kmeans: KMeansOptions | Mapping[str, Any] | None = option(
        None, help="How K-means of the codebooks runs."
    )

    def __post_init__(self) -> None:
        """Start without codebooks, and without a map before them."""
        super().__post_init__()
        if self.beam_width > 1 and (self.combine != "sum" or self.normalize_residuals):
            raise UsageError(
                f"beam_width={self.beam_width} searches residual levels; leave it out with "
                "combine='mean' or 'concat', and with normalize_residuals"
            )
        if self.normalize_residuals and self.combine != "sum":
            raise UsageError("normalize_residuals is for residual levels: give combine='sum'")
        self._start: Self | None = None
        self._map: Array | None = None
        self._lift: Array | None = None
        self._offset: Array | None = None

    @property
    def hierarchical(self) -> bool:  # type: ignore[override]
        """Whether a shared prefix of codes means relatedness."""
        return self.combine == "sum"

    def _encoding_settings(self) -> dict[str, Any]:
        return {
            **super()._encoding_settings(),
            "combine": self.combine,
            "normalize_residuals": self.normalize_residuals,
        }

    def _start_from(self, previous: Self) -> None:
        self._start = previous

    # Fit -------------------------------------------------------------------------------------

    def _fit(self, context: FitContext) -> dict[str, Any]:
        init: Sequence[Array] | None = None
        if self.normalize_residuals:
            raise UsageError(
                "normalize_residuals is for codebooks that exist; to fit new ones leave it out"
            )
        if self._start is None:
            self._preprocess = Preprocess.fit(
                context.train, center=self.center, normalize=self.normalize
            )
            self._set_map(None, None)
        else:
            self._preprocess = self._start._preprocess
            self._set_map(self._start._map, self._start._offset)
            init = self._start.codebooks
        arrays, record = context.stage(
            "kmeans", lambda store: self._fit_books(context, context.train, init, store)
        )
        self._set_codebooks([arrays[f"codebooks.{i}"] for i in range(self.levels)])
        self._start = None
        return record

    def _fit_books(
        self,
        context: FitContext,
        source: EmbeddingSource,
        init: Sequence[Array] | None,
        store: StateStore | None,
    ) -> Result:
        rows: Blocks = self._preprocess.view(source)
        if self._map is not None:
            rows = map_rows(source, self._latent_block, self._map.shape[1])
        width = rows.dim
        options: dict[str, Any] = {
            "seed": self.seed,
            "options": self._resolved("kmeans"),
            "weights": context.weights,
            "init": init,
            "threads": self.threads,
            "store": store,
            "progress": context.progress,
        }
        if self.combine == "sum":
            books, levels = fit_levels(rows, self.codebook_sizes, **options)
            return {f"codebooks.{i}": book for i, book in enumerate(books)}, {"levels": levels}
        # With `mean` all codebooks quantize all columns and differ by their seeding alone.
        slices: Sequence[slice] = [slice(0, width)] * self.levels
        if self.combine == "concat":
            if self.levels > width:
                raise UsageError(
                    f"levels={self.levels} for latents of width {width}: a codebook needs a column "
                    f"at least; give {width} or less"
                )
            slices = part_slices(width, self.levels)
            if init is not None:
                # Given codebooks may cut the columns at other places than an even division does.
                slices = self._slices([book.shape[1] for book in init])
        return fit_parts(rows, slices, self.codebook_sizes, **options)

    @staticmethod
    def _slices(widths: Sequence[int]) -> list[slice]:
        ends = np.cumsum(widths).tolist()
        return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]

    # Rows to codes and back ------------------------------------------------------------------

    def _set_map(self, matrix: Array | None, offset: Array | None) -> None:
        """Put ``x @ matrix + offset`` between preprocessing and codebooks."""
        self._map, self._offset, self._lift = matrix, offset, None
        if matrix is not None:
            # For a rotation the pseudo-inverse is the transpose.
            inverse = np.linalg.pinv(matrix.astype(np.float64))
            self._lift = np.ascontiguousarray(inverse, dtype=np.float32)
            if offset is None:
                self._offset = np.zeros(matrix.shape[1], np.float32)

    def _latent_block(self, x: Array) -> Array:
        x = self._preprocess.apply(x)
        if self._map is None or self._offset is None:
            return x
        return perceptron(x, [(self._map, self._offset)], threads=self.threads)

    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        z = self._quantize_codes(codes)
        if self._lift is not None and self._offset is not None:
            no_bias = np.zeros(self._lift.shape[1], np.float32)
            # The pseudo-inverse undoes a rotation, and other maps by least squares.
            z = perceptron(z - self._offset, [(self._lift, no_bias)], threads=self.threads)
        return self._preprocess.invert(z)

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        z = self._latent_block(x)
        if self.combine == "sum" and not self.normalize_residuals:
            return encode_residual(
                z, self._codebook_index, beam_width=beam_width, threads=self.threads
            )
        if self.combine == "sum":
            codes, residual = np.empty((len(z), self.levels), np.int64), z
            for level, book in enumerate(self._codebook_index):
                # A level sees only the direction of what the levels before left.
                residual = UNIT.apply(residual)
                codes[:, level], _ = assign(residual, book, threads=self.threads)
                residual = residual - book.codewords[codes[:, level]]
        else:
            encoded = encode_product(
                z, self.latent_slices, self._codebook_index, threads=self.threads
            )
            if self.combine == "concat":
                return encoded
            codes = encoded.codes
        rest = z - self._quantize_codes(codes)
        norms = np.sqrt(np.einsum("nd,nd->n", rest, rest, dtype=np.float64))
        return ResidualCodes(codes, norms.astype(np.float32))

    def _refined_parts(self, dim: int) -> None:
        if self.normalize_residuals:
            raise UsageError(
                "these codebooks quantize residuals of unit length, which a refinement does not "
                "know; refine codebooks without normalize_residuals"
            )

    @property
    def has_encoder_module(self) -> bool:
        """Whether `encoder_module` works."""
        return not self.normalize_residuals

    def encoder_module(self) -> nn.Module:
        """Return preprocessing and map as a module that can be exported.

        Raises:
            NotFittedError: before `fit`.
            UsageError: with ``normalize_residuals``, which the exported search does not know.
        """
        _ = self.dim
        if not self.has_encoder_module:
            raise UsageError(
                "codebooks with normalize_residuals have no encoder graph: the exported search "
                "does not scale residuals"
            )
        prepare = Prepare(self._preprocess)
        if self._map is None or self._offset is None:
            return prepare
        return nn.Sequential(prepare, _Affine(self._map, self._offset))

    # Arrays ----------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = super()._tensors()
        if self._map is not None and self._offset is not None:
            tensors |= {"map": self._map, "offset": self._offset}
        return tensors

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        super()._set_tensors(tensors)
        width = self.latent_dim
        if "map" in tensors:
            check_shapes(tensors, {"map": (self._dim, width), "offset": (width,)})
            self._set_map(tensors["map"], tensors["offset"])
        elif width != self._dim:
            raise ValueError(f"codewords make vectors of width {width}, not {self._dim}")
        else:
            self._set_map(None, None)

    def _codeword_widths(self, tensors: Mapping[str, np.ndarray]) -> Sequence[int]:
        names = [f"codebooks.{i}" for i in range(self.levels)]
        check_shapes(tensors, {n: (size, None) for n, size in zip(names, self.codebook_sizes,
                                                                  strict=True)})  # fmt: skip
        widths = [tensors[name].shape[1] for name in names]
        if self.combine != "concat" and len(set(widths)) > 1:
            raise ValueError(f"codebooks of widths {widths} cannot be combined by {self.combine}")
        return widths


class _Affine(nn.Module):
    """Rows times a matrix, plus an offset."""

    def __init__(self, matrix: Array, offset: Array) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.from_numpy(matrix.copy()))
        self.register_buffer("offset", torch.from_numpy(offset.copy()))

    def forward(self, x: Tensor) -> Tensor:
        """Map rows ``(batch, dim)`` to ``(batch, latent)``."""
        return x @ self.get_buffer("matrix") + self.get_buffer("offset")


def _matrix(array: Any, name: str, *, ndim: int = 2) -> Array:
    if isinstance(array, torch.Tensor):
        array = array.detach().float().cpu().numpy()
    try:
        matrix = np.ascontiguousarray(array, dtype=np.float32)
    except (TypeError, ValueError):
        raise UsageError(f"{name} holds no numbers; give an array of floats") from None
    if matrix.ndim != ndim or 0 in matrix.shape:
        expected = "(codes, width)" if ndim == 2 else "(width,)"
        raise UsageError(f"{name} has shape {matrix.shape}; give {expected}")
    if not np.isfinite(matrix).all():
        raise UsageError(f"{name} holds NaN or infinite values; give finite numbers")
    longest = float(np.linalg.norm(matrix.astype(np.float64), axis=-1).max())
    if longest > MAX_NORM:
        raise UsageError(
            f"{name} holds a vector of length {longest:.3g}, above {MAX_NORM:g}, whose squared "
            "distances overflow float32; scale codebooks and embeddings down"
        )
    return matrix


def from_codebooks(
    arrays: Sequence[Any],
    *,
    combine: str = "sum",
    mean: Any = None,
    projection: Any = None,
    offset: Any = None,
    **settings: Any,
) -> Codebooks:
    """Return a tokenizer of codebooks that exist already; nothing is fitted.

    It encodes, decodes, saves and loads, and takes part in reports, comparison, unique ids,
    refresh and exports as every tokenizer does.

    Args:
        arrays: one ``(codes, width)`` array or tensor per level, in the order of the codes.
        combine: ``sum`` for residual levels, ``mean`` for codebooks that all quantize the same
            vector, ``concat`` for product codes, whose codebooks quantize columns side by side.
        mean: ``(dim,)`` subtracted from embeddings first, or None.
        projection: ``(dim, latent)`` matrix that (centered) embeddings are multiplied with before
            the codebooks, for example a rotation; None leaves them as they are.
        offset: ``(latent,)`` added after the projection.
        settings: ``normalize=True`` for rows that are scaled to unit length after centering,
            ``normalize_residuals``, ``beam_width``, ``kmeans`` (for a later refresh), ``threads``.

    Raises:
        UsageError: for arrays that are no codebooks, or of widths that do not fit each other.

    Example:
        >>> model = semid.from_codebooks([level_1, level_2, level_3], combine="sum")
    """
    check_choice("combine", combine, COMBINE)
    if isinstance(arrays, np.ndarray | torch.Tensor) and arrays.ndim == 3:
        arrays = list(arrays)
    if not isinstance(arrays, Sequence) or not len(arrays):
        raise UsageError("arrays holds no codebooks; give a list of (codes, width) arrays")
    books = [_matrix(book, f"arrays[{level}]") for level, book in enumerate(arrays)]
    widths = [book.shape[1] for book in books]
    if combine != "concat" and len(set(widths)) > 1:
        raise UsageError(
            f"codebooks of widths {widths} cannot be combined by {combine}; give arrays of one "
            "width, or combine='concat'"
        )
    latent = sum(widths) if combine == "concat" else widths[0]
    tensors = {f"codebooks.{level}": book for level, book in enumerate(books)}
    dim = latent
    if projection is not None:
        matrix = _matrix(projection, "projection")
        dim = matrix.shape[0]
        if matrix.shape[1] != latent:
            raise UsageError(
                f"projection has shape {matrix.shape}, and the codebooks are of width {latent}; "
                f"give (dim, {latent})"
            )
        tensors["map"] = matrix
    elif offset is not None:
        # An offset is part of the map, so without a projection the map is the identity.
        projection = np.eye(latent, dtype=np.float32)
        tensors["map"] = projection
    if "map" in tensors:
        zeros = np.zeros(latent, np.float32)
        tensors["offset"] = zeros if offset is None else _matrix(offset, "offset", ndim=1)
        if tensors["offset"].shape != (latent,):
            raise UsageError(f"offset has shape {tensors['offset'].shape}; give ({latent},)")
    if mean is not None:
        tensors["preprocess.mean"] = _matrix(mean, "mean", ndim=1)
        if tensors["preprocess.mean"].shape != (dim,):
            raise UsageError(f"mean has shape {tensors['preprocess.mean'].shape}; give ({dim},)")
    tokenizer = Codebooks(
        levels=len(books),
        codebook_size=[len(book) for book in books],
        combine=combine,
        center=mean is not None,
        **settings,
    )
    # The same way as for a stored artefact, so the same checks apply to these arrays.
    tokenizer._dim = dim
    tokenizer._set_tensors(tensors)
    return tokenizer
