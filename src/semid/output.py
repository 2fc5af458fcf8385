"""Outputs: what may be written where, and how it appears there.

Four rules hold for everything that semid writes:

1. An output replaces only what semid wrote and recognizes, and never an input, a folder that holds
   an input, or something inside an input. Everything else is refused before any work begins.
2. One run at a time writes to an output. A lock file beside it, ``.NAME.lock``, names the run.
3. An output appears under its name whole. It is made under a random hidden name beside its
   destination and renamed. A former output is exchanged with it in one step, so that after a kill
   at any moment either the old or the new output is there.
4. The next run that holds the lock removes what a killed run left.

How semid recognizes what it wrote: a folder holds the file ``.semid``, which lists its files with
their sizes; ids in Parquet, HTML and Markdown carry a mark in their content; beside a file in any
other format lies ``.NAME.semid`` with its digest.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from semid.errors import OutputExistsError, SemidError, UsageError
from semid.filesystems import (
    FilePath,
    Folder,
    explained,
    is_uri,
    list_sizes,
    local_path,
    open_parquet,
    split_path,
)
from semid.runs import NOFOLLOW, check_state_folder, hidden_path, hold_path, remove_path

MARKER = ".semid"
MARKDOWN_MARK = "<!-- written by semid -->"
_MARKS = (MARKDOWN_MARK.encode(), b'<meta name="generator" content="semid ')

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_IDS_COLUMNS = {"item_id", "codes", "residual_norm", "model_codes"}
# Folders that semid 0.1 wrote before there was a marker.
_UNMARKED_ARTEFACT = {"config.json", "model.safetensors", "README.md"}


def check_output(
    path: FilePath | os.PathLike[str], *, overwrite: bool = False, inputs: Iterable[Any] = ()
) -> None:
    """Refuse an output that may not be written."""
    if local_path(path) is None:
        _check_remote(str(path), overwrite=overwrite, inputs=inputs)
        return
    target = _local_target(path)
    if target.is_symlink():
        raise OutputExistsError(
            f"output '{path}' is a symbolic link; give the path of the file or folder itself"
        )
    _check_inputs(path, target, inputs)
    if not os.path.lexists(target):
        _check_parent(path, target)
    else:
        _check_existing(path, target, overwrite=overwrite)


def _check_existing(path: Any, target: FilePath, *, overwrite: bool) -> None:
    if not overwrite:
        raise OutputExistsError(
            f"output '{path}' exists; choose another path or pass --overwrite (overwrite=True)"
        )
    # An existing output is replaced only if all of it was written by semid.
    foreign = _foreign_content(target)
    if foreign is not None:
        holds = f"holds '{foreign}', which semid did not write"
        raise OutputExistsError(
            f"output '{path}' {holds if foreign else 'was not written by semid'}; --overwrite "
            "replaces only what semid wrote: choose another path, or move it away yourself"
        )


def _check_parent(path: Any, target: Path) -> None:
    """Refuse a new output whose nearest existing folder cannot take it."""
    # Missing parents are made later; the nearest one that exists decides whether that can work.
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"output '{path}' cannot be made: '{parent}' is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"output '{path}' cannot be made: no permission to write in '{parent}'")


def _check_inputs(path: Any, target: Path, inputs: Iterable[Any]) -> None:
    # Real paths, so that no link hides that output and input are one.
    real = Path(os.path.realpath(target))
    for name in inputs:
        for source in _input_paths(name):
            if source == real or (real.exists() and source.exists() and source.samefile(real)):
                raise UsageError(f"output '{path}' is the input '{name}'; choose another path")
            if real in source.parents:
                raise UsageError(
                    f"output '{path}' holds the input '{name}'; choose a path outside of it"
                )
            if source in real.parents and source.is_dir():
                raise UsageError(
                    f"output '{path}' lies inside the input '{name}'; choose a path outside of it"
                )


def _input_paths(name: Any) -> list[Path]:
    """Return the real paths on this machine that an input names."""
    if not isinstance(name, str | os.PathLike) or (path := local_path(name)) is None:
        return []
    text = str(path)
    if not os.path.lexists(text):
        if matches := glob.glob(text, recursive=True):  # noqa: PTH207 - keeps its text
            return [Path(os.path.realpath(match)) for match in matches]
        text = text.rpartition(":")[0]  # FILE:COLUMN
    # What is not there, such as the name of a recipe, cannot be lost.
    return [Path(os.path.realpath(text))] if text and os.path.lexists(text) else []


def _check_remote(uri: str, *, overwrite: bool, inputs: Iterable[Any]) -> None:
    split_path(uri)  # refuses a whole bucket
    plain = uri.rstrip("/")
    for name in filter(is_uri, inputs):
        source = str(name).rstrip("/")
        if f"{source}/".startswith(f"{plain}/") or plain.startswith(f"{source}/"):
            raise UsageError(
                f"output '{uri}' is, holds or lies inside the input '{name}'; choose another path"
            )
    if not Folder(plain).exists():
        return
    _check_existing(uri, plain, overwrite=overwrite)


def _foreign_content(target: FilePath) -> str | None:
    """Return the first name in ``target`` that semid did not write ('' is itself), or None."""
    if isinstance(target, Path) and not (target.is_dir() or target.is_file()):
        return ""  # a device, a pipe, a socket
    sizes = list_sizes(target)
    if sizes is None:
        return None if _is_own_file(target) else ""
    folder = Folder(target)
    listed = _read_marker(folder)
    is_artefact = _read_mapping(folder, "config.json").keys() >= {
        "format_version",
        "kind",
        "tensors",
    }
    unmarked = _UNMARKED_ARTEFACT if is_artefact else frozenset()
    for name, size in sorted(sizes.items()):
        if name == MARKER or name in unmarked:
            continue
        if name in listed or name.partition("/")[0] + "/" in listed:
            expected = listed.get(name)
            if expected is None or expected == size:
                continue
        elif not listed and name.endswith(".parquet") and _is_own_file(folder.file(name)):
            continue  # parts of ids that were written before there was a marker
        return name
    return None


def _read_marker(folder: Folder) -> dict[str, int | None]:
    """Return the files that a folder's marker lists, and their sizes."""
    try:
        files = _read_mapping(folder, MARKER).get("files", {})
        return {str(name): None if size is None else int(size) for name, size in files.items()}
    except (ValueError, AttributeError, TypeError):
        return {}


