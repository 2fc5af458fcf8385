"""torch and numba, imported when they are first used and not with the modules that name them.

Importing torch takes a second of a core and numba half of one: most of the time of a command that
refuses, looks up, decodes, or encodes a small catalogue. Modules that may run without them write::

    from semid.lazy import kernel, torch

and use both as they are: an attribute of ``torch`` imports it, and the first call of a `kernel`
compiles the function or fetches it from numba's cache. Modules of networks import torch as usual.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

logger = logging.getLogger(__name__)


def _is_writable(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _ensure_kernel_cache() -> None:
    """Let numba keep kernels in a temporary folder where no other can be written to.

    Without any, it refuses to compile what is to be kept.
    """
    named = os.environ.get("NUMBA_CACHE_DIR")
    package = Path(__file__).parent / "quantization" / "engine" / "__pycache__"
    home = os.path.expanduser("~")  # noqa: PTH111 (having none is no error)
    user = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache")
    if any(_is_writable(each.absolute()) for each in (Path(named or package), package, user)):
        return
    folder = os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="semid-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if is_imported("numba"):
        sys.modules["numba"].config.CACHE_DIR = folder
    logger.warning(
        "compiled kernels are lost when this process ends: neither semid's folder nor the user's "
        "cache can be written to; set NUMBA_CACHE_DIR to a folder that can"
    )


class LazyModule:
    """A module that is imported when one of its attributes is first used."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    @cached_property
    def _module(self) -> Any:
        # A look at `sys.modules` would find what another thread has only begun to import.
        return importlib.import_module(self.__name__)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)


def is_imported(name: str) -> bool:
    """Whether a module has been imported, so that using it costs nothing more."""
    return name in sys.modules


_ensure_kernel_cache()


class Kernel:
    """A function that numba compiles when it is first called; other kernels can call it."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        update_wrapper(self, function)
        self._function, self._options = function, options

    @cached_property
    def compiled(self) -> Any:
        """The function as numba's dispatcher."""
        import numba
        from numba.extending import typeof_impl

        # Inside other kernels this object stands for its dispatcher.
        typeof_impl.register(Kernel, lambda each, context: typeof_impl(each.compiled, context))
        return numba.njit(**self._options)(self._function)

    def __call__(self, *arguments: Any) -> Any:
        """Call the compiled function."""
        return self.compiled(*arguments)


@contextmanager
def compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` after every kernel that has to be compiled, not those that these call."""
    from numba.core import event

    depth = 0

    class Listener(event.Listener):  # type: ignore[misc]
        def on_start(self, each: Any) -> None:
            nonlocal depth
            depth += 1

        def on_end(self, each: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                tell()

    with event.install_listener("numba:compile", Listener()):
        yield


@contextmanager
def plain_torch() -> Iterator[None]:
    """Leave aside what the caller told torch of gradients, autocast, types and devices.

    Else nothing trains under ``torch.no_grad()``, codes differ under autocast, and tensors of two
    types meet where float64 is the default. Where torch is not imported, it was told nothing.
    """
    if not is_imported("torch"):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            # Copies of weights in bfloat16 last as long as the outermost autocast: inside one that
            # was there before, training would go on with those of its first step.
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (usual := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, usual)
            torch.set_default_dtype(torch.float32)
        yield


Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(**options: Any) -> Callable[[Function], Function]:
    """Return a decorator like ``numba.njit(nogil=True, cache=True, **options)``, see `Kernel`."""
    options = {"nogil": True, "cache": True, **options}
    return lambda function: Kernel(function, options)  # type: ignore[return-value]


if TYPE_CHECKING:
    import torch as torch
else:
    torch = LazyModule("torch")


def is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor of torch."""
    return is_imported("torch") and isinstance(value, torch.Tensor)
