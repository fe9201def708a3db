"""Starts threads, and makes the errors for a system without free threads or processes.

A user, a service and a container may each have a limit for these.  Imports nothing heavy, because every
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
_SHORTAGE: Final = ("can't start new thread", "pthread_create failed, error code: 11")
"""Texts in the errors of Python and of onnxruntime."""


def exhausted(what: str) -> ProcessesExhausted:
    """Error for ``what``, such as "A worker for m.onnx", that cannot be started."""
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limit = "" if soft == resource.RLIM_INFINITY else f" (ulimit -u is {soft})"
    return ProcessesExhausted(
        f"{what} needs a process or a thread, and the system has none left for this user{limit}. "
        f"What is loaded goes on. {_ADVICE}"
    )


def is_shortage(error: OSError) -> bool:
    """Whether a process could not be started because none is left."""
    return error.errno == errno.EAGAIN


def start(thread: primitives.Thread, what: str) -> None:
    """Starts a thread that ``what`` needs; raises ProcessesExhausted if none is left."""
    try:
        thread.start()
    except RuntimeError as error:
        if _SHORTAGE[0] not in str(error):  # the interpreter is shutting down
            raise
        raise exhausted(what) from None


def check(count: int, what: str) -> None:
    """Raises ProcessesExhausted without ``count`` free threads: libraries would end the process."""
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
    """Adds advice to another library's error about a shortage of threads."""
    if any(text in str(error) for text in _SHORTAGE):
        error.add_note(f"The system has no process or thread left for this user. {_ADVICE}")
