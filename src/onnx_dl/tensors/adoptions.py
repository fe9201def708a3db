"""Blocks of other arenas that a peer was told about, so that data in them need not be copied.

The owner of a block may drop it at any time.  The peer must then drop it, too, or its memory would stay as
long as the lane.  Keeps which blocks are known by which numbers, and decides which are dropped when.
"""

from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Callable
from typing import Final

from onnx_dl.tensors.block import Announcer, Block
from onnx_dl.tensors.segment import Mapping

MOST: Final = 128
"""Adopted blocks that one peer knows at a time.  One more replaces the one that was named longest ago."""


@dataclasses.dataclass(slots=True)
class _Adopted:
    number: int
    size: int
    turn: int = 0
    """The message that named it last."""


class Adoptions:
    """The adopted blocks that one peer knows.  Used by one thread at a time; blocks may die in any thread."""

    def __init__(self, announcer: Announcer, next_number: Callable[[], int]) -> None:
        self._announcer = announcer
        self._next_number = next_number
        self._known: dict[weakref.ref[Mapping], _Adopted] = {}
        """Keyed by their memory, ordered by the time of their last use."""
        self._dead: collections.deque[weakref.ref[Mapping]] = collections.deque()
        """Filled by the thread in which the last holder drops a block."""
        self._turn = 0
        self.allowed = True
        """False: the peer is told about no blocks, because it is not trusted with others' data."""
        self.nbytes = 0
        """Bytes that the peer maps."""

    def next_message(self) -> None:
        """Begin another message: blocks that are named from now on belong to it."""
        self._turn += 1
        if self._dead:
            self.drop_dead()

    def number(self, block: Block) -> int | None:
        """Return the peer's number of this block.  None: this message cannot announce it, so data in the
        block must be copied.  Raises OSError if this process may have no more descriptors."""
        known = self._known.pop(weakref.ref(block.mapping), None)
        if known is None and (known := self._announced(block)) is None:
            return None
        known.turn = self._turn
        self._known[weakref.ref(block.mapping, self._dead.append)] = known  # moves it to the end
        return known.number

    def drop_dead(self) -> None:
        """Tell the peer to drop the blocks that no longer have an owner."""
        while self._dead:
            self._drop(self._dead.popleft())

    def drop_all(self) -> None:
        """Tell the peer to drop all adopted blocks."""
        self._dead.clear()
        for ref in list(self._known):
            self._drop(ref)

    def _announced(self, block: Block) -> _Adopted | None:
        if not self.allowed or self._announcer.room <= 0 or not self._has_room():
            return None
        fd = block.mapping.duplicate()
        if fd is None:
            return None
        adopted = _Adopted(self._next_number(), block.size)
        self._announcer.shared(adopted.number, block.size, fd)
        self.nbytes += block.size
        return adopted

    def _has_room(self) -> bool:
        """Make room for one more block; false if this message names all known blocks."""
        if len(self._known) < MOST:
            return True
        oldest = next(iter(self._known))
        if self._known[oldest].turn == self._turn:
            return False
        self._drop(oldest)
        return True

    def _drop(self, ref: weakref.ref[Mapping]) -> None:
        if (adopted := self._known.pop(ref, None)) is not None:
            self.nbytes -= adopted.size
            self._announcer.dropped(adopted.number)
