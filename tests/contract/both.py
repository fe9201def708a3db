"""The classes under one contract, the models they are tried with, and how they are compared.

Every test of this folder takes ``make``, which builds sessions of one of the two classes: what holds for
``onnxruntime.InferenceSession`` (the parameter "onnxruntime" proves it) has to hold for the proxy,
whose model is in a worker ("proxy") or in this process ("inprocess").
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as C

from onnx_dl import InferenceSessionProxy, ModelHost

CPU = ["CPUExecutionProvider"]
KINDS = ["onnxruntime", "proxy", "inprocess"]
F, I64, STR = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING

Fail, InvalidArgument = C.Fail, C.InvalidArgument
IA = "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : "
FAIL = "[ONNXRuntimeError] : 1 : FAIL : "
DTYPES: dict[str, int] = {
    "?": TensorProto.BOOL, "i1": TensorProto.INT8, "i2": TensorProto.INT16, "i4": TensorProto.INT32,
    "i8": TensorProto.INT64, "u1": TensorProto.UINT8, "u2": TensorProto.UINT16, "u4": TensorProto.UINT32,
    "u8": TensorProto.UINT64, "f2": TensorProto.FLOAT16, "f4": TensorProto.FLOAT, "f8": TensorProto.DOUBLE,
}  # fmt: skip


class Make:
    """Builds sessions of one of the two classes, and a real one like each of them."""

    def __init__(self, kind: str, host: ModelHost | None) -> None:
        assert kind in KINDS, "a test has a parameter of its own called kind"
        self.kind = kind
        self._host = host
        self._how: weakref.WeakKeyDictionary[Any, tuple] = weakref.WeakKeyDictionary()

    @property
    def cls(self) -> Callable[..., Any]:
        """The class, for tests of the constructor's own arguments."""
        return onnxruntime.InferenceSession if self.kind == "onnxruntime" else self._proxy

    def _proxy(self, *args: Any, **kw: Any) -> Any:
        more = {} if self.kind == "proxy" else {"isolation": False}
        return InferenceSessionProxy(*args, host=self._host, eager=True, **more, **kw)

    def __call__(self, source: Any, sess_options: Any = None, providers: Any = CPU, **kw: Any) -> Any:
        session = self.cls(source, sess_options, providers=providers, **kw)
        self._how[session] = (source, sess_options, providers, kw)
        return session

    def twin(self, session: Any) -> Any:
        """A real session, made in the same way."""
        source, sess_options, providers, kw = self._how[session]
        return onnxruntime.InferenceSession(source, sess_options, providers=providers, **kw)

    def refuses(self, session: Any, act: Callable[[Any], Any], error: type, phrase: str) -> None:
        """``act(session)`` raises this class, the phrase in its message, and what a real session says."""
        found = raised(act, session)
        assert type(found) is error, repr(found)
        assert phrase in str(found)
        assert plain(found) == plain(raised(act, self.twin(session)))


def raised(act: Callable[..., Any], *args: Any) -> BaseException:
    """The exception that the call raises."""
    with pytest.raises(Exception) as caught:  # the caller looks at it
        act(*args)
    return caught.value


def plain(error: BaseException) -> str:
    """The message without addresses."""
    return re.sub(r"0x[0-9a-f]+", "0x", str(error))


def equal(result: Any, expected: Any) -> None:
    """The same values in the same classes, arrays bit for bit."""
    assert type(result) is type(expected)
    if isinstance(expected, list | tuple):
        assert len(result) == len(expected)
        for pair in zip(result, expected, strict=True):
            equal(*pair)
    elif isinstance(expected, dict):
        assert list(result) == list(expected)
        assert [type(key) for key in result] == [type(key) for key in expected]
        for key in expected:
            equal(result[key], expected[key])
    elif isinstance(expected, np.ndarray):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        if expected.dtype.kind == "O":
            assert result.tolist() == expected.tolist()
        else:
            assert result.tobytes() == expected.tobytes()
    else:
        assert result == expected


def own(array: np.ndarray) -> None:
    """What every numeric output is."""
    assert type(array) is np.ndarray
    assert array.flags.writeable and array.flags.c_contiguous and array.flags.aligned
    assert array.ctypes.data % 64 == 0 or array.size == 0


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def ortvalue(array: Any) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


