"""A model whose call lasts as long as one likes, and one that returns what it is given."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

RUNS = 0.4
"""Seconds of CPU time after which a call runs for certain: onnxruntime's idle threads spin away 0.1 to 0.3
after a load."""
LONG = np.array(3_000_000)
"""Turns of :func:`late_model` that take several times as long."""
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def _info(name: str, kind: int, shape: list[int | str]) -> object:
    return helper.make_tensor_value_info(name, kind, shape)


def _bytes(graph: object) -> bytes:
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def spin_model() -> bytes:
    """y = tanh(x @ identity), ``n`` times; x: float32[64, 64], n: int64 scalar."""
    square = [64, 64]
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "weights"], ["product"]),
            helper.make_node("Tanh", ["product"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [_info("turn", INT64, []), _info("go", BOOL, []), _info("state", FLOAT, square)],
        [_info("go_on", BOOL, []), _info("next", FLOAT, square)],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "true", "x"], ["y"], body=body)],
        "spin",
        [_info("x", FLOAT, square), _info("n", INT64, [])],
        [_info("y", FLOAT, square)],
        [
            numpy_helper.from_array(np.eye(64, dtype=np.float32), "weights"),
            numpy_helper.from_array(np.array(True), "true"),
        ],
    )
    return _bytes(graph)


def identity_model() -> bytes:
    """y = x; float32[N]."""
    node = helper.make_node("Identity", ["x"], ["y"])
    ends = [_info("x", FLOAT, ["N"])], [_info("y", FLOAT, ["N"])]
    return _bytes(helper.make_graph([node], "identity", *ends))


def late_model() -> bytes:
    """y = 2 x, read after ``n`` turns of a loop; x: float32[N], n: int64 scalar."""
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["state", "one"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [_info("turn", INT64, []), _info("go", BOOL, []), _info("state", FLOAT, [])],
        [_info("go_on", BOOL, []), _info("next", FLOAT, [])],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["n", "true", "two"], ["factor"], body=body),
            helper.make_node("Mul", ["x", "factor"], ["y"]),
        ],
        "late",
        [_info("x", FLOAT, ["N"]), _info("n", INT64, [])],
        [_info("y", FLOAT, ["N"])],
        [
            numpy_helper.from_array(np.array(1, np.float32), "one"),
            numpy_helper.from_array(np.array(2, np.float32), "two"),
            numpy_helper.from_array(np.array(True), "true"),
        ],
    )
    return _bytes(graph)
