"""What a supervisor and its workers write on stderr, on its way to those who read it.

The application of a private supervisor gets it as messages, and writes it to the stderr that it has at that
moment: that may be another one than when the supervisor started.  What nobody takes there, because nobody is
connected yet or any more, or does not read, goes to the supervisor's own stderr; so does all of it in a
shared host, whose stderr is its log.
"""

from __future__ import annotations

import collections
import io
import os
from collections.abc import Callable

from onnx_dl.protocol import control as m
from onnx_dl.supervisor.outlet import Outlet

MOST_UNREAD = 1 << 20
"""Bytes that an application has not read yet beyond which it is sent no more of this."""


class Relay(io.TextIOBase):
    """In the place of ``sys.stderr``.  Any thread may write; the loop's thread pours."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._waiting: collections.deque[m.Wrote] = collections.deque()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.put(m.Wrote(pid=os.getpid(), text=text.encode(errors="backslashreplace")))
        return len(text)

    def put(self, wrote: m.Wrote) -> None:
        """Passed on with the next :meth:`pour`."""
        self._waiting.append(wrote)

    def pour(self, send: Callable[[m.Wrote], bool]) -> None:
        """Passes on what was written: to ``send``, which says whether it took it, or to our own stderr."""
        while self._waiting:
            wrote = self._waiting.popleft()
            if not send(wrote) and wrote.text:
                self._outlet.pass_on(wrote.text)

    def finish(self, patience: float) -> None:
        """The rest goes to our own stderr, for so many seconds at most."""
        self.pour(lambda wrote: False)
        self._outlet.finish(patience)

    def end(self) -> None:
        """The thread that writes ends when it has."""
        self._outlet.end()
