"""The blocks of the other end of a lane, mapped into this process; see :mod:`onnx_dl.tensors.arena`."""

from __future__ import annotations

import math
import os
from typing import Final

from onnx_dl.errors import ProtocolError
from onnx_dl.tensors.block import Block

MOST: Final = 512
"""Blocks that a worker maps for one caller.  Our own callers use far fewer at a time: 128 adopted blocks
(:mod:`onnx_dl.tensors.adoptions`), and the scratch block, the page and letters."""


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

    def drop(self, number: int) -> None:
        """Forget a block.  Arrays in it keep its memory."""
        if (block := self._blocks.pop(number, None)) is not None:
            self.drops += 1
            self.nbytes -= block.size

    def get(self, number: int) -> Block | None:
        return self._blocks.get(number)

    def clock(self) -> int:
        """Return the latest time that the peer left in any block, in monotonic nanoseconds; 0: none."""
        return max((block.clock for block in list(self._blocks.values())), default=0)
