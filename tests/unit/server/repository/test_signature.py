"""Signatures that are read from files, compared with onnxruntime's own."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.server.interfaces import TensorInfo
from onnx_dl.server.repository import signature
from onnx_dl.server.repository.signature import ModelSignature, Unservable
from tests.support import onnx_cases, zoo


def of_onnxruntime(path: Path) -> ModelSignature:
    """What a session says of the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=zoo.CPU)
    return signature.of_description(
        ModelDescription(
            inputs=[TensorSpec(each.name, each.type, each.shape) for each in session.get_inputs()],
            outputs=[TensorSpec(each.name, each.type, each.shape) for each in session.get_outputs()],
        )
    )


def comparable(found: ModelSignature, other: ModelSignature) -> list[object]:
    """Names, datatypes and shapes; no shape where one of the two does not know it."""
    pairs = zip(found.outputs + found.inputs, other.outputs + other.inputs, strict=False)
    unranked = {mine.name for mine, _ in pairs if mine.is_unranked}
    rows: list[object] = [
        (each.name, each.datatype, None if each.name in unranked else each.shape)
        for each in (*found.inputs, *found.outputs)
    ]
    return [*rows, sorted(found.problems)]


def difference(path: Path) -> str | None:
    """How the file's signature differs from the session's; None: it does not, or no session takes it."""
    try:
        wanted: ModelSignature | str = of_onnxruntime(path)
    except Unservable:
        wanted = "unservable"
    except Exception:
        return None
    try:
        found: ModelSignature | str = signature.read(str(path))
    except Unservable:
        found = "unservable"
    if isinstance(found, str) or isinstance(wanted, str):
        return None if found == wanted else f"{found} {wanted}"
    mine, theirs = comparable(found, wanted), comparable(wanted, found)
    unranked = {each.name for each in (*found.inputs, *found.outputs) if each.is_unranked}
    theirs = [
        (row[0], row[1], None) if isinstance(row, tuple) and row[0] in unranked else row for row in theirs
    ]
    return None if mine == theirs else f"{mine} {theirs}"


def test_all_models_of_the_zoo(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for name, kind in zoo.kinds().items():
        path.write_bytes(kind.data)
        assert difference(path) is None, name


def test_models_of_the_onnx_package(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    cases = onnx_cases.sample(100, 18)
    assert len(cases) >= 80
    for case in cases:
        path.write_bytes(case.blob)
        assert difference(path) is None, case.name


def write(path: Path, graph: onnx.GraphProto) -> str:
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return str(path)


def test_initializers_are_no_inputs_but_may_be_overridden(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [zoo.tensor("x", shape=["n", 3]), zoo.tensor("w", shape=[3])],
        [zoo.tensor("y", shape=["n", 3])],
        [numpy_helper.from_array(np.ones(3, np.float32), "w")],
    )
    found = signature.read(write(tmp_path / "m.onnx", graph))
    assert found.inputs == (TensorInfo("x", "FP32", (-1, 3)),)
    assert found.outputs == (TensorInfo("y", "FP32", (-1, 3)),)
    assert found.overridable == (TensorInfo("w", "FP32", (3,)),)


def test_a_shape_that_is_not_given_is_not_a_scalar(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["s"], ["t"])],
        "g",
        [zoo.tensor("x", shape=None), zoo.tensor("s", shape=[])],
        [zoo.tensor("y", shape=None), zoo.tensor("t", shape=[])],
    )
    first, second = signature.read(write(tmp_path / "m.onnx", graph)).inputs
    assert (first.shape, first.is_unranked) == ((), True)
    assert (second.shape, second.is_unranked) == ((), False)


def test_an_output_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    parts = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node("SequenceConstruct", ["x"], ["parts"]), helper.make_node("Neg", ["x"], ["y"])],
        "g",
        [zoo.tensor("x", shape=[2])],
        [parts, zoo.tensor("y", shape=[2])],
    )
    found = signature.read(write(tmp_path / "m.onnx", graph))
    assert found.outputs == (TensorInfo("y", "FP32", (2,)),)
    assert found.problems == {"parts": "its output 'parts' is a sequence: the protocol has tensors only"}


def test_gigabytes_of_weights_are_seeked_over(tmp_path: Path) -> None:
    """A sparse file: 3 GiB of zeros as raw_data of an initializer, in front of inputs and outputs."""
    path = tmp_path / "large.onnx"
    size = 3 << 30
    tensor = TensorProto(dims=[size], data_type=TensorProto.UINT8, name="w").SerializeToString()
    raw = b"\x4a" + varint(size)
    weights = b"\x2a" + varint(len(tensor) + len(raw) + size) + tensor + raw
    values = helper.make_graph(
        [], "g", [zoo.tensor("x", shape=[1])], [zoo.tensor("y", shape=[2])]
    ).SerializeToString()
    with path.open("wb") as file:
        file.write(b"\x08\x08\x3a" + varint(len(weights) + size + len(values)) + weights)
        file.seek(size, os.SEEK_CUR)
        file.write(values)
    began = time.thread_time()  # which does not pass while others have the processors
    found = signature.read(str(path))
    assert time.thread_time() - began < 0.5
    assert [each.name for each in (*found.inputs, *found.outputs)] == ["x", "y"]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"not a model at all", b"<html></html>", b"\xff" * 100, b"\x3a\x05abc", b"\x3a\x00"],
)
def test_a_file_that_is_no_model_is_refused_in_words(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(Unservable, match="it is not an ONNX model: "):
        signature.read(str(path))


def test_a_model_that_is_cut_off_is_refused_at_every_length(tmp_path: Path) -> None:
    data = zoo.layers(8)
    path = tmp_path / "m.onnx"
    whole_graph = 0
    for length in range(len(data)):
        path.write_bytes(data[:length])
        try:
            signature.read(str(path))
            whole_graph += 1
        except Unservable:
            pass
    assert whole_graph < 40, "only what is behind the graph may be missing"


def test_damaged_models_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(18)
    path = tmp_path / "m.onnx"
    blobs = [kind.data for kind in zoo.kinds().values() if len(kind.data) < 20_000]
    for _ in range(400):
        data = bytearray(blobs[rng.integers(len(blobs))])
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(Unservable):
            signature.read(str(path))


def test_a_fifo_and_a_folder_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "absent"):
        with pytest.raises(OSError):
            signature.read(str(path))
