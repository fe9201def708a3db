"""Tensors of requests as arrays: where they lie, and every mistake about them."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnx_dl.server.inference import inputs
from onnx_dl.server.v2 import datatypes
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.messages import InputTensor
from onnx_dl.tensors.block import home_of
from onnx_dl.tensors.shared_arrays import SharedArrays

FIXED = sorted(datatypes.SIZES)
SHAPES: list[tuple[int, ...]] = [(), (0,), (3,), (2, 0, 4), (2, 3)]


def tensor(datatype: str, shape: tuple[Any, ...], data: Any = b"") -> InputTensor:
    return InputTensor("x", datatype, shape, data)


def plain_empty(nbytes: int) -> NDArray[Any]:
    return np.empty(nbytes, np.uint8)


def refused(words: str) -> Any:
    return pytest.raises(RequestFailure, match=words)


def check_refused(caught: Any) -> None:
    assert (caught.value.http, caught.value.grpc) == (400, "INVALID_ARGUMENT")
    assert "input 'x'" in str(caught.value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("datatype", FIXED)
def test_binary_tensors_of_every_dtype(datatype: str, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(np.uint16 if datatype == "BF16" else datatypes.to_numpy(datatype))
    sent = (np.arange(np.prod(shape, dtype=int)) % 2).astype(dtype).reshape(shape)
    for data in (sent.tobytes(), memoryview(sent.tobytes()), memoryview(bytearray(sent.tobytes()))):
        array = inputs.binary(tensor(datatype, shape), data, plain_empty)
        assert array.dtype == dtype
        assert array.shape == shape
        assert np.array_equal(array, sent)


@pytest.mark.parametrize("begin", [0, 8, 64])
def test_a_view_of_a_block_stays_in_it(begin: int) -> None:
    arrays = SharedArrays()
    body = arrays.empty(1 << 20, np.uint8)
    body[:] = 7
    view = memoryview(body)[begin : begin + (512 << 10)]
    array = inputs.binary(tensor("FP32", (1 << 17,)), view, plain_empty)
    assert home_of(array) is home_of(body) is not None
    assert array.__array_interface__["data"][0] - body.__array_interface__["data"][0] == begin
    body[begin] = 9
    assert array.view(np.uint8)[0] == 9


def test_a_cast_view_of_a_block_stays_in_it() -> None:
    body = SharedArrays().empty(1 << 20, np.uint8)
    array = inputs.binary(tensor("FP64", (1 << 17,)), memoryview(body).cast("B").toreadonly(), plain_empty)
    assert home_of(array) is not None


def test_what_is_not_aligned_is_moved_once_to_aligned_memory() -> None:
    made: list[int] = []

    def make(nbytes: int) -> NDArray[Any]:
        made.append(nbytes)
        return SharedArrays().empty(nbytes, np.uint8)

    body = SharedArrays().empty(1 << 20, np.uint8)
    body[:] = np.arange(1 << 20) % 251
    view = memoryview(body)[3 : 3 + (256 << 10)]
    array = inputs.binary(tensor("FP32", (1 << 16,)), view, make)
    assert made == [256 << 10]
    assert array.flags.aligned
    assert home_of(array) is not None
    assert array.tobytes() == view.tobytes()
    # One byte an item is aligned anywhere; small ones are copied by the call.
    inputs.binary(tensor("INT8", (256 << 10,)), view, make)
    inputs.binary(tensor("FP32", (16,)), view[:64], make)
    assert made == [256 << 10]


@pytest.mark.parametrize(
    ("datatype", "shape", "nbytes"),
    [
        ("FP32", (16,), 63), ("FP32", (16,), 65), ("FP32", (16,), 0), ("INT64", (0,), 8), ("BOOL", (), 0),
        ("FP32", (1 << 20, 1 << 20), 64), ("INT8", (1 << 33, 1 << 33), 64), ("FP64", (1 << 62, 8), 0),
    ],
)  # fmt: skip
def test_another_size_is_refused_before_anything_is_allocated(
    datatype: str, shape: tuple[int, ...], nbytes: int
) -> None:
    tracemalloc.start()
    try:
        with refused("byte size mismatch") as caught:
            inputs.binary(tensor(datatype, shape), bytes(nbytes), plain_empty)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    check_refused(caught)


def test_bytes_that_are_no_bool_are_refused() -> None:
    with refused("neither 0 nor 1") as caught:
        inputs.binary(tensor("BOOL", (3,)), b"\0\1\2", plain_empty)
    check_refused(caught)


def test_an_unknown_datatype_is_refused() -> None:
    for make in (inputs.from_json, lambda t, d: inputs.binary(t, bytes(4), plain_empty)):
        with refused("'FP12', which is not known") as caught:
            make(tensor("FP12", (1,)), [1])
        check_refused(caught)


def test_text() -> None:
    array = inputs.binary(tensor("BYTES", (2, 1)), b"\1\0\0\0a\2\0\0\0\xc3\xa9", plain_empty)
    assert (array.dtype, array.shape, array.tolist()) == (np.dtype(object), (2, 1), [["a"], ["é"]])
    assert inputs.binary(tensor("BYTES", (0, 3)), b"", plain_empty).shape == (0, 3)
    for data in (b"\2\0\0\0a", b"\1\0\0\0\xff", b"", b"\0\0\0\0\0"):
        with refused("of BYTES") as caught:
            inputs.binary(tensor("BYTES", (1,)), data, plain_empty)
        check_refused(caught)


JSON: list[tuple[str, tuple[int, ...], list[Any], list[Any]]] = [
    ("FP32", (2, 2), [1, 2.5, -3, 4e10], [1, 2.5, -3, 4e10]),
    ("FP32", (2, 2), [[1, 2], [3, 4]], [1, 2, 3, 4]),
    ("FP64", (1, 1, 2), [[[0.1, 1e300]]], [0.1, 1e300]),
    ("FP32", (0,), [], []),
    ("FP32", (2, 0), [[], []], []),
    ("FP32", (), [1.5], [1.5]),
    ("INT8", (2,), [-128, 127], [-128, 127]),
    ("UINT8", (2,), [0, 255], [0, 255]),
    ("INT64", (2,), [-(2**63), 2**63 - 1], [-(2**63), 2**63 - 1]),
    ("UINT64", (2,), [0, 2**64 - 1], [0, 2**64 - 1]),
    ("BOOL", (2,), [True, False], [True, False]),
    ("BYTES", (2,), ["a", "é"], ["a", "é"]),
    ("BYTES", (2, 1), [["a"], [""]], ["a", ""]),
]


@pytest.mark.parametrize(("datatype", "shape", "items", "flat"), JSON)
def test_json(datatype: str, shape: tuple[int, ...], items: list[Any], flat: list[Any]) -> None:
    array = inputs.from_json(tensor(datatype, shape), items)
    dtype = np.dtype(object) if datatype == "BYTES" else datatypes.to_numpy(datatype)
    assert (array.dtype, array.shape) == (dtype, shape)
    wanted = flat if datatype == "BYTES" else np.array(flat, dtype).tolist()
    assert array.reshape(-1).tolist() == wanted


@pytest.mark.parametrize(
    ("datatype", "shape", "items", "words"),
    [
        ("FP32", (1 << 20, 1 << 20), [1.0] * 16, "has 16 items, and its shape"),
        ("FP32", (1 << 33, 1 << 33), [1.0] * 16, "has 16 items"),
        ("FP32", (3,), [1, 2], "has 2 items"),
        ("FP32", (0,), [1], "has 1 items"),
        ("INT32", (1,), [True], "whole numbers only; it got true or false"),
        ("INT32", (1,), [1.0], "it got a fraction"),
        ("INT32", (1,), ["1"], "it got text"),
        ("FP32", (1,), ["1"], "takes numbers only; it got text"),
        ("FP32", (1,), [None], "it got null"),
        ("FP32", (1,), [True], "it got true or false"),
        ("FP32", (1,), [{}], "it got an object"),
        ("BOOL", (1,), [1], "true and false only; it got a number"),
        ("BYTES", (1,), [1], "takes text only; it got a number"),
        ("BYTES", (1,), ["\ud800"], "surrogates"),
        ("INT8", (1,), [128], "out of the range of INT8"),
        ("INT8", (1,), [-129], "out of the range of INT8"),
        ("UINT8", (1,), [-1], "out of the range of UINT8"),
        ("UINT64", (1,), [-1], "out of the range of UINT64"),
        ("UINT64", (1,), [2**64], "out of the range of UINT64"),
        ("INT64", (1,), [2**63], "out of the range of INT64"),
        ("INT64", (1,), [10**400], "out of the range of INT64"),
        ("FP32", (1,), [1e39], "out of the range of FP32"),
        ("FP32", (1,), [10**400], "out of the range of FP32"),
        ("FP64", (1,), [10**400], "out of the range of FP64"),
        ("FP16", (1,), [1.0], "cannot be sent as JSON"),
        ("BF16", (1,), [1.0], "cannot be sent as JSON"),
        ("FP32", (2,), [1, [2]], "lists beside items"),
        ("FP32", (2,), [[1], 2], "lists beside items"),
        ("FP32", (1,), [[[1], [2]], 3], "lists beside items"),
    ],
)
def test_mistakes_in_json(datatype: str, shape: tuple[int, ...], items: list[Any], words: str) -> None:
    tracemalloc.start()
    try:
        with refused(re.escape(words)) as caught:
            inputs.from_json(tensor(datatype, shape), items)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    check_refused(caught)


def test_lists_in_lists_without_end_are_refused() -> None:
    items: list[Any] = [1.0]
    for _ in range(100):
        items = [items]
    with refused("too many lists in lists") as caught:
        inputs.from_json(tensor("FP32", (1,)), items)
    check_refused(caught)


def test_numbers_that_just_fit_are_kept() -> None:
    largest = float(np.finfo(np.float32).max)
    assert inputs.from_json(tensor("FP32", (1,)), [largest])[0] == np.float32(largest)
