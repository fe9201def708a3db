"""Channels for the calls of a lane: a bell with messages on the Unix socket, or ZeroMQ.

The meaning of the messages is :mod:`onnx_dl.transport.client_lane`'s and the worker's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar, Union

from onnx_dl.protocol import codec
from onnx_dl.transport.doorbell import CallerBell, WorkerBell
from onnx_dl.transport.lane_socket import LaneSocket
from onnx_dl.transport.request_numbers import NUMBERS, encoded, wrong_reply

if TYPE_CHECKING:
    from onnx_dl.transport.zmq_channel import ZmqChannel

REPLY, SAME = 0, 1
"""Lowest bit of a worker's ring: the reply lies on the socket, or is SameResult."""
REQUEST, REPLAY = 1, 2
"""A caller's ring: a request lies on the socket; from 2 on, Replay of plan number - 2."""


class ClosedChannel:
    """Channel of a closed lane.  It sends nothing, so that a call is seen as not begun."""

    def send(self, message: codec.Message | bytes) -> bool:
        return False

    def next(self, timeout: float | None = None) -> None:
        return None

    def replay(self, number: int) -> bool:
        return False

    def repeat(self, number: int) -> None:
        return None

    def send_same(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclasses.dataclass(slots=True, eq=False)
class CallerBellChannel:
    """The caller's end of a bell.  Messages lie on the Unix socket; the bell announces or replaces them."""

    over_zmq: ClassVar[bool] = False
    _lane_socket: LaneSocket
    bell: CallerBell
    number: int = 0
    """Number of the present request, from 1 on."""

    def send(self, message: codec.Message | bytes) -> bool:
        """Send; false if the peer is known to be gone.  Otherwise that shows at the next :meth:`next`."""
        self.number += 1
        return self._lane_socket.send(encoded(message)) and self.bell.ring(REQUEST)

    def replay(self, number: int) -> bool:
        """Send Replay of this plan with nothing moved."""
        self.number += 1
        return self.bell.ring(REPLAY + number)

    def repeat(self, number: int) -> codec.Message | int | None:
        """Do :meth:`replay` and :meth:`next` in one step; None if the peer is gone or nothing was sent."""
        self.number = asked = self.number + 1
        bell = self.bell
        rung = bell.wait() if bell.ring(REPLAY + number) else None
        if rung is None:
            return None
        if rung >> 1 != asked % NUMBERS:
            raise wrong_reply(rung >> 1, asked)
        return SAME if rung & SAME else self._lane_socket.next()

    def next(self, timeout: float | None = None) -> codec.Message | int | None:
        """Return the next message, or the number that stands for one; None if the peer is gone.

        Raises:
            TimeoutError: none came for ``timeout`` seconds.
            ProtocolError: it is not a message, or it answers another request.
        """
        rung = self.bell.wait(timeout)
        if rung is None:
            return None
        if rung >> 1 != self.number % NUMBERS:
            raise wrong_reply(rung >> 1, self.number)
        return SAME if rung & SAME else self._lane_socket.next()

    def close(self) -> None:
        self.bell.close()


@dataclasses.dataclass(slots=True, eq=False)
class WorkerBellChannel:
    """The worker's end of a bell; see :class:`CallerBellChannel`."""

    over_zmq: ClassVar[bool] = False
    _lane_socket: LaneSocket
    bell: WorkerBell
    number: int = 0
    """Number of the present request, from 1 on."""

    def send(self, message: codec.Message | bytes) -> bool:
        return self._lane_socket.send(encoded(message)) and self.ring()

    def ring(self) -> bool:
        """Announce what lies on the socket as the reply to the present request."""
        return self.bell.ring(self.number % NUMBERS << 1 | REPLY)

    def send_same(self) -> None:
        """Send SameResult."""
        self.bell.ring(self.number % NUMBERS << 1 | SAME)

    def next(self, timeout: float | None = None) -> codec.Message | int | None:
        number = self.bell.wait(timeout)
        self.number += 1
        return number if number != REQUEST else self._lane_socket.next()

    def close(self) -> None:
        self.bell.close()


CallerChannel = Union[CallerBellChannel, "ZmqChannel"]
WorkerChannel = Union[WorkerBellChannel, "ZmqChannel"]
_Channel = TypeVar("_Channel", bound=CallerChannel | WorkerChannel)


class Lane(Generic[_Channel]):
    """One end, used by one thread at a time.  Calls go over the Unix socket with a bell that wakes the peer,
    or over a ZeroMQ socket beside it."""

    def __init__(self, lane_socket: LaneSocket, calls: _Channel) -> None:
        self._lane_socket = lane_socket
        self.arena = lane_socket.arena
        self.mappings = lane_socket.mappings
        self._calls: _Channel | ClosedChannel = calls
        self.over_zmq = calls.over_zmq

    def close_calls(self) -> None:
        """End the calls.  The owner of the Unix socket closes that."""
        self._calls.close()

    def close(self) -> None:
        """End the lane.  Arrays that lie in its blocks stay valid.  May be called twice."""
        calls, self._calls = self._calls, ClosedChannel()
        calls.close()
        self._lane_socket.channel.close()
