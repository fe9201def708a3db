"""Models to measure with, as bytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


class Case(NamedTuple):
    """One work of the table: a model, its feed, how many calls make a block, and the intra-op threads that
    every way gives its session."""

    key: str
    name: str
    model: bytes
    feed: dict[str, np.ndarray]
    calls: int
    threads: int

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs."""
        return sum(array.nbytes for array in self.feed.values())


def make_model(nodes: list, inputs: dict, outputs: dict, initializers: list | None = None) -> bytes:
    def infos(of: dict) -> list:
        return [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in of.items()]

    graph = helper.make_graph(nodes, "bench", infos(inputs), infos(outputs), initializers or [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def _add(shape: list[int]) -> bytes:
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    return make_model([helper.make_node("Add", ["x", "one"], ["y"])], {"x": shape}, {"y": shape}, [one])


def _corner() -> bytes:
    """1x3x640x640 (4.9 MB) to its 1x3x480x480 corner (2.8 MB)."""
    bounds = [
        numpy_helper.from_array(np.array(v, np.int64), n)
        for n, v in (("starts", [0, 0]), ("ends", [480, 480]), ("axes", [2, 3]))
    ]
    node = helper.make_node("Slice", ["x", "starts", "ends", "axes"], ["y"])
    return make_model([node], {"x": [1, 3, 640, 640]}, {"y": [1, 3, 480, 480]}, bounds)


def convolutions(layers: int = 9, channels: int = 32, size: int = 224, batch: int = 1) -> bytes:
    """Images to vectors: 1x3x224x224 (0.6 MB), a strided convolution, more of them, a global average."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(layers):
        inputs = channels if i else 3
        kernel = rng.standard_normal((channels, inputs, 3, 3), dtype=np.float32) / 24
        weights.append(numpy_helper.from_array(kernel, f"w{i}"))
        source, strides = (f"t{i - 1}", [1, 1]) if i else ("x", [2, 2])
        node = helper.make_node("Conv", [source, f"w{i}"], [f"t{i}"], pads=[1, 1, 1, 1], strides=strides)
        nodes.append(node)
    nodes.append(helper.make_node("GlobalAveragePool", [f"t{layers - 1}"], ["y"]))
    return make_model(nodes, {"x": [batch, 3, size, size]}, {"y": [batch, channels, 1, 1]}, weights)


def identity(shape: tuple[int, ...]) -> bytes:
    """A model whose output can be fed to another that takes the same shape."""
    return make_model([helper.make_node("Identity", ["x"], ["y"])], {"x": shape}, {"y": shape})


def cases() -> dict[str, Case]:
    """By key, from small to large."""
    rng = np.random.default_rng(1)

    def data(*shape: int) -> dict[str, np.ndarray]:
        return {"x": rng.standard_normal(shape, dtype=np.float32)}

    made = (
        Case("tiny", "tiny Add, 1x16", _add([1, 16]), data(1, 16), 400, 1),
        Case("5mb", "5 MB in, 3 MB out", _corner(), data(1, 3, 640, 640), 40, 2),
        Case("64mb", "64 MB in, 64 MB out", _add([16, 1024, 1024]), data(16, 1024, 1024), 5, 2),
        Case("conv", "convolution stack", convolutions(), data(1, 3, 224, 224), 20, 2),
    )
    return {case.key: case for case in made}


def voice_activity() -> Case | None:
    """silero-vad from its package, if that is installed: 512 samples, and 64 before them, a call; one thread,
    as the package has it.  The second output is the next call's ``state``."""
    found = importlib.util.find_spec("silero_vad")
    if found is None or found.origin is None:
        return None
    model = (Path(found.origin).parent / "data" / "silero_vad.onnx").read_bytes()
    feed = {
        "input": np.random.default_rng(0).standard_normal((1, 576), dtype=np.float32),
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }
    return Case("vad", "silero-vad, one stream", model, feed, 200, 1)


def voice_shaped() -> Case:
    """A call of silero-vad's shape, for machines without that: 512 samples and 64 before them, a state that
    the next call gets, the rate as a number without dimensions; 3 MB of weights, about 0.1 ms."""
    rng = np.random.default_rng(0)
    sizes = {"m0": (576, 256), **{f"m{i}": (256, 256) for i in range(1, 11)}, "last": (256, 1)}
    weights = [
        numpy_helper.from_array(rng.standard_normal(size, dtype=np.float32) / 16, f"{name}_weights")
        for name, size in sizes.items()
    ]
    weights.append(numpy_helper.from_array(np.array([2, 1, 128], np.int64), "shape"))
    nodes = [
        helper.make_node("Cast", ["sr"], ["rate"], to=FLOAT),
        helper.make_node("Div", ["input", "rate"], ["t"]),
    ]
    source = "t"
    for name in list(sizes)[:-1]:
        nodes.append(helper.make_node("MatMul", [source, f"{name}_weights"], [name]))
        nodes.append(helper.make_node("Tanh", [name], [source := f"{name}_tanh"]))
    nodes += [
        helper.make_node("MatMul", [source, "last_weights"], ["output"]),
        helper.make_node("Reshape", [source, "shape"], ["change"]),
        helper.make_node("Add", ["state", "change"], ["stateN"]),
    ]
    inputs = {"input": (FLOAT, [1, 576]), "state": (FLOAT, [2, 1, 128]), "sr": (TensorProto.INT64, [])}
    outputs = {"output": (FLOAT, [1, 1]), "stateN": (FLOAT, [2, 1, 128])}
    ends = [
        [helper.make_tensor_value_info(name, *of) for name, of in each.items()] for each in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "voice", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feed = {
        "input": rng.standard_normal((1, 576), dtype=np.float32),
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }
    return Case("shaped", "call of a VAD's shape, 3 kB", model.SerializeToString(), feed, 200, 1)


def heavy(layers: int = 12, width: int = 2048, seed: int = 0) -> bytes:
    """A vector through matrices: 200 MB of weights."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], []
    for i in range(layers):
        matrix = rng.standard_normal((width, width), dtype=np.float32) / width**0.5
        weights.append(numpy_helper.from_array(matrix, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"t{i - 1}" if i else "x", f"w{i}"], [f"t{i}"]))
    shape = ["n", width]
    return make_model(nodes, {"x": shape}, {f"t{layers - 1}": shape}, weights)
