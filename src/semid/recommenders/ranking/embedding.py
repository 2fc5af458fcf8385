"""Field embeddings: one fused table with offsets, item features gathered inside the model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from semid.recommenders.ranking.features import CodeTable
from semid.recommenders.ranking.schema import Inputs, Schema

__all__ = ["FieldIndex", "FieldTables", "Positions"]


class Positions(NamedTuple):
    """Where the embeddings of a batch lie in the fused tables.

    Attributes:
        single: ``(batch, fields)`` rows of the base table, one a field.
        multi: per field with several values ``(batch, values)`` rows of it; the field's first
            row stands for padding.
        dense: ``(batch, columns)`` normalized numbers.
        codes: ``(batch, slots)`` rows of the code table.
        past_items: ``(batch, length)`` rows of the base table for the history.
        past_codes: ``(batch, length, slots)`` rows of the code table for it.
        past: ``(batch, length)`` 1 where the history has an item, 0 for padding.
    """

    single: Tensor
    multi: tuple[Tensor, ...]
    dense: Tensor
    codes: Tensor
    past_items: Tensor
    past_codes: Tensor
    past: Tensor


class FieldIndex(nn.Module):
    """Turns `Inputs` into rows of the fused tables; holds no parameter.

    Everything known of an item (id, brand, codes) is gathered from buffers ``(items + 1, ...)``
    whose values carry the offsets already, so a batch costs one gather for all of it.

    Args:
        schema: vocabularies and attributes.
        codes: the code features, or None.
        item_id: whether the item id has a field.
        unknown_rate: share of the training rows that see an unknown user, and of those that see
            an unknown item id (codes and attributes stay), so that the unknown rows learn.
    """

    item_rows: Tensor
    code_rows: Tensor
    offsets: Tensor
    center: Tensor
    spread: Tensor

    def __init__(
        self,
        schema: Schema,
        codes: CodeTable | None,
        *,
        item_id: bool = True,
        unknown_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.item_id, self.unknown_rate = item_id, unknown_rate
        self.history = schema.history
        ones = {n: a for n, a in schema.attributes.items() if not a.multi}
        many = {n: a for n, a in schema.attributes.items() if a.multi}
        self.names = ["user", *(["item"] if item_id else []), *ones, *schema.context]
        sizes = [
            len(schema.users),
            *([schema.id_size] if item_id else []),
            *(len(a.vocabulary) for a in ones.values()),
            *(len(v) for v in schema.context.values()),
        ]
        self.multi_names = list(many)
        sizes += [len(a.vocabulary) for a in many.values()]
        starts = np.cumsum([0, *sizes])
        self.rows = int(starts[-1])
        own = [*([schema.id_rows] if item_id else []), *(a.rows for a in ones.values())]
        items = len(schema.items)
        self.item_start = int(starts[1])
        columns = [rows + starts[1 + place] for place, rows in enumerate(own)]
        self._buffer(
            "item_rows",
            np.stack(columns, 1) if columns else np.zeros((items, 0), np.int64),
        )
        first = 1 + len(columns)
        self._buffer("offsets", starts[[0, *range(first, first + len(schema.context))]])
        self.pads = [int(starts[len(self.names) + place]) for place in range(len(many))]
        for place, attribute in enumerate(many.values()):
            self._buffer(f"multi_{place}", attribute.rows + self.pads[place])
        self.slots, self.code_total = 0, 0
        table = np.zeros((items, 0), np.int64)
        if codes is not None and not codes.widened:
            self.slots, self.code_total = len(codes.sizes), sum(codes.sizes)
            table = codes.rows + np.cumsum([0, *codes.sizes[:-1]])
        self._buffer("code_rows", table)
        moments = np.array(list(schema.dense.values()), np.float32).reshape(-1, 2)
        self.dense_names = list(schema.dense)
        for place, name in enumerate(("center", "spread")):
            column = torch.from_numpy(moments[:, place].copy())
            self.register_buffer(name, column, persistent=False)

    def _buffer(self, name: str, array: np.ndarray) -> None:
        # Part of the schema and the codes, which are saved for themselves.
        self.register_buffer(
            name, torch.from_numpy(np.ascontiguousarray(array, np.int64)), persistent=False
        )

    def forward(self, inputs: Inputs) -> Positions:
        """Find the rows of a batch."""
        user, item = inputs.user, inputs.item
        own = self.item_rows[item]
        if self.training and self.unknown_rate > 0:
            user = torch.where(self._hidden(user), 0, user)
            if self.item_id:
                hidden = torch.where(self._hidden(item), self.item_start, own[:, 0])
                own = torch.cat([hidden[:, None], own[:, 1:]], 1)
        parts = [user[:, None], own]
        if len(self.offsets) > 1:
            parts.append(inputs.context + self.offsets[1:])
        single = torch.cat(parts, 1)
        dense = (inputs.dense - self.center) / self.spread if self.dense_names else inputs.dense
        multi = tuple(
            self.get_buffer(f"multi_{place}")[item] for place in range(len(self.multi_names))
        )
        past = inputs.history
        past_items = past_codes = past
        if self.history and self.item_id:
            past_items = self.item_rows[past][..., 0]
        if self.history and self.slots:
            past_codes = self.code_rows[past]
        codes = self.code_rows[item] if self.slots else own
        weight = (past > 0).to(self.center.dtype)
        return Positions(single, multi, dense, codes, past_items, past_codes, weight)

    def _hidden(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, device=like.device) < self.unknown_rate


class FieldTables(nn.Module):
    """The embeddings of all fields, ``(batch, fields, width)``.

    The unknown row of every table starts at zero: what training does not see says nothing.

    Args:
        index: what the rows mean.
        codes: the code features, or None.
        width: of an embedding.
        std: of the normal start; 0 starts at zero.
        sparse: gradients of the base and the code table as rows, for `RowwiseAdamW`.
    """

    def __init__(
        self,
        index: FieldIndex,
        codes: CodeTable | None,
        *,
        width: int,
        std: float = 0.01,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.sparse = width, sparse
        self.pads, self.history, self.item_id = index.pads, index.history, index.item_id
        self.base = nn.Parameter(torch.empty(index.rows, width).normal_(0.0, 1.0).mul_(std))
        unknown = [*index.offsets.tolist(), *index.pads]
        unknown += index.item_rows[0].tolist()
        with torch.no_grad():
            self.base[unknown] = 0.0
        names = [*index.names, *index.multi_names]
        self.dense = None
        if index.dense_names:
            self.dense = nn.Parameter(torch.empty(len(index.dense_names), width).normal_() * std)
            names += index.dense_names
        if self.history and self.item_id:
            names.append("history:item")
        self.codes, self.groups = None, list[list[int]]()
        if codes is not None and index.slots:
            self.codes = nn.Parameter(torch.empty(index.code_total, width).normal_() * std)
            with torch.no_grad():
                self.codes[index.code_rows[0].tolist()] = 0.0
            count = len(codes.fields)
            self.groups = [
                [slot for slot, field in enumerate(codes.field_of) if field == number]
                for number in range(count)
            ]
            self.code_place = len(names)
            names += codes.fields
            if self.history:
                names += [f"history:{field}" for field in codes.fields]
        self.names = names

    @property
    def fields(self) -> int:
        """Number of fields."""
        return len(self.names)

    def _look(self, table: Tensor, rows: Tensor) -> Tensor:
        if self.sparse:
            return nn.functional.embedding(rows, table, sparse=True)
        # The same values; on CPUs the gradient of `embedding` adds row by row, this one in one go.
        return table.index_select(0, rows.reshape(-1)).view(*rows.shape, table.shape[1])

    def forward(self, at: Positions) -> Tensor:
        """Gather the embeddings of a batch."""
        found = [self._look(self.base, at.single)]
        for rows, pad in zip(at.multi, self.pads, strict=True):
            found.append(_mean(self._look(self.base, rows), (rows > pad).to(self.base.dtype)))
        if self.dense is not None:
            found.append(at.dense.unsqueeze(-1) * self.dense)
        if self.history and self.item_id:
            found.append(_mean(self._look(self.base, at.past_items), at.past))
        if self.codes is not None:
            found.append(self._grouped(self._look(self.codes, at.codes)))
            if self.history:
                past = self._grouped(self._look(self.codes, at.past_codes))
                weight = at.past / at.past.sum(1, keepdim=True).clamp(min=1)
                found.append((past * weight[:, :, None, None]).sum(1))
        return torch.cat(found, 1)

    def _grouped(self, e: Tensor) -> Tensor:
        """Add up the slots of each field: ``(..., slots, width)`` to ``(..., fields, width)``."""
        if all(len(slots) == 1 for slots in self.groups):
            return e
        return torch.stack([e[..., slots, :].sum(-2) for slots in self.groups], -2)


def _mean(e: Tensor, weight: Tensor) -> Tensor:
    """Average ``(batch, values, width)`` over the values of weight 1; ``(batch, 1, width)``."""
    share = weight / weight.sum(1, keepdim=True).clamp(min=1)
    return share.unsqueeze(1) @ e
