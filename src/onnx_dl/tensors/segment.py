"""Shared memory that needs no cleanup: segments and their mappings.

A segment is a memfd.  It has no name, so it ends with its last owner, however that ended, and the 64 MB
/dev/shm of a container does not limit it.  Its pages are allocated at once with ``posix_fallocate``: without
memory this fails here, instead of ending a process with SIGBUS at the first write.  For the same reason it is
sealed against shrinking, and a segment that is not sealed or not allocated is not mapped: its maker could end
the process that mapped it.  :mod:`onnx_dl.transport.sockets` sends descriptors to other processes.
Elsewhere than on Linux it is a temporary file (:mod:`onnx_dl.tensors.temporary_memory`).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from onnx_dl import linux_only
from onnx_dl.errors import SharedMemoryError
from onnx_dl.linux_only import fcntl
from onnx_dl.system.owned_descriptors import Descriptor

if TYPE_CHECKING or not linux_only.HAS_MEMFD:  # it imports tempfile, which costs 4 ms and 0.7 MB
    from onnx_dl.tensors import temporary_memory
    from onnx_dl.tensors.temporary_memory import TemporaryMapping


def _declare(libc: ctypes.CDLL) -> None:
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


_PROT: Final = linux_only.flags(mmap, "PROT_READ", "PROT_WRITE")
_SHARED: Final = linux_only.flags(mmap, "MAP_SHARED", "MAP_POPULATE")
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_libc: Final = linux_only.libc(_declare)
_MAP_FIXED: Final = 0x10  # the same on all our machines; Python has no names for these two
_MREMAP_TO: Final = 1 | 2
_TAKEN: Final = "the program closed its descriptor."


def create(size: int) -> int:
    """Create ``size`` bytes of zeroed shared memory; return the descriptor, which the caller closes.  Raises
    SharedMemoryError if the system has too little memory."""
    if not linux_only.HAS_MEMFD:
        return temporary_memory.create(size)
    fd = os.memfd_create("onnx-dl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException as error:  # Ctrl-C included, which is raised when a call like this one ends
        os.close(fd)
        if not isinstance(error, OSError):
            raise
        raise SharedMemoryError(
            f"The system refused {size} bytes of shared memory for tensors ({error.strerror}). "
            "Free memory, raise the container's limit, or run smaller batches."
        ) from None
    return fd


class Mapping:
    """A segment in this process's memory, writable; unmapped with its last reference.  Uses mmap of libc:
    Python's keeps a descriptor open for each mapping (optional since 3.13), and an application that keeps a
    thousand results would run out of descriptors."""

    __slots__ = ("__weakref__", "_descriptor", "_place", "before_unmap", "is_private", "size")

    def __init__(self, fd: int, size: int) -> None:
        """Takes ownership of ``fd``, which is mapped at the first use.

        Raises:
            ValueError: the segment is smaller than ``size`` bytes, or may shrink.
            OSError: ``fd`` is not a memfd.
        """
        self._place: dict[None, int] = {}  # empty: not mapped.  A dict, because each change is atomic
        self.size = size
        self.is_private = False
        """True if the memory is this process's own: no other process sees what is written here."""
        self.before_unmap: Callable[[], object] | None = None
        """Called before the memory goes, in any thread; takes no lock that its thread may hold."""
        _check(fd, size)
        self._descriptor = Descriptor(fd)

    @property
    def has_descriptor(self) -> bool:
        """True if the segment can be sent to another process."""
        return self._descriptor.number >= 0

    @property
    def address(self) -> int:
        """The address of the mapping.  The page table is filled at once: page faults, not copies, make fresh
        memory slow.  Raises SharedMemoryError if it cannot be mapped."""
        return self._place.get(None) or self._map()

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"version": 3, "typestr": "|u1", "shape": (self.size,), "data": (self.address, False)}

    def _map(self) -> int:
        """Map the segment; if another thread was faster, use its mapping."""
        address = self._map_once()
        place = self._place.get(None) if address is None else self._place.setdefault(None, address)
        if place is None:
            raise SharedMemoryError(f"Cannot map {self.size} bytes of shared memory: {_TAKEN}")
        if address is not None and address != place:
            _libc.munmap(address, self.size)
        return place

    def _map_once(self) -> int | None:
        """Map the segment and return its address.  None: another thread has mapped it and closed the
        descriptor, or the program has closed that."""
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
        """Map the segment without a duplicate, because this process may have no more descriptors.  Another
        thread of ours may close the number meanwhile, which may then be that of another file.  That thread
        has mapped the segment before, so this mapping will not be used."""
        if not self._descriptor.holds():
            return None
        try:
            return _mapped(self.size, _SHARED, self._descriptor.number)
        except SharedMemoryError:
            if None in self._place:
                return None
            raise

    def __del__(self) -> None:
        # A weak reference may still call close_descriptor(), which then maps nothing.
        address, self._place[None] = self._place.get(None), 0
        if address:
            if self.before_unmap is not None:
                self.before_unmap()
            _libc.munmap(address, self.size)

    def duplicate(self) -> int | None:
        """Return another descriptor of the segment, which the caller closes; None if it has none any more.
        Raises OSError if this process may have no more descriptors."""
        return self._descriptor.duplicate()

    def keep_descriptor(self) -> None:
        """Keep the descriptor, so that the segment can be sent to a third process.  Only the latest mappings
        keep theirs: an application may hold more results than descriptors."""
        _mappings.add(self)

    def close_descriptor(self) -> None:
        """Map the segment and close the descriptor."""
        if self.address:
            self._descriptor.close()

    # --- around a fork ------------------------------------------------------------------------------------

    def make_private(self) -> bool:
        """Map the segment copy-on-write at the same address: later writes stay in this process and its forks.
        No other process may write to the segment any more.  Threads may read and write meanwhile: nothing is
        copied, and the kernel replaces the mapping in one step.  False: the descriptor is closed already."""
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
        """Do what :meth:`make_private` does, by copying.  No other thread may write meanwhile.  Raises
        SharedMemoryError if the system has no memory for it."""
        copy = _mapped(self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE, -1)
        ctypes.memmove(copy, self.address, self.size)
        _libc.mremap(copy, self.size, self.size, _MREMAP_TO, self.address)
        self.is_private = True


