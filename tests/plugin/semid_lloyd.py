"""A tokenizer of another package: residual levels learned by a few Lloyd iterations in numpy."""

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
        mass = np.ones(len(residual)) if context.weights is None else context.weights
        books = []
        for level in range(self.levels):

            def run(store: Any, level: int = level, rows: Any = residual) -> Any:
                return self._fit_level(rows, mass, level, store, context.progress)

            arrays, _ = context.stage(f"level {level}", run)
            books.append(arrays["codebook"])
            residual = residual - books[-1][_assign(residual, books[-1])]
        self._index(books)
        return {"rounds": self.rounds}

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
        return tuple(book.codewords.numpy() for book in self._books)

    def _tensors(self) -> dict[str, np.ndarray]:
        return {f"codebooks.{level}": book for level, book in enumerate(self._codebooks())}

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._index([tensors[f"codebooks.{level}"] for level in range(self.levels)])


def _assign(rows: Any, book: Any) -> Any:
    distances = ((rows[:, None].astype(np.float64) - book[None]) ** 2).sum(axis=2)
    return distances.argmin(axis=1)
