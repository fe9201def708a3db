"""One suite for ``onnxruntime.InferenceSession`` and for the proxy: that is what drop-in means.

Each case is done by both; results are compared bit for bit, errors by class and message.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.demo.assets import load_samples, model_path

pytestmark = pytest.mark.slow

CPU = ["CPUExecutionProvider"]
DTYPES = {
    np.dtype(t): getattr(TensorProto, name)
    for t, name in {
        "?": "BOOL", "i1": "INT8", "i2": "INT16", "i4": "INT32", "i8": "INT64",
        "u1": "UINT8", "u2": "UINT16", "u4": "UINT32", "u8": "UINT64",
        "f2": "FLOAT16", "f4": "FLOAT", "f8": "DOUBLE",
    }.items()
}  # fmt: skip


def model(nodes: list, inputs: dict, outputs: dict, initializers: list | None = None) -> bytes:
    def infos(of: dict) -> list:
        return [helper.make_tensor_value_info(name, *kind) for name, kind in of.items()]

    graph = helper.make_graph(nodes, "contract", infos(inputs), infos(outputs), initializers or [])
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests"
    )
    helper.set_model_props(made, {"author": "us"})
    return made.SerializeToString()


def identity(kind: int, shape: list | None = None) -> bytes:
    node = helper.make_node("Identity", ["x"], ["y"])
    return model([node], {"x": (kind, shape)}, {"y": (kind, shape)})


def fixed() -> bytes:
    """Two inputs of fixed shape, two outputs, an initializer that a feed may override."""
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["sum", "w"], ["product"])]
    f = TensorProto.FLOAT
    weights = numpy_helper.from_array(np.full(3, 2, np.float32), "w")
    ends = {"a": (f, [2, 3]), "b": (f, ["N", 3]), "w": (f, [3])}
    return model(nodes, ends, {"sum": (f, [2, 3]), "product": (f, [2, 3])}, [weights])


@pytest.fixture
def host(module_host: ModelHost) -> ModelHost:
    """One for all: each test has its own models."""
    return module_host


class Both:
    """The same model as onnxruntime has it and as the proxy has it."""

    def __init__(self, source: Any, host: ModelHost, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("providers", CPU)
        self.real = onnxruntime.InferenceSession(source, *args, **kwargs)
        self.proxy = InferenceSessionProxy(source, *args, host=host, **kwargs)

    def run(self, outputs: Any, feed: Any, options: Any = None) -> list:
        """Runs both; returns the proxy's result, which is bit for bit the same, or raises its error, also."""
        return same(lambda s: s.run(outputs, feed, options), self.real, self.proxy)


def same(act: Callable[[Any], Any], real: Any, proxy: Any) -> Any:
    try:
        expected = act(real)
    except Exception as error:
        with pytest.raises(type(error)) as caught:
            act(proxy)
        assert type(caught.value) is type(error)
        assert plain(caught.value) == plain(error)
        raise Refused from None
    result = act(proxy)
    equal(result, expected)
    return result


class Refused(Exception):
    """Both refused, in the same words."""


def plain(error: Exception) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", str(error))


def equal(result: Any, expected: Any) -> None:
    assert type(result) is type(expected)
    if isinstance(expected, list):
        assert len(result) == len(expected)
        for pair in zip(result, expected, strict=True):
            equal(*pair)
    elif isinstance(expected, np.ndarray):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        if expected.dtype.kind == "O":
            assert result.tolist() == expected.tolist()
        else:
            assert result.tobytes() == expected.tobytes()
        assert result.flags.writeable and result.flags.c_contiguous
    else:
        assert result == expected


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_in_every_shape(dtype: np.dtype, host: ModelHost) -> None:
    both = Both(identity(DTYPES[dtype]), host)
    rng = np.random.default_rng(0)
    for shape in [(), (1,), (0,), (3, 0, 2), (2, 3), (1, 1, 2, 1, 2, 3), (40_000,)]:
        data = rng.integers(0, 2, shape).astype(dtype) if dtype.kind == "b" else rng.normal(0, 50, shape)
        both.run(None, {"x": np.asarray(data).astype(dtype)})


