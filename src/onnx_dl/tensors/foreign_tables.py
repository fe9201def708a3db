"""The foreign memories that the ends of a lane know: what a caller has announced, and what its worker has.

A caller announces a memory before the first call that names it, with a descriptor, and drops it when it was
closed.  The worker reads, writes or maps it.  :mod:`onnx_dl.tensors.foreign` is the caller's object.
"""

from __future__ import annotations

import collections
import os
import stat
import weakref
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_dl.concurrency import primitives
from onnx_dl.errors import ProtocolError, SharedMemoryError
from onnx_dl.system import descriptor_limits
from onnx_dl.tensors import segment
from onnx_dl.tensors.block import Announcer
from onnx_dl.tensors.foreign import (
    ForeignMemory,
    SharedDescriptor,
    check_file,
    check_slice,
    read_into,
    write_from,
)

MOST_NAMED: Final = 32
"""Memories that a caller announces on a lane at a time.  One more replaces the one that was named longest
ago."""
MOST_KEPT: Final = 64
"""Memories that a worker keeps for one lane."""
RESERVE: Final = 64
"""Descriptors of a worker that memories of all lanes leave free: for lanes, their blocks, and the engine."""


class TooManyMemories(Exception):
    """A message names too many memories, or the lane has news of too many other blocks.  Nothing was sent."""


class _Known(NamedTuple):
    number: int
    memory: weakref.ref[SharedDescriptor]
    turn: int
    """The message that named it last."""


class AnnouncedMemories:
    """The memories that one worker knows, by numbers that the lane's blocks share.  Used by one thread at a
    time; memories are closed in any thread."""

    def __init__(self, announcer: Announcer, next_number: Callable[[], int]) -> None:
        self._announcer = announcer
        self._next_number = next_number
        self._known: dict[int, _Known] = {}
        """Keyed by serial number of the memory, ordered by the time of their last use."""
        self._closed: collections.deque[int] = collections.deque()
        """Serial numbers of closed memories, known or not."""
        self._turn = 0
        self.copied = 0
        """Bytes that the worker keeps for copies of inputs and results."""

    def __len__(self) -> int:
        return len(self._known)

    @property
    def has_news(self) -> bool:
        """True if the worker must learn that a memory was closed, or a block dropped."""
        return bool(self._closed) or self._announcer.has_drops

    def memory_closed(self, serial: int) -> None:
        """Has the next message drop this memory.  Called by any thread."""
        self._closed.append(serial)

    def next_message(self) -> None:
        """Begin another message: memories that are named from now on belong to it."""
        self._turn += 1
        self.drop_closed()

    def number(self, memory: SharedDescriptor) -> int:
        """Return the worker's number of this memory.

        Raises:
            ForeignMemoryError: it is closed.
            TooManyMemories: this message cannot announce it.
            OSError: this process may have no more descriptors.
        """
        known = self._known.pop(memory.serial, None) or self._announced(memory)
        self._known[memory.serial] = known._replace(turn=self._turn)  # moves it to the end
        return known.number

    def drop_closed(self) -> None:
        """Tell the worker to drop the memories that were closed."""
        while self._closed:
            self._drop(self._closed.popleft())

    def drop_all(self) -> None:
        """Tell the worker to drop all memories, and what it keeps for copies."""
        self._closed.clear()
        self.announce_again()
        self.copied = 0

    def announce_again(self) -> None:
        """Have the next message that names a memory announce it again, as if the worker knew none."""
        for serial in list(self._known):
            self._drop(serial)

    def _announced(self, memory: SharedDescriptor) -> _Known:
        if self._announcer.room <= 0 or not self._has_room():
            raise TooManyMemories
        memory.watch(self)  # first: so a close() in another thread is not overlooked
        fd = memory.duplicate()
        number = self._next_number()
        if isinstance(memory, ForeignMemory):
            self._announcer.foreign(number, memory.size, memory.is_mapped, fd)
        else:
            self._announcer.part(number, memory.size, fd)
        return _Known(number, weakref.ref(memory), self._turn)

    def _has_room(self) -> bool:
        """Make room for one more memory; false if this message names all known ones."""
        if len(self._known) < MOST_NAMED:
            return True
        oldest = next(iter(self._known))
        return self._known[oldest].turn != self._turn and self._drop(oldest)

    def _drop(self, serial: int) -> bool:
        if (known := self._known.pop(serial, None)) is None:
            return False
        if (memory := known.memory()) is not None:
            memory.unwatch(self)
        self._announcer.dropped(known.number)
        return True


class _SharedMapping:
    """A mapped memory, unmapped with the last array in it."""

    def __init__(self, fd: int, size: int) -> None:
        self._size = size
        self._address = segment.map_shared(fd, size)

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"version": 3, "typestr": "|u1", "shape": (self._size,), "data": (self._address, False)}

    def __del__(self) -> None:
        if address := getattr(self, "_address", 0):
            segment.unmap(address, self._size)


