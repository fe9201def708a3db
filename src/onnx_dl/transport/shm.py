"""Shared memory that no one has to clean up: create, map.

A segment is a memfd.  It has no name, so nothing of it survives its last owner, however that ended, and the
64 MB /dev/shm of a container does not bound it.  Its pages are allocated at once with ``posix_fallocate``:
a system without memory says so here, instead of ending a process with SIGBUS at the first write.  For the
same reason it is sealed against shrinking, and what is neither sealed nor allocated is not mapped: whoever
made it could have the process that mapped it end.  How a descriptor reaches another process is
:mod:`onnx_dl.transport.sockets`; what lies inside is not known here.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
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
    fd = os.memfd_create("onnx-dl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException as error:  # Ctrl-C included, which comes when a call like this one ends
        os.close(fd)
        if not isinstance(error, OSError):
            raise
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

    __slots__ = ("__weakref__", "_address", "fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        """Takes over ``fd``.  It is not mapped before somebody looks at it.

        Raises:
            ValueError: it is smaller than ``size`` bytes, or may become so.
            OSError: it is no memfd.
        """
        self.fd: int | None = None
        self._address = 0
        self.size = size
        _check(fd, size)
        self.fd = fd

    @property
    def address(self) -> int:
        """Where it lies.  The page table is filled at once: page faults, not copying, are what makes fresh
        memory slow.

        Raises:
            SharedMemoryError: it cannot be mapped.
        """
        if not self._address:
            with _mapping:
                self._map()
        return self._address

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"version": 3, "typestr": "|u1", "shape": (self.size,), "data": (self.address, False)}

    def _map(self) -> None:
        if self._address or self.fd is None:
            return
        address = _libc.mmap(None, self.size, _PROT, mmap.MAP_SHARED | mmap.MAP_POPULATE, self.fd, 0)
        if address == _MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise SharedMemoryError(f"Cannot map {self.size} bytes of shared memory: {reason}.")
        self._address = address

    def __del__(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
        if self._address:
            _libc.munmap(self._address, self.size)

    def duplicate(self) -> int | None:
        """Another descriptor of the segment, which the caller closes; None if it has none any more.

        Raises:
            OSError: this process may have no more descriptors.
        """
        with _mapping:  # another thread may make this mapping shed the descriptor meanwhile
            return None if self.fd is None else os.dup(self.fd)

    def keep_descriptor(self) -> None:
        """Keeps the descriptor, so that the segment can be handed to a third process.

        Only the most recent mappings keep theirs: an application may hold more results than descriptors.
        """
        _with_descriptor.append(weakref.ref(self))
        while len(_with_descriptor) > KEPT_DESCRIPTORS:
            # An IndexError: another thread was faster.  No memory to map it: it keeps its descriptor.
            with contextlib.suppress(IndexError, SharedMemoryError):
                if (oldest := _with_descriptor.popleft()()) is not None:
                    oldest.shed()

    def shed(self) -> None:
        """Maps the segment and closes the descriptor."""
        with _mapping:
            self._map()
            fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def _check(fd: int, size: int) -> None:
    """A peer's word is not enough: a page that is gone ends who touches it, and a segment of any
    size costs its maker nothing until somebody maps it."""
    about = os.fstat(fd)
    if about.st_size < size or about.st_blocks * 512 < size:
        raise ValueError("the segment is smaller than announced")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("the segment may shrink")


KEPT_DESCRIPTORS: Final = 64
_mapping = threading.Lock()  # between a thread that looks at a segment and one that makes it shed


def _after_fork() -> None:
    global _mapping
    _mapping = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
_with_descriptor: collections.deque[weakref.ref[Mapping]] = collections.deque()


def freeze(data: bytes) -> int:
    """A descriptor of shared memory that holds ``data``; the caller closes it."""
    fd = create(len(data))
    view = memoryview(data)
    offset = 0
    while offset < len(data):
        offset += os.pwrite(fd, view[offset:], offset)
    return fd


def thaw(fd: int) -> bytes:
    """All bytes of a descriptor made by :func:`freeze`."""
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.read()