def writable(fd: int, size: int) -> Mapping | TemporaryMapping:
    """Map memory that :func:`create` has made.  Takes ownership of ``fd``; raises like :class:`Mapping`."""
    return Mapping(fd, size) if linux_only.HAS_MEMFD else TemporaryMapping(fd, size)


def map_privately(fd: int, size: int, address: int | None = None) -> int:
    """Map a segment read-only, for this process and its forks; return the address.  ``address``: replace the
    caller's mapping at this address.  Raises SharedMemoryError if it cannot be mapped."""
    flags = mmap.MAP_PRIVATE | (0 if address is None else _MAP_FIXED)
    return _mapped(size, flags, fd, address, mmap.PROT_READ)


def map_shared(fd: int, size: int) -> int:
    """Map memory of another process, readable and writable; return the address.  Its pages are not asked for:
    those of a hole would be made.  Raises SharedMemoryError if it cannot be mapped."""
    return _mapped(size, linux_only.flags(mmap, "MAP_SHARED"), fd)


def unmap(address: int, size: int) -> None:
    """Unmap memory that :func:`map_privately` or :func:`map_shared` has mapped."""
    _libc.munmap(address, size)


def _mapped(size: int, flags: int, fd: int, address: int | None = None, access: int = _PROT) -> int:
    found: int = _libc.mmap(address, size, access, flags, fd, 0)
    if found == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise SharedMemoryError(f"Cannot map {size} bytes of shared memory: {reason}.")
    return found


def _check(fd: int, size: int) -> None:
    """Verify what a peer sent: touching a missing page ends this process, and a segment without pages costs
    its maker nothing, whatever its size."""
    stat = os.fstat(fd)
    if stat.st_size < size or stat.st_blocks * 512 < size:
        raise ValueError("the segment is smaller than announced")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("the segment may shrink")


KEPT_DESCRIPTORS: Final = 64


class _HasDescriptor(Protocol):
    def close_descriptor(self) -> None: ...


class RecentDescriptors:
    """Limits the number of open descriptors: only the latest :data:`KEPT_DESCRIPTORS` owners keep theirs."""

    def __init__(self) -> None:
        self._added: collections.deque[weakref.ref[_HasDescriptor]] = collections.deque()

    def add(self, owner: _HasDescriptor) -> None:
        self._added.append(weakref.ref(owner))
        while len(self._added) > KEPT_DESCRIPTORS:
            # IndexError: another thread was faster.  Others: it cannot be mapped, and keeps its descriptor.
            with contextlib.suppress(IndexError, SharedMemoryError, OSError):
                if (oldest := self._added.popleft()()) is not None:
                    oldest.close_descriptor()


_mappings: Final = RecentDescriptors()


def freeze(data: bytes | memoryview) -> int:
    """Copy ``data`` to shared memory; return the descriptor, which the caller closes."""
    fd = create(len(data))
    try:
        offset = 0
        with memoryview(data) as view:
            while offset < len(data):
                offset += linux_only.pwrite(fd, view[offset:], offset)
    except BaseException:  # Ctrl-C included
        os.close(fd)
        raise
    return fd


def thaw(fd: int) -> bytes:
    """Return all bytes of a descriptor made by :func:`freeze`. Uses pread: all descriptors of this memory
    share one file position, and several processes may read at once."""
    size, parts, at = os.fstat(fd).st_size, [], 0
    while part := linux_only.pread(fd, size - at, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)  # no copy if there is one part


def path_of(fd: int) -> str:
    """Return the path of an open descriptor of this process; needs /proc."""
    return f"/proc/self/fd/{fd}"