class PeerMemory:
    """One memory that a caller has announced."""

    def __init__(self, fd: int, size: int, is_mapped: bool) -> None:
        """Takes ownership of ``fd``.  Raises ProtocolError if it is no regular file: others could let a read
        wait."""
        self._fd = fd
        self.size = size
        self._may_map = is_mapped
        found = os.fstat(fd)
        self.identity = found.st_dev, found.st_ino
        """Equal for two memories that are the same file."""
        self._mapped: NDArray[np.uint8] | None = None
        if not stat.S_ISREG(found.st_mode):
            raise ProtocolError("A caller sent a foreign memory that is not a regular file.")

    @property
    def is_mapped(self) -> bool:
        """True if the engine may use the bytes in place: the caller allows it, and they can be mapped."""
        if self._may_map and self._mapped is None:
            try:
                self._mapped = np.asarray(_SharedMapping(self._fd, self.size))
            except SharedMemoryError:  # too little address space, or too many mappings: copies do as well
                self._may_map = False
        return self._may_map

    def read(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes at ``offset``.  Raises ForeignMemoryError if they are not there."""
        check_slice(self.size, offset, target.nbytes)
        read_into(self._fd, offset, target)

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes at ``offset``.  Raises ForeignMemoryError if there is no room for them."""
        check_slice(self.size, offset, data.nbytes)
        write_from(self._fd, offset, data)

    def check(self, offset: int, nbytes: int) -> None:
        """Raise ForeignMemoryError if the file does not have these bytes now."""
        check_slice(self.size, offset, nbytes)
        check_file(self._fd, offset + nbytes)

    def view(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return these bytes of the mapping.  Touching them ends this process with SIGBUS if the file is
        truncated meanwhile.  Only if :attr:`is_mapped`."""
        check_slice(self.size, offset, nbytes)
        assert self.is_mapped and self._mapped is not None
        return self._mapped[offset : offset + nbytes]

    def __del__(self) -> None:
        primitives.close(self._fd)


class PeerPart:
    """A descriptor of memory of a GPU that a caller has announced."""

    def __init__(self, fd: int, size: int) -> None:
        """Takes ownership of ``fd``."""
        self.fd = fd
        self.size = size

    def __del__(self) -> None:
        primitives.close(self.fd)


class PeerMemories:
    """The memories that a caller has announced on one lane, by number."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._memories: dict[int, PeerMemory | PeerPart | None] = {}
        """None stands for one that this process had no descriptor for."""
        self.drops = 0
        """Number of memories that the caller has dropped so far."""

    def add(self, number: int, size: int, is_mapped: bool, fd: int) -> None:
        """Keep a memory.  Takes ownership of ``fd``.

        Raises:
            ProtocolError: it is no file, the number is in use, or there are too many.
        """
        self._keep(number, PeerMemory(fd, size, is_mapped))

    def add_part(self, number: int, size: int, fd: int) -> None:
        """Keep a descriptor of memory of a GPU.  Takes ownership of ``fd``.  Raises like :meth:`add`."""
        self._keep(number, PeerPart(fd, size))

    def _keep(self, number: int, memory: PeerMemory | PeerPart | None) -> None:
        size = 0 if memory is None else memory.size
        if number <= 0 or size < 0 or number in self._memories or len(self._memories) >= self._most:
            raise ProtocolError(f"Foreign memory {number} of {size} bytes cannot be announced.")
        if descriptor_limits.free() < RESERVE:  # an error of the calls that name it, not of the lane
            memory = None
        self._memories[number] = memory

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget these memories.  Arrays in them keep their mappings."""
        for number in numbers:
            if number in self._memories:
                del self._memories[number]
                self.drops += 1

    def memory(self, number: int) -> PeerMemory:
        """Return a memory.

        Raises:
            ProtocolError: the caller did not announce it.
            DescriptorsExhausted: this process had too few descriptors left when it was announced.
        """
        memory = self._found(number)
        if isinstance(memory, PeerMemory):
            return memory
        raise ProtocolError(f"A message names {number} as a foreign memory, which it is not.")

    def part(self, number: int) -> PeerPart:
        """Return a descriptor of memory of a GPU.  Raises like :meth:`memory`."""
        part = self._found(number)
        if isinstance(part, PeerPart):
            return part
        raise ProtocolError(f"A message names {number} as memory of a GPU, which it is not.")

    def _found(self, number: int) -> PeerMemory | PeerPart:
        try:
            memory = self._memories[number]
        except KeyError:
            raise ProtocolError(
                f"A message names foreign memory {number}, which was never announced."
            ) from None
        if memory is None:
            raise descriptor_limits.exhausted("A memory of a third process")
        return memory


def overlap(first: tuple[PeerMemory, int, int], second: tuple[PeerMemory, int, int]) -> bool:
    """True if two slices, each a memory, an offset and a number of bytes, share bytes of one file."""
    (one, at, nbytes), (other, other_at, other_nbytes) = first, second
    return one.identity == other.identity and at < other_at + other_nbytes and other_at < at + nbytes
