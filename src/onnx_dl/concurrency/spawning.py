"""Starts threads, and makes the errors for a system without free threads or processes.

A user, a service and a container may each have a limit for these.  Imports nothing heavy, because every
process of ours begins with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from typing import Final

from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.forking import Promise
from onnx_dl.errors import ProcessesExhausted
from onnx_dl.linux_only import soft_limit

_ADVICE: Final = (
    "Raise the limit of processes and threads: ulimit -u of the user, TasksMax= of a service, the pids limit "
    "of a container."
)
_SHORTAGE: Final = ("can't start new thread", "pthread_create failed, error code: 11")
"""Texts in the errors of Python and of onnxruntime."""


class Thread(primitives.Thread):
    """A daemon thread.  A patched ``threading`` does not list it."""

    def __init__(self, target: Callable[..., object], name: str, args: tuple[object, ...] = ()) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self._native: Promise[None] | None = None
        """Fulfilled at its end, if it was not started by ``threading``."""
        self._native_ident: int | None = None

    @property
    def number(self) -> int | None:
        """Its native number; None before it runs."""
        return self.ident if self._native is None else self._native_ident

    @property
    def is_this(self) -> bool:
        """True if it is the calling thread, and has not ended."""
        return self.number == primitives.get_ident() and self.is_alive()

    def start(self) -> None:
        if not primitives.is_patched("_thread"):
            super().start()
            return
        self._native = Promise()
        self._native_ident = primitives.start_new_thread(self._run_native, ())

    def _run_native(self) -> None:
        assert self._native is not None
        self._native_ident = primitives.get_ident()
        try:
            self.run()
        except SystemExit:
            pass
        except BaseException as error:
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, self)))
        finally:
            self._native.set_result(None)

    def is_alive(self) -> bool:
        return super().is_alive() if self._native is None else not self._native.done()

    def join(self, timeout: float | None = None) -> None:
        if self._native is None:
            super().join(timeout)
            return
        with contextlib.suppress(Exception):  # it was not in time, or is not in this forked child
            self._native.result(timeout)


def exhausted(what: str) -> ProcessesExhausted:
    """Error for ``what``, such as "A worker for m.onnx", that cannot be started."""
    soft = soft_limit("RLIMIT_NPROC")
    limit = "" if soft is None else f" (ulimit -u is {soft})"
    return ProcessesExhausted(
        f"{what} needs a process or a thread, and the system has none left for this user{limit}. "
        f"Loaded models continue to work. {_ADVICE}"
    )


def is_shortage(error: OSError) -> bool:
    """True if a process could not be started because none is left."""
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
