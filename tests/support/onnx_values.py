"""Values of ONNX models: as ``run`` takes them, as OrtValues, and as pictures that can be compared.

A picture is plain data that is equal for equal results only: class, dtype, shape and every bit.  Contents of
OrtValues that onnxruntime shows no way into are read by an Identity model, in this process.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
from onnx import (
    ModelProto,
    NodeProto,
    OptionalProto,
    SequenceProto,
    TensorProto,
    TypeProto,
    helper,
    numpy_helper,
)

CPU = ["CPUExecutionProvider"]
PLAIN = "?bBhHiIlLqQefd"
"""The dtypes of numpy's own that onnxruntime has too, by their characters."""


def feedable(value: Any) -> Any:
    """A test's value as ``run`` takes it: an array, a list or None; what is in a file, decoded."""
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, SequenceProto):
        return numpy_helper.to_list(value)
    if isinstance(value, OptionalProto):
        return numpy_helper.to_optional(value)
    if isinstance(value, list):
        return [feedable(item) for item in value]
    return np.asarray(value) if isinstance(value, np.generic) else value


def is_plain(value: Any) -> bool:
    """Whether ``bind_cpu_input`` takes it."""
    return isinstance(value, np.ndarray) and value.dtype.char in PLAIN


# --- OrtValues ---------------------------------------------------------------------------------------------


def ort_value(value: Any, kind: TypeProto) -> onnxruntime.OrtValue:
    """A value of the type that a model declares, as an OrtValue."""
    match kind.WhichOneof("value"):
        case "optional_type":
            inner = kind.optional_type.elem_type
            if value is None:
                return _made_by(helper.make_node("Optional", [], ["y"], type=inner), [], kind)
            return ort_value(value, inner)
        case "sequence_type":
            inner = kind.sequence_type.elem_type
            if not value:
                element = inner.tensor_type.elem_type
                return _made_by(helper.make_node("SequenceEmpty", [], ["y"], dtype=element), [], kind)
            items = [ort_value(item, inner) for item in value]
            names = [f"x{i}" for i in range(len(items))]
            node = helper.make_node("SequenceConstruct", names, ["y"])
            return _made_by(
                node, [(name, item, inner) for name, item in zip(names, items, strict=True)], kind
            )
        case "tensor_type":
            return _dense(value, kind)
        case other:
            raise NotImplementedError(f"no OrtValue can be made of a {other}")


def _dense(value: Any, kind: TypeProto) -> onnxruntime.OrtValue:
    element = kind.tensor_type.elem_type
    array = np.asarray(feedable(value))
    if element == TensorProto.STRING:
        constant = numpy_helper.from_array(array.astype(object))
        return _made_by(helper.make_node("Constant", [], ["y"], value=constant), [], kind)
    if is_plain(array):
        return onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(order="C"))
    raw = numpy_helper.from_array(array).raw_data  # packs what is narrower than a byte
    made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(array.shape), element)
    if made.tensor_size_in_bytes() != len(raw):
        raise AssertionError(f"{made.data_type()} has {made.tensor_size_in_bytes()} bytes, not {len(raw)}")
    ctypes.memmove(made.data_ptr(), raw, len(raw))
    return made


def _made_by(node: NodeProto, inputs: list[tuple[str, Any, TypeProto]], kind: TypeProto) -> Any:
    """What a model of this one node makes: the API has no other way to strings, sequences and optionals."""
    session = onnxruntime.InferenceSession(
        _one_node(node, [(i[0], i[2]) for i in inputs], kind), providers=CPU
    )
    return session.run_with_ort_values(None, {name: value for name, value, _ in inputs})[0]


