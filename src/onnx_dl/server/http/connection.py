"""One connection: bytes to requests, answers to bytes.

The body of a request is read into the memory that the inference is made from, and a result is sent from the
memory that it was written to.  One request is answered at a time; what a client sends ahead waits.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Final, cast

from onnx_dl.server.http.answers import HttpAnswer, failed, not_allowed, rendered
from onnx_dl.server.http.bodies import IncomingBody, open_body
from onnx_dl.server.http.connections import Connections
from onnx_dl.server.http.handler import Admitted, Handler, NotAllowed
from onnx_dl.server.http.head import END, head_too_large, skipped_length
from onnx_dl.server.http.heads import Heads
from onnx_dl.server.http.limits import HEAD_BYTES, WAITING_BYTES, is_too_slow
from onnx_dl.server.http.outgoing import Outgoing
from onnx_dl.server.http.peers import Watch, caller_of
from onnx_dl.server.http.requests import HttpRequest
from onnx_dl.server.v2.failures import RequestFailure, passed, unavailable

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_PATIENCE: Final = 1.0
"""Seconds that a head may take before its connection is among those that make room for new ones."""


class Phase(enum.Enum):
    """Steps of a connection."""

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
    """The last answer is on its way.  Drops what comes, until the client closes."""
    CLOSED = enum.auto()


class HttpConnection(asyncio.BufferedProtocol):
    """A connection of a client."""

    def __init__(self, handler: Handler, connections: Connections) -> None:
        self._handler = handler
        self._connections = connections
        self._limits = connections.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._phase = Phase.HEAD
        self._since = self._loop.time()
        """Time when the phase began; of a head: its first byte; of a body: its last."""
        self._waiting = b""
        """Bytes that were read and are not looked at yet: part of a head, or later requests."""
        self._has_served = False
        self._ends = False  # no request is answered after this one
        self._outgoing: Outgoing
        self._heads: Heads
        self._admitted: Admitted | None = None
        self._body: IncomingBody | None = None
        self._began = 0.0  # time when the head of the request was there
        self._skip = 0
        self._request: HttpRequest | None = None
        self._task: asyncio.Task[None] | None = None
        self._watch: Watch

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses.
        self._transport = cast("asyncio.Transport", transport)
        self._outgoing = Outgoing(self._transport, self._limits, self._handler.server.inference)
        self._outgoing.begin()
        self._watch = Watch(self._transport, self._loop)
        self._heads = Heads(self._handler, caller_of(transport))
        if not self._connections.add(self):
            self._send(failed(unavailable("Too many connections are open.")))

    def connection_lost(self, error: Exception | None) -> None:
        self._enter(Phase.CLOSED)
        self._outgoing.lose()
        self._connections.remove(self)
        self._body = self._admitted = None
        if self._request is not None:
            self._request.is_given_up = True
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> bool:
        """The client sends no more.  A run ends, because most clients that do this have gone; other
        answers are still sent."""
        is_run = self._phase is Phase.RUN and self._admitted is not None and self._admitted.is_inference
        if is_run:
            self._transport.abort()
        elif self._phase in (Phase.RUN, Phase.SEND):
            self._ends = True
            return self._transport.can_write_eof()
        return False

    def pause_writing(self) -> None:
        self._outgoing.is_paused = True

    def resume_writing(self) -> None:
        self._outgoing.resume()
        if self._phase is Phase.SEND:
            self._next()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._phase is Phase.BODY and self._body is not None and (room := self._body.room()) is not None:
            return room
        return self._connections.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._phase is Phase.BODY and self._body is not None and self._body.room() is not None:
            self._take_body(None, nbytes)
        else:
            self._take(self._connections.scratch[:nbytes])

    # Requests.

    def _take(self, data: memoryview) -> None:
        """Look at bytes, which are valid during the call."""
        while len(data) and self._phase in (Phase.HEAD, Phase.BODY, Phase.SKIP):
            if self._phase is Phase.HEAD:
                data = self._take_head(data)
            elif self._phase is Phase.BODY:
                data = data[self._take_body(data, len(data)) :]
            else:
                taken = min(self._skip, len(data))
                self._skip -= taken
                data = data[taken:]
                if not self._skip:
                    self._next()
        if len(data) and self._phase in (Phase.RUN, Phase.SEND):
            self._waiting += data
            if len(self._waiting) > WAITING_BYTES:
                self._transport.pause_reading()  # and so the client's end is not told
                if self._phase is Phase.RUN and self._admitted and self._admitted.is_inference:
                    self._watch.begin()

    def _take_head(self, data: memoryview) -> memoryview:
        """Look for the end of a head; return what follows it."""
        waiting = (self._waiting + data).lstrip(b"\r\n")
        if waiting and not self._waiting:
            self._since = self._loop.time()
        self._waiting, self._heads.last = waiting, None
        end = waiting.find(END)
        if end > HEAD_BYTES or (end < 0 and len(waiting) > HEAD_BYTES):
            self._waiting = b""
            self._send(failed(head_too_large()), skip=None)
            return data[len(data) :]
        if end < 0:
            return data[len(data) :]
        self._waiting, end = b"", end + len(END)
        try:
            self._admit(self._heads.admit(waiting[:end]), has_more=end < len(waiting))
        except NotAllowed as refusal:
            self._send(not_allowed(refusal.methods), skip=skipped_length(self._heads.last))
        except RequestFailure as failure:
            self._send(failed(failure), skip=skipped_length(self._heads.last))
        except Exception:
            self._send(self._handler.fault(waiting[:end]), skip=None)
        return memoryview(waiting)[end:]

    def _admit(self, admitted: Admitted, *, has_more: bool) -> None:
        """The head was accepted: read the body."""
        self._admitted = admitted
        self._began = self._loop.time()
        self._enter(Phase.BODY)
        self._body = open_body(admitted.framing, admitted.most, self._handler.server.inference.allocate)
        if self._body.is_complete:
            self._start()
        elif admitted.framing.expects_continue and not has_more:
            self._transport.write(_CONTINUE)

    def _take_body(self, data: memoryview | None, nbytes: int) -> int:
        """Take bytes of the body; return how many.  ``data`` None: they are in their place."""
        assert self._body is not None and self._admitted is not None
        self._since = self._loop.time()
        try:
            if data is not None:
                nbytes = self._body.write(data)
            else:
                self._body.advance(nbytes)
        except RequestFailure as failure:
            self._body = None
            self._send(self._handler.refused(self._admitted.target, failure), skip=None)
            return nbytes
        if self._body.is_complete:
            self._start()
        return nbytes

    def _start(self) -> None:
        """The request is there: answer it."""
        assert self._admitted is not None and self._body is not None
        self._request = request = self._admitted.request(self._body.take(), self._began)
        self._body = None
        self._enter(Phase.RUN)
        self._task = self._loop.create_task(self._run(request))

    async def _run(self, request: HttpRequest) -> None:
        try:
            answer = await self._handler.answer(request)
            self._task = self._request = None
            if self._phase is Phase.RUN:
                self._send(answer)
        except BaseException:
            # Whatever it was: the client must not wait for ever.
            self._transport.abort()
            raise

    # Answers.

    def _send(self, answer: HttpAnswer, *, skip: int | None = 0) -> None:
        """Send an answer.  ``skip``: bytes of the body that still come, and are dropped; None: where the next
        request would begin is not known."""
        ends = self._ends or self._connections.is_draining or skip is None
        head = self._heads.last
        keeps = not ends and head is not None and head.keeps_alive
        parts = rendered(answer, head, keeps_alive=keeps)
        self._outgoing.send(parts, self._loop.time())
        self._has_served = True
        if keeps and skip:
            self._skip = skip
            self._enter(Phase.SKIP)
        elif keeps:
            self._next()
        else:
            self._enter(Phase.LINGER)
            self._outgoing.close(is_all_read=skip == 0)

    def _next(self) -> None:
        """Look at the next request, if the client has taken the last answer."""
        self._enter(Phase.SEND if self._outgoing.is_paused else Phase.HEAD)
        if self._phase is Phase.SEND:
            return
        if self._ends or (self._connections.is_draining and not self._waiting):
            self._enter(Phase.LINGER)
            self._transport.close()
        elif self._waiting:
            waiting, self._waiting = self._waiting, b""
            self._transport.resume_reading()
            self._take(memoryview(waiting))

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._watch.end()
        self._since = self._loop.time()

    # What the list of connections calls.

    @property
    def idle_since(self) -> float | None:
        """Time since when it has waited for its client; None: closing it would be noticed."""
        match self._phase:
            case Phase.HEAD if not self._waiting:
                return self._since
            case Phase.HEAD | Phase.LINGER if self._loop.time() - self._since > _PATIENCE:
                return self._since if not self._outgoing.unsent else None
        return None

    def look(self, now: float) -> None:
        """End the connection if its client takes too long."""
        waited, limits = now - self._since, self._limits
        match self._phase:
            case Phase.HEAD if self._waiting and waited > limits.head:
                self._send(failed(passed("The request's head took too long.")))
            case Phase.HEAD if not self._waiting and waited > (
                limits.idle if self._has_served else limits.head
            ):
                self._transport.close()
            case Phase.BODY if self._body is not None and self._admitted is not None:
                came, length = self._body.filled, self._admitted.framing.length
                if waited > limits.body_idle or is_too_slow(came, length or came, now - self._began, limits):
                    self._body = None
                    failure = passed("The request's body took too long.")
                    self._send(self._handler.refused(self._admitted.target, failure), skip=None)
            case Phase.SEND | Phase.LINGER if self._outgoing.is_stuck(now):
                self._transport.abort()
            case Phase.SKIP | Phase.LINGER if waited > limits.linger and not self._outgoing.unsent:
                self._transport.abort()

    def end(self, *, now: bool) -> None:
        """End the connection: ``now``, or when it has finished what was begun."""
        if now:
            self._transport.abort()
        elif self._phase is Phase.HEAD and not self._waiting:
            self._transport.close()
        else:
            self._ends = True
