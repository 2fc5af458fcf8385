"""Next-item models that score items by their vectors or their codes.

`SASRec` is the control of the field: a causal transformer over item ids. `Composed` replaces the
table of items by sums of code embeddings, and `Parallel` predicts each code of the next item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from semid.errors import UsageError
from semid.options import Options, option
from semid.quantization.threads import map_blocks
from semid.recommenders.retrieval import MODELS
from semid.recommenders.retrieval.data import Ints, Packed, RetrievalItems
from semid.recommenders.retrieval.layers import (
    CodeSum,
    SoftmaxLoss,
    Transformer,
    TransformerOptions,
)
from semid.seeds import child_seed
from semid.tokenizers.scan import scan_sums
from semid.training.loop import Step

FULL_SOFTMAX = 10_000
"""Catalogues up to this size get a full softmax by default.

On 12 thousand items (Amazon Toys) a sampled one is as good in three fifths of the time
(docs/results/retrieval-tables.md)."""

LOSSES = ("auto", "full", "sampled")

SCORES = 1 << 22
"""Scores in memory at once: users of a batch times classes."""

MIN_BATCH = 8
"""Histories scored at once at least: one pass over the items' vectors serves all of them."""

SEARCHED = 256
"""Histories of a batch where no matrix of scores is made."""

SUMMED = 64
"""Histories whose log-probabilities are summed at once: those of one code are 256 bytes."""


@dataclass(frozen=True, kw_only=True)
class SASRecOptions(TransformerOptions):
    """Options of `SASRec`."""

    loss: str = option(
        "auto",
        choices=LOSSES,
        help="Softmax over all items or over sampled ones; auto samples above 10,000 items.",
    )
    negatives: int = option(
        4096, ge=1, help="Draws of items per batch, with --loss sampled; each item counts once."
    )


@dataclass(frozen=True, kw_only=True)
class ComposedOptions(SASRecOptions):
    """Options of `Composed`."""

    item_id: bool = option(False, help="Add an embedding of the item itself to those of its codes.")
    text: bool = option(False, help="Add a projection of the item's embedding to its codes'.")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions(TransformerOptions):
    """Options of `Parallel`."""

    item_id: bool = option(False, help="Add an embedding of the item itself to those of its codes.")
    temperature: float = option(
        0.07, gt=0, le=100, help="Divisor of the cosines in the softmax of codes."
    )


