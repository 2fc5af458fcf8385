"""The whole network: rows to field embeddings (one fused table), fusion, the model, a logit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from semid.options import MAX_WIDTH, Options, option
from semid.recommenders.ranking import MODELS
from semid.recommenders.ranking.features import CodeTable
from semid.recommenders.ranking.layers import MoCFusion
from semid.recommenders.ranking.models import make_model
from semid.recommenders.ranking.schema import Inputs, Schema
from semid.seeds import child_seed
from semid.training.loop import Step

SPARSE_ROWS = 1_000_000
"""Larger tables get row-wise updates by default, so that a step costs the rows of its batch."""


@dataclass(frozen=True, kw_only=True)
class RankerConfig(Options):
    """Architecture of a ranking model.

    The width and the hidden ids, whose embedding trains for unknown ones, are ours: the MoC paper
    prints none. Tables of more than `SPARSE_ROWS` rows are updated row by row by default.
    """

    model: str = option(
        "deepfm", name="--model", help="Ranking model: deepfm, deepim, autoint or dcnv2."
    )
    width: int = option(16, ge=1, le=MAX_WIDTH, name="--width", help="Width of an embedding.")
    fusion: bool = option(False, help="Mixture-of-Codes fusion before the model.")
    fusion_rank: int = option(
        16,
        ge=1,
        le=MAX_WIDTH,
        name="--fusion-rank",
        help="Rank of the fusion's bottleneck.",
    )
    options: Mapping[str, Any] = option(
        default_factory=dict, help="Options of the ranking model, by name."
    )
    unknown_rate: float = option(
        0.0, ge=0, lt=1, help="Share of training rows whose user or item id is hidden."
    )
    init_std: float = option(0.01, ge=0, help="Standard deviation of initial embeddings.")
    embedding_penalty: float = option(
        0.0,
        ge=0,
        name="--embedding-penalty",
        help="Half of it times the sum of all squared embeddings is added to the loss.",
    )
    sparse: bool | None = option(
        None, help="Row-wise updates of embedding tables; by default for large tables."
    )

    def _problems(self) -> list[str]:
        MODELS.load(self.model, flag="--model (model=)").options.of(self.options)
        return []


class Positions(NamedTuple):
    """Where the embeddings of a batch lie in the fused tables."""

    single: Tensor  # ``(batch, fields)`` rows of the base table, one per field
    # per field with several values ``(batch, values)`` rows of the base table; the field's first
    # row is padding
    multi: tuple[Tensor, ...]
    dense: Tensor  # ``(batch, columns)`` normalized numbers
    codes: Tensor  # ``(batch, slots)`` rows of the code table
    past_items: Tensor  # ``(batch, length)`` rows of the base table for the history
    past_codes: Tensor  # ``(batch, length, slots)`` rows of the code table for the history
    past: Tensor  # ``(batch, length)`` 1 for an item of the history, 0 for padding


class FieldIndex(nn.Module):
    """Turns `Inputs` into rows of the fused tables; has no parameters."""

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
        # What is known of an item (id, brand, codes) lies in buffers ``(items + 1, ...)`` whose
        # values carry the offsets already, so that a batch costs one gather for all of it.
        self.item_id, self.unknown_rate = item_id, unknown_rate
        self.history = schema.history
        single = {n: a for n, a in schema.attributes.items() if not a.multi}
        multi = {n: a for n, a in schema.attributes.items() if a.multi}
        # Tables in order: user, item id, attributes with one value, context, attributes with
        # several. Each table's first row in the fused table is its offset.
        self.names = ["user", *(["item"] if item_id else []), *single, *schema.context]
        self.multi_names = list(multi)
        sizes = [
            len(schema.users),
            *([schema.id_size] if item_id else []),
            *(len(a.vocabulary) for a in single.values()),
            *(len(v) for v in schema.context.values()),
            *(len(a.vocabulary) for a in multi.values()),
        ]
        starts = np.cumsum([0, *sizes])
        self.rows = int(starts[-1])
        self.item_start = int(starts[1])
        items = len(schema.items)
        rows = [*([schema.id_rows] if item_id else []), *(a.rows for a in single.values())]
        first = 1 + len(rows)
        columns = [column + start for column, start in zip(rows, starts[1:], strict=False)]
        item_rows = np.stack(columns, 1) if columns else np.zeros((items, 0), np.int64)
        self._buffer("item_rows", item_rows)
        self._buffer("offsets", starts[[0, *range(first, first + len(schema.context))]])
        self.pads = [int(start) for start in starts[len(self.names) : -1]]
        for place, attribute in enumerate(multi.values()):
            self._buffer(f"multi_{place}", attribute.rows + self.pads[place])
        # Codes have a fused table of their own: it may learn at another rate.
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
        # Not persistent: part of the schema and the codes, which are saved on their own.
        self.register_buffer(
            name, torch.from_numpy(np.ascontiguousarray(array, np.int64)), persistent=False
        )

    def forward(self, inputs: Inputs) -> Positions:
        """Look up the rows of a batch."""
        # Hiding ids at random trains the unknown rows; attributes and codes stay visible.
        user, item = inputs.user, inputs.item
        item_rows = self.item_rows[item]
        if self.training and self.unknown_rate > 0:
            user = torch.where(self._hidden(user), 0, user)
            if self.item_id:
                ids = torch.where(self._hidden(item), self.item_start, item_rows[:, 0])
                item_rows = torch.cat([ids[:, None], item_rows[:, 1:]], 1)
        single = [user[:, None], item_rows]
        if len(self.offsets) > 1:
            single.append(inputs.context + self.offsets[1:])
        dense = (inputs.dense - self.center) / self.spread if self.dense_names else inputs.dense
        past = inputs.history
        return Positions(
            single=torch.cat(single, 1),
            multi=tuple(self.get_buffer(f"multi_{n}")[item] for n in range(len(self.multi_names))),
            dense=dense,
            codes=self.code_rows[item] if self.slots else item_rows,
            past_items=self.item_rows[past][..., 0] if self.history and self.item_id else past,
            past_codes=self.code_rows[past] if self.history and self.slots else past,
            past=(past > 0).to(self.center.dtype),
        )

    def _hidden(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, device=like.device) < self.unknown_rate


class FieldTables(nn.Module):
    """The embeddings of all fields, ``(batch, fields, width)``."""

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
        # Unknown rows start at zero, so that they add nothing before they learn.
        unknown = [*index.offsets.tolist(), *index.pads, *index.item_rows[0].tolist()]
        with torch.no_grad():
            self.base[unknown] = 0.0
        # The order of the fields: base, several values, dense, item history, codes, code history.
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
            self.groups = [
                [slot for slot, field in enumerate(codes.field_of) if field == number]
                for number in range(len(codes.fields))
            ]
            names += codes.fields
            if self.history:
                names += [f"history:{field}" for field in codes.fields]
        self.names = names

    def _gather(self, table: Tensor, rows: Tensor) -> Tensor:
        if self.sparse:  # gradients of the rows alone, for `RowwiseAdamW`
            return nn.functional.embedding(rows, table, sparse=True)
        # The same values; on CPUs the gradient of `embedding` adds row by row, this one at once.
        return table.index_select(0, rows.reshape(-1)).view(*rows.shape, table.shape[1])

    def forward(self, positions: Positions) -> Tensor:
        """Gather the embeddings of a batch."""
        # One embedding per field; several values and histories become the mean of theirs.
        past = positions.past
        fields = [self._gather(self.base, positions.single)]
        for rows, pad in zip(positions.multi, self.pads, strict=True):
            fields.append(_mean(self._gather(self.base, rows), (rows > pad).to(self.base.dtype)))
        # A dense column is its value times one trained vector.
        if self.dense is not None:
            fields.append(positions.dense.unsqueeze(-1) * self.dense)
        if self.history and self.item_id:
            fields.append(_mean(self._gather(self.base, positions.past_items), past))
        if self.codes is not None:
            fields.append(self._grouped(self._gather(self.codes, positions.codes)))
            if self.history:
                past_codes = self._grouped(self._gather(self.codes, positions.past_codes))
                weight = past / past.sum(1, keepdim=True).clamp(min=1)
                fields.append((past_codes * weight[:, :, None, None]).sum(1))
        return torch.cat(fields, 1)

    def _grouped(self, e: Tensor) -> Tensor:
        """Add up the slots of each field: ``(..., slots, width)`` to ``(..., fields, width)``."""
        if all(len(slots) == 1 for slots in self.groups):  # every slot is a field
            return e
        return torch.stack([e[..., slots, :].sum(-2) for slots in self.groups], -2)


def _mean(e: Tensor, weight: Tensor) -> Tensor:
    """Average ``(batch, values, width)`` over the values of weight 1; ``(batch, 1, width)``."""
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
    return weight.unsqueeze(1) @ e


class WideId(nn.Module):
    """The control of equal size: the codes' number of parameters, spent on the item id."""

    id_rows: Tensor

    def __init__(self, schema: Schema, codes: CodeTable, *, width: int, std: float) -> None:
        super().__init__()
        self.fields, self.width = len(codes.fields), width
        # A narrow second table of item ids is mapped linearly to as many fields as the codes fill:
        # ids * extra + extra * fields * width parameters shall equal those of the codes.
        extra = max(1, round(sum(codes.sizes) * width / (schema.id_size + self.fields * width)))
        self.table = nn.Parameter(torch.empty(schema.id_size, extra).normal_() * std)
        with torch.no_grad():
            self.table[0] = 0.0
        self.map = nn.Parameter(torch.empty(extra, self.fields * width))
        nn.init.xavier_normal_(self.map)
        self.register_buffer("id_rows", torch.from_numpy(schema.id_rows), persistent=False)

    def forward(self, item: Tensor) -> Tensor:
        """Return ``(batch, fields, width)`` for catalogue rows ``(batch,)``."""
        rows = self.table.index_select(0, self.id_rows[item])
        mapped: Tensor = rows @ self.map
        return mapped.reshape(-1, self.fields, self.width)


