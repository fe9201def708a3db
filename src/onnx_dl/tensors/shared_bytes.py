"""Constant bytes in shared memory, one copy for all users in this process.

Models given as bytes are stored like this: workers get a descriptor, and the application may free its bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from typing import Final

from onnx_dl import linux_only
from onnx_dl.errors import SharedMemoryError
from onnx_dl.system import descriptor_limits
from onnx_dl.system.owned_descriptors import Descriptor
from onnx_dl.tensors import segment


class _Inherited(Descriptor):
    """A descriptor that stays open in a forked child: the child owns the memory like all its other memory."""

    __slots__ = ()

    def close_in_child(self) -> None:
        self._pid = os.getpid()


class SharedBytes:
    """Constant bytes in shared memory, which is freed with its last user in any process."""

    def __init__(self, data: bytes | memoryview) -> None:
        """Raises:
        SharedMemoryError: the system has no memory for it.
        DescriptorsExhausted: this process may have no more descriptors.
        """
        fd = _frozen(data)
        self._descriptor = _Inherited(fd)
        self._size = len(data)
        # Mapped, because the descriptor may be closed: by the program, or by RecentDescriptors.
        self._address = segment.map_privately(fd, self._size) if self._size else 0
        _blobs.add(self)

    def descriptor(self) -> int:
        """Return a descriptor of the memory, which the caller closes.  Raises like the constructor."""
        try:
            fd = self._descriptor.duplicate()
        except OSError:
            raise descriptor_limits.exhausted(_WHAT) from None
        return self._renewed() if fd is None else fd

    def _renewed(self) -> int:
        """Copy the bytes to a new segment, which replaces the one without descriptor."""
        with self._view() as view:
            fd = _frozen(view)
        with contextlib.suppress(OSError):  # no second descriptor is left: the next time makes a copy, too
            self._descriptor = _Inherited(os.dup(fd))
            if self._size:
                segment.map_privately(fd, self._size, self._address)
            _blobs.add(self)
        return fd

    def read(self) -> bytes:
        """Return a copy of the bytes."""
        with self._view() as view:
            return bytes(view)

    def _view(self) -> memoryview:
        whole = (ctypes.c_char * self._size).from_address(self._address) if self._size else b""
        return memoryview(whole).cast("B")

    def close_descriptor(self) -> None:
        """Close the descriptor."""
        self._descriptor.close()

    def __del__(self) -> None:
        if address := getattr(self, "_address", 0):
            segment.unmap(address, self._size)


class HeldBytes:
    """Constant bytes on platforms without memfd: each descriptor is that of a new temporary file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def descriptor(self) -> int:
        """Return a descriptor of a copy, which the caller closes.  Raises like :class:`SharedBytes`."""
        return _frozen(self._data)

    def read(self) -> bytes:
        """Return the bytes."""
        return self._data


_WHAT: Final = "A model that is given as bytes"
_blobs: Final = segment.RecentDescriptors()
"""An application may hold more models than descriptors; older models are copied again when needed."""
_known: weakref.WeakValueDictionary[str, SharedBytes | HeldBytes] = weakref.WeakValueDictionary()


def keep(name: str, data: bytes) -> SharedBytes | HeldBytes:
    """Return the one blob of this name, with these bytes.  Raises like :class:`SharedBytes`."""
    if (known := _known.get(name)) is None:
        kind = SharedBytes if linux_only.HAS_MEMFD else HeldBytes
        known = _known[name] = kind(data)  # two threads at the same moment get one each
    return known


def _frozen(data: bytes | memoryview) -> int:
    try:
        return segment.freeze(data)
    except SharedMemoryError:
        raise
    except OSError:
        raise descriptor_limits.exhausted(_WHAT) from None
