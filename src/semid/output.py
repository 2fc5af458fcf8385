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
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from semid.errors import OutputBusyError, OutputExistsError, SemidError, UsageError
from semid.filesystems import FilePath, Folder, is_uri, list_sizes, local_path, open_parquet

try:
    import fcntl
except ImportError:  # Windows has no fcntl: there, nothing stops a second run
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "MARKDOWN_MARK",
    "MARKER",
    "atomic_file",
    "atomic_folder",
    "check_output",
    "check_state_folder",
    "claim_output",
    "hold_state",
    "mark_folder",
    "mark_remote_folder",
    "remove_state_folder",
    "replace_folder",
]

MARKER = ".semid"
MARKDOWN_MARK = "<!-- written by semid -->"
_MARKS = (MARKDOWN_MARK.encode(), b'<meta name="generator" content="semid ')

# Names that the state of a run consists of, in `NAME.partial/`; nothing else is removed from there.
_STATE_NAME = re.compile(
    r"run\.json|state\.safetensors|part-[\d-]+\.parquet(\.json)?|\.[^/]*\.(tmp|lock)"
)
# Folders that semid 0.1 wrote before there was a marker.
_UNMARKED_ARTEFACT = {"config.json", "model.safetensors", "README.md"}

# A claim on a remote output is renewed every 15 s and lapses after two minutes of silence.
_CLAIM_RENEWAL = 15.0
_CLAIM_LIFETIME = 120.0


# --- what may be written -----------------------------------------------------------------------


def check_output(
    path: FilePath | os.PathLike[str], *, overwrite: bool = False, inputs: Iterable[Any] = ()
) -> None:
    """Refuse an output that may not be written.

    Args:
        path: a path on this machine or a URI.
        overwrite: allow replacing a former output of semid.
        inputs: what the run reads: paths, URIs, quoted globs, ``FILE:COLUMN``. None and values
            that are no paths are ignored.

    Raises:
        OutputExistsError: if it exists and ``overwrite`` is false; or if it exists and semid did
            not write it; or if it is a symbolic link.
        UsageError: if it is an input, holds one or lies inside one, or if nothing can be written
            there.
    """
    location = local_path(path)
    if location is None:
        _check_remote(str(path), overwrite=overwrite, inputs=inputs)
        return
    target = Path(os.path.abspath(location))  # noqa: PTH100 - resolve() would follow links
    if target.is_symlink():
        raise OutputExistsError(
            f"output '{path}' is a symbolic link; give the path of the file or folder itself"
        )
    _check_inputs(path, target, inputs)
    if not os.path.lexists(target):
        _check_parent(path, target)
    elif not overwrite:
        raise _exists(path)
    else:
        foreign = _foreign_content(target)
        if foreign is not None:
            raise _not_ours(path, foreign)


def _exists(path: Any) -> OutputExistsError:
    return OutputExistsError(
        f"output '{path}' exists; choose another path or pass --overwrite (overwrite=True)"
    )


def _not_ours(path: Any, foreign: str) -> OutputExistsError:
    what = (
        f"holds '{foreign}', which semid did not write" if foreign else "was not written by semid"
    )
    return OutputExistsError(
        f"output '{path}' {what}; --overwrite replaces only what semid wrote and nobody changed: "
        "choose another path, or move it away yourself"
    )


def _check_parent(path: Any, target: Path) -> None:
    """Refuse a new output whose nearest existing folder cannot take it."""
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"output '{path}' cannot be made: '{parent}' is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"output '{path}' cannot be made: no permission to write in '{parent}'")


def _check_inputs(path: Any, target: Path, inputs: Iterable[Any]) -> None:
    real = Path(os.path.realpath(target))
    for given in inputs:
        for source in _input_paths(given):
            if source == real or (real.exists() and source.exists() and source.samefile(real)):
                raise UsageError(f"output '{path}' is the input '{given}'; choose another path")
            if real in source.parents:
                raise UsageError(
                    f"output '{path}' holds the input '{given}'; choose a path outside of it"
                )
            if source in real.parents and source.is_dir():
                raise UsageError(
                    f"output '{path}' lies inside the input '{given}'; choose a path outside of it"
                )


def _input_paths(given: Any) -> list[Path]:
    """Return the real paths on this machine that an input names."""
    if not isinstance(given, str | os.PathLike) or (path := local_path(given)) is None:
        return []
    text = str(path)
    if not os.path.lexists(text):
        if matches := glob.glob(text, recursive=True):  # noqa: PTH207 - keeps its text
            return [Path(os.path.realpath(match)) for match in matches]
        text = text.rpartition(":")[0] or text  # FILE:COLUMN
    return [Path(os.path.realpath(text))]


