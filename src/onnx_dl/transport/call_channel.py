"""How requests and replies travel on a lane: by a bell, with messages on the Unix socket, or over ZeroMQ.

What they mean is :mod:`onnx_dl.transport.client_lane`'s.
"""

from __future__ import annotations

import contextlib
import select
from typing import Any, Final, Protocol

import zmq

from onnx_dl.concurrency import waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, lane
from onnx_dl.system.owned_descriptors import keep_for_ever
from onnx_dl.transport import sockets
from onnx_dl.transport.doorbell import CallerBell, WorkerBell
from onnx_dl.transport.lane_socket import Handover
from onnx_dl.transport.sockets import Socket

REPLY, SAME = 0, 1
"""What a worker rings, beside the number of the request: a reply lies on the socket; the answer is Same."""
REQUEST, AGAIN = 1, 2
"""What a caller rings: a request lies on the socket; from 2 on, Again with that number less 2."""
_NUMBERS: Final = 128
"""A reply tells the number of its request, less multiples of this.  One is under way at a time."""
_LOOK_EVERY: Final = 0.02
"""Seconds between two looks of a greenlet at a ZeroMQ socket."""


class Calls(Protocol):
    """How requests and replies travel.  Each reply tells which request it is for."""

    def send(self, message: codec.Message | bytes) -> bool:
        """Sends; false if the peer is known to be gone, else that shows when the next message is awaited."""

    def next(self, timeout: float | None = None) -> Any:
        """The next message; None if the peer is gone.  Some are told by a number only.

        Raises:
            TimeoutError: none came for ``timeout`` seconds.
            ProtocolError: it is none, or answers another request.
        """

    def again(self, number: int) -> bool:
        """Sends Again, with nothing moved."""

    def same(self) -> None:
        """Sends Same."""

    def close(self) -> None: ...


class NoCalls:
    """Of a lane that is closed: nothing is sent, so that whoever uses it still finds its call not begun.

    Its descriptors may belong to others by now.
    """

    def send(self, message: codec.Message | bytes) -> bool:
        return False

    def next(self, timeout: float | None = None) -> Any:
        return None

    def again(self, number: int) -> bool:
        return False

    def same(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Bell:
    """Messages lie on the Unix socket; the bell says so, or spares them."""

    def __init__(self, handover: Handover, bell: CallerBell | WorkerBell) -> None:
        self._handover = handover
        self.bell = bell
        self.number = 0
        """Of the present request, from 1 on."""

    def send(self, message: codec.Message | bytes) -> bool:
        sent = self._handover.send(message if isinstance(message, bytes) else codec.encode(message))
        return sent and self._ring()

    def _ring(self) -> bool:
        raise NotImplementedError

    def close(self) -> None:
        self.bell.close()


class CallerBellCalls(_Bell):
    """The caller's end."""

    def send(self, message: codec.Message | bytes) -> bool:
        self.number += 1
        return super().send(message)

    def _ring(self) -> bool:
        return self.bell.ring(REQUEST)

    def next(self, timeout: float | None = None) -> Any:
        rung = self.bell.wait(timeout)
        if rung is None:
            return None
        if rung >> 1 != self.number % _NUMBERS:
            raise _another(rung >> 1, self.number)
        return SAME if rung & SAME else self._handover.next()

    def again(self, number: int) -> bool:
        self.number += 1
        return self.bell.ring(AGAIN + number)

    def same(self) -> None:
        raise NotImplementedError


class WorkerBellCalls(_Bell):
    """The worker's end."""

    def next(self, timeout: float | None = None) -> Any:
        number = self.bell.wait(timeout)
        self.number += 1
        return number if number != REQUEST else self._handover.next()

    def _ring(self) -> bool:
        return self.bell.ring(self.number % _NUMBERS << 1 | REPLY)

    def same(self) -> None:
        self.bell.ring(self.number % _NUMBERS << 1 | SAME)

    def again(self, number: int) -> bool:
        raise NotImplementedError


class ZmqCalls:
    """Messages go over a ZeroMQ PAIR socket; an empty one says that the message lies on the Unix socket,
    because it is long or something is to be said of blocks.  The first byte of a reply is the number of its
    request."""

    def __init__(self, handover: Handover, socket: Socket, *, calls: bool) -> None:
        """``calls``: this is the caller's end."""
        self._handover = handover
        self._socket = socket
        self._calls = calls
        self._read = lane.lane_reply if calls else lane.lane_request
        self.number = 0
        """Of the present request, from 1 on."""
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        # Without POLLIN: a message that lies there is not looked at before the empty one has come.
        self._poller.register(handover.channel.fileno(), zmq.POLLERR)

    def send(self, message: codec.Message | bytes) -> bool:
        self.number += self._calls
        data = message if isinstance(message, bytes) else codec.encode(message)
        if not self._handover.fits(data):
            if not self._handover.send(data):
                return False
            data = _ON_THE_UNIX_SOCKET
        return self._tell(data)

    def _tell(self, data: bytes) -> bool:
        if not self._calls:
            data = bytes([self.number % _NUMBERS]) + data
        if not self._handover.channel.is_ours():
            return False
        # Again: a PAIR socket without a peer would wait for ever.  Terminated: this process leaves.
        with contextlib.suppress(zmq.Again, zmq.ContextTerminated):
            self._socket.send(data, zmq.NOBLOCK)
            return True
        return False

    def next(self, timeout: float | None = None) -> Any:
        try:
            data = self._next(timeout)
        except zmq.ContextTerminated:  # the supervisor died, and the worker with it
            return None
        if data is None:
            return None
        if self._calls:
            if not data or data[0] != self.number % _NUMBERS:
                raise _another(data[0] if data else -1, self.number)
            data = data[1:]
        else:
            self.number += 1
        return self._read(data) if data else self._handover.next()

    def _next(self, timeout: float | None) -> bytes | None:
        ready = self._ready(timeout)
        if not self._handover.channel.is_ours():
            return None
        if self._socket in ready:
            return self._socket.recv()
        if ready:
            return _last_words(self._socket)
        raise TimeoutError("nobody answered in time")

    def _ready(self, timeout: float | None) -> dict[object, int]:
        ready: dict[object, int] = {}
        if waits.hub() is None:
            return sockets.wait(self._poller, timeout) if self._handover.channel.is_ours() else ready
        limit = Deadline(timeout)
        # Looked at each time: the greenlet may find itself in a forked child, which must not use the socket.
        while self._handover.channel.is_ours():
            if (ready := sockets.wait(self._poller, 0)) or limit.passed:
                break
            # ZeroMQ's descriptor tells of changes only, and nothing of the other one that the poller has.
            waits.ready(int(self._socket.getsockopt(zmq.FD)), select.POLLIN, limit.left(_LOOK_EVERY))
        return ready

    def again(self, number: int) -> bool:
        return self.send(lane.Again(plan=number))

    def same(self) -> None:
        self.send(lane.Same())

    def close(self) -> None:
        if self._handover.channel.is_lost:  # so are the socket's own: ZeroMQ would use their numbers
            keep_for_ever(self._socket)
        else:
            self._socket.close()


def _another(answered: int, asked: int) -> ProtocolError:
    """What a worker says twice or too late must not be taken for the answer to the next request."""
    return ProtocolError(f"A worker answered request {answered} of a lane instead of {asked % _NUMBERS}.")


_ON_THE_UNIX_SOCKET: Final = b""


def _last_words(socket: Socket) -> bytes | None:
    """What the peer sent before it went: EOF on one socket can overtake a message on the other."""
    try:
        return socket.recv(zmq.NOBLOCK)
    except zmq.Again:
        return None
