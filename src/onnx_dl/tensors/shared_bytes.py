"""Bytes that do not change, in shared memory, once for all in this process who have the same.

A model that is given as bytes is kept like this: workers are handed a descriptor, and whoever gave the bytes
may let go of them.  What a descriptor reaches another process with is :mod:`onnx_dl.transport.sockets`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from typing import Final

from onnx_dl.errors import SharedMemoryError
from onnx_dl.system import descriptor_limits
from onnx_dl.system.owned_descriptors import Descriptor
from onnx_dl.tensors import segment


class _Inherited(Descriptor):
    """One that a forked child keeps: what it leads to is as much the child's as all its memory."""

    __slots__ = ()

    def close_in_child(self) -> None:
        self._pid = os.getpid()


class Blob:
    """The memory goes when nobody in any process holds it any more."""

    def __init__(self, data: bytes | memoryview) -> None:
        """Raises:
        SharedMemoryError: the system has no memory for it.
        DescriptorsExhausted: this process may have no more descriptors.
        """
        fd = _frozen(data)
        self._descriptor = _Inherited(fd)
        self._size = len(data)
        # Of its own, because the descriptor may go: the program closes it, or others need it more.
        self._address = segment.map_privately(fd, self._size) if self._size else 0
        _blobs.add(self)

    def descriptor(self) -> int:
        """Of the memory; whoever asks closes it.

        Raises: like the constructor.
        """
        try:
            fd = self._descriptor.duplicate()
        except OSError:
            raise descriptor_limits.exhausted(_WHAT) from None
        return self._renewed() if fd is None else fd

    def _renewed(self) -> int:
        """The same bytes in other memory; those that had none of its descriptors any more goes."""
        with self._view() as view:
            fd = _frozen(view)
        with contextlib.suppress(OSError):  # no descriptor for a second one: the next time is a copy, too
            self._descriptor = _Inherited(os.dup(fd))
            if self._size:
                segment.map_privately(fd, self._size, self._address)
            _blobs.add(self)
        return fd

    def read(self) -> bytes:
        """A copy of the bytes."""
        with self._view() as view:
            return bytes(view)

    def _view(self) -> memoryview:
        whole = (ctypes.c_char * self._size).from_address(self._address) if self._size else b""
        return memoryview(whole).cast("B")

    def shed(self) -> None:
        """Closes the descriptor."""
        self._descriptor.close()

    def __del__(self) -> None:
        if address := getattr(self, "_address", 0):
            segment.unmap(address, self._size)


_WHAT: Final = "A model that is given as bytes"
_blobs: Final = segment.Latest()
"""An application may hold more models than descriptors; older ones are copied anew."""
_known: weakref.WeakValueDictionary[str, Blob] = weakref.WeakValueDictionary()


def keep(name: str, data: bytes) -> Blob:
    """The one blob of this name, which holds these bytes.

    Raises: like :class:`Blob`.
    """
    if (known := _known.get(name)) is None:
        known = _known[name] = Blob(data)  # two threads at one moment have one each
    return known


def _frozen(data: bytes | memoryview) -> int:
    try:
        return segment.freeze(data)
    except SharedMemoryError:
        raise
    except OSError:
        raise descriptor_limits.exhausted(_WHAT) from None
