"""How requests and replies travel on a lane: by a bell, with messages on the Unix socket, or over ZeroMQ.

What they mean is :mod:`onnx_dl.transport.lane`'s.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final, Protocol

import zmq

from onnx_dl.owned import keep_for_ever
from onnx_dl.transport import messages as m
from onnx_dl.transport import sockets
from onnx_dl.transport.bell import CallerBell, WorkerBell
from onnx_dl.transport.handover import Handover
from onnx_dl.transport.sockets import Socket

REPLY, SAME = 0, 1
"""What a worker rings: a reply lies on the socket; the answer is Same."""
REQUEST, AGAIN = 1, 2
"""What a caller rings: a request lies on the socket; from 2 on, Again with that number less 2."""


class Calls(Protocol):
    """How requests and replies travel."""

    def send(self, message: m.Message | bytes) -> bool:
        """Sends; false if the peer is known to be gone, else that shows when the next message is awaited."""

    def next(self, timeout: float | None = None) -> Any:
        """The next message; None if the peer is gone.  Some are told by a number only.

        Raises:
            TimeoutError: none came for ``timeout`` seconds.
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

    def send(self, message: m.Message | bytes) -> bool:
        return False

    def next(self, timeout: float | None = None) -> Any:
        return None

    def again(self, number: int) -> bool:
        return False

    def same(self) -> None:
        pass

    def close(self) -> None:
        pass


class BellCalls:
    """Messages lie on the Unix socket; the bell says so, or spares them."""

    def __init__(self, handover: Handover, bell: CallerBell | WorkerBell, *, rings: int, hears: int) -> None:
        """``rings``, ``hears``: the numbers by which this and the other end say that a message lies there."""
        self._handover = handover
        self.bell = bell
        self._rings = rings
        self._hears = hears

    def send(self, message: m.Message | bytes) -> bool:
        sent = self._handover.send(message if isinstance(message, bytes) else m.encode(message))
        return sent and self.bell.ring(self._rings)

    def next(self, timeout: float | None = None) -> Any:
        number = self.bell.wait(timeout)
        return number if number != self._hears else self._handover.next()

    def again(self, number: int) -> bool:
        return self.bell.ring(AGAIN + number)

    def same(self) -> None:
        self.bell.ring(SAME)

    def close(self) -> None:
        self.bell.close()


class ZmqCalls:
    """Messages go over a ZeroMQ PAIR socket; an empty one says that the message lies on the Unix socket,
    because it is long or something is to be said of blocks."""

    def __init__(self, handover: Handover, socket: Socket, read: m.Reader) -> None:
        self._handover = handover
        self._socket = socket
        self._read = read
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        # Without POLLIN: a message that lies there is not looked at before the empty one has come.
        self._poller.register(handover.channel.fileno(), zmq.POLLERR)

    def send(self, message: m.Message | bytes) -> bool:
        data = message if isinstance(message, bytes) else m.encode(message)
        if not self._handover.fits(data):
            if not self._handover.send(data):
                return False
            data = _ON_THE_UNIX_SOCKET
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
        return self._read(data) if data else self._handover.next()

    def _next(self, timeout: float | None) -> bytes | None:
        if not self._handover.channel.is_ours():
            return None
        ready = sockets.wait(self._poller, timeout)
        if self._socket in ready:
            return self._socket.recv()
        if ready:
            return _last_words(self._socket)
        raise TimeoutError("nobody answered in time")

    def again(self, number: int) -> bool:
        return self.send(m.Again(plan=number))

    def same(self) -> None:
        self.send(m.Same())

    def close(self) -> None:
        if self._handover.channel.is_ours():
            self._socket.close()
        else:  # its descriptors are gone, too: ZeroMQ would use their numbers
            keep_for_ever(self._socket)


_ON_THE_UNIX_SOCKET: Final = b""


def _last_words(socket: Socket) -> bytes | None:
    """What the peer sent before it went: EOF on one socket can overtake a message on the other."""
    try:
        return socket.recv(zmq.NOBLOCK)
    except zmq.Again:
        return None
