"""A trained next-item model with everything it needs to recommend to raw users."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from semid.artefact import read_artefact, write_artefact
from semid.catalogue.beams import Buckets
from semid.codes import CodesInfo, SemanticIds
from semid.data.ids import ItemIds
from semid.data.interactions import read_interactions
from semid.data.sequences import Sequences
from semid.documents import checked, code_span
from semid.errors import UsageError
from semid.options import Options
from semid.output import atomic_file
from semid.progress import Progress, QuietProgress
from semid.recommenders.ranking.schema import Vocabulary
from semid.recommenders.retrieval.data import (
    TARGETS,
    Ints,
    RetrievalData,
    RetrievalItems,
    check_arrays,
    pack,
    prepare_retrieval_data,
)
from semid.recommenders.retrieval.evaluation import class_buckets, target_ranks
from semid.recommenders.retrieval.metrics import RetrievalResults, summarize
from semid.recommenders.retrieval.networks import MODELS, NextItemModel
from semid.tokenizers.stored import described
from semid.training.checkpoint import load_module_, module_arrays

USERS = 8192
"""Users whose recommendations are written at once."""

CONFIG: dict[str, Any] = {
    "model": str,
    "options": dict[str, Any],
    "sizes": list[int],
    "codes_info": CodesInfo | None,
    "report": dict[str, Any],
}
"""Types of the config of a retriever."""


@dataclass(frozen=True)
class Recommendation:
    """Items for one history, best first.

    Attributes:
        items: item ids.
        scores: ``(items,)`` float32; higher is better, comparable within one history.
    """

    items: list[str]
    scores: npt.NDArray[np.float32]


@dataclass(kw_only=True, eq=False, repr=False)
class Retriever:
    """A next-item model; `train_retriever` returns one, `semid.load` opens one.

    Attributes:
        model: its name.
        options: its options.
        network: the trained model, on the CPU.
        items: catalogue, training counts and codes.
        sequences: histories of the users of the log.
        codes_info: tokenizer and codebooks of the codes, or None.
        report: figures of training, validation and test, JSON-able.
        results: the same of this run with the values of each user, by part; empty after `load`.
    """

    kind: ClassVar[str] = "retriever"

    model: str
    options: Options
    network: NextItemModel
    items: RetrievalItems
    sequences: Sequences
    codes_info: CodesInfo | None = None
    report: dict[str, Any] = field(default_factory=dict)
    results: dict[str, RetrievalResults] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Put the network in evaluation mode."""
        self.network.eval()
        self._orders: dict[str, Buckets] = {}

    @property
    def codebook_fingerprint(self) -> str | None:
        """SHA-256 of the codebooks of the model's codes; None without codes."""
        return None if self.codes_info is None else self.codes_info.codebook_fingerprint

    def evaluate(
        self,
        interactions: Any,
        *,
        part: str = "test",
        ids: SemanticIds | None = None,
        replicates: int = 1000,
        **columns: Any,
    ) -> RetrievalResults:
        """Measure how well the model recommends each user's next item, among all items.

        Args:
            interactions: a log with the items of the catalogue, or the data of the training.
            part: ``test`` (each user's last item) or ``validation`` (the one before it).
            ids: Semantic IDs to compare with the model's: another codebook is refused.
            replicates: bootstrap draws of users for the intervals.
            columns: names of columns and the order of ties, as for `semid.read_interactions`.

        Raises:
            FingerprintError: ``ids`` of another codebook.
            InteractionsError: no order, or no user with three known items.
        """
        started = time.monotonic()
        # A log is split anew over the catalogue of the training, whatever other items it names.
        data = interactions
        if not isinstance(data, RetrievalData):
            if ids is not None:
                self.check_codes(ids)
            data = prepare_retrieval_data(interactions, catalogue=self.items.ids, **columns)
        max_length: int = self.options.max_length  # type: ignore[attr-defined]
        histories, targets = data.histories(part, max_length)
        device = next(iter(self.network.buffers())).device
        counts = self.items.counts
        ranks = target_ranks(self.network, histories, targets, counts=counts, device=device)
        return summarize(
            ranks.items,
            targets=targets,
            lengths=data.sequences.lengths - TARGETS[part],
            counts=counts,
            without_history=ranks.without_history,
            id_ranks=ranks.ids,
            replicates=replicates,
            protocol=data.protocol,
            part=part,
            coverage=float(ranks.listed.mean()),
            seconds=time.monotonic() - started,
        )

    def check_codes(self, ids: SemanticIds) -> None:
        """Refuse codes of another codebook than the model was trained with.

        Raises:
            FingerprintError: the fingerprints differ.
            UsageError: the model reads no codes.
        """
        if self.codebook_fingerprint is None:
            raise UsageError("this model was trained without codes, so it cannot use any")
        ids.check_codebook(self.codebook_fingerprint)

    def recommend(
        self,
        histories: Any = None,
        *,
        users: Sequence[Any] | None = None,
        k: int = 10,
        exclude_history: bool = True,
        within_ids: str = "popularity",
    ) -> Any:
        """Recommend the next items.

        Args:
            histories: item ids of one history, oldest first, or a list of such histories. Unknown
                items are left out; a history without a known item gets the most popular ones.
            users: instead, users of the training log, whose whole history there is taken.
            k: items per history.
            exclude_history: leave out what is in the history.
            within_ids: order of the items of one id: ``popularity`` in training, ``embedding``
                (nearest to the last item of the history; needs a model that reads embeddings) or
                ``random``, with a fixed seed.

        Returns:
            A `Recommendation` for one history, a list of them for many.

        Raises:
            UsageError: an unknown user, or neither or both of histories and users.
        """
        if (histories is None) == (users is None):
            raise UsageError("give either histories= or users=")
        if k < 1:
            raise UsageError(f"k={k}: give at least 1")
        if users is not None:
            rows = self._known_histories(users)
            return list(self.recommend_rows(rows, k, exclude_history, within_ids))
        single = len(histories) == 0 or not isinstance(histories[0], list | tuple | np.ndarray)
        rows = [self._rows(history) for history in ([histories] if single else histories)]
        recommended = list(self.recommend_rows(rows, k, exclude_history, within_ids))
        return recommended[0] if single else recommended

    def _known_histories(self, users: Sequence[Any]) -> list[Ints]:
        if isinstance(users, str):
            raise UsageError(f"users='{users}': give a list of users")
        names = ItemIds([str(user) for user in dict.fromkeys(users)], source="users")
        places = ItemIds(self.sequences.user_ids).index_of(names.strings())
        if (places < 0).any():
            raise UsageError(
                f"user '{names[int(np.argmax(places < 0))]}' is not in the training log (which has "
                f"{len(self.sequences)} users with enough items); give their histories instead"
            )
        place = dict(zip(names.strings().to_pylist(), places.tolist(), strict=True))
        return [self.sequences[place[str(user)]].astype(np.int64) for user in users]

    def _rows(self, history: Sequence[Any]) -> Ints:
        if not len(history):
            return np.zeros(0, np.int64)
        rows = self.items.ids.index_of(pa.array([str(item) for item in history]))
        return rows[rows >= 0].astype(np.int64)

    def _buckets(self, order: str) -> Buckets:
        """Return the order of the items within each class, made once."""
        if order not in self._orders:
            vectors = self.items.vectors
            if order == "embedding" and vectors is None:
                raise UsageError(
                    "within_ids='embedding' needs the items' embeddings, which this model was "
                    "trained without; take popularity or random"
                )
            options: dict[str, Any] = {"order": order}
            options |= {"embeddings": vectors} if order == "embedding" else {}
            self._orders[order] = class_buckets(self.network, self.items.counts, **options)
        return self._orders[order]

    def recommend_rows(
        self,
        histories: Sequence[Ints],
        k: int,
        exclude_history: bool = True,
        within_ids: str = "popularity",
    ) -> Iterator[Recommendation]:
        """Yield recommendations for histories ``(n,)`` of catalogue rows; see `recommend`."""
        max_length: int = self.options.max_length  # type: ignore[attr-defined]
        device = next(iter(self.network.buffers())).device
        names = self.items.ids.strings()
        counts = self.items.counts
        buckets = self._buckets(within_ids)
        order = np.argsort(-counts, kind="stable")
        popular = order, counts[order].astype(np.float32)
        size = self.network.batch
        for start in range(0, len(histories), size):
            part = histories[start : start + size]
            # Histories without a known item have nothing to read; they get the popular items.
            known = [history[-max_length:] for history in part if len(history)]
            # A history takes up at most as many places as it has items.
            more = k + max((len(set(h.tolist())) for h in part), default=0) * exclude_history
            lists: Iterator[tuple[Any, Any]] = iter(())
            if known:
                with torch.no_grad():
                    best = self.network.top(pack(known).to(device), more)
                scores, classes = (each.cpu() for each in best)
                # What the model does not score is no recommendation.
                leaves = classes.masked_fill(torch.isneginf(scores), -1).numpy()
                queries = None
                if within_ids == "embedding" and self.items.vectors is not None:
                    queries = self.items.vectors[[history[-1] for history in known]]
                items, places = buckets.first_items(leaves, more, queries=queries)
                values = np.take_along_axis(scores.numpy(), np.maximum(places, 0), 1)
                lists = iter(zip(items, values, strict=True))
            for history in part:
                listed, score = next(lists) if len(history) else popular
                allowed = listed >= 0
                if exclude_history:
                    allowed &= ~np.isin(listed, history)
                first = np.flatnonzero(allowed)[:k]
                yield Recommendation(names.take(pa.array(listed[first])).to_pylist(), score[first])

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the artefact folder (``config.json``, ``model.safetensors``, ``README.md``).

        Raises:
            OutputExistsError: ``path`` exists and ``overwrite`` is false.
        """
        items, sequences = self.items, self.sequences
        config: dict[str, Any] = {
            "kind": self.kind,
            "model": self.model,
            "options": self.options.to_dict(),
            "sizes": list(items.sizes),
            "codebook_fingerprint": self.codebook_fingerprint,
            "codes_info": None if self.codes_info is None else asdict(self.codes_info),
            "report": self.report,
        }
        # What follows from codes and counts is made again by `load` and not stored.
        tensors = {f"network.{n}": a for n, a in module_arrays(self.network).items()}
        tensors |= Vocabulary(items.ids).tensors("items")
        tensors |= Vocabulary(sequences.user_ids, source="users").tensors("users")
        tensors |= {
            "counts": items.counts,
            "history.offsets": sequences.offsets,
            "history.items": sequences.items,
        }
        if items.codes is not None:
            tensors["codes"] = items.codes
        if self.network.reads_vectors and items.vectors is not None:
            tensors["vectors"] = items.vectors
        return write_artefact(
            path, config=config, tensors=tensors, card=_card(config), overwrite=overwrite
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; recommendations are exactly those of the saved model.

        Raises:
            ArtefactError: the folder is incomplete, altered, or of another kind.
        """
        config, tensors = read_artefact(path, kind=cls.kind)
        with described(path, "next-item model"):
            values = checked(CONFIG, {name: config[name] for name in CONFIG}, "config.json")
            items = RetrievalItems(
                Vocabulary.of(tensors, "items").ids,
                tensors["counts"],
                tensors.get("codes"),
                tuple(values["sizes"]),
                tensors.get("vectors"),
            )
            sequences = Sequences(
                Vocabulary.of(tensors, "users").ids.strings(),
                tensors["history.offsets"],
                tensors["history.items"],
            )
            check_arrays(items, sequences)
            model = MODELS.load(values["model"])
            options = model.options.of(values["options"])
            # A config may declare any size: only the arrays themselves may take memory.
            with torch.device("meta"):
                network = model(items, options)
            arrays = {n[8:]: a for n, a in tensors.items() if n.startswith("network.")}
            load_module_(network, arrays)
        return cls(
            model=values["model"],
            options=options,
            network=network,
            items=items,
            sequences=sequences,
            codes_info=values["codes_info"],
            report=values["report"],
        )

    def __repr__(self) -> str:
        """Show model and size."""
        parameters = sum(p.numel() for p in self.network.parameters())
        return f"Retriever({self.model}, items={len(self.items):,}, parameters={parameters:,})"


