"""Constrained decoding: a generator may only write ids that some item has.

`TorchTrie` holds the trie as tensors on any device and works on a whole batch of beams.
`AllowedTokens` applies it to the scores of a language model; transformers calls it like its own
logits processors, and nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.catalogue.prefixes import PrefixIndex
from semid.errors import UsageError

MAX_DENSE_ENTRIES = 17_000_000
"""Largest dense table of the first levels, 68 MB: 4,096 nodes of 4,096 codes fit."""


class Candidates(NamedTuple):
    """Children of nodes, side by side.

    Attributes:
        codes: ``(batch, width)`` int64 code of each child, padded with 0 or a code of the level;
            width is the largest number of children here.
        next_nodes: ``(batch, width)`` int64 node of each child; -1 for padding.
        valid: ``(batch, width)`` bool, False for padding.
    """

    codes: Tensor
    next_nodes: Tensor
    valid: Tensor


class Children(NamedTuple):
    """Children of nodes, one after another without padding.

    Attributes:
        rows: ``(children,)`` int64 position of the parent among the nodes, ascending.
        codes: ``(children,)`` int64, ascending inside a row.
        next_nodes: ``(children,)`` int64.
    """

    rows: Tensor
    codes: Tensor
    next_nodes: Tensor


class TorchTrie(torch.nn.Module):
    """The trie of a `PrefixIndex` as buffers: moves with ``.to(device)``, saves with the model.

    The children of a node are consecutive nodes, so a first child and a count describe them. The
    root and the nodes of the first level, where most beams meet, also have a dense table of their
    children by code. Source: the layout follows STATIC, arXiv 2602.22647, section 4.

    Args:
        index: prefix index of the catalogue.
        persistent: whether the trie is part of ``state_dict()``.
    """

    node_codes: Tensor
    spans: Tensor
    keys: Tensor
    dense: Tensor

    def __init__(self, index: PrefixIndex, *, persistent: bool = True) -> None:
        super().__init__()
        self.sizes = index.sizes
        self.width = max(index.sizes)
        self.first_leaf = int(index.depth_starts[index.levels])
        counts = np.diff(index.child_starts)
        # Row n + 1 of both tables is node n, and row 0 is outside the trie: code 0, which every
        # level has, and no children. Edge e ends in node e + 1.
        node_codes = np.concatenate([[0, 0], index.child_codes])
        spans = np.zeros((len(counts) + 1, 2), np.int64)
        spans[1:, 0], spans[1:, 1] = index.child_starts[:-1] + 2, counts
        arrays = {"node_codes": node_codes, "spans": spans, "keys": index.keys.copy()}
        for name, array in {**arrays, "dense": _dense_table(index, self.width)}.items():
            self.register_buffer(name, torch.from_numpy(array), persistent=persistent)

    @property
    def levels(self) -> int:
        """Codes per id."""
        return len(self.sizes)

    def root(self, batch: int) -> Tensor:
        """Return the root for every row: ``(batch,)`` int64 zeros."""
        return torch.zeros(batch, dtype=torch.int64, device=self.keys.device)

    def step(self, nodes: Tensor, codes: Tensor) -> Tensor:
        """Return the child of each node along a code.

        Args:
            nodes: ``(batch,)`` int64 nodes; -1 for rows outside the trie.
            codes: ``(batch,)`` int64.

        Returns:
            ``(batch,)`` nodes; -1 where no item continues like that.

        Cost: one look-up per row on the first levels, ``O(log edges)`` below.
        """
        shallow = len(self.dense) - 1
        inside = (codes >= 0) & (codes < self.width) & (nodes >= 0)
        if not len(nodes) or int(nodes.max()) < shallow:
            rows = torch.where(inside, nodes, shallow)
            return self.dense[rows, torch.where(inside, codes, 0)].long()
        # Keys ascend, so the edge (node, code) is found by binary search or is not there.
        key = nodes * self.width + codes
        edge = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        return torch.where(inside & (self.keys[edge] == key), edge + 1, -1)

    def find(self, prefixes: Tensor) -> Tensor:
        """Return the nodes ``(batch,)`` of prefixes ``(batch, depth)``; -1 for unknown ones."""
        nodes = self.root(len(prefixes))
        for depth in range(prefixes.shape[1]):
            nodes = self.step(nodes, prefixes[:, depth])
        return nodes

    def candidates(self, nodes: Tensor) -> Candidates:
        """Return the children of nodes, padded to the largest number of them.

        Args:
            nodes: ``(batch,)`` int64 nodes of any depths; -1 has no children, like a whole id.

        Returns:
            `Candidates`. Where the nodes belong to the first levels and have children along most
            codes, all codes are listed, in order, with padding between.

        Cost: ``O(batch width)`` time and memory: no binary search, no mask over the codebook.
        """
        spans = self.spans.index_select(0, nodes + 1)
        first, counts = spans[:, :1], spans[:, 1:]
        width = int(counts.max()) if len(nodes) else 0
        if 2 * width > self.width and (size := self._dense_size(nodes)):
            # Copies of whole rows of the table cost less than a gather of almost as many children.
            rows = torch.where(nodes >= 0, nodes, len(self.dense) - 1)
            next_nodes = self.dense[:, :size].index_select(0, rows).long()
            codes = torch.arange(size, device=nodes.device).expand(next_nodes.shape)
            return Candidates(codes, next_nodes, next_nodes >= 0)
        offset = torch.arange(width, device=nodes.device)
        valid = offset < counts
        children = torch.where(valid, first + offset, 0)  # rows of the tables; padding is row 0
        codes = self.node_codes.index_select(0, children.view(-1)).view(children.shape)
        return Candidates(codes, children.sub_(1), valid)

    def _dense_size(self, nodes: Tensor) -> int:
        """Return the codes of the nodes' level if it is one of the dense ones, otherwise 0."""
        last = int(nodes.max())
        if last == 0 or last >= len(self.dense) - 1:
            return self.sizes[0] if last == 0 and len(self.dense) > 1 else 0
        return 0 if bool((nodes == 0).any()) else self.sizes[1]

    def list_children(self, nodes: Tensor) -> Children:
        """Return the children of nodes without padding.

        Args:
            nodes: ``(batch,)`` int64 nodes of any depths; -1 has no children, like a whole id.

        Cost: ``O(children)`` time and memory, far less than `candidates` where few nodes have
        many children.
        """
        first, counts = self.spans.index_select(0, nodes + 1).unbind(1)
        numbers = torch.arange(len(nodes), device=nodes.device)
        rows = torch.repeat_interleave(numbers, counts)
        # Child i of all is child i - (children of the rows before) of its row.
        shift = first - (counts.cumsum(0) - counts)
        children = torch.arange(len(rows), device=nodes.device) + shift.index_select(0, rows)
        return Children(rows, self.node_codes.index_select(0, children), children.sub_(1))

    def allowed(self, nodes: Tensor) -> Tensor:
        """Return which codes may follow: ``(batch, largest codebook)`` bool, all False at a leaf.

        Cost: ``O(batch codes)`` time and memory, independent of the size of the catalogue.
        """
        mask = torch.zeros((len(nodes), self.width), dtype=torch.bool, device=nodes.device)
        rows, codes, _ = self.list_children(nodes)
        mask[rows, codes] = True
        return mask


