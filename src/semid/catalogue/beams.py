"""From a model's scores to items: beam search over the trie, and the items of each id.

`beam_search` finds the ids that a model scores highest. `Buckets` puts the items that share an id
in an order, so that a list of ids becomes a list of items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.catalogue.decoding import TorchTrie
from semid.catalogue.prefixes import BUCKET_ORDERS, PrefixIndex
from semid.data.embeddings import open_embeddings
from semid.data.source import EmbeddingSource
from semid.errors import InputError, UsageError, check_choice
from semid.quantization.blocks import BLOCK_ROWS
from semid.seeds import numpy_generator


@dataclass(frozen=True, eq=False)
class BeamIds:
    """The ids that `beam_search` returns, best first.

    Attributes:
        codes: ``(users, beams, levels)`` int64 in the order of the trie. All ids are returned if
            there are fewer than beams.
        scores: ``(users, beams)`` float32 or float64 sums of the model's scores, descending.
        leaves: ``(users, beams)`` int64 number of each id, in the order of
            `PrefixIndex.row_starts`.
    """

    codes: Tensor
    scores: Tensor
    leaves: Tensor

    def items(self, buckets: Buckets, k: int, *, queries: npt.ArrayLike | None = None) -> BestItems:
        """Return the items of the ids, best first.

        Args:
            buckets: says which of the items of one id comes first.
            k: items per user (at least 1).
            queries: ``(users, dim)`` vectors, for buckets in the order of embeddings.

        Returns:
            `BestItems`; an item has the score of its id.
        """
        rows, beams = buckets.first_items(self.leaves.cpu().numpy(), k, queries=queries)
        scores = np.take_along_axis(self.scores.cpu().numpy(), np.maximum(beams, 0), axis=1)
        return BestItems(rows, np.where(beams < 0, -np.inf, scores).astype(scores.dtype))


class BestItems(NamedTuple):
    """Items per user, best first.

    Attributes:
        rows: ``(users, k)`` int64 rows of the ids; -1 where the ids have fewer items.
        scores: ``(users, k)`` scores; minus infinity where there is no item.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[Any]


@torch.no_grad()
def beam_search(
    trie: TorchTrie,
    step: Callable[[Tensor, Tensor], Tensor],
    *,
    users: int,
    beams: int,
) -> BeamIds:
    """Return the ids that a model scores highest, for a batch of users, without training it.

    At each level, every beam is continued along the codes that some item has, and the best
    ``beams`` of each user go on. The scores of a level are read at those codes only. With at
    least as many beams as prefixes the result is exact.

    Args:
        trie: trie of the catalogue, on the device of the scores.
        step: ``step(codes, rows)`` returns the scores of the next level, ``(n, codes of the
            level)`` in any float type; log-probabilities add up to that of the id. NaN counts as
            minus infinity. ``codes`` is ``(n, depth)`` int64, the codes so far in the order of the
            trie; ``n`` is users times beams at this depth, user by user. ``rows`` is ``(n,)``
            int64: the row of the former call that each row continues, at depth 0 the user. A model
            with a state per row selects it by ``state[rows]``, and a cache of transformers by
            ``cache.reorder_cache(rows)``.
        users: number of users.
        beams: ids per user (at least 1).

    Returns:
        `BeamIds`: valid ids, none twice for one user, also where all scores are minus infinity, as
        happens in float16. Ids with finite scores come first; the order of equal scores is
        arbitrary.

    Raises:
        UsageError: for less than one beam, or scores of another shape.

    Cost: one call of ``step`` per level; beside it time and memory in proportion to the children
    of all beams.

    Example:
        >>> def step(codes, rows):  # a decoder over the codes so far, without a cache
        ...     users = torch.arange(len(codes)) // (len(codes) // len(history))
        ...     return decoder(history[users], codes).log_softmax(-1)
        >>> best = beam_search(TorchTrie(index), step, users=len(history), beams=50)
    """
    if users < 1 or beams < 1:
        raise UsageError(f"users={users}, beams={beams}: give at least 1 of each")
    device = trie.keys.device
    # State of the search: `width` beams per user, all in one dimension, user by user.
    width = 1
    nodes = trie.root(users)
    codes = torch.zeros((users, 0), dtype=torch.int64, device=device)
    rows = torch.arange(users, device=device)
    totals = torch.zeros(users, device=device)
    for size in trie.sizes:
        scores = step(codes, rows)
        if scores.shape != (len(nodes), size):
            raise UsageError(
                f"step returned scores of shape {tuple(scores.shape)} at depth {codes.shape[1]}; "
                f"give ({len(nodes)}, {size}): a row per beam, a column per code"
            )
        # The children of all beams, one after another, and the score of the prefix they end.
        beam, code, node = trie.list_children(nodes)
        total = scores.flatten().index_select(0, beam * size + code)
        total = total.to(torch.promote_types(total.dtype, torch.float32))
        total = total + totals.index_select(0, beam)
        total = total.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # The best children of each user, from a matrix with one row per user. Its padding is minus
        # infinity and children stay above that, so that no padding comes before a child.
        user = beam // width
        counts = torch.bincount(user, minlength=users)[:, None]
        first = counts.cumsum(0) - counts
        column = torch.arange(len(user), device=device) - first[user, 0]
        matrix = total.new_full((users, int(counts.max())), -torch.inf)
        matrix[user, column] = total.clamp(min=torch.finfo(total.dtype).min)
        # Every prefix goes on to some item. So all users have as many beams, the number asked for
        # or all prefixes of this depth, and none is ever without a child.
        width = min(beams, int(counts.min()))
        child = (first + matrix.topk(width, dim=1).indices).flatten()
        rows = beam[child]
        codes = torch.cat([codes[rows], code[child, None]], dim=1)
        nodes, totals = node[child], total[child]
    return BeamIds(
        codes.view(users, width, -1),
        totals.view(users, width),
        (nodes - trie.first_leaf).view(users, width),
    )


