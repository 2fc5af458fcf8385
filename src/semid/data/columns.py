"""Choosing columns: by the name given, by convention, or not at all and saying why."""

from __future__ import annotations

import pyarrow as pa

from semid.errors import EmbeddingError, UsageError, nearest_name

__all__ = [
    "NOT_ARROW",
    "float_list_width",
    "is_float_list",
    "is_list",
    "listed",
    "pick_embedding_column",
    "require_column",
    "storage",
]


NOT_ARROW = (pa.ArrowException, TypeError, UnicodeError, OverflowError)
"""What `pyarrow.array` raises for Python values of no Arrow type, such as lone surrogates."""


def storage(kind: pa.DataType) -> pa.DataType:
    """Return the plain type under an extension type (such as Arrow's fixed-shape tensor)."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    kind = storage(kind)
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_float_list(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold embeddings: lists of float16, float32 or float64."""
    return is_list(kind) and bool(pa.types.is_floating(storage(kind).value_type))


def float_list_width(kind: pa.DataType) -> int | None:
    """Return the width that the type itself fixes, or None."""
    kind = storage(kind)
    return kind.list_size if pa.types.is_fixed_size_list(kind) else None


def require_column(name: str, columns: list[str], *, label: str, flag: str) -> str:
    """Return ``name`` if it is a column.

    Raises:
        UsageError: with the columns there are, the nearest of them, and the flag to correct.
    """
    if name in columns:
        return name
    raise UsageError(
        f"{label} has no column '{name}'{nearest_name(name, columns)}; it has "
        f"{listed(columns)}: name one with {flag}"
    )


def pick_embedding_column(schema: pa.Schema, wanted: str | None, *, label: str) -> str:
    """Choose the embedding column: the one named, else ``embedding``, else the only candidate.

    Args:
        schema: the columns there are.
        wanted: the name the user gave, or None.
        label: the table in the user's words.

    Raises:
        UsageError: no column of that name, or several candidates and none called ``embedding``.
        EmbeddingError: the column named holds something else, or no column holds lists of floats.
    """
    flag = "--embedding-column (embedding_column=)"
    candidates = [field.name for field in schema if is_float_list(field.type)]
    if wanted is not None:
        require_column(wanted, schema.names, label=label, flag=flag)
        if schema.get_all_field_indices(wanted)[1:]:
            raise UsageError(f"{label} has several columns called '{wanted}'; rename all but one")
    elif "embedding" in schema.names and schema.names.count("embedding") == 1:
        wanted = "embedding"
    elif len(candidates) == 1:
        return str(candidates[0])
    elif candidates:
        raise UsageError(
            f"{label} has {len(candidates)} columns of float lists, {listed(candidates)}, and none "
            f"is called 'embedding': choose one with {flag}"
        )
    else:
        types = ", ".join(f"'{f.name}' ({f.type})" for f in list(schema)[:12])
        raise EmbeddingError(
            f"{label} has no column of float lists; its columns are {types}. An embedding is one "
            "column of lists of float16, float32 or float64; for a column a dimension pass the "
            "matrix itself: frame.to_numpy()"
        )
    kind = schema.field(wanted).type
    if not is_float_list(kind):
        raise EmbeddingError(
            f"column '{wanted}' of {label} holds {kind}; embeddings are lists of float16, float32 "
            f"or float64{_other_candidates(candidates, flag)}"
        )
    return wanted


def listed(names: list[str], most: int = 20) -> str:
    """Return the names quoted and joined, cut after ``most``."""
    shown = ", ".join(f"'{n}'" for n in names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown or "no columns"


def _other_candidates(candidates: list[str], flag: str) -> str:
    return f": {listed(candidates)} would do, choose with {flag}" if candidates else ""
