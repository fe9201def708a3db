"""Arrays that are not copied: built in shared memory, passed from model to model, kept in a pipeline."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnx_dl import ConfigError, InferenceSessionProxy, ModelHost, pipeline
from tests.support import page_models
from tests.support.waiting import worker_pid

CPU = ["CPUExecutionProvider"]
LARGE = 100_000


def make(path: Path, *nodes: onnx.NodeProto, inputs: str, outputs: str, kind: int = TensorProto.FLOAT) -> str:
    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["n"])

    graph = helper.make_graph(
        list(nodes), "g", [info(name) for name in inputs.split()], [info(name) for name in outputs.split()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return str(path)


@pytest.fixture
def double(tmp_path: Path) -> str:
    return make(tmp_path / "double.onnx", helper.make_node("Add", ["x", "x"], ["y"]), inputs="x", outputs="y")


@pytest.fixture
def negate(tmp_path: Path) -> str:
    return make(tmp_path / "negate.onnx", helper.make_node("Neg", ["y"], ["z"]), inputs="y", outputs="z")


def mapped_segments(pid: int | str) -> set[int]:
    """Inodes of our shared memory in a process's address space."""
    with open(f"/proc/{pid}/maps") as maps:
        return {int(line.split()[4]) for line in maps if "memfd:onnx-dl" in line}


def segment_of(array: np.ndarray) -> int:
    """The inode of the shared memory that an array lies in."""
    address = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(text, 16) for text in line.split()[0].split("-"))
            if start <= address < end:
                return int(line.split()[4]) if "memfd:onnx-dl" in line else 0
    return 0


def test_arrays_built_in_shared_memory_are_not_copied(host: ModelHost, double: str):
    proxy = InferenceSessionProxy(double, providers=CPU, host=host)
    x = proxy.empty((LARGE,))
    assert x.dtype == np.float32 and x.flags.writeable and x.flags.c_contiguous and x.ctypes.data % 64 == 0
    for value in range(5):
        x[:] = value
        (y,) = proxy.run(None, {"x": x})
        assert (y == 2 * value).all()
    assert segment_of(x) in mapped_segments(worker_pid(host))


def test_a_part_of_such_an_array_is_found_where_it_lies(host: ModelHost, double: str):
    proxy = InferenceSessionProxy(double, providers=CPU, host=host)
    x = proxy.empty((3, LARGE))
    x[:] = np.arange(3, dtype=np.float32)[:, None]
    for row in (1, 2, 0, 1):
        (y,) = proxy.run(None, {"x": x[row]})
        assert (y == 2 * row).all()
    assert (proxy.run(None, {"x": x[:, 7]})[0] == [0, 2, 4]).all()  # not contiguous: copied
    assert (proxy.run(None, {"x": x[1, ::-1]})[0] == 2).all()


@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 5), 7, (200, 300)])
@pytest.mark.parametrize("dtype", [np.float32, "int64", np.bool_, "<U3", "complex128"])
def test_empty_is_like_numpys(host: ModelHost, shape: int | tuple[int, ...], dtype: object):
    ours, theirs = host.empty(shape, dtype), np.empty(shape, dtype)
    assert (ours.shape, ours.dtype, ours.flags.c_contiguous) == (theirs.shape, theirs.dtype, True)
    ours[...] = np.zeros((), dtype)


def test_what_cannot_lie_in_shared_memory_is_refused(double: str, host: ModelHost):
    proxy = InferenceSessionProxy(double, host=host)
    with pytest.raises(TypeError, match=r"numpy\.empty"):
        proxy.empty((3,), object)
    with pytest.raises(ValueError, match="negative"):
        proxy.empty((-1, 100_000))


def test_memory_of_arrays_that_are_gone_is_used_again(host: ModelHost):
    first = host.empty((LARGE,))
    address = first.ctypes.data
    first = None
    gc.collect()
    assert host.empty((LARGE,)).ctypes.data == address


def test_an_output_of_one_model_is_the_input_of_another(host: ModelHost, double: str, negate: str):
    one = InferenceSessionProxy(double, providers=CPU, host=host)
    other = InferenceSessionProxy(negate, providers=CPU, host=host)
    for value in range(1, 6):
        (y,) = one.run(None, {"x": np.full(LARGE, value, np.float32)})
        (z,) = other.run(None, {"y": y})
        assert (z == -2 * value).all()
    pids = [status.pid for status in host.snapshot().models]
    assert len(pids) == 2
    assert all(segment_of(y) in mapped_segments(pid) for pid in pids if pid)