class RankingNetwork(nn.Module):
    """Inputs to logits; ``forward`` returns the loss, as the training loop expects."""

    def __init__(
        self,
        schema: Schema,
        codes: CodeTable | None,
        config: RankerConfig,
        *,
        item_id: bool = True,
    ) -> None:
        super().__init__()
        width, std = config.width, config.init_std
        self.index = FieldIndex(schema, codes, item_id=item_id, unknown_rate=config.unknown_rate)
        # Tables, first the fused ones, then the control's; their fields are concatenated.
        total = self.index.rows + self.index.code_total
        sparse = config.sparse
        self.sparse = total > SPARSE_ROWS if sparse is None else sparse
        self.embedding_penalty = config.embedding_penalty
        self.tables = FieldTables(self.index, codes, width=width, std=std, sparse=self.sparse)
        fields = len(self.tables.names)
        self.wide = None
        if codes is not None and codes.widened:
            self.wide = WideId(schema, codes, width=width, std=std)
            fields += self.wide.fields
        self.fusion = MoCFusion(fields, width, rank=config.fusion_rank) if config.fusion else None
        self.model = make_model(config.model, fields=fields, width=width, options=config.options)
        # First-order weights are embeddings of width 1 in tables of their own.
        self.first = None
        if self.model.first_order:
            self.first = FieldTables(self.index, codes, width=1, std=0.0, sparse=self.sparse)
        self.fields = fields

    @property
    def all_tables(self) -> list[FieldTables]:
        """The tables of embeddings, and of first-order weights if the model reads them."""
        return [self.tables, *([] if self.first is None else [self.first])]

    @property
    def _embeddings(self) -> list[nn.Module]:
        """All that `embedding_penalty` shrinks."""
        return [*self.all_tables, *([] if self.wide is None else [self.wide])]

    @property
    def field_names(self) -> list[str]:
        """Name of every field, in order."""
        wide = [] if self.wide is None else [f"wide:{n + 1}" for n in range(self.wide.fields)]
        return [*self.tables.names, *wide]

    def embed(self, inputs: Inputs, positions: Positions | None = None) -> Tensor:
        """Return field embeddings ``(batch, fields, width)`` before fusion."""
        e: Tensor = self.tables(self.index(inputs) if positions is None else positions)
        return e if self.wide is None else torch.cat([e, self.wide(inputs.item)], 1)

    def logits(self, inputs: Inputs) -> Tensor:
        """Return logits ``(batch,)``."""
        positions = self.index(inputs)
        # Embeddings, fusion, model; under autocast the logit returns to float32 for the loss.
        e = self.embed(inputs, positions)
        if self.fusion is not None:
            e = self.fusion(e)
        first = None if self.first is None else self.first(positions)[..., 0]
        logits: Tensor = self.model(e, first)
        return logits.float()

    def forward(self, batch: tuple[Inputs, Tensor]) -> Step:
        """Return the mean log loss of inputs and labels, plus the penalty of embeddings."""
        inputs, labels = batch
        loss = nn.functional.binary_cross_entropy_with_logits(self.logits(inputs), labels)
        if self.embedding_penalty:
            # Of all rows, not those of the batch alone: rare ones shrink towards 0, the unknown.
            tables = [p for module in self._embeddings for p in module.parameters()]
            loss = loss + self.embedding_penalty / 2 * sum(p.square().sum() for p in tables)
        return Step(loss, {})

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters of the tables, the codes' tables and the rest."""
        total = sum(p.numel() for p in self.parameters())
        counts = {
            "tables": sum(t.base.numel() for t in self.all_tables),
            "codes": sum(t.codes.numel() for t in self.all_tables if t.codes is not None),
            "wide": 0 if self.wide is None else sum(p.numel() for p in self.wide.parameters()),
        }
        return {**counts, "rest": total - sum(counts.values()), "total": total}


def make_network(
    schema: Schema,
    codes: CodeTable | None,
    config: RankerConfig,
    *,
    item_id: bool = True,
    seed: int = 0,
) -> RankingNetwork:
    """Return a network whose initial weights are a function of ``seed`` alone."""
    # The generator of the caller stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(child_seed(seed, "start"))
        return RankingNetwork(schema, codes, config, item_id=item_id)
