"""Memory for a body while it arrives: what it takes grows with what has come.

Memory beyond 64 KiB is the inference's, which counts it.  A body with binary tensors is placed so that the
first of them begins at a multiple of 64 bytes.  Later ones lie where they lie; whoever makes arrays of them
copies those that are not aligned for their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from onnx_dl.server.http import head
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


class Buffer:
    """Memory of a body of which at most ``length`` bytes come.  It grows by steps, and copies then."""

    def __init__(self, length: int, header_length: int | None, allocate: Allocate) -> None:
        """``header_length``: bytes before the first binary tensor; None or 0: alignment is of the begin."""
        self._length = length
        self._before = header_length or 0
        self._allocate = allocate
        self.filled = 0
        """Bytes that have come."""
        self._memory = memoryview(bytearray(min(length, STEPS[0])))

    @property
    def is_full(self) -> bool:
        return self.filled == self._length

    def room(self) -> memoryview:
        """Where the next bytes go; never empty before it is full."""
        return self._memory[self.filled :]

    def advance(self, nbytes: int) -> None:
        """So many bytes were written to :meth:`room`.

        Raises:
            RequestFailure: 429: there is no memory for more of the body.
        """
        self.filled += nbytes
        if self.filled == len(self._memory) and self.filled < self._length:
            self._grow()

    def write(self, data: memoryview) -> int:
        """Copy as much as belongs to the body; return how much that was.  Raises like :meth:`advance`."""
        taken = 0
        while taken < len(data) and not self.is_full:
            room = self.room()
            step = min(len(room), len(data) - taken)
            room[:step] = data[taken : taken + step]
            taken += step
            self.advance(step)
        return taken

    def take(self) -> memoryview:
        """The body, when it is there."""
        body, self._memory = self._memory[: self.filled], memoryview(b"")
        return body

    def _grow(self) -> None:
        size = self._larger()
        grown = aligned(self._allocate(size + _ALIGNED), self._before, size)
        grown[: self.filled] = self._memory
        self._memory = grown

    def _larger(self) -> int:
        return next_step(self._length, self.filled)


class Gathered(Buffer):
    """Memory of a body whose length is not known: chunked, or inflated."""

    def __init__(self, most: int, header_length: int | None, allocate: Allocate) -> None:
        super().__init__(most + 1, header_length, allocate)
        self._most = most

    def put(self, data: memoryview) -> None:
        """Append.  Raises RequestFailure: 413: more than ``most`` bytes; 429."""
        if self.filled + len(data) > self._most:
            raise head.body_too_large(self._most)
        self.write(data)

    def _larger(self) -> int:
        return min(self._length, 4 * self.filled)
