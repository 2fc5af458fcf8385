"""Semantic IDs: which item has which codes, and which codebook they belong to.

Parquet columns: ``item_id`` (its original type), ``codes`` FixedSizeList<uint16>[levels] (uint32
where a codebook is larger than 65,536) and ``residual_norm``. The schema metadata carries the
fingerprints, so codes cannot be read with the wrong codebook unnoticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.artefact import FORMAT_VERSION, atomic_file
from semid.data.ids import ItemIds
from semid.errors import ArtefactError, FingerprintError, IdsError, InputError, UsageError

__all__ = ["CodesInfo", "SemanticIds", "code_dtype", "ids_schema", "ids_table"]

METADATA_KEY = b"semid"


def code_dtype(codebook_sizes: Sequence[int]) -> np.dtype[Any]:
    """Return uint16, or uint32 if any codebook has more than 65,536 codewords."""
    return np.dtype(np.uint16 if max(codebook_sizes) <= 65_536 else np.uint32)


@dataclass(frozen=True, kw_only=True)
class CodesInfo:
    """Where codes come from.

    Attributes:
        tokenizer: kind of the tokenizer, for example ``rqkmeans``.
        codebook_sizes: codewords of each level.
        hierarchical: whether a shared prefix means relatedness (residual tokenizers).
        codebook_fingerprint: SHA-256 of the codebooks.
        weights_fingerprint: SHA-256 of all weights.
        beam_width: beam the codes were chosen with; 1 is greedy.
    """

    tokenizer: str
    codebook_sizes: tuple[int, ...]
    hierarchical: bool
    codebook_fingerprint: str
    weights_fingerprint: str
    beam_width: int = 1

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return the Parquet schema metadata that carries this."""
        document = {"format_version": FORMAT_VERSION, **asdict(self)}
        return {METADATA_KEY: json.dumps(document).encode()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, *, path: object) -> CodesInfo:
        """Read what `to_metadata` wrote.

        Raises:
            ArtefactError: if it is absent, unreadable or of a newer format.
        """
        try:
            document = json.loads((metadata or {})[METADATA_KEY])
            version = document.pop("format_version")
            document["codebook_sizes"] = tuple(document["codebook_sizes"])
            info = cls(**document)
        except (KeyError, ValueError, TypeError):
            raise ArtefactError(
                f"'{path}' carries no semid fingerprint in its schema; "
                "give a file written by 'semid encode' or SemanticIds.write()"
            ) from None
        if version > FORMAT_VERSION:
            raise ArtefactError(
                f"'{path}' has format version {version}, this semid reads up to {FORMAT_VERSION}; "
                "upgrade with: pip install -U semid"
            )
        return info


def ids_schema(item_type: pa.DataType, info: CodesInfo) -> pa.Schema:
    """Return the Parquet schema of Semantic IDs for items of ``item_type``."""
    levels = len(info.codebook_sizes)
    value = pa.field(
        "element", pa.from_numpy_dtype(code_dtype(info.codebook_sizes)), nullable=False
    )
    return pa.schema(
        [
            pa.field("item_id", item_type, nullable=False),
            pa.field("codes", pa.list_(value, levels), nullable=False),
            pa.field("residual_norm", pa.float32(), nullable=False),
        ],
        metadata=info.to_metadata(),
    )