# --- models ------------------------------------------------------------------------------------------------


def tensor(name: str, kind: int = F, shape: list | None = None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def sequence(name: str, kind: int = F) -> ValueInfoProto:
    inner = helper.make_tensor_type_proto(kind, None)
    return helper.make_value_info(name, helper.make_sequence_type_proto(inner))


def optional(name: str, kind: int = F, of_sequence: bool = False) -> ValueInfoProto:
    inner = helper.make_tensor_type_proto(kind, None)
    inner = helper.make_sequence_type_proto(inner) if of_sequence else inner
    return helper.make_value_info(name, helper.make_optional_type_proto(inner))


def mapping(name: str, key: int, value: int) -> ValueInfoProto:
    return helper.make_value_info(
        name, helper.make_map_type_proto(key, helper.make_tensor_type_proto(value, []))
    )


def maps(name: str, key: int, value: int = F) -> ValueInfoProto:
    inner = helper.make_map_type_proto(key, helper.make_tensor_type_proto(value, None))
    return helper.make_value_info(name, helper.make_sequence_type_proto(inner))


def model(
    nodes: list,
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    initializers: list | None = None,
    *,
    opset: int = 17,
    ir: int = 8,
    sparse: list | None = None,
    properties: dict[str, str] | None = None,
) -> bytes:
    graph = helper.make_graph(
        nodes, "contract", inputs, outputs, initializers or [], sparse_initializer=sparse or []
    )
    opsets = [
        helper.make_opsetid("", opset),
        helper.make_opsetid("ai.onnx.ml", 3),
        helper.make_opsetid("com.microsoft", 1),
    ]
    made = helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=ir,
        producer_name="tests",
        producer_version="7",
        domain="there",
        model_version=3,
        doc_string="a model",
    )
    helper.set_model_props(made, properties or {"author": "us"})
    return made.SerializeToString()


node = helper.make_node


def identity(kind: int = F, shape: list | None = None, *, opset: int = 17, ir: int = 8) -> bytes:
    """x -> y."""
    return model([node("Identity", ["x"], ["y"])], [tensor("x", kind, shape)], [tensor("y", kind, shape)],
                 opset=opset, ir=ir)  # fmt: skip


def fixed() -> bytes:
    """a[2,3] + b[N,3] -> sum; sum * w[3] -> product; w is an initializer that a feed may override."""
    nodes = [node("Add", ["a", "b"], ["sum"]), node("Mul", ["sum", "w"], ["product"])]
    weights = numpy_helper.from_array(np.full(3, 2, np.float32), "w")
    ends = [tensor("a", F, [2, 3]), tensor("b", F, ["N", 3]), tensor("w", F, [3])]
    return model(nodes, ends, [tensor("sum", F, [2, 3]), tensor("product", F, [2, 3])], [weights])


def scaled(kind: int = F) -> bytes:
    """x[N,M] * 2 -> twice, x + 1 -> more; "two" and "one" are constant initializers."""
    nodes = [node("Mul", ["x", "two"], ["twice"]), node("Add", ["x", "one"], ["more"])]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = [numpy_helper.from_array(np.array(n, dtype), name) for n, name in ((2, "two"), (1, "one"))]
    ends = [tensor(name, kind, ["N", "M"]) for name in ("twice", "more")]
    return model(nodes, [tensor("x", kind, ["N", "M"])], ends, values)


def loop() -> bytes:
    """n small steps: x -> sin(x), n times.  With a huge n it runs until it is told to end."""
    body = helper.make_graph(
        [node("Sin", ["v"], ["w"]), node("Identity", ["go"], ["on"])],
        "body",
        [tensor("i", I64, []), tensor("go", TensorProto.BOOL, []), tensor("v", F, [4])],
        [tensor("on", TensorProto.BOOL, []), tensor("w", F, [4])],
    )
    nodes = [node("Loop", ["n", "", "x"], ["y"], body=body)]
    return model(nodes, [tensor("n", I64, []), tensor("x", F, [4])], [tensor("y", F, [4])])
