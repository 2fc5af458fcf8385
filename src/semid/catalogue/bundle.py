"""Versions of a catalogue's ids on disk, in a folder to which files are only added.

``parts/`` contains immutable Parquet files; ``manifest-000002.json`` lists the parts of version 2
with their checksums. A version exists once its manifest does, so a writer that is killed at any
moment leaves the earlier versions intact, and at most a part that no manifest names.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semid.artefact import check_version
from semid.codes import CodesInfo, SemanticIds
from semid.data.ids import ItemIds, cast_ids
from semid.data.items import join_tables
from semid.documents import read_json, record, typed
from semid.errors import ArtefactError, InputError, OutputExistsError, UsageError
from semid.runs import hidden_path, hold_path, remove_path

__all__ = ["CatalogueBundle", "Part", "read_catalogue"]

FORMAT_VERSION = 1
STATED = ("codebook_fingerprint", "weights_fingerprint", "unique")
"""Metadata of the ids that a manifest repeats."""
MANIFEST = re.compile(r"manifest-([0-9]{6,18})\.json")
PART = re.compile(r"parts/part-[0-9]+-[0-9a-f]+\.parquet")
_UNFINISHED = re.compile(r"\.(manifest|part)-.*\.[0-9a-f]{16}\.tmp")


@dataclass(frozen=True)
class Part:
    """One immutable file of a bundle: its path in the bundle, number of items, and checksum."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of a manifest: one version of a bundle, with the parts in row order."""

    format_version: int
    version: int
    items: int
    parts: tuple[Part, ...]
    codebook_fingerprint: str
    weights_fingerprint: str
    unique: str


