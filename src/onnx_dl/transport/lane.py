"""One caller's way to one worker.

A lane is a Unix socket, over which both sides hand each other blocks of shared memory and see each other die,
and a ZeroMQ PAIR socket, over which calls go back and forth.  One call is on a lane at a time; concurrent
callers have a lane each.  What is called, and what to do when a lane breaks, is not known here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any, Final

import zmq

from onnx_dl.config import fresh_address
from onnx_dl.errors import ProtocolError
from onnx_dl.transport import messages as m
from onnx_dl.transport import sockets
from onnx_dl.transport.arena import Arena, Block, Mappings
from onnx_dl.transport.sockets import Channel, Context, Socket
from onnx_dl.transport.tensors import VIEW_FROM, Packer, Unpacker

_HANDOVER: Final = 10.0
"""Seconds within which a block must arrive that a message names; its sender sent it before the message."""


class _Handover:
    """Blocks of both directions: announces ours, maps the peer's.

    It knows neither lane nor arena, so that these are freed with their memory as soon as nobody uses them,
    and not when the garbage collector finds a cycle.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.mappings = Mappings()

    def shared(self, block: int, size: int, fd: int) -> None:
        self._channel.send(m.encode(m.BlockShared(block=block, size=size)), (fd,))

    def dropped(self, block: int) -> None:
        self._channel.send(m.encode(m.BlockDropped(block=block)))

    def read(self, timeout: float) -> bool:
        """Takes in one message about blocks; false if the peer is gone."""
        received = self._channel.receive(timeout)
        if received is None:
            return False
        data, fds = received
        message = m.on_lane_socket(data)
        if isinstance(message, m.BlockShared) and fds:
            self.mappings.add(message.block, message.size, fds[0])
        elif isinstance(message, m.BlockDropped):
            self.mappings.drop(message.block)
        return True

    def block(self, number: int) -> Block:
        """A block of the peer, which it announced before it named it."""
        while (block := self.mappings.get(number)) is None:
            try:
                alive = self.read(_HANDOVER)
            except TimeoutError:
                alive = False
            if not alive:
                raise ProtocolError(f"A message names block {number}, which its sender never handed over.")
        return block


