from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_dl.server.http.infer import (
    Wanted,
    header_timeout,
    raw_shape,
    read_raw_request,
    read_request,
)
from onnx_dl.server.interfaces import Served, TensorInfo
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.messages import InferRequest, RegionSlice

X = {"name": "x", "shape": [2], "datatype": "FP32", "data": [1.5, 2]}


def read(sent: object, binary: bytes | None = None) -> tuple[InferRequest, Wanted]:
    text = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    return read_request("m", "3", memoryview(text + (binary or b"")), None if binary is None else len(text))


def refusal(sent: object, binary: bytes | None = None) -> str:
    with pytest.raises(RequestFailure) as caught:
        read(sent, binary)
    assert caught.value.http == 400
    return str(caught.value)


def test_a_request_in_json() -> None:
    request, wanted = read({"id": "7", "inputs": [X], "parameters": {"mine": 1}, "outputs": [{"name": "y"}]})
    assert (request.model, request.version, request.id) == ("m", "3", "7")
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape, tensor.data) == ("x", "FP32", (2,), [1.5, 2])
    assert [output.name for output in request.outputs] == ["y"] and request.parameters == {"mine": 1}
    assert not wanted.binary("y") and request.nbytes == len(
        json.dumps({"id": "7", "inputs": [X], "parameters": {"mine": 1}, "outputs": [{"name": "y"}]})
    )


def test_binary_tensors_are_views_of_the_body_in_order() -> None:
    def tensor(name: str, nbytes: int) -> dict[str, Any]:
        parameters = {"binary_data_size": nbytes}
        return {"name": name, "shape": [nbytes], "datatype": "UINT8", "parameters": parameters}

    text = json.dumps({"inputs": [tensor("a", 3), tensor("b", 0), X, tensor("c", 4)]}).encode()
    body = memoryview(bytearray(text + b"abcWXYZ"))
    request, _ = read_request("m", "", body, len(text))
    a, b, x, c = (tensor.data for tensor in request.inputs)
    assert (a, b, c) == (b"abc", b"", b"WXYZ") and x == [1.5, 2]
    body[len(text)] = ord("A")
    assert a == b"Abc"


def test_bodies_with_the_same_json_have_their_own_bytes() -> None:
    tensor = {"name": "a", "shape": [3], "datatype": "UINT8", "parameters": {"binary_data_size": 3}}
    text = json.dumps({"inputs": [tensor]}).encode()
    first, second = (
        read_request("m", "", memoryview(text + data), len(text))[0] for data in (b"abc", b"xyz")
    )
    assert (first.inputs[0].data, second.inputs[0].data) == (b"abc", b"xyz")
    assert first.inputs[0] is not second.inputs[0]
    for longer in (text + b"abcd", text + b"ab"):  # not as many bytes as its JSON says
        with pytest.raises(RequestFailure):
            read_request("m", "", memoryview(longer), len(text))


@pytest.mark.parametrize(
    ("everything", "own", "expected"),
    [
        (None, None, False),
        (True, None, True),
        (None, True, True),
        # The text of the extension; Triton's server does otherwise.
        (True, False, False),
        (False, True, True),
    ],
)
def test_an_output_is_binary_if_it_says_so_or_else_if_the_request_does(
    everything: bool | None, own: bool | None, expected: bool
) -> None:
    parameters = {} if everything is None else {"binary_data_output": everything}
    output = {"name": "y"} if own is None else {"name": "y", "parameters": {"binary_data": own}}
    request, wanted = read({"inputs": [X], "parameters": parameters, "outputs": [output]})
    assert wanted.binary("y") is request.outputs[0].is_binary is expected
    assert wanted.binary("other") is bool(everything)


