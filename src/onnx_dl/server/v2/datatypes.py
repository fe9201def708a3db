"""Datatypes of the protocol, and numpy's and onnxruntime's names of them.

Source: the table of tensor data types of the Open Inference Protocol, and ``BF16`` of Triton's extension.
"""

from __future__ import annotations

from typing import Final

import numpy as np

BYTES: Final = "BYTES"
"""Text: each item is a length (four bytes, little-endian) and its bytes."""

SIZES: Final = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4,
    "INT64": 8, "FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2,
}  # fmt: skip
"""Bytes of one item.  BYTES has no fixed size."""

_NUMPY: Final = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip

_ONNXRUNTIME: Final = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16", "tensor(string)": BYTES,
}  # fmt: skip

ONNX: Final = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: BYTES, 9: "BOOL",
    10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip
"""Datatypes by the number of ONNX's ``TensorProto.DataType``."""


def is_known(datatype: str) -> bool:
    """True if the protocol has this datatype."""
    return datatype in SIZES or datatype == BYTES


def of_onnxruntime(kind: str) -> str | None:
    """The datatype of onnxruntime's ``tensor(float)`` and so on; None: the protocol has none for it."""
    return _ONNXRUNTIME.get(kind)


def to_numpy(datatype: str) -> np.dtype[np.generic] | None:
    """numpy's dtype; None for BYTES and BF16, which numpy does not have."""
    kind = _NUMPY.get(datatype)
    return None if kind is None else np.dtype(kind)
