"""Channels for the calls of a lane: a bell with messages on the Unix socket, or ZeroMQ.

The meaning of the messages is :mod:`onnx_dl.transport.client_lane`'s and the worker's.
"""

from __future__ import annotations

import contextlib
import select
from typing import Final, Protocol

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
"""Lowest bit of a worker's ring: the reply lies on the socket, or is SameResult."""
REQUEST, REPLAY = 1, 2
"""A caller's ring: a request lies on the socket; from 2 on, Replay of plan number - 2."""
_NUMBERS: Final = 128
"""A reply carries the number of its request modulo this.  Only one request is under way at a time."""
_LOOK_EVERY: Final = 0.02
"""Seconds between two looks of a greenlet at a ZeroMQ socket."""
_ON_THE_UNIX_SOCKET: Final = b""


class CallChannel(Protocol):
    """A way for requests and replies.  Each reply says which request it answers."""

    def send(self, message: codec.Message | bytes) -> bool:
        """Sends; false if the peer is known to be gone.  Otherwise that shows at the next :meth:`next`."""

    def next(self, timeout: float | None = None) -> codec.Message | int | None:
        """The next message, or the number that stands for one; None if the peer is gone.

        Raises:
            TimeoutError: none came for ``timeout`` seconds.
            ProtocolError: it is not a message, or it answers another request.
        """

    def close(self) -> None: ...


class ClosedChannel:
    """Channel of a closed lane.  It sends nothing, so that a call is seen as not begun."""

    def send(self, message: codec.Message | bytes) -> bool:
        return False

    def next(self, timeout: float | None = None) -> None:
        return None

    def replay(self, number: int) -> bool:
        return False

    def send_same(self) -> None:
        pass

    def close(self) -> None:
        pass


class CallerBellChannel:
    """The caller's end of a bell.  Messages lie on the Unix socket; the bell announces or replaces them."""

    def __init__(self, handover: Handover, bell: CallerBell) -> None:
        self._handover = handover
        self.bell = bell
        self.number = 0
        """Number of the present request, from 1 on."""

    def send(self, message: codec.Message | bytes) -> bool:
        self.number += 1
        return self._handover.send(_encoded(message)) and self.bell.ring(REQUEST)

    def replay(self, number: int) -> bool:
        """Sends Replay of this plan with nothing moved."""
        self.number += 1
        return self.bell.ring(REPLAY + number)

    def next(self, timeout: float | None = None) -> codec.Message | int | None:
        rung = self.bell.wait(timeout)
        if rung is None:
            return None
        if rung >> 1 != self.number % _NUMBERS:
            raise _wrong_reply(rung >> 1, self.number)
        return SAME if rung & SAME else self._handover.next()

    def close(self) -> None:
        self.bell.close()


class WorkerBellChannel:
    """The worker's end of a bell."""

    def __init__(self, handover: Handover, bell: WorkerBell) -> None:
        self._handover = handover
        self.bell = bell
        self.number = 0
        """Number of the present request, from 1 on."""

    def send(self, message: codec.Message | bytes) -> bool:
        return self._handover.send(_encoded(message)) and self.ring()

    def ring(self) -> bool:
        """Announces what lies on the socket as the reply to the present request."""
        return self.bell.ring(self.number % _NUMBERS << 1 | REPLY)

    def send_same(self) -> None:
        """Sends SameResult."""
        self.bell.ring(self.number % _NUMBERS << 1 | SAME)

    def next(self, timeout: float | None = None) -> codec.Message | int | None:
        number = self.bell.wait(timeout)
        self.number += 1
        return number if number != REQUEST else self._handover.next()

    def close(self) -> None:
        self.bell.close()


class ZmqChannel:
    """One end of a ZeroMQ PAIR socket.  An empty message says that the real one lies on the Unix socket,
    because it is long or comes with blocks.  The first byte of a reply is the number of its request."""

    def __init__(self, handover: Handover, socket: Socket, *, is_caller: bool) -> None:
        self._handover = handover
        self._socket = socket
        self._is_caller = is_caller
        self._read = lane.lane_reply if is_caller else lane.lane_request
        self.number = 0
        """Number of the present request, from 1 on."""
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        # Without POLLIN: a message that lies there is not looked at before the empty one has come.
        self._poller.register(handover.channel.fileno(), zmq.POLLERR)

    def send(self, message: codec.Message | bytes) -> bool:
        self.number += self._is_caller
        data = _encoded(message)
        if not self._handover.fits(data):
            if not self._handover.send(data):
                return False
            data = _ON_THE_UNIX_SOCKET
        return self.post(data)

    def post(self, data: bytes) -> bool:
        """Sends one ZeroMQ message for the present request."""
        if not self._is_caller:
            data = bytes([self.number % _NUMBERS]) + data
        if not self._handover.channel.is_ours():
            return False
        # zmq.Again: a PAIR socket without a peer would wait for ever.  Terminated: this process exits.
        with contextlib.suppress(zmq.Again, zmq.ContextTerminated):
            self._socket.send(data, zmq.NOBLOCK)
            return True
        return False

    def next(self, timeout: float | None = None) -> codec.Message | int | None:
        try:
            data = self._next(timeout)
        except zmq.ContextTerminated:  # the supervisor died, and the worker with it
            return None
        if data is None:
            return None
        if self._is_caller:
            if not data or data[0] != self.number % _NUMBERS:
                raise _wrong_reply(data[0] if data else -1, self.number)
            data = data[1:]
        else:
            self.number += 1
        message: codec.Message | None = self._read(data) if data else self._handover.next()
        return message

    def _next(self, timeout: float | None) -> bytes | None:
        ready = self._ready(timeout)
        if not self._handover.channel.is_ours():
            return None
        if self._socket in ready:
            return self._socket.recv()
        if not ready:
            raise TimeoutError("nobody answered in time")
        try:  # EOF on the Unix socket can overtake the peer's last message
            return self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _ready(self, timeout: float | None) -> dict[object, int]:
        ready: dict[object, int] = {}
        if waits.hub() is None:
            return sockets.wait(self._poller, timeout) if self._handover.channel.is_ours() else ready
        limit = Deadline(timeout)
        # Checked each time: the greenlet may find itself in a forked child, which must not use the socket.
        while self._handover.channel.is_ours():
            if (ready := sockets.wait(self._poller, 0)) or limit.passed:
                break
            # ZeroMQ's descriptor signals changes only, and nothing of the other one that the poller has.
            waits.ready(int(self._socket.getsockopt(zmq.FD)), select.POLLIN, limit.left(_LOOK_EVERY))
        return ready

    def replay(self, number: int) -> bool:
        return self.send(lane.Replay(plan=number))

    def send_same(self) -> None:
        self.send(lane.SameResult())

    def close(self) -> None:
        if self._handover.channel.is_lost:  # so are the socket's own: ZeroMQ would use their numbers
            keep_for_ever(self._socket)
        else:
            self._socket.close()


def _encoded(message: codec.Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else codec.encode(message)


def _wrong_reply(answered: int, asked: int) -> ProtocolError:
    """Error for a reply that comes twice or too late: it is not the reply to the next request."""
    return ProtocolError(f"A worker answered request {answered} of a lane instead of {asked % _NUMBERS}.")


CallerChannel = CallerBellChannel | ZmqChannel
WorkerChannel = WorkerBellChannel | ZmqChannel
