"""Results as tensors."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_dl.server.inference.checks import Signature
from onnx_dl.server.inference.outputs import array_tensor
from onnx_dl.server.interfaces import Served, TensorInfo
from onnx_dl.server.v2 import datatypes
from onnx_dl.server.v2.failures import RequestFailure

SIGNATURE = Signature(
    Served(
        name="m", version="1", path="", generation="",
        outputs=(TensorInfo("b", "BF16", (-1,)), TensorInfo("u", "UINT16", (-1,))),
    )
)  # fmt: skip


@pytest.mark.parametrize("datatype", [name for name in datatypes.SIZES if name != "BF16"])
def test_every_dtype(datatype: str) -> None:
    dtype = datatypes.to_numpy(datatype)
    assert dtype is not None
    array = np.zeros((2, 3), dtype)
    tensor = array_tensor(SIGNATURE, "y", array)
    assert (tensor.name, tensor.datatype, tensor.shape) == ("y", datatype, (2, 3))
    assert tensor.array is array


def test_long_long_is_int64() -> None:
    assert array_tensor(SIGNATURE, "y", np.zeros(1, np.longlong)).datatype == "INT64"
    assert array_tensor(SIGNATURE, "y", np.zeros(1, np.ulonglong)).datatype == "UINT64"


def test_bfloat16_is_told_by_the_signature() -> None:
    array = np.zeros(2, np.uint16)
    assert [array_tensor(SIGNATURE, name, array).datatype for name in "bu"] == ["BF16", "UINT16"]


def test_text() -> None:
    tensor = array_tensor(SIGNATURE, "y", np.array(["a", "é"], object))
    assert (tensor.datatype, tensor.shape) == ("BYTES", (2,))


@pytest.mark.parametrize("value", [[np.zeros(1)], {"a": 1}, None, np.zeros(1, "c8"), np.float32(1)])
def test_what_is_no_tensor_is_ours(value: object) -> None:
    with pytest.raises(RequestFailure, match="output 'y' of model 'm'") as caught:
        array_tensor(SIGNATURE, "y", value)
    assert caught.value.http == 500
