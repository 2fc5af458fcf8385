"""A trained next-item model with everything it needs to recommend to raw users."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from semid.artefact import read_artefact, write_artefact
from semid.catalogue.beams import Buckets
from semid.catalogue.prefixes import PrefixIndex
from semid.codes import CodesInfo, SemanticIds
from semid.data.ids import ItemIds
from semid.data.sequences import Sequences
from semid.documents import checked, code_span
from semid.errors import UsageError
from semid.hub import Publishable
from semid.lazy import plain_torch
from semid.options import Options
from semid.recommenders import UsesCodes
from semid.recommenders.ranking.schema import Vocabulary
from semid.recommenders.retrieval import MODELS
from semid.recommenders.retrieval.data import (
    TARGETS,
    Ints,
    RetrievalData,
    RetrievalItems,
    check_arrays,
    pack,
    prepare_retrieval_data,
)
from semid.recommenders.retrieval.evaluation import target_ranks
from semid.recommenders.retrieval.metrics import RetrievalResults, summarize
from semid.recommenders.retrieval.networks import NextItemModel
from semid.tokenizers.stored import described
from semid.training.checkpoint import load_module_, module_arrays

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
class Retriever(UsesCodes, Publishable):
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
        self._orders: dict[tuple[str, bool], Buckets] = {}

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

    def recommend(
        self,
        histories: Any = None,
        *,
        users: Sequence[Any] | None = None,
        k: int = 10,
        exclude_history: bool = True,
        within_ids: str = "popularity",
        cold_slots: int = 0,
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
            cold_slots: places at the end of the ``k`` that are kept for items that training never
                saw, the best of them that are not among the others.

        Returns:
            A `Recommendation` for one history, a list of them for many.

        Raises:
            UsageError: an unknown user, neither or both of histories and users, or slots for
                unseen items where there are none or the model cannot score them.
        """
        if (histories is None) == (users is None):
            raise UsageError("give either histories= or users=")
        if k < 1:
            raise UsageError(f"k={k}: give at least 1")
        options = (k, exclude_history, within_ids, cold_slots)
        if users is not None:
            return list(self.recommend_rows(self._known_histories(users), *options))
        single = len(histories) == 0 or not isinstance(histories[0], list | tuple | np.ndarray)
        rows = [self._rows(history) for history in ([histories] if single else histories)]
        recommended = list(self.recommend_rows(rows, *options))
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

    def _lists(
        self, histories: Sequence[Ints], count: int, within_ids: str, *, cold: bool
    ) -> Iterator[tuple[Any, Any]]:
        """Yield the best items ``(count,)`` of each history, -1 where there is none, and scores.

        With ``cold``, of the items that training never saw.
        """
        device = next(iter(self.network.buffers())).device
        buckets = self._buckets(within_ids, cold=cold)
        with torch.no_grad():
            best = self.network.top(pack(histories).to(device), count, self._among(cold=cold))
        scores, classes = (each.cpu() for each in best)
        # What the model does not score is no recommendation.
        leaves = classes.masked_fill(torch.isneginf(scores), -1).numpy()
        queries = None
        if within_ids == "embedding" and self.items.vectors is not None:
            queries = self.items.vectors[[history[-1] for history in histories]]
        items, places = buckets.first_items(leaves, count, queries=queries)
        if cold:
            items = np.where(items < 0, -1, self._cold_items[items])
        return zip(items, np.take_along_axis(scores.numpy(), np.maximum(places, 0), 1), strict=True)

    @cached_property
    def _cold_items(self) -> Ints:
        """Catalogue rows that training never saw."""
        return np.flatnonzero(self.items.counts == 0)

    def _among(self, *, cold: bool) -> Ints | None:
        """Return the classes that are searched: those of unseen items, or None for all."""
        return np.unique(self.network.classes.cpu().numpy()[self._cold_items]) if cold else None

    def _buckets(self, order: str, *, cold: bool = False) -> Buckets:
        """Return the order of the items within each class, made once."""
        if (order, cold) not in self._orders:
            vectors = self.items.vectors
            if order == "embedding" and vectors is None:
                raise UsageError(
                    "within_ids='embedding' needs the items' embeddings, which this model was "
                    "trained without; take popularity or random"
                )
            rows = self._cold_items if cold else np.arange(len(self.items))
            options: dict[str, Any] = {"order": order, "popularity": self.items.counts[rows]}
            if order == "embedding" and vectors is not None:
                options["embeddings"] = vectors[rows]
            classes = self.network.classes.cpu().numpy()[rows]
            self._orders[order, cold] = Buckets(PrefixIndex.build(classes[:, None]), **options)
        return self._orders[order, cold]

    def recommend_rows(
        self,
        histories: Sequence[Ints],
        k: int,
        exclude_history: bool = True,
        within_ids: str = "popularity",
        cold_slots: int = 0,
    ) -> Iterator[Recommendation]:
        """Yield recommendations for histories ``(n,)`` of catalogue rows; see `recommend`."""
        if not 0 <= cold_slots <= k:
            raise UsageError(f"cold_slots={cold_slots}: give 0 to {k}, the number of items (k)")
        if cold_slots and not len(self._cold_items):
            raise UsageError("cold_slots: training has seen every item of the catalogue")
        if cold_slots and not self.network.scores_unseen:
            raise UsageError(
                f"cold_slots: {self.model} cannot score items that training never saw; take a "
                "model that reads codes or embeddings"
            )
        max_length: int = self.options.max_length  # type: ignore[attr-defined]
        names = self.items.ids.strings()
        order = np.argsort(-self.items.counts, kind="stable")
        popular = order, self.items.counts[order].astype(np.float32)
        nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
        size = self.network.batch
        for start in range(0, len(histories), size):
            part = histories[start : start + size]
            # Histories without a known item have nothing to read; they get the popular items.
            known = [history[-max_length:] for history in part if len(history)]
            # A history takes up at most as many places as it has items.
            more = k + max((len(set(h.tolist())) for h in part), default=0) * exclude_history
            lists: Iterator[tuple[Any, Any]] = iter(())
            cold_lists: Iterator[tuple[Any, Any]] = iter(())
            if known:
                lists = self._lists(known, more, within_ids, cold=False)
            if known and cold_slots:
                cold_lists = self._lists(known, more, within_ids, cold=True)
            for history in part:
                left_out = history if exclude_history else nothing[0]
                listed, scores = next(lists) if len(history) else popular
                places = _allowed(listed, left_out)
                fresh, fresh_scores = next(cold_lists, nothing) if len(history) else nothing
                # Unseen items that stand among the first by themselves keep their place.
                first = listed[places[: k - cold_slots]]
                fresh_places = _allowed(fresh, np.append(left_out, first))[:cold_slots]
                fresh, fresh_scores = fresh[fresh_places], fresh_scores[fresh_places]
                places = places[~np.isin(listed[places], fresh)][: k - len(fresh)]
                found = np.append(listed[places], fresh)
                yield Recommendation(
                    names.take(pa.array(found)).to_pylist(), np.append(scores[places], fresh_scores)
                )

    def _card_data(self) -> dict[str, Any]:
        """Return what the card's metadata on the Hugging Face Hub say."""
        test = self.report.get("test", {"metrics": {}})["metrics"]
        metrics = {f"test_{name}": estimate["value"] for name, estimate in test.items()}
        return {"kind": self.model, "metrics": metrics}

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
        with described(path, "next-item model"), plain_torch():
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


def _allowed(items: Ints, left_out: Ints) -> Ints:
    """Return the places of items that are there and are not left out."""
    return np.flatnonzero((items >= 0) & ~np.isin(items, left_out))


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