def odd_arrays() -> dict[str, np.ndarray]:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    unaligned = np.frombuffer(b"\0" + base.tobytes(), np.uint8)[1:].view(np.float32).reshape(4, 6)
    read_only = base.copy()
    read_only.flags.writeable = False
    return {
        "strided": base[::2, ::-1],
        "transposed": base.T,
        "Fortran": np.asfortranarray(base),
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "unaligned": unaligned,
        "read-only": read_only,
        "masked": np.ma.masked_array(base, base > 3),
        "big-endian": base.astype(">f4"),
        "double": base.astype(np.float64),
        "complex": base.astype(np.complex64),
        "datetime": np.array(["2026-11-21"], "M8[D]"),
        "text": np.array(["a", "b"]),
        "records": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    }


@pytest.mark.parametrize("kind", odd_arrays())
def test_arrays_that_are_odd(kind: str, host: ModelHost) -> None:
    both = Both(identity(TensorProto.FLOAT), host)
    refused = kind in ("double", "complex", "datetime", "text", "records")
    if refused:
        with pytest.raises(Refused):
            both.run(None, {"x": odd_arrays()[kind]})
    else:
        both.run(None, {"x": odd_arrays()[kind]})


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        [[1.0, 2.0], [3.0, 4.0]],
        [1, 2],
        [],
        1.0,
        np.float32(1),
        (1.0, 2.0),
        "text",
        b"bytes",
        None,
        {},
    ],
    ids=repr,
)
def test_values_that_are_no_arrays(value: Any, host: ModelHost) -> None:
    both = Both(identity(TensorProto.FLOAT), host)
    try:
        both.run(None, {"x": value})
    except Refused:
        assert repr(value) != "[1.0, 2.0]"
    both.run(None, {"x": np.ones(2, np.float32)})