def _dense_table(index: PrefixIndex, width: int) -> npt.NDArray[np.int32]:
    """Return the children by code of the first nodes; -1 where there is none.

    ``(nodes + 1, width)`` int32 for the root and, if that fits, the nodes of the first level. The
    last row is -1, for rows outside the trie.
    """
    depth = 2 if (index.depth_starts[min(2, index.levels)] + 1) * width <= MAX_DENSE_ENTRIES else 1
    nodes = int(index.depth_starts[min(depth, index.levels)])
    if index.nodes > np.iinfo(np.int32).max or (nodes + 1) * width > MAX_DENSE_ENTRIES:
        nodes = 0
    table = np.full((nodes + 1, width), -1, np.int32)
    edges = int(index.child_starts[nodes])
    parents = index.keys[:edges] // width
    table[parents, index.child_codes[:edges]] = np.arange(1, edges + 1)
    return table


class AllowedTokens:
    """A logits processor that allows only tokens which continue the id of some item.

    Pass it to ``model.generate(logits_processor=[AllowedTokens(...)])`` of transformers, or call it
    in your own loop. It keeps no state between calls, so beams may be reordered freely.

    Ids begin either at one position, the same in all rows (``prompt_length``), or after each
    ``begin_token``, wherever a row has it: in prompts of any lengths, in text that the model writes
    before an id, and several times. With a begin token, a row is free before the first one and
    after the end of each id.

    Args:
        trie: trie of the catalogue.
        token_ids: for each level, in the order of the trie, the vocabulary id of each code.
        prompt_length: tokens before the first code, padding included; for encoder-decoder models
            1, the start token. Prompts of one batch that are padded on the left have one length.
        begin_token: token after which an id begins.
        end_token: token after a whole id, usually ``eos_token_id``. It is the only one allowed for
            a row whose id is complete or contains a token outside the trie, with the score 0.

    Raises:
        UsageError: if a level's tokens do not match its codebook, two codes of a level share a
            token, or not exactly one of ``prompt_length`` and ``begin_token`` is given.
    """

    def __init__(
        self,
        trie: TorchTrie,
        token_ids: Sequence[Sequence[int]],
        *,
        prompt_length: int | None = None,
        begin_token: int | None = None,
        end_token: int,
    ) -> None:
        sizes = [len(tokens) for tokens in token_ids]
        if sizes != list(trie.sizes):
            raise UsageError(
                f"token_ids have {sizes} tokens per level, the trie {list(trie.sizes)}"
            )
        for level, tokens in enumerate(token_ids):
            if len(set(tokens)) < len(tokens):
                raise UsageError(f"token_ids of level {level} name a token twice")
        if (prompt_length is None) == (begin_token is None):
            raise UsageError("give either prompt_length or begin_token: where do ids begin?")
        self.trie = trie
        self.prompt_length = prompt_length
        self.begin_token = begin_token
        self.end_token = end_token
        tables = [torch.as_tensor(list(tokens), dtype=torch.int64) for tokens in token_ids]
        # All levels in one table, so that rows at different levels are looked up together.
        self._tokens = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
        self._sorted = [torch.sort(tokens) for tokens in tables]

    def codes(self, tokens: Tensor, level: int) -> Tensor:
        """Return the codes of ``(batch,)`` tokens at a level; -1 for other tokens."""
        values, order = (part.to(tokens.device) for part in self._sorted[level])
        position = torch.searchsorted(values, tokens.contiguous()).clamp(max=len(values) - 1)
        return torch.where(values[position] == tokens, order[position], -1)

    def starts(self, input_ids: Tensor) -> Tensor:
        """Return the position of each row's last id ``(batch,)``; -1 where none has begun."""
        batch, length = input_ids.shape
        if self.begin_token is None:
            return torch.full((batch,), self.prompt_length or 0, device=input_ids.device)
        position = torch.arange(1, length + 1, device=input_ids.device)
        after = torch.where(input_ids == self.begin_token, position, -1)
        return after.amax(dim=1) if length else after.new_full((batch,), -1)

    def written(self, input_ids: Tensor) -> Tensor:
        """Return the codes of each row's last id, ``(batch, levels)``; -1 where there is none.

        Args:
            input_ids: ``(batch, length)`` tokens, the prompt included, as ``generate`` returns.
        """
        starts = self.starts(input_ids)
        columns = [
            torch.where(
                (starts >= 0) & (starts + level < input_ids.shape[1]),
                self.codes(_column(input_ids, starts + level), level),
                -1,
            )
            for level in range(self.trie.levels)
        ]
        return torch.stack(columns, dim=1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(batch, vocabulary)`` with minus infinity for all other tokens.

        Allowed tokens stay finite, also where the model scores all of them with minus infinity.

        Args:
            input_ids: ``(batch, length)`` tokens so far, including the prompt.
            scores: ``(batch, vocabulary)``.
        """
        starts = self.starts(input_ids)
        levels = torch.where(starts < 0, -1, (input_ids.shape[1] - starts).clamp(min=0))
        # Walk down the trie along the codes written so far; a row that leaves it has node -1.
        nodes = self.trie.root(len(input_ids)).to(input_ids.device)
        for level in range(self.trie.levels):
            codes = self.codes(_column(input_ids, starts + level), level)
            nodes = torch.where(level < levels, self.trie.step(nodes, codes), nodes)
        is_open = (levels >= 0) & (levels < self.trie.levels) & (nodes >= 0)
        is_free = levels < 0
        if self.begin_token is not None:
            is_free |= levels > self.trie.levels
        row, code, _ = self.trie.list_children(torch.where(is_open, nodes, -1))
        token = self._tokens.to(scores.device)[levels[row], code]
        # A sum of many floors must stay finite, too: transformers adds them up over a beam.
        floor = torch.finfo(scores.dtype).min / 64
        result = torch.where(is_free[:, None], scores, -torch.inf)
        result[row, token] = scores[row, token].nan_to_num(nan=floor).clamp(min=floor)
        # An end token that must come is certain: it changes no order among beams.
        result[~(is_open | is_free), self.end_token] = 0.0
        return result


def _column(input_ids: Tensor, positions: Tensor) -> Tensor:
    """Return the token of each row at its position; -1 outside the row."""
    length = input_ids.shape[1]
    inside = (positions >= 0) & (positions < length)
    if not length:
        return torch.full_like(positions, -1)
    safe = torch.where(inside, positions, 0)[:, None]
    return torch.where(inside, input_ids.gather(1, safe)[:, 0], -1)
