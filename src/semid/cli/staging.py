"""Paths of commands on other file systems: inputs are fetched first, outputs sent at the end.

Commands that read and write pieces of any size there (`fit`, `encode`, `unique` of a folder, every
source of embeddings and interactions) take URIs themselves. For all others a URI is a path on this
machine for as long as the command runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from semid.errors import UsageError

OUTPUTS = ("output", "report", "analyze", "novelty")
"""Parameters that are written; a path of any other name is read."""
_GROWS = "this output is added to run by run"
LOCAL = {
    ("encode", "catalogue"): "a catalogue grows in place, one version at a time",
    ("refresh", "catalogue"): "a catalogue grows in place, one version at a time",
    ("serve", "published"): "a catalogue grows in place, one version at a time",
    ("reproduce", "data"): "every run reads these files",
    ("reproduce", "source"): "the pages are made from results of this machine",
    ("reproduce", "output"): _GROWS,
    ("rank_grid", "output"): _GROWS,
}
"""Parameters of commands that stay on this machine, and why."""

_STACK = contextlib.ExitStack()
_NAMES: dict[str, str] = {}  # path on this machine -> URI
_PLACED: dict[Path, str] = {}  # outputs alone


def local(path: Any, name: str, command: str) -> Path | None:
    """Return the path on this machine that a parameter of a command stands for.

    Raises:
        UsageError: this one must be on this machine, or there is nothing to read.
    """
    if path is None or "://" not in path:
        return None if path is None else Path(path)
    from semid.filesystems import local_path

    if (here := local_path(path)) is not None:
        return here
    if (why := LOCAL.get((command, name))) is not None:
        refuse(path, why)
    return place(path) if name in OUTPUTS else fetch(path)


def refuse(uri: str, why: str = _GROWS) -> None:
    """Raise the error for what must be on this machine."""
    raise UsageError(f"'{uri}' is a URI, and {why}; give a path on this machine")


def fetch(uri: str) -> Path:
    """Return a copy of a file or a folder on this machine, for as long as the command runs.

    Raises:
        UsageError: there is nothing, or it cannot be read.
    """
    from semid.filesystems import Folder, explained, list_sizes, split_path

    plain = uri.rstrip("/")
    folder, name = split_path(plain)
    work = Path(_STACK.enter_context(tempfile.TemporaryDirectory(prefix="semid-"))) / name
    with explained(uri, "read"):
        sizes = list_sizes(plain)
        if sizes is None:  # a file
            folder.copy_to(name, work)
        for inner in sizes or {}:
            (work / inner).parent.mkdir(parents=True, exist_ok=True)
            Folder(plain).copy_to(inner, work / inner)
    if not work.exists():
        raise UsageError(f"'{uri}' does not exist; check the URI")
    _NAMES[str(work)] = uri
    return work


def place(uri: str) -> Path:
    """Return where an output for a URI is made on this machine.

    The folder is a hidden one of the current folder, the same for every run towards the URI, so
    that a run that was stopped continues.
    """
    from semid.filesystems import split_path
    from semid.runs import remove_path

    _, name = split_path(uri.rstrip("/"))
    folder = Path(f".semid-{hashlib.sha256(uri.rstrip('/').encode()).hexdigest()[:16]}").absolute()
    folder.mkdir(exist_ok=True)
    _STACK.callback(_remove_if_empty, folder)
    target = folder / name
    if target.exists():  # of a run that was stopped before it was sent
        remove_path(target)
    _NAMES[str(target)] = _PLACED[target] = uri
    return target


def placed(path: Any) -> str | None:
    """Return the URI that an output is made for, or None."""
    return _PLACED.get(Path(path))


def named(value: Any) -> Any:
    """Return a text with the URIs in the place of their paths on this machine."""
    text = str(value)
    for path in sorted(_NAMES, key=len, reverse=True):
        text = text.replace(path, _NAMES[path])
    return text


def send() -> None:
    """Send every output of the command that has ended to its URI; what is there is replaced."""
    from semid.filesystems import Folder, explained, list_sizes, split_path
    from semid.output import MARKER

    for path, uri in _PLACED.items():
        if not path.exists():
            continue
        folder, name = split_path(uri.rstrip("/"))
        with explained(uri, "written"):
            # A file takes the place of the one before when it is whole; a folder cannot.
            if path.is_dir() or list_sizes(uri.rstrip("/")):
                Folder(uri.rstrip("/")).remove()
            if path.is_file():
                folder.copy_from(path, name)
                mark = path.with_name(f".{name}{MARKER}")  # says that the file is semid's
                if mark.exists():
                    folder.copy_from(mark, mark.name)
            else:
                # Readers look for the marker, the config or a manifest first: they come last.
                files = [file for file in path.rglob("*") if file.is_file()]
                last = re.compile(r"config\.json|manifest(-\d+)?\.json").fullmatch
                for file in sorted(
                    files, key=lambda f: (last(f.name) is not None, f.name[0] == ".", f)
                ):
                    Folder(uri.rstrip("/")).copy_from(file, file.relative_to(path).as_posix())
        shutil.rmtree(path.parent)


def release() -> None:
    """Remove what was fetched, and forget all paths; called when the command has ended."""
    _STACK.close()
    _NAMES.clear()
    _PLACED.clear()


def _remove_if_empty(folder: Path) -> None:
    for lock in folder.glob(".*.lock") if folder.is_dir() else ():
        lock.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
