"""Next-item models that generate the codes of the next item one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from semid.catalogue.beams import BeamIds, beam_search
from semid.catalogue.decoding import TorchTrie
from semid.catalogue.prefixes import PrefixIndex
from semid.errors import import_extra
from semid.options import MAX_WIDTH, Options, option
from semid.recommenders.retrieval.data import Ints, Packed, RetrievalItems
from semid.recommenders.retrieval.layers import Block, CodeSum, Transformer, TransformerOptions
from semid.recommenders.retrieval.networks import SEARCHED, NextItemModel
from semid.training.loop import Step


@dataclass(frozen=True, kw_only=True)
class GenerativeOptions(TransformerOptions):
    """Options of `Generative`."""

    item_id: bool = option(
        False, help="Add an embedding of the item to those of its codes in the history."
    )
    decoder_layers: int = option(1, ge=1, le=64, help="Layers of the decoder over codes.")
    beams: int = option(50, ge=1, le=100_000, help="Ids that the beam search holds per user.")


@dataclass(frozen=True, kw_only=True)
class TigerOptions(Options):
    """Options of `Tiger`; the defaults are the paper's."""

    width: int = option(128, ge=1, le=MAX_WIDTH, help="Width of the model.")
    layers: int = option(4, ge=1, le=64, help="Layers of the encoder, and of the decoder.")
    heads: int = option(6, ge=1, le=64, help="Attention heads per layer.")
    head_width: int = option(64, ge=1, le=MAX_WIDTH, help="Width of each attention head.")
    mlp_width: int = option(1024, ge=1, le=MAX_WIDTH, help="Hidden width of the perceptrons.")
    dropout: float = option(0.1, ge=0, lt=1, help="Dropout rate.")
    max_length: int = option(20, ge=1, le=4096, help="Newest items of a history that are read.")
    beams: int = option(50, ge=1, le=100_000, help="Ids that the beam search holds per user.")


class Searching(NextItemModel):
    """Base of models that find the next item by beam search over the ids of the catalogue."""

    needs: ClassVar[tuple[str, ...]] = ("codes",)
    exact: ClassVar[bool] = False

    def __init__(self, items: RetrievalItems, *, beams: int) -> None:
        super().__init__(items, by_item=False)
        distinct, bucket = items.buckets
        self.beams, self.sizes = beams, items.sizes
        # The trie follows from the codes, which are stored once.
        self.trie = TorchTrie(PrefixIndex.build(distinct, sizes=items.sizes), persistent=False)
        self.distinct = nn.Buffer(torch.from_numpy(distinct), persistent=False)
        self.buckets = nn.Buffer(torch.from_numpy(bucket), persistent=False)

    @property
    def batch(self) -> int:
        """Histories that `top` takes at once; a search makes no matrix of scores."""
        return SEARCHED

    def search(self, batch: Packed, beams: int, trie: TorchTrie | None = None) -> BeamIds:
        """Return the ids that the model scores highest; with a beam per id, of all ids.

        ``trie`` holds the ids that are searched, by default all.
        """
        raise NotImplementedError

    def top(self, batch: Packed, k: int, among: Ints | None = None) -> tuple[Tensor, Tensor]:
        """Return scores and classes ``(histories, n)`` of the best ids that the search finds."""
        trie = None
        if among is not None:
            chosen = self.distinct.cpu().numpy()[among]
            trie = TorchTrie(PrefixIndex.build(chosen, sizes=self.sizes)).to(batch.items.device)
        best = self.search(batch, max(self.beams, k), trie)
        # The leaves of the trie stand in the order of the distinct ids, which are the classes.
        return best.scores.float()[:, :k], best.leaves.clamp(min=0)[:, :k]

    def scores(self, batch: Packed) -> Tensor:
        """Return the score of every id, by a search that leaves out none.

        Cost: one pass of the decoder per prefix of the catalogue and history.
        """
        best = self.search(batch, len(self.distinct))
        scores = torch.full((len(batch.places), len(self.distinct)), -torch.inf)
        return scores.to(best.scores.device).scatter_(1, best.leaves, best.scores.float())


