"""Tensors in the memory of a GPU.

The host never reads or writes such memory.  The driver (:mod:`onnx_dl.system.cuda_driver`) copies it, or a
handle of its allocation goes to another process, which opens it.  Nothing here loads a driver or makes a
context: where the application has none, no address is a device's.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_dl.concurrency.forking import Guard
from onnx_dl.ort import device_ortvalues
from onnx_dl.ort.ortvalues import Parts
from onnx_dl.protocol.lane import Plain
from onnx_dl.system import cuda_driver
from onnx_dl.system.cuda_driver import CudaDriver
from onnx_dl.system.cuda_types import DevicePointer, DriverError
from onnx_dl.tensors.foreign import SharedDescriptor, as_bytes

CUDA: Final = "cuda"
"""The one device type whose memory can be taken."""
BY_HANDLE: Final = "by handle"
"""Place of a result that a worker allocates on a device and lends to the caller."""

BOUND_RUN: Final = "bound_run"
"""Method of a worker: a run with all inputs and outputs on devices, which is bound, and then made again."""
BY_IPC: Final = "ipc"
"""Kind of a handle that is 64 bytes of the driver's."""
BY_PARTS: Final = "parts"
"""Kind of a handle that is descriptors of parts, which are mapped side by side."""
_LOOK_EVERY: Final = 0.25
"""Seconds for which a process that had no driver is taken to have none, where an address is only checked."""

_BITS: Final = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128,
    16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""Bits of an item, by number of onnx's TensorProto.DataType; text has none."""


class DeviceTensor(NamedTuple):
    """A tensor that lies on a device: onnx's number of its element type, its shape, and where it is."""

    element_type: int
    shape: tuple[int, ...]
    device_type: str
    device_id: int
    address: int
    owner: object = None
    """Keeps the memory alive; None: the caller does."""

    @property
    def nbytes(self) -> int:
        return size_of(self.element_type, self.shape)

    @property
    def where(self) -> tuple[str, int, int, tuple[int, ...], int]:
        """Arguments of IOBinding's methods after the name."""
        return self.device_type, self.device_id, self.element_type, self.shape, self.address


class Loan:
    """Memory of another process that this one has open: the owner of tensors in it."""

    is_open = True


class UnopenedTensor(NamedTuple):
    """Stands for a tensor that this process cannot open; it has to be copied."""

    reason: str
    value: object = None
    """A result of a worker, which came by value."""


class Handle(NamedTuple):
    """A tensor as another process may open it."""

    element_type: int
    shape: list[int]
    uuid: bytes
    """UUID of the device."""
    buffer: int
    """The driver's number of the allocation, unique in the exporting process."""
    kind: str
    handle: bytes
    offset: int
    """Offset of the tensor in its allocation, or in the first part."""
    nbytes: int
    size: int
    """Bytes of the allocation, or of all parts."""

    def parts(self, pieces: Sequence[SharedDescriptor] = ()) -> Parts:
        """Returns it as a value of a message.  ``pieces``: its parts, of which the message has numbers."""
        return Parts("device", [Plain(list(self)), *pieces])


def size_of(element_type: int, shape: Sequence[int]) -> int:
    """Returns the bytes of a tensor.  Raises ValueError for a type or a shape that none can have."""
    bits = _BITS.get(element_type)
    if bits is None or min(shape, default=0) < 0:
        raise ValueError(f"A tensor of element type {element_type} and shape {list(shape)} has no size.")
    return (math.prod(shape) * bits + 7) // 8


def handle_from(items: Sequence[object]) -> Handle:
    """Returns the handle that a peer has sent; the numbers of its parts follow it in ``items``.

    Raises:
        ValueError, TypeError: it contradicts itself.  A peer is not trusted: a tensor that reaches beyond its
            allocation would be memory of others.
    """
    plain, *numbers = items
    found = Handle(*plain)  # type: ignore[misc]
    kinds = [type(item) for item in found]
    if kinds != [int, list, bytes, int, str, bytes, int, int, int] or {*map(type, found.shape)} - {int}:
        raise ValueError("a handle of device memory has other items")
    if found.kind not in (BY_IPC, BY_PARTS) or (found.kind == BY_PARTS) != bool(numbers):
        raise ValueError(f"a handle of the kind {found.kind!r} has {len(numbers)} parts")
    if {*map(type, numbers)} - {int}:
        raise ValueError("a part of a handle is no number")
    if found.nbytes != size_of(found.element_type, found.shape) or not found.nbytes:
        raise ValueError("a tensor on a device has another size than its shape says")
    if found.offset < 0 or found.offset + found.nbytes > found.size:
        raise ValueError("a tensor on a device reaches beyond its allocation")
    return found


# --- in the process that has the memory ---------------------------------------------------------------------


_no_driver_until = 0.0
"""Monotonic time until which no driver is looked for again: that takes as long as two calls of a model."""


def check_host(address: int) -> None:
    """Raises ValueError if this address, which is said to be the host's, is a device's."""
    global _no_driver_until
    if (now := time.monotonic()) < _no_driver_until:
        return
    if (driver := cuda_driver.loaded()) is None:
        _no_driver_until = now + _LOOK_EVERY
    elif (found := driver.pointer(address)) is not None:
        raise ValueError(
            f"{address:#x} is an address on the GPU {found.device}, not the host's. Bind it with "
            f'device_type="cuda" and device_id={found.device}.'
        )


