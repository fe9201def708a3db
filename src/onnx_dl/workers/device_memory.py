"""Memory on a GPU that callers lend to a worker, and results that it lends to them.

A caller names an allocation by a handle.  It is open once in this process, however many lanes name it, and
closed as soon as none does: its owner must not free it before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from onnx_dl.errors import ProtocolError
from onnx_dl.ort.ortvalues import Parts
from onnx_dl.system import cuda_driver
from onnx_dl.system.cuda_driver import CudaDriver
from onnx_dl.system.cuda_types import DriverError
from onnx_dl.tensors import device_values
from onnx_dl.tensors.device_exports import Exporter
from onnx_dl.tensors.device_values import (
    BY_IPC,
    CUDA,
    DeviceTensor,
    Handle,
    Loan,
    UnopenedTensor,
    handle_from,
)
from onnx_dl.tensors.foreign_tables import PeerPart
from onnx_dl.workers.engines.base import DeviceResults

_MOST_KEPT: Final = 64
"""Allocations that stay open for one caller of a model with CUDA graphs."""
_NO_CONTEXT: Final = "the model's worker uses no GPU"


class _Key(NamedTuple):
    """Tells allocations apart.  One that came to the address of another has another number."""

    device: int
    handle: bytes
    buffer: int


class _Opened(NamedTuple):
    address: int
    sizes: tuple[int, ...]
    """Sizes of its parts; empty: it is one allocation."""
    users: int
    loan: Loan


class OpenAllocations:
    """The allocations of other processes that this one has open.  Used by all lanes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[_Key, _Opened] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, driver: CudaDriver, key: _Key, handle: Handle, pieces: Sequence[PeerPart]) -> _Opened:
        """Counts a user of an allocation, or of parts that only one lane has.

        Raises:
            DriverError: it cannot be opened.
            ValueError: it has another size than the caller says.
        """
        with self._lock:
            known = self._open.get(key)
            if known is None:
                sizes = tuple(piece.size for piece in pieces)
                if pieces:
                    address = driver.parts.open(key.device, [(piece.fd, piece.size) for piece in pieces])
                else:
                    address = driver.open(key.device, handle.handle)
                    _check_size(driver, key.device, address, handle.size)
                known = _Opened(address, sizes, 0, Loan())
            self._open[key] = known._replace(users=known.users + 1)
        return known

    def release(self, driver: CudaDriver, key: _Key) -> None:
        """Counts a user less, and closes the allocation after the last one."""
        with self._lock:
            known = self._open.pop(key)
            if known.users > 1:
                self._open[key] = known._replace(users=known.users - 1)
            else:
                known.loan.is_open = False
                # UnopenedTensor where its owner has ended, and the driver with it: nothing is left to close.
                with contextlib.suppress(DriverError):
                    if known.sizes:
                        driver.parts.close(key.device, known.address, known.sizes)
                    else:
                        driver.close(key.device, known.address)


def _check_size(driver: CudaDriver, device: int, address: int, size: int) -> None:
    """Raises ValueError if the allocation is smaller than its owner says: the engine would go beyond it.  The
    driver itself checks that of parts."""
    found = driver.pointer(address)
    if found is not None and found.size and found.size < size:
        driver.close(device, address)
        raise ValueError(f"an allocation of {found.size} bytes was announced with {size}")


_allocations: Final = OpenAllocations()


