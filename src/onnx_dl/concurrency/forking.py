"""Locks and promises that survive a fork, and a thread that interrupts itself, at any moment.

A thread interrupts itself where Python runs a signal handler, a ``__del__``, a callback of a weak reference
or of the garbage collector: between any two steps of ours, and such code may use a model.  So every lock of
an application's process is a :class:`Guard`, and every wait for another thread a :class:`Promise`.  They
define what happens in a forked child, and when their own thread comes once more.
``tests/unit/concurrency/test_forking.py`` fails where another lock is used.

:func:`still` is for steps that a child must not find half done.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import time
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Final, Generic, NoReturn, Self, TypeVar, overload

from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.waits import Wakers
from onnx_dl.errors import ReentrantUse, SupervisorDied
from onnx_dl.linux_only import register_at_fork

_T = TypeVar("_T")

_STILL: Final = 5.0
"""Seconds of patience with steps of milliseconds: a section of a Guard, a block of :func:`still`."""

_FORKED: Final = (
    "This process was forked while it waited for another thread, which the child does not have. "
    "Use the model again: the child starts a host of its own."
)


def refuse(what: str) -> NoReturn:
    """Raises ReentrantUse.  ``what``: completes "This thread is ..."."""
    raise ReentrantUse(
        f"This thread is {what}. A signal handler, a __del__ or a callback interrupted it there and used a "
        "model. It would wait for itself, so nothing was done. Use the model later, or in another thread."
    )


class Guard(primitives.RLock):  # type: ignore[misc]
    """A lock for brief sections, free in a forked child.

    ``with guard.alone()`` is for sections that must not be entered twice; ``with guard`` for sections whose
    state is consistent at each step, so that their own thread may enter once more.
    """

    __slots__ = ()

    def __init__(self) -> None:
        _ours[id(self)] = self

    @property
    def is_mine(self) -> bool:
        """True if this thread holds it."""
        return bool(self._is_owned())  # type: ignore[attr-defined]

    def alone(self) -> Self:
        """The lock, to be entered.

        The check is here and not in ``__enter__``: that stays C, so that Ctrl-C cannot come between taking
        the lock and being sure to release it.  Code that interrupts us between the two leaves the lock as it
        was.

        Raises:
            ReentrantUse: this thread is inside, or another one does not come out: it may be interrupted there
                by code that waits for this thread.
        """
        if self.is_mine or not self._is_free():
            refuse("in a step that must not be interrupted, or waits for such a step of another thread")
        return self

    def _is_free(self) -> bool:
        try:
            return self.acquire(timeout=_STILL)
        finally:
            if self.is_mine:
                self.release()

    def after_in_child(self) -> None:
        """Frees the lock, unless the thread that forked holds it."""
        if not self.is_mine:
            self._at_fork_reinit()  # type: ignore[attr-defined]


class Promise(Generic[_T]):
    """A result that another thread will set.  Has a Future's methods, without the lock around them: its only
    lock is a latch, held until the result is there.  Greenlets do not wait for the latch; they are woken."""

    __slots__ = ("__weakref__", "_done", "_error", "_latch", "_value", "_wakers", "giver")

    def __init__(self, giver: int | None = None) -> None:
        """``giver``: number of the thread that sets the result, so must not wait; may be set later."""
        self.giver = giver
        self._done = False
        self._error: BaseException | None = None
        self._latch = primitives.allocate_lock()
        self._latch.acquire()
        self._wakers = Wakers()
        _ours[id(self)] = self

    def done(self) -> bool:
        return self._done

    def set_result(self, value: _T) -> None:
        self._value = value
        self._open()

    def set_exception(self, error: BaseException) -> None:
        self._error = error
        self._open()

    def _open(self) -> None:
        self._done = True
        with contextlib.suppress(RuntimeError):  # it is open already
            self._latch.release()
        self._wakers.wake()

    def result(self, timeout: float | None = None) -> _T:
        """The result.

        Raises:
            TimeoutError: it was not there within ``timeout`` seconds; None waits for ever.
            ReentrantUse: it is not there, and this is the thread that will set it.
            BaseException: the exception that was set instead.
        """
        if not self._done:
            self._wait(timeout)
        if not self._done:
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value

    def _wait(self, timeout: float | None) -> None:
        if self.giver == primitives.get_ident():
            refuse("the one that must do the work that it would now wait for")
        if self._wakers.wait(self.done, timeout):
            return
        if self._latch.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            self._latch.release()  # for the next waiting thread

    def after_in_child(self) -> None:
        """Fails the promise: the child has no giver.  Its waiting thread forked in a handler."""
        if not self._done:
            self.set_exception(SupervisorDied(_FORKED))


_ours: weakref.WeakValueDictionary[int, Guard | Promise[Any]] = weakref.WeakValueDictionary()


class lazily(Generic[_T]):
    """Like ``functools.cached_property``, for which Python 3.11 holds one lock for all instances.  If two
    threads compute the value, both get the same one."""

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        self._compute = compute
        functools.update_wrapper(self, compute)  # type: ignore[arg-type]

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> _T: ...
    def __get__(self, instance: object | None, owner: type) -> _T | Self:
        if instance is None:
            return self
        value: _T = instance.__dict__.setdefault(self._compute.__name__, self._compute(instance))
        return value


# --- forks -------------------------------------------------------------------------------------------------

_still: Final[collections.deque[int]] = collections.deque()
"""The threads in a block of :func:`still`, once per block."""
_forking: Final[collections.deque[int]] = collections.deque()
"""The threads that are about to fork."""
_LOOK_EVERY: Final = 0.0005


@contextlib.contextmanager
def still() -> Iterator[None]:
    """Keeps other threads from forking this process during the block, which must be brief.

    For descriptors that a child would keep open unseen, and for imports: a child waits for ever for a module
    that a thread was importing which the child does not have.  Several threads may be in such a block: no
    lock, because a signal handler may interrupt one and wait for another.
    """
    try:
        _enter(_still, _forking)
        yield
    finally:
        _leave(_still)


def importing(name: str) -> ModuleType:
    """Imports a module at its first use, while other threads may fork.

    Raises:
        ReentrantUse: this thread was interrupted in the midst of importing it.
    """
    with still():
        module = importlib.import_module(name)
    if getattr(module.__spec__, "_initializing", False):  # of this thread: for another's, Python waits
        refuse(f"importing {name}")
    return module


def _enter(own: collections.deque[int], other: collections.deque[int]) -> None:
    """Enters this thread in ``own`` once no other thread is in ``other``.  A thread enters before it looks,
    and leaves while it waits, so that of two that come at once neither overlooks the other."""
    me, deadline = primitives.get_ident(), time.monotonic() + _STILL
    own.append(me)
    # Not for ever: a __del__ may have a thread in a block wait for the thread that forks.
    while any(thread != me for thread in list(other)) and time.monotonic() < deadline:
        own.remove(me)
        primitives.sleep(_LOOK_EVERY)
        own.append(me)


def _leave(own: collections.deque[int]) -> None:
    with contextlib.suppress(ValueError):  # Ctrl-C came before it had entered
        own.remove(primitives.get_ident())


def _after_in_child() -> None:
    _leave(_forking)
    me = primitives.get_ident()
    for threads in (_still, _forking):
        for other in set(threads) - {me}:
            while other in threads:
                threads.remove(other)
    for own in [own for ref in _ours.valuerefs() if (own := ref()) is not None]:
        own.after_in_child()


# Registered before the hooks that are built upon it, so that none of them finds a lock held in a child.
register_at_fork(
    before=functools.partial(_enter, _forking, _still),
    after_in_parent=functools.partial(_leave, _forking),
    after_in_child=_after_in_child,
)
