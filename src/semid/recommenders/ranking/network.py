"""A whole ranking model: rows to embeddings, fusion, the model proper, a logit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from semid.options import MAX_WIDTH, Options, option
from semid.recommenders.ranking.embedding import FieldIndex, FieldTables
from semid.recommenders.ranking.features import CodeTable
from semid.recommenders.ranking.fusion import MoCFusion
from semid.recommenders.ranking.models.registry import make_model
from semid.recommenders.ranking.schema import Inputs, Schema
from semid.seeds import child_seed
from semid.training.loop import Step

__all__ = ["SPARSE_ROWS", "RankerConfig", "RankingNetwork", "WideId", "make_network"]

SPARSE_ROWS = 1_000_000
"""Tables with more rows get row-wise updates unless told otherwise: a step then costs the rows of
its batch instead of all."""


@dataclass(frozen=True, kw_only=True)
class RankerConfig(Options):
    """What is built on the data.

    Attributes:
        model: ``deepfm``, ``deepim``, ``autoint`` or ``dcnv2``.
        width: of an embedding (16 is ours; the MoC paper prints none).
        fusion: MoC fusion before the model.
        fusion_rank: of its bottleneck.
        options: keyword arguments of the model's class.
        unknown_rate: share of training rows that see an unknown user or item id (ours; 0 hides
            nothing).
        init_std: of the embeddings' normal start.
        sparse: row-wise updates of the tables; None decides by `SPARSE_ROWS`.
    """

    model: str = "deepfm"
    width: int = option(16, ge=1, le=MAX_WIDTH, name="--width (width=)")
    fusion: bool = False
    fusion_rank: int = option(16, ge=1, le=MAX_WIDTH, name="--fusion-rank (fusion_rank=)")
    options: Mapping[str, Any] = field(default_factory=dict)
    unknown_rate: float = option(0.0, ge=0, lt=1)
    init_std: float = option(0.01, ge=0)
    sparse: bool | None = None

    def _problems(self) -> list[str]:
        with torch.device("meta"):  # checks the model's own options without making its weights
            make_model(self.model, fields=2, width=2, options=self.options)
        return []

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, JSON-able."""
        found = asdict(self)
        found["options"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.options.items()
        }
        return found


class WideId(nn.Module):
    """The control of equal size: what codes would cost, spent on the item id.

    A narrow table more for the id, mapped linearly to as many fields as the codes would fill. Its
    width is chosen so that table and map together have about the codes' number of parameters.

    Args:
        schema: holds the rows of the item ids.
        codes: the codes it stands for.
        width: of an embedding.
        std: of the table's normal start.
    """

    id_rows: Tensor

    def __init__(self, schema: Schema, codes: CodeTable, *, width: int, std: float) -> None:
        super().__init__()
        self.fields, self.width = len(codes.fields), width
        wanted = codes.parameters * width
        self.extra = max(1, round(wanted / (schema.id_size + self.fields * width)))
        self.table = nn.Parameter(torch.empty(schema.id_size, self.extra).normal_() * std)
        with torch.no_grad():
            self.table[0] = 0.0
        self.map = nn.Parameter(torch.empty(self.extra, self.fields * width))
        nn.init.xavier_normal_(self.map)
        self.register_buffer("id_rows", torch.from_numpy(schema.id_rows), persistent=False)

    def forward(self, item: Tensor) -> Tensor:
        """Return ``(batch, fields, width)`` for catalogue rows ``(batch,)``."""
        rows = self.table.index_select(0, self.id_rows[item])
        spread: Tensor = rows @ self.map
        return spread.reshape(-1, self.fields, self.width)


class RankingNetwork(nn.Module):
    """Inputs to logits; as the training loop wants it, ``forward`` returns the loss.

    Args:
        schema: vocabularies and attributes.
        codes: code features, or None.
        config: what is built on them.
        item_id: whether the item id has a field.
    """

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
        total = self.index.rows + self.index.code_total
        sparse = config.sparse
        self.sparse = total > SPARSE_ROWS if sparse is None else sparse
        self.tables = FieldTables(self.index, codes, width=width, std=std, sparse=self.sparse)
        fields = self.tables.fields
        self.wide = None
        if codes is not None and codes.widened:
            self.wide = WideId(schema, codes, width=width, std=std)
            fields += self.wide.fields
        self.fusion = MoCFusion(fields, width, rank=config.fusion_rank) if config.fusion else None
        self.model = make_model(config.model, fields=fields, width=width, options=config.options)
        self.first = None
        if self.model.first_order:
            self.first = FieldTables(self.index, codes, width=1, std=0.0, sparse=self.sparse)
        self.fields = fields

    @property
    def field_names(self) -> list[str]:
        """Name of every field, in order."""
        wide = [] if self.wide is None else [f"wide:{n + 1}" for n in range(self.wide.fields)]
        return [*self.tables.names, *wide]

    def embed(self, inputs: Inputs) -> Tensor:
        """Return field embeddings ``(batch, fields, width)`` before fusion."""
        e: Tensor = self.tables(self.index(inputs))
        return e if self.wide is None else torch.cat([e, self.wide(inputs.item)], 1)

    def logits(self, inputs: Inputs) -> Tensor:
        """Return logits ``(batch,)``."""
        at = self.index(inputs)
        e = self.tables(at)
        if self.wide is not None:
            e = torch.cat([e, self.wide(inputs.item)], 1)
        if self.fusion is not None:
            e = self.fusion(e)
        first = None if self.first is None else self.first(at)[..., 0]
        found: Tensor = self.model(e, first)
        return found.float()

    def forward(self, batch: tuple[Inputs, Tensor]) -> Step:
        """Return the mean log loss of a batch of inputs and labels."""
        inputs, labels = batch
        loss = nn.functional.binary_cross_entropy_with_logits(self.logits(inputs), labels)
        return Step(loss, {})

    def parameter_counts(self) -> dict[str, int]:
        """Count parameters of the tables, the codes' tables among them, and the rest."""
        total = sum(p.numel() for p in self.parameters())
        tables = [self.tables, *([] if self.first is None else [self.first])]
        base = sum(t.base.numel() for t in tables)
        codes = sum(t.codes.numel() for t in tables if t.codes is not None)
        wide = 0 if self.wide is None else sum(p.numel() for p in self.wide.parameters())
        return {
            "tables": base,
            "codes": codes,
            "wide": wide,
            "rest": total - base - codes - wide,
            "total": total,
        }


def make_network(
    schema: Schema,
    codes: CodeTable | None,
    config: RankerConfig,
    *,
    item_id: bool = True,
    seed: int = 0,
) -> RankingNetwork:
    """Build a network whose start is a function of ``seed`` alone.

    Raises:
        UsageError: an unknown model or option.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(child_seed(seed, "start"))
        return RankingNetwork(schema, codes, config, item_id=item_id)
