"""Channels for the calls of a lane: a bell with messages on the Unix socket, or ZeroMQ.

The meaning of the messages is :mod:`onnx_dl.transport.client_lane`'s and the worker's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
from typing import Final, Generic, TypeVar

import zmq

from onnx_dl.concurrency import waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, lane
from onnx_dl.system.owned_descriptors import keep_for_ever
from onnx_dl.transport import zeromq
from onnx_dl.transport.doorbell import CallerBell, WorkerBell
from onnx_dl.transport.lane_socket import LaneSocket
from onnx_dl.transport.zeromq import Socket

REPLY, SAME = 0, 1
"""Lowest bit of a worker's ring: the reply lies on the socket, or is SameResult."""
REQUEST, REPLAY = 1, 2
"""A caller's ring: a request lies on the socket; from 2 on, Replay of plan number - 2."""
_NUMBERS: Final = 128
"""A reply carries the number of its request modulo this.  Only one request is under way at a time."""
_LOOK_EVERY: Final = 0.02
"""Seconds between two looks of a greenlet at a ZeroMQ socket."""
_ON_THE_UNIX_SOCKET: Final = b""


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


@dataclasses.dataclass(slots=True, eq=False)
class CallerBellChannel:
    """The caller's end of a bell.  Messages lie on the Unix socket; the bell announces or replaces them."""

    _lane_socket: LaneSocket
    bell: CallerBell
    number: int = 0
    """Number of the present request, from 1 on."""

    def send(self, message: codec.Message | bytes) -> bool:
        """Send; false if the peer is known to be gone.  Otherwise that shows at the next :meth:`next`."""
        self.number += 1
        return self._lane_socket.send(_encoded(message)) and self.bell.ring(REQUEST)

    def replay(self, number: int) -> bool:
        """Send Replay of this plan with nothing moved."""
        self.number += 1
        return self.bell.ring(REPLAY + number)

    def next(self, timeout: float | None = None) -> codec.Message | int | None:
        """Return the next message, or the number that stands for one; None if the peer is gone.

        Raises:
            TimeoutError: none came for ``timeout`` seconds.
            ProtocolError: it is not a message, or it answers another request.
        """
        rung = self.bell.wait(timeout)
        if rung is None:
            return None
        if rung >> 1 != self.number % _NUMBERS:
            raise _wrong_reply(rung >> 1, self.number)
        return SAME if rung & SAME else self._lane_socket.next()

    def close(self) -> None:
        self.bell.close()


@dataclasses.dataclass(slots=True, eq=False)
class WorkerBellChannel:
    """The worker's end of a bell; see :class:`CallerBellChannel`."""

    _lane_socket: LaneSocket
    bell: WorkerBell
    number: int = 0
    """Number of the present request, from 1 on."""

    def send(self, message: codec.Message | bytes) -> bool:
        return self._lane_socket.send(_encoded(message)) and self.ring()

    def ring(self) -> bool:
        """Announce what lies on the socket as the reply to the present request."""
        return self.bell.ring(self.number % _NUMBERS << 1 | REPLY)

    def send_same(self) -> None:
        """Send SameResult."""
        self.bell.ring(self.number % _NUMBERS << 1 | SAME)

    def next(self, timeout: float | None = None) -> codec.Message | int | None:
        number = self.bell.wait(timeout)
        self.number += 1
        return number if number != REQUEST else self._lane_socket.next()

    def close(self) -> None:
        self.bell.close()


class ZmqChannel:
    """One end of a ZeroMQ PAIR socket.  An empty message says that the real one lies on the Unix socket,
    because it is long or comes with blocks.  The first byte of a reply is the number of its request."""

    def __init__(self, lane_socket: LaneSocket, socket: Socket, *, is_caller: bool) -> None:
        self._lane_socket = lane_socket
        self._socket = socket
        self._is_caller = is_caller
        self._read = lane.lane_reply if is_caller else lane.lane_request
        self.number = 0
        """Number of the present request, from 1 on."""
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        # Without POLLIN: a message that lies there is not looked at before the empty one has come.
        self._poller.register(lane_socket.channel.fileno(), zmq.POLLERR)

    def send(self, message: codec.Message | bytes) -> bool:
        self.number += self._is_caller
        data = _encoded(message)
        if not self._lane_socket.fits(data):
            if not self._lane_socket.send(data):
                return False
            data = _ON_THE_UNIX_SOCKET
        return self.post(data)

    def post(self, data: bytes) -> bool:
        """Send one ZeroMQ message for the present request."""
        if not self._is_caller:
            data = bytes([self.number % _NUMBERS]) + data
        if not self._lane_socket.channel.is_ours():
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
        message: codec.Message | None = self._read(data) if data else self._lane_socket.next()
        return message

    def _next(self, timeout: float | None) -> bytes | None:
        ready = self._ready(timeout)
        if not self._lane_socket.channel.is_ours():
            return None
        if self._socket in ready:
            return self._socket.recv()
        if not ready:
            raise TimeoutError("there was no answer in time")
        try:  # EOF on the Unix socket can overtake the peer's last message
            return self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _ready(self, timeout: float | None) -> dict[object, int]:
        ready: dict[object, int] = {}
        if waits.hub() is None:
            return zeromq.wait(self._poller, timeout) if self._lane_socket.channel.is_ours() else ready
        limit = Deadline(timeout)
        # Checked each time: the greenlet may find itself in a forked child, which must not use the socket.
        while self._lane_socket.channel.is_ours():
            if (ready := zeromq.wait(self._poller, 0)) or limit.passed:
                break
            # ZeroMQ's descriptor signals changes only, and nothing of the other one that the poller has.
            waits.ready(int(self._socket.getsockopt(zmq.FD)), select.POLLIN, limit.left(_LOOK_EVERY))
        return ready

    def replay(self, number: int) -> bool:
        return self.send(lane.Replay(plan=number))

    def send_same(self) -> None:
        self.send(lane.SameResult())

    def close(self) -> None:
        if self._lane_socket.channel.is_lost:  # so are the socket's own: ZeroMQ would use their numbers
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
_Channel = TypeVar("_Channel", bound=CallerChannel | WorkerChannel)


class Lane(Generic[_Channel]):
    """One end, used by one thread at a time.  Calls go over the Unix socket with a bell that wakes the peer,
    or over a ZeroMQ socket beside it."""

    def __init__(self, lane_socket: LaneSocket, calls: _Channel) -> None:
        self._lane_socket = lane_socket
        self.arena = lane_socket.arena
        self.mappings = lane_socket.mappings
        self._calls: _Channel | ClosedChannel = calls
        self.over_zmq = isinstance(calls, ZmqChannel)

    def close_calls(self) -> None:
        """End the calls.  The owner of the Unix socket closes that."""
        self._calls.close()

    def close(self) -> None:
        """End the lane.  Arrays that lie in its blocks stay valid.  May be called twice."""
        calls, self._calls = self._calls, ClosedChannel()
        calls.close()
        self._lane_socket.channel.close()
