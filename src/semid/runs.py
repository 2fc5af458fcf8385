"""Runs: one at a time writes to an output, and an unfinished one keeps its state beside it.

On a disk the lock is a file beside the output, held with ``flock``: the system releases it when the
process ends, however it ends. An object store has no locks; there a run writes a claim beside the
output and renews it while it lives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from semid.errors import OutputBusyError, OutputExistsError
from semid.filesystems import FilePath, Folder, list_sizes, local_path, split_path

try:
    import fcntl
except ImportError:  # Windows has no fcntl: there, nothing stops a second run
    fcntl = None  # type: ignore[assignment]


NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # flag of `os.open` that refuses a symbolic link

# A claim on a remote output is renewed every 15 s and lapses after two minutes of silence.
_CLAIM_RENEWAL = 15.0
_CLAIM_LIFETIME = 120.0

KEY_FILE = "run.json"  # says which run the state is of
# Names that the state of a run consists of, in `NAME.partial/`; nothing else is removed from there.
# A ranker that is compared with one without codes keeps the state of that one in `baseline/`.
_STATE_NAME = re.compile(
    r"run\.json|part-[\d-]+\.parquet(\.json)?|(baseline/)?(state\.safetensors|\.[^/]*\.(tmp|lock))"
)

_held: dict[str, tuple[int, int]] = {}  # path of an output -> thread that holds it, depth
_held_guard = threading.Lock()


@contextlib.contextmanager
def hold_path(path: FilePath | os.PathLike[str]) -> Iterator[None]:
    """Hold a path or URI against other runs; a run of the same thread may hold it again."""
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
            with _file_lock(Path(key)):  # makes the parent, removes what killed runs left there
                yield
    finally:
        with _held_guard:
            owner, depth = _held.pop(key)
            if depth > 1:
                _held[key] = (owner, depth - 1)


def _claim() -> bytes:
    run = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return json.dumps(run).encode()


def _busy(path: Any, owner: dict[str, Any], advice: str = "") -> OutputBusyError:
    who = ""
    if owner:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_number(owner.get("time"))))
        who = f" (process {owner.get('pid')} on {owner.get('host')}, {since})"
    return OutputBusyError(
        f"another run{who} is writing '{path}'; wait until it has ended or choose another output"
        f"{advice}"
    )


@contextlib.contextmanager
def _file_lock(target: Path) -> Iterator[None]:
    """Hold the lock file of a local output; the system releases it when the process ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = hidden_path(target, "lock")
    descriptor = _open_locked(target, file)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _claim(), 0)
        _restore_and_clean(target)
        yield
    finally:
        # The name goes before the lock: whoever opens it later makes a file of his own.
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(target: Path, file: Path) -> int:
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | NOFOLLOW, 0o666)
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


def _parse(data: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(document := json.loads(data), dict):
            return document
    return {}


@contextlib.contextmanager
def _remote_claim(uri: str) -> Iterator[None]:
    """Hold a remote output by a small file beside it that is renewed while the run lives."""
    # Object stores have no locks. Each run first writes a claim and then lists all claims; one that
    # sees another live claim ends. A store that lists what was written before (S3, GCS and Azure
    # do) shows it to at least one of two runs. Clocks that differ cannot let both in: only the age
    # of a claim is compared, with two minutes to spare.
    folder, last = split_path(uri)
    prefix = f".{last}.claim-"
    name = prefix + secrets.token_hex(8)
    folder.write(name, _claim())
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(_CLAIM_RENEWAL):
            with contextlib.suppress(OSError):
                folder.write(name, _claim())

    keeper = threading.Thread(target=renew, daemon=True)
    try:
        for other in folder.names(hidden=True):
            if not other.startswith(prefix) or other == name:
                continue
            owner = _parse(folder.read(other) or b"")
            if time.time() - _number(owner.get("time")) > _CLAIM_LIFETIME:
                folder.remove_file(other)
            else:
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


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def hidden_path(target: Path, kind: str) -> Path:
    """Return a hidden name beside ``target``; at most 255 bytes, as file systems demand."""
    return target.parent / f".{target.name[:100]}.{kind}"


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
            remove_path(entry)


def remove_path(path: Path) -> None:
    """Remove a file, a link or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def partial_path(path: FilePath | os.PathLike[str]) -> str:
    """Return where an unfinished run towards ``path``, a URI too, keeps its parts: beside it."""
    return f"{os.fspath(path).rstrip('/')}.partial"


def check_state_folder(path: FilePath | os.PathLike[str]) -> None:
    """Refuse (OutputExistsError) a link, a file, or a folder that holds more than a run's state."""
    local = local_path(path)
    if local is not None and (local.is_symlink() or (local.exists() and not local.is_dir())):
        raise OutputExistsError(
            f"'{path}' is where the unfinished run is kept, and it is not a folder; move it away"
        )
    for name in sorted(list_sizes(local or str(path)) or {}):
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
    folder = Folder(local or str(path))
    for name in list_sizes(folder.path) or {}:
        if _STATE_NAME.fullmatch(name):
            folder.remove_file(name)
    if not list_sizes(folder.path):
        folder.remove()
