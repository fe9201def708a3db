"""Handles of memory on a GPU, in the process that has it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from onnx_dl.ort.ortvalues import Parts
from onnx_dl.system import cuda_driver
from onnx_dl.system.cuda_driver import CudaDriver
from onnx_dl.system.cuda_parts import MappedPart
from onnx_dl.system.cuda_types import DevicePointer, DriverError
from onnx_dl.tensors.device_values import BY_IPC, BY_PARTS, DeviceTensor, Handle, UnopenedTensor, locate
from onnx_dl.tensors.foreign import SharedDescriptor

_MOST_KNOWN: Final = 64


class DevicePart(SharedDescriptor):
    """Memory of a GPU that was mapped as a part of a range, kept as long as this object."""

    def __init__(self, driver: CudaDriver, part: MappedPart) -> None:
        """Takes over the handle of ``part``.  Raises DriverError if it cannot be exported."""
        self.part = part
        self._driver: CudaDriver | None = driver
        try:
            super().__init__(driver.parts.export(part), part.size)
        except BaseException:
            driver.parts.release(part.handle)
            raise

    def close(self) -> None:
        super().close()
        driver, self._driver = self._driver, None
        # Not in a forked child, which cannot use the driver.
        if driver is not None and cuda_driver.loaded() is driver:
            with contextlib.suppress(DriverError):
                driver.parts.release(self.part.handle)


class Export(NamedTuple):
    """A handle, and the parts that it stands for; of most memory there are none."""

    handle: Handle
    pieces: tuple[DevicePart, ...] = ()

    def parts(self) -> Parts:
        """Returns it as a value of a message."""
        return self.handle.parts(self.pieces)


class Exporter:
    """Handles of the tensors that one binding names.  An allocation is exported once, and again if another
    one came to its address."""

    def __init__(self, *, takes_parts: bool) -> None:
        """``takes_parts``: descriptors can be sent."""
        self._takes_parts = takes_parts
        self._known: dict[tuple[int, int], bytes] = {}
        """Allocations by device and the driver's number."""
        self._parts: dict[int, DevicePart] = {}
        """Parts by the driver's handle, which is that of no other allocation while it is kept."""
        self._used: dict[int, DevicePart] = {}
        """Parts that the present run has named."""

    def next_run(self) -> None:
        """Gives up the parts that the last run did not name."""
        self._parts, self._used = self._used, {}

    def handle(self, tensor: DeviceTensor) -> Export | UnopenedTensor:
        """Returns the handle of a tensor, or why there is none.  Raises ValueError like :func:`locate`."""
        driver, found = locate(tensor)
        if not found.size:
            return UnopenedTensor("the driver does not tell the allocation")
        try:
            known = self._known.get(key := (found.device, found.buffer)) if found.buffer else None
            if known is None:
                if pieces := self._pieces(driver, found.device, tensor):
                    return _by_parts(driver, found, tensor, pieces)
                known = driver.export(found)
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known[key] = known
            uuid = driver.uuid(found.device)
        except DriverError as error:
            return UnopenedTensor(str(error))
        return Export(
            Handle(
                tensor.element_type,
                list(tensor.shape),
                uuid,
                found.buffer,
                BY_IPC,
                known,
                tensor.address - found.base,
                tensor.nbytes,
                found.size,
            )
        )

    def _pieces(self, driver: CudaDriver, device: int, tensor: DeviceTensor) -> list[DevicePart] | None:
        """The parts behind a tensor, each looked at anew: others may be mapped there now.  None: there are
        none, or none that can be sent, and a handle is tried."""
        address, end = tensor.address, tensor.address + tensor.nbytes
        found: list[DevicePart] = []
        while self._takes_parts and address < end:
            part = driver.parts.at(device, address)
            if part is None:
                return None
            known = self._parts.get(part.handle) or self._used.get(part.handle)
            if known is None or known.part != part:
                try:
                    known = DevicePart(driver, part)
                except DriverError:
                    return None
            else:
                driver.parts.release(part.handle)  # the known one keeps it
            self._used[part.handle] = known
            found.append(known)
            address = part.end
        return found


def _by_parts(
    driver: CudaDriver, found: DevicePointer, tensor: DeviceTensor, pieces: Sequence[DevicePart]
) -> Export:
    return Export(
        Handle(
            tensor.element_type,
            list(tensor.shape),
            driver.uuid(found.device),
            0,
            BY_PARTS,
            b"",
            tensor.address - pieces[0].part.base,
            tensor.nbytes,
            sum(piece.size for piece in pieces),
        ),
        tuple(pieces),
    )
