"""Shared memory that no one has to clean up: create, map.

A segment is a memfd.  It has no name, so nothing of it survives its last owner, however that ended, and the
64 MB /dev/shm of a container does not bound it.  Its pages are allocated at once with ``posix_fallocate``:
a system without memory says so here, instead of ending a process with SIGBUS at the first write.  How a
descriptor reaches another process is :mod:`onnx_dl.transport.sockets`; what lies inside is not known here.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import mmap
import os
import weakref
from typing import Final

from onnx_dl.errors import SharedMemoryError

_PROT: Final = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def create(size: int) -> int:
    """A descriptor of ``size`` bytes of zeroed shared memory; the caller closes it.

    Raises:
        SharedMemoryError: the system has not that much memory.
    """
    fd = os.memfd_create("onnx-dl", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        raise SharedMemoryError(
            f"The system refused {size} bytes of shared memory for tensors ({error.strerror}). "
            "Free memory, raise the container's limit, or run smaller batches."
        ) from None
    return fd


class Mapping:
    """A segment in this process's memory, writable; unmapped when nobody holds this any more.

    Made by libc's own mmap: Python's keeps a descriptor open for each mapping (until 3.13, where it need
    not), and an application that keeps a thousand results would run out of them.
    """

    __slots__ = ("__array_interface__", "__weakref__", "address", "fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd: int | None = None
        address = _libc.mmap(None, size, _PROT, mmap.MAP_SHARED | mmap.MAP_POPULATE, fd, 0)
        if address == _MAP_FAILED:
            self.size = 0
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.address: int = address
        self.size = size
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "data": (address, False),
        }

    def __del__(self) -> None:
        self.shed()
        if self.size:
            _libc.munmap(self.address, self.size)

    def keep(self, fd: int) -> None:
        """Takes over a descriptor of the segment, so that it can be handed to a third process.

        Only the most recent mappings keep theirs: an application may hold more results than descriptors.
        """
        self.fd = fd
        _with_descriptor.append(weakref.ref(self))
        while len(_with_descriptor) > KEPT_DESCRIPTORS:
            with contextlib.suppress(IndexError):  # another thread was faster
                if (oldest := _with_descriptor.popleft()()) is not None:
                    oldest.shed()

    def shed(self) -> None:
        """Closes the descriptor; the memory stays mapped."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


KEPT_DESCRIPTORS: Final = 64
_with_descriptor: collections.deque[weakref.ref[Mapping]] = collections.deque()


def attach(fd: int, size: int) -> Mapping:
    """The segment, mapped for reading and writing.  The mapping outlives ``fd`` and the segment's creator.

    The page table is filled at once: page faults, not copying, are what makes fresh memory slow.

    Raises:
        SharedMemoryError: the segment is smaller than ``size`` or cannot be mapped.
    """
    try:
        if os.fstat(fd).st_size < size:
            raise ValueError("the segment is smaller than announced")
        return Mapping(fd, size)
    except (OSError, ValueError) as error:
        raise SharedMemoryError(f"Cannot map {size} bytes of shared memory: {error}.") from None


def freeze(data: bytes) -> int:
    """A descriptor of shared memory that holds ``data``; the caller closes it."""
    fd = create(max(len(data), 1))
    view = memoryview(data)
    offset = 0
    while offset < len(data):
        offset += os.pwrite(fd, view[offset:], offset)
    os.ftruncate(fd, len(data))
    return fd


def thaw(fd: int) -> bytes:
    """All bytes of a descriptor made by :func:`freeze`."""
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.read()
