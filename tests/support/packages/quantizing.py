"""onnxruntime's own tools: calibration runs a model, and preprocessing has a session write another."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from shown import show


def network() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(random.normal(size=(16, 32)).astype(np.float32), "w"),
        onnx.numpy_helper.from_array(random.normal(size=(32, 4)).astype(np.float32), "v"),
    ]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["a"]),
        onnx.helper.make_node("Relu", ["a"], ["b"]),
        onnx.helper.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 16), ("y", 4))
    ]
    graph = onnx.helper.make_graph(nodes, "network", ends[:1], ends[1:], weights)
    return onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 17)])


class Rows(quantization.CalibrationDataReader):
    def __init__(self) -> None:
        random = np.random.default_rng(1)
        self.rows = iter([{"x": random.normal(size=(4, 16)).astype(np.float32)} for _ in range(10)])

    def get_next(self) -> Any:
        return next(self.rows, None)


def quantize() -> tuple[Any, Any]:
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(network(), folder / "network.onnx")
        quant_pre_process(str(folder / "network.onnx"), str(folder / "ready.onnx"))
        methods = quantization.CalibrationMethod
        for method in (methods.MinMax, methods.Entropy, methods.Percentile):
            quantization.quantize_static(
                folder / "ready.onnx", folder / f"{method.name}.onnx", Rows(), calibrate_method=method
            )
        feed = {"x": np.random.default_rng(2).normal(size=(8, 16)).astype(np.float32)}
        sessions = [
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            for path in sorted(folder.glob("*.onnx"))
        ]
        return [
            [session.run(None, feed) for session in sessions],
            [path.name for path in sorted(folder.iterdir())],
            [
                onnx.load(path).graph.SerializeToString(deterministic=True)
                for path in sorted(folder.glob("*.onnx"))
            ],
        ], sessions


if __name__ == "__main__":
    show(quantize)
