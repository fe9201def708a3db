"""Arrays for an application to fill, in memory that workers see.

Covers making them; that a call with one needs no copy is :mod:`onnx_dl.transport.client_lane`'s.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_dl.concurrency.forking import Guard
from onnx_dl.tensors.arena import Arena, Nobody
from onnx_dl.tensors.values import VIEW_FROM


class Buffers:
    """Thread-safe.  Memory of arrays that are gone is used again, and given back when it is not."""

    def __init__(self) -> None:
        self._arena = Arena(Nobody(), keep_descriptors=True)
        self._lock = Guard()

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Like ``numpy.empty``: writable, C-contiguous, 64-byte aligned.

        Raises:
            TypeError: the dtype has no fixed size, or holds Python objects.
            SharedMemoryError: the system has no memory for it.
        """
        wanted = np.dtype(dtype)
        if wanted.hasobject or not wanted.itemsize:
            raise TypeError(f"An array of dtype {wanted} cannot lie in shared memory; use numpy.empty().")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = math.prod(shape) * wanted.itemsize
        if nbytes < VIEW_FROM or min(shape, default=0) < 0 or self._lock.is_mine:
            # Copied faster than looked up; numpy words the error; or a handler has interrupted us below.
            return np.empty(shape, wanted)
        with self._lock:
            block = self._arena.lease(nbytes)
        assert block is not None  # no peer has to be told of it
        return block.held_array(wanted.str, shape, 0)

    def trim(self) -> None:
        """Gives back what no array lies in; not now, if somebody is at it.

        Does not wait: whoever holds the lock may be interrupted there by what waits for our thread.
        """
        if self._lock.is_mine or not self._lock.acquire(blocking=False):
            return
        try:
            self._arena.trim()
        finally:
            self._lock.release()
