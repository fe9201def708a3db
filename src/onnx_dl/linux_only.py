"""The parts of the standard library that only Linux, or only Unix, has.

The package imports, and models run in-process, on platforms without them.  So our modules take from here what
may be missing, which ``tests/unit/test_layers.py`` checks, and no other module tests for a platform's parts.
On Linux a name here is the standard library's own and costs nothing.  Elsewhere a use of a missing part
raises :class:`~onnx_dl.errors.PlatformError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from onnx_dl.errors import PlatformError

_Function = Any
"""A function of a module or of the C library, or one that raises."""


def refuse(what: str) -> NoReturn:
    """Raises PlatformError.  ``what``: names the missing part, such as "fcntl"."""
    raise PlatformError(
        f"This use of onnx-dl needs {what}, which Python does not have on this system ({sys.platform}). "
        "Worker processes need Linux 5.3 or newer; on other systems models run in this process."
    )


def missing(what: str) -> _Function:
    """A function that takes anything and calls :func:`refuse`."""

    def called(*args: object, **kwargs: object) -> NoReturn:
        refuse(what)

    return called


class _Missing(ModuleType):
    """Stands for a module that this platform lacks."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # asked by tools that look at any module
            raise AttributeError(name)
        refuse(f"{self.__name__}.{name}")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        return _Missing(name)


if TYPE_CHECKING:
    import fcntl as fcntl
    import resource as resource
else:
    fcntl = _module("fcntl")
    resource = _module("resource")


linux_fcntl: Final[Callable[..., int]] = fcntl.fcntl if sys.platform == "linux" else missing("Linux's fcntl")
"""``fcntl.fcntl`` for commands of Linux, whose numbers have another meaning elsewhere."""


def flags(module: ModuleType, *names: str) -> int:
    """Combines constants of a module to one number, without those that this platform lacks."""
    found = 0
    for name in names:
        if not isinstance(module, _Missing):
            found |= int(getattr(module, name, 0))
    return found


def signals(*names: str) -> set[int]:
    """The numbers of those signals that this platform has."""
    module = importlib.import_module("signal")
    return {int(getattr(module, name)) for name in names if hasattr(module, name)}


def function(module: ModuleType, name: str, otherwise: _Function | None = None) -> _Function:
    """A function of a module.  Where it is missing: ``otherwise``; None: a function that raises."""
    if not isinstance(module, _Missing) and (found := getattr(module, name, None)) is not None:
        return found
    return otherwise or missing(f"{module.__name__}.{name}")


def libc(declare: Callable[[ctypes.CDLL], object] | None = None) -> ctypes.CDLL:
    """The C library of this process, after ``declare`` has set the types of its functions.

    Elsewhere than on Linux it stands for a missing one: the functions that we call have other names, numbers
    or effects there.
    """
    if sys.platform != "linux":
        return _Missing("libc")  # type: ignore[return-value]
    found = ctypes.CDLL(None, use_errno=True)
    if declare is not None:
        declare(found)
    return found


def libc_function(
    name: str, library: type[ctypes.CDLL] = ctypes.CDLL, otherwise: _Function | None = None
) -> _Function:
    """A function of the C library.  Where it is missing: ``otherwise``; None: a function that raises.

    ``library``: how it is called; ``ctypes.PyDLL`` keeps the interpreter's lock.
    """
    found = getattr(library(None), name, None) if sys.platform == "linux" else None
    return found or otherwise or missing(name)


def library_if_loaded(name: str) -> ctypes.CDLL | None:
    """A shared library, by its file's name, that this process has loaded; None: it has not.  Loads nothing.

    Takes about 30 µs for one that is not loaded: the C library looks through its folders.  To ask first
    whether anything was loaded since (``dl_iterate_phdr``) would call Python with the C library's lock held,
    and could deadlock with a thread that has Python's lock and loads a library.
    """
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    return None


def soft_limit(name: str) -> int | None:
    """The soft limit of this process, such as ``RLIMIT_NOFILE``; None: there is none, or it is not known."""
    if isinstance(resource, _Missing) or not hasattr(resource, name):
        return None
    soft = resource.getrlimit(getattr(resource, name))[0]
    return None if soft == resource.RLIM_INFINITY else soft


def usable_processors() -> int:
    """The number of processors that this thread may run on; without affinity: that the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def register_at_fork(**hooks: Callable[[], object]) -> None:
    """Like ``os.register_at_fork``; without effect where a process cannot fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**hooks)


def _pread(fd: int, size: int, offset: int, /) -> bytes:
    """Like ``os.pread``, but moves the file's position."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, size)


def _pwrite(fd: int, data: bytes | memoryview, offset: int, /) -> int:
    """Like ``os.pwrite``, but moves the file's position."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.write(fd, data)


def _preadv(fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
    """Like ``os.preadv`` with one buffer."""
    part = pread(fd, buffers[0].nbytes, offset)
    buffers[0][: len(part)] = part
    return len(part)


HAS_MEMFD: Final = hasattr(os, "memfd_create")
pread: Final[Callable[[int, int, int], bytes]] = function(os, "pread", _pread)
preadv: Final[Callable[[int, Sequence[memoryview], int], int]] = function(os, "preadv", _preadv)
pwrite: Final[Callable[[int, bytes | memoryview, int], int]] = function(os, "pwrite", _pwrite)
