"""Destinations of the outputs of an IOBinding: memory of the host or on a GPU, or none yet."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from onnx_dl.core.types import Array, OrtObject, Value
from onnx_dl.ort import device_ortvalues, onnx_builder, ortvalues
from onnx_dl.session import device_memory
from onnx_dl.tensors import device_values
from onnx_dl.tensors.device_values import CUDA, DeviceTensor

_TEXT = 8
"""Number of text in onnx's TensorProto.DataType."""


class BoundOutput:
    """Destination of one output.  ``value``: a native OrtValue that holds it, if there is one yet;
    ``tensor``: its memory, if that is on a GPU."""

    def __init__(self, device: str, number: int, value: OrtObject = None, owner: object = None) -> None:
        """``value``: also memory on a GPU.  ``owner``: the Python object of a bound OrtValue, which may hold
        the array whose memory it uses."""
        self.device = device.lower()
        self.number = number
        self.owner = owner
        self.tensor: DeviceTensor | None = None
        self.value: OrtObject = None
        self.array: Array | None = None
        if type(value) is DeviceTensor:
            self.tensor = value
        elif value is not None:
            self.value = value
            self.array = ortvalues.as_array(value, owner)
            if self.array is None:
                self.tensor = device_memory.tensor_of(value, owner)

    @property
    def is_there(self) -> bool:
        """True if memory is bound, or a run has left a result."""
        return self.value is not None or self.tensor is not None

    @property
    def is_on_device(self) -> bool:
        """True if its memory is on a GPU, or will be."""
        return self.tensor is not None or (self.value is None and self.device == CUDA)

    def fits(self, result: Value) -> bool:
        """True if the result fits the bound memory.  An output without a value takes any."""
        if type(result) is not np.ndarray:
            return False
        if self.array is None:
            return self.value is None
        return bool(self.array.shape == result.shape and self.array.dtype == result.dtype)

    def put(self, result: Array) -> None:
        """Writes a result that :meth:`fits`, or keeps it."""
        if self.array is None:
            self.value = ortvalues.from_array(result)
            self.array = ortvalues.as_array(self.value, self.value)
        else:
            self.array[...] = result

    def place(self, type_of: Callable[[], str | None]) -> Value:
        """Memory on a GPU, or see :func:`place_of`.  ``type_of`` returns the output's type: the run refuses
        text where the model has none."""
        if self.tensor is not None:
            return self.tensor
        value = self.value
        if value is not None and value.is_tensor() and value.element_type() == _TEXT:
            return None if type_of() == "tensor(string)" else [_TEXT, list(value.shape())]
        return place_of(value)

    def native(self) -> OrtObject:
        """The value as a native OrtValue, moved to the GPU if the output was to be there."""
        if self.value is None:
            self.value = (
                onnx_builder.nothing() if self.tensor is None else device_memory.value_of(self.tensor)
            )
        elif self.device == CUDA and self.tensor is None:
            moved = device_ortvalues.moved(self.value, self.number)
            if moved is not None:
                self.value, self.array, self.tensor = moved, None, device_memory.tensor_of(moved)
        return self.value

    def to_python(self) -> Value:
        """A copy of the value as an array, list or dict."""
        if self.tensor is None:
            return _python(self.value)
        parts = [self.tensor.element_type, list(self.tensor.shape), device_values.to_host(self.tensor)]
        return ortvalues.put_together("dense", parts, copy=False).numpy().copy()


def take_results(given: list[OrtObject], results: list[Value]) -> list[Value]:
    """Writes results to the native OrtValues that were given for them; returns those that are left."""
    for value, result in zip(given, results, strict=False):
        write(value, result)
    return results[len(given) :]


def write(value: OrtObject, result: Array) -> None:
    """Writes the bytes of a result to the memory of a native OrtValue.  Raises ValueError and DriverError if
    that is on a GPU that cannot be written to."""
    if (tensor := device_memory.tensor_of(value)) is not None:
        device_values.to_device(tensor, result.reshape(-1).view(np.uint8))
    elif result.nbytes:
        ctypes.memmove(value.data_ptr(), result.ctypes.data, result.nbytes)


def place_of(value: OrtObject) -> list[object] | None:
    """Element type and shape of the memory that a result is written to; None: it is allocated."""
    if value is None or not device_memory.is_on(value, "cpu", CUDA) or value.element_type() == _TEXT:
        return None
    return [value.element_type(), list(value.shape())]


def _python(value: OrtObject) -> Value:
    parts = ortvalues.take_apart(value)
    if parts is None or parts.kind == "absent":
        return None
    if parts.kind == "dense":
        return value.numpy().copy()
    return parts.items[-1] if parts.kind in ("text", "sequence", "maps") else value.as_sparse_tensor()