class Generative(Searching):
    """A transformer over items and a small autoregressive decoder over the next item's codes.

    The history is read one place per item; a decoder of few layers then generates the codes from
    the state of the last place, as the depth transformer of MARIUS and the lazy decoder of
    OneRec do. The score of an id is its log-probability.
    """

    options: ClassVar[type[Options]] = GenerativeOptions

    def __init__(self, items: RetrievalItems, options: GenerativeOptions) -> None:
        super().__init__(items, beams=options.beams)
        width = options.width
        self.transformer = Transformer(options)
        self.codes = CodeSum(self.distinct.numpy(), items.sizes, width)
        if options.item_id:
            self.table = nn.Parameter(torch.zeros(len(items), width))
        self.start = nn.Linear(width, width)
        self.inputs = nn.Parameter(torch.randn(sum(items.sizes), width) * 0.02)
        self.levels = nn.Parameter(torch.randn(len(items.sizes), width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width, options.heads, options.dropout) for _ in range(options.decoder_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.ModuleList(nn.Linear(width, size) for size in items.sizes)

    def _states(self, batch: Packed) -> Tensor:
        vectors = self.codes(self.buckets[batch.items])
        if hasattr(self, "table"):
            vectors = vectors + self.table[batch.items]
        return self.transformer(vectors, batch)  # type: ignore[no-any-return]

    def forward(self, batch: Packed) -> Step:
        """Return the cross-entropy of the next item's codes, mean over levels."""
        states = self.start(self._states(batch))
        rows = self.codes.rows[self.buckets[batch.targets]]
        # The state stands before the first code, and each code before the next.
        x = torch.cat([states[:, None], self.inputs[rows[:, :-1]]], 1) + self.levels
        for block in self.blocks:
            x, _ = block(x, None)
        x = self.norm(x)
        levels = zip(self.outputs, self.codes.starts, x.unbind(1), rows.unbind(1), strict=True)
        losses = [
            functional.cross_entropy(output(state), code - start)
            for output, start, state, code in levels
        ]
        return Step(torch.stack(losses).mean(), {})

    def search(self, batch: Packed, beams: int, trie: TorchTrie | None = None) -> BeamIds:
        """Return the ids of the highest log-probability."""
        states = self.start(self._states(batch))
        # One decoder step per level; the first reads the state, the others the code before.
        past: list[Any] = [None] * len(self.blocks)

        def step(codes: Tensor, rows: Tensor) -> Tensor:
            level = codes.shape[1]
            x = self.inputs[codes[:, -1] + self.codes.starts[level - 1]] if level else states
            x = (x + self.levels[level])[:, None]
            # Keys and values of the codes before, of the beams that go on.
            for number, block in enumerate(self.blocks):
                before = None if past[number] is None else tuple(kv[rows] for kv in past[number])
                x, past[number] = block(x, None, before)
            logits: Tensor = self.outputs[level](self.norm(x[:, 0]))
            return logits.float().log_softmax(-1)

        return beam_search(
            self.trie if trie is None else trie, step, users=len(batch.places), beams=beams
        )


class Tiger(Searching):
    """Encoder-decoder over the codes of the history (TIGER, Rajput et al., NeurIPS 2023).

    A T5 of the library transformers; the history is the codes of its items, level by level, without
    the user token. A reference for comparison: training takes many hours on a CPU.
    """

    options: ClassVar[type[Options]] = TigerOptions

    def __init__(self, items: RetrievalItems, options: TigerOptions) -> None:
        super().__init__(items, beams=options.beams)
        transformers = import_extra("transformers", extra="transformers", purpose="--model tiger")
        # Token 0 pads and starts the decoder; each level has tokens of its own after it.
        starts = 1 + np.cumsum([0, *items.sizes[:-1]])
        self.tokens = nn.Buffer(self.distinct + torch.from_numpy(starts), persistent=False)
        self.starts = [int(start) for start in starts]
        self.max_length = options.max_length
        # Codes have no padding and no end: token 0 serves as both, and is never predicted.
        config = transformers.T5Config(
            vocab_size=1 + sum(items.sizes),
            d_model=options.width,
            d_kv=options.head_width,
            d_ff=options.mlp_width,
            num_layers=options.layers,
            num_heads=options.heads,
            dropout_rate=options.dropout,
            feed_forward_proj="relu",
            pad_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
            tie_word_embeddings=True,
        )
        self.t5 = transformers.T5ForConditionalGeneration(config)

    def _inputs(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Return tokens ``(n, length)`` of the history before each prediction, and their mask."""
        # A place sees itself and the earlier ones of its history.
        place, position = batch.places, batch.positions.flatten()[batch.places]
        back = torch.arange(int(position.max()) + 1, device=place.device)
        within = back <= position[:, None]
        items = batch.items.flatten()[(place[:, None] - back).clamp(min=0)].flip(1)
        mask = within.flip(1)
        tokens = self.tokens[self.buckets[items]].masked_fill(~mask[:, :, None], 0)
        return tokens.flatten(1), mask.repeat_interleave(len(self.sizes), 1).long()

    def forward(self, batch: Packed) -> Step:
        """Return the cross-entropy of the next item's codes."""
        tokens, mask = self._inputs(batch)
        labels = self.tokens[self.buckets[batch.targets]]
        logits = self.t5(input_ids=tokens, attention_mask=mask, labels=labels).logits.float()
        # The softmax of a level is over its own tokens, as in the search.
        losses = [
            functional.cross_entropy(
                logits[:, level, start : start + size], labels[:, level] - start
            )
            for level, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True))
        ]
        return Step(torch.stack(losses).mean(), {})

    def search(self, batch: Packed, beams: int, trie: TorchTrie | None = None) -> BeamIds:
        """Return the ids of the highest log-probability."""
        tokens, mask = self._inputs(batch)
        encoded = self.t5.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        state: dict[str, Any] = {"encoded": encoded, "mask": mask, "cache": None}

        def step(codes: Tensor, rows: Tensor) -> Tensor:
            level = codes.shape[1]
            state["encoded"], state["mask"] = state["encoded"][rows], state["mask"][rows]
            if level:
                state["cache"].reorder_cache(rows)
                last = codes[:, -1:] + self.starts[level - 1]
            else:
                last = torch.zeros((len(rows), 1), dtype=torch.long, device=rows.device)
            # One new token per call; the cache holds what the decoder has read.
            output = self.t5(
                decoder_input_ids=last,
                encoder_outputs=(state["encoded"],),
                attention_mask=state["mask"],
                past_key_values=state["cache"],
                use_cache=True,
            )
            state["cache"] = output.past_key_values
            first = self.starts[level]
            logits: Tensor = output.logits[:, -1, first : first + self.sizes[level]]
            return logits.float().log_softmax(-1)

        return beam_search(
            self.trie if trie is None else trie, step, users=len(batch.places), beams=beams
        )
