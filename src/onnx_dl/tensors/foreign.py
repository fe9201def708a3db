"""Memory that neither side of a lane has made: its maker may change or truncate it at any time.

A :class:`ForeignMemory` cannot be sealed, and it has no header.  So its bytes are read and written by
``pread`` and ``pwrite``, which fail where a mapping would end the process with SIGBUS; only a worker maps it,
and only if it was opened for that.  :mod:`onnx_dl.tensors.foreign_lanes` announces it to workers.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
import weakref
from typing import Final, NamedTuple, Protocol

import numpy as np

from onnx_dl import linux_only
from onnx_dl.concurrency import primitives
from onnx_dl.errors import ForeignMemoryError
from onnx_dl.system.owned_descriptors import Descriptor
from onnx_dl.tensors.block import Array

_KINDS: Final = frozenset("biufc")
"""Kinds of dtypes whose arrays are nothing but their bytes."""
_serials: Final = itertools.count(1)


class Watcher(Protocol):
    """One that knows a memory and must learn that it is closed."""

    def memory_closed(self, serial: int) -> None:
        """Called by any thread; takes no lock."""


class SharedDescriptor:
    """A descriptor that workers get, once on each lane.  Thread-safe."""

    def __init__(self, fd: int, size: int) -> None:
        """Takes ownership of ``fd``, which stands for ``size`` bytes."""
        self.serial = next(_serials)
        """A number that no other one of this process has."""
        self.size = size
        self._watchers: dict[weakref.ref[Watcher], None] = {}  # a dict, because each change is atomic
        try:
            self._descriptor = Descriptor(fd)
        except BaseException:
            primitives.close(fd)
            raise

    def close(self) -> None:
        """Ends the use by later calls.  Those that have begun go on.  May be called twice."""
        self._descriptor.close()
        for ref in list(self._watchers):
            if (watcher := ref()) is not None:
                watcher.memory_closed(self.serial)

    @property
    def is_closed(self) -> bool:
        return self._descriptor.number < 0

    def duplicate(self) -> int:
        """Returns another descriptor, which the caller closes.  Raises ForeignMemoryError if this is closed,
        and OSError if this process may have no more descriptors."""
        fd = self._descriptor.duplicate()
        if fd is None:
            raise ForeignMemoryError("The shared memory is not registered any more.")
        return fd

    def watch(self, watcher: Watcher) -> None:
        """Has :meth:`close` tell a watcher, in whichever thread that is, for as long as there is one."""
        watchers = self._watchers
        watchers[weakref.ref(watcher, lambda ref: watchers.pop(ref, None))] = None

    def unwatch(self, watcher: Watcher) -> None:
        """Undoes :meth:`watch`."""
        self._watchers.pop(weakref.ref(watcher), None)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):  # its constructor may have raised
            self.close()


class ForeignMemory(SharedDescriptor):
    """One file of shared memory of another process, such as a client's.  Thread-safe."""

    def __init__(self, fd: int, size: int, *, is_mapped: bool) -> None:
        """Takes ownership of ``fd``, which is open for reading and writing.

        Args:
            size: bytes from the begin of the file that calls may use.
            is_mapped: workers map it; a maker that truncates it can end them.  Else they copy from and to it.

        Raises:
            ForeignMemoryError: it is no file of at least ``size`` bytes.  ``fd`` is closed.
        """
        self.is_mapped = is_mapped
        try:
            check_file(fd, size)
        except BaseException:
            primitives.close(fd)
            raise
        super().__init__(fd, size)

    def read(self, offset: int, target: memoryview) -> None:
        """Fills ``target``, a writable view of bytes, from byte ``offset`` on.  Raises ForeignMemoryError if
        there are no such bytes."""
        self.check(offset, target.nbytes)
        fd = self.duplicate()
        try:
            read_into(fd, offset, target)
        finally:
            primitives.close(fd)

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes from byte ``offset`` on.  Raises ForeignMemoryError if there is no room for them."""
        self.check(offset, data.nbytes)
        fd = self.duplicate()
        try:
            write_from(fd, offset, data)
        finally:
            primitives.close(fd)

    def check(self, offset: int, nbytes: int) -> None:
        """Raises ForeignMemoryError if it does not have these bytes."""
        check_slice(self.size, offset, nbytes)

    def check_now(self, offset: int, nbytes: int) -> None:
        """Raises ForeignMemoryError if the file does not have these bytes now."""
        self.check(offset, nbytes)
        fd = self.duplicate()
        try:
            check_file(fd, offset + nbytes)
        finally:
            primitives.close(fd)


class ForeignArray(NamedTuple):
    """An input that lies in a foreign memory, C-contiguous from byte ``offset`` on."""

    memory: ForeignMemory
    offset: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return bytes_of(self.dtype, self.shape)

    def copy(self) -> Array:
        """Returns its present value as an array of this process.  Raises like :meth:`ForeignMemory.read`."""
        self.memory.check(self.offset, self.nbytes)
        made: Array = np.empty(self.shape, self.dtype)
        self.memory.read(self.offset, as_bytes(made))
        return made


class ForeignPlace(NamedTuple):
    """A place for an output: ``nbytes`` bytes of a foreign memory from byte ``offset`` on."""

    memory: ForeignMemory
    offset: int
    nbytes: int


class Written(NamedTuple):
    """Stands for an output that was written to its place."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]


