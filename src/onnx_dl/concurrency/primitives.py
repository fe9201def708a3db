"""Python's native threads, locks, sleeps, polls and sockets, also where gevent has replaced them.

``gevent.monkey`` patches modules of the standard library, before or after this package is imported.  Threads
of ours must be native, and their waits must stop only themselves.  So modules of an application's process
take these names from here, which ``tests/unit/concurrency/test_primitives.py`` checks.  They are bound once,
so they cost nothing.  Waits of callers are :mod:`onnx_dl.concurrency.waits`'s.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

_Anything = Any
"""An object of a module that is looked up by name."""


def is_patched(module: str) -> bool:
    """True if gevent has by now patched this module of the standard library."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(getattr(monkey, "is_module_patched", bool)(module))


def _native(module: str, name: str) -> _Anything:
    """The module's object of this name from before a patch; None: eventlet has removed it."""
    if is_patched(module):
        return sys.modules["gevent.monkey"].get_original(module, name)
    return getattr(importlib.import_module(module), name, None)


if TYPE_CHECKING:
    from _thread import RLock as RLock
    from _thread import allocate_lock as allocate_lock
    from _thread import get_ident as get_ident
    from _thread import start_new_thread as start_new_thread
    from os import close as close
    from queue import Empty as Empty
    from queue import SimpleQueue as SimpleQueue
    from select import poll as poll
    from socket import socket as socket
    from socket import socketpair as socketpair
    from threading import Thread as Thread
    from threading import local as local
    from time import sleep as sleep
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


def popen(command: list[str], **how: _Anything) -> subprocess.Popen[bytes]:
    """Like ``subprocess.Popen``, also where gevent has patched that."""
    # Imported by its callers, but not by our own processes.
    module = _native_subprocess() if is_patched("subprocess") else importlib.import_module("subprocess")
    process: subprocess.Popen[bytes] = module.Popen(command, **how)
    return process


@functools.cache
def _native_subprocess() -> _Anything:
    """A second copy of the module, on top of the native os, threading and time."""
    spec = importlib.util.find_spec("subprocess")
    assert spec is not None and spec.loader is not None
    module: _Anything = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # gevent's os.close() closes later, in its hub; the end of a pipe that is being read must close now.
    module.os, module.threading, module.time = map(_Natives, ("os", "threading", "time"))
    return module


class _Natives:
    """A module as it was before it was patched."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> _Anything:
        return _native(self._module, name)
