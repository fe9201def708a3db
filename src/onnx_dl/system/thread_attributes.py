"""What a thread has from the kernel, and hands on to whom it starts: processors, priority, umask.

In-process, the threads of a session have it from the thread that makes the session.  Here, the worker of a
private host has it from the thread that asks for the load: an application may have changed it since its host
was started.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from _thread import get_native_id
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from onnx_dl.core.thread_attributes import Standing

_RESETS: Final = 0x40000000
"""SCHED_RESET_ON_FORK: whom the thread starts has the usual policy."""

_T = TypeVar("_T")

_STATUS: Final = Path("/proc/thread-self/status")


_asker: Final[contextvars.ContextVar[int]] = contextvars.ContextVar("asker", default=0)
"""The native number of the thread for which the present one does something; 0: itself."""


def on_behalf(work: Callable[[], _T]) -> Callable[[], _T]:
    """The same work, for another thread to do, which then has the standing of this one in place of its own:
    those of an event loop's pool may have been started before that changed."""
    thread = get_native_id()

    def done() -> _T:
        token = _asker.set(thread)
        try:
            return work()
        finally:
            _asker.reset(token)

    return done


def of_this_thread() -> Standing:
    """Of the thread that asks for something, which another may do :func:`on_behalf` of it."""
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
    return Standing(**found)  # type: ignore[arg-type]


def take(standing: Standing) -> None:
    """This thread has it from now on, and whom it starts.

    As far as the system allows: a lower nice value needs a privilege, and a processor may be gone.
    """
    if standing.processors:
        with contextlib.suppress(OSError, OverflowError, ValueError):
            os.sched_setaffinity(0, _bits(standing.processors))
    if standing.policy is not None and standing.policy != os.sched_getscheduler(0):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, standing.policy, os.sched_param(standing.priority))
    if standing.nice is not None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, standing.nice)
    if standing.umask is not None:
        os.umask(standing.umask)


def _umask() -> int | None:
    """Of this process; to ask the system would set it."""
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
