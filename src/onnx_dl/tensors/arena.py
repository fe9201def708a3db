"""Leases of blocks of shared memory: who may write where, and when memory is used again.

Each side of a lane owns one :class:`Arena`, into which it alone writes for its peer; what the peer owns is
mapped by :class:`~onnx_dl.tensors.mapped_blocks.Mappings`.  A block is either *scratch* (its bytes are valid
until the next message on the lane), a *letter* (the same, for one long message) or *leased* (the peer holds
it until it clears the block's lease word).  Clearing a word needs no message and no lock, so the finalizer of
an array may do it from any thread, also when the owner is long dead.

What a block carries (:mod:`onnx_dl.tensors.values`) and how its descriptor reaches the peer
(:mod:`onnx_dl.transport.lane_socket`) is not known here.  Not thread-safe: a lane has one user at a time.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_dl.concurrency.forking import lazily
from onnx_dl.errors import ProtocolError, SharedMemoryError
from onnx_dl.tensors import segment
from onnx_dl.tensors.adoptions import Adoptions
from onnx_dl.tensors.memory_order import release
from onnx_dl.tensors.retained_blocks import Lease

HEADER: Final = 64
"""Bytes before the payload; onnxruntime's own outputs are 64-byte aligned, so ours are too."""

SMALLEST: Final = 64 << 10
IDLE_TURNS: Final = 32
"""A block that was not used for this many turns of its arena is given back to the system."""

_REMEMBERED_VIEWS: Final = 64
_MOST_DIMENSIONS: Final = 64  # numpy's own limit
_LEASE, _CLOCK, _ASKED, _BEGUN = range(4)  # 8-byte words of the header
_FREE, _LEASED, _GIVEN_AWAY = range(3)
"""States of a lease.  They fit into the word's first four bytes, which :mod:`onnx_dl.tensors.memory_order`
clears; all machines that Linux's onnxruntime is built for are little-endian."""