class _Lane:
    """What both ends have in common.  Used by one thread at a time."""

    def __init__(self, channel: Channel, socket: Socket) -> None:
        self._channel = channel
        self._socket = socket
        self._blocks = _Handover(channel)
        self._arena = Arena(self._blocks)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(channel.fileno(), zmq.POLLIN)

    def close(self) -> None:
        """Ends the lane.  Arrays that lie in its blocks stay valid."""
        self._socket.close()
        self._channel.close()

    def _send(self, message: m.Message) -> None:
        self._socket.send(m.encode(message))

    def _receive(self, timeout: float | None = None) -> bytes | None:
        """The next message; None when the peer is gone, or the time is up."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            ready = sockets.wait(self._poller, left)
            if self._socket in ready:
                return self._socket.recv()
            if not ready or not self._blocks.read(0):
                return self._last_words()

    def _last_words(self) -> bytes | None:
        """What the peer sent before it went: EOF on one socket can overtake a message on the other."""
        try:
            return self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None


class ClientLane(_Lane):
    """The caller's end."""

    def __init__(self, ctx: Context, granted: m.Granted, timeout: float) -> None:
        """Opens a lane to the worker that was granted.

        Raises:
            OSError: the worker is gone, or did not answer within ``timeout`` seconds.
        """
        self.granted = granted
        channel = Channel.connect(granted.address, timeout)
        reply_to = fresh_address("lane")
        try:
            super().__init__(channel, sockets.pair_listener(ctx, reply_to))
        except zmq.ZMQError as error:  # the connection to the supervisor ended meanwhile
            channel.close()
            raise ConnectionError(str(error)) from error
        try:
            self._page = self._open(granted.secret, reply_to, timeout)
        except BaseException:
            self.close()
            raise
        self._unpacker = Unpacker(self._blocks.block, copy=True)

    def _open(self, secret: str, reply_to: str, timeout: float) -> Block:
        hello = m.LaneHello(version=m.PROTOCOL_VERSION, secret=secret, reply_to=reply_to)
        self._channel.send(m.encode(hello))
        page = self._arena.page()
        try:
            answer = self._receive(timeout)
        except zmq.ContextTerminated:
            answer = None
        if answer is None:
            raise ConnectionError("the worker did not open the lane")
        opened = m.lane_reply(answer)
        if not (isinstance(opened, m.LaneOpen) and secrets.compare_digest(opened.secret, secret)):
            raise ProtocolError("Another process than the worker answered on a lane.")
        return page

    def pack(self, values: Iterable[Any]) -> list[m.Value]:
        """Copies the arrays in ``values`` to where the worker sees them; see :class:`Packer`."""
        return Packer(self._arena).pack(values)

    def exchange(self, message: m.Call | m.Invoke | m.Touch | m.Hold | m.Unhold) -> Any:
        """Sends a request and waits for its reply; None if the worker went without one.

        An exception, KeyboardInterrupt included, leaves the lane unusable: close it.
        """
        try:
            self._send(message)
            answer = self._receive()
        except zmq.ContextTerminated:  # the supervisor died, and the worker with it
            answer = None
        return None if answer is None else m.lane_reply(answer)

    def is_dead(self) -> bool:
        """Whether the worker is gone; does not wait."""
        while self._channel.readable():
            if not self._blocks.read(0):
                return True
        return False

    def unpack(self, value: m.Value) -> Any:
        """The result of a call: small arrays are copies, large ones views that keep their memory alive."""
        return self._unpacker.unpack(value)

    def touch(self) -> None:
        """Leaves the time of a use where the worker looks before its TTL ends it.  Costs no message."""
        self._page.clock = time.monotonic_ns()


class WorkerLane(_Lane):
    """The worker's end."""

    def __init__(self, ctx: Context, channel: Channel, secret: str, timeout: float) -> None:
        """Answers a caller who connected.

        Raises:
            ProtocolError: the caller does not know the secret or speaks another version.
            TimeoutError: the caller said nothing for ``timeout`` seconds.
        """
        received = channel.receive(timeout)
        hello = m.on_lane_socket(received[0]) if received else None
        if not (isinstance(hello, m.LaneHello) and secrets.compare_digest(hello.secret, secret)):
            raise ProtocolError("Somebody without the secret tried to open a lane.")
        if hello.version != m.PROTOCOL_VERSION:
            raise ProtocolError(f"A caller speaks protocol version {hello.version}.")
        super().__init__(channel, sockets.pair(ctx, hello.reply_to))
        self._send(m.LaneOpen(secret=secret))
        self._unpacker = Unpacker(self._blocks.block, copy=False)

    def receive(self) -> Any:
        """The next request; None when the caller is gone."""
        data = self._receive()
        return None if data is None else m.lane_request(data)

    def unpack(self, value: m.Value) -> Any:
        """A value of a request; its arrays are views, valid until the reply is sent."""
        return self._unpacker.unpack(value)

    def reply(self, value: Any) -> None:
        """Sends a result; large arrays in it are leased to the caller.

        Raises:
            Exception: the value cannot be sent; nothing was.
        """
        packer = Packer(self._arena, lease_from=VIEW_FROM)
        (packed,) = packer.pack([value])
        try:
            self._send(m.Result(value=packed))
        except BaseException:
            packer.abandon()
            raise

    def say(self, message: m.CallFailed | m.Draining) -> None:
        """Sends a reply that carries no value."""
        self._send(message)

    def last_touch(self) -> float:
        """When the caller last left the time of a use, in monotonic seconds; 0.0 if never."""
        return self._blocks.mappings.clock() / 1e9
