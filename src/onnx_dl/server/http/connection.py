"""One connection: bytes to requests, answers to bytes.

The body of a request is read into the memory that the inference is made from, and a result is sent from the
memory that it was written to.  One request is answered at a time; what a client sends ahead waits.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Final

from onnx_dl.server.http.answers import Answer, Part, failed, not_allowed, rendered
from onnx_dl.server.http.bodies import Buffer, Gathered
from onnx_dl.server.http.chunked import ChunkDecoder
from onnx_dl.server.http.connections import Connections
from onnx_dl.server.http.handler import Handler, NotAllowed
from onnx_dl.server.http.head import END, Framing, Head, head_too_large, parse_head
from onnx_dl.server.http.limits import HEAD_BYTES, WAITING_BYTES, is_too_slow
from onnx_dl.server.http.peers import caller_of
from onnx_dl.server.http.requests import Request
from onnx_dl.server.http.targets import INFER, Target
from onnx_dl.server.v2.failures import RequestFailure, passed, unavailable

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_SKIPPED: Final = 1 << 20
"""Bytes of a refused body that are read and dropped so that the connection can be kept."""


class _Phase(enum.Enum):
    HEAD = enum.auto()
    """Waits for a head, or reads it."""
    BODY = enum.auto()
    RUN = enum.auto()
    """The request is being answered."""
    SEND = enum.auto()
    """The client has not taken enough of the answer for the next request to be looked at."""
    SKIP = enum.auto()
    """Drops the rest of a body that was refused."""
    LINGER = enum.auto()
    """Drops what comes until the client has read the answer and closes."""
    CLOSED = enum.auto()


class HttpConnection(asyncio.BufferedProtocol):
    """A connection of a client."""

    def __init__(self, handler: Handler, connections: Connections) -> None:
        self._handler = handler
        self._connections = connections
        self._limits = connections.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._phase = _Phase.HEAD
        self.since = self._loop.time()
        """When the phase began, or the client last did what it waits for."""
        self._waiting = bytearray()
        """What was read and is not looked at yet: part of a head, or later requests."""
        self._has_served = False
        self._ends = False
        """No request is answered after this one."""
        self._is_paused = False
        """The client takes no more for now."""
        self._unsent = 0
        self._head: Head
        self._target: Target
        self._framing: Framing
        self._began = 0.0
        self._request: Request | None = None
        self._buffer: Buffer | None = None
        self._chunks: ChunkDecoder | None = None
        self._skip = 0
        self._task: asyncio.Task[None] | None = None

    # The transport's calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._caller = caller_of(transport)
        if not self._connections.add(self):
            self._ends = True
            self._answer(failed(unavailable("Too many connections are open.")), None)

    def connection_lost(self, error: Exception | None) -> None:
        self._phase = _Phase.CLOSED
        self._connections.remove(self)
        self._buffer = self._chunks = None
        if self._request is not None:
            self._request.is_given_up = True
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> bool:
        """The client sends no more.  Nobody waits for a run then: it ends."""
        if self._phase is _Phase.RUN and self._target.route.name != INFER:
            self._ends = True
            return self._transport.can_write_eof()
        if self._phase is _Phase.SEND or (self._phase is _Phase.LINGER and self._is_paused):
            self._ends = True
            return self._transport.can_write_eof()
        if self._phase is _Phase.RUN:
            self._transport.abort()
        return False

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._phase is _Phase.SEND:
            self._next()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._phase is _Phase.BODY and self._chunks is None:
            assert self._buffer is not None
            return self._buffer.room()
        return self._connections.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._phase is _Phase.BODY and self._chunks is None:
            assert self._buffer is not None
            self.since = self._loop.time()
            try:
                self._buffer.advance(nbytes)
            except RequestFailure as failure:
                self._refuse(failed(failure))
                return
            if self._buffer.is_full:
                self._start()
        else:
            self._take(self._connections.scratch[:nbytes])

    # Requests.

    def _take(self, data: memoryview) -> None:
        """Look at bytes.  They are valid during the call."""
        while len(data) and self._phase in (_Phase.HEAD, _Phase.BODY, _Phase.SKIP):
            if self._phase is _Phase.HEAD:
                data = self._take_head(data)
            elif self._phase is _Phase.BODY:
                data = data[self._take_body(data) :]
            else:
                taken = min(self._skip, len(data))
                self._skip -= taken
                data = data[taken:]
                if not self._skip:
                    self._next()
        if len(data) and self._phase in (_Phase.RUN, _Phase.SEND):
            self._waiting += data
            if len(self._waiting) > WAITING_BYTES:
                # From here on the end of the connection is not seen, either.
                self._transport.pause_reading()

    def _take_head(self, data: memoryview) -> memoryview:
        """Look for a head; return what follows it."""
        if not self._waiting and (self._has_served or not self.since):
            self.since = self._loop.time()
        waiting = self._waiting
        waiting += data
        while waiting.startswith(b"\r\n"):
            del waiting[:2]
        end = waiting.find(END)
        if end > HEAD_BYTES or (end < 0 and len(waiting) > HEAD_BYTES):
            self._refuse(failed(head_too_large()))
        elif end >= 0:
            end += len(END)
            head, rest = bytes(waiting[:end]), bytes(waiting[end:])
            waiting.clear()
            self._admit(head)
            return memoryview(rest)
        return data[len(data) :]

    def _admit(self, data: bytes) -> None:
        """Decide about a request at its head."""
        self._head = head = parse_head(data)

    def _take_body(self, data: memoryview) -> int:
        return 0
