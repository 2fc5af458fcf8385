"""Paths that are not on this machine's disk: ``s3://``, ``gs://``, ``file://``, ``memory://``.

Arrow's own file systems where it has them (S3 takes its keys, region and ``AWS_ENDPOINT_URL`` from
the environment), fsspec's for every other scheme.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as arrow_fs

from semid.errors import SemidError, UsageError, brief

# How long a connection to S3 may take; an endpoint that does not answer is tried three times.
CONNECT_SECONDS = 10
# How long Google's client repeats a request before it gives up; its own limit is 15 minutes.
GCS_SECONDS = 30
_BUCKET_SCHEMES = ("s3", "s3a", "gs", "gcs")

FilePath = Path | str  # a path on this machine, or the text of a URI


def is_uri(path: Any) -> bool:
    """Whether a path names a file system, as ``s3://bucket/items`` does."""
    return isinstance(path, str) and "://" in path


def local_path(path: FilePath | os.PathLike[str]) -> Path | None:
    """Return a path on this machine (``file://`` is one too), or None for another file system."""
    text = os.fspath(path)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if is_uri(text) else Path(text).expanduser()


def list_sizes(path: FilePath) -> dict[str, int] | None:
    """Return path -> bytes of all files below a folder, hidden ones too; None for no folder."""
    location = local_path(path)
    if location is not None:
        if not location.is_dir():
            return None
        return {
            entry.relative_to(location).as_posix(): entry.lstat().st_size
            for entry in location.rglob("*")
            # A link is listed as a file; it is not followed.
            if entry.is_symlink() or not entry.is_dir()
        }
    system, root = resolve(path)
    root = root.rstrip("/")
    if system.get_file_info(root).type == arrow_fs.FileType.File:
        return None
    selector = arrow_fs.FileSelector(root, recursive=True, allow_not_found=True)
    files = [f for f in system.get_file_info(selector) if f.type == arrow_fs.FileType.File]
    return {file.path.lstrip("/")[len(root.lstrip("/")) + 1 :]: file.size for file in files}


def resolve(path: FilePath) -> tuple[Any, str]:
    """Return the Arrow file system of a path or URI, and the path within it."""
    if not is_uri(path):
        return arrow_fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    uri = str(path)
    scheme, _, rest = uri.partition("://")
    try:
        if scheme == "file":
            return arrow_fs.LocalFileSystem(), rest
        if scheme in ("s3", "s3a"):
            return _s3(rest)
        # A query in a URI holds options of its own, which then replace these.
        if scheme in ("gs", "gcs"):
            limit = "" if "?" in rest else f"?retry_limit_seconds={GCS_SECONDS}"
            system, inner = arrow_fs.FileSystem.from_uri(f"gs://{rest}{limit}")
            return system, str(inner)
        import fsspec

        return arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(fsspec.filesystem(scheme))), rest
    except Exception as error:  # whatever a file system of fsspec raises
        raise UsageError(
            f"'{uri}' cannot be opened ({brief(error)}); use s3://, gs://, file:// or a scheme "
            "that fsspec knows, with its package installed"
        ) from error


def _s3(rest: str) -> tuple[Any, str]:
    """Return S3 with the environment's endpoint, or what a URI's own query says."""
    if "?" in rest:
        system, inner = arrow_fs.FileSystem.from_uri(f"s3://{rest}")
        return system, str(inner)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return arrow_fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        retry_strategy=arrow_fs.AwsStandardS3RetryStrategy(max_attempts=3),
        endpoint_override=endpoint,
        region=region,
    ), rest


def _uri(like: str, inner: str) -> str:
    """Write a path within a file system as a URI again, in the manner of ``like``."""
    scheme, _, rest = like.partition("://")
    query = rest.partition("?")[2]
    return f"{scheme}://{inner}" + (f"?{query}" if query else "")


