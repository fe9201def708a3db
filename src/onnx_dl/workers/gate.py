"""Decides whether a call may begin and whether the worker may end.

Owns what is in flight, who holds the model and when it was last used.  So the race between a TTL and a call
is decided here, under one lock: either the call is in flight, or its caller is told that the worker drains
and makes it elsewhere.  Times are arguments; sockets and processes are not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from onnx_dl.core.parsing import KEEP
from onnx_dl.transport.gauges import Gauges


class GateDecision(NamedTuple):
    """The worker's next step."""

    expired: bool
    """The gate has closed: tell the supervisor.  True once."""
    drained: bool
    """Nothing runs and nothing will: the worker may end."""
    wait: float | None
    """Seconds until the next decision if nothing else happens; None: not before something does."""


class Gate:
    """Counts calls in flight and session() blocks, and closes by TTL or on request."""

    def __init__(
        self,
        ttl: float,
        now: float,
        wake: Callable[[], None],
        gauges: Gauges | None = None,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        """``wake``: called without the lock when a thread changed what :meth:`judge` depends on; ``lock``:
        None: one that no thread may take twice."""
        self._lock = lock or threading.Lock()
        self._gauges = gauges or Gauges()
        self._busy = self._gauges.busy
        self._wake = wake
        self._ttl = ttl
        self._last_used = now
        # The TTL counts from the first use: the proxy that asked for the load must get its call.
        self._used = False
        self._in_flight = 0
        self._holds = 0
        self._closing = False  # a drain was requested; open until no session() block holds the model
        self._closed = False
        self._expired = False
        self.reason = "ttl"
        """Reason why the gate closed."""
        self._armed = False

    def enter(self) -> bool:
        """Begins a call; false if the worker drains: the call must not begin."""
        with self._lock:
            if self._closed:
                return False
            self._in_flight += 1
            self._busy[0] = self._in_flight + self._holds
            return True

    def in_flight(self) -> int:
        """Returns the number of calls in flight."""
        return self._in_flight

    def leave(self, now: float, took: float | None = None) -> None:
        """Ends a call.  ``took``: its seconds, if it counts as a run."""
        with self._lock:
            self._in_flight -= 1
            wake = self._used_at(now, took)
        if wake:
            self._wake()

    def hold(self, *, joins: bool = False) -> bool:
        """Begins a session() block; false if the worker drains.  ``joins``: one that waits for other blocks
        to end before it drains takes this one, too, which may be in one of these."""
        with self._lock:
            if self._closed or (self._closing and not (joins and self._holds)):
                return False
            self._holds += 1
            self._busy[0] = self._in_flight + self._holds
            return True

    def unhold(self, now: float) -> None:
        """Ends a session() block."""
        with self._lock:
            self._holds = max(0, self._holds - 1)
            wake = self._used_at(now)
        if wake:
            self._wake()

    def drain(self) -> None:
        """Closes as soon as no session() block holds the model."""
        with self._lock:
            self._closing = True
        self._wake()

    def close_if_idle(self) -> None:
        """Closes if nothing runs and no session() block holds the model."""
        with self._lock:
            if not (self._is_busy() or not self._used or self._closing or self._closed):
                self._close("evicted")
        self._wake()

    def retire(self) -> None:
        """Closes; calls in flight run to their end."""
        with self._lock:
            if not (self._closing or self._closed):
                self._close("recycled")
        self._wake()

    def end(self, reason: str) -> None:
        """Closes at once, also if session() blocks hold the model."""
        with self._lock:
            self._holds = 0
            if not self._closed:
                self._close(reason)
        self._wake()

    def _close(self, reason: str) -> None:
        self._closed = self._expired = True
        self.reason = reason

    def retime(self, ttl: float, used: float | None = None) -> None:
        """Sets the TTL.  ``used``: when it begins to count, if there was no use so far."""
        with self._lock:
            self._ttl = ttl
            if used is not None and not self._used:
                self._used_at(used)
        self._wake()

    def judge(self, now: float, touched: float = 0.0) -> GateDecision:
        """Returns what to do at ``now``; ``touched``: the latest use that callers noted without a message."""
        with self._lock:
            self._last_used = max(self._last_used, min(touched, now))
            if self._used:
                self._gauges.used(self._last_used, self._in_flight + self._holds)
            self._close_if_due(now)
            expired, self._expired = self._expired, False
            wait = self._wait(now)
            self._armed = wait is not None
            return GateDecision(expired, self._closed and not self._in_flight, wait)

    def _used_at(self, now: float, took: float | None = None) -> bool:
        """Notes the end of a use; returns whether the main thread has to judge at once."""
        if now > self._last_used:
            self._last_used = now
        self._used = True
        busy = self._in_flight + self._holds
        if took is None:
            self._gauges.used(self._last_used, busy)
        else:
            self._gauges.answered(self._last_used, busy, took)
        # Not left to judge(): another call must not begin in between.
        if self._ttl == 0 or self._closing:
            self._close_if_due(now)
        if busy:
            return False
        # The main thread sleeps until the TTL that it saw last runs out, so most calls need not wake it.
        return self._closing or self._closed or (self._ttl != KEEP and not self._armed)

    def _is_busy(self) -> bool:
        return bool(self._in_flight or self._holds)

    def _close_if_due(self, now: float) -> None:
        if self._closed:
            return
        if self._closing:
            self._closed = not self._holds
        elif self._used and not self._is_busy() and self._ttl != KEEP:
            self._closed = self._expired = now >= self._last_used + self._ttl

    def _wait(self, now: float) -> float | None:
        if self._closed or self._closing or self._is_busy() or not self._used or self._ttl == KEEP:
            return None
        return max(0.0, self._last_used + self._ttl - now)
