"""onnxruntime's own value objects, taken apart into plain parts and put together again.

Covers OrtValue of every kind (dense tensors of all element types, text, sequences, maps, absent optionals)
and SparseTensor.  Parts are numbers, text, arrays and lists of these, which travel like any other value.
onnxruntime is imported only where one of its objects is at hand anyway.  What its API cannot make is the
result of a model with one node (:mod:`onnx_dl.ort.onnx_builder`).
"""

from __future__ import annotations

import ctypes
import importlib
import math
import sys
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_dl.errors import UnsupportedValueError
from onnx_dl.ort import onnx_builder

_C: Final = "onnxruntime.capi.onnxruntime_pybind11_state"
_COLLECTION: Final = "onnxruntime.capi.onnxruntime_inference_collection"
_STRING: Final = 8


class Parts(NamedTuple):
    """A value taken apart.  ``kind`` is a key of :data:`_MAKE`; items are values, or parts."""

    kind: str
    items: list[Any]


def take_apart(value: Any) -> Parts | None:
    """The parts of one of onnxruntime's values; None: it is something else.

    Raises:
        UnsupportedValueError: onnxruntime gives no access to what it holds.
    """
    native = sys.modules.get(_C)
    if native is None:
        return None
    python = sys.modules.get(_COLLECTION)
    if isinstance(value, native.OrtValue):
        return _take_apart(value)
    if isinstance(value, native.SparseTensor):
        return _sparse(value)
    if python is not None and isinstance(value, python.OrtValue):
        # The Python object: it may hold the numpy array whose memory the native one uses.
        return Parts("OrtValue", [_take_apart(value._get_c_value(), value)])
    if python is not None and isinstance(value, python.SparseTensor):
        return Parts("SparseTensor", [_sparse(value._get_c_tensor())])
    return None


def _take_apart(value: Any, owner: object = None) -> Parts:
    """The parts of a native OrtValue, whose memory ``owner`` keeps, or it itself."""
    if not value.has_value():  # first: most other methods of an empty one end the process
        return Parts("absent", [])
    if value.is_sparse_tensor():
        return Parts("OrtSparse", [_sparse(value.as_sparse_tensor())])
    if not value.is_tensor():
        return _container(value)
    if value.element_type() == _STRING:
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
"""The types of inputs and outputs that numpy has, too."""


def as_array(value: Any, owner: object) -> NDArray[Any] | None:
    """The memory of a native OrtValue as an array; None if it is no dense tensor, on the CPU, of numpy's."""
    if not (value.has_value() and value.is_tensor()) or value.device_name().lower() != "cpu":
        return None
    dtype = _NUMPY.get(value.element_type())
    return None if dtype is None else memory_of(value, owner).view(dtype).reshape(value.shape())


def from_array(array: NDArray[Any]) -> Any:
    """A native OrtValue with memory of its own that holds the same."""
    return _dense(_NUMBERS[array.dtype], list(array.shape), _raw(array))