def _read_mapping(folder: Folder, name: str) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is none."""
    try:
        document = json.loads(folder.read(name) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _is_own_file(path: FilePath) -> bool:
    """Whether a file carries a mark of semid, or has one beside it that fits its content."""
    folder, name = split_path(path)
    _, first, last = folder.read_ends(name, 4096)
    if first.startswith(b"PAR1"):
        try:
            with open_parquet(path) as parquet:
                schema = parquet.schema_arrow
        except (OSError, ValueError):
            return False
        # Arrow keeps the metadata of a table to which a user adds columns: those are his.
        if b"semid" in (schema.metadata or {}) and set(schema.names) <= _IDS_COLUMNS:
            return True
    elif any(mark in first or mark in last for mark in _MARKS):
        return True
    digests = _read_mapping(folder, f".{name}{MARKER}").get("digests", [])
    return bool(digests) and _digest(folder, name) in digests


def _digest(folder: Folder, name: str) -> str:
    """Identify a file by its size, its first and its last megabyte."""
    digest = hashlib.sha256()
    for data in folder.read_ends(name, 1 << 20):
        digest.update(data)
    return digest.hexdigest()


@contextlib.contextmanager
def claim_output(
    path: FilePath | os.PathLike[str],
    *,
    overwrite: bool = False,
    inputs: Iterable[Any] = (),
    state: str | os.PathLike[str] | None = None,
) -> Iterator[None]:
    """Hold an output for the length of a run: checked first, and locked against other runs.

    A run of the same thread may claim it again. ``state``, the folder of the unfinished run, is
    checked as well. Errors are those of `check_output`.
    """
    input_list = list(inputs)
    with contextlib.ExitStack() as held:
        with explained(str(path), "written"):
            check_output(path, overwrite=overwrite, inputs=input_list)
            held.enter_context(hold_path(path))
            if state is not None:
                check_state_folder(state)
            # Another run may have ended between the first check and the lock.
            check_output(path, overwrite=overwrite, inputs=input_list)
        with _plain_write_errors(path):  # also for parts that are written beside the output
            yield


def _local_target(path: FilePath | os.PathLike[str]) -> Path:
    """Return the absolute path of an output that is written through this machine's disk."""
    location = local_path(path)
    # A `Path` made of a URI has lost a slash, and would be a folder called "s3:" here.
    if location is None or (isinstance(path, Path) and _SCHEME.match(str(path))):
        raise UsageError(
            f"output '{path}' is a URI, and this can be written to this machine's disk only; give "
            "a path here and copy it afterwards"
        )
    return Path(os.path.abspath(location))  # noqa: PTH100 - resolve() would follow links


