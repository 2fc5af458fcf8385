"""Vocabularies and item attributes: how users, items and context become rows of tables.

Row 0 of every table stands for what training did not see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.data.columns import is_text
from semid.data.ids import ItemIds
from semid.documents import checked
from semid.errors import InputError
from semid.lazy import torch
from semid.training.batches import epoch_batches, process_share, steps_per_epoch
from semid.training.distributed import rank, world_size

if TYPE_CHECKING:
    from torch import Tensor

Ints = npt.NDArray[np.int64]
_T = TypeVar("_T")

CONFIG: dict[str, Any] = {
    "attributes": list[str],
    "context": list[str],
    "dense": dict[str, tuple[float, float]],
    "history": int,
    "id_size": int,
    "user_column": str,
    "item_column": str,
}
"""Types of what `Schema.to_config` returns."""


class Inputs(NamedTuple):
    """One batch as the network reads it."""

    user: Tensor  # ``(batch,)`` int64 rows of the user vocabulary
    item: Tensor  # ``(batch,)`` int64 rows of the catalogue; 0 for an item that is not in it
    context: Tensor  # ``(batch, columns)`` int64 rows of the context vocabularies
    dense: Tensor  # ``(batch, columns)`` float32, not yet normalized
    history: Tensor  # ``(batch, length)`` int64 rows of the catalogue, newest first, padded with 0

    def to(self, device: torch.device) -> Inputs:
        """Move every tensor."""
        return Inputs(*(tensor.to(device) for tensor in self))


class Vocabulary:
    """Distinct values that have a row of their own, from row 1 on; ``source`` names them."""

    def __init__(self, values: Any, *, source: str = "values") -> None:
        self.ids = values if isinstance(values, ItemIds) else ItemIds(values, source=source)

    def __len__(self) -> int:
        """Count the rows, the unknown one included."""
        return len(self.ids) + 1

    def rows(self, values: Any) -> Ints:
        """Return the row of each value ``(n,)``; 0 for unknown ones and nulls."""
        if not isinstance(values, pa.DictionaryArray):
            return self.ids.index_of(values) + 1
        # Look the distinct values up; nulls take the extra row at the end.
        rows: Ints = np.append(self.ids.index_of(values.dictionary) + 1, 0)
        indices = values.indices.fill_null(len(rows) - 1).to_numpy(zero_copy_only=False)
        coded: Ints = rows[indices]
        return coded

    def strings(self) -> list[str]:
        """Return the values as strings, in the order of their rows from 1 on."""
        return list(self.ids.strings().to_pylist())

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Return arrays that `of` reads: the bytes of all values, and where each ends."""
        # Tensors hold no strings: all bytes in one array, and the ends of the texts in another.
        texts = [text.encode() for text in self.strings()]
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        characters = np.frombuffer(b"".join(texts), dtype=np.uint8).copy()
        return {f"{name}.bytes": characters, f"{name}.ends": ends}

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray], name: str) -> Vocabulary:
        """Read what `tensors` returned."""
        # Ends that do not rise from 0 to the number of bytes come from a damaged file.
        text = tensors[f"{name}.bytes"].tobytes()
        ends = tensors[f"{name}.ends"]
        is_valid = ends.ndim == 1 and len(ends) > 0 and ends.dtype.kind == "i"
        if not is_valid or ends[0] != 0 or ends[-1] != len(text) or (np.diff(ends) < 0).any():
            raise ValueError(f"'{name}.ends' does not divide '{name}.bytes' into texts")
        values = [text[a:b].decode() for a, b in itertools.pairwise(ends.tolist())]
        return cls(pa.array(values, type=pa.large_string()))


