"""Blocks of other arenas that a peer was told of, so that what lies in them need not be copied.

Who owns a block may let it go at any time; the peer must then drop it, too, or its memory would stay for as
long as the lane does.  Covers which blocks are known, by which numbers, and which go when.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from onnx_dl.tensors.segment import Mapping

if TYPE_CHECKING:
    from onnx_dl.tensors.arena import Announcer, Block

MOST: Final = 128
"""Blocks of others that one peer knows at a time.  One more, and the one that was named longest ago goes."""


class _Adopted:
    __slots__ = ("number", "size", "turn")

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.turn = 0
        """When it was named last."""


class Adoptions:
    """The blocks of others that one peer knows.  Used by one thread at a time; blocks may die in any."""

    def __init__(self, announcer: Announcer, next_number: Callable[[], int]) -> None:
        self._announcer = announcer
        self._next_number = next_number
        self._known: dict[weakref.ref[Mapping], _Adopted] = {}
        """By the memory they are; the one that was named longest ago first."""
        self._dead: collections.deque[weakref.ref[Mapping]] = collections.deque()
        """Filled when the last holder lets go, in whatever thread that is."""
        self._turn = 0
        self.nbytes = 0
        """Bytes that the peer maps."""

    def next_message(self) -> None:
        """What is named from now on is so in another message."""
        self._turn += 1
        if self._dead:
            self.drop_dead()

    def number(self, block: Block) -> int | None:
        """The number by which the peer knows this block; None if it cannot be told of it with this message:
        what lies in the block must be copied.

        Raises:
            OSError: this process may have no more descriptors.
        """
        known = self._known.pop(weakref.ref(block.mapping), None)
        if known is None and (known := self._announced(block)) is None:
            return None
        known.turn = self._turn
        self._known[weakref.ref(block.mapping, self._dead.append)] = known  # as the one that was named last
        return known.number

    def drop_dead(self) -> None:
        """Has the peer let go what has no owner any more."""
        while self._dead:
            self._drop(self._dead.popleft())

    def drop_all(self) -> None:
        """Has the peer let go everything."""
        self._dead.clear()
        for ref in list(self._known):
            self._drop(ref)

    def _announced(self, block: Block) -> _Adopted | None:
        if self._announcer.room <= 0 or not self._has_room():
            return None
        fd = block.mapping.duplicate()
        if fd is None:
            return None
        adopted = _Adopted(self._next_number(), block.size)
        self._announcer.shared(adopted.number, block.size, fd)
        self.nbytes += block.size
        return adopted

    def _has_room(self) -> bool:
        """Makes room for one more; false if this message names all that are known."""
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
