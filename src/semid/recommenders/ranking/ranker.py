"""A trained ranking model with everything it needs to score raw users and items."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from semid.artefact import read_artefact, write_artefact
from semid.codes import CodesInfo, SemanticIds
from semid.data.ids import ItemIds
from semid.data.tables import Table, open_table
from semid.documents import checked, code_span, escaped
from semid.errors import InputError
from semid.hub import Publishable
from semid.lazy import plain_torch
from semid.recommenders import UsesCodes
from semid.recommenders.ranking.features import CodeFeatures, CodeTable, extend_codes
from semid.recommenders.ranking.item_table import extend_schema
from semid.recommenders.ranking.metrics import predict_logits, sigmoid
from semid.recommenders.ranking.network import RankerConfig, RankingNetwork, make_network
from semid.recommenders.ranking.schema import (
    HistoryIndex,
    RankingRows,
    Schema,
    as_text,
    every_column,
    one_array,
)
from semid.tokenizers.stored import described
from semid.training.checkpoint import load_module_, module_arrays

logger = logging.getLogger(__name__)

HISTORY_COLUMN = "history"
"""Column of `Ranker.predict` with each row's history, lists of item ids, oldest first."""


CONFIG: dict[str, Any] = {
    "architecture": RankerConfig,
    "features": CodeFeatures | None,
    "item_id": bool,
    "schema": dict[str, Any],
    "codes": dict[str, Any] | None,
    "codes_info": CodesInfo | None,
    "report": dict[str, Any],
}
"""Types of the config of a ranking model."""