def write_recommendations(
    retriever: Retriever,
    path: str | os.PathLike[str],
    interactions: Any = None,
    *,
    k: int = 10,
    exclude_history: bool = True,
    within_ids: str = "popularity",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write recommendations for every user of a log to Parquet, and return the number of users.

    Columns: ``user_id``, ``items`` (list of item ids, best first) and ``scores``. Memory does not
    grow with the number of users beyond their histories.

    Args:
        retriever: the model.
        path: file to write.
        interactions: the users' histories, as `semid.read_interactions` reads them; None takes
            those of the training log.
        k: items per user.
        exclude_history: leave out what is in a user's history.
        within_ids: order of the items of one id, as for `Retriever.recommend`.
        overwrite: replace a file that exists.
        progress: callback that receives progress events.
    """
    # Users of a log of their own need no target, so a single item is a history.
    sequences = retriever.sequences
    if interactions is not None:
        log = read_interactions(interactions, rating_column="")
        sequences = log.sequences(retriever.items.ids)
    users = len(sequences)
    schema = pa.schema(
        {
            "user_id": pa.large_string(),
            "items": pa.list_(pa.large_string()),
            "scores": pa.list_(pa.float32()),
        }
    )
    steps = progress or QuietProgress()
    steps.start("recommend", total=users)
    with atomic_file(path, overwrite=overwrite) as work, pq.ParquetWriter(work, schema) as writer:
        for start in range(0, users, USERS):
            stop = min(start + USERS, users)
            rows = [sequences[user].astype(np.int64) for user in range(start, stop)]
            rows = [items[items >= 0] for items in rows]
            best = list(retriever.recommend_rows(rows, k, exclude_history, within_ids))
            columns = [
                sequences.user_ids.slice(start, stop - start),
                pa.array([each.items for each in best], schema.field("items").type),
                pa.array([each.scores for each in best], schema.field("scores").type),
            ]
            writer.write_table(pa.table(columns, schema=schema))
            steps.step(stop - start)
    return users


def _card(config: Mapping[str, Any]) -> str:
    """Return the README of a saved model: what it is, its metrics, how to use it."""
    report = config["report"]
    lines = [f"# {config['model']}", ""]
    codes = (
        f" over the codes of {config['codes_info']['tokenizer']}" if config["codes_info"] else ""
    )
    lines += [f"A next-item model by semid{codes}.", ""]
    if "test" in report:
        metrics = report["test"]["metrics"]
        lines += [
            f"Protocol: {code_span(report['protocol'])}",
            "",
            "| metric | test | 95 % interval |",
            "|---|---|---|",
        ]
        for name, estimate in metrics.items():
            low, high = estimate["low"], estimate["high"]
            interval = "-" if low is None else f"{low:.4f} to {high:.4f}"
            lines.append(f"| {name} | {estimate['value']:.4f} | {interval} |")
        lines.append("")
    lines += [
        "```python",
        "import semid",
        "",
        "retriever = semid.load(path_of_this_folder)",
        "retriever.recommend([item, item, item], k=10)",
        "```",
        "",
    ]
    if config["codebook_fingerprint"]:
        lines += [f"Codebook: `{config['codebook_fingerprint']}`", ""]
    return "\n".join(lines)
