"""Decides when a worker's engine returns its unused memory to the system.

That makes the next call slower, also calls of others.  So it is done for those who ask only while no call is
in flight, and at most once in a minute: after a burst the memory is back soon, and callers who ask again and
again, because they call now and then, pay for it once a minute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from onnx_dl.workers.engines import base
from onnx_dl.workers.engines.base import Backend

EVERY: Final = 60.0
"""Seconds between two trims of a worker."""
_AGAIN: Final = 5.0
"""Seconds after which a trim is tried again that came while a call was in flight."""


class EngineTrims:
    """The trims that callers have asked for.  Thread-safe; times are arguments, monotonic seconds."""

    def __init__(self, in_flight: Callable[[], int], wake: Callable[[], None]) -> None:
        """
        Args:
            in_flight: returns the number of calls that the worker makes now.
            wake: called when :meth:`next_at` has changed, so that a later :meth:`run_due` must be made.
        """
        self._in_flight = in_flight
        self._wake = wake
        self._lock = threading.Lock()
        self._asked: list[Backend] = []
        self._next_at: float | None = None
        """Time of the next try; None: nobody asks."""
        self._last: float | None = None

    def ask(self, backend: Backend, now: float) -> None:
        """Trims a model's engine, now or later."""
        with self._lock:
            if all(backend is not other for other in self._asked):
                self._asked.append(backend)
            self._next_at = now if self._last is None else max(now, self._last + EVERY)
        self.run_due(now)
        if self.next_at is not None:
            self._wake()

    def run_due(self, now: float) -> None:
        """Trims the engines that it is time for."""
        for backend in self._due(now):
            base.trim(backend)

    @property
    def next_at(self) -> float | None:
        """Time at which :meth:`run_due` has to be called; None: not before somebody asks."""
        return self._next_at

    def _due(self, now: float) -> list[Backend]:
        with self._lock:
            if self._next_at is None or now < self._next_at:
                return []
            if self._in_flight():
                self._next_at = now + _AGAIN
                return []
            found, self._asked = self._asked, []
            self._next_at, self._last = None, now
            return found
