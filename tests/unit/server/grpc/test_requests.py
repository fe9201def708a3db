"""ModelInferRequests as plain data, and what is refused of them."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest

from onnx_dl.server.grpc import requests, typed, wire
from onnx_dl.server.grpc.messages import Message, ModelInferRequest
from onnx_dl.server.v2.failures import RequestFailure, not_found
from onnx_dl.server.v2.messages import InferRequest, RegionSlice
from tests.support.waiting import DEADLINE

PADDING = bytes(requests.LARGE)


def a_message(**fields: Any) -> Message:
    return ModelInferRequest(model_name="m", **fields)


def with_input(datatype: str = "FP32", shape: tuple[int, ...] = (2,), **fields: Any) -> Message:
    message = a_message()
    message.inputs.add(name="x", datatype=datatype, shape=shape, **fields)
    return message


def read(message: Message, time_left: float | None = None, *, is_large: bool = False) -> InferRequest:
    """``is_large``: with an unknown field, so that our own reader reads it."""
    data = message.SerializeToString()
    if is_large:
        data += b"\xfa\x7f\x80\x80\x04" + PADDING
        assert len(data) >= requests.LARGE
    return requests.read(data, time_left)


def refusal(message: Message, *, is_large: bool = False) -> str:
    with pytest.raises(RequestFailure) as caught:
        read(message, is_large=is_large)
    assert (caught.value.http, caught.value.grpc) == (400, "INVALID_ARGUMENT")
    return str(caught.value)


def data_of(message: Message) -> bytes:
    (tensor,) = read(message).inputs
    assert isinstance(tensor.data, bytes | memoryview)
    return bytes(tensor.data)


@pytest.mark.parametrize("is_large", [False, True])
def test_all_fields_arrive(is_large: bool) -> None:
    message = a_message(model_version="3", id="é", raw_input_contents=[b"12345678", b""])
    message.inputs.add(name="x", datatype="FP32", shape=(2, 1)).parameters["p"].string_param = "v"
    message.inputs.add(name="y", datatype="INT8", shape=(0,))
    message.outputs.add(name="z").parameters["classification"].int64_param = 2
    message.parameters["a"].bool_param = True
    message.parameters["b"].double_param = 0.5
    message.parameters["c"].uint64_param = 1 << 63
    got = read(message, is_large=is_large)
    assert (got.model, got.version, got.id) == ("m", "3", "é")
    assert got.parameters == {"a": True, "b": 0.5, "c": 1 << 63}
    assert [(x.name, x.datatype, x.shape, bytes(x.data), x.parameters) for x in got.inputs] == [  # type: ignore[arg-type]
        ("x", "FP32", (2, 1), b"12345678", {"p": "v"}), ("y", "INT8", (0,), b"", {}),
    ]  # fmt: skip
    assert [(z.name, z.region, z.parameters) for z in got.outputs] == [("z", None, {"classification": 2})]
    assert got.timeout is None
    assert got.nbytes == message.ByteSize() + (len(PADDING) + 5 if is_large else 0)


@pytest.mark.parametrize(
    ("parameter", "left", "timeout"),
    [
        (None, None, None), (None, 2.0, 2.0), (1_500_000, None, 1.5), (1_500_000, 2.0, 1.5),
        (2_500_000, 2.0, 2.0), (0, None, None), (0, 2.0, 2.0),
    ],
)  # fmt: skip
def test_the_least_of_the_deadlines_holds(
    parameter: int | None, left: float | None, timeout: float | None
) -> None:
    message = a_message()
    if parameter is not None:
        message.parameters["timeout"].int64_param = parameter
    assert read(message, left).timeout == timeout


def test_parameters_that_make_no_sense_are_refused() -> None:
    message = a_message()
    message.parameters["timeout"].int64_param = -1
    assert "'timeout'" in refusal(message)
    message.parameters["timeout"].string_param = "5"
    assert "'timeout'" in refusal(message)
    message.parameters["timeout"].bool_param = True
    assert "'timeout'" in refusal(message)
    message = a_message()
    message.parameters["triton_of_my_own"].bool_param = True
    assert "reserved" in refusal(message)
    message = a_message()
    message.parameters["nothing"].SetInParent()
    assert "'nothing' has no value" in refusal(message)
    message = a_message()
    message.parameters[requests.EMPTY_FINAL].int64_param = 1
    assert "bool_param" in refusal(message)
    message.parameters[requests.EMPTY_FINAL].bool_param = True
    assert read(message).parameters == {requests.EMPTY_FINAL: True}


@pytest.mark.parametrize(
    ("datatype", "field", "items"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-(1 << 15), 7]),
        ("INT32", "int_contents", [-(1 << 31), (1 << 31) - 1]),
        ("INT64", "int64_contents", [-(1 << 63), (1 << 63) - 1]),
        ("UINT8", "uint_contents", [0, 255]),
        ("UINT16", "uint_contents", [0, 65535]),
        ("UINT32", "uint_contents", [0, (1 << 32) - 1]),
        ("UINT64", "uint64_contents", [0, (1 << 64) - 1]),
        ("FP32", "fp32_contents", [1.5, float("inf")]),
        ("FP64", "fp64_contents", [-1e300, 2.0]),
    ],
)
def test_typed_numbers_are_their_bytes(datatype: str, field: str, items: list[float]) -> None:
    dtype = {"BOOL": np.bool_, "FP32": np.float32, "FP64": np.float64}.get(datatype) or datatype.lower()
    assert data_of(with_input(datatype, contents={field: items})) == np.array(items, dtype).tobytes()


def test_typed_text_has_lengths() -> None:
    message = with_input("BYTES", (3,), contents={"bytes_contents": [b"", "né".encode(), b"\xff"]})
    assert data_of(message) == struct.pack("<I", 0) + struct.pack("<I", 3) + "né".encode() + b"\x01\0\0\0\xff"


def test_many_typed_numbers_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed, "_AT_ONCE", 7)
    items = list(range(100))
    assert data_of(with_input("INT32", (100,), contents={"int_contents": items})) == np.int32(items).tobytes()


def test_unknown_fields_beside_typed_numbers_are_skipped() -> None:
    message = with_input("FP64", (2,), contents={"fp64_contents": [1.5, -2.0]})
    contents = message.inputs[0].contents
    contents.MergeFromString(wire.field(99, b"unknown") + wire.field(1000, bytes(300)))
    assert contents.SerializeToString() != contents.__class__(fp64_contents=[1.5, -2.0]).SerializeToString()
    assert data_of(message) == np.float64([1.5, -2.0]).tobytes()


def test_numbers_that_are_not_packed_are_read() -> None:
    one_by_one = b"".join(wire.varint(6 << 3 | 5) + np.float32(n).tobytes() for n in (1, 2, 3))
    message = with_input("FP32", (3,))
    message.inputs[0].contents.MergeFromString(one_by_one)
    assert data_of(message) == np.float32([1, 2, 3]).tobytes()


def test_an_empty_typed_tensor_has_no_bytes() -> None:
    assert data_of(with_input("FP32", (0,), contents={})) == b""


@pytest.mark.parametrize(
    ("datatype", "contents", "what"),
    [
        ("INT8", {"int_contents": [128]}, "a number that INT8 does not have"),
        ("UINT16", {"uint_contents": [1 << 16]}, "a number that UINT16 does not have"),
        ("FP32", {"int_contents": [1]}, "has int_contents; expected fp32_contents"),
        ("INT32", {"int_contents": [1], "fp32_contents": [1.0]}, "has fp32_contents; expected int_contents"),
        ("FP16", {"fp32_contents": [1.0]}, "must be sent in raw_input_contents"),
        ("BF16", {"fp32_contents": [1.0]}, "must be sent in raw_input_contents"),
        ("float", {"fp32_contents": [1.0]}, "unknown datatype 'float'"),
        ("INT32", {"int_contents": [1, 2]}, "has 2 items in int_contents, and its shape [1] has 1"),
        ("FP32", {"fp32_contents": [1.0, 2.0]}, "has 2 items in fp32_contents, and its shape [1] has 1"),
        ("BYTES", {"bytes_contents": [b""] * 3}, "has 3 items in bytes_contents, and its shape [1] has 1"),
    ],
)
def test_typed_contents_that_do_not_fit_are_refused(
    datatype: str, contents: dict[str, list[float]], what: str
) -> None:
    assert what in refusal(with_input(datatype, (1,), contents=contents))


@pytest.mark.parametrize(
    ("datatype", "field", "item"), [("BYTES", "bytes_contents", b""), ("INT8", "int_contents", 1)]
)
def test_too_many_typed_items_are_refused(
    monkeypatch: pytest.MonkeyPatch, datatype: str, field: str, item: Any
) -> None:
    assert typed.MOST_ITEMS <= 1_000_000
    monkeypatch.setattr(typed, "MOST_ITEMS", 1000)
    assert read(with_input(datatype, (1000,), contents={field: [item] * 1000})).inputs
    message = with_input(datatype, (1001,), contents={field: [item] * 1001})
    assert f"has 1001 items in {field}, which takes 1000; send raw_input_contents" in refusal(message)


def test_many_empty_texts_make_no_objects() -> None:
    tensor = wire.field(1, b"x") + wire.field(2, b"BYTES") + wire.field(5, b"\x42\0" * 1_200_000)
    data = wire.field(5, tensor)
    tracemalloc.start()
    try:
        with pytest.raises(RequestFailure, match="1200000 items"):
            requests.read(data, None)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data)
    finally:
        tracemalloc.stop()


def test_a_model_that_is_not_there_is_told_first() -> None:
    asked: list[tuple[str, str]] = []

    def find(name: str, version: str) -> None:
        asked.append((name, version))
        raise not_found("there is none")

    message = with_input("INT8", (1,), contents={"int_contents": [1000]})
    message.model_version = "3"
    with pytest.raises(RequestFailure, match="there is none"):
        requests.read(message.SerializeToString(), None, find)
    assert asked == [("m", "3")]


def test_large_typed_tensors_are_read_one_at_a_time() -> None:
    data = with_input("FP32", (1 << 19,), contents={"fp32_contents": [0.5] * (1 << 19)}).SerializeToString()
    with requests._one_at_a_time, pytest.raises(RequestFailure) as caught:
        requests.read(data, 0.01)
    assert caught.value.http == 408
    assert requests.read(data, 0.01 + DEADLINE).inputs[0].shape == (1 << 19,)


def test_a_shape_of_very_many_sizes_is_refused() -> None:
    message = with_input("FP32", (1,) * 65, contents={"fp32_contents": [1.0]})
    assert "more than 64 sizes in the shape of input 'x'" in refusal(message)


@pytest.mark.parametrize("is_large", [False, True])
def test_data_twice_or_not_at_all_is_refused(is_large: bool) -> None:
    message = with_input(contents={"fp32_contents": [1.0]})
    message.raw_input_contents.append(b"1234")
    assert "contents field must not be specified when using raw_input_contents" in refusal(
        message, is_large=is_large
    )
    assert "unable to find data for input tensor 'x' for model 'm'" in refusal(
        with_input(), is_large=is_large
    )
    message = with_input()
    message.raw_input_contents.extend([b"1234", b"5678"])
    assert "raw_input_contents has 2 items, and 1 inputs need one" in refusal(message, is_large=is_large)


def test_an_input_in_a_region_needs_no_data() -> None:
    message = with_input()
    for name, value in (("shared_memory_byte_size", 8), ("shared_memory_offset", 64)):
        message.inputs[0].parameters[name].int64_param = value
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    message.inputs.add(name="y", datatype="FP32", shape=(1,))
    message.raw_input_contents.append(b"of y")
    first, second = read(message).inputs
    assert (first.data, first.parameters) == (RegionSlice("r", 64, 8), {})
    assert second.data == b"of y"
    message.inputs[0].contents.fp32_contents.append(1.0)
    assert "unexpected 'content' provided when using shared memory" in refusal(message)


def test_an_output_in_a_region() -> None:
    message = a_message()
    output = message.outputs.add(name="z")
    output.parameters["shared_memory_region"].string_param = "r"
    output.parameters["shared_memory_byte_size"].int64_param = 8
    (got,) = read(message).outputs
    assert (got.region, got.parameters) == (RegionSlice("r", 0, 8), {})


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ({"shared_memory_region": "r"}, "shared_memory_byte_size must be specified"),
        ({"shared_memory_byte_size": 8}, "need shared_memory_region"),
        ({"shared_memory_offset": 8}, "need shared_memory_region"),
        ({"shared_memory_region": 7, "shared_memory_byte_size": 8}, "must be a name"),
        ({"shared_memory_region": "", "shared_memory_byte_size": 8}, "must be a name"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": -8}, "at least 0"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": "8"}, "at least 0"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": True}, "at least 0"),
        (
            {"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": -1},
            "at least 0",
        ),
    ],
)
def test_regions_that_make_no_sense_are_refused(parameters: dict[str, Any], what: str) -> None:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param"}
    for message in (with_input(), a_message()):
        tensor = message.inputs[0] if message.inputs else message.outputs.add(name="z")
        for name, value in parameters.items():
            setattr(tensor.parameters[name], kinds[type(value)], value)
        assert what in refusal(message)


@pytest.mark.parametrize(
    "data", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x3a\xff\xff\xff\xff\x7f" + PADDING]
)
def test_bytes_that_are_no_request_are_refused(data: bytes) -> None:
    with pytest.raises(RequestFailure, match="the message is not a ModelInferRequest") as caught:
        requests.read(data, None)
    assert caught.value.grpc == "INVALID_ARGUMENT"
    assert requests.id_of(data) == ""


def test_the_id_of_a_refused_request_is_known() -> None:
    assert requests.id_of(a_message(id="7").SerializeToString()) == "7"
    large = a_message(id="8", raw_input_contents=[PADDING])
    assert requests.id_of(large.SerializeToString()) == "8"


def test_large_tensors_are_not_copied() -> None:
    message = with_input("UINT8", (len(PADDING),))
    message.raw_input_contents.append(PADDING)
    data = message.SerializeToString()
    view = requests.read(data, None).inputs[0].data
    assert isinstance(view, memoryview)
    assert view.obj is data
    assert view == PADDING


def test_shapes_are_as_they_were_sent() -> None:
    message = with_input(shape=(1 << 62, -5, 1 << 62))
    message.raw_input_contents.append(b"x")
    assert read(message).inputs[0].shape == (1 << 62, -5, 1 << 62)
