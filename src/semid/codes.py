"""Semantic IDs: which item has which codes, and which codebook they belong to.

Parquet columns: ``item_id`` (its original type), ``codes`` FixedSizeList<uint16>[levels] (uint32
where a codebook is larger than 65,536) and ``residual_norm``. The schema metadata carries the
fingerprints, so codes cannot be read with the wrong codebook unnoticed. Where a step after encoding
changed the published codes (`semid.catalogue`), ``model_codes`` holds what the model chose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.artefact import FORMAT_VERSION, check_version
from semid.data.columns import numbers_to_arrow
from semid.data.files import find_parquet
from semid.data.ids import ItemIds
from semid.data.items import code_rows, join_tables
from semid.documents import checksum, html_table, parse_json, record, typed
from semid.errors import (
    ArtefactError,
    FingerprintError,
    IdsError,
    InputError,
    SemidError,
    UsageError,
    brief,
    check_choice,
    import_extra,
)
from semid.filesystems import is_uri, open_parquet
from semid.output import atomic_file

METADATA_KEY = b"semid"
CHECKSUM = "checksum"
UNIQUE_METHODS = ("none", "append", "reassign")

# A codebook of more codewords has codes beyond uint32.
MAX_CODEWORDS = 2**32

# Codes per item; published tokenizers have 3 to 64.
MAX_LEVELS = 256

# How Semantic IDs are written: readers verify the checksums (`semid.filesystems`).
PARQUET_OPTIONS: dict[str, Any] = {"write_page_checksum": True}


def code_dtype(codebook_sizes: Sequence[int]) -> np.dtype[Any]:
    """Return uint16, or uint32 if any codebook has more than 65,536 codewords."""
    return np.dtype(np.uint16 if max(codebook_sizes) <= 65_536 else np.uint32)


@dataclass(frozen=True, kw_only=True)
class CodesInfo:
    """Where codes come from."""

    tokenizer: str  # kind of the tokenizer, for example ``rqkmeans``
    codebook_sizes: tuple[int, ...]  # codewords of each level
    hierarchical: bool  # whether a shared prefix means relatedness (residual tokenizers)
    codebook_fingerprint: str  # SHA-256 of the codebooks
    weights_fingerprint: str  # SHA-256 of all weights
    beam_width: int = 1  # beam the codes were chosen with; 1 is greedy
    # how codes were made unique: ``none``, ``append`` (the last level is a token of no codebook,
    # counted in ``codebook_sizes``) or ``reassign``
    unique: str = "none"
    capacity: int = 1  # items an id may have under that method
    # residual norms of the training distribution at even steps from 0 to 1, against which new items
    # are judged; None before the first addition
    norm_quantiles: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the method and the sizes."""
        check_choice("unique", self.unique, UNIQUE_METHODS)
        sizes = self.codebook_sizes
        if not 1 <= len(sizes) <= MAX_LEVELS or not all(1 <= k <= MAX_CODEWORDS for k in sizes):
            raise UsageError(
                f"codebook_sizes={sizes[:8]}: give 1 to {MAX_LEVELS} sizes of 1 to 2**32 codewords"
            )

    @property
    def model_sizes(self) -> tuple[int, ...]:
        """Codebook sizes of the model alone, without an appended token."""
        return self.codebook_sizes[:-1] if self.unique == "append" else self.codebook_sizes

    @property
    def label(self) -> str:
        """Tokenizer, sizes and the fingerprint's beginning, without spaces."""
        sizes = "x".join(map(str, self.codebook_sizes))
        return f"{self.tokenizer}({sizes},{self.codebook_fingerprint[:8]})"

    @property
    def model(self) -> CodesInfo:
        """What the model's own codes carry, before any step after encoding."""
        return replace(
            self, codebook_sizes=self.model_sizes, unique="none", capacity=1, norm_quantiles=None
        )

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return the Parquet schema metadata that carries this."""
        document = {"format_version": FORMAT_VERSION, **asdict(self)}
        # Left out where they say nothing, so that a plain file reads the same as it always did.
        for name, silent in (("unique", "none"), ("capacity", 1), ("norm_quantiles", None)):
            if document[name] == silent:
                del document[name]
        document[CHECKSUM] = checksum(document)
        return {METADATA_KEY: json.dumps(document).encode()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, *, path: object) -> CodesInfo:
        """Read what `to_metadata` wrote."""
        if METADATA_KEY not in (metadata or {}):
            raise ArtefactError(
                f"'{path}' carries no semid fingerprint in its schema; "
                "give a file written by 'semid encode' or SemanticIds.write()"
            )
        where = f"the schema of '{path}'"
        advice = "copy the file or encode it again"
        # Version and checksum are of the document; what is left are the fields.
        document = parse_json((metadata or {})[METADATA_KEY], where=where, advice=advice)
        document = dict(typed(dict[str, Any], document, where))
        version = typed(int, document.pop("format_version", None), f"{where}, format_version")
        check_version(version, FORMAT_VERSION, where=f"'{path}'")
        stored = document.pop(CHECKSUM, None)
        if version > 1 and stored != checksum({"format_version": version, **document}):
            raise ArtefactError(f"{where} does not match its checksum; {advice}")
        try:
            return record(cls, document, where)
        except UsageError as error:
            raise ArtefactError(f"{where}: {error}; {advice}") from None


def ids_schema(item_type: pa.DataType, info: CodesInfo, *, model_codes: bool = False) -> pa.Schema:
    """Return the Parquet schema of Semantic IDs, with the model's own codes if asked for."""
    columns = [
        pa.field("item_id", item_type, nullable=False),
        pa.field("codes", _codes_type(info.codebook_sizes), nullable=False),
        pa.field("residual_norm", pa.float32(), nullable=False),
    ]
    if model_codes:
        columns.append(pa.field("model_codes", _codes_type(info.model_sizes), nullable=False))
    return pa.schema(columns, metadata=info.to_metadata())


