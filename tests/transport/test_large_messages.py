"""Values and messages of any size between real processes, whose sockets all have the smallest buffers that
the kernel allows.  None of these calls came back when what is large went through the socket.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.contract.both import CPU, I64, STR, F, equal, identity, maps, model, node, sequence, tensor
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

SIZES = [1, 4_000, 300_000, 12 << 20]
TIMEOUT = 60.0
"""Seconds after which a call is ended that should have come back; most of 12 MB is copying."""


@pytest.fixture(params=["bell", "zmq"], scope="module")
def host(request: pytest.FixtureRequest) -> Iterator[ModelHost]:
    """One host for all tests of a kind of lane; each test has models and lanes of its own."""
    folders = [str(Path(__file__).parents[1] / "support" / "small_buffers"), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
        if request.param == "zmq":
            monkeypatch.setenv("ONNX_DL_LANE", "zmq")
        with ModelHost() as made:
            # The host keeps some threads and descriptors after its first use; tests count what they leave.
            InferenceSessionProxy(identity(F), providers=CPU, host=made).run(None, {"x": np.ones(2, "f")})
            eventually(lambda: not made.snapshot().models, "the end of the first model")
            yield made


Ask = Callable[..., Any]


@pytest.fixture
def ask(host: ModelHost) -> Ask:
    """Runs a model three times, the later ones without saying again what is known, beside onnxruntime."""

    def run(source: bytes, feed: dict[str, Any], outputs: Any = None) -> None:
        proxy = InferenceSessionProxy(source, providers=CPU, host=host)
        expected = onnxruntime.InferenceSession(source, providers=CPU).run(outputs, feed)
        for _ in range(3):
            equal(proxy.run(outputs, feed, timeout=TIMEOUT), expected)
        equal(proxy.run(outputs, feed), expected)

    return run


def expand() -> bytes:
    """A text x, n times."""
    return model([node("Expand", ["x", "n"], ["y"])], [tensor("x", STR, [1]), tensor("n", I64, [1])],
                 [tensor("y", STR, None)])  # fmt: skip


def with_property(value: str) -> bytes:
    return model([node("Identity", ["x"], ["y"])], [tensor("x")], [tensor("y")], properties={"k": value})


def zipmap() -> bytes:
    return model(
        [node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_strings=["a", "b", "c"])],
        [tensor("x", F, ["n", 3])],
        [maps("y", TensorProto.STRING)],
    )


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_one_text_in_and_out(ask: Ask, size: int):
    ask(identity(STR), {"x": np.array(["ü" * (size // 2), "x"], object)})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_many_texts_in_and_out(ask: Ask, size: int):
    ask(identity(STR), {"x": np.array(["x" * 100] * (size // 100), object)})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_texts_of_a_fixed_width(ask: Ask, size: int):
    ask(identity(STR), {"x": np.array(["x" * (size // 4)])})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_little_in_and_much_text_out(ask: Ask, size: int):
    ask(expand(), {"x": np.array(["x" * 1000], object), "n": np.int64([size // 1000])})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", [1, 4_000, 300_000, 5 << 20])
def test_maps_out(ask: Ask, size: int):
    ask(zipmap(), {"x": np.random.default_rng(0).random((size // 40 + 1, 3), np.float32)})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_sequences_in_and_out(host: ModelHost, size: int):
    source = model([node("Identity", ["x"], ["y"])], [sequence("x", STR)], [sequence("y", STR)])
    proxy = InferenceSessionProxy(source, providers=CPU, host=host)
    feed = [np.array(["x" * size], object), np.array([], object), np.array(["y"] * 3, object)]
    for _ in range(2):
        (got,) = proxy.run(None, {"x": feed}, timeout=TIMEOUT)
        equal(got, feed)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_options_and_errors(host: ModelHost, size: int):
    source = identity(F)
    proxy = InferenceSessionProxy(source, providers=CPU, host=host)
    local = onnxruntime.InferenceSession(source, providers=CPU)
    options, x = onnxruntime.RunOptions(), np.ones(2, np.float32)
    options.logid = "l" * size
    equal(proxy.run(None, {"x": x}, options), [x])
    for outputs, feed in ((["y" * size + "z"], {"x": x}), (None, {"x": x, "y" * size + "z": x})):
        with pytest.raises(Exception) as ours:
            proxy.run(outputs, feed)
        with pytest.raises(Exception) as theirs:
            local.run(outputs, feed)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))
    equal(proxy.run(None, {"x": x}), [x])


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_sparse_tensors_both_ways(host: ModelHost, size: int):
    count = max(1, size // 12)
    indices, values = np.arange(count), np.arange(1, count + 1, dtype=np.float32)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(values, "v"), numpy_helper.from_array(indices, "i"), [1, count]
    )
    ends = [
        helper.make_value_info(name, helper.make_sparse_tensor_type_proto(F, [1, count])) for name in "xy"
    ]
    give = model([node("Constant", [], ["y"], sparse_value=sparse)], [], ends[1:])
    (given,) = InferenceSessionProxy(give, providers=CPU, host=host).run(None, {}, timeout=TIMEOUT)
    assert np.array_equal(given.values(), values)
    takes = model(
        [node("SparseToDenseMatMul", ["x", "b"], ["z"], domain="com.microsoft")],
        [ends[0], tensor("b", F, [count, 1])],
        [tensor("z", F, [1, 1])],
    )
    places = np.stack([np.zeros_like(indices), indices], 1)
    fed = onnxruntime.SparseTensor.sparse_coo_from_numpy(
        np.array([1, count]), np.ones(count, np.float32), places, onnxruntime.OrtDevice.make("cpu", 0)
    )
    feed = {
        "x": onnxruntime.OrtValue.ort_value_from_sparse_tensor(fed),
        "b": onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((count, 1), np.float32)),
    }
    (z,) = InferenceSessionProxy(takes, providers=CPU, host=host).run_with_ort_values(None, feed)
    assert z.numpy().tolist() == [[count]]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", [1, 4_000, 300_000, 5 << 20])
def test_metadata(host: ModelHost, size: int):
    """It comes with the grant, over ZeroMQ, and not through a lane."""
    proxy = InferenceSessionProxy(with_property("v" * size), providers=CPU, host=host)
    assert proxy.get_modelmeta().custom_metadata_map == {"k": "v" * size}


@pytest.mark.timeout(200)
def test_a_hundred_results_and_inputs_of_their_own(host: ModelHost):
    """More blocks than one packet may announce: the rest is copied."""
    names = [f"x{index}" for index in range(150)]
    source = model(
        [node("Identity", [name], [f"y{name}"]) for name in names],
        [tensor(name, F, ["n"]) for name in names],
        [tensor(f"y{name}", F, ["n"]) for name in names],
    )
    proxy = InferenceSessionProxy(source, providers=CPU, host=host)
    inside = [proxy.empty(20_000) for _ in names]
    for turn in range(6):
        for index, array in enumerate(inside):
            array[:] = index + turn
        results = proxy.run(None, dict(zip(names, inside, strict=True)), timeout=TIMEOUT)
        assert [result[-1] for result in results] == [index + turn for index in range(150)]


@pytest.mark.timeout(200)
def test_a_group_of_many_models_given_as_bytes(host: ModelHost):
    """Their memory is named when the worker is started."""
    proxies = [
        InferenceSessionProxy(
            model(
                [node("Identity", ["x"], ["y"])], [tensor("x")], [tensor("y")], properties={"k": str(index)}
            ),
            providers=CPU,
            host=host,
            group="all",
        )
        for index in range(110)
    ]
    x = np.ones(2, np.float32)
    equal(proxies[0].run(None, {"x": x}), [x])
    assert proxies[-1].get_modelmeta().custom_metadata_map == {"k": "109"}


def test_buffers_are_the_smallest(host: ModelHost):
    """That the tests above test something: the worker's end of a lane would else wait for a reader."""
    proxy = InferenceSessionProxy(identity(F), providers=CPU, host=host)
    proxy.run(None, {"x": np.ones(2, np.float32)})
    pid = host.snapshot().models[0].pid
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (path,) = [entry for entry in environment if entry.startswith(b"PYTHONPATH=")]
    assert b"small_buffers" in path
