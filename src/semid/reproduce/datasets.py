"""The data of a recipe, opened: embeddings, items and interactions, and what identifies them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semid.data.embeddings import open_embeddings
from semid.data.interactions import Interactions, read_interactions
from semid.data.source import EmbeddingSource
from semid.data.synthetic import SyntheticCatalogue
from semid.errors import UsageError
from semid.output import atomic_folder
from semid.reproduce.ledger import Ledger
from semid.reproduce.recipe import DataSet

EMBEDDINGS = ("embeddings.f16.npy", "embeddings.npy")


@dataclass(frozen=True)
class Opened:
    """A data set on disk."""

    spec: DataSet
    folder: Path
    # Interaction files by the name that tells their users apart; one, unless the data set joins
    # those of others.
    logs: dict[str, Path]

    @property
    def items(self) -> Path:
        """The table of items."""
        return self.folder / "items.parquet"

    @property
    def interactions(self) -> Path:
        """The one log."""
        if len(self.logs) != 1:
            raise UsageError(f"data set '{self.spec.name}' has {len(self.logs)} logs, not one")
        return next(iter(self.logs.values()))

    @property
    def relations(self) -> Path | None:
        """Pairs of items that know nothing of the log, if the recipe asks for them."""
        return self.folder / "relations.parquet" if self.spec.relations else None

    @cached_property
    def embeddings(self) -> EmbeddingSource:
        """The embeddings, named by the table of items."""
        return open_embeddings(_embeddings(self.folder), ids=self.items)

    def log(self) -> Interactions | None:
        """Read the interactions; several logs in one, their users told apart by the log's name."""
        if not self.logs:
            return None
        if len(self.logs) == 1:
            return read_interactions(self.interactions, ties=self.spec.ties)
        # A person in two logs counts as two users: nothing is paired across logs, and which of the
        # two are test users is drawn apart.
        parts = []
        for name, path in self.logs.items():
            table = pq.read_table(path, columns=["user_id", "item_id", "position"])
            users = [f"{name}:{user}" for user in table["user_id"].to_pylist()]
            columns = {
                "user_id": pa.array(users, pa.large_string()),
                "item_id": table["item_id"].cast(pa.large_string()),
                "position": table["position"].cast(pa.int64()),
            }
            parts.append(pa.table(columns))
        return read_interactions(pa.concat_tables(parts), ties="file")

    def pool(self, log: Interactions) -> EmbeddingSource:
        """Return the items that retrieval searches: all, or those that joined logs know."""
        if len(self.logs) == 1:
            return self.embeddings
        # Items that no log could name are no candidates: they would only make the task easier.
        known = self.embeddings.ids.index_of(log.item_ids)
        return self.embeddings.subset(np.sort(known[known >= 0]))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files: a run on other files is another run."""
        hashed = hashlib.sha256()
        more = (self.relations,) if self.relations else ()
        for path in (_embeddings(self.folder), self.items, *self.logs.values(), *more):
            hashed.update(path.name.encode())
            with path.open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        return hashed.hexdigest()[:16]


def missing_files(spec: DataSet, data: Path | None) -> str | None:
    """Return what keeps a data set from being opened, in a sentence, or None."""
    if spec.synthetic:
        return None
    if data is None:
        return f"data set '{spec.name}' needs --data, the folder that holds '{spec.folder}'"
    folder = data / spec.folder
    names = ["items.parquet", *(["relations.parquet"] if spec.relations else [])]
    files = [*(folder / name for name in names), *_logs(spec, data).values()]
    missing = [str(path) for path in files if not path.is_file()]
    if not any((folder / name).is_file() for name in EMBEDDINGS):
        missing.append(str(folder / EMBEDDINGS[0]))
    if missing:
        return f"data set '{spec.name}' lacks {', '.join(missing)}; see 'semid prepare'"
    return None


def open_data(spec: DataSet, data: Path | None, ledger: Ledger) -> Opened:
    """Open a data set, making a synthetic one first."""
    if spec.synthetic:
        folder = ledger.folder / "data" / f"synthetic-{spec.synthetic}"
        with ledger.lock(folder.name):
            if not folder.exists():
                with atomic_folder(folder) as work:
                    SyntheticCatalogue(items=spec.synthetic, seed=0).write(work)
        return Opened(spec, folder, {spec.name: folder / "interactions.parquet"})
    problem = missing_files(spec, data)
    if problem is not None or data is None:
        raise UsageError(str(problem))
    return Opened(spec, data / spec.folder, _logs(spec, data))


def _logs(spec: DataSet, data: Path) -> dict[str, Path]:
    return {name: data / name / "interactions.parquet" for name in spec.logs or (spec.folder,)}


def _embeddings(folder: Path) -> Path:
    return next(folder / name for name in EMBEDDINGS if (folder / name).is_file())
