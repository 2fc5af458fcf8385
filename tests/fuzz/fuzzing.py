"""One fuzz case: an input, a call on it, and a verdict on what the call did.

A generator is a function ``generator(random, bench, work) -> Case``. ``random`` is the only source
of chance, so a case is reproduced by its generator's name and its number alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from semid.errors import SemidError

ACCEPTED, CLEAR = "accepted", "clear error"
RAW, WRONG, HANG, BROKEN = "raw traceback", "silent wrong", "hang", "broken generator"
OUTCOMES = (CLEAR, ACCEPTED, RAW, WRONG, HANG, BROKEN)
FAILURES = (RAW, WRONG, HANG, BROKEN)

SECONDS = 20  # of CPU time: other work on the machine makes no hang
MEMORY = 3 << 29  # 1.5 GiB above what the process holds already
MAX_LINES = 20  # of an error message

PACKAGE = f"{os.sep}semid{os.sep}"


@dataclass
class Case:
    """What a generator makes.

    Attributes:
        text: one line that describes the input.
        call: runs semid; returns a result or raises.
        check: looks at the result independently and raises `WrongResultError`.
        outputs: paths that a successful call may create, change or remove.
    """

    text: str
    call: Callable[[], Any]
    check: Callable[[Any], None] = lambda _: None
    outputs: Sequence[Path] = ()


@dataclass(frozen=True)
class Outcome:
    """The verdict on one case.

    Attributes:
        name: generator and number, as ``npy:17``.
        verdict: one of `OUTCOMES`.
        kind: what makes two failures the same failure.
        text: the case's description.
        detail: the message or the traceback.
    """

    name: str
    verdict: str
    kind: str
    text: str
    detail: str


Generator = Callable[[Random, Any, Path], Case]


class WrongResultError(Exception):
    """A call was accepted and its result is not right."""


class ClearError(Exception):
    """The command line refused with a message and an exit code of 1 or 2."""


class UnclearError(Exception):
    """The command line failed in another way than by a message."""


class Hang(BaseException):
    """The time is over; no ``except Exception`` stops it."""


def expect(good: Any, kind: str, detail: object = "") -> None:
    """Raise `WrongResultError` unless ``good``."""
    if not good:
        raise WrongResultError(kind, str(detail))


def cli(*arguments: object) -> Callable[[], str]:
    """Return a call of ``semid ARGUMENTS`` in this process that returns its standard output."""

    def call() -> str:
        from semid.cli import main

        out, err = io.StringIO(), io.StringIO()
        code: Any = None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), plain_logging():
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as stop:
                code = stop.code or 0
        return judge_exit(code, out.getvalue(), err.getvalue())

    return call


def judge_exit(code: Any, out: str, err: str) -> str:
    """Return ``out`` for exit code 0; raise `ClearError` or `UnclearError` for another."""
    if "Traceback (most recent call last)" in err:
        raise UnclearError("a traceback on standard error", err)
    if code == 0 or code is None:
        return out
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "Error: "))]
    first = lines[0] if lines else ""
    if any(line.startswith("internal error:") for line in err.splitlines()):
        raise UnclearError(f"internal error: {first[:60]}", err)
    if "MemoryError" in first or "allocate" in first:
        raise UnclearError("out of memory", err)
    if code not in (1, 2):
        raise UnclearError(f"exit code {code}", err)
    if not lines:
        raise UnclearError(f"exit code {code} without an error line", out + err)
    if len(lines) > MAX_LINES:
        raise UnclearError(f"more than {MAX_LINES} error lines", err)
    raise ClearError(err)


@contextlib.contextmanager
def plain_logging() -> Iterator[None]:
    """Put back the handlers and level that the command line sets."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hang` after ``seconds`` of CPU time, and MemoryError for absurd sizes."""

    def over(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"longer than {seconds:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY, hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def run_case(
    generators: dict[str, Generator], name: str, bench: Any, scratch: Path, *, seconds: float
) -> Outcome:
    """Make and judge the case ``GENERATOR:NUMBER``.

    Args:
        generators: by name.
        name: of the case.
        bench: the prepared files and models, see `bench.Bench`.
        scratch: folder that this process may empty.
        seconds: limit of one case.
    """
    generator = generators[name.partition(":")[0]]
    # The working folder has a parent of its own, which "-o .." may reach.
    work = scratch / "case" / "work"
    shutil.rmtree(work.parent, ignore_errors=True)
    work.mkdir(parents=True)
    for mine in (work.parent / "beside.txt", work / "notes.txt"):
        mine.write_text("the user's own\n", encoding="utf8")
    home = Path.cwd()
    os.chdir(work)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                case = generator(Random(name), bench, work)
            except Exception:  # noqa: BLE001
                return Outcome(name, BROKEN, _kind(sys.exc_info()[1]), "", traceback.format_exc())
            before = snapshot(work.parent)
            verdict, kind, detail = _judge(case, seconds)
            if verdict in (ACCEPTED, CLEAR):
                changed = _damage(case, before, work, accepted=verdict == ACCEPTED)
                if changed:
                    verdict, (kind, detail) = WRONG, changed
            text = case.text.replace(str(bench.path), "BENCH").replace(f"{work}{os.sep}", "")
            return Outcome(name, verdict, kind, text, detail)
    finally:
        os.chdir(home)


def _judge(case: Case, seconds: float) -> tuple[str, str, str]:
    """Return verdict, kind and detail."""
    try:
        with limited(seconds):
            try:
                result = case.call()
            except (ClearError, SemidError) as error:
                return CLEAR, type(error).__name__, str(error)
            except UnclearError as error:
                return RAW, error.args[0], error.args[1]
            try:
                case.check(result)
            except WrongResultError as error:
                return WRONG, error.args[0], error.args[1]
            except Exception as error:  # noqa: BLE001
                return WRONG, f"the check fails: {_kind(error)}", traceback.format_exc()
            return ACCEPTED, "", ""
    except Hang as error:
        return HANG, _kind(error), traceback.format_exc()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not _frames(error):
            raise
        return RAW, _kind(error), traceback.format_exc()


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    summary = traceback.extract_tb(error.__traceback__)
    return [frame for frame in summary if PACKAGE in frame.filename]


def _kind(error: BaseException | None) -> str:
    """Name the type of an error and the deepest frame of semid."""
    assert error is not None
    frames = _frames(error)
    if not frames:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(last.filename).name}:{last.name}"
    file = frames[-1].filename.rpartition(PACKAGE)[2]
    return f"{type(error).__name__} in {file}:{frames[-1].name}"


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """Return the bytes of every file below ``folder``, and None for every folder."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_dir()
    }


def _damage(
    case: Case, before: dict[Path, bytes | None], work: Path, *, accepted: bool
) -> tuple[str, str] | None:
    """Say what happened to files that were there, or which temporary files stay behind."""
    after = snapshot(work.parent)
    for path, content in before.items():
        allowed = accepted and any(path == out or out in path.parents for out in case.outputs)
        if not allowed and (path not in after or after[path] != content):
            what = "was changed" if path in after else "is gone"
            when = "an accepted call" if accepted else "a refused call"
            return f"a file of the user {what} after {when}", str(path)
    for path in after.keys() - before.keys():
        if path.name.startswith(".") and path.name.endswith((".tmp", ".old")):
            return "a temporary file stays behind", str(path)
    return None
