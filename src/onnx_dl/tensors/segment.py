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
import weakref
from typing import Final, Protocol

from onnx_dl.errors import SharedMemoryError
from onnx_dl.system.owned_descriptors import Descriptor

_PROT: Final = mmap.PROT_READ | mmap.PROT_WRITE
_SHARED: Final = mmap.MAP_SHARED | mmap.MAP_POPULATE
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_MAP_FIXED: Final = 0x10  # of Linux on all that we run on; Python has no name for these two
_MREMAP_TO: Final = 1 | 2
_TAKEN: Final = "the program closed its descriptor."


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

    __slots__ = ("__weakref__", "_descriptor", "_place", "is_private", "size")

    def __init__(self, fd: int, size: int) -> None:
        """Takes over ``fd``.  It is not mapped before somebody looks at it.

        Raises:
            ValueError: it is smaller than ``size`` bytes, or may become so.
            OSError: it is no memfd.
        """
        self._place: dict[None, int] = {}  # empty: not mapped.  Each change is one step
        self.size = size
        self.is_private = False
        """Whether it is this process's own: what is written here is seen here only."""
        _check(fd, size)
        self._descriptor = Descriptor(fd)

    @property
    def has_descriptor(self) -> bool:
        """Whether the segment can be handed to another process."""
        return self._descriptor.number >= 0

    @property
    def address(self) -> int:
        """Where it lies.  The page table is filled at once: page faults, not copying, are what makes fresh
        memory slow.

        Raises:
            SharedMemoryError: it cannot be mapped.
        """
        return self._place.get(None) or self._map()

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"version": 3, "typestr": "|u1", "shape": (self.size,), "data": (self.address, False)}

    def _map(self) -> int:
        """Maps it; if another thread is faster, what that has mapped counts."""
        address = self._map_once()
        place = self._place.get(None) if address is None else self._place.setdefault(None, address)
        if place is None:
            raise SharedMemoryError(f"Cannot map {self.size} bytes of shared memory: {_TAKEN}")
        if address is not None and address != place:
            _libc.munmap(address, self.size)
        return place

    def _map_once(self) -> int | None:
        """Where it lies now.  None: another thread has mapped it and closed the descriptor, or the program
        has closed that."""
        try:
            fd = self._descriptor.duplicate()
        except OSError:
            return self._map_by_number()
        if fd is None:
            return None
        try:
            return _mapped(self.size, _SHARED, fd)
        finally:
            os.close(fd)

    def _map_by_number(self) -> int | None:
        """Without a duplicate, because this process may have no more descriptors.

        Another thread of ours may close the number meanwhile, and it may be another file's then.  That thread
        has mapped the segment before, so whatever comes of it here is not used.
        """
        if not self._descriptor.holds():
            return None
        try:
            return _mapped(self.size, _SHARED, self._descriptor.number)
        except SharedMemoryError:
            if None in self._place:
                return None
            raise

    def __del__(self) -> None:
        # Its descriptor goes with it.  A weak reference may still lead here (shed), which then maps nothing.
        address, self._place[None] = self._place.get(None), 0
        if address:
            _libc.munmap(address, self.size)

    def duplicate(self) -> int | None:
        """Another descriptor of the segment, which the caller closes; None if it has none any more.

        Raises:
            OSError: this process may have no more descriptors.
        """
        return self._descriptor.duplicate()

    def keep_descriptor(self) -> None:
        """Keeps the descriptor, so that the segment can be handed to a third process.

        Only the most recent mappings keep theirs: an application may hold more results than descriptors.
        """
        _mappings.add(self)

    def shed(self) -> None:
        """Maps the segment and closes the descriptor."""
        if self.address:
            self._descriptor.close()

    # --- around a fork ------------------------------------------------------------------------------------

    def make_private(self) -> bool:
        """The same bytes at the same address, but from now on what is written stays in this process, and in
        those that it forks.  Nobody else may write to the segment any more.

        Other threads may read and write meanwhile: nothing is copied, and the kernel exchanges the pages in
        one step.  False: that cannot be, because it has no descriptor any more.
        """
        with contextlib.suppress(OSError, SharedMemoryError):
            if (fd := self._descriptor.duplicate()) is not None:
                try:
                    _mapped(self.size, mmap.MAP_PRIVATE | _MAP_FIXED, fd, self.address)
                    self.is_private = True
                finally:
                    os.close(fd)
                self._descriptor.close()
        return self.is_private

    def make_copy(self) -> None:
        """The same as :meth:`make_private`, by copying, where no other thread writes meanwhile.

        Raises:
            SharedMemoryError: the system has no memory for it.
        """
        copy = _mapped(self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE, -1)
        ctypes.memmove(copy, self.address, self.size)
        _libc.mremap(copy, self.size, self.size, _MREMAP_TO, self.address)
        self.is_private = True


