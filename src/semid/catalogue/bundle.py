"""A catalogue's ids in versions: a folder that only grows, each version's manifest written last.

``parts/`` holds Parquet files that never change; ``manifest-000002.json`` lists the parts of
version 2 with their checksums. A version exists once its manifest does, so a writer that is killed
at any moment leaves the versions before it as they were, and at most a part that nobody names.
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
from semid.data.id_sources import join_tables
from semid.data.ids import ItemIds, cast_ids
from semid.documents import read_json, record, typed
from semid.errors import ArtefactError, InputError, OutputExistsError, UsageError
from semid.runs import hidden_path, hold_path, remove_path

__all__ = ["CatalogueBundle", "Part", "read_catalogue"]

FORMAT_VERSION = 1
STATED = ("codebook_fingerprint", "weights_fingerprint", "unique")
"""What a manifest repeats of its ids."""
MANIFEST = re.compile(r"manifest-([0-9]{6,18})\.json")
PART = re.compile(r"parts/part-[0-9]+-[0-9a-f]+\.parquet")
_UNFINISHED = re.compile(r"\.(manifest|part)-.*\.[0-9a-f]{16}\.tmp")


@dataclass(frozen=True)
class Part:
    """One immutable file of a bundle.

    Attributes:
        file: its path below the bundle.
        rows: items in it.
        sha256: of its bytes.
    """

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A version of a bundle, as its manifest lists it.

    Attributes:
        format_version: of the manifest.
        version: of the catalogue.
        items: rows of all parts together.
        parts: the files, in row order.
        codebook_fingerprint: of the codebooks.
        weights_fingerprint: of all weights.
        unique: how codes were made unique.
    """

    format_version: int
    version: int
    items: int
    parts: tuple[Part, ...]
    codebook_fingerprint: str
    weights_fingerprint: str
    unique: str


