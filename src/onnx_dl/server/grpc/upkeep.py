"""Work that is done once a second, beside all calls: late messages, and pages that the heap keeps."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from onnx_dl.server.grpc.bounds import Arrivals
from onnx_dl.system.heap import trim_heap

_EVERY: Final = 1.0
_LARGE: Final = 1 << 20
"""Bytes of a message whose pieces leave free pages that are worth giving back."""
_TRIM_EVERY: Final = 3.0
"""Seconds between two trims under load; each takes milliseconds."""


class FreePages:
    """Pages of the heap that large messages leave.

    A message arrives in thousands of pieces, which glibc keeps when they are free: 200 MB after some messages
    of 64 MB.
    """

    def __init__(self) -> None:
        self._is_due = False
        self._trimmed = 0.0

    def note(self, nbytes: int) -> None:
        """A message of this size came or goes.  Called by any thread."""
        if nbytes >= _LARGE:
            self._is_due = True

    def is_due(self, now: float) -> bool:
        """True if pages should be given back now; the caller does it."""
        if not self._is_due or now - self._trimmed < _TRIM_EVERY:
            return False
        self._is_due = False
        self._trimmed = now
        return True


class Upkeep:
    """Runs on the server's loop until it is closed.  Trims in a thread of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, arrivals: Arrivals, pages: FreePages) -> None:
        self._loop = loop
        self._arrivals = arrivals
        self._pages = pages
        self._is_closed = False
        loop.call_soon_threadsafe(self._look)

    def close(self) -> None:
        """Ends it at its next look.  Idempotent."""
        self._is_closed = True

    def _look(self) -> None:
        if self._is_closed:
            return
        now = time.monotonic()
        self._arrivals.look(now)
        if self._pages.is_due(now):
            self._loop.run_in_executor(None, trim_heap)
        self._loop.call_later(_EVERY, self._look)
