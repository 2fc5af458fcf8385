"""`semid.load`: open any artefact by the kind written in it."""

from __future__ import annotations

import os
from typing import Any

from semid.artefact import read_config
from semid.errors import ArtefactError, UsageError, nearest_name
from semid.filesystems import fetched, is_uri
from semid.hub import fetch_from_hub, is_hub_name
from semid.registry import Registry
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.factory import TOKENIZERS

KINDS = Registry(
    TOKENIZERS.group,
    {
        **TOKENIZERS.targets,
        "head": "semid.tokenizers.heads:DecodeHead",
        "ranker": "semid.recommenders.ranking.ranker:Ranker",
        "retriever": "semid.recommenders.retrieval.retriever:Retriever",
    },
)


def load(path: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Open a saved tokenizer, decode head, ranking model or next-item model.

    Args:
        path: artefact folder, as written by ``semid fit -o``, ``semid rank -o``,
            ``semid retrieve -o`` or ``save``; a URI of one, such as ``s3://bucket/model``; or a
            repository on the Hugging Face Hub, ``org/name``, where no folder ``org`` is here.
        revision: branch, tag or commit of a repository on the Hub.

    Returns:
        The object that was saved, ready to use.

    Raises:
        ArtefactError: if the folder is incomplete, altered, or of an unknown kind or version.
    """
    if is_hub_name(path):
        return load(fetch_from_hub(os.fspath(path), revision=revision))
    if revision is not None:
        raise UsageError(f"revision= is for the Hugging Face Hub, and '{path}' is a path or a URI")
    if is_uri(path):
        with fetched(str(path)) as folder:
            return load(folder)
    kind = read_config(path)["kind"]
    if kind not in KINDS:
        known = ", ".join(f"'{name}'" for name in KINDS)
        raise ArtefactError(
            f"'{path}' holds a '{kind}'; this semid knows {known}{nearest_name(kind, KINDS)}"
        )
    return KINDS.load(kind).load(path)


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Open a saved tokenizer; arguments as for `load`."""
    model = load(path)
    if not isinstance(model, Tokenizer):
        raise ArtefactError(
            f"'{path}' holds a {type(model).__name__}, which gives items no codes; give a folder "
            "that 'semid fit' wrote"
        )
    return model
