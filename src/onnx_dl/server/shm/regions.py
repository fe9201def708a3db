"""The regions that clients have registered, and who uses them now.

A region that is unregistered while requests use it stays open until the last of them ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import numpy as np

from onnx_dl.errors import ForeignMemoryError, PlaceTooSmall
from onnx_dl.server.interfaces import RegionStatus
from onnx_dl.server.options import ClientShm
from onnx_dl.server.shm import keys
from onnx_dl.server.v2.failures import RequestFailure, forbidden, invalid, not_found, too_many
from onnx_dl.tensors.foreign import ForeignArray, ForeignMemory, ForeignPlace

MOST: Final = 1024
"""Regions at a time; each takes a descriptor."""
_LONGEST_NAME: Final = 1024
_LARGEST: Final = (1 << 63) - 1
"""The largest offset in a file."""


def _plain(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


class Region:
    """One registered region.  Thread-safe.  A ``with`` block uses it: it stays open for the block."""

    def __init__(self, status: RegionStatus, memory: ForeignMemory) -> None:
        """Takes over ``memory``."""
        self.status = status
        self.memory = memory
        self._lock = threading.Lock()
        self._users = 0
        self._is_registered = True

    def __enter__(self) -> Self:
        """Raises RequestFailure (404) if it was unregistered meanwhile."""
        with self._lock:
            if not self._is_registered:
                raise _unknown(self.status.name)
            self._users += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._users -= 1
            is_last = not (self._users or self._is_registered)
        if is_last:
            self.memory.close()

    def unregister(self) -> None:
        """Closes the memory, or has the last user do that.  May be called twice."""
        with self._lock:
            was_registered, self._is_registered = self._is_registered, False
            is_last = was_registered and not self._users
        if is_last:
            self.memory.close()

    def array(self, offset: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> ForeignArray:
        """An input that lies ``offset`` bytes behind the region's begin.  Raises RequestFailure (400) if it
        reaches beyond the region's end, or if its dtype cannot lie in memory."""
        array = ForeignArray(self.memory, self.status.offset + offset, dtype, shape)
        try:
            self.check(offset, array.nbytes)
        except ForeignMemoryError as error:
            raise invalid(str(error)) from None
        return array

    def place(self, offset: int, nbytes: int) -> ForeignPlace:
        """A place for an output.  Raises like :meth:`array`."""
        self.check(offset, nbytes)
        return ForeignPlace(self.memory, self.status.offset + offset, nbytes)

    def read(self, offset: int, nbytes: int, allocate: Callable[[int], memoryview] = _plain) -> memoryview:
        """A copy of these bytes, for what is not read by a worker, such as text.  Raises RequestFailure (400)
        if the region, or the file as it is now, does not have them.  ``allocate``: makes memory for it."""
        self.check(offset, nbytes)
        try:
            self.memory.check_now(self.status.offset + offset, nbytes)  # before memory is taken for the copy
            data = allocate(nbytes)
            self.memory.read(self.status.offset + offset, data)
        except ForeignMemoryError as error:
            raise failure_of(error) from None
        return data

    def write(self, offset: int, nbytes: int, output: str, data: bytes | bytearray | memoryview) -> None:
        """Writes an output into its place of ``nbytes`` bytes.  Raises RequestFailure (400) if it does not
        fit; nothing was written then."""
        self.check(offset, nbytes)
        with memoryview(data).cast("B") as view:
            if view.nbytes > nbytes:
                raise _too_small(output, view.nbytes, nbytes)
            try:
                self.memory.write(self.status.offset + offset, view)
            except ForeignMemoryError as error:
                raise failure_of(error) from None

    def check(self, offset: int, nbytes: int) -> None:
        """Raises RequestFailure (400) if the region does not have this slice."""
        size = self.status.byte_size
        if offset < 0 or offset > size or (offset == size and nbytes):
            raise invalid(f"Invalid offset for shared memory region: '{self.status.name}'")
        if nbytes < 0 or offset + nbytes > size:
            raise invalid(f"Invalid offset + byte size for shared memory region: '{self.status.name}'")


