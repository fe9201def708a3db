"""Repositories with the same models for tritonserver and for our server."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from onnx import TensorProto, helper

_MODEL_PY: Final = """
import os
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy
import onnxruntime
import triton_python_backend_utils as pb_utils

text = numpy.vectorize(bytes.decode, otypes=[object])

class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        feed = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        feed = {name: text(array) if array.dtype == object else array for name, array in feed.items()}
        names = list(request.requested_output_names())
        found = self._session.run(names, feed)
        return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(names, found)])
"""

TYPES: Final = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16, "INT32": TensorProto.INT32, "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip

_Ends = dict[str, tuple[int, list[int | str]]]


def model(nodes: list, inputs: _Ends, outputs: _Ends) -> bytes:
    infos = [
        [helper.make_tensor_value_info(name, *of) for name, of in ends.items()] for ends in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "conformance", *infos)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return made.SerializeToString()


def simple() -> bytes:
    """INT32 sums and differences of rows of 16: the model that the published clients call."""
    nodes = [
        helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
        helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
    ]
    ends: list[_Ends] = [
        {f"{kind}{i}": (TensorProto.INT32, ["n", 16]) for i in range(2)} for kind in ("INPUT", "OUTPUT")
    ]
    return model(nodes, *ends)


def identities() -> bytes:
    """An identity of each datatype: inputs ``x_FP32`` and so on, outputs ``y_FP32``; all sizes are free."""
    nodes = [helper.make_node("Identity", [f"x_{name}"], [f"y_{name}"]) for name in TYPES]
    ends: list[_Ends] = [
        {f"{end}_{name}": (kind, [f"{name}_{i}" for i in range(2)]) for name, kind in TYPES.items()}
        for end in ("x", "y")
    ]
    return model(nodes, *ends)


def text() -> bytes:
    """An identity of rows of one text."""
    return model(
        [helper.make_node("Identity", ["INPUT"], ["OUTPUT"])],
        {"INPUT": (TensorProto.STRING, ["n", 1])},
        {"OUTPUT": (TensorProto.STRING, ["n", 1])},
    )


def _tensors(kind: str, ends: dict[str, tuple[str, list[int]]]) -> str:
    """Lines of a ``config.pbtxt``."""
    told = [
        f'  {{ name: "{name}" data_type: TYPE_{"STRING" if datatype == "BYTES" else datatype} '
        f"dims: [ {', '.join(map(str, dims))} ] }}"
        for name, (datatype, dims) in ends.items()
    ]
    return f"{kind} [\n" + ",\n".join(told) + "\n]\n"


_SIMPLE: Final = "max_batch_size: 8\n" + _tensors("input", {f"INPUT{i}": ("INT32", [16]) for i in range(2)})
_SIMPLE_CONFIG: Final = _SIMPLE + _tensors("output", {f"OUTPUT{i}": ("INT32", [16]) for i in range(2)})
_TYPES_CONFIG: Final = "max_batch_size: 0\n" + "".join(
    _tensors(kind, {f"{end}_{name}": (name, [-1, -1]) for name in TYPES})
    for kind, end in (("input", "x"), ("output", "y"))
)
_TEXT_CONFIG: Final = (
    "max_batch_size: 8\n"
    + _tensors("input", {"INPUT": ("BYTES", [1])})
    + _tensors("output", {"OUTPUT": ("BYTES", [1])})
)

MODELS: Final = {
    "simple": (_SIMPLE_CONFIG, ["1"], simple),
    "versions": (_SIMPLE_CONFIG + "version_policy { all { } }\n", ["1", "3"], simple),
    "types": (_TYPES_CONFIG, ["1"], identities),
    "text": (_TEXT_CONFIG, ["1"], text),
    "broken": (_SIMPLE_CONFIG, ["1"], lambda: b"this is no model"),
}
"""Name: configuration without the backend, versions, file."""
LOADED: Final = ("simple", "versions", "types", "text")
"""What is loaded at the start."""


def write(folder: Path, *, for_triton: bool) -> None:
    """A repository of these models, run by onnxruntime: in tritonserver by its Python backend."""
    for name, (config, versions, make) in MODELS.items():
        for version in versions:
            place = folder / name / version
            place.mkdir(parents=True)
            (place / "model.onnx").write_bytes(make())
            if for_triton:
                (place / "model.py").write_text(_MODEL_PY)
        backend = "python" if for_triton else "onnxruntime"
        (folder / name / "config.pbtxt").write_text(f'backend: "{backend}"\n{config}')