def test_inputs_and_outputs_may_lie_in_regions() -> None:
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    request, wanted = read(
        {
            "inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "parameters": place}],
            "outputs": [
                {"name": "y", "parameters": {**place, "shared_memory_offset": 64, "binary_data": False}}
            ],
            "parameters": {"binary_data_output": True},
        }
    )
    assert request.inputs[0].data == RegionSlice("r", 0, 8)
    assert request.outputs[0].region == RegionSlice("r", 64, 8)
    assert not wanted.binary("y")


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"{", b"[]", b"null", b"{}", b'{"inputs": {}}', b'{"inputs": [1]}', b"\xff\xfe",
        b'{"inputs": []} x',
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [NaN]}]}',
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1e999]}]}',
        b'{"inputs": [{"name": "\\ud800", "shape": [1], "datatype": "FP32", "data": [1]}]}',
        {"inputs": [{**X, "name": 1}]},
        {"inputs": [{**X, "shape": [1.5]}]},
        {"inputs": [{**X, "shape": [True]}]},
        {"inputs": [{**X, "shape": "2"}]},
        {"inputs": [{**X, "shape": None}]},
        {"inputs": [{**X, "datatype": None}]},
        {"inputs": [{**X, "data": "12"}]},
        {"inputs": [{**X, "data": 1}]},
        {"inputs": [{**X, "parameters": []}]},
        {"inputs": [{**X, "parameters": {"binary_data_size": 8}}]},
        {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]},
        {"inputs": [X], "id": 5},
        {"inputs": [X], "outputs": [{}]},
        {"inputs": [X], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
        {"inputs": [X], "parameters": {"binary_data_output": "yes"}},
        {"inputs": [X], "parameters": {"a": {}}},
        {"inputs": [X], "parameters": {"a": None}},
        {"inputs": [X], "parameters": {"triton_x": 1}},
    ],
)  # fmt: skip
def test_what_is_not_a_request_is_refused_with_a_sentence(sent: object) -> None:
    assert refusal(sent)


@pytest.mark.parametrize("size", [-1, 4, True, "8", 1.5, None, 1 << 70])
def test_a_lie_about_binary_data_is_refused(size: object) -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "UINT8", "parameters": {"binary_data_size": size}}
    assert refusal({"inputs": [tensor]}, b"abc")


def test_bytes_that_no_input_has_are_refused() -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "UINT8", "parameters": {"binary_data_size": 2}}
    assert "1 bytes more" in refusal({"inputs": [tensor]}, b"abc")


def test_binary_data_needs_the_length_of_the_json() -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "UINT8", "parameters": {"binary_data_size": 0}}
    assert "Inference-Header-Content-Length" in refusal({"inputs": [tensor]})


def test_json_that_is_longer_than_the_body_is_refused() -> None:
    with pytest.raises(RequestFailure):
        read_request("m", "", memoryview(b"{}"), 3)


@pytest.mark.parametrize(
    "place",
    [
        {"shared_memory_region": "r"},
        {"shared_memory_region": 5, "shared_memory_byte_size": 8},
        {"shared_memory_region": "r", "shared_memory_byte_size": -8},
        {"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": -1},
        {"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": 1 << 64},
        {"shared_memory_region": "r", "shared_memory_byte_size": 8, "binary_data_size": 8},
    ],
)
def test_a_place_in_shared_memory_is_checked(place: dict[str, object]) -> None:
    assert refusal({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "parameters": place}]})


def test_an_output_has_one_place() -> None:
    parameters = {"shared_memory_region": "r", "shared_memory_byte_size": 8, "binary_data": True}
    assert "both" in refusal({"inputs": [X], "outputs": [{"name": "y", "parameters": parameters}]})


def test_shapes_of_any_size_are_read_and_nothing_is_allocated_for_them() -> None:
    shape = [1 << 33, 1 << 33, 10**40, -1]
    request, _ = read({"inputs": [{**X, "shape": shape}]})
    assert request.inputs[0].shape == tuple(shape)


@pytest.mark.parametrize("part", ["inputs", "outputs", "parameters"])
def test_very_many_parts_are_refused(part: str) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}
    for number in (4096, 4097):
        many = {f"p{n}": n for n in range(number)} if part == "parameters" else [tensor] * number
        if part == "outputs":
            many = [{"name": "y"}] * number
        sent = {"inputs": [tensor], part: many}
        if number == 4096:
            read(sent)
        else:
            with pytest.raises(RequestFailure, match="more than 4096"):
                read(sent)


def test_deep_json_is_refused() -> None:
    assert "nested" in refusal(b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}")
    deep = '{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": %s1%s}]}'
    assert "nested" in refusal((deep % ("[" * 70, "]" * 70)).encode())