def test_more_results_than_descriptors_can_be_passed_on(host: ModelHost, double: str, negate: str):
    """Descriptors are kept for the latest only; older results are copied."""
    one = InferenceSessionProxy(double, providers=CPU, host=host)
    other = InferenceSessionProxy(negate, providers=CPU, host=host)
    kept = [one.run(None, {"x": np.full(LARGE // 4, value, np.float32)})[0] for value in range(80)]
    assert len(os.listdir("/proc/self/fd")) < 120
    for value, y in enumerate(kept):
        assert (other.run(None, {"y": y})[0] == -2 * value).all()


def test_an_output_outlives_its_worker_and_is_still_passed_on(host: ModelHost, double: str, negate: str):
    one = InferenceSessionProxy(double, providers=CPU, host=host)
    (y,) = one.run(None, {"x": np.ones(LARGE, np.float32)})
    one.unload()
    other = InferenceSessionProxy(negate, providers=CPU, host=host)
    assert (other.run(None, {"y": y})[0] == -2).all()


# --- pipelines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_pipeline_computes_what_its_stages_compute(host: ModelHost, double: str, negate: str, size: int):
    stages = [InferenceSessionProxy(path, providers=CPU, host=host) for path in (double, negate)]
    pipe = pipeline(*stages)
    assert [node.name for node in pipe.get_inputs()] == ["x"]
    assert [node.name for node in pipe.get_outputs()] == ["z"]
    for value in range(6):
        x = np.full(size, value, np.float32)
        (z,) = pipe.run(None, {"x": x})
        assert np.array_equal(z, -2 * x)


def test_the_intermediate_never_enters_the_application(host: ModelHost, double: str, negate: str):
    stages = [InferenceSessionProxy(path, providers=CPU, host=host) for path in (double, negate)]
    pipe = pipeline(*stages)
    for _ in range(4):
        pipe.run(None, {"x": np.ones(LARGE, np.float32)})
    first, second = (mapped_segments(status.pid or 0) for status in host.snapshot().models)
    between = (first & second) - mapped_segments("self")
    assert len(between) == 1, "one segment that both workers see and the application does not"


def test_a_stage_whose_results_cannot_be_passed_on_any_more(host: ModelHost, double: str, negate: str):
    """Only the blocks that were mapped last keep their descriptors: what lies in others is copied."""
    first, second, late = (
        InferenceSessionProxy(path, providers=CPU, host=host, latency=latency)
        for path, latency in ((double, "normal"), (negate, "normal"), (negate, "low"))
    )
    x, kept = np.arange(LARGE, dtype=np.float32), list[np.ndarray]()
    for last in (second, late, second, late):
        chain = pipeline(first, last)
        for _ in range(3):
            assert np.array_equal(chain.run(None, {"x": x})[0], -2 * x)
        kept += [host.empty((LARGE,)) for _ in range(70)]


def test_inputs_of_later_stages_and_named_connections(host: ModelHost, double: str, tmp_path: Path):
    add = make(
        tmp_path / "add.onnx", helper.make_node("Add", ["a", "b"], ["sum"]), inputs="a b", outputs="sum"
    )
    stages = [InferenceSessionProxy(path, providers=CPU, host=host) for path in (double, double, add)]
    pipe = pipeline(*stages, connect=[{"x": "y"}, {"a": "y"}])
    assert [node.name for node in pipe.get_inputs()] == ["x", "b"]
    (total,) = pipe.run(["sum"], {"x": np.ones(LARGE, np.float32), "b": np.full(LARGE, 0.5, np.float32)})
    assert (total == 4.5).all()


def test_text_between_stages(host: ModelHost, tmp_path: Path):
    text = [
        make(
            tmp_path / f"{name}.onnx",
            helper.make_node("Identity", [before], [after]),
            inputs=before,
            outputs=after,
            kind=TensorProto.STRING,
        )
        for name, before, after in (("a", "s", "t"), ("b", "t", "u"))
    ]
    pipe = pipeline(*[InferenceSessionProxy(path, providers=CPU, host=host) for path in text])
    assert pipe.run(None, {"s": np.array(["ä", "b"], object)})[0].tolist() == ["ä", "b"]


def test_errors_of_a_pipeline(host: ModelHost, double: str, negate: str):
    one, other = (InferenceSessionProxy(path, providers=CPU, host=host) for path in (double, negate))
    pipe = pipeline(one, other)
    x = np.ones(LARGE, np.float32)
    with pytest.raises(ValueError, match=r"Required inputs \(\['x'\]\) are missing"):
        pipe.run(None, {})
    with pytest.raises(ValueError, match="Invalid input name: w"):
        pipe.run(None, {"x": x, "w": x})
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        pipe.run(None, {"x": np.ones((2, 2), np.float32)})
    assert (pipe.run(None, {"x": x})[0] == -2).all()
    with pytest.raises(ConfigError, match="at least one"):
        pipeline()
    with pytest.raises(ConfigError, match="one mapping for each"):
        pipeline(one, other, connect=[])
    with pytest.raises(ConfigError, match=r"builtins\.list. Give the sessions one by one"):
        pipeline([one, other])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="names"):
        pipeline(one, other, connect={"y": "nothing"}).run(None, {"x": x})
    assert (pipeline(one, other, connect={"y": "y"}).run(None, {"x": x})[0] == -2).all()
    with pytest.raises(ConfigError, match="same host"):
        pipeline(one, InferenceSessionProxy(negate))


def test_a_pipeline_whose_names_do_not_match_says_what_to_write(host: ModelHost) -> None:
    detector, reader = host.open(page_models.detector()), host.open(page_models.reader())
    with pytest.raises(ConfigError, match=r"connect=\[{'x': 'boxes'}\].*\['x'\].*\['boxes', 'crops'\]"):
        pipeline(detector, reader).get_inputs()
    image = np.ones((1, 3, 64, 64), np.float32)
    (text,) = pipeline(detector, reader, connect={"x": "crops"}).run(None, {"image": image})
    assert text.tolist() == ["1"] * 4


def test_a_stage_that_is_unloaded_in_between_is_loaded_again(host: ModelHost, double: str, negate: str):
    stages = [InferenceSessionProxy(path, providers=CPU, host=host, ttl=0) for path in (double, negate)]
    pipe = pipeline(*stages)
    for value in range(3):
        assert (pipe.run(None, {"x": np.full(LARGE, value, np.float32)})[0] == -2 * value).all()