def ids_table(
    items: pa.Array,
    codes: npt.NDArray[np.integer[Any]],
    residual_norms: npt.NDArray[np.float32],
    info: CodesInfo,
) -> pa.Table:
    """Return an Arrow table of a block of Semantic IDs.

    Args:
        items: ``(n,)`` item ids.
        codes: ``(n, levels)`` integers.
        residual_norms: ``(n,)`` lengths of what the last level leaves, in the quantized space.
        info: where the codes come from.
    """
    schema = ids_schema(items.type, info)
    flat = np.ascontiguousarray(codes, dtype=code_dtype(info.codebook_sizes)).reshape(-1)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=schema.field("codes").type)
    norms = pa.array(residual_norms, type=pa.float32())
    return pa.Table.from_arrays([items, column, norms], schema=schema)


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The table of items and their codes.

    Attributes:
        items: item ids, row by row.
        codes: ``(items, levels)`` uint16 (uint32 where a codebook exceeds 65,536).
        residual_norms: ``(items,)`` float32, what the last level leaves, in the quantized space.
        info: which tokenizer and codebook the codes belong to.
    """

    items: ItemIds
    codes: npt.NDArray[np.unsignedinteger[Any]]
    residual_norms: npt.NDArray[np.float32]
    info: CodesInfo

    def __post_init__(self) -> None:
        """Check shapes and ranges.

        Raises:
            InputError: listing everything that does not fit.
        """
        levels = len(self.info.codebook_sizes)
        problems = []
        if self.codes.ndim != 2 or self.codes.shape[1] != levels:
            problems.append(f"codes have shape {self.codes.shape}, expected (items, {levels})")
        elif len(self.codes):
            high = self.codes.max(axis=0)
            problems += [
                f"level {level} holds code {int(top)}, its codebook has {size} codewords"
                for level, (top, size) in enumerate(
                    zip(high, self.info.codebook_sizes, strict=True)
                )
                if top >= size
            ]
        if not len(self.items) == len(self.codes) == len(self.residual_norms):
            problems.append(
                f"{len(self.items)} item ids, {len(self.codes)} code rows and "
                f"{len(self.residual_norms)} residual norms; give one of each an item"
            )
        if problems:
            raise InputError(problems)
        object.__setattr__(
            self, "codes", self.codes.astype(code_dtype(self.info.codebook_sizes), copy=False)
        )

    def __len__(self) -> int:
        """Count the items."""
        return len(self.codes)

    @property
    def levels(self) -> int:
        """Number of codes an item."""
        return len(self.info.codebook_sizes)

    def lookup(self, items: str | Sequence[str]) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return the codes of one item ``(levels,)`` or of several ``(n, levels)``.

        Raises:
            IdsError: naming the items that are not in the table.
        """
        wanted = [items] if isinstance(items, str) else [str(item) for item in items]
        rows = self.items.index_of(wanted)
        unknown = [item for item, row in zip(wanted, rows, strict=True) if row < 0]
        if unknown:
            raise IdsError(
                f"{len(unknown)} of {len(wanted)} items are not in these Semantic IDs "
                f"(first: '{unknown[0]}'); encode them first"
            )
        found: npt.NDArray[np.unsignedinteger[Any]] = self.codes[rows]
        return found[0] if isinstance(items, str) else found

    def with_prefix(self, prefix: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the row numbers of the items whose codes start with ``prefix``, rising.

        Raises:
            UsageError: if the prefix is longer than an id. Cost: O(items).
        """
        if len(prefix) > self.levels:
            raise UsageError(f"prefix has {len(prefix)} codes, ids have {self.levels} levels")
        found = np.ones(len(self), dtype=bool)
        for level, code in enumerate(prefix):
            found &= self.codes[:, level] == code
        return np.flatnonzero(found)

    def check_codebook(self, codebook_fingerprint: str) -> None:
        """Refuse to go on with codes of another codebook.

        Raises:
            FingerprintError: if the fingerprints differ.
        """
        if self.info.codebook_fingerprint != codebook_fingerprint:
            raise FingerprintError(
                "these ids were made with another codebook "
                f"({self.info.codebook_fingerprint[:12]}) than the model's "
                f"({codebook_fingerprint[:12]}); encode the items again with this model, or load "
                "the model that made the ids"
            )

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write one Parquet file atomically.

        Raises:
            OutputExistsError: if ``path`` exists and ``overwrite`` is false.
        """
        table = ids_table(self.items.to_arrow(), self.codes, self.residual_norms, self.info)
        with atomic_file(path, overwrite=overwrite) as work:
            pq.write_table(table, work)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SemanticIds:
        """Read what `write` or ``semid encode`` wrote.

        Raises:
            ArtefactError: if the file is missing, truncated, or no semid ids file.
            IdsError: if item ids repeat.
        """
        if not Path(path).is_file():
            raise ArtefactError(f"'{path}' does not exist; give a file written by 'semid encode'")
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtefactError(
                f"'{path}' cannot be read as Parquet ({error}); copy or encode it again"
            ) from None
        info = CodesInfo.from_metadata(table.schema.metadata, path=path)
        missing = [c for c in ("item_id", "codes", "residual_norm") if c not in table.column_names]
        if missing:
            raise ArtefactError(f"'{path}' lacks the columns {', '.join(missing)}; encode it again")
        column = table["codes"].combine_chunks()
        codes = column.flatten().to_numpy().reshape(len(table), -1)
        return cls(
            items=ItemIds(table["item_id"]),
            codes=codes,
            residual_norms=table["residual_norm"].to_numpy(),
            info=info,
        )
