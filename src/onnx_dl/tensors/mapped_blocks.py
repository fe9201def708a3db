"""The blocks of shared memory of the other end of a lane, as mapped here.

What they are good for is told in :mod:`onnx_dl.tensors.arena`.
"""

from __future__ import annotations

import math
import os
from typing import Final

from onnx_dl.errors import ProtocolError
from onnx_dl.tensors.arena import Block

MOST: Final = 512
"""Blocks that a worker maps for one caller.  Ours names far fewer at a time: 128 of other arenas
(:mod:`onnx_dl.tensors.adoptions`), and its scratch, page and letters."""


class Mappings:
    """The peer's blocks, as mapped here."""

    def __init__(self, *, keep_descriptors: bool = False, most: float = math.inf) -> None:
        """``keep_descriptors``: they may be handed to a third process; ``most``: as many are mapped."""
        self._most = most
        self._blocks: dict[int, Block] = {}
        self._keep_descriptors = keep_descriptors
        self.drops = 0
        """Counts the blocks that the peer dropped."""
        self.nbytes = 0
        """Bytes of the blocks that are mapped."""
        self.page: Block | None = None
        """The peer's block of no payload."""

    def add(self, number: int, size: int, fd: int) -> None:
        """Maps a new block and takes over ``fd``.

        Raises:
            ProtocolError: it has a number that is in use, or a size or number that cannot be, or it is one
                too many.
            SharedMemoryError: it is smaller than announced, or cannot be mapped.
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
            block.mapping.shed()

    def drop(self, number: int) -> None:
        """Forgets a block; arrays that lie in it keep its memory."""
        if (block := self._blocks.pop(number, None)) is not None:
            self.drops += 1
            self.nbytes -= block.size

    def get(self, number: int) -> Block | None:
        return self._blocks.get(number)

    def clock(self) -> int:
        """The latest time that the peer left in any block."""
        return max((block.clock for block in list(self._blocks.values())), default=0)
