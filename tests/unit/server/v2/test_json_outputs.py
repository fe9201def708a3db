"""Outputs in JSON are checked before anything is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnx_dl.server.v2.bounds import MOST_VALUES
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.json_outputs import check_outputs
from onnx_dl.server.v2.messages import InferRequest, OutputTensor, RegionSlice, RequestedOutput


def check(*tensors: OutputTensor, named: tuple[RequestedOutput, ...] = (), is_binary: bool = False) -> None:
    check_outputs(InferRequest("m", "", "", [], list(named), {}, is_binary=is_binary), tensors)


def output(array: Any, datatype: str = "FP32", name: str = "y") -> OutputTensor:
    return OutputTensor(name, datatype, array.shape, array)


def many(size: int) -> Any:
    """An array that has no memory for its items."""
    return np.broadcast_to(np.array(1, np.int8), (size,))


@pytest.mark.parametrize("sizes", [[1 << 40], [MOST_VALUES, 1]])
@pytest.mark.parametrize("datatype", ["INT8", "BYTES"])
def test_too_many_values(sizes: list[int], datatype: str) -> None:
    outputs = [output(many(size), datatype, f"y{n}") for n, size in enumerate(sizes)]
    with pytest.raises(RequestFailure, match="Ask for binary_data") as caught:
        check(*outputs)
    assert caught.value.http == 413
    check(*outputs, is_binary=True)
    check(*outputs, named=tuple(RequestedOutput(each.name, is_binary=True) for each in outputs))
    check(OutputTensor("y", datatype, (1 << 40,), None, RegionSlice("r", 0, 8)))
    check(output(many(MOST_VALUES)))


def test_values_that_json_does_not_have() -> None:
    for wrong in (output(np.array([1, np.nan], np.float32)), output(np.array([1], np.uint16), "BF16")):
        with pytest.raises(RequestFailure, match="Ask for binary_data") as caught:
            check(wrong)
        assert caught.value.http == 400
        with pytest.raises(RequestFailure):
            check(wrong, named=(RequestedOutput("y"),), is_binary=True)
        check(wrong, is_binary=True)
    check(output(np.array([1, 2], np.float32)))