def _one_node(node: NodeProto, inputs: list[tuple[str, TypeProto]], kind: TypeProto) -> bytes:
    infos = [helper.make_value_info(name, _shapeless(of)) for name, of in inputs]
    output = helper.make_value_info("y", _shapeless(kind))
    made: ModelProto = helper.make_model(
        helper.make_graph([node], "one node", infos, [output]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    return made.SerializeToString()


def _shapeless(kind: TypeProto) -> TypeProto:
    """The same type with nothing said of shapes: one test's declared shape need not fit another's value."""
    match kind.WhichOneof("value"):
        case "tensor_type":
            return helper.make_tensor_type_proto(kind.tensor_type.elem_type, None)
        case "sequence_type":
            return helper.make_sequence_type_proto(_shapeless(kind.sequence_type.elem_type))
        case _:
            return helper.make_optional_type_proto(_shapeless(kind.optional_type.elem_type))


# --- pictures ----------------------------------------------------------------------------------------------


def outcome(act: Callable[[], Any]) -> Any:
    """What comes of it: a result or an error."""
    try:
        return act()
    except Exception as error:
        return error


def attempt(act: Callable[[], Any], exact: bool = True) -> tuple[str, Any]:
    """The picture of what comes of it, and which of both that is."""
    came = outcome(act)
    return ("error" if isinstance(came, Exception) else "result", picture(came, exact))


def picture(value: Any, exact: bool = True) -> Any:
    """Plain data that tells all there is to tell of a result; without what is random unless ``exact``."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Exception):
        return (kind, re.sub(r"0x[0-9a-f]+", "0x", str(value)))  # addresses differ
    if isinstance(value, onnxruntime.OrtValue):
        return (kind, _of_ort_value(value, exact))
    if isinstance(value, np.ndarray):
        return (kind, *_of_array(value, exact))
    if isinstance(value, list | tuple):
        return (kind, [picture(item, exact) for item in value])
    if isinstance(value, dict):
        return (kind, [(picture(key, exact), picture(item, exact)) for key, item in value.items()])
    if kind.endswith(".SparseTensor"):
        return (kind, *_of_sparse(value, exact))
    if isinstance(value, float) and exact:
        return (kind, struct.pack("<d", value))
    return (kind, repr(value) if exact else None)


def _of_array(array: np.ndarray, exact: bool) -> tuple[Any, ...]:
    data: Any = None
    if exact:
        data = [picture(item) for item in array.ravel()] if array.dtype.hasobject else array.tobytes()
    return (array.dtype.str, array.shape, array.flags.c_contiguous, array.flags.writeable, data)


def _of_sparse(sparse: Any, exact: bool) -> tuple[Any, ...]:
    views = ("get_coo_data", "get_csrc_data")
    indices = [attempt(lambda view=view: _indices(getattr(sparse, view)()), exact) for view in views]
    return (
        sparse.data_type(),
        str(sparse.format),
        *map(picture, (sparse.dense_shape(), sparse.values())),
        indices,
    )


def _indices(view: Any) -> list[Any]:
    return [getattr(view, name)() for name in ("indices", "inner", "outer") if hasattr(view, name)]


def _of_ort_value(value: onnxruntime.OrtValue, exact: bool) -> list[Any]:
    if not value.has_value():
        return ["no value"]  # any other question would end this process
    asked = ("is_tensor", "is_tensor_sequence", "is_sparse_tensor", "data_type")
    shown = [attempt(getattr(value, question)) for question in asked]
    if value.is_sparse_tensor():
        return [*shown, attempt(lambda: value.as_sparse_tensor()._get_c_tensor(), exact)]
    if not value.is_tensor():
        return [*shown, attempt(lambda: _contents(value), exact)]
    shown += [attempt(getattr(value, q)) for q in ("shape", "element_type", "device_name")]
    if value.data_type() == "tensor(string)":
        return [
            *shown,
            attempt(value.numpy, exact),
        ]  # its bytes are std::string objects, which hold addresses
    size = value.tensor_size_in_bytes()
    return [*shown, size, ctypes.string_at(value.data_ptr(), size) if exact and size else b""]


def _contents(value: onnxruntime.OrtValue) -> Any:
    """What is in a sequence."""
    found = re.fullmatch(r"seq\(tensor\((\w+)\)\)", value.data_type())
    if found is None:
        return None
    element = helper.make_tensor_type_proto(TensorProto.DataType.Value(found[1].upper()), None)
    kind = helper.make_sequence_type_proto(element)
    model = _one_node(helper.make_node("Identity", ["x"], ["y"]), [("x", kind)], kind)
    return onnxruntime.InferenceSession(model, providers=CPU).run(None, {"x": value})