class Regions:
    """The regions of this process.  Thread-safe."""

    def __init__(self, mode: ClientShm) -> None:
        """``mode``: how their bytes are read and written; ``off``: there are none."""
        self._mode: ClientShm = mode
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Opens the memory of ``key`` and registers ``byte_size`` bytes of it.

        Raises:
            RequestFailure: 400: the name is taken, or there is no such memory; 403: shared memory is off;
                429: there are too many regions.
        """
        self._check_new(name)
        is_size = 0 <= offset <= _LARGEST and 0 < byte_size <= _LARGEST - offset
        if not is_size:
            raise invalid(f"failed to register shared memory region '{name}': invalid args")
        try:
            fd = keys.open_key(key, offset + byte_size)
        except RequestFailure as refused:
            raise invalid(f"failed to register shared memory region '{name}': {refused}") from None
        self.adopt(RegionStatus(name, key, offset, byte_size), fd)

    def adopt(self, status: RegionStatus, fd: int) -> None:
        """Registers memory that another process of this server has opened and checked.  Takes ownership of
        ``fd``.  Raises like :meth:`register`."""
        try:
            memory = ForeignMemory(fd, status.offset + status.byte_size, is_mapped=self._mode == "map")
        except ForeignMemoryError as error:
            raise invalid(f"failed to register shared memory region '{status.name}': {error}") from None
        region = Region(status, memory)
        try:
            with self._lock:
                self._check_new(status.name)
                self._regions[status.name] = region
        except RequestFailure:
            region.unregister()
            raise

    def unregister(self, name: str | None) -> None:
        """Unregisters one region, or all (None).  A name that is not known is no error."""
        self._check_mode()
        with self._lock:
            gone = list(self._regions) if name is None else [name]
            regions = [self._regions.pop(each) for each in gone if each in self._regions]
        for region in regions:
            region.unregister()

    def status(self, name: str | None) -> list[RegionStatus]:
        """One region, or all (None), by name.  Raises RequestFailure (404) if there is no such region."""
        with self._lock:
            regions = dict(self._regions)
        if name is None:
            return [regions[each].status for each in sorted(regions)]
        if name not in regions:
            raise not_found(f"Unable to find system shared memory region: '{name}'")
        return [regions[name].status]

    def find(self, name: str) -> Region:
        """A region, to be used in a ``with`` block.  Raises RequestFailure: 404: there is none of this name;
        403: shared memory is off."""
        self._check_mode()
        if (region := self._regions.get(name)) is None:
            raise _unknown(name)
        return region

    def close(self) -> None:
        """Unregisters all, at the end of the process."""
        with self._lock:
            regions, self._regions = list(self._regions.values()), {}
        for region in regions:
            region.unregister()

    def _check_mode(self) -> None:
        if self._mode == "off":
            raise forbidden(
                "Clients' shared memory is off. Start the server with --client-shm copy (or map) to use it."
            )

    def _check_new(self, name: str) -> None:
        self._check_mode()
        if not name or len(name) > _LONGEST_NAME:
            raise invalid(f"The name of a shared memory region has 1 to {_LONGEST_NAME} characters.")
        if name in self._regions:
            raise RequestFailure(
                400, "ALREADY_EXISTS", f"shared memory region '{name}' already in manager", reason="OTHER"
            )
        if len(self._regions) >= MOST:
            raise too_many(f"{MOST} shared memory regions are registered; unregister some first.")


def failure_of(error: ForeignMemoryError) -> RequestFailure:
    """The answer to a request whose memory was not there, or too small: the client's mistake."""
    if isinstance(error, PlaceTooSmall):
        return _too_small(error.output, error.needed, error.available)
    return invalid(str(error))


def _too_small(output: str, needed: int, available: int) -> RequestFailure:
    return invalid(
        f"shared memory size specified with the request for output '{output}' ({available} bytes) should be "
        f"at least {needed} bytes to hold the results"
    )


def _unknown(name: str) -> RequestFailure:
    return not_found(f"Unable to find shared memory region: '{name}'")
