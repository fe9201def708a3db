"""The blocks of shared memory that one side of a lane writes to, and when their memory is used again.

Each side of a lane owns one :class:`Arena`, into which it alone writes for its peer.  The peer's blocks are
mapped by :class:`~onnx_dl.tensors.arena.Mappings`.  A block serves as *scratch* (its bytes are valid
until the next message on the lane), as a *letter* (the same, for one long message), or is *taken* for the
peer, which holds it until it releases it.

Knows neither what a block contains (:mod:`onnx_dl.tensors.values`) nor how its descriptor reaches the peer
(:mod:`onnx_dl.transport.lane_socket`).  Not thread-safe: a lane has one user at a time.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable
from typing import Final

from onnx_dl.errors import ProtocolError
from onnx_dl.tensors import segment
from onnx_dl.tensors.adoptions import Adoptions
from onnx_dl.tensors.block import HEADER, Announcer, Block
from onnx_dl.tensors.foreign_tables import AnnouncedMemories

SMALLEST: Final = 64 << 10
IDLE_TURNS: Final = 32
"""Turns of the arena after which an unused block is returned to the system."""


MOST_MAPPED: Final = 512
"""Blocks that a worker maps for one caller.  Our own callers use far fewer at a time: 128 adopted blocks
(:mod:`onnx_dl.tensors.adoptions`), and the scratch block, the page and letters."""


def size_class(nbytes: int) -> int:
    """Return the size of the block that serves ``nbytes``: four steps per doubling, at least 64 KiB. So
    shapes that vary a little share blocks, and at most a quarter of a block is wasted."""
    if nbytes <= SMALLEST:
        return SMALLEST
    step = 1 << ((nbytes - 1).bit_length() - 3)
    return -(-nbytes // step) * step


class NoPeer:
    """Announcer of an arena whose blocks reach other processes by adoption only."""

    room = 1
    has_drops = False

    def shared(self, block: int, size: int, fd: int) -> None:
        os.close(fd)

    def foreign(self, memory: int, size: int, is_mapped: bool, fd: int) -> None:
        os.close(fd)

    def part(self, number: int, size: int, fd: int) -> None:
        os.close(fd)

    def dropped(self, block: int) -> None:
        pass


class Arena:
    """The blocks that this side writes to."""

    def __init__(self, announcer: Announcer, *, keep_descriptors: bool = False) -> None:
        """``keep_descriptors``: other arenas may adopt the blocks."""
        self._announcer = announcer
        self._keep_descriptors = keep_descriptors
        self._numbers = itertools.count(1)
        self._turn = 0
        self.current_scratch: Block | None = None
        """The scratch block; None: there is none now."""
        self._scratch_peak = 0
        self._blocks: list[Block] = []
        self.adoptions = Adoptions(announcer, self._numbers.__next__)
        """Blocks of other arenas, which keep them."""
        self.memories = AnnouncedMemories(announcer, self._numbers.__next__)
        """Memories of third processes."""
        self.nbytes = 0
        """Bytes of the blocks that this arena keeps."""

    def page(self) -> Block:
        """Create a block without payload, for its header.  It stays as long as the arena."""
        return self._create(0)

    def scratch(self, nbytes: int) -> Block:
        """Return the block, of at least ``nbytes``, for data that the peer reads before the next message."""
        block = self.current_scratch
        if block is None or nbytes > block.size or self._turn % IDLE_TURNS == 0:
            return self._review_scratch(nbytes)
        self._turn += 1
        if nbytes > self._scratch_peak:
            self._scratch_peak = nbytes
        return block

    def _review_scratch(self, nbytes: int) -> Block:
        """Replace the scratch block if it is too small, or was far too large for a while."""
        self._next_turn()
        self._scratch_peak = max(self._scratch_peak, nbytes)
        block = self.current_scratch
        if block is None or block.size < nbytes or self._scratch_is_too_large(block):
            self._drop_scratch()
            # Doubling keeps growing sequences cheap; the next review takes back what it wastes.
            grown = min(2 * block.size, 2 * nbytes) if block and block.size < nbytes else 0
            block = self.current_scratch = self._create(size_class(max(self._scratch_peak, grown)))
        return block

    def take(self, nbytes: int) -> Block | None:
        """Return a block of at least ``nbytes`` that the peer holds until it releases it.  None: that had to
        be a new block, and the next message cannot announce one more."""
        self._next_turn()
        block = self._free(nbytes)
        if block is None:
            if self._announcer.room <= 0:
                return None
            block = self._add(nbytes)
        block.take()
        block.last_turn = self._turn
        return block

    def letter(self, nbytes: int) -> Block:
        """Return a block of at least ``nbytes`` for one message that is too long for a packet.  Valid until
        the next message, like scratch.  It comes from the blocks that can be taken, so that it is reused and
        returned like these.  Call this after all blocks of the message are taken."""
        self._next_turn()
        block = self._free(nbytes) or self._add(nbytes)
        block.last_turn = self._turn
        return block

    def _free(self, nbytes: int) -> Block | None:
        fitting = [b for b in self._blocks if nbytes <= b.size <= 2 * size_class(nbytes) and not b.is_taken]
        return min(fitting, key=lambda b: b.size, default=None)

    def _add(self, nbytes: int) -> Block:
        block = self._create(size_class(nbytes))
        self._blocks.append(block)
        return block

    def trim(self) -> None:
        """Return all unused blocks to the system."""
        self._drop_scratch()
        self._scratch_peak = 0
        self._drop_free(lambda block: True)
        self.adoptions.drop_all()
        self.memories.drop_all()

    def _next_turn(self) -> None:
        if self._turn % IDLE_TURNS == 0:
            self._drop_free(lambda block: self._turn - block.last_turn > IDLE_TURNS)
            self.adoptions.drop_dead()
        self._turn += 1

    def _scratch_is_too_large(self, block: Block) -> bool:
        if self._turn % IDLE_TURNS != 1:
            return False
        peak, self._scratch_peak = self._scratch_peak, 0
        too_large = block.size > 4 * size_class(peak)
        if too_large:
            self._scratch_peak = peak
        return too_large

    def _drop_free(self, wanted: Callable[[Block], bool]) -> None:
        free = [b for b in self._blocks if b.is_given_away or (not b.is_taken and wanted(b))]
        for block in free:
            self._blocks.remove(block)
            self.nbytes -= block.size
            self._announcer.dropped(block.number)

    def _drop_scratch(self) -> None:
        if self.current_scratch is not None:
            self.nbytes -= self.current_scratch.size
            self._announcer.dropped(self.current_scratch.number)
            self.current_scratch = None

    def _create(self, size: int) -> Block:
        """Create a block.  It is announced last, when nothing can fail any more: else the peer could keep a
        block for ever that this side does not have."""
        block = Block(next(self._numbers), size, segment.create(size + HEADER))
        duplicate = block.mapping.duplicate()
        assert duplicate is not None
        try:
            if self._keep_descriptors:
                block.mapping.keep_descriptor()
            else:
                block.mapping.close_descriptor()
        except BaseException:
            os.close(duplicate)
            raise
        self._announcer.shared(block.number, size, duplicate)
        block.last_turn = self._turn
        self.nbytes += size
        return block


class Mappings:
    """The peer's blocks, as mapped here."""

    def __init__(self, *, keep_descriptors: bool = False, most: float = math.inf) -> None:
        """``keep_descriptors``: they may be sent to a third process.  ``most``: limit of their number."""
        self._most = most
        self._blocks: dict[int, Block] = {}
        self._keep_descriptors = keep_descriptors
        self.drops = 0
        """Number of blocks that the peer has dropped so far."""
        self.nbytes = 0
        """Bytes of the mapped blocks."""
        self.page: Block | None = None
        """The peer's block without payload."""

    def add(self, number: int, size: int, fd: int) -> None:
        """Map a new block.  Takes ownership of ``fd``.

        Raises:
            ProtocolError: the number is in use, the number or size is impossible, or there are too many.
            SharedMemoryError: the block is smaller than announced, or cannot be mapped.
        """
        if number <= 0 or size < 0 or number in self._blocks:
            os.close(fd)
            raise ProtocolError(f"Block {number} of {size} bytes cannot be shared.")
        if len(self._blocks) >= self._most:
            os.close(fd)
            raise ProtocolError(f"A caller shares more than {self._most} blocks; it must drop some first.")
        block = self._blocks[number] = Block(number, size, fd)
        self.nbytes += size
        if not size:
            self.page = block
        if size and self._keep_descriptors:
            block.mapping.keep_descriptor()
        else:
            block.mapping.close_descriptor()

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget these blocks.  Arrays in them keep their memory."""
        for number in numbers:
            if (block := self._blocks.pop(number, None)) is not None:
                self.drops += 1
                self.nbytes -= block.size

    def has(self, number: int) -> bool:
        """True if the peer has not dropped this block."""
        return number in self._blocks

    def block(self, number: int) -> Block:
        """Return a block; raises ProtocolError if the peer did not announce it."""
        if (block := self._blocks.get(number)) is None:
            raise ProtocolError(f"A message names block {number}, which its sender never announced.")
        return block

    def clock(self) -> int:
        """Return the latest time that the peer left in any block, in monotonic nanoseconds; 0: none."""
        return max((block.clock for block in list(self._blocks.values())), default=0)
