"""Memory of a worker: the limits ``max_memory``, ``max_runs`` and ``max_memory_hard``, and a heap to share.

docs/performance.md has measurements of the heap, and what was tried and not kept.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn

from onnx_dl.concurrency import spawning
from onnx_dl.system import resources

EVERY: Final = 0.01
"""Seconds between two looks."""
LINGER: Final = 20
"""Looks without a call before the thread sleeps: of calls in quick succession, only the first wakes it."""


class RecycleLimits:
    """Tells after each call whether the worker has to be replaced."""

    def __init__(self, nbytes: int | None, runs: int | None) -> None:
        """``nbytes``: anonymous memory, see :class:`AnonymousMemory`; None: no limit.

        Raises:
            PlatformError: there is a memory limit, and the system does not tell the figure.
        """
        self._nbytes = nbytes
        self._runs = runs
        self._calls = itertools.count(1)
        self._memory = None if nbytes is None else AnonymousMemory()

    def are_reached(self) -> bool:
        """Counts one call, and tells whether a limit is reached with it.  Takes 2 µs."""
        if self._runs is not None and next(self._calls) >= self._runs:
            return True
        return self._memory is not None and self._nbytes is not None and self._memory.read() > self._nbytes


class AnonymousMemory:
    """Resident memory of this process without pages of files and of shared memory, in bytes."""

    def __init__(self) -> None:
        """Opens the file with the figures; raises PlatformError if /proc is missing."""
        try:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise resources.proc_missing(
                "A limit of a worker's memory (max_memory, max_memory_hard)"
            ) from None

    def read(self) -> int:
        _, resident, shared, *_ = os.pread(self._statm, 128, 0).split()
        nbytes: int = (int(resident) - int(shared)) * mmap.PAGESIZE
        return nbytes


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


def share_heap() -> None:
    """Exempts all present objects from garbage collection, in a process that is about to be forked.

    A collection writes into each object's header, which in a child makes shared pages private copies.
    None is made now: it takes 10 ms of a first call, and finds 800 objects of 33,000.
    """
    gc.freeze()
