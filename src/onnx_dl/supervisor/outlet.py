"""Writes to stdout and stderr without blocking the supervisor.

A stopped terminal (Ctrl-S) and a pipe that nobody empties block the writer: here, a thread for nothing else.

Text on stderr, of the supervisor and its workers, goes to the application of a private supervisor, which
writes it to its present stderr: that may be another one than when the supervisor started.  The rest goes to
the supervisor's own stderr: text that no application takes, because none is connected or reads, and all text
of a shared host, whose stderr is its log.
"""

from __future__ import annotations

import collections
import io
import os
import threading
from collections.abc import Callable
from typing import Final

from onnx_dl.protocol import control as m
from onnx_dl.system import small_files

MOST_UNREAD: Final = 1 << 20
"""Bytes that an application may leave unread before it is sent no more text."""


class Outlet(io.TextIOBase):
    """Writes to one descriptor, in place of ``sys.stdout`` or ``sys.stderr``.  Thread-safe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting: collections.deque[bytes] = collections.deque()
        self._nbytes = self._dropped = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.pass_on(text.encode(errors="backslashreplace"))
        return len(text)

    def pass_on(self, data: bytes) -> None:
        """Queues bytes; drops them if too many wait."""
        with self._changed:
            if self._nbytes + len(data) > small_files.MOST_UNWRITTEN:
                self._dropped += len(data)
                return
            self._nbytes += len(data)
            self._waiting.append(data)
            self._begin()
            self._changed.notify_all()

    def finish(self, timeout: float) -> None:
        """Waits until everything is written, for so many seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._nbytes, timeout)

    def end(self) -> None:
        """Ends the thread when it has written everything, and waits for that."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _begin(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._pour, name="onnx-dl-outlet", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no thread; the next text tries again
                return
            self._thread = thread

    def _pour(self) -> None:
        while (found := self._next()) is not None:
            data, dropped = found
            if dropped:
                small_files.write(self._fd, small_files.dropped(dropped))
            small_files.write(self._fd, data)
            with self._changed:
                self._nbytes -= len(data)
                self._changed.notify_all()

    def _next(self) -> tuple[bytes, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending)
            if not self._waiting:
                return None
            dropped, self._dropped = self._dropped, 0
            return self._waiting.popleft(), dropped


class Relay(Outlet):
    """Replaces ``sys.stderr``.  Any thread may write; only the loop's thread pours."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._unsent: collections.deque[m.Wrote] = collections.deque()

    def write(self, text: str) -> int:
        self.put(m.Wrote(pid=os.getpid(), text=text.encode(errors="backslashreplace")))
        return len(text)

    def put(self, wrote: m.Wrote) -> None:
        """Queues text for the next :meth:`pour`."""
        self._unsent.append(wrote)

    def pour(self, send: Callable[[m.Wrote], bool]) -> None:
        """Passes on queued text to ``send`` or, where that returns false, to the supervisor's own stderr."""
        while self._unsent:
            wrote = self._unsent.popleft()
            if not send(wrote) and wrote.text:
                self.pass_on(wrote.text)

    def finish(self, timeout: float) -> None:
        """Writes the rest to the supervisor's own stderr; waits for so many seconds at most."""
        self.pour(lambda wrote: False)
        super().finish(timeout)
