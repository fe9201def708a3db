"""Requests against signatures."""

from __future__ import annotations

import re
from typing import Any

import pytest

from onnx_dl.server.inference import checks
from onnx_dl.server.inference.checks import Signature
from onnx_dl.server.interfaces import Served, TensorInfo
from onnx_dl.server.v2.bounds import MOST_TEXTS
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.messages import InferRequest, InputTensor, RegionSlice, RequestedOutput


def served(max_batch_size: int = 0, *inputs: TensorInfo) -> Served:
    return Served(
        name="m", version="1", path="", generation="",
        inputs=inputs or (TensorInfo("x", "FP32", (-1, 16)), TensorInfo("o", "INT8", (2,), True)),
        outputs=(TensorInfo("y", "FP32", (-1, 16)), TensorInfo("z", "BF16", (-1,))),
        max_batch_size=max_batch_size,
    )  # fmt: skip


def sent(name: str = "x", datatype: str = "FP32", shape: tuple[Any, ...] = (1, 16)) -> InputTensor:
    return InputTensor(name, datatype, shape, b"")


def rows(entry: Served, *tensors: InputTensor) -> int:
    return checks.check_inputs(Signature(entry), tensors)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([sent(), sent("q")], "unexpected inference input 'q' for model 'm'"),
        ([sent(), sent()], "input 'x' already exists in request"),
        ([], "expected 1 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing required"),
        ([], "input(s) ['x']. Please provide all required input(s)."),
        ([sent("o", "INT8", (2,))], "Got input(s) ['o'], but missing required input(s) ['x']"),
        ([sent(datatype="INT32")], "inference input 'x' data-type is 'INT32', but model 'm' expects 'FP32'"),
        ([sent(datatype="")], "data-type is ''"),
        ([sent(shape=(1, 8))],
         "unexpected shape for input 'x' for model 'm'. Expected [-1,16], got [1,8]"),
        ([sent(shape=())], "Expected [-1,16], got []"),
        ([sent(shape=(1, 16, 1))], "got [1,16,1]"),
        ([sent(shape=(-1, 16))], "not negative"),
        ([sent(shape=(True, 16))], "shape [True,16] of input 'x' is not valid"),
        ([sent(shape=(1.0, 16))], "is not valid"),
        ([sent(shape=("1", 16))], "is not valid"),
        ([sent(shape=(None, 16))], "is not valid"),
        ([sent(shape=(1 << 63, 16))], "is not valid"),
        ([sent(shape=(1,) * 33)], "has 33 dimensions"),
    ],
)  # fmt: skip
def test_mistakes(tensors: list[InputTensor], words: str) -> None:
    with pytest.raises(RequestFailure, match=re.escape(words)) as caught:
        rows(served(), *tensors)
    assert (caught.value.http, caught.value.grpc) == (400, "INVALID_ARGUMENT")


def test_without_a_batch_a_request_is_one_row() -> None:
    assert rows(served(), sent(shape=(7, 16))) == 1
    assert rows(served(), sent(shape=(0, 16)), sent("o", "INT8", (2,))) == 1


def test_a_batch_counts_its_rows() -> None:
    entry = served(8, TensorInfo("x", "FP32", (-1, 16)), TensorInfo("w", "INT8", (-1,)))
    assert rows(entry, sent(shape=(8, 16)), sent("w", "INT8", (8,))) == 8
    assert rows(entry, sent(shape=(0, 16)), sent("w", "INT8", (0,))) == 0
    for shape, words in (
        ((9, 16), "inference request batch-size must be <= 8 for 'm'"),
        ((2, 16), "input 'w' batch size does not match other inputs for 'm'"),
        ((16,), "Expected [-1,16], got [16]"),
    ):
        with pytest.raises(RequestFailure, match=re.escape(words)):
            rows(entry, sent(shape=shape), sent("w", "INT8", (3,)))


def test_huge_shapes_fit_a_free_size() -> None:
    """Their number of items is compared with what was sent, elsewhere."""
    assert rows(served(), sent(shape=(1 << 62, 16))) == 1
    assert checks.element_count((1 << 62, 1 << 62, 3)) == 3 << 124
    assert checks.element_count(()) == 1
    assert checks.element_count((1 << 62, 0)) == 0


def test_a_model_without_inputs() -> None:
    entry = Served(name="m", version="1", path="", generation="", outputs=(TensorInfo("y", "FP32", (1,)),))
    assert rows(entry) == 1
    with pytest.raises(RequestFailure, match="unexpected inference input"):
        rows(entry, sent())


