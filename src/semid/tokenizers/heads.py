"""Decode heads: tables from codes to any target, fitted by least squares.

The codebooks that encode need not be those that decode. A head changes no code: it sums one row per
level (or parallel codebook) of tables of its own, in the input space, a behavior space, or the
space of another model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.artefact import read_artefact, write_artefact
from semid.codes import SemanticIds
from semid.data.embeddings import open_embeddings
from semid.data.ids import held_out_mask
from semid.documents import checked
from semid.errors import InputError, UsageError
from semid.hub import Publishable
from semid.quantization.least_squares import fit_tables
from semid.quantization.residual import dequantize
from semid.tokenizers.context import codes_within, level_sizes
from semid.tokenizers.stored import check_shapes, described

Array = npt.NDArray[np.float32]
KIND = "head"
ROWS = 65_536
SALT = "semid/heads"
"""Which items choose the ridge; other items than those a tokenizer holds out."""

CONFIG: dict[str, Any] = {
    "codebook_fingerprint": str,
    "ridge": float,
    "error": float | None,
    "levels": int,
}
"""What the config of a head holds."""


@dataclass(frozen=True)
class DecodeHead(Publishable):
    """Tables whose rows, summed by an item's codes, predict a target.

    Attributes:
        tables: one ``(codes, width)`` float32 per level.
        codebook_fingerprint: of the tokenizer whose codes it reads.
        ridge: the ridge of least held-out error.
        error: relative error ``sum |y - f|^2 / sum |y - mean|^2`` on held-out items; None without.
    """

    tables: tuple[Array, ...]
    codebook_fingerprint: str
    ridge: float
    error: float | None

    @classmethod
    def fit(
        cls,
        ids: SemanticIds,
        targets: Any,
        *,
        ridges: Sequence[float] = (0.3, 1.0, 3.0, 10.0, 30.0),
        validation_fraction: float = 0.05,
        threads: int | None = None,
    ) -> DecodeHead:
        """Fit tables from codes to targets.

        Args:
            ids: codes of the items.
            targets: ``(items, width)``, in the order of ``ids``: anything `semid.open_embeddings`
                reads.
            ridges: ridges (> 0) to choose from on held-out items, in items of mean target per row
                of a table.
            validation_fraction: share of items held out by a hash of their id, in [0, 1); 0 takes
                the middle ridge.
            threads: number of CPU threads.

        Returns:
            The head with the ridge of least held-out error.

        Raises:
            InputError: another number of targets than ids.
            UsageError: a ridge or the fraction is out of range.

        Cost: one pass over the items, and conjugate gradients per ridge over the pairs of codes
        that meet. Source: ours.
        """
        if not ridges or min(ridges) <= 0 or not 0 <= validation_fraction < 1:
            raise UsageError(
                f"ridges={tuple(ridges)}, validation_fraction={validation_fraction}: give ridges "
                "above 0 and a share in [0, 1)"
            )
        source = open_embeddings(targets)
        if len(source) != len(ids):
            raise InputError(
                f"{len(source)} targets for {len(ids)} items; give one row per item, in the order "
                "of the ids"
            )
        # An appended token says nothing of the item.
        codes = ids.codes[:, : len(ids.info.model_sizes)]
        held_out = held_out_mask(ids.items, validation_fraction, salt=SALT)

        # Targets are read in spans of at most `ROWS` rows, so that they need not fit in memory.
        def spans(rows: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.integer], Array]]:
            for span in np.array_split(rows, len(rows) // ROWS + 1):
                yield codes[span], source.rows(span)

        fit = fit_tables(
            spans(np.flatnonzero(~held_out)),
            ids.info.model_sizes,
            source.dim,
            # A function, because the held-out rows are read once for each ridge.
            held_out=(lambda: spans(np.flatnonzero(held_out))) if held_out.any() else None,
            ridges=ridges,
            threads=threads,
        )
        return cls(fit.tables, ids.info.codebook_fingerprint, fit.ridge, fit.error)

    def predict(self, codes: SemanticIds | npt.NDArray[np.integer]) -> Array:
        """Return ``(n, width)`` float32 for codes ``(n, levels)``.

        Raises:
            FingerprintError: for ids of another codebook.
            InputError: for a wrong shape or codes out of range.
        """
        if isinstance(codes, SemanticIds):
            codes.check_codebook(self.codebook_fingerprint)
            codes = codes.codes[:, : len(self.tables)]
        sizes = [len(table) for table in self.tables]
        return dequantize(codes_within(codes, sizes), self.tables)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the head to a folder.

        Raises:
            OutputExistsError: if it exists and ``overwrite`` is not set.
        """
        return write_artefact(
            path,
            config={
                "kind": KIND,
                "codebook_fingerprint": self.codebook_fingerprint,
                "ridge": self.ridge,
                "error": self.error,
                "levels": len(self.tables),
            },
            tensors={f"tables.{level}": table for level, table in enumerate(self.tables)},
            card=(
                "# Decode head\n\nTables from codes to vectors of width "
                f"{self.tables[0].shape[1]}, for codebook `{self.codebook_fingerprint[:12]}`. "
                "Open with `semid.load`.\n"
            ),
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DecodeHead:
        """Read a head that `save` wrote.

        Raises:
            ArtefactError: if there is none.
        """
        config, tensors = read_artefact(path, kind=KIND)
        with described(path, "decode head"):
            checked(CONFIG, {n: config[n] for n in CONFIG}, "config.json")
            # The number of levels is checked before as many names are made.
            levels = level_sizes(config["levels"], 2)
            names = [f"tables.{level}" for level, _ in enumerate(levels)]
            width = tensors[names[0]].shape[-1]
            check_shapes(tensors, dict.fromkeys(names, (None, width)))
        tables = tuple(tensors[name] for name in names)
        return cls(tables, config["codebook_fingerprint"], config["ridge"], config["error"])