def _check_remote(uri: str, *, overwrite: bool, inputs: Iterable[Any]) -> None:
    plain = uri.rstrip("/")
    for given in inputs:
        source = str(given).rstrip("/") if is_uri(given) else None
        if source is None:
            continue
        if plain == source or source.startswith(f"{plain}/") or plain.startswith(f"{source}/"):
            raise UsageError(
                f"output '{uri}' is, holds or lies inside the input '{given}'; choose another path"
            )
    if not Folder(plain).exists():
        return
    if not overwrite:
        raise _exists(uri)
    foreign = _foreign_content(plain)
    if foreign is not None:
        raise _not_ours(uri, foreign)


def _foreign_content(target: FilePath) -> str | None:
    """Return None if semid wrote all of ``target``, else the first name it did not write.

    An empty name stands for the target itself.
    """
    if isinstance(target, Path) and not (target.is_dir() or target.is_file()):
        return ""  # a device, a pipe, a socket
    sizes = list_sizes(target)
    if sizes is None:
        return None if _is_own_file(target) else ""
    folder = Folder(target)
    listed = _read_marker(folder)
    unmarked = _UNMARKED_ARTEFACT if _is_unmarked_artefact(folder) else frozenset()
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
    data = folder.read(MARKER)
    try:
        files = json.loads(data or b"{}").get("files", {})
        return {str(name): None if size is None else int(size) for name, size in files.items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        return {}


def _is_unmarked_artefact(folder: Folder) -> bool:
    try:
        config = json.loads(folder.read("config.json") or b"{}")
        return isinstance(config, dict) and {"format_version", "kind", "tensors"} <= config.keys()
    except (ValueError, RecursionError):
        return False


def _is_own_file(path: FilePath) -> bool:
    """Whether a file carries a mark of semid, or has one beside it that fits its content."""
    folder, name = _split(path)
    _, first, last = folder.read_ends(name, 4096)
    if first.startswith(b"PAR1"):
        try:
            with open_parquet(path) as parquet:
                metadata = parquet.schema_arrow.metadata or {}
        except (OSError, ValueError):
            return False
        if any(key.split(b".")[0] == b"semid" for key in metadata):
            return True
    elif any(mark in first or mark in last for mark in _MARKS):
        return True
    try:
        digests = json.loads(folder.read(f".{name}{MARKER}") or b"{}").get("digests", [])
    except (ValueError, AttributeError, RecursionError):
        return False
    return bool(digests) and _digest(folder, name) in digests


def _split(path: FilePath) -> tuple[Folder, str]:
    if is_uri(path):
        parent, _, name = str(path).rstrip("/").rpartition("/")
        return Folder(parent), name
    return Folder(Path(path).parent), Path(path).name


def _digest(folder: Folder, name: str) -> str:
    """Identify a file by its size, its first and its last megabyte."""
    digest = hashlib.sha256()
    for data in folder.read_ends(name, 1 << 20):
        digest.update(data)
    return digest.hexdigest()


# --- one run at a time -------------------------------------------------------------------------

_held: dict[str, tuple[int, int]] = {}  # path of an output -> thread that holds it, depth
_held_guard = threading.Lock()


@contextlib.contextmanager
def claim_output(
    path: FilePath | os.PathLike[str],
    *,
    overwrite: bool = False,
    inputs: Iterable[Any] = (),
    state: str | os.PathLike[str] | None = None,
) -> Iterator[None]:
    """Hold an output for the length of a run: checked first, and locked against other runs.

    A run of the same thread may claim it again, as every writer in this module does.

    Args:
        path: a path on this machine or a URI.
        overwrite: allow replacing a former output of semid.
        inputs: what the run reads, as for `check_output`.
        state: folder for the unfinished run, if it keeps one on this machine; checked as well.

    Raises:
        OutputExistsError, UsageError: as for `check_output`.
        OutputBusyError: if another run holds it.
    """
    given = list(inputs)
    check_output(path, overwrite=overwrite, inputs=given)
    with _lock(path):
        if state is not None:
            check_state_folder(state)
        # Another run may have ended between the first check and the lock.
        check_output(path, overwrite=overwrite, inputs=given)
        yield


@contextlib.contextmanager
def _lock(path: FilePath | os.PathLike[str]) -> Iterator[None]:
    location = local_path(path)
    key = str(path) if location is None else os.path.abspath(location)  # noqa: PTH100
    thread = threading.get_ident()
    with _held_guard:
        owner, depth = _held.get(key, (thread, 0))
        if owner != thread:
            raise OutputBusyError(f"another thread of this process is writing '{path}'")
        _held[key] = (thread, depth + 1)
    try:
        if depth:
            yield
        elif location is None:
            with _remote_claim(str(path).rstrip("/")):
                yield
        else:
            with _file_lock(Path(key)):
                yield
    finally:
        with _held_guard:
            owner, depth = _held.pop(key)
            if depth > 1:
                _held[key] = (owner, depth - 1)


def _describe_run() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}