def test_of_an_unknown_signature_onnxruntime_decides() -> None:
    entry = Served(name="m", version="1", path="", generation="")
    assert rows(entry, sent("anything", "INT8", (3,))) == 1
    assert checks.check_outputs(Signature(entry), [RequestedOutput("any")]) == ["any"]
    with pytest.raises(RequestFailure, match="not valid"):
        rows(entry, sent(shape=(-3,)))


def test_outputs() -> None:
    signature = Signature(served())
    assert checks.check_outputs(signature, []) == ["y", "z"]
    assert checks.check_outputs(signature, [RequestedOutput("z"), RequestedOutput("y")]) == ["z", "y"]
    for outputs, words in (
        ([RequestedOutput("q")], "unexpected inference output 'q' for model 'm'"),
        ([RequestedOutput("y"), RequestedOutput("y")], "output 'y' already requested"),
        ([RequestedOutput("y", parameters={"classification": 3})], "classification"),
    ):
        with pytest.raises(RequestFailure, match=words) as caught:
            checks.check_outputs(signature, outputs)
        assert caught.value.http == 400
    assert checks.check_outputs(signature, [RequestedOutput("y", parameters={"classification": 0})]) == ["y"]


def test_parameters() -> None:
    assert checks.check_parameters({}) is None
    assert checks.check_parameters({"timeout": 0, "priority": 3, "mine": [1]}) is None
    assert checks.check_parameters({"timeout": 1500}) == 0.0015
    assert checks.check_parameters({"sequence_id": 0, "sequence_start": False, "sequence_end": ""}) is None
    for parameters in (
        {"sequence_id": 7}, {"sequence_id": "a"}, {"sequence_start": True}, {"sequence_end": True},
        {"timeout": -1}, {"timeout": "5"}, {"timeout": 1.5}, {"timeout": True}, {"timeout": 1 << 64},
        {"priority": -1}, {"priority": None},
    ):  # fmt: skip
        with pytest.raises(RequestFailure, match="parameter '") as caught:
            checks.check_parameters(parameters)
        assert caught.value.http == 400


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_an_input_of_unknown_rank_takes_any_shape(shape: tuple[int, ...]) -> None:
    entry = served(0, TensorInfo("x", "FP32", (), is_unranked=True))
    assert rows(entry, sent(shape=shape)) == 1


def test_the_batch_of_an_input_of_unknown_rank() -> None:
    entry = served(8, TensorInfo("x", "FP32", (), is_unranked=True))
    assert rows(entry, sent(shape=(3,))) == 3
    for shape, words in (((9, 2), "must be <= 8"), ((), "needs a first dimension")):
        with pytest.raises(RequestFailure, match=words) as caught:
            rows(entry, sent(shape=shape))
        assert caught.value.http == 400


def test_texts_are_bounded_by_their_shapes() -> None:
    unknown = Served(name="m", version="1", path="", generation="")
    half = MOST_TEXTS // 2
    for shapes in ([(2, half + 1)], [(half,), (half + 1,)], [(1 << 62, 1 << 62)]):
        with pytest.raises(RequestFailure, match="more than 4194304 texts") as caught:
            rows(unknown, *(sent(f"x{n}", "BYTES", shape) for n, shape in enumerate(shapes)))
        assert (caught.value.http, caught.value.grpc) == (413, "RESOURCE_EXHAUSTED")
    assert rows(unknown, sent("x", "BYTES", (half,)), sent("y", "BYTES", (half,))) == 1


def test_outputs_that_json_does_not_have_are_refused_before_the_run() -> None:
    signature = Signature(served())

    def check(*outputs: RequestedOutput, is_binary: bool) -> None:
        checks.check_forms(signature, InferRequest("m", "", "", [], list(outputs), {}, is_binary=is_binary))

    check(is_binary=True)
    for is_binary in (True, False):
        check(RequestedOutput("z", is_binary=True), is_binary=is_binary)
        check(RequestedOutput("z", RegionSlice("r", 0, 2)), is_binary=is_binary)
        check(RequestedOutput("y"), is_binary=is_binary)
        with pytest.raises(RequestFailure, match="'z' is BF16, which JSON does not have") as caught:
            check(RequestedOutput("z"), is_binary=is_binary)
        assert caught.value.http == 400
    with pytest.raises(RequestFailure, match="binary_data"):
        check(is_binary=False)
