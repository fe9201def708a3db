"""One caller's way to one worker.

Both sides hand each other blocks of shared memory over a Unix socket, on which they also see each other die.
Calls go over the same socket, which wakes the peer in one step, or over a ZeroMQ PAIR socket beside it.  One
call is on a lane at a time; concurrent callers have a lane each.  What is called, and what to do when a lane
breaks, is not known here.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import zmq
from numpy.typing import NDArray

from onnx_dl.config import fresh_address
from onnx_dl.errors import ProtocolError
from onnx_dl.transport import messages as m
from onnx_dl.transport import sockets
from onnx_dl.transport.arena import Arena, Block, Mappings
from onnx_dl.transport.sockets import LONGEST, Channel, Context, Socket
from onnx_dl.transport.tensors import VIEW_FROM, Packer, Unpacker

_HANDOVER: Final = 10.0
"""Seconds within which a block must arrive that a message names; its sender sent it before the message."""


class _Handover:
    """The Unix socket of a lane, and the peer's blocks that came over it.

    It knows neither lane nor arena, so that these are freed with their memory as soon as nobody uses them,
    and not when the garbage collector finds a cycle.
    """

    def __init__(self, channel: Channel, read: m.Reader) -> None:
        self.channel = channel
        self.mappings = Mappings()
        self._read = read

    def shared(self, block: int, size: int, fd: int) -> None:
        self.channel.send(m.encode(m.BlockShared(block=block, size=size)), (fd,))

    def dropped(self, block: int) -> None:
        self.channel.send(m.encode(m.BlockDropped(block=block)))

    def send(self, message: m.Message) -> None:
        """Sends a message of any length.  That the peer is gone shows when its answer is awaited."""
        data = m.encode(message)
        if len(data) > LONGEST:
            self.channel.send(m.encode(m.Large(nbytes=len(data))))
            for start in range(0, len(data), LONGEST):
                self.channel.send(data[start : start + LONGEST])
        else:
            self.channel.send(data)

    def next(self, timeout: float | None) -> Any:
        """The next message, once blocks were taken in that came before it; None if the peer is gone.

        Raises:
            TimeoutError: nothing came within ``timeout`` seconds.
        """
        while (received := self.channel.receive(timeout)) is not None:
            data, fds = received
            message = self._read(data)
            if not self._take_in(message, fds):
                return self._large(message) if isinstance(message, m.Large) else message
        return None

    def _take_in(self, message: object, fds: list[int]) -> bool:
        """Whether it was about blocks."""
        if isinstance(message, m.BlockShared) and fds:
            self.mappings.add(message.block, message.size, fds[0])
        elif isinstance(message, m.BlockDropped):
            self.mappings.drop(message.block)
        else:
            sockets.close_all(fds)
            return False
        return True

    def _large(self, announced: m.Large) -> Any:
        data = bytearray()
        while len(data) < announced.nbytes:
            received = self.channel.receive(_HANDOVER)
            if received is None:
                return None
            data += received[0]
        return self._read(memoryview(data))

    def block(self, number: int) -> Block:
        """A block of the peer, which it announced before it named it."""
        while (block := self.mappings.get(number)) is None:
            try:
                received = self.channel.receive(_HANDOVER)
            except TimeoutError:
                received = None
            if received is None or not self._take_in(self._read(received[0]), received[1]):
                raise ProtocolError(f"A message names block {number}, which its sender never handed over.")
        return block

    def is_dead(self) -> bool:
        """Whether the peer is gone, once all that it said about blocks is taken in; does not wait."""
        while self.channel.readable():
            received = self.channel.receive(0)
            if received is None or not self._take_in(self._read(received[0]), received[1]):
                return True  # gone, or it said what nobody asked for: of no use either way
        return False


class _Lane:
    """What both ends have in common.  Used by one thread at a time.

    ``socket`` is the ZeroMQ socket that the calls go over; None: they go over the Unix socket.
    """

    def __init__(self, channel: Channel, socket: Socket | None, read: m.Reader) -> None:
        self._handover = _Handover(channel, read)
        self._arena = Arena(self._handover)
        self._socket = socket
        self._read = read
        if socket is not None:
            self._poller = zmq.Poller()
            self._poller.register(socket, zmq.POLLIN)
            self._poller.register(channel.fileno(), zmq.POLLIN)

    @property
    def over_zmq(self) -> bool:
        """Whether calls go over ZeroMQ."""
        return self._socket is not None

    def close(self) -> None:
        """Ends the lane.  Arrays that lie in its blocks stay valid."""
        if self._socket is not None:
            self._socket.close()
        self._handover.channel.close()

    def _send(self, message: m.Message) -> None:
        """Sends; that the peer is gone shows when the next message is awaited."""
        if self._socket is None:
            self._handover.send(message)
        else:
            # Again: a PAIR socket without a peer would wait for ever.  Terminated: this process leaves.
            with contextlib.suppress(zmq.Again, zmq.ContextTerminated):
                self._socket.send(m.encode(message), zmq.NOBLOCK)

    def _next(self, timeout: float | None = None) -> Any:
        """The next message of a call; None if the peer is gone or the time is up."""
        if self._socket is None:
            try:
                return self._handover.next(timeout)
            except TimeoutError:
                return None
        try:
            data = self._next_on_zmq(self._socket, timeout)
        except zmq.ContextTerminated:  # the supervisor died, and the worker with it
            return None
        return None if data is None else self._read(data)

    def _next_on_zmq(self, socket: Socket, timeout: float | None) -> bytes | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ready = sockets.wait(self._poller, None if deadline is None else deadline - time.monotonic())
            if socket in ready:
                return socket.recv()
            if not ready or self._handover.is_dead():
                return _last_words(socket)


def _last_words(socket: Socket) -> bytes | None:
    """What the peer sent before it went: EOF on one socket can overtake a message on the other."""
    try:
        return socket.recv(zmq.NOBLOCK)
    except zmq.Again:
        return None


class ClientLane(_Lane):
    """The caller's end."""

    def __init__(self, ctx: Context, granted: m.Granted, timeout: float, *, over_zmq: bool) -> None:
        """Opens a lane to the worker that was granted.

        Raises:
            OSError: the worker is gone, or did not answer within ``timeout`` seconds.
        """
        self.granted = granted
        channel = Channel.connect(granted.address, timeout)
        reply_to = fresh_address("lane") if over_zmq else None
        try:
            socket = None if reply_to is None else sockets.pair_listener(ctx, reply_to)
        except zmq.ZMQError as error:  # the connection to the supervisor ended meanwhile
            channel.close()
            raise ConnectionError(str(error)) from error
        super().__init__(channel, socket, m.lane_reply)
        try:
            self._page = self._open(granted.secret, reply_to, timeout)
        except BaseException:
            self.close()
            raise
        self._unpacker = Unpacker(self._handover.block, copy=True)

    def _open(self, secret: str, reply_to: str | None, timeout: float) -> Block:
        self._handover.send(m.LaneHello(version=m.PROTOCOL_VERSION, secret=secret, reply_to=reply_to))
        page = self._arena.page()
        opened = self._next(timeout)
        if opened is None:
            raise ConnectionError("the worker did not open the lane")
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
        self._send(message)
        return self._next()

    def is_dead(self) -> bool:
        """Whether the worker is gone; does not wait."""
        return self._handover.is_dead()

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
        hello = m.lane_request(received[0]) if received else None
        if not (isinstance(hello, m.LaneHello) and secrets.compare_digest(hello.secret, secret)):
            raise ProtocolError("Somebody without the secret tried to open a lane.")
        if hello.version != m.PROTOCOL_VERSION:
            raise ProtocolError(f"A caller speaks protocol version {hello.version}.")
        socket = None if hello.reply_to is None else sockets.pair(ctx, hello.reply_to)
        super().__init__(channel, socket, m.lane_request)
        self._send(m.LaneOpen(secret=secret))
        self._unpacker = Unpacker(self._handover.block, copy=False)
        self._placed: dict[int, tuple[Block, NDArray[Any]]] = {}

    def receive(self) -> Any:
        """The next request; None when the caller is gone.

        Raises:
            ProtocolError: it is no request.
        """
        return self._next()

    def unpack(self, value: m.Value) -> Any:
        """A value of a request; its arrays are views, valid until the reply is sent."""
        return self._unpacker.unpack(value)

    def place(self, dtype: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """An array that need not be copied if it is part of the next reply; None if so small that it may."""
        nbytes = np.dtype(dtype).itemsize * math.prod(shape)
        if nbytes < VIEW_FROM:
            return None
        block = self._arena.lease(nbytes)
        array = block.array(dtype, shape, 0)
        self._placed[id(array)] = block, array
        return array

    def reply(self, value: Any) -> None:
        """Sends a result; large arrays in it are leased to the caller.

        Raises:
            Exception: the value cannot be sent; nothing was.
        """
        placed, self._placed = self._placed, {}
        packer = Packer(self._arena, lease_from=VIEW_FROM, placed=placed)
        (packed,) = packer.pack([value])
        try:
            self._send(m.Result(value=packed))
        except BaseException:
            packer.abandon()
            raise

    def say(self, message: m.CallFailed | m.Draining) -> None:
        """Sends a reply that carries no value."""
        for block, _ in self._placed.values():
            block.leased = False
        self._placed.clear()
        self._send(message)

    def last_touch(self) -> float:
        """When the caller last left the time of a use, in monotonic seconds; 0.0 if never."""
        return self._handover.mappings.clock() / 1e9
