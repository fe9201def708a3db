"""Waits of callers: a thread stops, a greenlet of gevent lets the others of its thread go on.

A wait is cooperative if gevent has patched the standard library and the thread has a hub; our own threads
have none.  A greenlet that is killed, or whose ``gevent.Timeout`` passes, leaves each of these waits as by
Ctrl-C.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from onnx_dl.concurrency import primitives
from onnx_dl.linux_only import register_at_fork

if TYPE_CHECKING:
    import subprocess

_T = TypeVar("_T")

_LOOK_EVERY: Final = 0.01
"""Seconds between two looks at a child without a descriptor."""
_COOPERATIVE: Final = ("_thread", "threading", "select", "socket", "time")
"""Modules that make waits cooperative if they are patched."""

_READ, _WRITE = 1, 2
"""Event numbers of gevent's loops."""

_Gevent = Any
"""gevent's module or one of its objects; it is never imported here."""


def are_cooperative() -> bool:
    """True if gevent has patched this program, so that some thread may have greenlets."""
    return "gevent.monkey" in sys.modules and any(map(primitives.is_patched, _COOPERATIVE))


def hub() -> _Gevent:
    """gevent's hub, which runs other greenlets while the present one waits; None: the thread waits."""
    if not are_cooperative():
        return None
    found = sys.modules["gevent._hub_local"].get_hub_if_exists()
    # A callback of the loop runs in the hub itself, which cannot wait for itself.
    return None if found is None or found is _gevent().getcurrent() else found


def _gevent() -> _Gevent:
    return sys.modules["gevent"]


def caller() -> int:
    """Number of the calling thread, or of the greenlet where the thread has several."""
    return primitives.get_ident() if hub() is None else id(_gevent().getcurrent())


def refusal() -> str | None:
    """The reason for which a patched program cannot use models; None: it can."""
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is None or not getattr(patcher, "already_patched", None):
        return None
    return (
        "eventlet has patched this program and replaced the system's threads, locks and polls, which onnx-dl "
        "needs to wait for other processes. Use gevent (gunicorn -k gevent), or threads (-k gthread), or "
        "onnxruntime.InferenceSession."
    )


def pause(seconds: float) -> None:
    """Like ``time.sleep``."""
    if hub() is None:
        primitives.sleep(seconds)
    else:
        _gevent().sleep(seconds)


def milliseconds(timeout: float | None) -> int | None:
    """Milliseconds for ``poll()``, at least 0; None: without a bound.  Rounded up, because a timer that fires
    a moment early would find nothing due and spin until it is."""
    return None if timeout is None else max(0, math.ceil(timeout * 1000))


def ready(fd: int, event: int, timeout: float | None) -> bool:
    """True if a descriptor becomes ready for ``event`` (``select.POLLIN`` or ``select.POLLOUT``) within
    ``timeout`` seconds; None: waits for as long as it takes."""
    poll = primitives.poll()
    poll.register(fd, event)
    return polled(poll, fd, event, timeout)


def polled(poll: select.poll, fd: int, event: int, timeout: float | None) -> bool:
    """Like :func:`ready`, with a poll object that has only this descriptor."""
    limit = milliseconds(timeout)
    through = hub() if limit != 0 else None
    if through is None:
        return bool(poll.poll(limit))
    if not poll.poll(0):
        with contextlib.closing(through.loop.io(fd, _WRITE if event == select.POLLOUT else _READ)) as watcher:
            _watching[id(watcher)] = watcher
            try:
                _wait(through, watcher, lambda: False, timeout)
            finally:
                del _watching[id(watcher)]
    return bool(poll.poll(0))


_watching: Final[dict[int, _Gevent]] = {}
"""Watchers of descriptors for greenlets."""


def _after_fork() -> None:
    """Wakes the greenlets that a forked child has from its parent.  Their descriptors are closed in the
    child, and libev ends a process that watches a closed one."""
    for watcher in list(_watching.values()):
        if (wake := watcher.callback) is not None:
            watcher.stop()
            watcher.loop.run_callback(wake, None)


register_at_fork(after_in_child=_after_fork)


def ended(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """True if a child process ends within ``timeout`` seconds; then it is reaped."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:  # another has reaped it, or this process may have no more descriptors
        deadline = time.monotonic() + timeout
        while process.poll() is None and time.monotonic() < deadline:
            pause(_LOOK_EVERY)
    else:
        try:
            ready(fd, select.POLLIN, timeout)
        finally:
            primitives.close(fd)
    return process.poll() is not None


def _wait(through: _Gevent, watcher: _Gevent, is_over: Callable[[], bool], timeout: float | None) -> None:
    """Waits until the watcher fires or the time is up.  ``is_over`` is looked at after the watcher has
    started, so that nothing is overlooked."""
    waiter = _gevent().hub.Waiter(through)
    watcher.start(waiter.switch, None)
    try:
        with _gevent().Timeout(timeout, False):
            if not is_over():
                waiter.get()
    finally:
        watcher.stop()


class Wakers:
    """Greenlets that wait for another thread.  Takes no lock, so that a finalizer may wake them."""

    __slots__ = ("_wakers",)

    def __init__(self) -> None:
        self._wakers: list[Callable[[], object]] = []

    def wake(self) -> None:
        """Wakes all of them, from any thread."""
        for waker in self._wakers.copy():
            with contextlib.suppress(Exception):  # it has gone on meanwhile and closed its watcher
                waker()

    def wait(self, is_over: Callable[[], bool], timeout: float | None) -> bool:
        """Waits until ``is_over``, after which another thread calls :meth:`wake`, or the time is up.  False,
        without having waited: the whole thread must wait."""
        if (through := hub()) is None:
            return False
        with contextlib.closing(through.loop.async_()) as watcher:
            waker = watcher.send
            self._wakers.append(waker)
            try:
                _wait(through, watcher, is_over, timeout)
            finally:
                self._wakers.remove(waker)
        return True


class Mailbox(Generic[_T]):
    """A ``queue.SimpleQueue`` that greenlets may read, too."""

    def __init__(self) -> None:
        self._items: primitives.SimpleQueue[_T] = primitives.SimpleQueue()
        self._wakers = Wakers()

    def put(self, item: _T) -> None:
        """May be called from finalizers: it takes no lock and does not wait."""
        self._items.put(item)
        self._wakers.wake()

    def empty(self) -> bool:
        return self._items.empty()

    def get(self, timeout: float | None = None) -> _T:
        """The next item; raises ``queue.Empty`` if there was none for ``timeout`` seconds."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while self._wakers.wait(lambda: not self._items.empty(), _left(until)):
            with contextlib.suppress(primitives.Empty):  # another one has taken it
                return self._items.get_nowait()
            if time.monotonic() >= until:
                raise primitives.Empty
        return self._items.get(timeout=timeout)


def _left(until: float) -> float | None:
    return None if until == math.inf else max(0.0, until - time.monotonic())