def _raw(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def bytes_at(address: int, nbytes: int, owner: object = None) -> NDArray[np.uint8]:
    """The memory there, which stays as long as ``owner`` does: that lives as long as the array."""
    if not nbytes:
        return np.empty(0, np.uint8)
    memory: Any = (ctypes.c_ubyte * nbytes).from_address(address)
    memory.owner = owner
    return np.frombuffer(memoryview(memory), np.uint8)


def memory_of(value: Any, owner: object = None) -> NDArray[np.uint8]:
    """The memory of a native OrtValue that holds a dense tensor on the CPU."""
    return bytes_at(value.data_ptr(), value.tensor_size_in_bytes(), owner or value)


def _container(value: Any) -> Parts:
    content = onnx_builder.read(value)
    if value.is_tensor_sequence():
        return Parts("sequence", [value.data_type(), [np.asarray(item) for item in content]])
    return Parts("maps", [value.data_type(), content])


def _sparse(value: Any) -> Parts:
    native = importlib.import_module(_C)
    values, shape = value.values(), np.array(value.dense_shape(), np.int64)
    match value.format:
        case native.OrtSparseFormat.ORT_SPARSE_COO:
            return Parts("coo", [shape, values, value.get_coo_data().indices()])
        case native.OrtSparseFormat.ORT_SPARSE_CSRC:
            data = value.get_csrc_data()
            return Parts("csr", [shape, values, data.inner(), data.outer()])
        case native.OrtSparseFormat.ORT_SPARSE_BLOCK_SPARSE:
            return Parts("blocks", [shape, values, value.get_blocksparse_data().indices()])
    raise UnsupportedValueError(f"A sparse tensor of the format {value.format} cannot travel to a worker.")


# --- together again ----------------------------------------------------------------------------------------


def put_together(kind: str, items: list[Any], *, copy: bool) -> Any:
    """What :func:`take_apart` took apart.  Unless ``copy``, an OrtValue lies in the arrays in ``items``, and
    these must outlive it.

    Raises:
        LookupError: there is no such kind.
    """
    return _MAKE[kind](*items, copy=copy) if kind == "dense" else _MAKE[kind](*items)


def _dense(element_type: int, shape: list[int], raw: Any, device: str = "cpu", *, copy: bool = True) -> Any:
    onnxruntime = importlib.import_module("onnxruntime")
    native = importlib.import_module(_C).OrtValue
    count = _count(element_type, shape, raw)
    if not copy and device == "cpu" and raw.nbytes and raw.nbytes % count == 0:
        words = raw.view(f"u{raw.nbytes // count}").reshape(shape)
        return native.ortvalue_from_numpy_with_onnx_type(words, element_type)
    made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element_type)
    if made._get_c_value().tensor_size_in_bytes() != raw.nbytes:
        raise ValueError(f"{raw.nbytes} bytes are no tensor of type {element_type} and shape {shape}")
    ctypes.memmove(made.data_ptr(), raw.ctypes.data, raw.nbytes)
    if device != "cpu":
        made = onnxruntime.OrtValue.ortvalue_from_numpy(made.numpy(), device)
    return made._get_c_value()


def _count(element_type: int, shape: list[int], raw: Any) -> int:
    """How many elements there are.

    A peer's word is not enough: bytes that do not fill a tensor exactly would be copied beyond it, or memory
    would be asked for without a bound.

    Raises:
        ValueError: these bytes are no such tensor.
    """
    count = math.prod(shape)
    is_one = isinstance(raw, np.ndarray) and element_type != _STRING and min(shape, default=0) >= 0
    if not (is_one and (0 < count <= 8 * raw.nbytes or count == raw.nbytes == 0)):  # of a bit each, at least
        raise ValueError(f"what came is no tensor of type {element_type} and shape {shape}")
    return count


def _wrapped(value: Any) -> Any:
    return importlib.import_module("onnxruntime").OrtValue(value)


def _wrapped_sparse(value: Any) -> Any:
    return importlib.import_module("onnxruntime").SparseTensor(value)


def _cpu() -> Any:
    return importlib.import_module("onnxruntime").OrtDevice.make("cpu", 0)._get_c_device()


def _coo(shape: Any, values: Any, indices: Any) -> Any:
    return importlib.import_module(_C).SparseTensor.sparse_coo_from_numpy(shape, values, indices, _cpu())


def _csr(shape: Any, values: Any, inner: Any, outer: Any) -> Any:
    return importlib.import_module(_C).SparseTensor.sparse_csr_from_numpy(shape, values, inner, outer, _cpu())


def _blocks(shape: Any, values: Any, indices: Any) -> Any:
    return importlib.import_module(_C).SparseTensor.blocksparse_from_numpy(shape, values, indices, _cpu())


def _sparse_ortvalue(value: Any) -> Any:
    return importlib.import_module(_C).OrtValue.ort_value_from_sparse_tensor(value)


_MAKE: Final[dict[str, Any]] = {
    "OrtValue": _wrapped,
    "SparseTensor": _wrapped_sparse,
    "OrtSparse": _sparse_ortvalue,
    "dense": _dense,
    "text": onnx_builder.text,
    "sequence": onnx_builder.sequence,
    "maps": onnx_builder.maps,
    "absent": onnx_builder.absent,
    "coo": _coo,
    "csr": _csr,
    "blocks": _blocks,
}
KINDS: Final = frozenset(_MAKE)
