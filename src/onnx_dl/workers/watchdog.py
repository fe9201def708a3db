"""Ends a worker whose memory grows too large during a call.

Covers when to look and what to compare; how to measure memory, whether a call is in flight and how to end the
process are arguments.  Growth between calls is checked by :class:`~onnx_dl.workers.limits.RecycleLimits`.
Native code that keeps the GIL is not watched; engines release it for a run.
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
"""Looks without a call before the thread sleeps: of calls in quick succession, only the first wakes it."""


class Watchdog:
    """Compares the memory of one worker with a limit, in a thread that sleeps while no call is in flight."""

    def __init__(
        self,
        limit: int,
        measure: Callable[[], int],
        in_flight: Callable[[], int],
        end: Callable[[int], object],
    ) -> None:
        """``limit``: bytes; ``measure`` returns the present ones; ``end`` is called with larger ones."""
        self._limit = limit
        self._measure = measure
        self._in_flight = in_flight
        self._end = end
        self.sleeps = False
        """True if only the begin of a call wakes the thread."""
        self._called = threading.Event()
        self._idle = 0

    def start(self) -> None:
        """Starts the thread.

        Raises:
            ProcessesExhausted: the system has no thread left.
        """
        spawning.start(threading.Thread(target=self._watch, name="watchdog", daemon=True), "max_memory_hard")

    def call_begins(self) -> None:
        """Wakes the thread for a call.  Takes 0.1 µs, and more for the first call after a pause."""
        if self.sleeps:
            self._called.set()

    def look(self) -> bool:
        """Measures if a call is in flight; returns false if the next look can wait until a call begins."""
        if not self._in_flight():
            self._idle += 1
            return self._idle < LINGER
        self._idle = 0
        if (nbytes := self._measure()) > self._limit:
            self._end(nbytes)
        return True

    def _watch(self) -> NoReturn:
        while True:
            while self.look():
                time.sleep(EVERY)
            self._sleep()

    def _sleep(self) -> None:
        """Waits until a call begins."""
        self._called.clear()
        self.sleeps = True
        # A call that began before ``sleeps`` was set does not wake this thread.
        if not self._in_flight():
            self._called.wait()
        self.sleeps = False
        self._idle = 0
