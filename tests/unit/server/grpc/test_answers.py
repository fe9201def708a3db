"""InferResponses as messages: protobuf reads what we join by hand."""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import pytest

from onnx_dl.server.grpc import answers, wire
from onnx_dl.server.grpc.messages import Message, ModelInferResponse, message
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.messages import InferResponse, OutputTensor, RegionSlice

ModelStreamInferResponse = message("inference.ModelStreamInferResponse")


def a_response(*outputs: OutputTensor, **fields: Any) -> InferResponse:
    return InferResponse("m", "2", fields.pop("id", "7"), list(outputs), **fields)


def tensor(array: np.ndarray[Any, Any], datatype: str = "FP32", name: str = "y") -> OutputTensor:
    return OutputTensor(name, datatype, array.shape, array)


def read(response: InferResponse) -> Message:
    return ModelInferResponse.FromString(answers.encode(response))


def test_all_fields_arrive() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    got = read(a_response(tensor(array), tensor(array[:0], name="empty")))
    assert (got.model_name, got.model_version, got.id) == ("m", "2", "7")
    assert [(o.name, o.datatype, list(o.shape)) for o in got.outputs] == [
        ("y", "FP32", [2, 3]), ("empty", "FP32", [0, 3]),
    ]  # fmt: skip
    assert list(got.raw_output_contents) == [array.tobytes(), b""]


def test_an_id_that_is_empty_or_not_ascii() -> None:
    assert read(a_response(id="")).id == ""
    assert read(a_response(id="é" * 100)).id == "é" * 100


@pytest.mark.parametrize(
    ("datatype", "array"),
    [
        ("BOOL", np.array([True, False])),
        ("INT8", np.int8([-1, 2])),
        ("UINT64", np.uint64([1 << 63])),
        ("FP16", np.float16([1.5])),
        ("FP64", np.float64(3.5)),  # no dimension
        ("BF16", np.uint16([16256])),
        ("FP32", np.float32([[1, 2], [3, 4]])),
        ("FP32", np.zeros((1, 0, 5), np.float32)),
        ("FP32", np.array([1.5, 2.5], ">f4")),
    ],
)
def test_numbers_of_any_datatype(datatype: str, array: np.ndarray[Any, Any]) -> None:
    got = read(a_response(tensor(np.asarray(array), datatype)))
    expected = np.asarray(array)
    assert list(got.raw_output_contents) == [expected.astype(expected.dtype.newbyteorder("<")).tobytes()]
    assert list(got.outputs[0].shape) == list(expected.shape)


def test_text_has_lengths() -> None:
    array = np.array([["a", "né"], [b"\x00", ""]], object)
    got = read(a_response(tensor(array, "BYTES")))
    assert list(got.raw_output_contents) == [b"\1\0\0\0a\3\0\0\0n\xc3\xa9\1\0\0\0\0\0\0\0\0"]


def test_an_output_in_a_region_keeps_its_place() -> None:
    there = OutputTensor("there", "FP32", (4,), None, RegionSlice("r", 0, 16))
    got = read(a_response(there, tensor(np.float32([1]))))
    assert [o.name for o in got.outputs] == ["there", "y"]
    assert list(got.raw_output_contents) == [b"", np.float32([1]).tobytes()]


def test_parameters_keep_their_kinds() -> None:
    for value, kind in (
        (True, "bool_param"),
        (1, "int64_param"),
        ("1", "string_param"),
        (1.0, "double_param"),
    ):
        got = read(a_response(parameters={"p": value}))  # 1 and True are one as keys of a cache
        assert got.parameters["p"].WhichOneof("parameter_choice") == kind


def test_an_answer_of_a_stream_is_the_last_of_its_request() -> None:
    response = a_response(tensor(np.zeros(100_000, np.float32)))
    got = ModelStreamInferResponse.FromString(answers.encode_streamed(response))
    assert got.error_message == ""
    assert got.infer_response.parameters["triton_final_response"].bool_param is True
    del got.infer_response.parameters["triton_final_response"]
    assert got.infer_response == read(response)


@pytest.mark.parametrize("request_id", ["", "é"])
def test_a_failed_request_of_a_stream_names_its_id(request_id: str) -> None:
    got = ModelStreamInferResponse.FromString(answers.encode_failed("né", request_id))
    assert (got.error_message, got.infer_response.id) == ("né", request_id)
    assert got.HasField("infer_response")
    assert ModelStreamInferResponse.FromString(answers.encode_failed("", "")).error_message != ""


def test_an_answer_that_no_message_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_LARGEST", 5000)
    assert len(answers.encode(a_response(tensor(np.zeros(1200, np.float32))))) < 5000
    with pytest.raises(RequestFailure, match="a message of gRPC has 5000 at most") as caught:
        answers.encode(a_response(tensor(np.zeros(1300, np.float32))))
    assert caught.value.grpc == "INTERNAL"


def test_a_large_tensor_is_copied_once() -> None:
    """The time of one copy, not of protobuf's four."""
    array = np.zeros(16 << 20, np.float32)
    response = a_response(tensor(array))

    def least(action: Any) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
            gc.collect()
        return min(times)

    def by_protobuf() -> bytes:
        built = ModelInferResponse(model_name="m")
        built.raw_output_contents.append(array.tobytes())
        encoded: bytes = built.SerializeToString()
        return encoded

    assert least(lambda: answers.encode(response)) < least(by_protobuf)


def test_the_head_of_a_field() -> None:
    assert wire.head(6, 300) + b"x" * 300 == wire.field(6, b"x" * 300)
