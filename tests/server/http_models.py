"""Models for tests of HTTP, in a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.support.slow import identity_model, spin_model

TYPES = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16, "INT32": TensorProto.INT32, "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip


def typed_model(kinds: list[str]) -> bytes:
    """An output ``KIND_out`` equal to the input ``KIND``, of shape [rows, columns], for each datatype."""
    shape = ["rows", "columns"]
    graph = helper.make_graph(
        [helper.make_node("Identity", [kind], [f"{kind}_out"]) for kind in kinds],
        "typed",
        [helper.make_tensor_value_info(kind, TYPES[kind], shape) for kind in kinds],
        [helper.make_tensor_value_info(f"{kind}_out", TYPES[kind], shape) for kind in kinds],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def repository(root: Path) -> Path:
    """A repository with ``identity`` (x to y, FP32[N]), ``spin``, ``typed`` and ``broken``."""
    models = {
        "identity": identity_model(), "spin": spin_model(), "typed": typed_model(list(TYPES)),
        "broken": b"no model",
    }  # fmt: skip
    for name, data in models.items():
        folder = root / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(data)
    return root


def values(kind: str, rows: int, columns: int) -> np.ndarray:
    """Values of a datatype; text in several alphabets."""
    rng = np.random.default_rng(rows * 1000 + columns)
    if kind == "BYTES":
        texts = [f"größe {number} 大".encode() for number in range(rows * columns)]
        return np.array(texts, object).reshape(rows, columns)
    if kind == "BOOL":
        return rng.random((rows, columns)) > 0.5
    dtype = np.dtype({"FP16": "f2", "FP32": "f4", "FP64": "f8"}.get(kind, kind.lower()))
    if dtype.kind == "f":
        return rng.standard_normal((rows, columns)).astype(dtype)
    info = np.iinfo(dtype)
    drawn = rng.integers(info.min, info.max, (rows, columns), dtype, endpoint=True)
    if drawn.size:
        drawn.flat[0] = info.max
    return drawn


def x_of(array: np.ndarray, *, binary: bool = True) -> list[Any]:
    """The inputs of ``identity`` for Triton's client."""
    from tritonclient.http import InferInput

    made = InferInput("x", list(array.shape), "FP32")
    made.set_data_from_numpy(array, binary_data=binary)
    return [made]
