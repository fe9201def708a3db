"""onnxruntime's value objects, taken apart into plain parts and put together again.

Covers OrtValue of every kind (dense tensors of all element types, text, sequences, maps, absent optionals)
and SparseTensor.  Parts are numbers, text, arrays and lists of these, which are encoded like any other value.
onnxruntime is imported only where one of its objects exists anyway.  Values that its API cannot make
come from :mod:`onnx_dl.ort.onnx_builder`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_dl.errors import UnsupportedValueError
from onnx_dl.ort import onnx_builder
from onnx_dl.ort.onnx_builder import NATIVE, STRING, Array

if TYPE_CHECKING:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValue, SparseTensor

_COLLECTION: Final = "onnxruntime.capi.onnxruntime_inference_collection"

Bytes = NDArray[np.uint8]


class Parts(NamedTuple):
    """Parts of a value.  ``kind`` is a key of :data:`_MAKE`; items are values, or parts."""

    kind: str
    items: list[Any]


def take_apart(value: object) -> Parts | None:
    """Returns the parts of one of onnxruntime's values; None for any other object.

    Raises:
        UnsupportedValueError: onnxruntime gives no access to its content.
    """
    native = sys.modules.get(NATIVE)
    if native is None:
        return None
    python = sys.modules.get(_COLLECTION)
    if isinstance(value, native.OrtValue):
        return _take_apart(value)
    if isinstance(value, native.SparseTensor):
        return _sparse(value)
    if python is not None and isinstance(value, python.OrtValue):
        # The Python object owns the memory: it may hold the numpy array that the native one uses.
        return Parts("OrtValue", [_take_apart(value._get_c_value(), value)])
    if python is not None and isinstance(value, python.SparseTensor):
        return Parts("SparseTensor", [_sparse(value._get_c_tensor())])
    return None


def _take_apart(value: OrtValue, owner: object = None) -> Parts:
    """Returns the parts of a native OrtValue.  ``owner`` keeps its memory alive; None: the value itself."""
    if not value.has_value():  # first: most other methods of an empty one end the process
        return Parts("absent", [])
    if value.is_sparse_tensor():
        return Parts("OrtSparse", [_sparse(value.as_sparse_tensor())])
    if not value.is_tensor():
        return _container(value)
    if value.element_type() == STRING:
        return Parts("text", [np.asarray(value.numpy(), object)])
    shape, element_type = list(value.shape()), value.element_type()
    device = value.device_name().lower()
    if device != "cpu":
        return Parts("dense", [element_type, shape, _raw(np.ascontiguousarray(value.numpy())), device])
    return Parts("dense", [element_type, shape, memory_of(value, owner)])


_NUMPY: Final = {
    element_type: np.dtype(name)
    for element_type, name in {
        1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8",
        9: "?", 10: "f2", 11: "f8", 12: "u4", 13: "u8",
    }.items()
}  # fmt: skip
_NUMBERS: Final = {dtype: element_type for element_type, dtype in _NUMPY.items()}
NUMERIC: Final = frozenset(
    f"tensor({name})"
    for name in "float uint8 int8 uint16 int16 int32 int64 bool float16 double uint32 uint64".split()
)
"""Types of inputs and outputs that numpy has, too."""


def as_array(value: OrtValue, owner: object) -> Array | None:
    """Returns a view of a dense tensor on the CPU; None for other values, and for types that numpy lacks."""
    if not (value.has_value() and value.is_tensor()) or value.device_name().lower() != "cpu":
        return None
    dtype = _NUMPY.get(value.element_type())
    return None if dtype is None else memory_of(value, owner).view(dtype).reshape(value.shape())


def from_array(array: Array) -> OrtValue:
    """Makes a native OrtValue that holds a copy of the array."""
    return _dense(_NUMBERS[array.dtype], list(array.shape), _raw(array))


def _raw(array: Array) -> Bytes:
    return array.reshape(-1).view(np.uint8)


def bytes_at(address: int, nbytes: int, owner: object = None) -> Bytes:
    """Returns a view of the memory at an address; the view keeps ``owner`` alive, which keeps the memory."""
    if not nbytes:
        return np.empty(0, np.uint8)
    memory: Any = (ctypes.c_ubyte * nbytes).from_address(address)
    memory.owner = owner
    return np.frombuffer(memoryview(memory), np.uint8)


def memory_of(value: OrtValue, owner: object = None) -> Bytes:
    """Returns a view of the memory of a native OrtValue that holds a dense tensor on the CPU."""
    return bytes_at(value.data_ptr(), value.tensor_size_in_bytes(), owner or value)


def _container(value: OrtValue) -> Parts:
    content = onnx_builder.read(value)
    if value.is_tensor_sequence():
        return Parts("sequence", [value.data_type(), [np.asarray(item) for item in content]])
    return Parts("maps", [value.data_type(), content])


def _sparse(value: SparseTensor) -> Parts:
    native = importlib.import_module(NATIVE)
    values, shape = value.values(), np.array(value.dense_shape(), np.int64)
    match value.format:
        case native.OrtSparseFormat.ORT_SPARSE_COO:
            return Parts("coo", [shape, values, value.get_coo_data().indices()])
        case native.OrtSparseFormat.ORT_SPARSE_CSRC:
            data = value.get_csrc_data()
            return Parts("csr", [shape, values, data.inner(), data.outer()])
        case native.OrtSparseFormat.ORT_SPARSE_BLOCK_SPARSE:
            return Parts("blocks", [shape, values, value.get_blocksparse_data().indices()])
    raise UnsupportedValueError(f"A sparse tensor of the format {value.format} cannot be sent to a worker.")


# --- putting together --------------------------------------------------------------------------------------


def put_together(kind: str, items: list[Any], *, copy: bool) -> Any:
    """Makes a value of parts.  Unless ``copy``, it uses the memory of arrays in ``items``, which must outlive
    it.

    Raises:
        LookupError: there is no such kind.
    """
    return _MAKE[kind](*items, copy=copy) if kind == "dense" else _MAKE[kind](*items)


def _dense(
    element_type: int, shape: list[int], raw: object, device: str = "cpu", *, copy: bool = True
) -> OrtValue:
    onnxruntime = importlib.import_module("onnxruntime")
    native = importlib.import_module(NATIVE).OrtValue
    data = _checked(element_type, shape, raw)
    count = math.prod(shape)
    if not copy and device == "cpu" and data.nbytes and data.nbytes % count == 0:
        words = data.view(f"u{data.nbytes // count}").reshape(shape)
        return native.ortvalue_from_numpy_with_onnx_type(words, element_type)
    made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element_type)
    if made._get_c_value().tensor_size_in_bytes() != data.nbytes:
        raise ValueError(f"{data.nbytes} bytes are no tensor of type {element_type} and shape {shape}")
    ctypes.memmove(made.data_ptr(), data.ctypes.data, data.nbytes)
    if device != "cpu":
        made = onnxruntime.OrtValue.ortvalue_from_numpy(made.numpy(), device)
    return made._get_c_value()


def _checked(element_type: int, shape: list[int], raw: object) -> Array:
    """Returns ``raw`` if it can be the bytes of such a tensor, else raises ValueError.

    A peer is not trusted: other bytes would be copied beyond the tensor, or reserve memory without a bound.
    """
    count = math.prod(shape)
    possible = isinstance(raw, np.ndarray) and element_type != STRING and min(shape, default=0) >= 0
    # An element has at least one bit.
    if isinstance(raw, np.ndarray) and possible and (0 < count <= 8 * raw.nbytes or count == raw.nbytes == 0):
        return raw
    raise ValueError(f"the parts are no tensor of type {element_type} and shape {shape}")


def _wrapped(name: str, native: OrtValue | SparseTensor) -> onnxruntime.OrtValue | onnxruntime.SparseTensor:
    """Makes onnxruntime's Python object of this name."""
    return getattr(importlib.import_module("onnxruntime"), name)(native)


def _sparse_from_numpy(method: str, *parts: Array) -> SparseTensor:
    cpu = importlib.import_module("onnxruntime").OrtDevice.make("cpu", 0)._get_c_device()
    return getattr(importlib.import_module(NATIVE).SparseTensor, method)(*parts, cpu)


_MAKE: Final[Mapping[str, Callable[..., object]]] = {
    "OrtValue": functools.partial(_wrapped, "OrtValue"),
    "SparseTensor": functools.partial(_wrapped, "SparseTensor"),
    "OrtSparse": lambda value: importlib.import_module(NATIVE).OrtValue.ort_value_from_sparse_tensor(value),
    "dense": _dense,
    "text": onnx_builder.text,
    "sequence": onnx_builder.sequence,
    "maps": onnx_builder.maps,
    "absent": onnx_builder.absent,
    "coo": functools.partial(_sparse_from_numpy, "sparse_coo_from_numpy"),
    "csr": functools.partial(_sparse_from_numpy, "sparse_csr_from_numpy"),
    "blocks": functools.partial(_sparse_from_numpy, "blocksparse_from_numpy"),
}
KINDS: Final = frozenset(_MAKE)
