"""A channel for the calls of a lane over ZeroMQ.  The application imports it only if it has such lanes."""

from __future__ import annotations

import contextlib
import select
from typing import ClassVar, Final

import zmq

from onnx_dl.concurrency import waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.protocol import codec, lane
from onnx_dl.system.owned_descriptors import keep_for_ever
from onnx_dl.transport import zeromq
from onnx_dl.transport.lane_socket import LaneSocket
from onnx_dl.transport.request_numbers import NUMBERS, encoded, wrong_reply
from onnx_dl.transport.zeromq import Context, Socket

_LOOK_EVERY: Final = 0.02
"""Seconds between two looks of a greenlet at a ZeroMQ socket."""
_ON_THE_UNIX_SOCKET: Final = b""


class ZmqChannel:
    """One end of a ZeroMQ PAIR socket.  An empty message says that the real one lies on the Unix socket,
    because it is long or comes with blocks.  The first byte of a reply is the number of its request."""

    over_zmq: ClassVar[bool] = True

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
        data = encoded(message)
        if not self._lane_socket.fits(data):
            if not self._lane_socket.send(data):
                return False
            data = _ON_THE_UNIX_SOCKET
        return self.post(data)

    def post(self, data: bytes) -> bool:
        """Send one ZeroMQ message for the present request."""
        if not self._is_caller:
            data = bytes([self.number % NUMBERS]) + data
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
            if not data or data[0] != self.number % NUMBERS:
                raise wrong_reply(data[0] if data else -1, self.number)
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

    def repeat(self, number: int) -> codec.Message | int | None:
        return self.next() if self.replay(number) else None

    def send_same(self) -> None:
        self.send(lane.SameResult())

    def close(self) -> None:
        if self._lane_socket.channel.is_lost:  # so are the socket's own: ZeroMQ would use their numbers
            keep_for_ever(self._socket)
        else:
            self._socket.close()


def listening(lane_socket: LaneSocket, ctx: Context, address: str) -> ZmqChannel:
    """Return the caller's end, to which the worker connects.  Raises like :func:`.zeromq.pair_listener`."""
    return ZmqChannel(lane_socket, zeromq.pair_listener(ctx, address), is_caller=True)
