"""Passes on what the supervisor and its workers write on stderr.

The application of a private supervisor gets it as messages, and writes it to its present stderr, which may be
another one than when the supervisor started.  The rest goes to the supervisor's own stderr: text that no
application takes, because none is connected or reads, and all text of a shared host, whose stderr is its log.
"""

from __future__ import annotations

import collections
import io
import os
from collections.abc import Callable

from onnx_dl.protocol import control as m
from onnx_dl.supervisor.outlet import Outlet

MOST_UNREAD = 1 << 20
"""Bytes that an application may leave unread before it is sent no more text."""


class Relay(io.TextIOBase):
    """Replaces ``sys.stderr``.  Any thread may write; only the loop's thread pours."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._waiting: collections.deque[m.Wrote] = collections.deque()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.put(m.Wrote(pid=os.getpid(), text=text.encode(errors="backslashreplace")))
        return len(text)

    def put(self, wrote: m.Wrote) -> None:
        """Queues text for the next :meth:`pour`."""
        self._waiting.append(wrote)

    def pour(self, send: Callable[[m.Wrote], bool]) -> None:
        """Passes on queued text to ``send`` or, where that returns false, to the supervisor's own stderr."""
        while self._waiting:
            wrote = self._waiting.popleft()
            if not send(wrote) and wrote.text:
                self._outlet.pass_on(wrote.text)

    def finish(self, timeout: float) -> None:
        """Writes the rest to the supervisor's own stderr; waits for so many seconds at most."""
        self.pour(lambda wrote: False)
        self._outlet.finish(timeout)

    def end(self) -> None:
        """Ends the thread that writes, when it has written everything."""
        self._outlet.end()
