"""Graphs whose outputs are also their inputs: onnxruntime does not write these to where they are bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.onnx_values import CPU

pytestmark = pytest.mark.slow

F, B = TensorProto.FLOAT, TensorProto.BOOL


def passing(*outputs: str) -> bytes:
    """y = x + w, and whatever else is to come out; w has a value of its own, c is a bool."""
    kinds: dict[str, tuple[int, list[Any]]] = {
        "x": (F, ["n", 4]), "w": (F, [1, 4]), "c": (B, []), "y": (F, ["n", 4]),
    }  # fmt: skip

    def infos(names: Any) -> list[Any]:
        return [helper.make_tensor_value_info(name, *kinds[name]) for name in names]

    default = numpy_helper.from_array(np.zeros((1, 4), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", infos("xwc"), infos(outputs), [default]
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    blob: bytes = model.SerializeToString()
    return blob


def feed(i: int) -> dict[str, np.ndarray]:
    return {
        "x": np.full((3, 4), i + 1, np.float32),
        "w": np.full((1, 4), 10 * i, np.float32),
        "c": np.array(i % 2 == 0),
    }


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """onnxruntime warns that an initializer is an input."""
    onnxruntime.set_default_logger_severity(3)
    yield
    onnxruntime.set_default_logger_severity(2)


@pytest.mark.parametrize(
    "outputs",
    [
        ("y",),
        *(pytest.param(names) for names in [("x",), ("y", "x"), ("w", "y"), ("y", "c")]),
    ],
    ids=" ".join,
)
def test_runs_that_repeat(outputs: tuple[str, ...], host: ModelHost) -> None:
    proxy = InferenceSessionProxy(passing(*outputs), providers=CPU, host=host)
    kept = [(feed(i), proxy.run(None, feed(i))) for i in range(8)]
    wrong = []
    for i, (given, results) in enumerate(kept):
        expected = given | {"y": given["x"] + given["w"]}
        if [x.tolist() for x in results] != [expected[name].tolist() for name in outputs]:
            wrong.append(i)
    del proxy  # a failing test must not keep it
    assert wrong == []


@pytest.mark.parametrize("buffer", [True, False], ids=["buffer", "allocated"])
def test_a_binding(buffer: bool, host: ModelHost) -> None:
    def act(session: Any) -> Any:
        out, given, found = np.full((3, 4), 77, np.float32), feed(1), []
        binding = session.io_binding()
        for name in "xc":
            binding.bind_cpu_input(name, given[name])
        binding.bind_output("y")
        if buffer:
            binding.bind_output("x", "cpu", 0, np.float32, [3, 4], out.ctypes.data)
        else:
            binding.bind_output("x")
        for _ in range(3):
            session.run_with_iobinding(binding)
            found += [value.numpy().tolist() for value in binding.get_outputs()]
        return [*found, out.tolist()]

    expected = act(onnxruntime.InferenceSession(passing("y", "x"), providers=CPU))
    came = act(InferenceSessionProxy(passing("y", "x"), providers=CPU, host=host))
    assert came == expected
