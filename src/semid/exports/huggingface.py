"""Hugging Face: added tokens, embeddings for them from the codebooks, and the trie.

The export is a folder without any model of the hub in it; `HuggingFaceExport` puts it into one.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
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
from semid.errors import ArtefactError, MissingExtraError, UsageError
from semid.exports.tokens import token_strings
from semid.output import atomic_folder
from semid.seeds import torch_generator
from semid.tokenizers.base import Tokenizer

__all__ = ["HuggingFaceExport", "write_huggingface"]

TOKENS, CODEWORDS, IDS = "added_tokens.json", "codewords.safetensors", "ids.parquet"


def write_huggingface(
    ids: SemanticIds,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer,
    overwrite: bool = False,
) -> None:
    """Write a folder: ``added_tokens.json``, ``codewords.safetensors``, ``ids.parquet``.

    Args:
        ids: Semantic IDs; an appended level gets tokens too, without codewords.
        path: folder.
        tokenizer: the model that made them.
        overwrite: replace an existing folder.

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
        FingerprintError: if the ids are of another codebook.
    """
    ids.check_codebook(tokenizer.codebook_fingerprint)
    document = {
        "levels": token_strings(ids.info.codebook_sizes),
        "special": False,
        "normalized": False,
        "codebook_fingerprint": ids.info.codebook_fingerprint,
    }
    with atomic_folder(path, overwrite=overwrite) as folder:
        (folder / TOKENS).write_text(json.dumps(document) + "\n", encoding="utf8")
        books = {f"level.{n}": np.ascontiguousarray(b) for n, b in enumerate(tokenizer.codebooks)}
        save_file(books, folder / CODEWORDS)
        ids.write(folder / IDS)


@dataclass(frozen=True, eq=False)
class HuggingFaceExport:
    """A folder that `write_huggingface` wrote, ready to go into a model.

    Attributes:
        tokens: the token of each code, a list a level.
        codebooks: ``(codes, latent)`` float32 a level; an appended level has none.
        ids: the catalogue.
    """

    tokens: list[list[str]]
    codebooks: tuple[npt.NDArray[np.float32], ...]
    ids: SemanticIds

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> HuggingFaceExport:
        """Read the folder.

        Raises:
            ArtefactError: if something is missing or of another codebook.
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
        books = read_tensors(folder / CODEWORDS)
        names = [f"level.{n}" for n in range(len(books))]
        ids = SemanticIds.read(folder / IDS)
        ids.check_codebook(stored)
        sizes = [len(level) for level in levels]
        tables = [books[name] for name in names if name in books]
        model_sizes = [len(table) for table in tables if table.ndim == 2]
        if sizes != list(ids.info.codebook_sizes) or model_sizes != list(ids.info.model_sizes):
            raise ArtefactError(
                f"{where} has {sizes} tokens and '{CODEWORDS}' {model_sizes} codewords for ids of "
                f"{list(ids.info.codebook_sizes)} codes per level; {advice}"
            )
        return cls(levels, tuple(tables), ids)

    def text(self, item: str) -> str:
        """Return an item's id as the string of its tokens."""
        codes = self.ids.lookup(item)
        return "".join(self.tokens[level][int(code)] for level, code in enumerate(codes))

    def add_tokens(self, tokenizer: Any, model: Any = None) -> list[list[int]]:
        """Add the tokens to a transformers tokenizer, and room for them to a model.

        Args:
            tokenizer: a ``PreTrainedTokenizer`` or its fast twin; changed in place.
            model: a ``PreTrainedModel`` whose embeddings grow to the tokenizer's length, or None.

        Returns:
            The vocabulary id of each code, a list a level; `initialize` and `processor` take it.

        Raises:
            MissingExtraError: without transformers.
        """
        try:
            from transformers import AddedToken
        except ImportError:
            raise MissingExtraError(
                "transformers", extra="transformers", purpose="adding tokens to a model"
            ) from None
        flat = [token for level in self.tokens for token in level]
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in flat])
        if model is not None and model.get_input_embeddings().num_embeddings < len(tokenizer):
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return [list(tokenizer.convert_tokens_to_ids(level)) for level in self.tokens]

    @torch.no_grad()
    def initialize(self, model: Any, token_ids: list[list[int]], *, seed: int = 0) -> None:
        """Start the new tokens' embeddings from the codewords, at the model's own mean and spread.

        Codewords are standardized level by level and, where the widths differ, brought to the
        model's width by one random projection, which keeps their distances in expectation. Tokens
        of an appended level stay as they are. Output embeddings that are not tied get the same.

        Args:
            model: a ``PreTrainedModel`` that has room for the tokens.
            token_ids: what `add_tokens` returned.
            seed: of the projection.

        Raises:
            UsageError: if the tokens do not match the levels or lie outside the embeddings.
        """
        if [len(level) for level in token_ids] != [len(level) for level in self.tokens]:
            raise UsageError("token_ids do not match the levels; give what add_tokens returned")
        tables = {id(t.weight): t.weight for t in _embeddings(model)}
        for weight in tables.values():
            new = torch.tensor([token for level in token_ids for token in level])
            if int(new.max()) >= len(weight):
                raise UsageError(
                    f"the model has {len(weight)} embeddings, token {int(new.max())} lies outside; "
                    "give the model to add_tokens, or call model.resize_token_embeddings"
                )
            old = torch.ones(len(weight), dtype=torch.bool)
            old[new] = False
            known = weight[old.to(weight.device)].float()
            spread = known.std() if known.numel() > 1 else torch.tensor(0.02)
            center = known.mean(dim=0) if len(known) else weight.float().mean(dim=0)
            for level, book in enumerate(self.codebooks):
                words = _widened(torch.from_numpy(book), weight.shape[1], seed)
                value = center + spread * words.to(weight.device)
                weight[torch.tensor(token_ids[level])] = value.to(weight.dtype)

    def processor(
        self, token_ids: list[list[int]], *, prompt_length: int, end_token: int
    ) -> AllowedTokens:
        """Return the logits processor that lets only ids of this catalogue through."""
        return AllowedTokens(
            TorchTrie(PrefixIndex.build(self.ids)),
            token_ids,
            prompt_length=prompt_length,
            end_token=end_token,
        )


def _embeddings(model: Any) -> list[Any]:
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [table for table in tables if table is not None]


def _widened(words: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """Codewords with mean 0 and variance 1, in the model's width."""
    words = words - words.mean(dim=0)
    words = words / words.std().clamp(min=1e-12)
    if words.shape[1] == width:
        return words
    generator = torch_generator(seed, "projection")
    return (
        words
        @ torch.randn((words.shape[1], width), generator=generator)
        / math.sqrt(words.shape[1])
    )
