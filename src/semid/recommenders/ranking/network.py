"""The whole network: rows to embeddings, fusion, the ranking model, a logit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from semid.options import MAX_WIDTH, Options, option
from semid.recommenders.ranking.embedding import FieldIndex, FieldTables, Positions
from semid.recommenders.ranking.features import CodeTable
from semid.recommenders.ranking.layers import MoCFusion
from semid.recommenders.ranking.models import MODELS, make_model
from semid.recommenders.ranking.schema import Inputs, Schema
from semid.seeds import child_seed
from semid.training.loop import Step

SPARSE_ROWS = 1_000_000
"""Larger tables get row-wise updates by default, so that a step costs the rows of its batch."""


@dataclass(frozen=True, kw_only=True)
class RankerConfig(Options):
    """Architecture of a ranking model.

    Attributes:
        model: ``deepfm``, ``deepim``, ``autoint`` or ``dcnv2``.
        width: width of an embedding (16 is ours; the MoC paper prints none).
        fusion: MoC fusion before the model.
        fusion_rank: rank of its bottleneck.
        options: options of the model by name, see `semid.recommenders.ranking.models`.
        unknown_rate: share of training rows that see an unknown user or item id, so that the
            embeddings of unknown ones learn (ours; 0 hides nothing).
        init_std: standard deviation of the embeddings' initial values.
        sparse: row-wise updates of the tables; None decides by `SPARSE_ROWS`.
    """

    model: str = option(
        "deepfm", name="--model (model=)", help="Ranking model: deepfm, deepim, autoint or dcnv2."
    )
    width: int = option(
        16, ge=1, le=MAX_WIDTH, name="--width (width=)", help="Width of an embedding."
    )
    fusion: bool = option(False, help="Mixture-of-Codes fusion before the model.")
    fusion_rank: int = option(
        16,
        ge=1,
        le=MAX_WIDTH,
        name="--fusion-rank (fusion_rank=)",
        help="Rank of the fusion's bottleneck.",
    )
    options: Mapping[str, Any] = option(
        default_factory=dict, help="Options of the ranking model, by name."
    )
    unknown_rate: float = option(
        0.0, ge=0, lt=1, help="Share of training rows whose user or item id is hidden."
    )
    init_std: float = option(0.01, ge=0, help="Standard deviation of initial embeddings.")
    sparse: bool | None = option(
        None, help="Row-wise updates of embedding tables; by default for large tables."
    )

    def _problems(self) -> list[str]:
        MODELS.load(self.model, flag="--model (model=)").options.of(self.options)
        return []


class WideId(nn.Module):
    """The control of equal size: the codes' number of parameters, spent on the item id.

    A narrow second table of item ids, mapped linearly to as many fields as the codes would fill.
    Its width is chosen so that table and map together have about as many parameters as the codes.
    """

    id_rows: Tensor

    def __init__(self, schema: Schema, codes: CodeTable, *, width: int, std: float) -> None:
        super().__init__()
        self.fields, self.width = len(codes.fields), width
        # ids * extra + extra * fields * width parameters shall equal those of the codes.
        extra = max(1, round(codes.parameters * width / (schema.id_size + self.fields * width)))
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
        self.tables = FieldTables(self.index, codes, width=width, std=std, sparse=self.sparse)
        fields = self.tables.fields
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
    def field_names(self) -> list[str]:
        """Name of every field, in order."""
        wide = [] if self.wide is None else [f"wide:{n + 1}" for n in range(self.wide.fields)]
        return [*self.tables.names, *wide]

    def embed(self, inputs: Inputs) -> Tensor:
        """Return field embeddings ``(batch, fields, width)`` before fusion."""
        return self._embed(self.index(inputs), inputs.item)

    def _embed(self, positions: Positions, item: Tensor) -> Tensor:
        e: Tensor = self.tables(positions)
        return e if self.wide is None else torch.cat([e, self.wide(item)], 1)

    def logits(self, inputs: Inputs) -> Tensor:
        """Return logits ``(batch,)``."""
        positions = self.index(inputs)
        # Embeddings, fusion, model; under autocast the logit returns to float32 for the loss.
        e = self._embed(positions, inputs.item)
        if self.fusion is not None:
            e = self.fusion(e)
        first = None if self.first is None else self.first(positions)[..., 0]
        logits: Tensor = self.model(e, first)
        return logits.float()

    def forward(self, batch: tuple[Inputs, Tensor]) -> Step:
        """Return the mean log loss of a batch of inputs and labels."""
        inputs, labels = batch
        loss = nn.functional.binary_cross_entropy_with_logits(self.logits(inputs), labels)
        return Step(loss, {})

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters of the tables, the codes' tables and the rest."""
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
    """Return a network whose initial weights are a function of ``seed`` alone."""
    # The generator of the caller stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(child_seed(seed, "start"))
        return RankingNetwork(schema, codes, config, item_id=item_id)