def list_files(uri: str) -> list[str]:
    """List the files that a URI names: itself, all in its folder, or those of its glob; sorted."""
    system, path = resolve(uri)
    magic = [i for i, part in enumerate(path.split("/")) if any(c in part for c in "*[")]
    root = "/".join(path.split("/")[: magic[0]]) if magic else path
    try:
        info = system.get_file_info(root)
        if info.type == arrow_fs.FileType.File:
            return [uri]
        if info.type == arrow_fs.FileType.NotFound:
            raise UsageError(f"'{uri}' does not exist; check the path")
        entries = system.get_file_info(arrow_fs.FileSelector(root, recursive=True))
    except Exception as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"'{uri}' cannot be listed ({brief(error)}); check the address, the keys and "
            "the network"
        ) from error

    def is_named(file: str) -> bool:
        if magic:
            return fnmatch.fnmatchcase(file.lstrip("/"), path.lstrip("/"))
        return not any(part[0] in "._" for part in file[len(root) :].split("/") if part)

    files = [f.path for f in entries if f.type == arrow_fs.FileType.File and is_named(f.path)]
    if not files:
        raise UsageError(f"'{uri}' holds no files; name a folder of Parquet files")
    return sorted(_uri(uri, file) for file in files)


def open_parquet(path: FilePath, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file wherever it lies, and verify the checksums of its pages."""
    options["page_checksum_verification"] = True
    if is_uri(path):
        options["filesystem"], path = resolve(path)
        options.pop("memory_map", None)
    try:
        return pq.ParquetFile(path, **options)
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"a column's name is no text ({error})") from error


class Folder:
    """A folder that results are written to; a file in it is whole or absent."""

    def __init__(self, path: FilePath) -> None:
        self.path = path
        self._fs, self._inner = resolve(path)
        self._inner = self._inner.rstrip("/")
        self._is_local = isinstance(self._fs, arrow_fs.LocalFileSystem)

    def __str__(self) -> str:
        return str(self.path)

    def _at(self, name: str) -> str:
        return f"{self._inner}/{name}"

    def file(self, name: str) -> FilePath:
        """Return the path of a file in it."""
        inner = self._at(name)
        return _uri(str(self.path), inner) if is_uri(self.path) else Path(inner)

    def exists(self) -> bool:
        """Whether there is anything at its path."""
        return bool(self._fs.get_file_info(self._inner).type != arrow_fs.FileType.NotFound)

    def names(self, *, hidden: bool = False) -> list[str]:
        """Return the names of the files in it, sorted; hidden ones only if asked for."""
        selector = arrow_fs.FileSelector(self._inner, allow_not_found=True)
        entries = self._fs.get_file_info(selector)
        names = [info.base_name for info in entries if info.type == arrow_fs.FileType.File]
        return sorted(name for name in names if hidden or name[0] not in "._")

    def write(self, name: str, data: Any) -> None:
        """Write bytes or an Arrow buffer as one file, whole or not at all."""
        if self._is_local:
            opened = self.stream(name)
        else:  # shown when it is complete
            self._fs.create_dir(self._inner, recursive=True)
            opened = self._fs.open_output_stream(self._at(name))
        with opened as stream:
            stream.write(data)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[Any]:
        """Open a file to be written in pieces; it appears when the block ends without an error."""
        self._fs.create_dir(self._inner, recursive=True)
        if not self._is_local:
            # Object stores show a file when its upload is complete. An upload that fails is
            # completed by closing the stream, so it goes to another name first.
            work = self._at(f".{name}.{secrets.token_hex(8)}.tmp")
            try:
                with self._fs.open_output_stream(work) as stream:
                    yield stream
            except BaseException:
                with contextlib.suppress(OSError):
                    self._fs.delete_file(work)
                raise
            self._fs.move(work, self._at(name))
            return
        # A random name that is made exclusively: no link is followed, no other writer shares it.
        file = Path(self._at(f".{name[:100]}.{secrets.token_hex(8)}.tmp"))
        try:
            with file.open("xb") as local:
                yield local
            file.replace(self._at(name))
        finally:
            file.unlink(missing_ok=True)

    def exists_file(self, name: str) -> bool:
        """Whether it holds a file of this name."""
        return bool(self._fs.get_file_info(self._at(name)).type == arrow_fs.FileType.File)

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file, or None if it is absent."""
        if not self.exists_file(name):
            return None
        with self._fs.open_input_stream(self._at(name)) as stream:
            return bytes(stream.read())

    def copy_to(self, name: str, target: Path) -> None:
        """Copy a file of any size to this machine."""
        with self._fs.open_input_stream(self._at(name)) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)

    def copy_from(self, source: Path, name: str) -> None:
        """Copy a file of this machine into the folder, whole or not at all."""
        below, _, last = name.rpartition("/")
        folder = Folder(self.file(below)) if below else self
        with source.open("rb") as file, folder.stream(last) as sink:
            shutil.copyfileobj(file, sink)

    def read_ends(self, name: str, size: int) -> tuple[bytes, bytes, bytes]:
        """Return a file's length as text, its first ``size`` bytes and its last ``size`` bytes."""
        with self._fs.open_input_file(self._at(name)) as file:
            length = file.size()
            first = bytes(file.read_at(min(size, length), 0))
            start = max(0, length - size)
            return str(length).encode(), first, bytes(file.read_at(length - start, start))

    def remove_file(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(OSError):
            self._fs.delete_file(self._at(name))

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table as one Parquet file, whole or not at all; it is made in memory first."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, write_page_checksum=True)
        self.write(name, sink.getvalue())

    def move_into(self, name: str, target: Folder) -> None:
        """Move a file to another folder of the same file system."""
        self._fs.create_dir(target._inner, recursive=True)
        self._fs.move(self._at(name), target._at(name))

    def remove(self) -> None:
        """Remove the folder and all in it, or the file at its path."""
        kind = self._fs.get_file_info(self._inner).type
        if kind == arrow_fs.FileType.Directory:
            self._fs.delete_dir(self._inner)
        elif kind == arrow_fs.FileType.File:
            self._fs.delete_file(self._inner)


def split_path(path: FilePath) -> tuple[Folder, str]:
    """Return the folder that a path or URI lies in, and its name there."""
    if not is_uri(path):
        return Folder(Path(path).parent), Path(path).name
    # By the scheme first: cutting "memory://ids" at its last slash leaves no URI.
    scheme, _, rest = str(path).partition("://")
    parent, _, name = rest.partition("?")[0].rstrip("/").rpartition("/")
    if not name or (not parent and scheme in _BUCKET_SCHEMES):
        raise UsageError(f"'{path}' is a whole file system; give a file or folder in it")
    return Folder(_uri(str(path), parent)), name


@contextlib.contextmanager
def explained(uri: FilePath, verb: str) -> Iterator[None]:
    """Say which URI an error of its file system is about, and what to look at."""
    try:
        yield
    except OSError as error:
        if not is_uri(uri) or isinstance(error, SemidError):
            raise
        why = brief(error).partition(". To create buckets")[0]  # advice for Arrow's own users
        raise UsageError(
            f"'{uri}' cannot be {verb} ({why}); check that its bucket or folder exists and that "
            "the keys of this environment may do so"
        ) from error


@contextlib.contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """Copy a small folder, such as an artefact, to this machine for as long as the block runs."""
    folder = Folder(uri)
    with tempfile.TemporaryDirectory(prefix="semid-") as work:
        with explained(uri, "read"):
            names = folder.names()
            for name in names:
                folder.copy_to(name, Path(work) / name)
        if not names:
            raise UsageError(f"'{uri}' does not exist; check the URI")
        yield Path(work)


def send_folder(source: Path, uri: str, *, last: str) -> None:
    """Copy the files of a folder to a URI; what is there is removed first.

    The file named ``last`` makes the copy complete: readers look for it first.
    """
    folder = Folder(uri)
    folder.remove()
    names = sorted(file.name for file in source.iterdir())
    for name in sorted(names, key=lambda name: name == last):
        folder.write(name, (source / name).read_bytes())