@pytest.mark.parametrize(
    "array",
    [
        np.array(["ä", "", "long " * 50]),
        np.array([b"bytes", b"x"], "S6"),  # of one that fills its width, onnxruntime reads on
        np.array([["a", 1], [None, 2.5]], object),
        np.array("scalar", object),
        np.array([], object),
        np.array([b"\xff"]),
        np.array(["x" * 200_000], object),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_text(array: np.ndarray, host: ModelHost) -> None:
    both = Both(identity(TensorProto.STRING), host)
    if array.tolist() == [b"\xff"]:
        with pytest.raises(Refused):
            both.run(None, {"x": array})
    else:
        both.run(None, {"x": array})


@pytest.mark.parametrize("nbytes", [65_532, 65_536, 65_540, 8 << 20])
def test_results_are_the_callers_own(nbytes: int, host: ModelHost) -> None:
    both = Both(identity(TensorProto.FLOAT), host)
    data = np.arange(nbytes // 4, dtype=np.float32)
    first, second = (both.run(None, {"x": data + i})[0] for i in range(2))
    first += 7
    third = both.run(None, {"x": data + 2})[0]
    for i, (result, more) in enumerate([(first, 7), (second, 0), (third, 0)]):
        assert np.array_equal(result, data + i + more)
    assert first.ctypes.data % 64 == 0 or nbytes < 65_536
    both.proxy.close()
    assert np.array_equal(second, data + 1)


def test_results_whose_shape_depends_on_the_data(host: ModelHost) -> None:
    """The worker computes repeated shapes in place; these repeat, and then do not."""
    f, i = TensorProto.FLOAT, TensorProto.INT64
    nodes = [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Abs", ["x"], ["y"])]
    source = model(nodes, {"x": (f, ["N"])}, {"where": (i, [1, "M"]), "y": (f, ["N"])})
    both = Both(source, host)
    data = np.ones(50_000, np.float32)
    for zeros in (0, 0, 0, 10, 0, 49_999, 0, 0):
        data[:zeros], data[zeros:] = 0, 1
        kept = both.run(None, {"x": data})
        both.run(["y"], {"x": -data})
    assert kept[1].sum() == 50_000


def test_one_of_several_large_results_may_be_kept(host: ModelHost) -> None:
    f = TensorProto.FLOAT
    nodes = [helper.make_node("Abs", ["x"], ["a"]), helper.make_node("Neg", ["x"], ["b"])]
    both = Both(model(nodes, {"x": (f, ["N"])}, {"a": (f, ["N"]), "b": (f, ["N"])}), host)
    kept = [both.run(None, {"x": np.full(20_000, i, np.float32)})[i % 2] for i in range(8)]
    assert [array[0] for array in kept] == [0, -1, 2, -3, 4, -5, 6, -7]
    assert [array[-1] for array in kept] == [0, -1, 2, -3, 4, -5, 6, -7]


def test_an_ortvalue_of_numbers(host: ModelHost) -> None:
    both = Both(identity(TensorProto.FLOAT), host)
    both.run(None, {"x": onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((2, 3), np.float32))})
    narrow = onnxruntime.OrtValue.ortvalue_from_shape_and_type([2], TensorProto.BFLOAT16)
    with pytest.raises(Refused):
        both.run(None, {"x": narrow})


def test_real_models(host: ModelHost) -> None:
    for name, samples in load_samples().items():
        both = Both(str(model_path(name)), host)
        both.run(None, {samples.input_name: samples.inputs})
        both.run(None, {samples.input_name: samples.inputs[:1]})


# --- names -------------------------------------------------------------------------------------------------

A, B = np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)


@pytest.mark.parametrize(
    "outputs",
    [None, [], (), "", ["product"], ["product", "sum"], ["sum", "sum"], ("sum",), "sum", ["nope"], [1], 5],
    ids=repr,
)
def test_output_names(outputs: Any, host: ModelHost) -> None:
    both = Both(fixed(), host)
    try:
        both.run(outputs, {"a": A, "b": B})
    except Refused:
        assert outputs in ("sum", ["nope"], [1], 5)


FEEDS: dict[str, Any] = {
    "missing": {"a": A},
    "extra": {"a": A, "b": B, "z": A},
    "wrong name": {"a": A, "z": B},
    "none": None,
    "list": [A, B],
    "empty": {},
    "rank": {"a": A[0], "b": B},
    "dimension": {"a": np.ones((2, 4), np.float32), "b": B},
    "number as name": {"a": A, "b": B, 3: A},
    "no kernel for these shapes": {"a": A, "b": np.ones((3, 3), np.float32)},
}


@pytest.mark.parametrize("kind", FEEDS)
def test_feeds_that_are_refused(kind: str, host: ModelHost, capfd: pytest.CaptureFixture[str]) -> None:
    both = Both(fixed(), host)
    with pytest.raises(Refused):
        both.run(None, FEEDS[kind])
    both.run(None, {"a": A, "b": B})


def test_an_initializer_may_be_overridden(host: ModelHost) -> None:
    both = Both(fixed(), host)
    both.run(None, {"a": A, "b": B, "w": np.zeros(3, np.float32)})


# --- the model ---------------------------------------------------------------------------------------------


def test_forms_of_the_constructor(host: ModelHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(fixed())
    monkeypatch.chdir(tmp_path)
    options = onnxruntime.SessionOptions()
    proxies = [
        InferenceSessionProxy("m.onnx", host=host),
        InferenceSessionProxy(Path("m.onnx"), options, CPU, 60, host=host),
        InferenceSessionProxy("m.onnx", options, CPU, [{}], host=host),
        InferenceSessionProxy("m.onnx", None, CPU, None, host=host),
        InferenceSessionProxy("m.onnx", sess_options=options, providers=tuple(CPU), host=host),
        InferenceSessionProxy(path_or_bytes=fixed(), providers=CPU, provider_options=[{}], host=host),
        InferenceSessionProxy(model_path="m.onnx", unknown=1, ttl="5m", host=host),
        InferenceSessionProxy("m.onnx", providers=[("CPUExecutionProvider", {})], host=host),
    ]
    for proxy in proxies:
        assert proxy.run(["sum"], {"a": A, "b": B})[0].tolist() == [[2, 2, 2]] * 2
    assert [proxy.ttl for proxy in proxies] == [-1, 60, -1, -1, -1, -1, 300, -1]


def constructed(source: Any) -> Callable[[Any], Any]:
    def act(cls: Any) -> Any:
        session = cls(source, providers=CPU)
        return session.run(None, {}) and None  # where the proxy first looks into the file

    return act


@pytest.mark.parametrize(
    "kind", ["missing", "garbage", "empty", "empty bytes", "None", "bytearray", "folder"]
)
def test_models_that_are_refused(kind: str, host: ModelHost, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    source: Any = {"empty bytes": b"", "None": None, "bytearray": bytearray(b"x"), "folder": tmp_path}.get(
        kind
    )
    if kind in ("missing", "garbage", "empty"):
        source = str(path)
    if kind in ("garbage", "empty"):
        path.write_bytes(b"no model" if kind == "garbage" else b"")
    with pytest.raises(Refused):
        same(
            constructed(source),
            onnxruntime.InferenceSession,
            functools.partial(InferenceSessionProxy, host=host),
        )
    if kind in ("missing", "None", "bytearray"):
        with pytest.raises((TypeError, onnxruntime.capi.onnxruntime_pybind11_state.NoSuchFile)):
            InferenceSessionProxy(source)


def test_isinstance(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(fixed(), host=host)
    assert isinstance(proxy, onnxruntime.InferenceSession)
    assert isinstance(proxy, InferenceSessionProxy)
    assert not isinstance(proxy, onnxruntime.SessionOptions)


# --- metadata ----------------------------------------------------------------------------------------------


def test_metadata(host: ModelHost) -> None:
    for source in (fixed(), identity(TensorProto.FLOAT, ["N", None, 3]), str(model_path("wine"))):
        both = Both(source, host)
        for name in ("get_inputs", "get_outputs", "get_overridable_initializers"):
            ours, theirs = getattr(both.proxy, name)(), getattr(both.real, name)()
            assert [str(node) for node in ours] == [str(node) for node in theirs]
            assert [(n.name, n.type, n.shape) for n in ours] == [(n.name, n.type, n.shape) for n in theirs]
            assert getattr(both.proxy, name)() is ours
        meta, expected = both.proxy.get_modelmeta(), both.real.get_modelmeta()
        for field in ("custom_metadata_map", "description", "domain", "graph_description", "graph_name"):
            assert getattr(meta, field) == getattr(expected, field)
        assert (meta.producer_name, meta.version) == (expected.producer_name, expected.version)
        assert both.proxy.get_providers() == both.real.get_providers()
        assert both.proxy.get_provider_options() == both.real.get_provider_options()


def test_options_travel(host: ModelHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 3
    options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = "optimized.onnx"
    options.enable_profiling = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    proxy = InferenceSessionProxy(fixed(), options, CPU, host=host)
    proxy.run(None, {"a": A, "b": B})
    assert (tmp_path / "optimized.onnx").exists()
    found = proxy.get_session_options()
    assert type(found) is onnxruntime.SessionOptions
    for name in ("intra_op_num_threads", "execution_mode", "graph_optimization_level", "enable_profiling"):
        assert getattr(found, name) == getattr(options, name)
    assert found.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    profile = proxy.end_profiling()
    assert profile.startswith("onnxruntime_profile_")
    assert (tmp_path / profile).exists()


def test_a_profile_is_written_when_the_model_unloads(
    host: ModelHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    proxy = InferenceSessionProxy(fixed(), options, CPU, host=host)
    proxy.run(None, {"a": A, "b": B})
    proxy.unload()
    (profile,) = tmp_path.glob("onnxruntime_profile_*.json")
    assert "Add" in profile.read_text()


def test_run_options_travel(host: ModelHost) -> None:
    both = Both(fixed(), host)
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    both.run(["sum"], {"a": A, "b": B}, options)
    options.terminate = True
    with pytest.raises(Refused):
        both.run(["sum"], {"a": A, "b": B}, options)
    with pytest.raises(AttributeError):
        InferenceSessionProxy(fixed(), {}, CPU, host=host)  # type: ignore[arg-type]
