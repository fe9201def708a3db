"""The Unix socket of a lane: messages of any length, and the blocks of shared memory that come over it.

Both ends of a lane have one.  How calls are told of is :mod:`onnx_dl.transport.calls`'s.
"""

from __future__ import annotations

from typing import Any, Final

from onnx_dl.errors import ProtocolError
from onnx_dl.transport import messages as m
from onnx_dl.transport import sockets
from onnx_dl.transport.arena import Block, Mappings
from onnx_dl.transport.sockets import LONGEST, Channel

HANDOVER: Final = 10.0
"""Seconds within which a block must arrive that a message names; its sender sent it before the message."""


class Handover:
    """The Unix socket of a lane, and the peer's blocks that came over it.

    It knows neither lane nor arena, so that these are freed with their memory as soon as nobody uses them,
    and not when the garbage collector finds a cycle.
    """

    def __init__(self, channel: Channel, read: m.Reader, *, keep_descriptors: bool) -> None:
        self.channel = channel
        self.mappings = Mappings(keep_descriptors=keep_descriptors)
        self._read = read

    def shared(self, block: int, size: int, fd: int) -> None:
        self.channel.send(m.encode(m.BlockShared(block=block, size=size)), (fd,))

    def dropped(self, block: int) -> None:
        self.channel.send(m.encode(m.BlockDropped(block=block)))

    def send(self, message: m.Message | bytes, fds: tuple[int, ...] = ()) -> bool:
        """Sends a message of any length; false if the peer is gone, and has not got all of it."""
        data = message if isinstance(message, bytes) else m.encode(message)
        if fds:
            return self.channel.send(data, fds)
        if len(data) <= LONGEST:
            return self.channel.send(data)
        parts = [data[start : start + LONGEST] for start in range(0, len(data), LONGEST)]
        return all(map(self.channel.send, [m.encode(m.Large(nbytes=len(data))), *parts]))

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
            if fds:
                sockets.close_all(fds)
            return False
        return True

    def _large(self, announced: m.Large) -> Any:
        data = bytearray()
        while len(data) < announced.nbytes:
            received = self.channel.receive(HANDOVER)
            if received is None:
                return None
            data += received[0]
        return self._read(memoryview(data))

    def block(self, number: int) -> Block:
        """A block of the peer, which it announced before it named it."""
        while (block := self.mappings.get(number)) is None:
            try:
                received = self.channel.receive(HANDOVER)
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
