"""Saved objects on the Hugging Face Hub: `push_to_hub`, and where `semid.load` finds them."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from semid.errors import ArtefactError, UsageError, brief, import_extra

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("config.json", "model.safetensors", "README.md")
TAGS = ("semantic-ids", "recommendation")


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a path is ``org/name`` and there is neither such a path here nor a folder ``org``."""
    text = os.fspath(path)
    return _NAME.fullmatch(text) is not None and not Path(text).parent.exists()


def fetch_from_hub(name: str, *, revision: str | None = None) -> Path:
    """Return the folder of a repository of the Hub in the local cache, which is updated first.

    Raises:
        MissingExtraError: without huggingface_hub.
        ArtefactError: there is no such repository, or it cannot be reached.
    """
    purpose = f"'{name}' is no folder here; looking for it on the Hugging Face Hub"
    hub = import_extra("huggingface_hub", extra="hub", purpose=purpose)
    try:
        # Nothing but the files of an artefact is fetched; none of them can run code.
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:
        raise ArtefactError(
            f"'{name}' is no folder here, and cannot be read from the Hugging Face Hub "
            f"({brief(error)}); check the path, or the name, the network and 'hf auth login'"
        ) from error


class Publishable:
    """What has a ``save`` can be pushed to the Hugging Face Hub."""

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the artefact folder."""
        raise NotImplementedError

    def _card_data(self) -> dict[str, Any]:
        """Return what the card's metadata say: ``kind``, ``metrics`` and optional others."""
        return {}

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        message: str | None = None,
    ) -> str:
        """Save to a repository of the Hugging Face Hub, which is made if it does not exist.

        The card's metadata hold the metrics of the report. `semid.load` reads the repository.

        Args:
            repo_id: repository, ``org/name``.
            private: whether a new repository is private; None takes the organization's default.
            token: access token; None takes that of ``hf auth login`` or ``HF_TOKEN``.
            revision: branch to write to; None is the main one.
            message: commit message.

        Returns:
            URL of the commit.

        Raises:
            MissingExtraError: without huggingface_hub.
            UsageError: for a name that is none, or if the Hub refuses.
        """
        if _NAME.fullmatch(repo_id) is None:
            raise UsageError(f"repo_id='{repo_id}': give ORG/NAME, such as 'shop/items'")
        hub = import_extra("huggingface_hub", extra="hub", purpose="push_to_hub")
        with tempfile.TemporaryDirectory(prefix="semid-") as work:
            folder = self.save(Path(work) / "model")
            card = folder / "README.md"
            card.write_text(self._hub_card(hub, repo_id, card.read_text("utf8")), "utf8")
            api = hub.HfApi(token=token)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    allow_patterns=list(_FILES),
                    revision=revision,
                    commit_message=message or f"semid: {self._card_data().get('kind', 'model')}",
                )
            except Exception as error:
                raise UsageError(
                    f"'{repo_id}' cannot be written on the Hugging Face Hub ({brief(error)}); "
                    "check the name, your rights there, the network and 'hf auth login'"
                ) from error
        return str(commit.commit_url)

    def _hub_card(self, hub: Any, repo_id: str, text: str) -> str:
        """Put metadata before a card, and the repository's name into its example."""
        data = self._card_data()
        kind, metrics = data.pop("kind", "model"), data.pop("metrics", {})
        results = [
            hub.EvalResult(
                task_type="other",
                task_name="Semantic IDs",
                dataset_type="items",
                dataset_name="the data of the fit",
                metric_type=name,
                metric_value=round(float(value), 6),
            )
            for name, value in metrics.items()
            if value is not None
        ]
        named = {"model_name": repo_id, "eval_results": results} if results else {}
        about = hub.ModelCardData(library_name="semid", tags=[*TAGS, kind], **named, **data)
        for place in ('"path/to/this/folder"', "path_of_this_folder"):
            text = text.replace(place, f'"{repo_id}"')
        return f"---\n{about.to_yaml()}\n---\n\n{text}"