class CatalogueBundle:
    """Published ids on disk, in versions that add items.

    Args:
        path: folder of the bundle; `create` starts a new one.

    Raises:
        ArtefactError: if there is no readable version.

    Example:
        >>> bundle = semid.CatalogueBundle.create("published", ids)
        >>> bundle.append(semid.add_items(ids, model, new_embeddings).ids)
        2
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.versions():
            raise ArtefactError(
                f"'{path}' holds no manifest; give a bundle written by 'semid encode --catalogue', "
                "or an ids file"
            )

    def __repr__(self) -> str:
        return f"CatalogueBundle('{self.path}', versions={len(self.versions())})"

    @classmethod
    def create(cls, path: str | os.PathLike[str], ids: SemanticIds) -> CatalogueBundle:
        """Create a bundle whose version 1 is ``ids``.

        Raises:
            OutputExistsError: if the folder exists and is not empty.
        """
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputExistsError(
                f"output '{folder}' exists; a bundle only grows: choose another path, or add to it "
                "with --catalogue"
            )
        # The first version appears as a whole: it is made beside the folder and then renamed.
        with hold_path(folder):
            work = hidden_path(folder, f"{secrets.token_hex(8)}.tmp")
            try:
                (work / "parts").mkdir(parents=True)
                _write_manifest(work, 1, [_write_part(work, 1, ids)], ids.info)
                work.rename(folder)  # an empty folder may be there
            finally:
                remove_path(work)
        return cls(folder)

    def versions(self) -> list[int]:
        """Return the numbers of the versions, ascending."""
        return _versions(self.path)

    def parts(self, version: int | None = None) -> list[Part]:
        """Return the files of a version (the last by default), in row order.

        Raises:
            UsageError: for a version that does not exist.
            ArtefactError: if its manifest cannot be read.
        """
        return list(self._manifest(version).parts)

    def _manifest(self, version: int | None = None) -> Manifest:
        """Read and check the manifest of a version, the last by default."""
        versions = self.versions()
        version = versions[-1] if version is None else version
        if version not in versions:
            raise UsageError(
                f"'{self.path}' has versions {versions[0]} to {versions[-1]}, not {version}"
            )
        file = self.path / _manifest_name(version)
        where = f"'{file}'"
        document = typed(dict[str, Any], read_json(file), where)
        format_version = typed(int, document.get("format_version"), f"{where}, format_version")
        check_version(format_version, FORMAT_VERSION, where=where)
        manifest = record(Manifest, document, where)
        outside = [part.file for part in manifest.parts if not PART.fullmatch(part.file)]
        if outside:
            raise ArtefactError(
                f"'{file}' names '{outside[0]}', which is no file of this bundle; its parts are "
                "called 'parts/part-...parquet': copy the whole folder again"
            )
        if (
            manifest.version != version
            or not manifest.parts
            or manifest.items != sum(part.rows for part in manifest.parts)
        ):
            raise ArtefactError(
                f"'{file}' contradicts itself: it states version {manifest.version} and "
                f"{manifest.items} items in {len(manifest.parts)} parts; copy it again"
            )
        return manifest

    def read(self, version: int | None = None) -> SemanticIds:
        """Read a version (the last by default), verifying every part's checksum.

        Item ids have the type of the first part.

        Raises:
            UsageError: for a version that does not exist.
            ArtefactError: if a part is missing or altered, or not of the manifest's model.
        """
        # A checksum for every file: a part that was changed or mixed up is never read as ids.
        tables = []
        manifest = self._manifest(version)
        for part in manifest.parts:
            try:
                data = (self.path / part.file).read_bytes()
            except OSError as error:
                raise ArtefactError(
                    f"'{self.path}' lacks the part '{part.file}' ({error}); copy the whole folder"
                ) from None
            if hashlib.sha256(data).hexdigest() != part.sha256:
                raise ArtefactError(
                    f"part '{part.file}' of '{self.path}' is not what was written; copy it again"
                )
            try:
                tables.append(pq.read_table(io.BytesIO(data)))
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ArtefactError(
                    f"part '{part.file}' of '{self.path}' cannot be read ({error}); copy it again"
                ) from None
        ids = SemanticIds.from_arrow(join_tables(tables, where=f"'{self.path}'"), path=self.path)
        # The manifest repeats what identifies the model, so that parts of another bundle show.
        same_model = all(getattr(manifest, key) == getattr(ids.info, key) for key in STATED)
        if [len(t) for t in tables] != [part.rows for part in manifest.parts] or not same_model:
            raise ArtefactError(
                f"version {manifest.version} of '{self.path}' has other rows or another model than "
                "its manifest says; copy the whole folder again"
            )
        return ids

    def append(self, ids: SemanticIds) -> int:
        """Add a version that continues the last one.

        Args:
            ids: the whole catalogue, as `semid.add_items` returns it: the rows of the last version,
                unchanged and in their order, then the new ones.

        Returns:
            The number of the new version; that of the last one where no row is new.

        Raises:
            InputError: if a published row has changed.
            OutputBusyError: if another writer is adding a version.
            IdsError: if new item ids cannot be written in the type of the published ones.
            ArtefactError: if another writer added the version meanwhile.
        """
        with hold_path(self.path):
            self._remove_leftovers()
            return self._append(ids)

    def _remove_leftovers(self) -> None:
        """Remove files of a killed writer: unfinished ones, and parts that no version names."""
        listed = {part.file for part in self.parts()}  # a version has the parts of those before
        for file in [*self.path.glob(".manifest-*"), *(self.path / "parts").iterdir()]:
            name = file.relative_to(self.path).as_posix()
            unlisted = PART.fullmatch(name) and name not in listed
            if unlisted or _UNFINISHED.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def _append(self, ids: SemanticIds) -> int:
        last = self.versions()[-1]
        before = self.read(last)
        old = len(before)
        # Published ids never change: every old row must be there, in its place, with its codes.
        if not _continues(before, ids):
            raise InputError(
                f"these ids change rows of version {last} of '{self.path}'; a bundle only grows: "
                "start a new one for another generation"
            )
        if len(ids) == old:
            return last
        added = ids.take(np.arange(old, len(ids)))
        # All parts have the type of item ids of the first.
        items = cast_ids(added.items, before.items.to_arrow().type, source="the new item ids")
        part = _write_part(self.path, last + 1, replace(added, items=ItemIds(items)))
        _write_manifest(self.path, last + 1, [*self.parts(last), part], ids.info)
        return last + 1


def _versions(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (MANIFEST.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def read_catalogue(path: str | os.PathLike[str]) -> SemanticIds:
    """Read published ids: the last version of a bundle's folder, or an ids file.

    Raises:
        ArtefactError: if it is neither.
    """
    if Path(path).is_dir():
        return CatalogueBundle(path).read()
    return SemanticIds.read(path)


def _continues(before: SemanticIds, after: SemanticIds) -> bool:
    """Return whether a catalogue has the rows of an earlier one, unchanged, at its beginning."""
    old = len(before)
    return (
        len(after) >= old
        and after.info.model == before.info.model
        and after.info.codebook_sizes == before.info.codebook_sizes
        and after.info.unique == before.info.unique
        and after.items.take(np.arange(old)) == before.items
        and np.array_equal(after.codes[:old], before.codes)
        and np.array_equal(after.encoded[:old], before.encoded)
    )


def _manifest_name(version: int) -> str:
    return f"manifest-{version:06d}.json"


def _write_part(folder: Path, version: int, ids: SemanticIds) -> Part:
    """Write a part; its name contains its checksum, so two writers never share a name."""
    buffer = io.BytesIO()
    pq.write_table(ids.to_arrow(), buffer)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    name = f"parts/part-{version:06d}-{digest[:12]}.parquet"
    with _durable(folder / name) as work:
        work.write_bytes(data)
    return Part(name, len(ids), digest)


def _write_manifest(folder: Path, version: int, parts: list[Part], info: CodesInfo) -> None:
    """Publish a version; the first of several writers succeeds."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        version=version,
        items=sum(part.rows for part in parts),
        parts=tuple(parts),
        **{key: getattr(info, key) for key in STATED},
    )
    try:
        with _durable(folder / _manifest_name(version), exclusive=True) as work:
            work.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf8")
    except FileExistsError:
        raise ArtefactError(
            f"another writer added version {version} to '{folder}' meanwhile; repeat the command"
        ) from None


@contextlib.contextmanager
def _durable(target: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes ``target`` once its bytes are on disk."""
    work = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    work.touch(exist_ok=False)
    try:
        yield work
        with work.open("rb+") as file:
            os.fsync(file.fileno())
        if exclusive:
            os.link(work, target)  # fails where the name is taken, unlike a rename
        else:
            work.replace(target)
        # The new name is on disk only once its folder is.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        work.unlink(missing_ok=True)  # after a failure; a link has left it as well
