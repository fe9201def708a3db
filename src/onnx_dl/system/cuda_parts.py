"""Memory of a GPU that was mapped by parts, such as torch's expandable segments.

A range of addresses is reserved, and allocations are mapped into it side by side.  Each has a handle of its
own, which is exported as a descriptor.  Two things are assumed of the driver: the handle at an address is the
one that was mapped there (documented), and ``cuMemGetAddressRange`` tells the part of an address, not the
reserved range (others rely on it).  The second is checked, and memory of which it is not true is not taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from ctypes import byref, c_int, c_size_t, c_uint64
from typing import Final, NamedTuple

from onnx_dl.system.cuda_calls import Calls
from onnx_dl.system.cuda_types import Access, DriverError

_AS_DESCRIPTOR: Final = 1
"""CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR."""
_AT_DEVICE, _READ_WRITE = 1, 3
"""CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE."""


class MappedPart(NamedTuple):
    """An allocation that is mapped at ``base``.  While its handle is kept, no other one has this handle."""

    handle: int
    base: int
    size: int

    @property
    def end(self) -> int:
        return self.base + self.size


class MappedParts:
    """Functions of a driver for such memory.  From any thread.  All methods raise DriverError."""

    def __init__(
        self,
        call: Calls,
        current: Callable[[int], AbstractContextManager[object]],
        handle_of: Callable[[int], int],
    ) -> None:
        """``current``: makes the context of a device current; ``handle_of``: its CUdevice."""
        self._call = call
        self._current = current
        self._handle_of = handle_of

    def at(self, device: int, address: int) -> MappedPart | None:
        """Returns the part that has this address, whose handle the caller gives to :meth:`release`.

        None: it is no such memory, or the driver does not tell where the part begins and ends.
        """
        base, size = c_uint64(), c_size_t()
        with self._current(device), contextlib.ExitStack() as undone:
            try:
                handle = self._retained(address)
                undone.callback(self.release, handle)
                self._call("cuMemGetAddressRange_v2", byref(base), byref(size), address)
                part = MappedPart(handle, base.value, size.value)
                for end in (part.base, part.end - 1):
                    undone.callback(self.release, found := self._retained(end))
                    if found != handle:  # the range is that of several parts
                        return None
            except DriverError:
                return None
            if not part.base <= address < part.end:
                return None
            self._retained(address)  # for the caller
        return part

    def cover(self, device: int, address: int, nbytes: int) -> bool:
        """Tells whether parts lie side by side behind all of these bytes."""
        end = address + nbytes
        while address < end:
            if (part := self.at(device, address)) is None:
                return False
            self.release(part.handle)
            address = part.end
        return True

    def _retained(self, address: int) -> int:
        handle = c_uint64()
        self._call("cuMemRetainAllocationHandle", byref(handle), address)
        return handle.value

    def release(self, handle: int) -> None:
        """Gives a handle of :meth:`at` back."""
        self._call("cuMemRelease", handle)

    def export(self, part: MappedPart) -> int:
        """Returns a descriptor for other processes, which the caller closes."""
        fd = c_int(-1)
        self._call("cuMemExportToShareableHandle", byref(fd), part.handle, _AS_DESCRIPTOR, 0)
        return fd.value

    def open(self, device: int, parts: Sequence[tuple[int, int]]) -> int:
        """Maps parts of another process side by side; returns the address of the first.

        ``parts``: descriptor and size of each; the caller closes the descriptors.
        """
        total, address = sum(size for _, size in parts), c_uint64()
        with self._current(device), contextlib.ExitStack() as undone:
            self._call("cuMemAddressReserve", byref(address), total, 0, 0, 0)
            undone.callback(self._call, "cuMemAddressFree", address.value, total)
            place = address.value
            for fd, size in parts:
                self._map(place, fd, size)
                undone.callback(self._call, "cuMemUnmap", place, size)
                place += size
            access = Access(_AT_DEVICE, self._handle_of(device), _READ_WRITE)
            self._call("cuMemSetAccess", address.value, total, byref(access), 1)
            undone.pop_all()
        return address.value

    def _map(self, place: int, fd: int, size: int) -> None:
        handle = c_uint64()
        self._call("cuMemImportFromShareableHandle", byref(handle), fd, _AS_DESCRIPTOR)
        try:
            self._call("cuMemMap", place, size, 0, handle, 0)
        finally:
            self._call("cuMemRelease", handle)  # the mapping keeps the memory

    def close(self, device: int, address: int, sizes: Sequence[int]) -> None:
        """Unmaps what :meth:`open` has returned for parts of these sizes."""
        with self._current(device):
            place = address
            for size in sizes:
                self._call("cuMemUnmap", place, size)
                place += size
            self._call("cuMemAddressFree", address, place - address)