@pytest.mark.parametrize("text", [b"", b"0", b"-1", b"1.5", b"1e3", b"9" * 20, b"\xb2"])
def test_a_timeout_that_is_no_number_of_milliseconds_is_refused(text: bytes) -> None:
    with pytest.raises(RequestFailure):
        header_timeout(text)


def test_a_timeout_is_seconds() -> None:
    assert header_timeout(b"1500") == 1.5 and header_timeout(None) is None


def served(*inputs: TensorInfo, batch: int = 0) -> Served:
    return Served(name="m", version="1", path="", generation="", inputs=inputs, max_batch_size=batch)


@pytest.mark.parametrize(
    ("shape", "nbytes", "batch", "expected"),
    [
        ((2, 3), 24, 0, (2, 3)),
        ((-1, 3), 24, 0, (2, 3)),
        ((-1, 3), 12, 8, (1, 3)),
        ((-1, -1), 20, 8, (1, 5)),
        ((-1,), 0, 0, (0,)),
        ((), 4, 0, ()),
    ],
)
def test_the_shape_of_a_raw_request_follows_from_its_size(
    shape: tuple[int, ...], nbytes: int, batch: int, expected: tuple[int, ...]
) -> None:
    request, wanted = read_raw_request(
        served(TensorInfo("x", "FP32", shape), batch=batch), "", memoryview(bytes(nbytes))
    )
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", "FP32", expected)
    assert tensor.data == bytes(nbytes) and wanted.binary("anything")


def test_a_raw_text_is_one_item() -> None:
    request, _ = read_raw_request(
        served(TensorInfo("x", "BYTES", (-1, 1)), batch=4), "", memoryview(b"hello")
    )
    assert request.inputs[0].shape == (1, 1) and request.inputs[0].data == b"\x05\0\0\0hello"


@pytest.mark.parametrize(
    ("info", "nbytes"),
    [
        (TensorInfo("x", "FP32", (-1, -1)), 16),
        (TensorInfo("x", "FP32", (-1, 3)), 16),
        (TensorInfo("x", "FP32", (-1, 0)), 16),
        (TensorInfo("x", "BYTES", (2,)), 16),
        (TensorInfo("x", "BYTES", (1, 1)), 16),
    ],
)
def test_a_shape_that_does_not_follow_is_refused(info: TensorInfo, nbytes: int) -> None:
    with pytest.raises(RequestFailure) as caught:
        raw_shape(info, nbytes, has_batch=False)
    assert caught.value.http == 400


def test_a_raw_request_has_one_input() -> None:
    info = TensorInfo("x", "FP32", (1,))
    with pytest.raises(RequestFailure, match="2 inputs"):
        read_raw_request(served(info, info), "", memoryview(b"1234"))


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.just("x"), st.floats()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["name", "shape", "datatype", "data", "parameters", "inputs", "outputs", "id",
                 "binary_data_size", "shared_memory_region", "shared_memory_byte_size", "binary_data"]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(JUNK, JUNK, st.binary(max_size=20), st.integers(0, 400))
def test_any_json_is_a_request_or_a_refusal(one: object, two: object, binary: bytes, end: int) -> None:
    inputs = [{**X, "parameters": one}, two] if isinstance(one, dict) else one
    text = json.dumps({"inputs": inputs, "outputs": two, "parameters": one}).encode() + binary
    for length in (None, len(text) - len(binary), min(end, len(text))):
        try:
            request, _ = read_request("m", "", memoryview(text), length)
        except RequestFailure as failure:
            assert failure.http == 400 and str(failure)
        else:
            assert all(type(size) is int for tensor in request.inputs for size in tensor.shape)


@pytest.mark.parametrize("has_batch", [False, True])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_a_raw_request_does_not_have_the_shape_of_an_input_of_unknown_rank(
    datatype: str, has_batch: bool
) -> None:
    info = TensorInfo("x", datatype, (), is_unranked=True)
    with pytest.raises(RequestFailure, match="does not say how many dimensions") as caught:
        raw_shape(info, 4, has_batch=has_batch)
    assert caught.value.http == 400