@dataclass(frozen=True)
class Prediction:
    """Scores of rows."""

    probability: npt.NDArray[np.float32]  # ``(rows,)`` float32 in [0, 1]
    logit: npt.NDArray[np.float32]  # ``(rows,)`` float32
    # number of rows that read an unknown row, by what was unknown: ``user``, ``item`` (not in the
    # catalogue), ``item_id`` (in the catalogue, but too rare in training for an embedding),
    # ``codes`` (an item without codes), and each context column
    unknown: dict[str, int]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.logit)


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first."""

    items: list[str]  # item ids
    probability: npt.NDArray[np.float32]  # ``(items,)`` float32
    unknown: dict[str, int]  # as in `Prediction`


@dataclass(kw_only=True, eq=False, repr=False)
class Ranker(UsesCodes, Publishable):
    """A ranking model; `train_ranker` returns one, `semid.load` opens one.

    Attributes:
        schema: vocabularies and item attributes.
        network: trained network, on the CPU.
        config: its architecture.
        features: how codes are used, or None.
        codes: joined codes, or None.
        codes_info: tokenizer and codebooks of the codes, or None.
        report: metrics of the training.
    """

    kind: ClassVar[str] = "ranker"

    schema: Schema
    network: RankingNetwork
    config: RankerConfig
    features: CodeFeatures | None = None
    codes: CodeTable | None = None
    codes_info: CodesInfo | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Put the network in evaluation mode."""
        self.network.eval()

    def rows(self, frame: Any) -> tuple[RankingRows, dict[str, int]]:
        """Look a table up: rows with labels 0, and the counts of what was unknown."""
        schema = self.schema
        table = open_table(frame, what="the rows to score")
        names = [schema.user_column, schema.item_column, *schema.context, *schema.dense]
        for name in names:
            table.require(name, flag="a column of the model")
        with_history = schema.history > 0 and HISTORY_COLUMN in table.names
        read = table.read([*names, *([HISTORY_COLUMN] if with_history else [])])
        ids = every_column(
            (schema.user_column, schema.item_column),
            lambda name: as_text(read.column(name), name=name, label=table.label),
        )
        # Look everything up; what is unknown reads row 0.
        user = schema.users.rows(ids[schema.user_column])
        item = schema.items.rows(ids[schema.item_column])
        features = {n: read.column(n) for n in (*schema.context, *schema.dense)}
        context, dense = schema.context_rows(features, rows=len(user), label=table.label)
        columns = {"user": user.astype(np.int32), "item": item.astype(np.int32)}
        columns |= {"label": np.zeros(len(user), np.float32)}
        history = self._history(user, read, table) if schema.history else None
        rows = RankingRows.of(
            {**columns, "context": context, "dense": dense}, person=user, history=history
        )
        return rows, self._unknown(user, item, context)

    def _history(self, user: npt.NDArray[np.int64], read: pa.Table, table: Table) -> HistoryIndex:
        """Return the histories of rows, from their column or else from training."""
        length = self.schema.history
        if HISTORY_COLUMN not in read.column_names:
            # Users' histories are stored newest first; reversed and flattened, each is a span.
            items = np.ascontiguousarray(self.schema.user_history[:, ::-1]).reshape(-1)
            spans = np.stack([user * length, (user + 1) * length], axis=1)
            return HistoryIndex(torch.from_numpy(items), torch.from_numpy(spans), length)
        column = one_array(read.column(HISTORY_COLUMN))
        try:
            lists = column.cast(pa.large_list(pa.large_string()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(
                f"column '{HISTORY_COLUMN}' of {table.label} holds {column.type}; give lists of "
                "item ids, oldest first"
            ) from None
        items = self.schema.items.rows(lists.flatten())
        lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        # Lists are oldest first, as the index wants its spans; unknown items are padding.
        ends = np.cumsum(lengths, dtype=np.int64)
        spans = np.stack([ends - lengths, ends], axis=1)
        return HistoryIndex(torch.from_numpy(items), torch.from_numpy(spans), length)

    def _unknown(
        self, user: npt.NDArray[np.int64], item: npt.NDArray[np.int64], context: npt.NDArray[Any]
    ) -> dict[str, int]:
        # Row 0 is the unknown one in every table.
        unknown = {
            "user": int((user == 0).sum()),
            "item": int((item == 0).sum()),
            "item_id": int(((item > 0) & (self.schema.id_rows[item] == 0)).sum()),
        }
        if self.codes is not None and not self.codes.widened:
            unknown["codes"] = int((self.codes.rows[item] == 0).all(axis=1).sum())
        for place, name in enumerate(self.schema.context):
            unknown[name] = int((context[:, place] == 0).sum())
        return unknown

    def predict(self, frame: Any) -> Prediction:
        """Score rows.

        Args:
            frame: table (path, Arrow, pandas, polars) or dictionary of columns, with the user
                and item columns of the training log, its context columns, and optionally
                `HISTORY_COLUMN`; without it a known user's training history is used.

        Returns:
            Scores in the order of the rows. Users and items that training did not see read the
            unknown rows; a warning counts them.

        Raises:
            UsageError: a column is missing.
            InputError: a column of a wrong type, or NaN in a dense one.
        """
        rows, unknown = self.rows(frame)
        logits = predict_logits(self.network, rows)
        listed = ", ".join(f"{count} by {name}" for name, count in unknown.items() if count)
        if listed:
            logger.warning("of %d rows, unknown to the model: %s", len(rows), listed)
        return Prediction(sigmoid(logits).astype(np.float32), logits, unknown)

    def rank(
        self,
        user: Any,
        candidates: Sequence[Any] | None = None,
        *,
        k: int | None = None,
        context: dict[str, Any] | None = None,
    ) -> Ranking:
        """Order candidates for a user.

        Args:
            user: user id.
            candidates: item ids; None takes the whole catalogue.
            k: number of items to return; None returns all.
            context: a value for each context column, and optionally `HISTORY_COLUMN`.

        Returns:
            Items, best first; equal scores keep the order of the candidates.
        """
        if candidates is None:
            items = self.schema.items.ids.strings()
        else:
            items = ItemIds(list(candidates), source="candidates").strings()
        # One row per candidate, all of this user and context.
        constants = {self.schema.user_column: str(user), **(context or {})}
        columns = {name: pa.array([value] * len(items)) for name, value in constants.items()}
        scored = self.predict({**columns, self.schema.item_column: items})
        # By logit: probabilities of large logits are equal in float32.
        order = np.argsort(-scored.logit, kind="stable")[:k]
        names = items.take(pa.array(order)).to_pylist()
        return Ranking(names, scored.probability[order], scored.unknown)

    def with_items(self, items: Any, *, ids: SemanticIds | None = None) -> Ranker:
        """Return a model that knows further items by their attributes and codes.

        New items have no embedding of their id; they are scored by what they share with others.
        Weights stay as they are.

        Args:
            items: table with ``item_id`` and the attributes of the training items; known items
                are left alone.
            ids: Semantic IDs of the new items by the same codebooks (for prefix and n-gram features
                of the known items too). None leaves them without codes.

        Raises:
            FingerprintError: codes of another codebook.
            UsageError: the model cannot use codes, or a column is missing.
        """
        if ids is not None:
            self.check_codes(ids)
        schema, new = extend_schema(self.schema, items)
        codes = self.codes
        if codes is not None and self.features is not None:
            codes = extend_codes(codes, self.features, self.schema.items.ids, new, ids)
        # The tables' sizes stay, only the buffers that map items to rows grow. Weights are copied.
        network = make_network(schema, codes, self.config, item_id=self.network.index.item_id)
        load_module_(network, module_arrays(self.network))
        return replace(self, schema=schema, network=network, codes=codes)

    def _card_data(self) -> dict[str, Any]:
        """Return what the card's metadata on the Hugging Face Hub say."""
        test = self.report.get("test", {})
        names = ("auc", "log_loss", "user_auc", "popularity_auc")
        metrics = {f"test_{name}": test[name] for name in names if name in test}
        return {"kind": self.config.model, "metrics": metrics}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the artefact folder (``config.json``, ``model.safetensors``, ``README.md``).

        Raises:
            OutputExistsError: ``path`` exists and ``overwrite`` is false.
        """
        codes = self.codes
        config: dict[str, Any] = {
            "kind": self.kind,
            "architecture": self.config.to_dict(),
            "features": None if self.features is None else asdict(self.features),
            "item_id": self.network.index.item_id,
            "schema": self.schema.to_config(),
            "codes": None,
            "codebook_fingerprint": self.codebook_fingerprint,
            "codes_info": None if self.codes_info is None else asdict(self.codes_info),
            "report": self.report,
        }
        # Buffers are part of the schema and the codes, which are stored once, on their own.
        tensors = {f"network.{n}": a for n, a in module_arrays(self.network).items()}
        tensors |= {n: a for n, a in self.schema.tensors().items() if a.size or a.ndim < 2}
        if codes is not None:
            config["codes"] = {name: value for name, value in vars(codes).items() if name != "rows"}
            tensors["codes.rows"] = codes.rows
        return write_artefact(
            path, config=config, tensors=tensors, card=_card(config), overwrite=overwrite
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; the scores are exactly those of the saved model.

        Raises:
            ArtefactError: the folder is incomplete, altered, or of another kind.
        """
        config, tensors = read_artefact(path, kind=cls.kind)
        with described(path, "ranking model"), plain_torch():
            values = checked(CONFIG, {name: config[name] for name in CONFIG}, "config.json")
            schema = Schema.of(values["schema"], tensors)
            codes = None
            if values["codes"] is not None:
                codes = CodeTable.of(values["codes"], tensors["codes.rows"])
                if values["codes_info"] is None:
                    raise ValueError("it has codes and does not say of which model")
                if len(codes.rows) != len(schema.items):
                    raise ValueError(f"{len(codes.rows)} rows of codes, {len(schema.items)} items")
            # A config may declare any size: only the arrays themselves may take memory.
            with torch.device("meta"):
                network = make_network(
                    schema, codes, values["architecture"], item_id=values["item_id"]
                )
            arrays = {n[8:]: a for n, a in tensors.items() if n.startswith("network.")}
            load_module_(network, arrays)
        rest = {name: values[name] for name in ("features", "codes_info", "report")}
        return cls(
            schema=schema, network=network, config=values["architecture"], codes=codes, **rest
        )

    def __repr__(self) -> str:
        """Show model, fields and size."""
        return (
            f"Ranker({self.config.model}, fields={self.network.field_names}, "
            f"parameters={self.network.parameter_counts()['total']:,})"
        )


def _card(config: Mapping[str, Any]) -> str:
    """Return the README of a saved model: what it is, its metrics, how to use it."""
    report, schema = config["report"], config["schema"]
    architecture = config["architecture"]
    fusion = " with Mixture-of-Codes fusion" if architecture["fusion"] else ""
    columns = [*schema["attributes"], *schema["context"], *schema["dense"]]
    fields = ["user", "item", *map(escaped, columns)]
    codes = f" and the codes of {config['codes_info']['tokenizer']}" if config["codes"] else ""
    lines = [f"# {architecture['model']}{fusion}", ""]
    lines += [f"A ranking model by semid over {', '.join(fields)}{codes}.", ""]
    if "protocol" in report:
        lines += [
            f"Protocol: {code_span(report['protocol'])}",
            "",
            "| rows | AUC | popularity alone | log loss | AUC by user | calibration error |",
            "|---|---|---|---|---|---|",
        ]
        parts = {part: report[part] for part in ("validation", "test", "cold") if part in report}
        parts |= {f"test, {name} items": s for name, s in report.get("slices", {}).items()}
        baseline = report.get("baseline", {})
        parts |= {f"{n}, without codes": baseline[n] for n in ("test", "cold") if n in baseline}
        lines += [*(_line(name, figures) for name, figures in parts.items()), ""]
    lines += [
        "```python",
        "import semid",
        "",
        "ranker = semid.load(path_of_this_folder)",
        f"ranker.predict({{{schema['user_column']!r}: [...], {schema['item_column']!r}: [...]}})",
        "ranker.rank(user, candidates, k=10)",
        "```",
        "",
    ]
    if config["codebook_fingerprint"]:
        lines += [f"Codebook: `{config['codebook_fingerprint']}`", ""]
    return "\n".join(lines)


def _line(name: str, figures: Mapping[str, Any]) -> str:
    keys = ("auc", "popularity_auc", "log_loss", "user_auc", "calibration_error")
    cells = ["-" if figures[key] is None else f"{figures[key]:.4f}" for key in keys]
    return f"| {name} ({figures['rows']:,}) | " + " | ".join(cells) + " |"
