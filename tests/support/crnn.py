"""A recogniser of text lines as OCR packages have them, and how these run it with an IOBinding.

Convolutions take lines of any width to one column per four pixels, an LSTM reads these in both directions,
and what comes out are logarithms of the probability of each character.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnxruntime

CHARACTERS = "-abcdefghijklmnopqrstuvwxyzäöüß0123456789 .,:"
HEIGHT, CHANNELS, HIDDEN = 32, 24, 32
WIDEST = 640
CPU = ["CPUExecutionProvider"]


@functools.cache
def recogniser() -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(7)
    weights: list[Any] = []

    def weight(name: str, *shape: int) -> str:
        scale = 2 / np.sqrt(np.prod(shape[1:]))
        made = random.normal(scale=scale, size=shape).astype(np.float32)
        weights.append(numpy_helper.from_array(made, name))
        return name

    def whole(name: str, *numbers: int) -> str:
        weights.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    nodes = [
        helper.make_node("Conv", ["image", weight("k1", 8, 1, 3, 3)], ["c1"], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p1", weight("k2", CHANNELS, 8, 3, 3)], ["c2"], pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("MaxPool", ["r2"], ["p2"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p2", weight("k3", CHANNELS, CHANNELS, HEIGHT // 4, 1)], ["c3"]),
        helper.make_node("Squeeze", ["c3", whole("axis", 2)], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["columns"], perm=[2, 0, 1]),
        helper.make_node(
            "LSTM",
            ["columns", weight("w", 2, 4 * HIDDEN, CHANNELS), weight("r", 2, 4 * HIDDEN, HIDDEN)],
            ["both", "last"],
            hidden_size=HIDDEN,
            direction="bidirectional",
        ),
        helper.make_node("Transpose", ["both"], ["beside"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["beside", whole("shape", 0, 0, 2 * HIDDEN)], ["read"]),
        helper.make_node("MatMul", ["read", weight("m", 2 * HIDDEN, len(CHARACTERS))], ["scores"]),
        helper.make_node("LogSoftmax", ["scores"], ["logs"], axis=-1),
    ]
    F = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "crnn",
        [helper.make_tensor_value_info("image", F, ["lines", 1, HEIGHT, "width"])],
        [
            helper.make_tensor_value_info("logs", F, ["columns", "lines", len(CHARACTERS)]),
            helper.make_tensor_value_info("last", F, [2, "lines", HIDDEN]),
        ],
        weights,
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(model, {"character": CHARACTERS})
    blob: bytes = model.SerializeToString()
    return blob


def lines(width: int, count: int = 1, seed: int = 0) -> np.ndarray:
    """Images of something like text."""
    random = np.random.default_rng([width, count, seed])
    strokes = random.random((count, 1, HEIGHT // 4, -(-width // 8)))
    return np.kron(strokes > 0.5, np.ones((1, 1, 4, 8)))[..., :width].astype(np.float32) - 0.5


def text(logs: np.ndarray, characters: str = CHARACTERS) -> list[str]:
    """Of each line: the likeliest character of each column, repeats and blanks left out."""
    return [
        "".join(characters[i] for at, i in enumerate(best) if i and not (at and best[at - 1] == i))
        for best in logs.argmax(axis=2).T.tolist()
    ]


class Reader:
    """Reads lines with one binding, from one buffer to another."""

    def __init__(self, session: Any, how: str = "method") -> None:
        self.session = session
        self.binding = session.io_binding() if how == "method" else onnxruntime.IOBinding(session)
        self.characters = session.get_modelmeta().custom_metadata_map["character"]
        self.pixels = np.zeros(4 * HEIGHT * WIDEST, np.float32)
        self.logs = np.full(4 * WIDEST // 4 * len(CHARACTERS), np.nan, np.float32)

    def read(self, image: np.ndarray) -> np.ndarray:
        """What comes out, in the buffer that the next call writes to."""
        count, _, _, width = image.shape
        shape = (width // 4, count, len(CHARACTERS))
        self.pixels[: image.size] = image.ravel()
        self.binding.bind_input("image", "cpu", 0, np.float32, image.shape, self.pixels.ctypes.data)
        self.binding.bind_output("logs", "cpu", 0, np.float32, shape, self.logs.ctypes.data)
        self.session.run_with_iobinding(self.binding)
        return self.logs[: np.prod(shape)].reshape(shape)

    def texts(self, image: np.ndarray) -> list[str]:
        return text(self.read(image), self.characters)