class Buckets:
    """The order of the items that share an id.

    Args:
        index: prefix index of the catalogue.
        order: ``popularity`` puts the items with the most interactions first, ``embedding`` those
            nearest to a query, ``random`` draws one order from ``seed``. Equal items keep the order
            of their rows.
        popularity: ``(items,)`` interactions of each item, in the row order of the ids; needed for
            ``popularity`` if items share ids.
        embeddings: the items' embeddings in the row order of the ids, anything that
            `semid.open_embeddings` takes; needed for ``embedding``.
        seed: seed of ``random``.

    Raises:
        UsageError: without what the order needs.
        InputError: if popularity or embeddings do not fit the items.

    Cost: a sort of the items; memory 8 bytes per item.
    """

    def __init__(
        self,
        index: PrefixIndex,
        *,
        order: str = "popularity",
        popularity: npt.ArrayLike | None = None,
        embeddings: Any = None,
        seed: int = 0,
    ) -> None:
        check_choice("order", order, BUCKET_ORDERS)
        self.order = order
        self.row_starts = index.row_starts
        self._source: EmbeddingSource | None = None
        rank: npt.NDArray[Any] = np.zeros(len(index))
        if order == "random":
            rank = numpy_generator(seed, "buckets").permutation(len(index))
        elif order == "embedding":
            if embeddings is None:
                raise UsageError("order='embedding' needs the items' embeddings (embeddings=)")
            self._source = open_embeddings(embeddings)
            if len(self._source) != len(index):
                raise InputError(
                    f"{len(self._source)} embeddings for {len(index)} items; give one per item, in "
                    "the row order of the ids"
                )
        elif popularity is not None:
            rank = -np.asarray(popularity, np.float64)
            if rank.shape != (len(index),) or np.isnan(rank).any():
                raise InputError(
                    f"popularity has shape {rank.shape}; give a number for each of the "
                    f"{len(index)} items, in the row order of the ids"
                )
        elif index.unique_ids < len(index):
            raise UsageError(
                f"{len(index)} items share {index.unique_ids} ids: give the interactions of each "
                "item (popularity=), or choose order='embedding' or 'random'"
            )
        # Stable, so that equal items stay in the order of their rows, as in the index.
        leaf = np.repeat(np.arange(index.unique_ids), np.diff(index.row_starts))
        self.rows = index.rows[np.lexsort((rank[index.rows], leaf))]

    def first_items(
        self, leaves: npt.NDArray[np.int64], k: int, *, queries: npt.ArrayLike | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the first items of ids: all of the first id, then all of the second, up to k.

        Args:
            leaves: ``(users, ids)`` numbers of ids, best first; -1 where there is none.
            k: items per user (at least 1).
            queries: ``(users, dim)`` vectors for the order ``embedding``; Euclidean distance.

        Returns:
            Rows of items ``(users, k)`` int64, and for each the position of its id in ``leaves``;
            both -1 where the ids have fewer items.
        """
        if k < 1:
            raise UsageError(f"k={k}: give at least 1 item per user")
        users, ids = leaves.shape
        starts = self.row_starts[leaves].ravel()
        counts = np.where(leaves < 0, 0, self.row_starts[leaves + 1] - self.row_starts[leaves])
        before = counts.cumsum(axis=1) - counts
        # Ids behind the first k items are left out. An order by queries needs whole buckets.
        counts = np.where(before < k, counts, 0)
        if self.order != "embedding":
            counts = np.minimum(counts, np.maximum(k - before, 0))
        # The items of all ids one after another: `bucket` says which id of which user.
        bucket = np.repeat(np.arange(users * ids), counts.ravel())
        offset = np.arange(len(bucket)) - np.repeat(_before(counts.ravel()), counts.ravel())
        rows = self.rows[starts[bucket] + offset]
        if self.order == "embedding":
            distances = self._distances(rows, bucket // max(ids, 1), users, queries)
            rows = rows[np.lexsort((distances, bucket))]
        user = bucket // max(ids, 1)
        column = np.arange(len(bucket)) - _before(counts.sum(axis=1))[user]
        is_first = column < k
        result = np.full((2, users, k), -1, np.int64)
        result[0, user[is_first], column[is_first]] = rows[is_first]
        result[1, user[is_first], column[is_first]] = bucket[is_first] % max(ids, 1)
        return result[0], result[1]

    def _distances(
        self,
        rows: npt.NDArray[np.int64],
        user: npt.NDArray[np.int64],
        users: int,
        queries: npt.ArrayLike | None,
    ) -> npt.NDArray[np.float64]:
        """Return the squared distance of each item to its user's query."""
        assert self._source is not None  # the order is `embedding`
        if queries is None or np.shape(queries) != (users, self._source.dim):
            shape = None if queries is None else np.shape(queries)
            raise UsageError(
                f"order='embedding' needs a query per user, shape ({users}, {self._source.dim}), "
                f"not {shape} (queries=)"
            )
        vectors = np.asarray(queries, np.float64)
        distances = np.empty(len(rows))
        for start in range(0, len(rows), BLOCK_ROWS):
            span = slice(start, start + BLOCK_ROWS)
            difference = self._source.rows(rows[span]) - vectors[user[span]]
            distances[span] = np.einsum("nd,nd->n", difference, difference)
        return distances


def _before(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the sum of the counts before each."""
    return counts.cumsum() - counts
