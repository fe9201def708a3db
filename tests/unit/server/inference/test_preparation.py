"""Requests as arguments of runs; those that are like the last one take fewer steps, with the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnx_dl.server.inference.preparation import Preparations
from onnx_dl.server.interfaces import Served, TensorInfo
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.messages import InferRequest, InputTensor, RegionSlice, RequestedOutput


def served(datatype: str = "FP32", **fields: Any) -> Served:
    return Served(
        name="m", version="1", path="", generation="", max_batch_size=8,
        inputs=(TensorInfo("x", datatype, (-1, 2)),),
        outputs=(TensorInfo("y", "FP32", (-1, 2)), TensorInfo("z", "FP32", (-1, 2))), **fields,
    )  # fmt: skip


def request(*outputs: RequestedOutput, **fields: Any) -> InferRequest:
    x = {"name": "x", "datatype": "FP32", "shape": (1, 2), "data": np.ones((1, 2), np.float32).tobytes()}
    return InferRequest("m", "", "", [InputTensor(**x | fields)], list(outputs), {})


def plain_empty(nbytes: int) -> Any:
    return np.empty(nbytes, np.uint8)


OTHERS = [
    request(shape=(2, 2), data=bytes(16)),
    request(data=memoryview(bytes(8))),
    request(data=[3.0, 4.0]),
    request(RequestedOutput("z")),
    request(RequestedOutput("z"), RequestedOutput("y")),
    request(shape=(1, 2, 1)),
    request(shape=(9, 2), data=bytes(72)),
    request(data=bytes(7)),
    request(data=bytes(9)),
    request(data=memoryview(bytes(4))),
    request(datatype="INT32"),
    request(name="q"),
    request(RequestedOutput("q")),
    request(RequestedOutput("z", parameters={"classification": 1})),
    InferRequest("m", "", "", [], [], {}),
    InferRequest("m", "", "", request().inputs * 2, [], {}),
]


def outcome(preparations: Preparations, entry: Served, wanted: InferRequest) -> Any:
    try:
        prepared = preparations.prepare(entry, wanted, None)
    except RequestFailure as failure:
        return failure.http, str(failure)
    feed = {name: (value.dtype, value.shape, value.tolist()) for name, value in prepared.feed.items()}
    return prepared.names, feed, prepared.rows, prepared.types, prepared.places, prepared.copies


@pytest.mark.parametrize("wanted", OTHERS)
@pytest.mark.parametrize(
    "last", [request(), request(RequestedOutput("z")), request(data=memoryview(bytes(8)))]
)
def test_the_request_before_makes_no_difference(last: InferRequest, wanted: InferRequest) -> None:
    entry, preparations = served(), Preparations(plain_empty)
    alone = outcome(Preparations(plain_empty), entry, wanted)
    for _ in range(3):
        preparations.prepare(entry, last, None)
        assert outcome(preparations, entry, wanted) == alone
        assert outcome(preparations, entry, wanted) == alone


def test_each_request_has_its_own_bytes() -> None:
    entry, preparations = served(), Preparations(plain_empty)
    for number in range(4):
        data = np.full((1, 2), number, np.float32)
        prepared = preparations.prepare(entry, request(data=data.tobytes()), None)
        assert prepared.feed["x"].tolist() == data.tolist()
        assert prepared.rows == 1


def test_a_new_content_of_a_version_is_checked_anew() -> None:
    preparations = Preparations(plain_empty)
    for _ in range(2):
        preparations.prepare(served(), request(), None)
    with pytest.raises(RequestFailure, match="expects 'INT32'"):
        preparations.prepare(served("INT32"), request(), None)


@pytest.mark.parametrize("datatype", ["BOOL", "BYTES"])
def test_bytes_that_are_looked_at_are_looked_at_each_time(datatype: str) -> None:
    entry, preparations = served(datatype), Preparations(plain_empty)
    good, bad = (b"\0\1", b"\0\2") if datatype == "BOOL" else (b"\0" * 8, b"\1\0\0\0\xff\0\0\0\0")
    for _ in range(2):
        preparations.prepare(entry, request(datatype=datatype, data=good), None)
    with pytest.raises(RequestFailure):
        preparations.prepare(entry, request(datatype=datatype, data=bad), None)


def test_bfloat16_has_a_type() -> None:
    entry, preparations = served("BF16"), Preparations(plain_empty)
    for _ in range(2):
        prepared = preparations.prepare(entry, request(datatype="BF16", data=b"\1\0\2\0"), None)
        assert prepared.types == {"x": 16}
        assert prepared.feed["x"].tolist() == [[1, 2]]


def test_outputs_of_an_unknown_model_must_be_named() -> None:
    entry, preparations = Served(name="m", version="1", path="", generation=""), Preparations(plain_empty)
    assert preparations.prepare(entry, request(RequestedOutput("any")), None).names == ["any"]
    with pytest.raises(RequestFailure, match="not known"):
        preparations.prepare(entry, request(), None)


def test_an_input_without_data_is_refused() -> None:
    with pytest.raises(RequestFailure, match="has no data"):
        Preparations(plain_empty).prepare(served(), request(data=None), None)
    with pytest.raises(RequestFailure, match="has no data"):
        Preparations(plain_empty).prepare(served(), request(data=RegionSlice("r", 0, 8)), None)
