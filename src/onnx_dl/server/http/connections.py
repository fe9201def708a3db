"""The connections of a listener: how many there are, and which of them take too long."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Protocol

from onnx_dl.linux_only import resource
from onnx_dl.server.http.limits import HEAD_BYTES, HttpLimits, most_connections

_LOOK_EVERY = 0.5


class Kept(Protocol):
    """A connection, as the list sees it."""

    @property
    def idle_since(self) -> float | None:
        """Time since when it has waited for its client; None: closing it would be noticed."""

    def look(self, now: float) -> None:
        """Ends the connection if it has taken too long."""

    def end(self, *, now: bool) -> None:
        """Ends the connection: ``now``, or when it has finished what was begun."""


class Connections:
    """All connections of a listener.  One timer looks at them."""

    def __init__(self, limits: HttpLimits, loop: asyncio.AbstractEventLoop) -> None:
        self.limits = limits
        self.scratch = memoryview(bytearray(HEAD_BYTES))
        """Memory for what any of them reads before it knows the place.  Used up within one call."""
        self.is_draining = False
        self._most = most_connections(limits, _descriptors())
        self._loop = loop
        self._open: dict[Kept, None] = {}
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._timer: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[Kept]:
        return iter(list(self._open))

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Kept) -> bool:
        """Note a new connection.  False: there are too many, and none can make room."""
        if len(self._open) >= self._most:
            idle = [(since, other) for other in self._open if (since := other.idle_since) is not None]
            if not idle:
                return False
            _, oldest = min(idle, key=lambda pair: pair[0])
            self.remove(oldest)
            oldest.end(now=True)
        self._open[connection] = None
        self._none_left.clear()
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_EVERY, self._look)
        return True

    def remove(self, connection: Kept) -> None:
        self._open.pop(connection, None)
        if not self._open:
            self._none_left.set()

    def _look(self) -> None:
        now = self._loop.time()
        for connection in self:
            connection.look(now)
        self._timer = self._loop.call_later(_LOOK_EVERY, self._look) if self._open else None

    def drain(self) -> None:
        """End each connection as soon as it has finished what was begun."""
        self.is_draining = True
        for connection in self:
            connection.end(now=False)

    async def wait_until_none(self, timeout: float | None) -> None:
        """Returns when all have ended.  Raises TimeoutError after ``timeout`` seconds."""
        await asyncio.wait_for(self._none_left.wait(), timeout)

    def cut(self) -> None:
        """End all connections now."""
        for connection in self:
            connection.end(now=True)

    def close(self) -> None:
        """Stop looking at them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _descriptors() -> int:
    """Descriptors that this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
