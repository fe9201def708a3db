"""One block of shared memory: its header, its payload, and arrays in it.

The header has four words: whether the peer holds the block, a clock, and the numbers of the calls that were
asked for and begun last.  A block is *taken* by its owner for the peer, which holds it until it clears the
first word.  That needs no message and no lock, so the finalizer of an array may do it from any thread, also
after the owner is gone.  :mod:`onnx_dl.tensors.arena` decides which block serves which purpose.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnx_dl import linux_only
from onnx_dl.concurrency.forking import lazily
from onnx_dl.errors import ProtocolError, SharedMemoryError
from onnx_dl.tensors import segment
from onnx_dl.tensors.retained_blocks import RetainedBlock

Array: TypeAlias = NDArray[np.generic]

HEADER: Final = 64
"""Bytes before the payload.  Outputs of onnxruntime are aligned to 64 bytes, so ours are too."""

_REMEMBERED_VIEWS: Final = 64
_MOST_DIMENSIONS: Final = 64  # numpy's own limit
_HELD, _CLOCK, _ASKED, _BEGUN = range(4)  # 8-byte words of the header
_FREE, _TAKEN, _GIVEN_AWAY = range(3)
"""Values of the first word.  They fit into its first four bytes, which :data:`clear_word`
clears: all machines that onnxruntime supports on Linux are little-endian."""
_KEEPS_ORDER: Final = frozenset({"x86_64", "AMD64", "i686"})
"""Machines with total store order, by ``platform.machine()``."""


def store_release_for(machine: str) -> Callable[[int], object] | None:
    """Return the function that clears the four bytes at an address after all earlier writes.

    If the word were seen as clear before the holder's last write to the block, that could overwrite the
    owner's next data.  The owner needs nothing like this: it reads the word, branches, and only then writes.

    None: on this machine a plain store does.  Elsewhere it is ``pthread_spin_unlock``: POSIX lists it among
    the functions that synchronize memory (XBD 4.12), and glibc implements it as a store-release of zero on
    all machines but x86 (``stlr wzr, [x0]`` on aarch64).  It runs with the interpreter's lock held, so a
    finalizer that calls it is not interrupted.
    """
    if machine in _KEEPS_ORDER:
        return None
    unlock = linux_only.libc_function("pthread_spin_unlock", ctypes.PyDLL)
    unlock.argtypes = [ctypes.c_void_p]
    found: Callable[[int], object] = unlock
    return found


clear_word: Final = store_release_for(platform.machine())


def align(nbytes: int) -> int:
    """Round ``nbytes`` up to the alignment of tensors."""
    return (nbytes + HEADER - 1) & -HEADER


class Block:
    """One segment, mapped into this process at its first use.  ``size`` counts payload bytes."""

    def __init__(self, number: int, size: int, fd: int) -> None:
        """Takes ownership of ``fd``; raises SharedMemoryError if the segment is smaller than announced."""
        self.number = number
        self.size = size
        self.last_turn = 0
        try:
            self.mapping = segment.Mapping(fd, size + HEADER)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise SharedMemoryError(f"Cannot map {size} bytes of shared memory: {error}.") from None
        self._views: dict[tuple[str, tuple[int, ...], int], Array] = {}  # shapes repeat

    @lazily
    def _bytes(self) -> NDArray[np.uint8]:
        return np.asarray(self.mapping)

    @lazily
    def payload(self) -> memoryview:
        """The bytes after the header, writable."""
        return memoryview(self._bytes)[HEADER : HEADER + self.size]  # type: ignore[arg-type]

    @lazily
    def _words(self) -> memoryview[int]:
        return memoryview(self._bytes[:HEADER]).cast("B").cast("Q")  # type: ignore[arg-type]

    @lazily
    def _address(self) -> int:
        return self.mapping.address + HEADER

    def array(self, dtype: str, shape: tuple[int, ...], offset: int) -> Array:
        """Return a writable C-contiguous array over the payload at byte ``offset``; raises ProtocolError if
        it would reach beyond the block."""
        wanted = dtype, shape, offset
        view = self._views.get(wanted)
        if view is None:
            self._check(dtype, shape, offset)
            if len(self._views) >= _REMEMBERED_VIEWS:
                self._views.clear()
            view = self._views[wanted] = np.ndarray(shape, dtype, self._bytes, HEADER + offset)
        return view

    def held_array(self, dtype: str, shape: tuple[int, ...], offset: int) -> Array:
        """Like :meth:`array`; the block is released when the array and all its views are gone."""
        self._check(dtype, shape, offset)
        array = np.asarray(RetainedBlock(self, np.dtype(dtype).str, shape, self._address + offset))
        return array if array.dtype.char == np.dtype(dtype).char else array.view(dtype)

    def _check(self, dtype: str, shape: tuple[int, ...], offset: int) -> None:
        """Verify what a peer sent: an array must not make pointers of bytes, nor reach beyond the block."""
        try:
            parsed = np.dtype(dtype)
        except (TypeError, ValueError, SyntaxError):
            parsed = np.dtype(object)
        named = dtype in (parsed.str, "q", "Q")  # the last two: C's long long, which typestr cannot express
        plain = named and not parsed.hasobject and len(shape) <= _MOST_DIMENSIONS
        nbytes = math.prod(shape) * parsed.itemsize
        if not (plain and offset >= 0 and min(shape, default=0) >= 0 and offset + nbytes <= self.size):
            raise ProtocolError(
                f"A tensor of dtype {dtype!r} and shape {shape} at byte {offset} does not fit its block "
                f"of {self.size} bytes."
            )

    @property
    def is_taken(self) -> bool:
        return bool(self._words[_HELD]) or self.mapping.is_private

    def take(self) -> None:
        """Mark the block as held by the peer.  Called by the owner, before the peer gets to know it."""
        self._words[_HELD] = _TAKEN

    def release(self) -> None:
        """Give the block back to its owner, which may write to it at once.  Called by the holder."""
        if clear_word is None:
            self._words[_HELD] = _FREE
        else:
            clear_word(self.mapping.address + 8 * _HELD)

    @property
    def is_given_away(self) -> bool:
        """True if the block is never released, so that the owner may drop it."""
        return self._words[_HELD] == _GIVEN_AWAY or self.mapping.is_private

    def give_away(self) -> bool:
        """Make the block this process's own; its owner never gets it back.  The header becomes private, too,
        so nobody sees a later release.  False: that was not possible, and the block must not be released
        before it is."""
        if not self.mapping.is_private:
            self._words[_HELD] = _GIVEN_AWAY
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
        """Record that a call of this number will be sent."""
        self._words[_ASKED] = number

    def begin(self) -> None:
        """Record that the last call is begun: if no reply comes, it may have been executed."""
        self._words[_BEGUN] = self._words[_ASKED]

    @property
    def begun(self) -> int:
        """Number of the last call that was begun."""
        return self._words[_BEGUN]

    def offset_of(self, array: Array) -> int:
        """Return the byte in the payload at which an array of this block begins."""
        return int(array.__array_interface__["data"][0]) - self._address


def home_of(array: Array) -> Block | None:
    """Return the held block that an array lies in; None if it lies in none, or another process cannot use it
    as it is."""
    base: object = array.base
    while type(base) is np.ndarray:
        base = base.base
    if type(base) is not RetainedBlock or not array.flags.c_contiguous or array.dtype.hasobject:
        return None
    block: Block = base.block
    return block if block.mapping.has_descriptor else None


class Reference(NamedTuple):
    """An array in a block of another process.  It can be passed on without being mapped here."""

    block: Block
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int


class Announcer(Protocol):
    """Tells the peer about blocks, at the latest with the next message."""

    @property
    def room(self) -> int:
        """Number of new blocks that the next message can still announce.  Each takes one of the few
        descriptors of a packet."""

    @property
    def has_drops(self) -> bool:
        """True if the peer does not know yet of a dropped block or memory."""

    def shared(self, block: int, size: int, fd: int) -> None:
        """Announce a new block.  Takes ownership of ``fd``; the peer maps it before the block is named."""

    def foreign(self, memory: int, size: int, is_mapped: bool, fd: int) -> None:
        """Announce a memory that this process has not made.  Takes ownership of ``fd``."""

    def part(self, number: int, size: int, fd: int) -> None:
        """Announce memory of a GPU that was mapped by parts.  Takes ownership of ``fd``."""

    def dropped(self, block: int) -> None:
        """Announce that a block or a foreign memory will not be used again."""
