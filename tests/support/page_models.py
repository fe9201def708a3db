"""The models that the pages name, small, with the inputs and outputs that the pages use."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from onnx import numpy_helper

import onnx_dl.demo
from tests.contract.both import STR, F, model, node, tensor

AUDIO = ("vad", "asr", "tagger", "segmenter", "embedder", "big")
ASSETS = Path(onnx_dl.demo.__file__).parent / "assets"


def write(folder: Path) -> None:
    """Writes all of them there."""
    for name in AUDIO:
        (folder / f"{name}.onnx").write_bytes(_scores())
    (folder / "detector.onnx").write_bytes(detector())
    (folder / "vision").mkdir()
    (folder / "vision" / "detector.onnx").write_bytes(detector())
    (folder / "reader.onnx").write_bytes(reader())
    for name in ("digits", "wine", "diabetes"):
        shutil.copy(ASSETS / f"{name}.onnx", folder)
    shutil.copy(ASSETS / "digits.onnx", folder / "model.onnx")


def _scores() -> bytes:
    """audio (1, samples) -> scores (1, 1), their mean."""
    return model(
        [node("ReduceMean", ["audio"], ["scores"], axes=[1])],
        [tensor("audio", F, [1, "samples"])],
        [tensor("scores", F, [1, 1])],
    )


def detector() -> bytes:
    """image (1, 3, height, width) -> boxes (n, 4) and crops (n, 3, 32, 100), with n = 4."""
    shapes = {"boxes_shape": [4, 4], "crops_shape": [4, 3, 32, 100]}
    return model(
        [
            node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=0),
            node("Expand", ["mean", "boxes_shape"], ["boxes"]),
            node("Expand", ["mean", "crops_shape"], ["crops"]),
        ],
        [tensor("image", F, [1, 3, "height", "width"])],
        [tensor("boxes", F, ["n", 4]), tensor("crops", F, ["n", 3, 32, 100])],
        [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in shapes.items()],
    )


def reader() -> bytes:
    """x (n, 3, 32, 100) -> text (n,)."""
    return model(
        [
            node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0),
            node("Cast", ["mean"], ["text"], to=STR),
        ],
        [tensor("x", F, ["n", 3, 32, 100])],
        [tensor("text", STR, ["n"])],
    )
