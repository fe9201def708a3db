"""Attributes of a thread that its children inherit from the kernel: processors, priority, umask.

In-process, the threads of a session inherit them from the thread that makes the session.  Here, the worker of
a private host gets those of the thread that asks for the load: an application may have changed them since its
host was started.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from _thread import get_native_id
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from onnx_dl.core.environment import ThreadAttributes

_RESETS: Final = 0x40000000
"""SCHED_RESET_ON_FORK: children get the default policy."""

_T = TypeVar("_T")

_STATUS: Final = Path("/proc/thread-self/status")

_asker: Final[contextvars.ContextVar[int]] = contextvars.ContextVar("asker", default=0)
"""Native id of the thread on whose behalf the present one works; 0: itself."""


def on_behalf(work: Callable[[], _T]) -> Callable[[], _T]:
    """Wraps ``work`` for another thread, so that it uses the attributes of this thread instead of its own.

    A thread of an event loop's pool may have been started before this thread changed its attributes.
    """
    thread = get_native_id()

    def done() -> _T:
        token = _asker.set(thread)
        try:
            return work()
        finally:
            _asker.reset(token)

    return done


def of_this_thread() -> ThreadAttributes:
    """The attributes of this thread, or of the thread :func:`on_behalf` of which it works."""
    thread = _asker.get()
    found: dict[str, int | bytes] = {}
    with contextlib.suppress(OSError):
        found["processors"] = _mask(os.sched_getaffinity(thread))
    with contextlib.suppress(OSError):
        found["nice"] = os.getpriority(os.PRIO_PROCESS, thread)
    with contextlib.suppress(OSError):
        if not (policy := os.sched_getscheduler(thread)) & _RESETS:
            found |= {"policy": policy, "priority": os.sched_getparam(thread).sched_priority}
    if (umask := _umask()) is not None:
        found["umask"] = umask
    return ThreadAttributes(**found)  # type: ignore[arg-type]


def apply(attributes: ThreadAttributes) -> None:
    """Sets the attributes of this thread, and so of the threads and processes that it starts.

    Leaves out what the system refuses: a lower nice value needs a privilege, a processor may be offline.
    """
    _apply_to(0, attributes)
    if attributes.umask is not None:
        os.umask(attributes.umask)


def apply_to_process(attributes: ThreadAttributes) -> None:
    """Sets the attributes of all threads of this process, as :func:`apply` does of one.

    Without /proc only those of this thread.
    """
    apply(attributes)
    this = get_native_id()
    with contextlib.suppress(OSError):
        for thread in map(int, os.listdir("/proc/self/task")):
            if thread != this:
                _apply_to(thread, attributes)


def _apply_to(thread: int, attributes: ThreadAttributes) -> None:
    """Sets the attributes of a thread by its native id; 0: this one."""
    if attributes.processors:
        with contextlib.suppress(OSError, OverflowError, ValueError):
            os.sched_setaffinity(thread, _bits(attributes.processors))
    if attributes.policy is not None:
        with contextlib.suppress(OSError):
            if attributes.policy != os.sched_getscheduler(thread):
                os.sched_setscheduler(thread, attributes.policy, os.sched_param(attributes.priority))
    if attributes.nice is not None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, attributes.nice)


def _umask() -> int | None:
    """The umask of this process, from /proc: os.umask() would change it."""
    with contextlib.suppress(OSError, ValueError):
        for line in _STATUS.read_text(errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return None


def _mask(processors: set[int]) -> bytes:
    bits = sum(1 << number for number in processors)
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def _bits(mask: bytes) -> Iterator[int]:
    bits = int.from_bytes(mask, "little")
    return (number for number in range(bits.bit_length()) if bits >> number & 1)