class CatalogueBundle:
    """Published ids on disk, one version after another.

    Args:
        path: folder of the bundle; use `create` for a new one.

    Raises:
        ArtefactError: if there is no readable version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.versions():
            raise ArtefactError(
                f"'{path}' holds no manifest; give a bundle written by 'semid encode --catalogue', "
                "or an ids file"
            )

    @classmethod
    def is_bundle(cls, path: str | os.PathLike[str]) -> bool:
        """Say whether a path is a folder with at least one version."""
        return Path(path).is_dir() and any(MANIFEST.fullmatch(p.name) for p in Path(path).iterdir())

    @classmethod
    def create(cls, path: str | os.PathLike[str], ids: SemanticIds) -> CatalogueBundle:
        """Start a bundle whose version 1 is ``ids``.

        Raises:
            OutputExistsError: if the folder exists and is not empty.
        """
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputExistsError(
                f"output '{folder}' exists; a bundle only grows: choose another path, or add to it "
                "with --catalogue"
            )
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
        """Return the finished versions, rising."""
        if not self.path.is_dir():
            return []
        found = (MANIFEST.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def parts(self, version: int | None = None) -> list[Part]:
        """Return the files of a version (the last by default), in row order.

        Raises:
            UsageError: for a version that does not exist.
            ArtefactError: if its manifest cannot be read.
        """
        return list(self._manifest(self._version(version)).parts)

    def _version(self, version: int | None) -> int:
        have = self.versions()
        chosen = have[-1] if version is None else version
        if chosen not in have:
            raise UsageError(f"'{self.path}' has versions {have[0]} to {have[-1]}, not {chosen}")
        return chosen

    def _manifest(self, version: int) -> Manifest:
        file = self.path / _manifest_name(version)
        document = typed(dict[str, Any], read_json(file), f"'{file}'")
        newest = typed(int, document.get("format_version"), f"'{file}', format_version")
        check_version(newest, FORMAT_VERSION, where=f"'{file}'")
        manifest = record(Manifest, document, f"'{file}'")
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
                f"'{file}' contradicts itself: it says version {manifest.version} and "
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
        tables = []
        manifest = self._manifest(self._version(version))
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
        stated = {name: getattr(manifest, name) for name in STATED}
        carried = {name: getattr(ids.info, name) for name in STATED}
        if [len(t) for t in tables] != [part.rows for part in manifest.parts] or stated != carried:
            raise ArtefactError(
                f"version {manifest.version} of '{self.path}' has other rows or another model than "
                "its manifest says; copy the whole folder again"
            )
        return ids

    def append(self, ids: SemanticIds) -> int:
        """Add a version that goes on from the last one.

        Args:
            ids: the whole catalogue: the last version's rows unchanged and in their order, then
                the new ones; what `semid.catalogue.additions.add_items` returns.

        Returns:
            The new version's number.

        Raises:
            InputError: if a published row is not what it was.
            OutputBusyError: if another writer is adding a version.
            IdsError: if new item ids cannot be written in the type of the published ones.
            ArtefactError: if another writer added the version meanwhile.
        """
        with hold_path(self.path):
            self._remove_leftovers()
            return self._append(ids)

    def _remove_leftovers(self) -> None:
        """Remove what a killed writer left: unfinished files, and parts that no version names."""
        named = {part.file for version in self.versions() for part in self.parts(version)}
        for file in self.path.glob(".manifest-*"):
            if _UNFINISHED.fullmatch(file.name):
                file.unlink(missing_ok=True)
        for file in (self.path / "parts").iterdir():
            name = f"parts/{file.name}"
            unnamed = PART.fullmatch(name) and name not in named
            if unnamed or _UNFINISHED.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def _append(self, ids: SemanticIds) -> int:
        last = self.versions()[-1]
        before = self.read(last)
        old = len(before)
        if not _goes_on(before, ids):
            raise InputError(
                f"these ids change rows of version {last} of '{self.path}'; a bundle only grows: "
                "start a new one for another generation"
            )
        fresh = ids.take(np.arange(old, len(ids)))
        # All parts have one type of item ids, that of the first.
        items = cast_ids(fresh.items, before.items.to_arrow().type, source="the new item ids")
        fresh = replace(fresh, items=ItemIds(items))
        part = _write_part(self.path, last + 1, fresh)
        _write_manifest(self.path, last + 1, [*self.parts(last), part], ids.info)
        return last + 1


def read_catalogue(path: str | os.PathLike[str]) -> SemanticIds:
    """Read published ids: the last version of a bundle's folder, or an ids file.

    Raises:
        ArtefactError: if it is neither.
    """
    if Path(path).is_dir():
        return CatalogueBundle(path).read()
    return SemanticIds.read(path)


def _goes_on(before: SemanticIds, after: SemanticIds) -> bool:
    old = len(before)
    kept = np.arange(min(old, len(after)))
    return (
        len(after) >= old
        and after.info.model == before.info.model
        and after.info.codebook_sizes == before.info.codebook_sizes
        and after.info.unique == before.info.unique
        and after.items.take(kept) == before.items
        and np.array_equal(after.codes[:old], before.codes)
        and np.array_equal(after.encoded[:old], before.encoded)
    )


def _manifest_name(version: int) -> str:
    return f"manifest-{version:06d}.json"


def _write_part(folder: Path, version: int, ids: SemanticIds) -> Part:
    """Write an immutable part, named by its content, so that two writers never share a name."""
    buffer = io.BytesIO()
    pq.write_table(ids.to_arrow(), buffer)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    name = f"parts/part-{version:06d}-{digest[:12]}.parquet"
    with _durable(folder / name) as work:
        work.write_bytes(data)
    return Part(name, len(ids), digest)


def _write_manifest(folder: Path, version: int, parts: list[Part], info: CodesInfo) -> None:
    """Publish a version; whoever comes first has it."""
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "version": version,
        "items": sum(part.rows for part in parts),
        "parts": [asdict(part) for part in parts],
        "codebook_fingerprint": info.codebook_fingerprint,
        "weights_fingerprint": info.weights_fingerprint,
        "unique": info.unique,
    }
    try:
        with _durable(folder / _manifest_name(version), exclusive=True) as work:
            work.write_text(json.dumps(document, indent=2) + "\n", encoding="utf8")
    except FileExistsError:
        raise ArtefactError(
            f"another writer added version {version} to '{folder}' meanwhile; repeat the command"
        ) from None


@contextlib.contextmanager
def _durable(target: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes ``target`` once its bytes are on the disk."""
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
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        work.unlink(missing_ok=True)
