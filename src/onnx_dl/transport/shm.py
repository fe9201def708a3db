"""Shared memory that no one has to clean up: create, map.

A segment is a memfd.  It has no name, so nothing of it survives its last owner, however that ended, and the
64 MB /dev/shm of a container does not bound it.  Its pages are allocated at once with ``posix_fallocate``:
a system without memory says so here, instead of ending a process with SIGBUS at the first write.  How a
descriptor reaches another process is :mod:`onnx_dl.transport.sockets`; what lies inside is not known here.
"""

from __future__ import annotations

import mmap
import os

from onnx_dl.errors import SharedMemoryError


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


def attach(fd: int, size: int) -> mmap.mmap:
    """The segment, mapped for reading and writing.  The mapping outlives ``fd`` and the segment's creator.

    The page table is filled at once: page faults, not copying, are what makes fresh memory slow.

    Raises:
        SharedMemoryError: the segment is smaller than ``size`` or cannot be mapped.
    """
    try:
        if os.fstat(fd).st_size < size:
            raise ValueError("the segment is smaller than announced")
        return mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
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
