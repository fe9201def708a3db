"""Decides whether a call may begin and whether the worker may end.

The one owner of what is in flight, who holds the model and when it was last used, so the race between a TTL
and a call is decided here, under one lock: either the call is in flight, or it is told that the worker drains
and is made elsewhere.  Time is handed in; sockets and processes are not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from onnx_dl.core.parsing import KEEP
from onnx_dl.transport.gauges import Gauges


class Verdict(NamedTuple):
    """What the worker has to do now."""

    expired: bool
    """The TTL ran out: tell the supervisor, once."""
    drained: bool
    """Nothing runs and nothing will: the worker may end."""
    wait: float | None
    """Seconds until this must be asked again if nothing else happens; None: not before."""


class Gate:
    """``wake`` is called, outside of the lock, when a thread changed something that a verdict depends on;
    ``gauges`` are told what is under way."""

    def __init__(
        self, ttl: float, now: float, wake: Callable[[], None], gauges: Gauges | None = None
    ) -> None:
        self._lock = threading.Lock()
        self._gauges = gauges or Gauges()
        self._wake = wake
        self._ttl = ttl
        self._last_used = now
        self._used = False  # the TTL counts from the first use: who asked for the load must get its call
        self._in_flight = 0
        self._holds = 0
        self._closing = False  # a drain was asked for; open to those who hold the model
        self._closed = False
        self._expired = False
        self.reason = "ttl"
        """Why it takes no new work."""
        self._armed = False

    def enter(self) -> bool:
        """A call begins; false if the worker drains and the call must not."""
        with self._lock:
            if self._closed:
                return False
            self._in_flight += 1
            self._gauges.under_way(self._in_flight + self._holds)
            return True

    def in_flight(self) -> int:
        """How many calls are under way."""
        return self._in_flight

    def leave(self, now: float, took: float | None = None) -> None:
        """A call ended.  ``took``: the seconds of one that counts as a run."""
        with self._lock:
            self._in_flight -= 1
            if took is not None:
                self._gauges.answered(took)
            wake = self._used_at(now)
        if wake:
            self._wake()

    def hold(self) -> bool:
        """A block begins; false if the worker drains."""
        with self._lock:
            if self._closing or self._closed:
                return False
            self._holds += 1
            self._gauges.under_way(self._in_flight + self._holds)
            return True

    def unhold(self, now: float) -> None:
        """A block ended."""
        with self._lock:
            self._holds -= 1
            wake = self._used_at(now)
        if wake:
            self._wake()

    def drain(self) -> None:
        """Close as soon as nobody holds the model."""
        with self._lock:
            self._closing = True
        self._wake()

    def close_if_idle(self) -> None:
        """Takes no new work from now on, if nothing runs and nobody holds the model."""
        with self._lock:
            if not (self._busy() or not self._used or self._closing or self._closed):
                self._close("evicted")
        self._wake()

    def retire(self) -> None:
        """Takes no new work from now on; what runs ends."""
        with self._lock:
            if not (self._closing or self._closed):
                self._close("recycled")
        self._wake()

    def _close(self, reason: str) -> None:
        self._closed = self._expired = True
        self.reason = reason

    def retime(self, ttl: float, used: float | None = None) -> None:
        """The TTL in force from now on.  ``used``: when it begins to count, if there was no use so far."""
        with self._lock:
            self._ttl = ttl
            if used is not None and not self._used:
                self._used_at(used)
        self._wake()

    def judge(self, now: float, touched: float = 0.0) -> Verdict:
        """What to do at ``now``; ``touched`` is the latest use that callers reported without a message."""
        with self._lock:
            self._last_used = max(self._last_used, min(touched, now))
            if self._used:
                self._gauges.used(self._last_used, self._in_flight + self._holds)
            self._close_if_due(now)
            expired, self._expired = self._expired, False
            wait = self._wait(now)
            self._armed = wait is not None
            return Verdict(expired, self._closed and not self._in_flight, wait)

    def _used_at(self, now: float) -> bool:
        """Notes the end of a use; whether a verdict may have changed in a way that cannot wait."""
        if now > self._last_used:
            self._last_used = now
        self._used = True
        busy = self._in_flight + self._holds
        self._gauges.used(self._last_used, busy)
        # At once, not when somebody judges: another call must not slip in between.
        if self._ttl == 0 or self._closing:
            self._close_if_due(now)
        if busy:
            return False
        # Whoever judges sleeps until the TTL it last saw runs out, so most calls need not wake it.
        return self._closing or self._closed or (self._ttl != KEEP and not self._armed)

    def _busy(self) -> bool:
        return bool(self._in_flight or self._holds)

    def _close_if_due(self, now: float) -> None:
        if self._closed:
            return
        if self._closing:
            self._closed = not self._holds
        elif self._used and not self._busy() and self._ttl != KEEP:
            self._closed = self._expired = now >= self._last_used + self._ttl

    def _wait(self, now: float) -> float | None:
        if self._closed or self._closing or self._busy() or not self._used or self._ttl == KEEP:
            return None
        return max(0.0, self._last_used + self._ttl - now)
