"""Initializers that the application keeps and updates in place, as the worker sees them.

The worker maps a copy.  Before each call the copy is compared with the original, at the speed of memory, and
changed parts are copied.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_dl.tensors import segment
from onnx_dl.tensors.block import align

_STEP = 1 << 20
"""Bytes of one comparison."""


class LiveMemory:
    """Copies of arrays in one segment; ``places`` are their offsets."""

    def __init__(self, arrays: Sequence[NDArray[np.uint8]], owners: object) -> None:
        """``owners`` keep the memory of the arrays alive.  Raises SharedMemoryError if the system has too
        little memory."""
        self.name = f"memory:{secrets.token_hex(16)}"
        self._owners = owners
        self._arrays = arrays
        self._pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        self.places: list[int] = []
        self._size = 0
        for array in arrays:
            self.places.append(self._size)
            self._size += align(array.nbytes)
        self._begin()
        self.refresh()

    def _begin(self) -> None:
        """Start with a new segment: a forked child must not change what its parent's workers see."""
        self._pid = os.getpid()
        self._pairs = []
        self._add()

    def _add(self) -> None:
        """Add a segment.  Earlier ones are updated, too, because workers may have mapped them."""
        self._mapping = segment.writable(segment.create(max(self._size, 1)), max(self._size, 1))
        whole = np.asarray(self._mapping)
        places = zip(self._arrays, self.places, strict=True)
        self._pairs += [(array, whole[place : place + array.nbytes]) for array, place in places]

    def descriptor(self) -> int:
        """Return a descriptor of the segment, which the caller closes.  Raises SharedMemoryError if the
        system has no memory for another one."""
        self.refresh()
        if (fd := self._mapping.duplicate()) is None:  # the program closed the descriptor
            self._add()
            self.refresh()
            fd = self._mapping.duplicate()
        assert fd is not None
        return fd

    def refresh(self) -> None:
        """Copy the changed parts.  Several threads may do this at once: each copies the same bytes."""
        if self._pid != os.getpid():
            self._begin()
        for original, copy in self._pairs:
            for start in range(0, original.nbytes, _STEP):
                part = slice(start, start + _STEP)
                if not np.array_equal(original[part], copy[part]):
                    copy[part] = original[part]


def view(fd: int) -> NDArray[np.uint8]:
    """Return all bytes of a segment as an array that keeps the mapping.  Takes ownership of ``fd``."""
    return np.asarray(segment.writable(fd, os.fstat(fd).st_size))
