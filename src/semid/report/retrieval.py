"""The page about next-item models: metrics, curves, slices and examples with titles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from semid.data.items import read_items
from semid.diagnostics.pairs import Estimate
from semid.output import atomic_file
from semid.recommenders.retrieval.data import RetrievalData
from semid.recommenders.retrieval.metrics import RECALLS, RetrievalResults
from semid.recommenders.retrieval.retriever import Retriever
from semid.report.figure import Column, Figure, Plot, count, declared, share
from semid.report.pages import render

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@50", "mrr")
EXAMPLES, SHOWN_HISTORY, SHOWN_ITEMS = 8, 6, 5


@dataclass(frozen=True)
class RetrievalEntry:
    """One model on the page.

    Attributes:
        results: on the test items, one per seed.
        difference: difference to the baseline in Recall@10 with its interval; None for the
            baseline itself.
        retriever: the model of the first seed.
    """

    results: Sequence[RetrievalResults]
    difference: Estimate | None
    retriever: Retriever

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over seeds."""
        return float(np.mean([each.metrics[metric].value for each in self.results]))

    def in_slice(self, name: str) -> float:
        """Return Recall@10 in a slice, mean over seeds."""
        values = [each.slices[name].metrics["recall@10"].value for each in self.results]
        return float(np.mean(values))

    @property
    def curve(self) -> dict[int, float]:
        """NDCG@10 on the validation items by epoch evaluated, from 1; empty without training."""
        history = self.retriever.report.get("training", {}).get("history", [])
        return {n: epoch["score"] for n, epoch in enumerate(history, 1) if "score" in epoch}


def _digits(value: float) -> str:
    return f"{value:.4f}"


def _mean(metric: str) -> Column[RetrievalEntry]:
    return Column(metric, lambda entry: entry.mean(metric), _digits)


def _slice(name: str, head: str) -> Column[RetrievalEntry]:
    return Column(head, lambda entry: entry.in_slice(name), _digits)


def _difference(estimate: Estimate | None) -> str:
    if estimate is None:
        return "baseline"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.4f}"
    return f"{estimate.value:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


MODELS_TABLE: Plot[RetrievalEntry] = declared(
    "retrieval-models",
    columns=(
        *map(_mean, METRICS),
        Column("coverage", lambda e: e.results[0].coverage, share),
        Column("difference in recall@10", lambda e: e.difference, _difference),
        Column("seeds", lambda e: len(e.results), count),
    ),
)
CURVES: Plot[RetrievalEntry] = declared(
    "retrieval-curves",
    columns=(
        Column("epochs", lambda e: max(e.curve), count),
        Column("best epoch", lambda e: max(e.curve, key=e.curve.__getitem__), count),
        Column("NDCG@10 there", lambda e: max(e.curve.values()), _digits),
    ),
    x=lambda e: list(e.curve),
    y=lambda e: list(e.curve.values()),
)
RECALLS_FIGURE: Plot[RetrievalEntry] = declared(
    "retrieval-recalls",
    columns=tuple(_mean(f"recall@{k}") for k in RECALLS),
    x=lambda e: RECALLS,
    y=lambda e: [e.mean(f"recall@{k}") for k in RECALLS],
)


def _slice_figure(entries: Mapping[str, RetrievalEntry]) -> Figure:
    slices = next(iter(entries.values())).results[0].slices
    names = [f"{name} ({each.users:,})" for name, each in slices.items()]
    plot: Plot[RetrievalEntry] = declared(
        "retrieval-slices",
        columns=tuple(map(_slice, slices, names)),
        x=lambda e: names,
        y=lambda e: [e.in_slice(name) for name in slices],
    )
    return plot.figure(entries)


def retrieval_figures(entries: Mapping[str, RetrievalEntry], protocol: str) -> list[Figure]:
    """Return the figures of the page."""
    # Models without training have no curve.
    trained = {name: entry for name, entry in entries.items() if entry.curve}
    figures = [MODELS_TABLE.figure(entries, protocol=protocol), RECALLS_FIGURE.figure(entries)]
    if trained:
        figures.append(CURVES.figure(trained))
    return [*figures, _slice_figure(entries)]


def examples(
    entries: Mapping[str, RetrievalEntry], data: RetrievalData, titles: Sequence[str]
) -> list[dict[str, Any]]:
    """Return histories of test users with what each model recommends.

    The users are spread evenly over the log, so that nobody has chosen them.
    """
    users = np.unique(np.linspace(0, len(data.sequences) - 1, EXAMPLES).astype(int))
    # The models see what they were tested on: everything but the last item.
    rows = [data.sequences[user].astype(np.int64) for user in users]
    shown = []
    for user, items in zip(users, rows, strict=True):
        target = int(items[-1])
        lists = {}
        for name, entry in entries.items():
            (best,) = entry.retriever.recommend_rows([items[:-1]], SHOWN_ITEMS, False)
            places = data.items.ids.index_of(pa.array(best.items, pa.large_string())).tolist()
            lists[name] = [(titles[place], place == target) for place in places]
        shown.append(
            {
                "user": data.sequences.user_ids[int(user)].as_py(),
                "history": [titles[item] for item in items[:-1][-SHOWN_HISTORY:].tolist()],
                "earlier": max(0, len(items) - 1 - SHOWN_HISTORY),
                "target": titles[target],
                "lists": lists,
            }
        )
    return shown


def retrieval_page(
    entries: Mapping[str, RetrievalEntry], data: RetrievalData, titles: Sequence[str]
) -> str:
    """Return the page as HTML."""
    first = next(iter(entries.values())).results[0]
    figures = retrieval_figures(entries, first.protocol)
    return render(
        "retrieve.html.j2",
        names=list(entries),
        users=first.users,
        items=len(data.items),
        protocol=first.protocol,
        figures=figures,
        plots=[figure.to_plot() for figure in figures if figure.traces],
        examples=examples(entries, data, titles),
    )


def write_retrieval_page(
    path: str | os.PathLike[str],
    entries: Mapping[str, RetrievalEntry],
    data: RetrievalData,
    *,
    items: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write the page about one or several next-item models.

    Args:
        path: HTML file.
        entries: models by name, all tested on the same users.
        data: the log they were trained on.
        items: table with ``item_id`` and ``title`` or ``text``; None shows item ids.
        overwrite: replace a file that exists.
    """
    # Items are called by their title where a table knows one, else by their id.
    names = data.items.ids.strings().to_pylist()
    if items is not None:
        texts = read_items(items, ids=data.items.ids)
        names = [texts.title(row) for row in range(len(texts))]
    with atomic_file(path, overwrite=overwrite) as work:
        work.write_text(retrieval_page(entries, data, names), encoding="utf8")
    return Path(path)
