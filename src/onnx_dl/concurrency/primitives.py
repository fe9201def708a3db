"""Python's own threads, locks, sleeps, polls and sockets, also where gevent has put greenlets in their place.

``gevent.monkey`` replaces what stands in the modules of the standard library, before or after this package is
imported.  Threads of ours must be native ones, and what they wait on must stop only themselves, so modules of
an application's process take these names from here; ``tests/unit/test_concurrency.py`` fails where one does
not.  They are bound once, so they cost nothing.  How a caller waits is :mod:`onnx_dl.concurrency.waits`'s.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING, Any


def is_patched(module: str) -> bool:
    """Whether gevent has replaced something in a module of the standard library, as of now."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(getattr(monkey, "is_module_patched", bool)(module))


def _native(module: str, name: str) -> Any:
    """What the module has, or had before it was patched; None: eventlet has taken it away."""
    if is_patched(module):
        return sys.modules["gevent.monkey"].get_original(module, name)
    return getattr(importlib.import_module(module), name, None)


if TYPE_CHECKING:
    from _thread import RLock, allocate_lock, get_ident, start_new_thread
    from os import close
    from queue import Empty, SimpleQueue
    from select import poll
    from socket import socket, socketpair
    from threading import Thread, local
    from time import sleep
else:
    RLock = _native("_thread", "RLock")
    allocate_lock = _native("_thread", "allocate_lock")
    get_ident = _native("_thread", "get_ident")
    start_new_thread = _native("_thread", "start_new_thread")
    close = _native("os", "close")
    Empty = _native("_queue", "Empty")
    SimpleQueue = _native("_queue", "SimpleQueue")
    poll = _native("select", "poll")
    socket = _native("socket", "socket")
    socketpair = _native("socket", "socketpair")
    Thread = _native("threading", "Thread")
    local = _native("_thread", "_local")
    sleep = _native("time", "sleep")


def popen(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
    """Like ``subprocess.Popen``, which uses what gevent takes out of its module."""
    module: Any = _native_subprocess() if is_patched("subprocess") else subprocess
    process: subprocess.Popen[bytes] = module.Popen(command, **how)
    return process


@functools.cache
def _native_subprocess() -> Any:
    """Another copy of the module, which nobody has patched, on top of what others had before."""
    spec = importlib.util.find_spec("subprocess")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # gevent's os.close() closes later, in its hub: the writing end of a pipe of which the other end is read.
    module.os, module.threading, module.time = map(_Natives, ("os", "threading", "time"))
    return module


class _Natives:
    """A module as it was before it was patched."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return _native(self._module, name)


__all__ = [
    "Empty",
    "RLock",
    "SimpleQueue",
    "Thread",
    "allocate_lock",
    "close",
    "get_ident",
    "is_patched",
    "local",
    "poll",
    "popen",
    "sleep",
    "socket",
    "socketpair",
    "start_new_thread",
]
