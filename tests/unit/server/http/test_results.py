from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnx_dl.server.http.infer import Wanted
from onnx_dl.server.http.results import infer_answer, takes_long
from onnx_dl.server.v2.bounds import AT_ONCE_TEXTS, AT_ONCE_VALUES
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.messages import InferResponse, OutputTensor, RegionSlice

BINARY = Wanted(True, {})
TEXT = Wanted(False, {})


def output(datatype: str, array: NDArray[Any], name: str = "y") -> OutputTensor:
    return OutputTensor(name, datatype, array.shape, array)


def response(*outputs: OutputTensor, **more: Any) -> InferResponse:
    return InferResponse("m", "2", more.get("id", ""), list(outputs), more.get("parameters", {}))


def answered(datatype: str, array: NDArray[Any]) -> list[Any]:
    """The data of an output in JSON."""
    answer = infer_answer(response(output(datatype, array)), TEXT)
    assert answer.kind == b"application/json" and not answer.headers
    (entry,) = json.loads(b"".join(answer.parts))["outputs"]
    assert entry["shape"] == list(array.shape) and entry["datatype"] == datatype
    data: list[Any] = entry["data"]
    return data


def test_the_fields_are_those_of_the_protocol_in_its_order() -> None:
    sent = response(output("INT8", np.zeros((1, 2), np.int8)), id="i", parameters={"a": 1})
    assert b"".join(infer_answer(sent, TEXT).parts) == (
        b'{"id":"i","model_name":"m","model_version":"2","parameters":{"a":1},'
        b'"outputs":[{"name":"y","datatype":"INT8","shape":[1,2],"data":[0,0]}]}'
    )


@pytest.mark.parametrize("kind", ["FP32", "FP64"])
def test_numbers_read_back_equal(kind: str) -> None:
    dtype = np.float32 if kind == "FP32" else np.float64
    info = np.finfo(dtype)
    numbers = np.concatenate(
        [
            np.array([0, -0.0, 0.1, 1 / 3, info.max, info.min, info.tiny, info.smallest_subnormal], dtype),
            np.random.default_rng(3).standard_normal(500).astype(dtype) * dtype(1e20),
        ]
    )
    read = np.array(answered(kind, numbers), dtype)
    assert read.tobytes() == numbers.tobytes()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("INT64", [-(2**63), 2**63 - 1, 0, 2**53 + 1]), ("UINT64", [0, 2**64 - 1, 2**53 + 1]),
        ("INT8", [-128, 127]), ("UINT16", [65535]), ("INT32", [-(2**31)]), ("UINT8", []),
    ],
)  # fmt: skip
def test_whole_numbers_are_exact(kind: str, values: list[int]) -> None:
    assert answered(kind, np.array(values, kind.lower())) == values


def test_truth_values_are_those_of_json() -> None:
    assert [item is True for item in answered("BOOL", np.array([[True], [False]]))] == [True, False]


def test_text_is_text() -> None:
    array = np.array([b"bytes", "ü", ""], object)
    assert answered("BYTES", array) == ["bytes", "ü", ""]


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("FP32", np.array([1, np.nan], np.float32)),
        ("FP64", np.array([np.inf])),
        ("FP32", np.array(-np.inf, np.float32)),
        ("FP16", np.array([1], np.float16)),
        ("BF16", np.array([1], np.uint16)),
        ("BYTES", np.array([b"\xff"], object)),
    ],
)
def test_what_json_has_not_is_refused_with_the_way_out(kind: str, array: NDArray[Any]) -> None:
    with pytest.raises(RequestFailure, match="Ask for binary_data") as caught:
        infer_answer(response(output(kind, array)), TEXT)
    assert caught.value.http == 400
    assert infer_answer(response(output(kind, array)), BINARY).status == 200


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.array(5, np.int64), np.zeros((3, 0), np.float16),
        np.array([True, False]), np.arange(3, dtype=np.float16), np.array([], np.float64),
    ],
)  # fmt: skip
def test_binary_data_is_the_memory_of_the_array(array: NDArray[Any]) -> None:
    answer = infer_answer(response(output("FP32", array)), BINARY)
    text, data = answer.parts
    assert bytes(data) == array.tobytes()
    assert json.loads(bytes(text))["outputs"][0]["parameters"] == {"binary_data_size": array.nbytes}
    assert answer.headers == [(b"Inference-Header-Content-Length", str(len(text)).encode())]
    assert answer.kind == b"application/octet-stream"
    if array.size:
        assert np.shares_memory(np.frombuffer(data, np.uint8), array)


def test_binary_text_has_the_length_before_each_item() -> None:
    answer = infer_answer(response(output("BYTES", np.array([["ab", b"\xff"]], object))), BINARY)
    assert bytes(answer.parts[1]) == struct.pack("<I", 2) + b"ab" + struct.pack("<I", 1) + b"\xff"


def test_outputs_of_both_forms_and_in_regions() -> None:
    one, two = (output("INT8", np.array([number], np.int8), name) for name, number in (("a", 1), ("b", 2)))
    there = OutputTensor("c", "INT8", (1,), None, RegionSlice("r", 0, 1))
    answer = infer_answer(response(one, there, two), Wanted(True, {"a": False, "c": False}))
    text, data = answer.parts
    assert bytes(data) == b"\x02"
    assert json.loads(bytes(text))["outputs"] == [
        {"name": "a", "datatype": "INT8", "shape": [1], "data": [1]},
        {"name": "c", "datatype": "INT8", "shape": [1]},
        {"name": "b", "datatype": "INT8", "shape": [1], "parameters": {"binary_data_size": 1}},
    ]


@pytest.mark.parametrize("more", [0, 1, AT_ONCE_VALUES, AT_ONCE_VALUES + 1])
def test_many_items_are_those_of_few(more: int) -> None:
    numbers = np.arange(AT_ONCE_VALUES + more, dtype=np.int32).reshape(1, -1)
    assert answered("INT32", numbers) == numbers.ravel().tolist()
    texts = np.array([f"é{number}" for number in numbers.ravel()], object)
    assert answered("BYTES", texts) == texts.tolist()


def test_what_would_keep_an_event_loop_waiting_is_known_before() -> None:
    def is_long(datatype: str, size: int, wanted: Wanted) -> bool:
        array = np.broadcast_to(np.array(None if datatype == "BYTES" else 0), (size,))
        return takes_long(response(output(datatype, array), output(datatype, array, "z")), wanted)

    half = AT_ONCE_VALUES // 2
    assert not is_long("FP32", half, TEXT) and is_long("FP32", half + 1, TEXT)
    assert not is_long("FP32", 1 << 40, BINARY)
    half = AT_ONCE_TEXTS // 2
    for wanted in (TEXT, BINARY):
        assert not is_long("BYTES", half, wanted) and is_long("BYTES", half + 1, wanted)
