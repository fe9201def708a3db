"""Threads and processes: how they are started, and what is said where the system has none left.

A user, a service and a container may each have a number of these.  Imports nothing heavy, because every
process of ours begins with it.
"""

from __future__ import annotations

import errno
import os
import resource
from typing import Final

from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.threads import Thread
from onnx_dl.errors import ProcessesExhausted

_ADVICE: Final = (
    "Raise what limits processes and threads: ulimit -u of the user, TasksMax= of a service, the pids limit "
    "of a container."
)
_SAID: Final = ("can't start new thread", "pthread_create failed, error code: 11")
"""By Python and by onnxruntime."""


def exhausted(what: str) -> ProcessesExhausted:
    """The error for ``what`` cannot be had, such as "A worker for m.onnx"."""
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limit = "" if soft == resource.RLIM_INFINITY else f" (ulimit -u is {soft})"
    return ProcessesExhausted(
        f"{what} needs a process or a thread, and the system has none left for this user{limit}. "
        f"What is loaded goes on. {_ADVICE}"
    )


def is_shortage(error: OSError) -> bool:
    """Whether a process could not be started because there may be no more."""
    return error.errno == errno.EAGAIN


def start(thread: primitives.Thread, what: str) -> None:
    """Starts a thread; ``what`` needs it.

    Raises:
        ProcessesExhausted: there may be no more.
    """
    try:
        thread.start()
    except RuntimeError as error:
        if _SAID[0] not in str(error):  # the interpreter is shutting down
            raise
        raise exhausted(what) from None


def check(count: int, what: str) -> None:
    """Raises ProcessesExhausted where so many threads cannot be had: libraries end the process then."""
    reading, writing = os.pipe()
    started: list[Thread] = []
    try:
        for _ in range(count):
            thread = Thread(os.read, "onnx-dl-check", (reading, 1))
            start(thread, what)
            started.append(thread)
    finally:
        os.write(writing, bytes(count))
        for thread in started:
            thread.join()
        primitives.close(reading)
        primitives.close(writing)


def note_shortage(error: BaseException) -> None:
    """Adds to an error of somebody else what to do, if that is what it is about."""
    if any(said in str(error) for said in _SAID):
        error.add_note(f"The system has no process or thread left for this user. {_ADVICE}")
