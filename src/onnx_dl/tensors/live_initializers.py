"""Memory of the application that a worker sees as it changes.

Covers arrays whose owner writes to them where they lie, unseen by us: initializers that an application keeps
and updates.  The worker maps a copy; before each call it is compared with the original, which runs at the
speed of memory, and what changed is copied.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_dl.tensors import segment
from onnx_dl.tensors.arena import align
from onnx_dl.tensors.segment import Mapping

_STEP = 1 << 20
"""Bytes that are compared at a time."""


class LiveMemory:
    """Copies of arrays in one segment.  ``places`` are their offsets in it."""

    def __init__(self, arrays: Sequence[NDArray[np.uint8]], owners: object) -> None:
        """``owners`` keep alive what the arrays lie in.

        Raises:
            SharedMemoryError: the system has no memory for them.
        """
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
        """With no segment: a forked child must not change what its parent's workers see."""
        self._pid = os.getpid()
        self._pairs = []
        self._add()

    def _add(self) -> None:
        """Another segment.  Workers may have mapped the ones before, so these are kept up to date, too."""
        self._mapping = Mapping(segment.create(max(self._size, 1)), max(self._size, 1))
        whole = np.asarray(self._mapping)
        places = zip(self._arrays, self.places, strict=True)
        self._pairs += [(array, whole[place : place + array.nbytes]) for array, place in places]

    def descriptor(self) -> int:
        """Of the segment; whoever asks closes it.

        Raises:
            SharedMemoryError: the system has no memory for another one.
        """
        self.refresh()
        if (fd := self._mapping.duplicate()) is None:  # the program closed the descriptor
            self._add()
            self.refresh()
            fd = self._mapping.duplicate()
        assert fd is not None
        return fd

    def refresh(self) -> None:
        """Copies what changed.  Several threads may do so at once: each copies the same bytes."""
        if self._pid != os.getpid():
            self._begin()
        for original, copy in self._pairs:
            for start in range(0, original.nbytes, _STEP):
                part = slice(start, start + _STEP)
                if not np.array_equal(original[part], copy[part]):
                    copy[part] = original[part]


def view(fd: int) -> Any:
    """All bytes of a segment, for as long as somebody holds them.  Takes over ``fd``."""
    return np.asarray(Mapping(fd, os.fstat(fd).st_size))