def _busy(path: Any, owner: dict[str, Any], advice: str = "") -> OutputBusyError:
    who = ""
    if owner:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.get("time", 0)))
        who = f" (process {owner.get('pid')} on {owner.get('host')}, {since})"
    return OutputBusyError(
        f"another run{who} is writing '{path}'; wait until it has ended or choose another output"
        f"{advice}"
    )


@contextlib.contextmanager
def _file_lock(target: Path) -> Iterator[None]:
    """Hold the lock file of a local output; the system releases it when the process ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = _hidden(target, "lock")
    descriptor = _open_locked(target, file)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_describe_run()).encode(), 0)
        _restore_and_clean(target)
        yield
    finally:
        # The name goes before the lock: whoever opens it later makes a file of his own.
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(target: Path, file: Path) -> int:
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OutputExistsError(
                    f"'{file}', the lock of '{target}', is a symbolic link; remove it"
                ) from None
            raise
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _parse(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise _busy(target, owner) from None
        except OSError as error:  # a file system without locks: nothing stops a second run there
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                os.close(descriptor)
                raise
        # The former owner may have removed the name between open and lock: then try again.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == file.stat().st_ino:
                return descriptor
        os.close(descriptor)


_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


def _parse(data: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        document = json.loads(data)
        if isinstance(document, dict):
            return document
    return {}


@contextlib.contextmanager
def _remote_claim(uri: str) -> Iterator[None]:
    """Hold a remote output by a small file beside it that is renewed while the run lives.

    Object stores have no locks. Each run first writes a claim and then lists all claims; the
    oldest live one wins. A store that lists what was written before (S3, GCS and Azure do) shows
    two runs to each other whichever came first.
    """
    parent, _, last = uri.rpartition("/")
    folder = Folder(parent)
    prefix = f".{last}.claim-"
    name = prefix + secrets.token_hex(8)
    document = {**_describe_run(), "begun": time.time()}
    folder.write(name, json.dumps(document).encode())
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(_CLAIM_RENEWAL):
            with contextlib.suppress(OSError):
                folder.write(name, json.dumps({**document, "time": time.time()}).encode())

    keeper = threading.Thread(target=renew, daemon=True)
    try:
        for other in folder.names(hidden=True):
            if not other.startswith(prefix) or other == name:
                continue
            owner = _parse(folder.read(other) or b"")
            if not _is_alive(owner):
                folder.remove_file(other)
            elif (owner.get("begun", 0.0), other) < (document["begun"], name):
                raise _busy(
                    uri, owner, f"; a killed run counts as ended {_CLAIM_LIFETIME:.0f} s later"
                )
        keeper.start()
        yield
    finally:
        stop.set()
        if keeper.ident is not None:
            keeper.join()
        folder.remove_file(name)


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the run behind a claim may still be there."""
    if time.time() - float(owner.get("time", 0.0)) > _CLAIM_LIFETIME:
        return False
    if owner.get("host") == socket.gethostname() and owner.get("pid") != os.getpid():
        try:
            os.kill(int(owner["pid"]), 0)
        except ProcessLookupError:
            return False
        except (OSError, ValueError, KeyError):
            return True
    return True


# --- how it appears ----------------------------------------------------------------------------


def _hidden(target: Path, kind: str) -> Path:
    """Return a hidden name beside ``target``; at most 255 bytes, as file systems demand."""
    return target.parent / f".{target.name[:100]}.{kind}"


def _temporary(target: Path) -> Path:
    return _hidden(target, f"{secrets.token_hex(8)}.tmp")