def device_of(address: int) -> int | None:
    """Returns the GPU that has this address; None: it is the host's.

    Raises:
        ValueError: this process has no CUDA context.
    """
    driver = cuda_driver.loaded()
    if driver is None:
        raise ValueError(f"{address:#x} cannot be an address on a GPU: this process has no CUDA context.")
    found = driver.pointer(address)
    return None if found is None else found.device


def locate(tensor: DeviceTensor) -> tuple[CudaDriver, DevicePointer]:
    """Returns the driver and what it knows of the tensor's memory.

    Raises:
        ValueError: this process has no CUDA context, or there is not so much memory at the address.
    """
    driver = cuda_driver.loaded()
    found = None if driver is None else driver.pointer(tensor.address)
    if driver is None or found is None:
        why = "this process has no CUDA context" if driver is None else "the CUDA driver does not know it"
        raise ValueError(f"{tensor.address:#x} cannot be an address on a GPU: {why}.")
    reaches_beyond = found.size and tensor.address + tensor.nbytes > found.base + found.size
    if reaches_beyond and not driver.parts.cover(found.device, tensor.address, tensor.nbytes):
        raise ValueError(
            f"A tensor of {tensor.nbytes} bytes at {tensor.address:#x} reaches beyond its allocation."
        )
    return driver, found


def synchronize(tensor: DeviceTensor) -> None:
    """Waits until all work of this process on the tensor's device is done.  Raises like :func:`to_host`."""
    driver, found = locate(tensor)
    driver.synchronize(found.device)


def to_host(tensor: DeviceTensor) -> NDArray[np.uint8]:
    """Returns a copy of the tensor's bytes.  Raises ValueError and DriverError."""
    made = np.empty(tensor.nbytes, np.uint8)
    if made.nbytes:
        driver, found = locate(tensor)
        driver.synchronize(found.device)  # another stream of the application may still write to it
        driver.copy_to_host(found.device, as_bytes(made), tensor.address)
    return made


def to_device(tensor: DeviceTensor, data: NDArray[np.uint8]) -> None:
    """Writes bytes to the tensor's memory.  Raises ValueError if they are not as many, and DriverError."""
    if data.nbytes != tensor.nbytes:
        raise ValueError(f"{data.nbytes} bytes do not fit a tensor of {tensor.nbytes} bytes on a GPU.")
    if data.nbytes:
        driver, found = locate(tensor)
        driver.synchronize(found.device)  # another stream of the application may still use it
        driver.copy_to_device(found.device, tensor.address, as_bytes(np.ascontiguousarray(data)))


def copy(tensor: DeviceTensor, target: int) -> None:
    """Copies the tensor to an address on its device.  Raises ValueError and DriverError."""
    if tensor.nbytes:
        driver, found = locate(tensor)
        driver.copy_on_device(found.device, target, tensor.address, tensor.nbytes)


# --- in a process that takes one ----------------------------------------------------------------------------


_receiving: Final = Guard()
"""Held while a result is open: those of two threads may lie in one allocation, which a process opens once."""


class DeviceLoans:
    """Memory on devices that the two ends of a lane have lent each other."""

    def __init__(self) -> None:
        self.are_open = False
        """True if the worker may have such memory open."""
        self.received: list[DeviceTensor | UnopenedTensor] = []
        """Results of the last reply that are lent."""

    def receive(self, items: Sequence[object]) -> DeviceTensor | UnopenedTensor:
        """Takes a result that is lent; see :func:`received`."""
        self.are_open = True
        self.received.append(found := received(items))
        return found

    def taken(self) -> list[int]:
        """Returns the places, among the results that are lent, of those that this process cannot open; and
        forgets these results."""
        found, self.received = self.received, []
        return [index for index, tensor in enumerate(found) if isinstance(tensor, UnopenedTensor)]


def received(items: Sequence[object]) -> DeviceTensor | UnopenedTensor:
    """Returns a copy, on the same device, of a tensor that a worker's run has allocated there.  Its memory is
    an OrtValue of this process.  Raises ValueError and TypeError like :func:`handle_from`."""
    handle = handle_from(items)
    driver = cuda_driver.loaded()
    device = None if driver is None else driver.device_of(handle.uuid)
    if driver is None or device is None or handle.kind != BY_IPC:
        return UnopenedTensor("this process does not have the GPU of the result")
    with _receiving:
        try:
            made = device_ortvalues.allocated(handle.element_type, handle.shape, device)
            base = driver.open(device, handle.handle)
        except (DriverError, RuntimeError) as error:
            return UnopenedTensor(str(error))
        try:
            driver.copy_on_device(device, made.data_ptr(), base + handle.offset, handle.nbytes)
            driver.synchronize(device)  # the worker may use the memory again as soon as it is closed
        except DriverError as error:
            return UnopenedTensor(str(error))
        finally:
            with contextlib.suppress(DriverError):  # it would hide that the copy failed
                driver.close(device, base)
    return DeviceTensor(handle.element_type, tuple(handle.shape), CUDA, device, made.data_ptr(), made)