def _temporary(target: Path) -> Path:
    return hidden_path(target, f"{secrets.token_hex(8)}.tmp")


def _exchange(new: Path, target: Path) -> bool:
    """Swap two paths in one step; False where the system cannot (Linux can, since 3.15)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0)


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished hidden folder under its name beside it and remove what semid wrote there."""
    if not os.path.lexists(target):
        new.rename(target)
    elif _exchange(new, target):
        remove_path(new)
    else:  # two steps; a run that comes after a kill between them puts the old one back
        old = hidden_path(target, f"{secrets.token_hex(8)}.old")
        target.rename(old)
        new.rename(target)
        remove_path(old)


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, grows: Iterable[str] = ()
) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error.

    ``grows`` names files, and folders with a slash at the end, that will be added later.
    """
    target = _local_target(path)
    with claim_output(path, overwrite=overwrite):
        work = _temporary(target)
        work.mkdir()
        try:
            with _plain_write_errors(path):
                yield work
                mark_folder(work, names=grows)
            replace_folder(work, target)
        finally:
            remove_path(work)


def mark_folder(folder: Path, *, names: Iterable[str] = ()) -> None:
    """Write the marker of a folder, and give its files the permissions that the umask says."""
    # Files that will be added later are listed by name, others with their sizes.
    sizes = list_sizes(folder) or {}
    sizes.pop(MARKER, None)
    files: dict[str, int | None] = dict.fromkeys(names) or {**sizes}
    marker = folder / MARKER
    marker.unlink(missing_ok=True)
    marker.touch()  # made by open(), so it has the mode that the umask gives
    marker.write_bytes(_marker(files))
    mode = stat.S_IMODE(marker.stat().st_mode)
    for name in files:
        with contextlib.suppress(FileNotFoundError):
            if not name.endswith("/"):
                (folder / name).chmod(mode)  # some libraries write files that only the owner reads


def _marker(files: Mapping[str, int | None]) -> bytes:
    return json.dumps({"format_version": 1, "files": files}, indent=1).encode()


def mark_remote_folder(folder: Folder) -> None:
    """Write the marker of a finished folder on an object store."""
    folder.write(MARKER, _marker(list_sizes(folder.path) or {}))


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike[str], *, overwrite: bool = False, mark: bool = True
) -> Iterator[Path]:
    """Yield a temporary file path that becomes ``path`` when the block ends without an error.

    ``mark=False`` is for a file inside a folder of semid's own, which is simply replaced.
    """
    target = _local_target(path)
    if target.is_dir():
        raise OutputExistsError(f"output '{path}' is a folder; give a file name")
    with claim_output(path, overwrite=overwrite) if mark else hold_path(target):
        work = _temporary(target)
        # Made here, exclusively, so that nothing that lies there is followed or written into.
        os.close(os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY | NOFOLLOW, 0o666))
        mode = stat.S_IMODE(work.stat().st_mode)
        marker = target.parent / f".{target.name}{MARKER}"
        try:
            with _plain_write_errors(path):
                yield work
            work.chmod(mode)  # some libraries replace the file by one that only the owner reads
            if not mark or _is_own_file(work):
                work.replace(target)
                marker.unlink(missing_ok=True)
            else:
                # Both digests are listed until the file is in its place: a kill before or after
                # the rename leaves a file that is recognized.
                folder = Folder(target.parent)
                digests = [_digest(folder, work.name)]
                if target.exists():
                    digests.append(_digest(folder, target.name))
                folder.write(marker.name, json.dumps({"digests": digests}).encode())
                work.replace(target)
        finally:
            work.unlink(missing_ok=True)


@contextlib.contextmanager
def _plain_write_errors(path: Any) -> Iterator[None]:
    """Turn a full disk, whichever library met it, into one sentence."""
    try:
        yield
    except SemidError:
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        text = str(error).lower()
        words = ("no space left", "disk quota exceeded", "file too large")
        if full or any(word in text for word in words):
            raise SemidError(
                f"'{path}' could not be written: no space left on the disk, or a limit on file "
                "sizes; free some space and repeat. What was there before is untouched"
            ) from error
        raise
