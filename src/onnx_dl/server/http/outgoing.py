"""Answers on their way: sent as they lie in memory, and held until the client has taken them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from onnx_dl.server.http.answers import Part
from onnx_dl.server.http.limits import HttpLimits, is_too_slow


class Outgoing:
    """Sender of one connection's answers."""

    def __init__(self, transport: asyncio.Transport, limits: HttpLimits) -> None:
        self._transport = transport
        self._limits = limits
        self.is_paused = False
        """The client takes no more for now."""
        self._nbytes = 0
        """Bytes of the last answer."""
        self._began = 0.0
        self._unsent = 0
        """Bytes that were left at the last look."""
        self._progress = 0.0
        """Time of the last look at which the client had taken some."""

    @property
    def unsent(self) -> int:
        """Bytes that the client's system has not taken yet."""
        return self._transport.get_write_buffer_size()

    def send(self, parts: Sequence[Part], now: float) -> None:
        """Send an answer.  Large parts are not copied: they must not change, and live until they are sent."""
        self._nbytes = sum(map(len, parts))
        self._began = self._progress = now
        self._unsent = -1
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)

    def is_stuck(self, now: float) -> bool:
        """True if the client takes nothing of the answer any more, or takes it too slowly."""
        unsent = self.unsent
        if unsent != self._unsent:
            self._unsent, self._progress = unsent, now
        if not unsent:
            return False
        is_idle = now - self._progress > self._limits.send_idle
        return is_idle or is_too_slow(self._nbytes - unsent, self._nbytes, now - self._began, self._limits)
