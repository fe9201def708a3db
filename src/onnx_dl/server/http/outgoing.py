"""Answers on their way: sent as they lie in memory, and held until the client has taken them."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Sequence
from typing import Final

from onnx_dl.server.http.answers import Part
from onnx_dl.server.http.limits import UNCOUNTED, HttpLimits, is_too_slow
from onnx_dl.server.interfaces import Inference

_PIECE: Final = 256 << 10
"""Bytes that are encrypted at a time: a transport of TLS takes all that it is given, and does not tell."""


class Outgoing:
    """Sender of one connection's answers.

    What the client does not take at once is counted as in flight until all of it is sent, because the memory
    of a result is free only then.  So the transport pauses when a byte waits, and resumes when none does.
    """

    def __init__(self, transport: asyncio.Transport, limits: HttpLimits, inference: Inference) -> None:
        self._transport = transport
        self._limits = limits
        self._inference = inference
        self._is_tls = transport.get_extra_info("sslcontext") is not None
        self.is_paused = False
        """The client takes no more for now."""
        self._pieces: collections.deque[Part] = collections.deque()
        """Parts that the transport has not got yet."""
        self._closes = False
        self._owed = 0
        """Bytes that are counted as in flight."""
        self._nbytes = 0
        """Bytes of the last answer."""
        self._began = 0.0
        self._unsent = 0
        """Bytes that were left at the last look."""
        self._progress = 0.0
        """Time of the last look at which the client had taken some."""

    def begin(self) -> None:
        """Let the transport tell of each byte that waits.  It may do that at once."""
        # With 0, asyncio's transports of TLS would never resume.
        self._transport.set_write_buffer_limits(high=1 if self._is_tls else 0, low=0)

    @property
    def unsent(self) -> int:
        """Bytes that the client's system has not taken yet."""
        return self._transport.get_write_buffer_size() + sum(map(len, self._pieces))

    def send(self, parts: Sequence[Part], now: float) -> None:
        """Send an answer.  Large parts are not copied: they must not change, and live until they are sent."""
        self._nbytes = sum(map(len, parts))
        self._began = self._progress = now
        self._unsent = -1
        if self._is_tls and self._nbytes > _PIECE:
            for part in parts:
                view = memoryview(part)
                self._pieces.extend(view[at : at + _PIECE] for at in range(0, len(view), _PIECE))
            self._feed()
        elif len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)
        if self._nbytes >= UNCOUNTED and self.unsent:
            self._owed += self._nbytes
            self._inference.owe(self._nbytes)

    def resume(self) -> None:
        """Note that the transport takes more."""
        self.is_paused = False
        self._feed()
        if not self.unsent:
            self._pay()

    def close(self, *, is_all_read: bool) -> None:
        """Close the transport when all is sent, or only our half of it if not all is read: closed with bytes
        unread, the client's system would drop the answer."""
        if is_all_read:
            self._closes = True
            self._feed()
        elif self._transport.can_write_eof():
            self._transport.write_eof()

    def lose(self) -> None:
        """Note that the connection is lost."""
        self._pieces.clear()
        self._pay()

    def _feed(self) -> None:
        while self._pieces and not self.is_paused:
            self._transport.write(self._pieces.popleft())
        if self._closes and not self._pieces:
            self._transport.close()

    def _pay(self) -> None:
        owed, self._owed = self._owed, 0
        if owed:
            self._inference.paid(owed)

    def is_stuck(self, now: float) -> bool:
        """True if the client takes nothing of the answer any more, or takes it too slowly."""
        unsent = self.unsent
        if unsent != self._unsent:
            self._unsent, self._progress = unsent, now
        if not unsent:
            return False
        is_idle = now - self._progress > self._limits.send_idle
        return is_idle or is_too_slow(self._nbytes - unsent, self._nbytes, now - self._began, self._limits)
