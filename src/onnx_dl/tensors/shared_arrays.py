"""Arrays in shared memory that an application fills: a call with one needs no copy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_dl.concurrency.forking import Guard
from onnx_dl.tensors.arena import Arena, NoPeer
from onnx_dl.tensors.values import VIEW_FROM


class SharedArrays:
    """Makes the arrays.  Thread-safe.  Memory of deleted arrays is reused, or returned to the system."""

    def __init__(self) -> None:
        self._arena = Arena(NoPeer(), keep_descriptors=True)
        self._lock = Guard()

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array like ``numpy.empty``: writable, C-contiguous, 64-byte aligned.

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
            # A copy is faster; numpy raises the error; or a signal handler has interrupted the lines below.
            return np.empty(shape, wanted)
        with self._lock:
            block = self._arena.take(nbytes)
        assert block is not None  # NoPeer always has room
        return block.held_array(wanted.str, shape, 0)

    def trim(self) -> None:
        """Return unused memory to the system, unless another call is using the arena now.  Does not wait: the
        holder of the lock may be interrupted by code that waits for our thread."""
        if self._lock.is_mine or not self._lock.acquire(blocking=False):
            return
        try:
            self._arena.trim()
        finally:
            self._lock.release()
