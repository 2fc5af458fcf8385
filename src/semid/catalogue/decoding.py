"""Constrained decoding: a generator may only write ids that some item has.

`TorchTrie` holds the trie as tensors on any device and works on a whole batch of beams.
`AllowedTokens` applies it to the scores of a language model; transformers calls it like its own
logits processors, and nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from semid.catalogue.prefixes import PrefixIndex
from semid.errors import UsageError


class TorchTrie(torch.nn.Module):
    """The trie of a `PrefixIndex` as buffers: moves with ``.to(device)``, saves with the model.

    Args:
        index: prefix index of the catalogue.
    """

    child_codes: Tensor
    child_starts: Tensor
    keys: Tensor

    def __init__(self, index: PrefixIndex) -> None:
        super().__init__()
        self.sizes = index.sizes
        self.width = max(index.sizes)
        for name in ("child_codes", "child_starts", "keys"):
            self.register_buffer(name, torch.from_numpy(getattr(index, name).copy()))

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
        """
        # Keys ascend, so the edge (node, code) is found by binary search or is not there.
        key = nodes * self.width + codes
        edge = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        exists = (nodes >= 0) & (codes >= 0) & (codes < self.width) & (self.keys[edge] == key)
        return torch.where(exists, edge + 1, -1)

    def find(self, prefixes: Tensor) -> Tensor:
        """Return the nodes ``(batch,)`` of prefixes ``(batch, depth)``; -1 for unknown ones."""
        nodes = self.root(len(prefixes))
        for depth in range(prefixes.shape[1]):
            nodes = self.step(nodes, prefixes[:, depth])
        return nodes

    def allowed(self, nodes: Tensor) -> Tensor:
        """Return which codes may follow: ``(batch, largest codebook)`` bool, all False at a leaf.

        Cost: ``O(batch codes)`` time and memory, independent of the size of the catalogue.
        """
        # Each row's children are consecutive edges. All rows' edges are listed one after another:
        # `rows` says whose each is, `offset` its position within the row.
        valid = nodes.clamp(min=0)
        starts = self.child_starts[valid]
        counts = torch.where(nodes >= 0, self.child_starts[valid + 1] - starts, 0)
        mask = torch.zeros((len(nodes), self.width), dtype=torch.bool, device=nodes.device)
        rows = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
        first = torch.cumsum(counts, 0) - counts
        offset = torch.arange(len(rows), device=nodes.device) - first[rows]
        mask[rows, self.child_codes[starts[rows] + offset]] = True
        return mask


class AllowedTokens:
    """A logits processor that allows only tokens which continue the id of some item.

    Pass it to ``model.generate(logits_processor=[AllowedTokens(...)])`` of transformers, or call it
    in your own loop. It keeps no state between calls, so beams may be reordered freely.

    Args:
        trie: trie of the catalogue.
        token_ids: for each level, in the order of the trie, the vocabulary id of each code.
        prompt_length: tokens before the first code; for encoder-decoder models 1, the start token.
        end_token: token after a whole id, usually ``eos_token_id``. It is the only one allowed for
            a row that is complete or contains a token outside the trie.

    Raises:
        UsageError: if a level's tokens do not match its codebook, or two codes of a level share
            a token.
    """

    def __init__(
        self,
        trie: TorchTrie,
        token_ids: Sequence[Sequence[int]],
        *,
        prompt_length: int,
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
        self.trie = trie
        self.prompt_length = prompt_length
        self.end_token = end_token
        self._tokens = [torch.as_tensor(list(tokens), dtype=torch.int64) for tokens in token_ids]
        self._sorted = [torch.sort(tokens) for tokens in self._tokens]

    def codes(self, tokens: Tensor, level: int) -> Tensor:
        """Return the codes of ``(batch,)`` tokens at a level; -1 for other tokens."""
        values, order = (part.to(tokens.device) for part in self._sorted[level])
        position = torch.searchsorted(values, tokens).clamp(max=len(values) - 1)
        return torch.where(values[position] == tokens, order[position], -1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(batch, vocabulary)`` with minus infinity for all other tokens.

        Args:
            input_ids: ``(batch, length)`` tokens so far, including the prompt.
            scores: ``(batch, vocabulary)``.
        """
        # Walk down the trie along the codes written so far; a row that leaves it has node -1.
        written = input_ids[:, self.prompt_length :]
        nodes = self.trie.root(len(input_ids)).to(input_ids.device)
        for level in range(min(written.shape[1], self.trie.levels)):
            nodes = self.trie.step(nodes, self.codes(written[:, level].contiguous(), level))
        result = torch.full_like(scores, -torch.inf)
        ended = nodes < 0
        if written.shape[1] < self.trie.levels:
            level = written.shape[1]
            tokens = self._tokens[level].to(scores.device)
            mask = self.trie.allowed(nodes)[:, : len(tokens)]
            result[:, tokens] = torch.where(mask, scores[:, tokens], -torch.inf)
        else:
            ended = torch.ones_like(ended)
        # The end token stays finite, so that a row always has a token to write.
        result[ended, self.end_token] = scores[ended, self.end_token].nan_to_num(neginf=0.0)
        return result