def _codes_type(sizes: Sequence[int]) -> pa.DataType:
    value = pa.field("element", pa.from_numpy_dtype(code_dtype(sizes)), nullable=False)
    return pa.list_(value, len(sizes))


def ids_table(
    items: pa.Array,
    codes: npt.NDArray[np.integer[Any]],
    residual_norms: npt.NDArray[np.float32],
    info: CodesInfo,
    *,
    model_codes: npt.NDArray[np.integer[Any]] | None = None,
) -> pa.Table:
    """Return an Arrow table of a block of Semantic IDs; shapes as in `SemanticIds`."""
    schema = ids_schema(items.type, info, model_codes=model_codes is not None)
    columns = [
        items,
        _codes_column(codes, info.codebook_sizes),
        numbers_to_arrow(np.asarray(residual_norms, dtype=np.float32)),
    ]
    if model_codes is not None:
        columns.append(_codes_column(model_codes, info.model_sizes))
    return pa.Table.from_arrays(columns, schema=schema)


def _codes_column(codes: npt.NDArray[np.integer[Any]], sizes: Sequence[int]) -> pa.Array:
    if problems := _misfits(codes, sizes, "codes"):
        raise InputError(problems)
    # Arrow views the flat array as lists of one width; nothing is copied again.
    flat = np.ascontiguousarray(codes, dtype=code_dtype(sizes)).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(numbers_to_arrow(flat), type=_codes_type(sizes))