def is_only_bytes(dtype: np.dtype[np.generic]) -> bool:
    """True if the bytes of its arrays are all that they are: it is no text, and has no objects."""
    return dtype.kind in _KINDS


def bytes_of(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> int:
    """Returns the bytes of such an array.  Raises ForeignMemoryError if its bytes alone are not its value."""
    if not is_only_bytes(dtype) or min(shape, default=0) < 0:
        raise ForeignMemoryError(f"An array of dtype {dtype} and shape {shape} cannot lie in shared memory.")
    return dtype.itemsize * math.prod(shape)


def as_bytes(array: Array) -> memoryview:
    """Returns a view of the bytes of a C-contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def check_file(fd: int, size: int) -> None:
    """Raises ForeignMemoryError if ``fd`` is no regular file of at least ``size`` bytes.  A read of anything
    else may wait."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise ForeignMemoryError("The shared memory is not a regular file.")
    if size < 0 or found.st_size < size:
        raise ForeignMemoryError(f"The shared memory has {found.st_size} bytes, not {size}.")


def check_slice(size: int, offset: int, nbytes: int) -> None:
    """Raises ForeignMemoryError if a memory of ``size`` bytes does not have this slice."""
    if offset < 0 or nbytes < 0 or offset + nbytes > size:
        raise ForeignMemoryError(
            f"{nbytes} bytes at byte {offset} reach beyond the {size} bytes of the shared memory."
        )


def read_into(fd: int, offset: int, target: memoryview) -> None:
    """Reads until ``target`` is full.  Raises ForeignMemoryError if the file ends before, or fails."""
    done = 0
    try:
        while done < target.nbytes:
            count = linux_only.preadv(fd, [target[done:]], offset + done)
            if not count:
                break
            done += count
    except OSError as error:
        raise ForeignMemoryError(f"The shared memory cannot be read: {error.strerror}.") from None
    if done < target.nbytes:
        raise ForeignMemoryError(
            f"The shared memory ends after {done} of the {target.nbytes} bytes at byte {offset}: "
            "it was truncated."
        )


def write_from(fd: int, offset: int, data: memoryview) -> None:
    """Writes all of ``data``.  Raises ForeignMemoryError if the file is shorter than that, or if it fails: a
    write beyond its end would lengthen a file that its maker has truncated."""
    check_file(fd, offset + data.nbytes)
    done = 0
    try:
        while done < data.nbytes:
            done += linux_only.pwrite(fd, data[done:], offset + done)
    except OSError as error:
        raise ForeignMemoryError(f"The shared memory cannot be written: {error.strerror}.") from None