class LaneDevices:
    """Memory that one caller has lent, and results that were lent to it."""

    def __init__(
        self,
        *,
        keeps_open: bool,
        turn: AbstractContextManager[object] | None = None,
        part: Callable[[int], PeerPart] | None = None,
        allocations: OpenAllocations = _allocations,
        loaded: Callable[[], CudaDriver | None] = cuda_driver.loaded,
    ) -> None:
        """``keeps_open``: what was named stays open until the end of the lane: a CUDA graph of the model may
        have it, and would have to be captured again.  ``turn``: see :func:`base.turn`.
        ``part``: finds a part that the caller has announced, by its number."""
        self._most_kept = _MOST_KEPT if keeps_open else 0
        self._turn = turn or contextlib.nullcontext()
        self._part = part
        self._allocations = allocations
        self._loaded = loaded
        self._named: dict[_Key, _Opened] = {}
        """Allocations that are open for this lane."""
        self._devices: set[int] | None = None
        """Devices of these; None: to be found."""
        self._present: set[_Key] = set()
        """Allocations that the present request names."""
        self.lent: list[DeviceTensor] = []
        """Results that the caller copies now."""
        self._exporter = Exporter(takes_parts=False)
        self._only: set[_Key] | None = None
        """Allocations that :meth:`begin_with` was given, if nothing else was named or lent since."""
        self.uses: dict[int, set[_Key]] = {}
        """Allocations that bound runs use, by number of the run; a run is gone with the first of them."""

    def present(self) -> set[_Key]:
        """Returns the allocations that the present request names."""
        return set(self._present)

    def begin_with(self, keys: set[_Key]) -> None:
        """Does :meth:`begin` for a request that names these allocations, which are open."""
        if keys is not self._only:
            self._present |= keys
            self.begin()
            self._only = keys

    @property
    def is_used(self) -> bool:
        """True if something is open, or lent."""
        return bool(self._named or self.lent)

    def open(self, items: Sequence[object]) -> DeviceTensor | UnopenedTensor:
        """Returns the tensor that a request names, at its address here.

        Raises:
            ValueError, TypeError: the caller made it up.
        """
        handle = handle_from(items)
        driver = self._loaded()
        self._only = None
        if driver is None:
            return UnopenedTensor(_NO_CONTEXT)
        try:
            device = driver.device_of(handle.uuid)
            if device is None:
                return UnopenedTensor("the model's worker does not have the GPU that they are on")
            key = _Key(device, self._named_by(handle, items[1:]), handle.buffer)
            if key not in self._named:
                self._close_replaced(key)
                self._devices = None
                pieces = self._pieces(handle, items[1:])
                self._named[key] = self._allocations.open(driver, key, handle, pieces)
        except DriverError as error:
            return UnopenedTensor(f"the model's worker cannot open them ({error})")
        self._present.add(key)
        shape, opened = tuple(handle.shape), self._named[key]
        address = opened.address + handle.offset
        return DeviceTensor(handle.element_type, shape, CUDA, device, address, opened.loan)

    def _named_by(self, handle: Handle, numbers: Sequence[object]) -> bytes:
        """Returns what tells an allocation, or parts: these have numbers that only this lane knows."""
        return handle.handle if handle.kind == BY_IPC else f"{id(self)} {numbers}".encode()

    def _pieces(self, handle: Handle, numbers: Sequence[Any]) -> list[PeerPart]:
        """Returns the parts of a handle.  Raises ValueError and ProtocolError if the caller made them up."""
        if self._part is None and numbers:
            raise ValueError("this lane has no parts")
        pieces = [self._part(number) for number in numbers if self._part is not None]
        if pieces and sum(piece.size for piece in pieces) != handle.size:
            raise ValueError("the parts of a tensor have another size than it says")
        return pieces

    def begin(self) -> None:
        """Closes what the present request does not name, and gives up the results of the last one."""
        self.lent.clear()
        if len(self._named) > self._most_kept:
            self._close(self._named.keys() - self._present)
        self._present.clear()

    def synchronize(self) -> None:
        """Waits until all work of this process on the devices of the present tensors is done."""
        driver = self._loaded()
        if self._devices is None:
            self._devices = {key.device for key in self._named}
        if driver is not None:
            for device in self._devices:
                driver.synchronize(device)

    def lend(self, results: DeviceResults) -> list[object]:
        """Returns the results with handles in place of tensors; where there is no handle, the tensor's value,
        which travels in main memory.  They stay until :meth:`take_back`."""
        return [self._lent_one(value) if type(value) is DeviceTensor else value for value in results]

    def _lent_one(self, tensor: DeviceTensor) -> object:
        try:
            found = self._exporter.handle(tensor) if tensor.nbytes else UnopenedTensor("it is empty")
        except ValueError as error:
            found = UnopenedTensor(str(error))
        if isinstance(found, UnopenedTensor):
            return tensor.owner
        device_values.synchronize(tensor)  # the caller's streams do not wait for those of this process
        self.lent.append(tensor)
        self._only = None
        return found.parts()

    def take_back(self, by_value: Sequence[int]) -> list[Parts]:
        """Ends the loan of results; returns the values of those that the caller cannot open, by their order.

        Raises:
            ProtocolError: so many were not lent.
            DriverError: one cannot be copied.
        """
        lent, self.lent = self.lent, []
        if not {*by_value} <= {*range(len(lent))}:
            raise ProtocolError("A caller asks for results that were not lent to it.")
        with self._turn:
            return [
                Parts("dense", [tensor.element_type, list(tensor.shape), device_values.to_host(tensor)])
                for tensor in map(lent.__getitem__, by_value)
            ]

    def _close_replaced(self, key: _Key) -> None:
        """Closes an allocation that is gone, if another one came to its address: both have one handle."""
        gone = {old for old in self._named if old[:2] == key[:2]}
        self._present -= gone
        self._close(gone)

    def close(self) -> None:
        """Closes and gives up everything, at the end of the lane."""
        self.lent.clear()
        self._close(set(self._named))

    def _close(self, keys: set[_Key]) -> None:
        if not keys:
            return
        driver = self._loaded()
        self._devices = None
        self.uses = {number: used for number, used in self.uses.items() if not used & keys}
        for key in keys:
            del self._named[key]
            if driver is not None:
                with self._turn:
                    self._allocations.release(driver, key)
