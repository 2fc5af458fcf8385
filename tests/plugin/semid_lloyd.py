"""Tokenizers of another package, learned by a few Lloyd iterations in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from semid import Tokenizer
from semid.options import MAX_BEAM, option
from semid.quantization.nearest import index_codebook
from semid.quantization.residual import ResidualCodes, dequantize, encode_residual
from semid.seeds import numpy_generator


@dataclass(kw_only=True, eq=False, repr=False)
class LloydTokenizer(Tokenizer):
    """Residual codebooks: rows drawn at random, moved to the means of their rows."""

    kind: ClassVar[str] = "lloyd"
    hierarchical: ClassVar[bool] = True
    combine: ClassVar[Literal["sum", "mean", "concat"]] = "sum"

    levels: int = option(3, ge=1, le=16, help="Codes per item.")
    codebook_size: int = option(16, ge=2, le=4096, help="Codewords per level.")
    beam_width: int = option(1, ge=1, le=MAX_BEAM, help="Beam width while encoding.")
    rounds: int = option(4, ge=1, le=100, help="Lloyd iterations per level.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._books: tuple[Any, ...] = ()

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (int(self.codebook_size),) * int(self.levels)

    def _fit(self, context: Any) -> dict[str, Any]:
        residual = np.concatenate([x for _, x in context.train.blocks(1024)])
        books = []
        for level in range(self.levels):
            books.append(self._fit_stage(context, level, residual))
            residual = residual - books[-1][_assign(residual, books[-1])]
        self._index(books)
        return {"rounds": self.rounds}

    def _fit_stage(self, context: Any, level: int, rows: Any) -> Any:
        mass = np.ones(len(rows)) if context.weights is None else context.weights
        arrays, _ = context.stage(
            f"level {level}",
            lambda store: self._fit_level(rows, mass, level, store, context.progress),
        )
        return arrays["codebook"]

    def _fit_level(self, rows: Any, mass: Any, level: int, store: Any, progress: Any) -> Any:
        generator = numpy_generator(self.seed, "lloyd", level)
        distinct = np.unique(rows, axis=0)
        start = generator.choice(len(distinct), self.codebook_size, replace=False)
        book, done = distinct[start], 0
        if store is not None and store.state is not None:
            book, done = store.state[0]["codebook"], store.state[1]["done"]
        for iteration in range(done, self.rounds):
            labels = _assign(rows, book)
            for code in np.unique(labels):
                book[code] = np.average(rows[labels == code], axis=0, weights=mass[labels == code])
            if store is not None:
                store.save({"codebook": book}, {"done": iteration + 1})
            progress.step(1, level=level, iteration=iteration)
        return {"codebook": book}, {}

    def _index(self, books: Any) -> None:
        self._books = tuple(
            index_codebook(torch.from_numpy(np.ascontiguousarray(book, np.float32)))
            for book in books
        )

    def _encode_block(self, x: Any, beam_width: int) -> ResidualCodes:
        return encode_residual(x, self._books, beam_width=beam_width, threads=self.threads)

    def _latent_block(self, x: Any) -> Any:
        return x

    def _decode_codes(self, codes: Any) -> Any:
        return dequantize(codes, self._codebooks())

    def _codebooks(self) -> tuple[Any, ...]:
        return tuple(book.codewords for book in self._books)

    def _tensors(self) -> dict[str, np.ndarray]:
        return {f"codebooks.{level}": book for level, book in enumerate(self._codebooks())}

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._index([tensors[f"codebooks.{level}"] for level in range(self.levels)])


@dataclass(kw_only=True, eq=False, repr=False)
class ProductTokenizer(LloydTokenizer):
    """A codebook for each part of the columns; the parts are nearly equally wide."""

    kind: ClassVar[str] = "lloyd-product"
    hierarchical: ClassVar[bool] = False
    combine: ClassVar[Literal["sum", "mean", "concat"]] = "concat"

    def _fit(self, context: Any) -> dict[str, Any]:
        rows = np.concatenate([x for _, x in context.train.blocks(1024)])
        parts = np.array_split(rows, self.levels, axis=1)
        self._index([self._fit_stage(context, level, part) for level, part in enumerate(parts)])
        return {"rounds": self.rounds}

    def _encode_block(self, x: Any, beam_width: int) -> ResidualCodes:
        parts = np.array_split(x, self.levels, axis=1)
        books = self._codebooks()
        codes = [_assign(part, book) for part, book in zip(parts, books, strict=True)]
        residual = x - self._decode_codes(np.stack(codes, axis=1))
        norms = np.linalg.norm(residual, axis=1).astype(np.float32)
        return ResidualCodes(np.stack(codes, axis=1), norms)

    def _decode_codes(self, codes: Any) -> Any:
        return self._quantize_codes(codes)

    def encoder_module(self) -> Any:
        return torch.nn.Identity()


def _assign(rows: Any, book: Any) -> Any:
    distances = ((rows[:, None].astype(np.float64) - book[None]) ** 2).sum(axis=2)
    return distances.argmin(axis=1)
