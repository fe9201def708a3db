"""Memory for a body while it arrives: what it takes grows with what has come.

Memory beyond 64 KiB is the inference's, which counts it.  A body with binary tensors is placed so that the
first of them begins at a multiple of 64 bytes.  Later ones lie where they lie; whoever makes arrays of them
copies those that are not aligned for their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np

from onnx_dl.server.http import head
from onnx_dl.server.http.chunked import ChunkDecoder
from onnx_dl.server.http.head import Framing
from onnx_dl.server.http.limits import STEPS, next_step

_ALIGNED: Final = 64

Allocate = Callable[[int], memoryview]
"""Writable memory of a number of bytes; raises RequestFailure (429)."""


def aligned(memory: memoryview, before: int, nbytes: int) -> memoryview:
    """Part of ``memory``, of ``nbytes``, in which the byte at ``before`` is aligned.  ``memory`` has 63 bytes
    more."""
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    offset = -(address + before) % _ALIGNED
    return memory[offset : offset + nbytes]


class IncomingBody(Protocol):
    """A body that arrives."""

    @property
    def filled(self) -> int:
        """Bytes that have come."""

    @property
    def is_complete(self) -> bool: ...

    def room(self) -> memoryview | None:
        """Return the place of the next bytes; None: what comes must be looked at first, by :meth:`write`."""

    def advance(self, nbytes: int) -> None:
        """Note that so many bytes were written to :meth:`room`.  Raises RequestFailure: 429."""

    def write(self, data: memoryview) -> int:
        """Take what belongs to the body; return how much that was.  Raises RequestFailure: 400, 413, 429."""

    def take(self) -> memoryview:
        """The body, when it is complete."""


def open_body(framing: Framing, most: int, allocate: Allocate) -> IncomingBody:
    """Memory for the body of a request.  ``most``: bytes of it."""
    before = None if framing.encoding else framing.header_length
    if framing.length is None:
        return ChunkedBody(most, before, allocate)
    return FixedBody(framing.length, before, allocate)


class _Memory:
    """Memory that grows as it is filled, to ``most`` bytes.  Growing copies."""

    def __init__(
        self, most: int, header_length: int | None, allocate: Allocate, larger: Callable[[int, int], int]
    ) -> None:
        """``header_length``: bytes before the first binary tensor; None or 0: the begin is aligned.
        ``larger``: the next size, of ``most`` and the bytes that are there."""
        self._most = most
        self._before = header_length or 0
        self._allocate = allocate
        self._larger = larger
        self.filled = 0
        self._memory = memoryview(bytearray(min(most, STEPS[0])))

    def room(self) -> memoryview:
        """Return the place of the next bytes; not empty before ``most`` are there."""
        return self._memory[self.filled :]

    def advance(self, nbytes: int) -> None:
        """Note that so many bytes were written to :meth:`room`.  Raises RequestFailure: 429: no memory."""
        self.filled += nbytes
        if self.filled == len(self._memory) and self.filled < self._most:
            size = self._larger(self._most, self.filled)
            grown = aligned(self._allocate(size + _ALIGNED), self._before, size)
            grown[: self.filled] = self._memory
            self._memory = grown

    def copy(self, data: memoryview) -> int:
        """Copy as much as there is room for in the end; return how much.  Raises like :meth:`advance`."""
        taken = 0
        while taken < len(data) and self.filled < self._most:
            room = self.room()
            step = min(len(room), len(data) - taken)
            room[:step] = data[taken : taken + step]
            taken += step
            self.advance(step)
        return taken

    def take(self) -> memoryview:
        """Return what is there, and keep no view of it."""
        taken, self._memory = self._memory[: self.filled], memoryview(b"")
        return taken


class FixedBody:
    """A body of ``length`` bytes."""

    def __init__(self, length: int, header_length: int | None, allocate: Allocate) -> None:
        self._length = length
        self._memory = _Memory(length, header_length, allocate, next_step)
        self.room = self._memory.room
        self.advance = self._memory.advance
        self.write = self._memory.copy
        self.take = self._memory.take

    @property
    def filled(self) -> int:
        return self._memory.filled

    @property
    def is_complete(self) -> bool:
        return self._memory.filled == self._length


class Gathered:
    """Bytes whose number is not known before: of a chunked body, or inflated."""

    def __init__(self, most: int, header_length: int | None, allocate: Allocate) -> None:
        self._most = most
        self._memory = _Memory(most + 1, header_length, allocate, _four_times)
        self.take = self._memory.take

    @property
    def filled(self) -> int:
        return self._memory.filled

    def put(self, data: memoryview) -> None:
        """Append.  Raises RequestFailure: 413: more than ``most`` bytes; 429."""
        if self._memory.filled + len(data) > self._most:
            raise head.body_too_large(self._most)
        self._memory.copy(data)


def _four_times(most: int, filled: int) -> int:
    return min(most, 4 * filled)


class ChunkedBody:
    """A body that comes in chunks."""

    def __init__(self, most: int, header_length: int | None, allocate: Allocate) -> None:
        self._gathered = Gathered(most, header_length, allocate)
        self._decoder = ChunkDecoder(self._gathered.put)
        self.take = self._gathered.take
        self.write = self._decoder.feed

    @property
    def filled(self) -> int:
        return self._gathered.filled

    @property
    def is_complete(self) -> bool:
        return self._decoder.is_complete

    def room(self) -> None:
        return None

    def advance(self, nbytes: int) -> None:
        raise AssertionError("chunks are not read to their place")