def map_privately(fd: int, size: int, address: int | None = None) -> int:
    """Where a segment lies that is only read, in this process and in those that it forks.

    Args:
        address: where it is to lie, in the place of another that the caller has mapped.

    Raises:
        SharedMemoryError: it cannot be mapped.
    """
    flags = mmap.MAP_PRIVATE | (0 if address is None else _MAP_FIXED)
    return _mapped(size, flags, fd, address, mmap.PROT_READ)


def unmap(address: int, size: int) -> None:
    """What :func:`map_privately` has mapped."""
    _libc.munmap(address, size)


def _mapped(size: int, flags: int, fd: int, address: int | None = None, access: int = _PROT) -> int:
    found: int = _libc.mmap(address, size, access, flags, fd, 0)
    if found == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise SharedMemoryError(f"Cannot map {size} bytes of shared memory: {reason}.")
    return found


def _check(fd: int, size: int) -> None:
    """A peer's word is not enough: a page that is gone ends who touches it, and a segment of any
    size costs its maker nothing until somebody maps it."""
    about = os.fstat(fd)
    if about.st_size < size or about.st_blocks * 512 < size:
        raise ValueError("the segment is smaller than announced")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("the segment may shrink")


KEPT_DESCRIPTORS: Final = 64


class Sheds(Protocol):
    """What has a descriptor."""

    def shed(self) -> None:
        """Closes it, and does without."""


class Latest:
    """Keeps the descriptors few: of those that are added, only the latest have theirs."""

    def __init__(self) -> None:
        self._added: collections.deque[weakref.ref[Sheds]] = collections.deque()

    def add(self, one: Sheds) -> None:
        self._added.append(weakref.ref(one))
        while len(self._added) > KEPT_DESCRIPTORS:
            # An IndexError: another thread was faster.  No memory to map it, or no descriptor: it keeps its.
            with contextlib.suppress(IndexError, SharedMemoryError, OSError):
                if (oldest := self._added.popleft()()) is not None:
                    oldest.shed()


_mappings: Final = Latest()


def freeze(data: bytes | memoryview) -> int:
    """A descriptor of shared memory that holds ``data``; the caller closes it."""
    fd = create(len(data))
    try:
        offset = 0
        with memoryview(data) as view:
            while offset < len(data):
                offset += os.pwrite(fd, view[offset:], offset)
    except BaseException:  # Ctrl-C included
        os.close(fd)
        raise
    return fd


def thaw(fd: int) -> bytes:
    """All bytes of a descriptor made by :func:`freeze`.

    By their places: all processes that have a descriptor of this memory share one position in it, and several
    may read at once.
    """
    size, parts, at = os.fstat(fd).st_size, [], 0
    while part := os.pread(fd, size - at, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)  # of one part, that itself


def path_of(fd: int) -> str:
    """At which this process finds what a descriptor leads to, where /proc is mounted."""
    return f"/proc/self/fd/{fd}"
