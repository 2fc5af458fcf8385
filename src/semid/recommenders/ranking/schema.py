"""What turns users, items and context into rows of embedding tables; kept with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.documents import checked
from semid.errors import InputError
from semid.recommenders.ranking.catalogue import ItemAttribute
from semid.recommenders.ranking.tables import dense_values
from semid.recommenders.ranking.vocabulary import Vocabulary, as_text

__all__ = ["Inputs", "Schema", "table_rows"]

Ints = npt.NDArray[np.int64]

CONFIG: dict[str, Any] = {
    "attributes": list[str],
    "context": list[str],
    "dense": dict[str, tuple[float, float]],
    "history": int,
    "id_size": int,
    "user_column": str,
    "item_column": str,
}
"""What `Schema.to_config` gives."""


class Inputs(NamedTuple):
    """One batch as the network reads it.

    Attributes:
        user: ``(batch,)`` int64 rows of the user vocabulary.
        item: ``(batch,)`` int64 rows of the catalogue; 0 for an item that is not in it.
        context: ``(batch, columns)`` int64 rows of the context vocabularies.
        dense: ``(batch, columns)`` float32 as they were given.
        history: ``(batch, length)`` int64 rows of the catalogue, newest first, padded with 0.
    """

    user: Tensor
    item: Tensor
    context: Tensor
    dense: Tensor
    history: Tensor

    def to(self, device: torch.device) -> Inputs:
        """Move every tensor."""
        return Inputs(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Schema:
    """Vocabularies and item attributes.

    Attributes:
        users: users of the training rows.
        items: the catalogue; every item that features are known of.
        id_rows: ``(items + 1,)`` row of each item in the table of item ids, 0 where training
            had too few rows of it.
        id_size: rows of that table.
        attributes: of the items, by name.
        context: vocabularies of the categorical columns of a row, by name.
        dense: mean and standard deviation of the dense columns over the training rows, by name.
        history: items of a user's history that the network sees; 0 sees none.
        user_history: ``(users + 1, history)`` the last items of each user, newest first, padded
            with 0: what `Ranker.predict` takes where no history is given.
        user_column: name of the user column.
        item_column: name of the item column.
    """

    users: Vocabulary
    items: Vocabulary
    id_rows: Ints
    id_size: int
    attributes: dict[str, ItemAttribute] = field(default_factory=dict)
    context: dict[str, Vocabulary] = field(default_factory=dict)
    dense: dict[str, tuple[float, float]] = field(default_factory=dict)
    history: int = 0
    user_history: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    user_column: str = "user_id"
    item_column: str = "item_id"

    def context_rows(
        self, columns: Mapping[str, Any], *, rows: int, label: str
    ) -> tuple[Tensor, Tensor]:
        """Look up the context of rows.

        Args:
            columns: Arrow columns by name, each ``(rows,)``.
            rows: how many there are, also where no column is read.
            label: the table in the user's words.

        Returns:
            ``(rows, categorical)`` int32 and ``(rows, dense)`` float32.

        Raises:
            InputError: a column of a wrong type, or NaN in a dense one. All are listed.
        """
        problems: list[str] = []
        categorical, dense = [], []
        for name, vocabulary in self.context.items():
            try:
                text = as_text(columns[name], name=name, label=label)
                categorical.append(vocabulary.rows(text).astype(np.int32))
            except InputError as error:
                problems += error.problems
        for name in self.dense:
            try:
                dense.append(dense_values(columns[name], name=name, label=label))
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)
        return (
            torch.from_numpy(np.stack(categorical, 1))
            if categorical
            else torch.empty((rows, 0), dtype=torch.int32),
            torch.from_numpy(np.stack(dense, 1)) if dense else torch.empty((rows, 0)),
        )

    def to_config(self) -> dict[str, Any]:
        """Return the JSON-able part, for an artefact."""
        return {
            "attributes": list(self.attributes),
            "context": list(self.context),
            "dense": {name: list(moments) for name, moments in self.dense.items()},
            "history": self.history,
            "id_size": self.id_size,
            "user_column": self.user_column,
            "item_column": self.item_column,
        }

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
        """Read what `to_config` and `tensors` gave.

        Raises:
            ValueError: arrays that contradict the config or each other.
            ArtefactError: a value of another type.
        """
        config = checked(CONFIG, config, "schema", required=CONFIG)
        users, items = (Vocabulary.of(tensors, f"schema.{name}") for name in ("users", "items"))
        attributes = {}
        for name in config["attributes"]:
            vocabulary = Vocabulary.of(tensors, f"schema.attribute.{name}")
            rows = table_rows(tensors, f"schema.attribute.{name}.rows", len(vocabulary))
            if rows.ndim not in (1, 2) or len(rows) != len(items):
                raise ValueError(f"attribute '{name}' has shape {rows.shape}")
            attributes[name] = ItemAttribute(vocabulary, rows)
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
            id_size=config["id_size"],
            attributes=attributes,
            context={
                name: Vocabulary.of(tensors, f"schema.context.{name}") for name in config["context"]
            },
            dense=config["dense"],
            history=config["history"],
            user_history=history,
            user_column=config["user_column"],
            item_column=config["item_column"],
        )


def table_rows(tensors: Mapping[str, np.ndarray], name: str, size: int) -> Ints:
    """Return an array of row numbers of a table with ``size`` rows.

    Raises:
        ValueError: it holds something else.
    """
    array = tensors[name]
    if array.dtype.kind != "i" or (array.size and not 0 <= array.min() <= array.max() < size):
        raise ValueError(f"'{name}' holds other values than the rows 0 to {size - 1} of its table")
    return array.astype(np.int64, copy=False)