class NextItemModel(nn.Module):
    """Base of models that give every class of items a score.

    Items of a class cannot be told apart by the model: it scores distinct ids where it reads codes
    alone. Training items alone enter the softmax, so that an unseen item is not trained away.

    Attributes:
        options: class of the options.
        needs: what of `RetrievalItems` the model cannot do without: ``codes`` or ``vectors``.
        trains: whether there is anything to train.
        exact: whether `scores` scores the whole catalogue; else `top` searches.
        scores_unseen: whether the score of an item that training never saw means something.
        by_item: whether every item is a class of its own.
        classes: ``(items,)`` int64 class of each item.
    """

    options: ClassVar[type[Options]] = TransformerOptions
    needs: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    scores_unseen: ClassVar[bool] = True

    def __init__(self, items: RetrievalItems, *, by_item: bool) -> None:
        super().__init__()
        for name in self.needs:
            if getattr(items, name) is None:
                flag = "Semantic IDs (--ids, ids=)"
                if name == "vectors":
                    flag = "item embeddings (--embeddings, embeddings=)"
                raise UsageError(f"this model needs {flag}")
        count = len(items)
        self.by_item = by_item
        item_class = np.arange(count) if by_item else items.buckets[1]
        classes = int(item_class.max()) + 1
        seen = np.bincount(item_class, weights=items.counts > 0, minlength=classes)
        self.classes = nn.Buffer(torch.from_numpy(item_class), persistent=False)
        # Softmax over training items: a class counts as often as it has of them.
        with np.errstate(divide="ignore"):
            bias = np.log(seen).astype(np.float32)
        self.log_sizes = nn.Buffer(torch.from_numpy(bias), persistent=False)

    @property
    def reads_vectors(self) -> bool:
        """Whether the embeddings of `RetrievalItems` are part of the model."""
        return "vectors" in self.needs

    @property
    def batch(self) -> int:
        """Histories that `top` takes at once: their scores stay within `SCORES` or `MIN_BATCH`."""
        return max(MIN_BATCH, SCORES // len(self.log_sizes))

    def scores(self, batch: Packed) -> Tensor:
        """Return the score ``(histories, classes)`` of every class as the next; -inf is never."""
        raise NotImplementedError

    def top(self, batch: Packed, k: int, among: Ints | None = None) -> tuple[Tensor, Tensor]:
        """Return scores and classes ``(histories, k)`` of the best classes, best first.

        Places that stay empty have the score -inf. With ``among`` ``(n,)``, ascending, those
        classes alone are searched, and their places in ``among`` are returned.
        """
        scores = self.scores(batch)
        if among is not None:
            scores = scores[:, torch.from_numpy(among).to(scores.device)]
        best = scores.topk(min(k, scores.shape[1]))
        return best.values, best.indices


class SASRec(NextItemModel):
    """Causal transformer over item ids with a tied output and a softmax over the catalogue.

    Kang and McAuley, ICDM 2018, with the cross-entropy that later work found better than sampled
    binary losses. The control of every model with codes.
    """

    options: ClassVar[type[Options]] = SASRecOptions
    scores_unseen: ClassVar[bool] = False

    def __init__(self, items: RetrievalItems, options: SASRecOptions, *, by_item: bool = True):
        super().__init__(items, by_item=by_item)
        self.settings = options
        self._vectors: Tensor | None = None
        self.transformer = Transformer(options)
        self._make_tables(items)
        self._sampler = _Sampler(items.counts, self.classes.numpy())
        classes = len(self.log_sizes)
        self.sampled = options.loss == "sampled" or (
            options.loss == "auto" and classes > FULL_SOFTMAX
        )

    def _make_tables(self, items: RetrievalItems) -> None:
        self.table = nn.Parameter(torch.randn(len(items), self.settings.width) * 0.02)

    def vectors(self, classes: Tensor | None = None) -> Tensor:
        """Return the vector ``(classes, width)`` of every class, or of some ``(...)``."""
        return self.table if classes is None else self.table[classes]

    def scoreable(self) -> Tensor:
        """Return which classes ``(classes,)`` have a vector that means something."""
        return torch.isfinite(self.log_sizes)

    def forward(self, batch: Packed) -> Step:
        """Return the cross-entropy of the items that follow."""
        # From here on items are classes: items that the model cannot tell apart are one.
        inputs, targets = self.classes[batch.items], self.classes[batch.targets]
        if self.sampled:
            # Nothing here grows with the catalogue. Each drawn logit loses the logarithm of the
            # probability that its class is drawn (Bengio and Senecal 2008), so that the sum over
            # the drawn estimates that over all.
            drawn, log_probability, columns = self._sampler(self.settings.negatives, targets)
            states = self.transformer(self.vectors(inputs), batch)
            right, vectors = self.vectors(targets), self.vectors(drawn)
            bias = self.log_sizes[drawn] - log_probability
        else:
            vectors, bias, columns = self.vectors(), self.log_sizes, targets
            states, right = self.transformer(vectors[inputs], batch), vectors[targets]
        loss = SoftmaxLoss.apply(  # type: ignore[no-untyped-call]
            *(states, right, self.log_sizes[targets], vectors, bias, columns)
        )
        return Step(loss, {})

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; vectors of before are made again."""
        self._vectors = None
        return super().train(mode)

    def scores(self, batch: Packed) -> Tensor:
        """Return the score of every class."""
        # Between two calls of `train` the weights stay, and so do the vectors of the classes.
        vectors = self._vectors
        stale = vectors is None or vectors.device != self.log_sizes.device
        if vectors is None or stale or self.training or torch.is_grad_enabled():
            vectors = self._vectors = self.vectors()
        states = self.transformer(vectors[self.classes[batch.items]], batch)
        scores: Tensor = (states @ vectors.T).float()
        never = torch.nonzero(~self.scoreable())[:, 0]
        return scores.index_fill_(1, never, -torch.inf)


class _Sampler:
    """Draws classes log-uniformly in the order of popularity."""

    def __init__(self, counts: npt.NDArray[np.int64], item_class: npt.NDArray[np.int64]) -> None:
        # Items by falling popularity: rank r is drawn with probability log(1 + 1 / r) / log(n + 1).
        totals = np.bincount(item_class, weights=counts)
        order = np.argsort(-totals, kind="stable")[: int((totals > 0).sum())]
        ranks = np.zeros(len(totals), np.int64)  # 0: never drawn
        ranks[order] = np.arange(1, len(order) + 1)
        self.ordered, self.ranks = torch.from_numpy(order), torch.from_numpy(ranks)

    def __call__(self, n: int, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw ``n`` times: the distinct classes, and the logarithm of their probabilities.

        A class that would be drawn several times is there once, with the probability of being among
        the draws: one column instead of several, and no variance from how often it came. Also
        returns where the targets ``(places,)`` stand among the drawn; -1 is nowhere.
        """
        # The inverse of the distribution: exp of a uniform number times the logarithm of the size.
        seen, device = len(self.ordered), targets.device
        size = float(np.log(seen + 1))
        drawn: Tensor = torch.unique(torch.exp(torch.rand(n) * size).long().clamp(1, seen))
        missed = torch.log1p(-torch.log1p(1 / drawn.double()) / size) * n
        log_probability = torch.log(-torch.expm1(missed)).float()
        asked = self.ranks[targets.cpu()]
        columns = torch.searchsorted(drawn, asked).clamp(max=len(drawn) - 1)
        columns = torch.where(drawn[columns] == asked, columns, -1)
        return self.ordered[drawn - 1].to(device), log_probability.to(device), columns.to(device)


class Composed(SASRec):
    """A transformer over items whose vectors are sums of code embeddings.

    An item's vector is the sum of the embeddings of its codes (Hou et al., "Learning
    Vector-Quantized Item Representation for Transferable Sequential Recommenders", WWW 2023, with
    the codes of any tokenizer); optionally plus an embedding of the item and a projection of its
    vector. The output is tied, so an item that training never saw is scored by its codes.
    """

    options: ClassVar[type[Options]] = ComposedOptions
    scores_unseen: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("codes",)

    def __init__(self, items: RetrievalItems, options: ComposedOptions) -> None:
        if options.text and items.vectors is None:
            raise UsageError("text=True needs item embeddings (--embeddings, embeddings=)")
        super().__init__(items, options, by_item=options.item_id or options.text)

    def _make_tables(self, items: RetrievalItems) -> None:
        options: Any = self.settings
        self.codes = CodeSum(items.buckets[0], items.sizes, options.width)
        self.buckets = nn.Buffer(torch.from_numpy(items.buckets[1]), persistent=False)
        if options.item_id:
            # From zero: an unseen item has no part of its own and is scored by its codes.
            self.table = nn.Parameter(torch.zeros(len(items), options.width))
        if options.text:
            assert items.vectors is not None
            self.text = nn.Buffer(torch.from_numpy(items.vectors), persistent=False)
            self.project = nn.Linear(items.vectors.shape[1], options.width, bias=False)
            nn.init.normal_(self.project.weight, std=0.02)

    @property
    def reads_vectors(self) -> bool:
        """Whether the embeddings of `RetrievalItems` are part of the model."""
        return hasattr(self, "text")

    def vectors(self, classes: Tensor | None = None) -> Tensor:
        """Return the vector ``(classes, width)`` of every class, or of some ``(...)``."""
        if not self.by_item:
            return self.codes(classes)  # type: ignore[no-any-return]
        some = slice(None) if classes is None else classes
        if classes is None:
            vectors = self.codes()[self.buckets]
        else:
            vectors = self.codes(self.buckets[classes])
        if hasattr(self, "table"):
            vectors = vectors + self.table[some]
        if hasattr(self, "project"):
            vectors = vectors + self.project(self.text[some])
        return vectors  # type: ignore[no-any-return]

    def scoreable(self) -> Tensor:
        """Return which classes have a vector that means something: all, since all have codes."""
        return torch.ones_like(self.log_sizes, dtype=torch.bool)


class Parallel(NextItemModel):
    """A transformer over items that predicts every code of the next item at once.

    Hou et al., "Generating Long Semantic IDs in Parallel for Recommendation" (RPG, KDD 2025):
    an item is the mean of its code embeddings, each position has a head of its own, the loss is the
    mean of the cross-entropies, and an item's score is the sum of the log-probabilities of its
    codes. Heads and embeddings are compared by their cosine over a temperature.
    """

    options: ClassVar[type[Options]] = ParallelOptions
    needs: ClassVar[tuple[str, ...]] = ("codes",)

    def __init__(self, items: RetrievalItems, options: ParallelOptions) -> None:
        # The score reads the codes alone, so items of one id are one class.
        super().__init__(items, by_item=False)
        distinct, bucket = items.buckets
        self.temperature, self.sizes = options.temperature, items.sizes
        self.transformer = Transformer(options)
        self.codes = CodeSum(distinct, items.sizes, options.width)
        nn.init.normal_(self.codes.table, std=0.02)
        levels = len(items.sizes)
        # For the scan: codes as rows of the fused table, so that no level has a start of its own.
        self._scanned = np.ascontiguousarray(self.codes.rows.numpy().astype(np.int32))
        self._none = np.zeros(levels, np.int64)
        self.heads = nn.Linear(options.width, levels * options.width)
        self.buckets = nn.Buffer(torch.from_numpy(bucket), persistent=False)
        if options.item_id:
            self.table = nn.Parameter(torch.zeros(len(items), options.width))

    @property
    def batch(self) -> int:
        """Histories that `top` takes at once; on a CPU it makes no matrix of scores."""
        return super().batch if self.codes.rows.is_cuda else SEARCHED

    def _log_probabilities(self, batch: Packed) -> list[Tensor]:
        """Return the log-probability ``(n, size)`` of every code of each level."""
        vectors = self.codes(self.buckets[batch.items]) / len(self.sizes)
        if hasattr(self, "table"):
            vectors = vectors + self.table[batch.items]
        states = self.transformer(vectors, batch)
        # A residual block per level, as in the paper.
        moved = states[:, None] + functional.silu(self.heads(states)).view(
            len(states), len(self.sizes), -1
        )
        # Cosines: long vectors of frequent codes win nothing by their length.
        moved = functional.normalize(moved, dim=-1)
        table = functional.normalize(self.codes.table, dim=-1) / self.temperature
        books = torch.split(table, list(self.sizes))
        # Unbound at once: the gradient of one slice alone is as large as that of all.
        return [
            functional.log_softmax((state @ book.T).float(), -1)
            for state, book in zip(moved.unbind(1), books, strict=True)
        ]

    def forward(self, batch: Packed) -> Step:
        """Return the mean over levels of the cross-entropy of the next item's code."""
        # Rows of the fused table; less the level's start they are the level's codes.
        right = self.codes.rows[self.buckets[batch.targets]]
        losses = [
            functional.nll_loss(logs, right[:, level] - self.codes.starts[level])
            for level, logs in enumerate(self._log_probabilities(batch))
        ]
        return Step(torch.stack(losses).mean(), {})

    def scores(self, batch: Packed) -> Tensor:
        """Return the sum of the log-probabilities of the codes of every distinct id."""
        tables = torch.cat(self._log_probabilities(batch), 1)
        # Histories stand side by side, so one code's values for all of them are added at once.
        sums = [
            functional.embedding_bag(self.codes.rows, part.T.contiguous(), mode="sum").T
            for part in torch.split(tables, SUMMED)
        ]
        return torch.cat(sums)

    def top(self, batch: Packed, k: int, among: Ints | None = None) -> tuple[Tensor, Tensor]:
        """Return scores and classes ``(histories, k)`` of the best ids, from a scan of all of them.

        Cost: one addition per code and id for each history, on all threads; no matrix of scores.
        """
        if batch.items.is_cuda:
            return super().top(batch, k, among)
        codes = self._scanned if among is None else self._scanned[among]
        # One table per history holds the log-probability of each code of each level.
        tables = -torch.cat(self._log_probabilities(batch), 1).numpy()
        shape = (len(tables), min(k, len(codes)))
        rows, sums = np.empty(shape, np.int64), np.empty(shape, np.float32)
        none = np.empty(0, np.float32)

        def scan(history: int) -> None:
            # Rows of the fused table: every level's codes already carry its start.
            scan_sums(codes, tables[history], self._none, none, rows[history], sums[history])

        map_blocks(scan, range(len(tables)), threads=None)
        return torch.from_numpy(-sums), torch.from_numpy(rows)


def make_model(name: str, items: RetrievalItems, options: Options, *, seed: int) -> NextItemModel:
    """Return a model whose initial weights are a function of ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(child_seed(seed, "start"))
        model: NextItemModel = MODELS.load(name)(items, options)
    return model
