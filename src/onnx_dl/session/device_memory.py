"""Memory on a GPU that an application binds.  The host touches none of it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NoReturn

from onnx_dl.core.types import OrtObject
from onnx_dl.ort import device_ortvalues
from onnx_dl.ort.onnx_builder import NATIVE
from onnx_dl.tensors import device_values
from onnx_dl.tensors.device_values import CUDA, DeviceTensor


def tensor_at(
    device_type: str, device_id: int, element_type: int, shape: Sequence[int], address: int
) -> DeviceTensor:
    """Memory at an address on a device.

    Raises:
        ValueError: it is of another kind than CUDA's, or the CUDA driver does not know it.
    """
    if device_type.lower() != CUDA:
        _refuse(device_type)
    tensor = DeviceTensor(element_type, tuple(shape), CUDA, device_id, address)
    if not tensor.nbytes:
        return tensor
    return tensor._replace(device_id=device_values.locate(tensor)[1].device)


def tensor_of(value: OrtObject, owner: object = None) -> DeviceTensor | None:
    """The memory of a native OrtValue; None if it is no dense tensor, or the host may touch its memory.

    Raises:
        ValueError: this process has no CUDA context.
    """
    if not is_on(value, CUDA):
        return None
    address, shape = value.data_ptr(), tuple(value.shape())
    device = device_values.device_of(address)
    if device is None:  # memory of the host that is pinned, which onnxruntime counts as the device's
        return None
    return DeviceTensor(value.element_type(), shape, CUDA, device, address, owner or value)


def is_on(value: OrtObject, *devices: str) -> bool:
    """True for a dense tensor on one of these devices."""
    return value.has_value() and value.is_tensor() and value.device_name().lower() in devices


def check_writable(value: OrtObject) -> None:
    """Raises ValueError for a native OrtValue with memory that results cannot be written to."""
    if value.has_value() and value.is_tensor() and not is_on(value, "cpu", CUDA):
        _refuse(value.device_name())


def _refuse(device: str) -> NoReturn:
    raise ValueError(f"onnx-dl takes memory of the host and of CUDA devices, not of {device!r}.")


def value_of(tensor: DeviceTensor) -> OrtObject:
    """A native OrtValue of the tensor's memory, or of a copy on the GPU where onnxruntime takes no memory of
    others.  Raises RuntimeError if it cannot make one."""
    if isinstance(tensor.owner, importlib.import_module(NATIVE).OrtValue):
        return tensor.owner
    number, shape, _, device, address, owner = tensor
    if (found := device_ortvalues.over(number, shape, device, address, owner)) is not None:
        return found
    made = device_ortvalues.allocated(number, shape, device)
    device_values.copy(tensor, made.data_ptr())
    return made
