"""The Unix socket of a lane: messages, and the blocks of shared memory that come with them.

Each message is one packet of at most :data:`PACKET` bytes, sent without waiting.  One that is longer lies in
a block of the sender's, and the packet names it.  What is to be said of blocks waits for the next message and
travels in the same packet.  So a sender never waits for its reader, whatever that does, and no more than two
packets are ever on their way in one direction (:class:`~onnx_dl.protocol.lane.Started` and the result).

Both ends of a lane have a :class:`Handover`.  How calls are told of is :mod:`onnx_dl.transport.call_channel`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, lane
from onnx_dl.system.owned_descriptors import Descriptor
from onnx_dl.tensors.arena import Arena, Block
from onnx_dl.tensors.mapped_blocks import Mappings
from onnx_dl.transport import sockets
from onnx_dl.transport.sockets import Channel

PACKET: Final = 4096
"""Bytes of a packet.  The smallest buffer that Linux lets a Unix socket have takes one of these."""

MOST_NEW: Final = 64
"""Blocks that one message may be the first to name, besides scratch, a letter and the page."""


class Notices:
    """What the peer is to be told of blocks with the next message.

    A message that cannot be sent leaves them here for the next one.
    """

    def __init__(self) -> None:
        self._shared: dict[int, tuple[int, Descriptor]] = {}
        """Size and descriptor, by number."""
        self._dropped: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._shared or self._dropped)

    @property
    def room(self) -> int:
        return MOST_NEW - len(self._shared)

    def shared(self, block: int, size: int, fd: int) -> None:
        self._shared[block] = size, Descriptor(fd)

    def dropped(self, block: int) -> None:
        if (unsaid := self._shared.pop(block, None)) is not None:  # the peer never heard of it
            unsaid[1].close()
        else:
            self._dropped.append(block)

    def new(self) -> list[tuple[int, int]]:
        """Number and size of the blocks that are new."""
        return [(number, size) for number, (size, _) in self._shared.items()]

    def old(self) -> list[int]:
        """Numbers of the blocks that were dropped."""
        return list(self._dropped)

    def descriptors(self) -> list[int]:
        """Of the blocks that are new."""
        return [descriptor.number for _, descriptor in self._shared.values()]

    def told(self, dropped: int) -> None:
        """The peer knows what is new, and the first so many that were dropped."""
        for _, descriptor in self._shared.values():
            descriptor.close()
        self._shared.clear()
        del self._dropped[:dropped]


class Handover:
    """The Unix socket of a lane, the blocks that this end writes to, and the peer's that came over it.

    It does not know the lane, so that all is freed with its memory as soon as nobody uses it, and not when
    the garbage collector finds a cycle.
    """

    def __init__(
        self, channel: Channel, read: codec.Reader, *, keep_descriptors: bool, most: float = math.inf
    ) -> None:
        """``keep_descriptors``, ``most``: see :class:`Mappings`."""
        self.channel = channel
        self._notices = Notices()
        self.arena = Arena(self._notices)
        self.mappings = Mappings(keep_descriptors=keep_descriptors, most=most)
        self.is_broken = False
        """Whether something that the peer said of blocks was lost: the lane is of no more use."""
        self._read = read

    # --- sending ------------------------------------------------------------------------------------------

    def fits(self, data: bytes) -> bool:
        """Whether a message may travel as it is: it is short, and nothing is to be said of blocks."""
        return len(data) <= PACKET and not self._notices

    def send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Sends a message, which may have descriptors of its own; false if the peer is gone.

        Raises:
            SharedMemoryError: it is long, and the system has no memory for it.  Nothing was sent.
            OSError: the system lets no more descriptors travel.
        """
        if not fds and self.fits(data):
            return self.channel.post(data)
        dropped = self._notices.old()
        packet = self._packet(data, dropped)
        sent = self.channel.post(packet, (*self._notices.descriptors(), *fds))
        self._notices.told(len(dropped))
        return sent

    def _packet(self, data: bytes, dropped: list[int]) -> bytes:
        if len(data) < PACKET:
            whole = lane.Envelope(shared=self._notices.new(), dropped=dropped, message=msgspec.Raw(data))
            if len(packet := codec.encode(whole)) <= PACKET:
                return packet
        text = codec.encode(lane.Envelope(dropped=dropped, message=msgspec.Raw(data)))
        block = self.arena.letter(len(text))  # may be new, and may drop others: these wait
        block.payload[: len(text)] = text
        return codec.encode(lane.Envelope(shared=self._notices.new(), letter=(block.number, len(text))))

    # --- receiving ----------------------------------------------------------------------------------------

    def next(self) -> Any:
        """The message that lies on the socket, when its blocks are taken in; None if the peer is gone, or
        there is none: it said that there was, which is as good.

        Raises:
            ProtocolError: what came is no message, or it contradicts itself.
            SharedMemoryError: a block of it cannot be mapped.
            OSError: this process may have no more descriptors.
        """
        try:
            received = self.channel.take()
        except BlockingIOError:
            return None
        except OSError:
            self.is_broken = True
            raise
        if received is None:
            return None
        message, fds = self._opened(*received)
        if fds:
            sockets.close_all(fds)
            raise ProtocolError("A message came with descriptors that it does not need.")
        return message

    def greeting(self, timeout: float) -> tuple[Any, list[int]]:
        """The first message and its own descriptors, which the caller closes; None if the peer is gone.

        Raises:
            TimeoutError: none came within ``timeout`` seconds.
            Exception: like :meth:`next`.
        """
        received = self.channel.receive(timeout)
        return (None, []) if received is None else self._opened(*received)

    def _opened(self, data: memoryview, fds: list[int]) -> tuple[Any, list[int]]:
        had_blocks = bool(fds)
        try:
            message = self._read(data)
            if type(message) is not lane.Envelope:
                return message, fds
            own = self._take_in(message, fds)
        except BaseException:
            self.is_broken = self.is_broken or had_blocks
            sockets.close_all(fds)
            raise
        try:
            return self._message_in(message), own
        except BaseException:
            sockets.close_all(own)
            raise

    def _take_in(self, envelope: lane.Envelope, fds: list[int]) -> list[int]:
        """Maps the blocks that came; returns the descriptors that are not theirs.  Takes from ``fds`` what is
        taken over."""
        if len(envelope.shared) > len(fds):
            raise ProtocolError("Blocks were announced that did not come.")
        self._drop(envelope.dropped)
        for number, size in envelope.shared:
            self.mappings.add(number, size, fds.pop(0))
        return fds

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self.mappings.drop(number)

    def _message_in(self, envelope: lane.Envelope) -> Any:
        inside = envelope if envelope.letter is None else self._letter(*envelope.letter)
        message = self._read(inside.message)
        if type(message) is lane.Envelope:
            raise ProtocolError("An envelope lies in another.")
        return message

    def _letter(self, number: int, nbytes: int) -> lane.Envelope:
        block = self.block(number)
        if not 0 <= nbytes <= block.size:
            raise ProtocolError(f"A message of {nbytes} bytes does not fit its block of {block.size} bytes.")
        letter = self._read(bytes(block.payload[:nbytes]))  # a copy: the peer could change what is read
        if type(letter) is not lane.Envelope or letter.shared or letter.letter is not None:
            raise ProtocolError("A block that was to hold a message holds something else.")
        self._drop(letter.dropped)
        return letter

    def block(self, number: int) -> Block:
        """A block of the peer, which it announced before it named it, or with it.

        Raises:
            ProtocolError: it did not.
        """
        block = self.mappings.get(number)
        if block is None:
            raise ProtocolError(f"A message names block {number}, which its sender never handed over.")
        return block

    def is_dead(self) -> bool:
        """Whether the peer is gone; does not wait."""
        return self.channel.is_dead()
