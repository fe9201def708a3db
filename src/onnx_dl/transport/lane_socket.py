"""The Unix socket of a lane: messages, and the blocks of shared memory that come with them.

Each message is one packet of at most :data:`PACKET` bytes, sent without waiting.  A longer one is written to
a block of the sender, and the packet names the block.  News of blocks waits for the next message and travels
in its packet.  So a sender never waits for its reader, and at most two packets are on their way in one
direction (:class:`~onnx_dl.protocol.lane.Started` and the result).

Both ends of a lane have a :class:`LaneSocket`.  :mod:`onnx_dl.transport.call_channel` signals that a message
is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, lane
from onnx_dl.system.owned_descriptors import Descriptor
from onnx_dl.tensors.arena import Arena, Mappings
from onnx_dl.tensors.foreign_tables import PeerMemories
from onnx_dl.transport import sockets
from onnx_dl.transport.sockets import Channel

PACKET: Final = 4096
"""Bytes of a packet.  The smallest buffer that Linux gives a Unix socket takes one of these."""

MOST_NEW: Final = 64
"""New blocks that one message may announce, besides scratch, a letter and the page."""


class Notices:
    """News of blocks that the peer gets with the next message.  If that cannot be sent, they stay here for
    the one after it."""

    def __init__(self) -> None:
        self._shared: dict[int, tuple[int, Descriptor]] = {}
        """Size and descriptor, by number."""
        self._foreign: dict[int, tuple[int, bool, Descriptor]] = {}
        """Size, whether it is mapped, and descriptor, by number."""
        self._parts: dict[int, tuple[int, Descriptor]] = {}
        """Size and descriptor of memory of a GPU, by number."""
        self.old: list[int] = []
        """Numbers of the dropped blocks."""

    def __bool__(self) -> bool:
        return bool(self._shared or self.old or self._foreign or self._parts)

    @property
    def room(self) -> int:
        return MOST_NEW - len(self._shared) - len(self._foreign) - len(self._parts)

    @property
    def has_drops(self) -> bool:
        return bool(self.old)

    def shared(self, block: int, size: int, fd: int) -> None:
        self._shared[block] = size, Descriptor(fd)

    def foreign(self, memory: int, size: int, is_mapped: bool, fd: int) -> None:
        self._foreign[memory] = size, is_mapped, Descriptor(fd)

    def part(self, number: int, size: int, fd: int) -> None:
        self._parts[number] = size, Descriptor(fd)

    def dropped(self, block: int) -> None:
        unsent = (
            self._shared.pop(block, None) or self._foreign.pop(block, None) or self._parts.pop(block, None)
        )
        if unsent is not None:  # the peer does not know it yet
            unsent[-1].close()
        else:
            self.old.append(block)

    def new(self) -> lane.Envelope:
        """Return an envelope that announces all new blocks and memories."""
        return lane.Envelope(
            shared=[(number, size) for number, (size, _) in self._shared.items()],
            foreign=[(number, size, mapped) for number, (size, mapped, _) in self._foreign.items()],
            parts=[(number, size) for number, (size, _) in self._parts.items()],
        )

    def descriptors(self) -> list[int]:
        """Return the descriptors of the new blocks, then those of the new memories, then of the new parts."""
        return [descriptor.number for descriptor in self._descriptors()]

    def _descriptors(self) -> list[Descriptor]:
        blocks = [descriptor for _, descriptor in self._shared.values()]
        foreign = [descriptor for _, _, descriptor in self._foreign.values()]
        return [*blocks, *foreign, *(descriptor for _, descriptor in self._parts.values())]

    def sent(self, dropped: int) -> None:
        """Forget what the peer knows now: all new blocks, and the first ``dropped`` dropped ones."""
        for descriptor in self._descriptors():
            descriptor.close()
        self._shared.clear()
        self._foreign.clear()
        self._parts.clear()
        del self.old[:dropped]


class LaneSocket:
    """The Unix socket of a lane, this end's blocks, and the peer's blocks that came over the socket.  Has no
    reference to the lane: a cycle would keep the memory until the garbage collector finds it."""

    def __init__(
        self,
        channel: Channel,
        read: codec.Reader[lane.LaneRequest] | codec.Reader[lane.LaneReply],
        *,
        keep_descriptors: bool,
        most: float = math.inf,
        most_foreign: int = 0,
    ) -> None:
        """``keep_descriptors``, ``most``: see :class:`Mappings`; ``most_foreign``: limit of the
        peer's foreign memories."""
        self.channel = channel
        self._notices = Notices()
        self.arena = Arena(self._notices)
        self.mappings = Mappings(keep_descriptors=keep_descriptors, most=most)
        self.memories = PeerMemories(most_foreign)
        """The foreign memories that the peer has announced."""
        self.is_broken = False
        """True if news of the peer's blocks was lost: the lane cannot be used any more."""
        self._read = read

    # --- sending ------------------------------------------------------------------------------------------

    def fits(self, data: bytes) -> bool:
        """True if a message can be sent as it is: it is short, and there is no news of blocks."""
        return len(data) <= PACKET and not self._notices

    def send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send a message, with descriptors of its own if it has any; false if the peer is gone.

        Raises:
            SharedMemoryError: it is long, and the system has no memory for it.  Nothing was sent.
            OSError: the system allows no more descriptors in sockets.
        """
        if not fds and self.fits(data):
            return self.channel.post(data)
        dropped = self._notices.old.copy()
        packet = self._packet(data, dropped)
        sent = self.channel.post(packet, (*self._notices.descriptors(), *fds))
        self._notices.sent(len(dropped))
        return sent

    def _packet(self, data: bytes, dropped: list[int]) -> bytes:
        if len(data) < PACKET:
            whole = self._notices.new()
            whole.dropped, whole.message = dropped, msgspec.Raw(data)
            if len(packet := codec.encode(whole)) <= PACKET:
                return packet
        text = codec.encode(lane.Envelope(dropped=dropped, message=msgspec.Raw(data)))
        block = self.arena.letter(len(text))  # may be new; blocks that it drops wait for the next message
        block.payload[: len(text)] = text
        announced = self._notices.new()
        announced.letter = block.number, len(text)
        return codec.encode(announced)

    # --- receiving ----------------------------------------------------------------------------------------

    def next(self) -> Any:
        """Receive the message on the socket and map its blocks.

        None: the peer is gone, or there is no message although it signalled one.

        Raises:
            ProtocolError: the data is not a message, or contradicts itself.
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
            raise ProtocolError("A message came with descriptors that do not belong to it.")
        return message

    def greeting(self, timeout: float) -> tuple[Any, list[int]]:
        """Receive the first message and its own descriptors, which the caller closes; None if the peer is
        gone.

        Raises:
            TimeoutError: no message came within ``timeout`` seconds.
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
            own = self._map_blocks(message, fds)
        except BaseException:
            self.is_broken = self.is_broken or had_blocks
            sockets.close_all(fds)
            raise
        try:
            return self._message_in(message), own
        except BaseException:
            sockets.close_all(own)
            raise

    def _map_blocks(self, envelope: lane.Envelope, fds: list[int]) -> list[int]:
        """Map the announced blocks, keep the announced memories; return the other descriptors.  Removes those
        from ``fds`` that now have an owner."""
        if len(envelope.shared) + len(envelope.foreign) + len(envelope.parts) > len(fds):
            raise ProtocolError("A message announces blocks without their descriptors.")
        self._drop(envelope.dropped)
        for number, size in envelope.shared:
            self.mappings.add(number, size, fds.pop(0))
        for number, size, is_mapped in envelope.foreign:
            self.memories.add(number, size, is_mapped, fds.pop(0))
        for number, size in envelope.parts:
            self.memories.add_part(number, size, fds.pop(0))
        return fds

    def _message_in(self, envelope: lane.Envelope) -> Any:
        inside = envelope if envelope.letter is None else self._letter(*envelope.letter)
        message = self._read(inside.message)
        if type(message) is lane.Envelope:
            raise ProtocolError("A message is an envelope in an envelope.")
        return message

    def _letter(self, number: int, nbytes: int) -> lane.Envelope:
        block = self.mappings.block(number)
        if not 0 <= nbytes <= block.size:
            raise ProtocolError(f"A message of {nbytes} bytes does not fit its block of {block.size} bytes.")
        letter = self._read(bytes(block.payload[:nbytes]))  # a copy: the peer could change what is read
        if (
            type(letter) is not lane.Envelope
            or letter.shared
            or letter.foreign
            or letter.parts
            or letter.letter
        ):
            raise ProtocolError("A block that should contain a message contains something else.")
        self._drop(letter.dropped)
        return letter

    def _drop(self, numbers: list[int]) -> None:
        if numbers:
            self.mappings.drop(numbers)
            self.memories.drop(numbers)
