"""Ends a worker whose memory grows too large while a call is under way.

Covers when to look and what to compare; how much memory there is, whether a call is under way and how a
process ends is handed in.  Growth between calls is :class:`~onnx_dl.workers.heap.Allowance`'s.  Native code
that keeps the interpreter's lock is not watched; engines give it up for a run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn

from onnx_dl.concurrency import spawning

EVERY: Final = 0.01
"""Seconds between two looks."""
LINGER: Final = 20
"""Looks without a call before it sleeps, so that of calls that follow each other only the first wakes it."""


class Watchdog:
    """One per worker.  Its thread sleeps while no call is under way."""

    def __init__(
        self,
        limit: int,
        own: Callable[[], int],
        in_flight: Callable[[], int],
        end: Callable[[int], object],
    ) -> None:
        """``limit``: bytes; ``own`` tells how many there are; ``end`` is told these if they are more."""
        self._limit = limit
        self._own = own
        self._in_flight = in_flight
        self._end = end
        self.sleeps = False
        """Whether only the begin of a call wakes it."""
        self._called = threading.Event()
        self._idle = 0

    def start(self) -> None:
        """Watches from now on, in a thread of its own.

        Raises:
            ProcessesExhausted: the system has no thread left.
        """
        spawning.start(threading.Thread(target=self._watch, name="watchdog", daemon=True), "max_memory_hard")

    def call_begins(self) -> None:
        """A call is under way.  Takes 0.1 µs, and more for the first one after a pause."""
        if self.sleeps:
            self._called.set()

    def look(self) -> bool:
        """Whether to look again soon; false: not before a call begins."""
        if not self._in_flight():
            self._idle += 1
            return self._idle < LINGER
        self._idle = 0
        if (nbytes := self._own()) > self._limit:
            self._end(nbytes)
        return True

    def _watch(self) -> NoReturn:
        while True:
            while self.look():
                time.sleep(EVERY)
            self._sleep()

    def _sleep(self) -> None:
        """Until a call begins."""
        self._called.clear()
        self.sleeps = True
        # One that began before this was told of would not wake us.
        if not self._in_flight():
            self._called.wait()
        self.sleeps = False
        self._idle = 0