def _restore_and_clean(target: Path) -> None:
    """Remove what killed runs left beside ``target``; put a former output back if it is missing."""
    pattern = re.compile(rf"\.{re.escape(target.name[:100])}\.[0-9a-f]{{16}}\.(tmp|old)")
    for entry in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None:
            continue
        if match[1] == "old" and not os.path.lexists(target):
            entry.rename(target)
        else:
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(new: Path, target: Path) -> bool:
    """Swap two paths in one step; False where the system cannot (Linux can, since 3.15)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0)


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder under its name and remove what was there.

    Args:
        new: a hidden folder beside ``target``.
        target: its name; something that semid wrote may be there.
    """
    if not os.path.lexists(target):
        new.rename(target)
    elif _exchange(new, target):
        _remove(new)
    else:  # two steps; a run that comes after a kill between them puts the old one back
        old = _hidden(target, f"{secrets.token_hex(8)}.old")
        target.rename(old)
        new.rename(target)
        _remove(old)


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, grows: Iterable[str] = ()
) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error.

    Args:
        path: destination folder; its parents are made.
        overwrite: replace a former output of semid (it stays readable until the last moment).
        grows: files, and folders with a slash at the end, that will be added to the folder later
            and belong to it; without any, it consists of what the block writes.

    Raises:
        OutputExistsError: as for `check_output`.
        OutputBusyError: another run is writing ``path``.
    """
    with claim_output(path, overwrite=overwrite):
        target = Path(os.path.abspath(path))  # noqa: PTH100
        work = _temporary(target)
        work.mkdir()
        try:
            with _plain_write_errors(path):
                yield work
                mark_folder(work, names=grows)
            replace_folder(work, target)
        finally:
            _remove(work)


def mark_folder(folder: Path, *, names: Iterable[str] = ()) -> None:
    """Write the marker of a folder, and give its files the permissions that the umask says.

    Args:
        folder: holds nothing but what semid wrote.
        names: files, or folders with a slash at the end, that belong to the output and grow; all
            of the present files by default, with their sizes.
    """
    files: dict[str, int | None] = dict.fromkeys(names) or {
        name: size for name, size in (list_sizes(folder) or {}).items() if name != MARKER
    }
    marker = folder / MARKER
    marker.unlink(missing_ok=True)
    marker.touch()  # made by open(), so it has the mode that the umask gives
    marker.write_text(json.dumps({"format_version": 1, "files": files}, indent=1), encoding="utf8")
    mode = stat.S_IMODE(marker.stat().st_mode)
    for name in files:
        with contextlib.suppress(FileNotFoundError):
            if not name.endswith("/"):
                (folder / name).chmod(mode)  # some libraries write files that only the owner reads


def mark_remote_folder(folder: Folder) -> None:
    """Write the marker of a finished folder on an object store."""
    files = list_sizes(folder.path) or {}
    folder.write(MARKER, json.dumps({"format_version": 1, "files": files}, indent=1).encode())


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike[str], *, overwrite: bool = False, mark: bool = True
) -> Iterator[Path]:
    """Yield a temporary file path that becomes ``path`` when the block ends without an error.

    Args:
        path: destination file; its parents are made.
        overwrite: replace a former output of semid.
        mark: False for a file inside a folder of semid's own, which needs no mark and is replaced
            without a question.

    Raises:
        OutputExistsError: as for `check_output`.
        OutputBusyError: another run is writing ``path``.
    """
    target = Path(os.path.abspath(path))  # noqa: PTH100
    if target.is_dir():
        raise OutputExistsError(f"output '{path}' is a folder; give a file name")
    with claim_output(path, overwrite=overwrite) if mark else _lock(target):
        work = _temporary(target)
        # Made here, exclusively, so that nothing that lies there is followed or written into.
        os.close(os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NOFOLLOW, 0o666))
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


# --- the state of a run ------------------------------------------------------------------------


def check_state_folder(path: FilePath | os.PathLike[str]) -> None:
    """Refuse a folder for the state of a run that holds anything else.

    Raises:
        OutputExistsError: it is a link or a file, or holds files that are no state of a run.
    """
    local = local_path(path)
    if local is not None and (local.is_symlink() or (local.exists() and not local.is_dir())):
        raise OutputExistsError(
            f"'{path}' is where the unfinished run is kept, and it is not a folder; move it away"
        )
    for name in sorted(list_sizes(str(path) if local is None else local) or {}):
        if _STATE_NAME.fullmatch(name) is None:
            raise OutputExistsError(
                f"'{path}' is where the unfinished run is kept, and it holds '{name}', which "
                "semid did not write; move it away or choose another output"
            )


def remove_state_folder(path: FilePath | os.PathLike[str]) -> None:
    """Remove the state of a run that has ended; files that are no state stay."""
    local = local_path(path)
    if local is not None and local.is_symlink():
        return
    folder = Folder(str(path) if local is None else local)
    for name in list_sizes(folder.path) or {}:
        if _STATE_NAME.fullmatch(name):
            folder.remove_file(name)
    if not list_sizes(folder.path):
        folder.remove()


@contextlib.contextmanager
def hold_state(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder of a run's state, so that no other run continues it meanwhile.

    Raises:
        OutputBusyError: another run holds it.
    """
    with _lock(path):
        yield