def one_array(column: Any) -> pa.Array:
    """Return a column as one Arrow array."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)


def as_text(
    column: Any,
    *,
    name: str,
    label: str,
    advice: str = "cast it, or name it as a dense column (--dense, dense=)",
) -> pa.Array:
    """Return a column of categories ``(n,)`` as strings; nulls stay nulls."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    checks = (is_text, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    if not any(check(kind) for check in checks):
        raise InputError(
            f"column '{name}' of {label} holds {kind}; a category is a string, an integer or a "
            f"truth value: {advice}"
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(kind)
    return one_array(column.cast(pa.large_string()))


def as_categories(column: Any, *, name: str, label: str) -> pa.Array:
    """Return a column as `as_text` does, but leave dictionary-coded strings as they are."""
    if isinstance(column, pa.DictionaryArray) and column.type.value_type == pa.large_string():
        return column
    return as_text(column, name=name, label=label)


def every_column(names: Iterable[str], read: Callable[[str], _T]) -> dict[str, _T]:
    """Read columns one by one; what is wrong with any of them is raised together."""
    values: dict[str, _T] = {}
    problems: list[str] = []
    for name in names:
        try:
            values[name] = read(name)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return values


def dense_values(column: Any, *, name: str, label: str) -> npt.NDArray[np.float32]:
    """Return a column of numbers ``(n,)`` as float32."""
    kind, types = column.type, pa.types
    checks = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    if not any(check(kind) for check in checks):
        raise InputError(
            f"column '{name}' of {label} holds {kind}; a dense column holds numbers: cast it, or "
            "name it as a categorical column (--categorical, categorical=)"
        )
    values = one_array(column.cast(pa.float64())).to_numpy(zero_copy_only=False)
    bad = ~np.isfinite(values)
    if bad.any():
        raise InputError(
            f"dense column '{name}' of {label} holds {int(bad.sum())} rows with null, NaN or inf "
            f"(first: row {int(np.argmax(bad))}); fill them in or drop those rows"
        )
    numbers: npt.NDArray[np.float32] = values.astype(np.float32)
    return numbers


@dataclass(frozen=True)
class ItemAttribute:
    """One attribute of the items."""

    vocabulary: Vocabulary  # its values
    # of each item; ``(items + 1,)`` for one value, ``(items + 1, most values)`` padded with 0 for
    # several. Row 0 is the unknown item
    rows: Ints

    @property
    def multi(self) -> bool:
        """Whether an item has several values."""
        return self.rows.ndim == 2


@dataclass(frozen=True)
class Schema:
    """Vocabularies and item attributes."""

    users: Vocabulary  # users of the training rows
    items: Vocabulary  # the catalogue: every item with known features
    # ``(items + 1,)`` row of each item in the table of item ids, 0 for items with too few training
    # rows
    id_rows: Ints
    id_size: int  # rows of that table
    # attributes of the items, by name
    attributes: dict[str, ItemAttribute] = field(default_factory=dict)
    # vocabularies of the categorical columns of a row, by name
    context: dict[str, Vocabulary] = field(default_factory=dict)
    # mean and standard deviation of the dense columns over the training rows, by name
    dense: dict[str, tuple[float, float]] = field(default_factory=dict)
    history: int = 0  # length of the history that the network sees; 0 for none
    # ``(users + 1, history)`` last items of each user, newest first, padded with 0: the histories
    # of rows that come without one
    user_history: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    user_column: str = "user_id"  # name of the user column
    item_column: str = "item_id"  # name of the item column

    def context_rows(
        self, columns: Mapping[str, Any], *, rows: int, label: str
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Look up the context of rows: ``(rows, categorical)`` and ``(rows, dense)``."""

        def read(name: str) -> npt.NDArray[Any]:
            if name in self.dense:
                return dense_values(columns[name], name=name, label=label)
            values = as_categories(columns[name], name=name, label=label)
            return self.context[name].rows(values).astype(np.int32)

        columns = every_column([*self.context, *self.dense], read)
        context = np.empty((rows, len(self.context)), np.int32)
        dense = np.empty((rows, len(self.dense)), np.float32)
        for array, names in ((context, self.context), (dense, self.dense)):
            for place, name in enumerate(names):
                array[:, place] = columns[name]
        return context, dense

    def to_config(self) -> dict[str, Any]:
        """Return the JSON-able part, for an artefact."""
        config = {name: getattr(self, name) for name in CONFIG}
        config |= {"attributes": list(self.attributes), "context": list(self.context)}
        return {**config, "dense": {name: list(pair) for name, pair in self.dense.items()}}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the arrays, for an artefact."""
        arrays = {
            "schema.id_rows": self.id_rows,
            "schema.user_history": self.user_history,
            **self.users.tensors("schema.users"),
            **self.items.tensors("schema.items"),
        }
        for name, attribute in self.attributes.items():
            arrays[f"schema.attribute.{name}.rows"] = attribute.rows
            arrays |= attribute.vocabulary.tensors(f"schema.attribute.{name}")
        for name, vocabulary in self.context.items():
            arrays |= vocabulary.tensors(f"schema.context.{name}")
        return arrays

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Schema:
        """Read what `to_config` and `tensors` returned."""
        config = checked(CONFIG, config, "schema", required=CONFIG)
        # Every array is checked against the vocabularies, so that a damaged file cannot index
        # outside a table.
        users, items = (Vocabulary.of(tensors, f"schema.{name}") for name in ("users", "items"))
        attributes = {}
        for name in config["attributes"]:
            vocabulary = Vocabulary.of(tensors, f"schema.attribute.{name}")
            rows = table_rows(tensors, f"schema.attribute.{name}.rows", len(vocabulary))
            if rows.ndim not in (1, 2) or len(rows) != len(items):
                raise ValueError(f"attribute '{name}' has shape {rows.shape}")
            attributes[name] = ItemAttribute(vocabulary, rows)
        context = {n: Vocabulary.of(tensors, f"schema.context.{n}") for n in config["context"]}
        id_rows = table_rows(tensors, "schema.id_rows", config["id_size"])
        history = np.zeros((len(users), 0), np.int64)
        if "schema.user_history" in tensors:  # without columns it is not stored
            history = table_rows(tensors, "schema.user_history", len(items))
        if id_rows.shape != (len(items),) or history.shape != (len(users), config["history"]):
            raise ValueError(
                f"{len(items)} items and {len(users)} users have rows of shape {id_rows.shape} and "
                f"histories of shape {history.shape}"
            )
        return cls(
            users=users,
            items=items,
            id_rows=id_rows,
            user_history=history,
            **{**config, "attributes": attributes, "context": context},
        )


def table_rows(tensors: Mapping[str, np.ndarray], name: str, size: int) -> Ints:
    """Return an array of row numbers of a table with ``size`` rows."""
    array = tensors[name]
    if array.dtype.kind != "i" or (array.size and not 0 <= array.min() <= array.max() < size):
        raise ValueError(f"'{name}' holds other values than the rows 0 to {size - 1} of its table")
    return array.astype(np.int64, copy=False)


@dataclass(frozen=True)
class HistoryIndex:
    """The items that each row's user interacted with before it, as spans of one array."""

    items: Tensor  # ``(events,)`` int32 catalogue rows, oldest first within a history
    spans: Tensor  # ``(rows, 2)`` int64 begin and end (exclusive) of each row's history
    length: int  # largest number of items of a history

    def of(self, rows: Tensor) -> Tensor:
        """Return ``(n, length)`` catalogue rows, newest first, padded with 0."""
        span = self.spans[rows]
        # Count back from the end; what lies before the begin belongs to somebody else and becomes
        # padding.
        positions = span[:, 1:] - 1 - torch.arange(self.length, device=span.device)
        if not len(self.items):
            return torch.zeros_like(positions)
        return torch.where(positions >= span[:, :1], self.items[positions.clamp(min=0)].long(), 0)

    def to(self, device: torch.device) -> HistoryIndex:
        """Move the tensors."""
        return HistoryIndex(self.items.to(device), self.spans.to(device), self.length)


@dataclass(frozen=True)
class RankingRows:
    """Rows of one part."""

    user: Tensor  # ``(rows,)`` int32 rows of the user vocabulary
    item: Tensor  # ``(rows,)`` int32 rows of the catalogue
    label: Tensor  # ``(rows,)`` float32, 0 or 1
    context: Tensor  # ``(rows, columns)`` int32
    dense: Tensor  # ``(rows, columns)`` float32
    history: HistoryIndex | None  # histories, or None
    # ``(rows,)`` int32 numbers that distinguish users, also those that training did not see; for
    # metrics per user
    person: Tensor

    @classmethod
    def of(
        cls,
        columns: Mapping[str, npt.NDArray[Any]],
        *,
        person: npt.NDArray[np.integer[Any]],
        history: HistoryIndex | None = None,
    ) -> RankingRows:
        """Make rows from the arrays ``user``, ``item``, ``label``, ``context`` and ``dense``."""
        return cls(
            **{name: torch.from_numpy(values) for name, values in columns.items()},
            history=history,
            person=torch.from_numpy(person.astype(np.int32)),
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.label)

    def batch(self, rows: Tensor) -> tuple[Inputs, Tensor]:
        """Return the inputs and labels of ``rows`` (n,)."""
        item = self.item[rows].long()
        history = item.new_zeros((len(item), 0)) if self.history is None else self.history.of(rows)
        inputs = Inputs(
            self.user[rows].long(), item, self.context[rows].long(), self.dense[rows], history
        )
        return inputs, self.label[rows]

    def blocks(self, size: int) -> Iterator[Inputs]:
        """Yield the inputs of all rows in order, ``size`` rows at a time."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield self.batch(torch.arange(start, stop, device=self.label.device))[0]

    def to(self, device: torch.device) -> RankingRows:
        """Move every tensor."""
        if self.label.device == device:
            return self
        columns = {name: column for name, column in vars(self).items() if column is not None}
        return replace(self, **{name: column.to(device) for name, column in columns.items()})


class BatchSource(Protocol):
    """Where training batches come from."""

    steps_per_epoch: int  # batches per epoch

    def batches(self, epoch: int, first: int) -> Iterator[tuple[tuple[Inputs, Tensor], float]]:
        """Yield ``((inputs, labels), weight)`` of an epoch from step ``first`` on."""
        ...


class MemoryBatches:
    """Batches of rows in memory: a permutation per epoch, one gather per column."""

    def __init__(self, rows: RankingRows, *, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = steps_per_epoch(len(rows), batch_size)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[tuple[Inputs, Tensor], float]]:
        """Yield ``((inputs, labels), weight)`` of an epoch from step ``first`` on."""
        # The order is a function of seed and epoch; every process takes its share of each batch.
        batches = epoch_batches(len(self.rows), self.batch_size, seed=self.seed, epoch=epoch)
        device = self.rows.label.device
        for batch in batches[first:]:
            share, weight = process_share(batch, rank=rank(), world=world_size())
            yield self.rows.batch(torch.from_numpy(share).to(device)), weight
