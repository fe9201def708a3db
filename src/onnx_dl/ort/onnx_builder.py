"""OrtValues that onnxruntime's API cannot make or read: text, sequences, maps, absent optionals.

Each is the result of a model with one node that runs in this process.  The models are encoded here, byte by
byte, because the ``onnx`` package is not required.  Field numbers are those of onnx.proto3
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3).
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl.errors import UnsupportedValueError

if TYPE_CHECKING:
    from onnxruntime.capi.onnxruntime_pybind11_state import InferenceSession, OrtValue

Array = NDArray[np.generic]

NATIVE: Final = "onnxruntime.capi.onnxruntime_pybind11_state"
_FLOAT, _INT64, STRING = 1, 7, 8
"""ONNX's numbers of element types."""
_ELEMENTS: Final = {
    name: number
    for number, name in enumerate(
        "float uint8 int8 uint16 int16 int32 int64 string bool float16 double uint32 uint64 complex64 "
        "complex128 bfloat16".split(),
        1,
    )
}
_ML: Final = "ai.onnx.ml"
_MAPS: Final = ("seq(map(string,tensor(float)))", "seq(map(int64,tensor(float)))")

# --- protobuf ----------------------------------------------------------------------------------------------


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _fields(number: int, values: Iterable[int | bytes | str]) -> bytes:
    return b"".join(_field(number, value) for value in values)


def _tensor_type(element: int) -> bytes:
    return _field(1, _field(1, element))


def _value_info(name: str, of_type: bytes) -> bytes:
    return _field(1, name) + _field(2, of_type)


def _model(op: str, inputs: list[bytes], output: bytes, attribute: bytes = b"", domain: str = "") -> bytes:
    """Encodes a ModelProto with one node, of inputs x0, x1, ... and the output y, with these TypeProtos."""
    names = [f"x{index}" for index in range(len(inputs))]
    node = _fields(1, names) + _field(2, "y") + _field(4, op) + _field(7, domain)
    node += _field(5, attribute) if attribute else b""
    ends = _fields(11, map(_value_info, names, inputs)) + _field(12, _value_info("y", output))
    opsets = [_field(1, "") + _field(2, 17), _field(1, _ML) + _field(2, 3)]
    return (
        _field(1, 8) + _field(7, _field(1, node) + _field(2, "made by onnx-dl") + ends) + _fields(8, opsets)
    )


def one_node(op: str = "Abs") -> bytes:
    """Encodes a model of y = op(x0), with float tensors of any shape, to try a provider with."""
    kind = _tensor_type(_FLOAT)
    return _model(op, [kind], kind)


# --- results of the models ---------------------------------------------------------------------------------


def _session(model: bytes) -> InferenceSession:
    """Makes a native session in this process: the Python class may be patched."""
    native = importlib.import_module(NATIVE)
    options = native.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = native.InferenceSession(options, model, False, False)
    except RuntimeError:  # after set_global_thread_pool_sizes(), no session may have its own threads
        options.use_per_session_threads = False
        session = native.InferenceSession(options, model, False, False)
    session.initialize_session([], [], set())
    return session


_cached_session: Final = functools.lru_cache(maxsize=64)(_session)


def _result(session: InferenceSession, feed: Mapping[str, OrtValue]) -> OrtValue:
    return session.run_with_ort_values(feed, ["y"], None)[0]


def read(value: OrtValue) -> Any:
    """Returns the content of a native OrtValue that is no dense tensor, as ``run()`` returns it.

    Raises:
        UnsupportedValueError: onnxruntime has no Python form of it.
    """
    native = importlib.import_module(NATIVE)
    session = _cached_session(_model("Identity", [_tensor_type(_FLOAT)], _tensor_type(_FLOAT)))
    binding = native.SessionIOBinding(session)
    binding.bind_ortvalue_output("y", value)
    try:
        return binding.copy_outputs_to_cpu()[0]
    except RuntimeError as error:
        raise UnsupportedValueError(f"This OrtValue cannot be sent to or from a worker: {error}") from None


def text(array: NDArray[Any]) -> OrtValue:
    """Makes a native OrtValue of strings."""
    strings = [item.encode() for item in array.flat]
    tensor = _fields(1, array.shape) + _field(2, STRING) + _fields(6, strings)
    attribute = _field(1, "value") + _field(5, tensor) + _field(20, 4)
    return _result(_session(_model("Constant", [], _tensor_type(STRING), attribute)), {})


def absent() -> OrtValue:
    """Makes a native OrtValue of an optional without a value."""
    kind = _tensor_type(_FLOAT)
    attribute = _field(1, "type") + _field(14, kind) + _field(20, 13)
    return _result(_cached_session(_model("Optional", [], _field(9, _field(1, kind)), attribute)), {})


def sequence(data_type: str, items: list[Array]) -> OrtValue:
    """Makes a native OrtValue of the type, for example ``seq(tensor(float))``."""
    element = _ELEMENTS.get(data_type.removeprefix("seq(tensor(").removesuffix("))"))
    if element is None:
        raise UnsupportedValueError(
            f"An OrtValue of the type {data_type} cannot be sent to or from a worker."
        )
    kind = _tensor_type(element)
    output = _field(4, _field(1, kind))
    if not items:
        attribute = _field(1, "dtype") + _field(3, element) + _field(20, 2)
        return _result(_cached_session(_model("SequenceEmpty", [], output, attribute)), {})
    make: Callable[..., OrtValue] = text if element == STRING else dense
    feed = {f"x{index}": make(item) for index, item in enumerate(items)}
    return _result(_cached_session(_model("SequenceConstruct", [kind] * len(items), output)), feed)


def maps(data_type: str, content: list[dict[str | int, float]]) -> OrtValue:
    """Makes a native OrtValue of ``seq(map(string or int64, tensor(float)))`` with the operator ZipMap.

    Raises:
        UnsupportedValueError: ZipMap cannot make it, because the keys differ.
    """
    of_text = data_type == "seq(map(string,tensor(float)))"
    keys = list(content[0]) if content else ["none"] if of_text else [0]
    if data_type not in _MAPS or not all(list(row) == keys for row in content):
        raise UnsupportedValueError("An OrtValue of maps with different keys cannot be sent to a worker.")
    if of_text:
        attribute = _field(1, "classlabels_strings") + _fields(9, keys) + _field(20, 8)
    else:
        attribute = _field(1, "classlabels_int64s") + _fields(8, keys) + _field(20, 7)
    of_map = _field(5, _field(1, STRING if of_text else _INT64) + _field(2, _tensor_type(_FLOAT)))
    model = _model("ZipMap", [_tensor_type(_FLOAT)], _field(4, _field(1, of_map)), attribute, _ML)
    values = itertools.chain.from_iterable(row.values() for row in content)
    table = np.fromiter(values, np.float32).reshape(len(content), len(keys))
    return _result(_cached_session(model), {"x0": dense(table)})


def nothing() -> OrtValue:
    """Makes a native OrtValue of no elements, in place of one of onnxruntime's that must not be accessed."""
    onnxruntime = importlib.import_module("onnxruntime")
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type([0], np.float32)._ortvalue


def dense(array: Array) -> OrtValue:
    """Makes a native OrtValue that uses the array's memory; the array must outlive it."""
    onnxruntime = importlib.import_module("onnxruntime")
    # Not ascontiguousarray(), which turns an array without dimensions into one of one dimension.
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
    return value._get_c_value()
