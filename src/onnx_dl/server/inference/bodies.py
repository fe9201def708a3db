"""Memory for the bodies of requests: arena blocks, whose bytes count as in flight while anyone has them."""

from __future__ import annotations

import weakref
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl.client.host_client import HostClient
from onnx_dl.errors import SharedMemoryError
from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.v2.failures import unavailable
from onnx_dl.server.v2.messages import InferRequest

Array = NDArray[np.uint8]

FREE_UP_TO: Final = 16 << 10
"""Bytes of a request that are not worth counting: heads are bounded, and so are connections."""


class _Body(weakref.ref[Array]):
    """A reference to the memory of one body."""

    __slots__ = ("key", "nbytes")
    key: int
    nbytes: int


class Bodies:
    """Makes the memory.  Thread-safe."""

    def __init__(self, host: HostClient, limits: Limits) -> None:
        self._host = host
        self._limits = limits
        self._living: dict[int, _Body] = {}
        """References by ``id`` of the array, which cannot be another's before the reference is told."""

    def allocate(self, nbytes: int) -> memoryview:
        """Return writable memory.  It is free again when no view of it is left.

        Raises:
            RequestFailure: 429: too many bytes are in flight.  503: the system has no memory.
        """
        if nbytes <= FREE_UP_TO:
            return memoryview(bytearray(nbytes))
        return memoryview(self.empty(nbytes))  # type: ignore[arg-type]

    def empty(self, nbytes: int) -> Array:
        """Return an array of so many bytes; raises like :meth:`allocate`."""
        self._limits.take_bytes(nbytes)
        try:
            array: Array = self._host.empty(nbytes, np.uint8)
            body = _Body(array, self._free)
            body.key, body.nbytes = id(array), nbytes
            self._living[body.key] = body
        except SharedMemoryError as error:
            self._limits.free_bytes(nbytes)
            raise unavailable(f"there is no memory for a request of {nbytes} bytes: {error}") from None
        except BaseException:
            self._limits.free_bytes(nbytes)
            raise
        return array

    def _free(self, body: weakref.ref[Any]) -> None:
        """Run when the last view is gone, in any thread."""
        assert isinstance(body, _Body)
        del self._living[body.key]
        self._limits.free_bytes(body.nbytes)

    def holds(self, request: InferRequest) -> bool:
        """True if an input lies in memory of :meth:`allocate`, so that its bytes are counted already."""
        datas = (tensor.data for tensor in request.inputs)
        return any(type(data) is memoryview and id(data.obj) in self._living for data in datas)