def size_class(nbytes: int) -> int:
    """The size of block that serves ``nbytes``: four steps per doubling, at least 64 KiB.

    Shapes that vary a little then share blocks, at a cost of at most a quarter of their size.
    """
    if nbytes <= SMALLEST:
        return SMALLEST
    step = 1 << ((nbytes - 1).bit_length() - 3)
    return -(-nbytes // step) * step


def align(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment of tensors."""
    return (nbytes + HEADER - 1) & -HEADER


class Block:
    """One segment, mapped into this process when it is first looked at.  ``size`` counts payload bytes."""

    def __init__(self, number: int, size: int, fd: int) -> None:
        """Takes over ``fd``.

        Raises:
            SharedMemoryError: the segment is smaller than announced.
        """
        self.number = number
        self.size = size
        self.last_turn = 0
        try:
            self.mapping = segment.Mapping(fd, size + HEADER)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise SharedMemoryError(f"Cannot map {size} bytes of shared memory: {error}.") from None
        self._views: dict[tuple[str, tuple[int, ...], int], NDArray[Any]] = {}  # shapes repeat

    @lazily
    def _bytes(self) -> NDArray[np.uint8]:
        return np.asarray(self.mapping)

    @lazily
    def payload(self) -> memoryview:
        """The bytes that are for values, writable."""
        return memoryview(self._bytes)[HEADER : HEADER + self.size]  # type: ignore[arg-type]

    @lazily
    def _words(self) -> memoryview[int]:
        return memoryview(self._bytes[:HEADER]).cast("B").cast("Q")  # type: ignore[arg-type]

    @lazily
    def _address(self) -> int:
        return self.mapping.address + HEADER

    def array(self, dtype: str, shape: tuple[int, ...], offset: int) -> NDArray[Any]:
        """A writable C-contiguous array over the payload at byte ``offset``.

        Raises:
            ProtocolError: it would reach beyond the block.
        """
        wanted = dtype, shape, offset
        view = self._views.get(wanted)
        if view is None:
            self._check(dtype, shape, offset)
            if len(self._views) >= _REMEMBERED_VIEWS:
                self._views.clear()
            view = self._views[wanted] = np.ndarray(shape, dtype, self._bytes, HEADER + offset)
        return view

    def held_array(self, dtype: str, shape: tuple[int, ...], offset: int) -> NDArray[Any]:
        """Like :meth:`array`; the lease ends when the array and all its views are gone."""
        self._check(dtype, shape, offset)
        array = np.asarray(Lease(self, np.dtype(dtype).str, shape, self._address + offset))
        return array if array.dtype.char == np.dtype(dtype).char else array.view(dtype)

    def _check(self, dtype: str, shape: tuple[int, ...], offset: int) -> None:
        """A peer's word is not enough: bytes of the block must not become pointers, nor bytes beyond it."""
        try:
            parsed = np.dtype(dtype)
        except (TypeError, ValueError, SyntaxError):
            parsed = np.dtype(object)
        named = dtype in (parsed.str, "q", "Q")  # the last two: C's long long, which typestr cannot say
        plain = named and not parsed.hasobject and len(shape) <= _MOST_DIMENSIONS
        nbytes = math.prod(shape) * parsed.itemsize
        if not (plain and offset >= 0 and min(shape, default=0) >= 0 and offset + nbytes <= self.size):
            raise ProtocolError(
                f"A tensor of dtype {dtype!r} and shape {shape} at byte {offset} does not fit its block "
                f"of {self.size} bytes."
            )

    @property
    def leased(self) -> bool:
        return bool(self._words[_LEASE]) or self.mapping.is_private

    def lease(self) -> None:
        """By the owner, before the peer is told of it."""
        self._words[_LEASE] = _LEASED

    def end_lease(self) -> None:
        """By the holder: the block is the owner's again, who may write to it from this moment on."""
        if release is None:
            self._words[_LEASE] = _FREE
        else:
            release(self.mapping.address + 8 * _LEASE)

    @property
    def is_given_away(self) -> bool:
        """Whether the lease never ends, so that the owner may forget the block."""
        return self._words[_LEASE] == _GIVEN_AWAY or self.mapping.is_private

    def give_away(self) -> bool:
        """It is this process's own from now on, and the owner's never again.  The header is, too, so that the
        end of the lease is seen by nobody.  False: as long as it is not, the lease must not end."""
        if not self.mapping.is_private:
            self._words[_LEASE] = _GIVEN_AWAY
            self.mapping.make_private()
        return self.mapping.is_private

    @property
    def clock(self) -> int:
        """A time in monotonic nanoseconds that either side may leave for the other; 0 at first."""
        return self._words[_CLOCK]

    @clock.setter
    def clock(self, value: int) -> None:
        self._words[_CLOCK] = value

    def ask(self, number: int) -> None:
        """A call of this number is about to be made."""
        self._words[_ASKED] = number

    def begin(self) -> None:
        """The call that was asked last is begun: if no answer comes, it may have been executed."""
        self._words[_BEGUN] = self._words[_ASKED]

    @property
    def begun(self) -> int:
        """The number of the call that was begun last."""
        return self._words[_BEGUN]

    def offset_of(self, array: NDArray[Any]) -> int:
        """Where in the payload an array begins that lies in this block."""
        return int(array.__array_interface__["data"][0]) - self._address


def home_of(array: NDArray[Any]) -> Block | None:
    """The leased block that an array lies in, if it is one that another process can be given as it is."""
    base: Any = array.base
    while type(base) is np.ndarray:
        base = base.base
    if type(base) is not Lease or not array.flags.c_contiguous or array.dtype.hasobject:
        return None
    return base.block if base.block.mapping.has_descriptor else None


class Reference(NamedTuple):
    """An array in a block of another process, which this one need not look at to pass it on."""

    block: Block
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class Announcer(Protocol):
    """Tells the peer of blocks, at the latest with the next message."""

    @property
    def room(self) -> int:
        """How many more blocks the next message may be the first to name: each takes a descriptor of the
        few that a packet holds."""

    def shared(self, block: int, size: int, fd: int) -> None:
        """A block is new; the peer must map ``fd``, which is taken over, before it is named in a message."""

    def dropped(self, block: int) -> None:
        """A block will not be used again."""


class Nobody:
    """The peer of an arena whose blocks reach others by adoption only."""

    room = 1

    def shared(self, block: int, size: int, fd: int) -> None:
        os.close(fd)

    def dropped(self, block: int) -> None:
        pass


class Arena:
    """The blocks that this side writes to."""

    def __init__(self, announcer: Announcer, *, keep_descriptors: bool = False) -> None:
        """``keep_descriptors``: the blocks may be adopted by other arenas."""
        self._announcer = announcer
        self._keep_descriptors = keep_descriptors
        self._numbers = itertools.count(1)
        self._turn = 0
        self._scratch: Block | None = None
        self._scratch_peak = 0
        self._blocks: list[Block] = []
        self.adoptions = Adoptions(announcer, self._numbers.__next__)
        """Blocks of other arenas, which stay theirs."""
        self.nbytes = 0
        """Bytes of the blocks that this arena keeps."""

    @property
    def current_scratch(self) -> Block | None:
        """The scratch block, as long as there is one."""
        return self._scratch

    def page(self) -> Block:
        """A block of no payload, for its clock; it stays as long as the arena."""
        return self._create(0)

    def scratch(self, nbytes: int) -> Block:
        """The block for what the peer reads before the lane's next message; at least ``nbytes``."""
        block = self._scratch
        if block is None or nbytes > block.size or self._turn % IDLE_TURNS == 0:
            return self._review_scratch(nbytes)
        self._turn += 1
        if nbytes > self._scratch_peak:
            self._scratch_peak = nbytes
        return block

    def _review_scratch(self, nbytes: int) -> Block:
        """Another scratch block, if the present one is too small or was far too large for a while."""
        self._next_turn()
        self._scratch_peak = max(self._scratch_peak, nbytes)
        block = self._scratch
        if block is None or block.size < nbytes or self._scratch_is_too_large(block):
            self._drop_scratch()
            # Doubling keeps growing sequences cheap; what it wastes, the next slow turn takes back.
            grown = min(2 * block.size, 2 * nbytes) if block and block.size < nbytes else 0
            block = self._scratch = self._create(size_class(max(self._scratch_peak, grown)))
        return block

    def lease(self, nbytes: int) -> Block | None:
        """A block of at least ``nbytes`` that is the peer's until it ends the lease; None if that had to be
        a new one, and the next message has no room for it."""
        self._next_turn()
        block = self._free(nbytes)
        if block is None:
            if self._announcer.room <= 0:
                return None
            block = self._add(nbytes)
        block.lease()
        block.last_turn = self._turn
        return block

    def letter(self, nbytes: int) -> Block:
        """A block of at least ``nbytes`` for one message that is too long for a packet.

        Valid until the next message, like scratch.  It is one that could be leased, so that it is used
        again, and given back, as these are.  To be asked for when the leases of the message are taken.
        """
        self._next_turn()
        block = self._free(nbytes) or self._add(nbytes)
        block.last_turn = self._turn
        return block

    def _free(self, nbytes: int) -> Block | None:
        fitting = [b for b in self._blocks if nbytes <= b.size <= 2 * size_class(nbytes) and not b.leased]
        return min(fitting, key=lambda b: b.size, default=None)

    def _add(self, nbytes: int) -> Block:
        block = self._create(size_class(nbytes))
        self._blocks.append(block)
        return block

    def adopt(self, block: Block) -> int | None:
        """The number by which the peer knows a block of another arena; see :meth:`Adoptions.number`."""
        return self.adoptions.number(block)

    def trim(self) -> None:
        """Gives back all blocks that nobody holds."""
        self._drop_scratch()
        self._scratch_peak = 0
        self._drop_free(lambda block: True)
        self.adoptions.drop_all()

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
        free = [b for b in self._blocks if b.is_given_away or (not b.leased and wanted(b))]
        for block in free:
            self._blocks.remove(block)
            self.nbytes -= block.size
            self._announcer.dropped(block.number)

    def _drop_scratch(self) -> None:
        if self._scratch is not None:
            self.nbytes -= self._scratch.size
            self._announcer.dropped(self._scratch.number)
            self._scratch = None

    def _create(self, size: int) -> Block:
        """A new block.  The peer is told of it only when nothing can fail any more: one that it was told of
        and that nobody has here would be its own for ever."""
        block = Block(next(self._numbers), size, segment.create(size + HEADER))
        duplicate = block.mapping.duplicate()
        assert duplicate is not None
        try:
            if self._keep_descriptors:
                block.mapping.keep_descriptor()
            else:
                block.mapping.shed()
        except BaseException:
            os.close(duplicate)
            raise
        self._announcer.shared(block.number, size, duplicate)
        block.last_turn = self._turn
        self.nbytes += size
        return block
