"""Hugging Face: added tokens, embeddings for them from the codebooks, and the trie.

The export is a folder without a language model; `HuggingFaceExport` applies it to one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from semid.artefact import read_tensors
from semid.catalogue.decoding import AllowedTokens, TorchTrie
from semid.catalogue.prefixes import PrefixIndex
from semid.codes import SemanticIds
from semid.documents import read_json, typed
from semid.errors import ArtefactError, UsageError, import_extra
from semid.exports.formats import ExportFormat
from semid.exports.id_files import level_letter
from semid.seeds import torch_generator
from semid.tokenizers.base import Tokenizer

TOKENS, CODEWORDS, IDS = "added_tokens.json", "codewords.safetensors", "ids.parquet"


def _write_huggingface(path: Path, *, ids: SemanticIds, tokenizer: Tokenizer) -> None:
    """Write the folder; an appended level gets tokens too, without codewords."""
    sizes = ids.info.codebook_sizes
    document = {
        "levels": [
            [f"<{level_letter(level)}_{code}>" for code in range(size)]
            for level, size in enumerate(sizes)
        ],
        "special": False,
        "normalized": False,
        "codebook_fingerprint": ids.info.codebook_fingerprint,
    }
    (path / TOKENS).write_text(json.dumps(document) + "\n", encoding="utf8")
    codebooks = {f"level.{n}": np.ascontiguousarray(b) for n, b in enumerate(tokenizer.codebooks)}
    save_file(codebooks, path / CODEWORDS)
    ids.write(path / IDS)


HUGGINGFACE = ExportFormat(_write_huggingface, model="required", folder=True, distinct=True)


@dataclass(frozen=True, eq=False)
class HuggingFaceExport:
    """A folder that ``semid export --to huggingface`` wrote.

    Attributes:
        tokens: for each level, the token of each code.
        codebooks: ``(codes, latent)`` float32 per level; an appended level has none.
        ids: Semantic IDs of the catalogue.
    """

    tokens: list[list[str]]
    codebooks: tuple[npt.NDArray[np.float32], ...]
    ids: SemanticIds

    @classmethod
    def read(cls, path: str | Path) -> HuggingFaceExport:
        """Read the folder.

        Raises:
            ArtefactError: if a file is missing or of another codebook.
        """
        folder = Path(path)
        advice = (
            "this is no Hugging Face export of semid; write one with "
            "'semid export --to huggingface'"
        )
        where = f"'{folder / TOKENS}'"
        document = typed(dict[str, Any], read_json(folder / TOKENS, advice=advice), where)
        levels = typed(list[list[str]], document.get("levels"), f"{where}, levels")
        stored = typed(str, document.get("codebook_fingerprint"), f"{where}, codebook_fingerprint")
        tensors = read_tensors(folder / CODEWORDS)
        names = [f"level.{n}" for n in range(len(tensors))]
        ids = SemanticIds.read(folder / IDS)
        ids.check_codebook(stored)
        sizes = [len(level) for level in levels]
        codebooks = [tensors[name] for name in names if name in tensors]
        model_sizes = [len(codebook) for codebook in codebooks if codebook.ndim == 2]
        if sizes != list(ids.info.codebook_sizes) or model_sizes != list(ids.info.model_sizes):
            raise ArtefactError(
                f"{where} has {sizes} tokens and '{CODEWORDS}' {model_sizes} codewords for ids of "
                f"{list(ids.info.codebook_sizes)} codes per level; {advice}"
            )
        return cls(levels, tuple(codebooks), ids)

    @cached_property
    def index(self) -> PrefixIndex:
        """Prefix index of the ids."""
        return PrefixIndex.build(self.ids)

    def text(self, items: Any) -> str:
        """Return the id of an item, or of a history of items in order, as a string of tokens.

        Args:
            items: item id, or a sequence of them.

        Raises:
            IdsError: for an item without an id.
        """
        rows = np.atleast_2d(self.ids.lookup(items)).tolist()
        return "".join(
            self.tokens[level][code] for codes in rows for level, code in enumerate(codes)
        )

    def add_tokens(self, tokenizer: Any, model: Any = None) -> list[list[int]]:
        """Add the tokens to a transformers tokenizer, and embeddings for them to a model.

        Args:
            tokenizer: a ``PreTrainedTokenizer`` or ``PreTrainedTokenizerFast``; changed in place.
            model: a ``PreTrainedModel`` whose embeddings grow to the tokenizer's length, or None.

        Returns:
            For each level, the vocabulary id of each code; an argument of `initialize` and
            `processor`.

        Raises:
            MissingExtraError: without transformers.
        """
        transformers = import_extra(
            "transformers", extra="transformers", purpose="adding tokens to a model"
        )
        flat = [text for level in self.tokens for text in level]
        options = {"special": False, "normalized": False}
        tokenizer.add_tokens([transformers.AddedToken(text, **options) for text in flat])
        if model is not None and model.get_input_embeddings().num_embeddings < len(tokenizer):
            # `initialize` sets the new rows from the codewords.
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return [list(tokenizer.convert_tokens_to_ids(level)) for level in self.tokens]

    @torch.no_grad()
    def initialize(self, model: Any, token_ids: list[list[int]], *, seed: int = 0) -> None:
        """Set the new tokens' embeddings to the codewords, scaled to the model's embeddings.

        Codewords are standardized per level and, where the widths differ, mapped to the model's
        width by one random projection, which preserves distances in expectation. Then they get the
        mean and standard deviation of the other embeddings. Tokens of an appended level stay as
        they are. Output embeddings that are not tied get the same values.

        Args:
            model: a ``PreTrainedModel`` with embeddings for the tokens.
            token_ids: from `add_tokens`.
            seed: seed of the projection.

        Raises:
            UsageError: if the tokens do not match the levels or lie outside the embeddings.
        """
        if [len(level) for level in token_ids] != [len(level) for level in self.tokens]:
            raise UsageError("token_ids do not match the levels; give what add_tokens returned")
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        # Tied tables are one tensor, which is written once.
        weights = {id(table.weight): table.weight for table in tables if table is not None}
        new = torch.tensor([number for level in token_ids for number in level])
        for weight in weights.values():
            if int(new.max()) >= len(weight):
                raise UsageError(
                    f"the model has {len(weight)} embeddings, token {int(new.max())} lies outside; "
                    "give the model to add_tokens, or call model.resize_token_embeddings"
                )
            # Mean and spread of what the model has learned; the new rows are still noise.
            is_old = torch.ones(len(weight), dtype=torch.bool)
            is_old[new] = False
            old = weight[is_old.to(weight.device)].float()
            std = old.std() if old.numel() > 1 else torch.tensor(0.02)
            mean = old.mean(dim=0) if len(old) else weight.float().mean(dim=0)
            for level, codebook in enumerate(self.codebooks):
                codewords = _standardized(torch.from_numpy(codebook), weight.shape[1], seed)
                value = mean + std * codewords.to(weight.device)
                weight[torch.tensor(token_ids[level])] = value.to(weight.dtype)

    def processor(
        self,
        token_ids: list[list[int]],
        *,
        prompt_length: int | None = None,
        begin_token: int | None = None,
        end_token: int,
    ) -> AllowedTokens:
        """Return the logits processor that allows only ids of this catalogue."""
        return AllowedTokens(
            TorchTrie(self.index),
            token_ids,
            prompt_length=prompt_length,
            begin_token=begin_token,
            end_token=end_token,
        )


def _standardized(codewords: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """Return codewords with mean 0 and variance 1, projected to ``width``."""
    centered = codewords - codewords.mean(dim=0)
    scaled = centered / centered.std().clamp(min=1e-12)
    if scaled.shape[1] == width:
        return scaled
    generator = torch_generator(seed, "projection")
    # The same matrix for every level of this width, so that distances between levels stay too.
    projection = torch.randn((scaled.shape[1], width), generator=generator)
    return scaled @ projection / math.sqrt(scaled.shape[1])