@dataclass(frozen=True, eq=False, repr=False)
class SemanticIds:
    """The table of items and their codes.

    Attributes:
        items: item ids, row by row.
        codes: ``(items, levels)`` uint16 (uint32 where a codebook exceeds 65,536).
        residual_norms: ``(items,)`` float32, what the last level of the model's own codes leaves,
            in the quantized space.
        info: which tokenizer and codebook the codes belong to.
        model_codes: ``(items, model levels)`` what the model chose, kept where a step after
            encoding changed the published codes; None where they are the same. See `encoded`.
    """

    items: ItemIds
    codes: npt.NDArray[np.unsignedinteger[Any]]
    residual_norms: npt.NDArray[np.float32]
    info: CodesInfo
    model_codes: npt.NDArray[np.unsignedinteger[Any]] | None = None

    def __post_init__(self) -> None:
        """Check shapes and ranges; an InputError lists everything that does not fit."""
        object.__setattr__(self, "codes", np.asarray(self.codes))
        problems = _misfits(self.codes, self.info.codebook_sizes, "codes")
        if self.model_codes is not None:
            problems += _misfits(self.model_codes, self.info.model_sizes, "model_codes")
            if len(self.model_codes) != len(self.codes):
                problems.append(f"{len(self.model_codes)} model_codes for {len(self.codes)} codes")
        elif self.info.unique == "append":
            problems.append("codes carry an appended token, but no model_codes stand beside them")
        if not len(self.items) == len(self.codes) == len(self.residual_norms):
            problems.append(
                f"{len(self.items)} item ids, {len(self.codes)} code rows and "
                f"{len(self.residual_norms)} residual norms; give one of each per item"
            )
        if problems:
            raise InputError(problems)
        sizes = {"codes": self.info.codebook_sizes, "model_codes": self.info.model_sizes}
        for name, codebook_sizes in sizes.items():
            if (codes := getattr(self, name)) is not None:
                codes = codes.astype(code_dtype(codebook_sizes), copy=False)
                object.__setattr__(self, name, codes)

    def __len__(self) -> int:
        """Count the items."""
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Any:
        """Return the item id and the codes ``(levels,)`` of a row, or the ids of several rows.

        Several rows are a slice, a mask ``(items,)``, or numbers that do not repeat. `lookup` finds
        codes by item ids.
        """
        if isinstance(rows, int | np.integer):
            return self.items[int(rows)], self.codes[rows]
        # An empty list selects nothing; numpy would make it a list of floats.
        index = rows if isinstance(rows, slice) or len(rows) else np.empty(0, int)
        numbers = np.arange(len(self))[index]
        if numbers.ndim != 1 or len(np.unique(numbers)) != len(numbers):
            raise UsageError("rows repeat or are no list; an item has one id: give each row once")
        return self.take(numbers)

    def __iter__(self) -> Iterator[tuple[str, npt.NDArray[np.unsignedinteger[Any]]]]:
        """Yield the item id and the codes ``(levels,)`` of each row."""
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return the codes ``(items, levels)`` for numpy."""
        return np.array(self.codes, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        """Name the tokenizer and the sizes in one line."""
        sizes = " x ".join(f"{size:,}" for size in self.info.codebook_sizes)
        return f"SemanticIds({len(self):,} items, {self.info.tokenizer}, {sizes} codewords)"

    def _repr_html_(self) -> str:
        """Show the first rows in a notebook."""
        return html_table(repr(self), [[item, *codes.tolist()] for item, codes in self[:5]])

    def to_pandas(self) -> Any:
        """Return a pandas frame: ``item_id``, ``code_0`` and so on, ``residual_norm``."""
        return self._plain_table().to_pandas()

    def to_polars(self) -> Any:
        """Return a polars frame with the columns of `to_pandas`."""
        polars = import_extra("polars", extra="polars", purpose="to_polars()")
        return polars.from_arrow(self._plain_table())

    def _plain_table(self) -> pa.Table:
        codes = {f"code_{level}": column for level, column in enumerate(self.codes.T)}
        items = {"item_id": self.items.to_arrow()}
        return pa.table({**items, **codes, "residual_norm": self.residual_norms})

    @property
    def levels(self) -> int:
        """Number of codes per item."""
        return len(self.info.codebook_sizes)

    @property
    def encoded(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Codes as the model chose them ``(items, model levels)``, before any later step."""
        return self.codes if self.model_codes is None else self.model_codes

    def take(self, rows: npt.NDArray[np.int64]) -> SemanticIds:
        """Return the ids of ``rows`` (n,), which must not repeat, in that order."""
        return replace(
            self,
            items=self.items.take(rows),
            codes=self.codes[rows],
            residual_norms=self.residual_norms[rows],
            model_codes=None if self.model_codes is None else self.model_codes[rows],
        )

    def lookup(self, items: Any) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return the codes of one item ``(levels,)`` or of several ``(n, levels)``.

        ``items`` is an id, or a sequence or array of them; ``7`` and ``"7"`` are one id.

        Raises:
            UsageError: something else than strings and integers.
            IdsError: naming the items that are not in the table.
        """
        single = isinstance(items, str | bytes) or not isinstance(items, Iterable)
        names = []
        for item in [items] if single else items:
            value = item.as_py() if isinstance(item, pa.Scalar) else item
            if not isinstance(value, str | int | np.integer) or isinstance(value, bool):
                raise UsageError(
                    f"items are looked up by ids, which are strings or integers, not by "
                    f"{value!r} ({type(value).__name__})"
                )
            names.append(str(value))
        rows = self.items.index_of(names)
        unknown = [name for name, row in zip(names, rows, strict=True) if row < 0]
        if unknown:
            example = f"; ids look like '{self.items[0]}'" if len(self) else ""
            raise IdsError(
                f"{len(unknown)} of {len(names)} items are not in these Semantic IDs "
                f"(first: '{unknown[0]}'{example}); encode them first"
                f"{self.items.whitespace_hint(unknown)}"
            )
        codes: npt.NDArray[np.unsignedinteger[Any]] = self.codes[rows]
        return codes[0] if single else codes

    def with_prefix(self, prefix: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the row numbers of the items whose codes start with ``prefix``, rising.

        Raises:
            UsageError: if the prefix is longer than an id. Cost: O(items).
        """
        if len(prefix) > self.levels:
            raise UsageError(f"prefix has {len(prefix)} codes, ids have {self.levels} levels")
        match = np.ones(len(self), dtype=bool)
        for level, code in enumerate(prefix):
            match &= self.codes[:, level] == code
        return np.flatnonzero(match)

    def check_codebook(self, codebook_fingerprint: str) -> None:
        """Raise a FingerprintError if the codes are those of another codebook."""
        if self.info.codebook_fingerprint != codebook_fingerprint:
            raise FingerprintError(
                "these ids were made with another codebook "
                f"({self.info.codebook_fingerprint[:12]}) than the model's "
                f"({codebook_fingerprint[:12]}); encode the items again with this model, or load "
                "the model that made the ids"
            )

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write one Parquet file atomically; OutputExistsError if it exists, unless replaced."""
        with atomic_file(path, overwrite=overwrite) as work:
            pq.write_table(self.to_arrow(), work, **PARQUET_OPTIONS)

    def to_arrow(self) -> pa.Table:
        """Return the table that `write` writes."""
        return ids_table(
            self.items.to_arrow(),
            self.codes,
            self.residual_norms,
            self.info,
            model_codes=self.model_codes,
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SemanticIds:
        """Read what `write` or ``semid encode`` wrote: a file, a folder of files, or a URI.

        Raises:
            ArtefactError: if a file is missing or unreadable, or files belong to different models.
            IdsError: if item ids repeat.
        """
        source = str(path) if is_uri(path) else Path(path)
        if isinstance(source, Path) and not source.exists():
            raise ArtefactError(f"'{path}' does not exist; give a file written by 'semid encode'")
        try:
            tables = []
            for file in find_parquet(source):
                with open_parquet(file) as parquet:
                    tables.append(parquet.read())
            # One model for all files, or the codes mean different things.
            infos = {CodesInfo.from_metadata(t.schema.metadata, path=path) for t in tables}
            if len(infos) > 1:
                raise ArtefactError(
                    f"the files of '{path}' were made by {len(infos)} different models or "
                    "settings; keep the ids of one run in a folder"
                )
            table = join_tables(tables, where=f"'{path}'")
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            if isinstance(error, SemidError):
                raise
            raise ArtefactError(
                f"'{path}' cannot be read as Parquet ({brief(error)}); copy or encode it again"
            ) from None
        return cls.from_arrow(table, path=path)

    @classmethod
    def from_arrow(cls, table: pa.Table, *, path: object = "the table") -> SemanticIds:
        """Read what `to_arrow` gave; arguments and errors as for `read`."""
        info = CodesInfo.from_metadata(table.schema.metadata, path=path)
        columns = ("item_id", "codes", "residual_norm")
        if missing := [c for c in columns if table.column_names.count(c) != 1]:
            raise ArtefactError(f"'{path}' lacks the columns {', '.join(missing)}; encode it again")
        norms = table["residual_norm"]
        if not pa.types.is_floating(norms.type):
            raise ArtefactError(
                f"column 'residual_norm' of '{path}' holds {norms.type}; encode it again"
            )
        model_codes = None
        if "model_codes" in table.column_names:
            model_codes = code_rows(table, "model_codes", len(info.model_sizes), where=f"'{path}'")
        return cls(
            items=ItemIds(table["item_id"]),
            codes=code_rows(table, "codes", len(info.codebook_sizes), where=f"'{path}'"),
            residual_norms=norms.to_numpy().astype(np.float32, copy=False),
            info=info,
            model_codes=model_codes,
        )


def _misfits(codes: npt.NDArray[Any], sizes: Sequence[int], name: str) -> list[str]:
    """What does not fit in ``(items, levels)`` codes."""
    if codes.ndim != 2 or codes.shape[1] != len(sizes):
        return [f"{name} have shape {codes.shape}, expected (items, {len(sizes)})"]
    if codes.dtype.kind not in "iu":
        return [f"{name} have type {codes.dtype}; codes are integers"]
    if not len(codes):
        return []
    return [
        f"level {level} of {name} holds code {int(low if low < 0 else top)}, "
        f"its codebook has {size} codewords"
        for level, (low, top, size) in enumerate(
            zip(codes.min(axis=0), codes.max(axis=0), sizes, strict=True)
        )
        if low < 0 or top >= size
    ]
