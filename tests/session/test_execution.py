"""onnx-mlir's models in real workers: results, dtypes, signatures, TTL, crashes, leaks, what is refused."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

import onnx_dl
from onnx_dl import EngineError, EventType, ExecutionSession, ModelHost, RunTimeout, WorkerDied
from onnx_dl.system import installation
from tests.support.mlir import Compile, compiler
from tests.support.waiting import DEADLINE, allowed, is_gone, wait_for, worker_pid

pytestmark = pytest.mark.slow

SHORT, LONG = (3, 4), (300, 400)
"""Shapes whose results are copied out, and handed over as views."""
RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    return compiler(tmp_path_factory.mktemp("mlir"))


@pytest.fixture
def add(host: ModelHost, library: Compile) -> ExecutionSession:
    return ExecutionSession(library("add"), host=host)


# --- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", ["normal", "low"])
@pytest.mark.parametrize("shape", [SHORT, LONG, (0, 4)])
def test_results_equal_numpys_also_when_calls_repeat(
    module_host: ModelHost, library: Compile, shape: tuple[int, int], latency: str
) -> None:
    session = ExecutionSession(library("add"), host=module_host, latency=latency)
    kept = []
    for _ in range(6):
        a, b = floats(*shape), floats(*shape)
        (total,) = session.run([a, b])
        kept.append((total, a + b))
    for total, expected in kept:
        assert total.dtype == np.float32 and total.flags.writeable and total.flags.c_contiguous
        assert np.array_equal(total, expected)


def test_calls_over_zeromq_work_the_same(library: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_LANE", "zmq")
    with ModelHost() as host:
        session = ExecutionSession(library("add"), host=host, ttl=0)
        for shape in (SHORT, LONG, LONG):
            a, b = floats(*shape), floats(*shape)
            assert np.array_equal(session.run([a, b])[0], a + b)


def test_inputs_may_have_any_layout(add: ExecutionSession) -> None:
    a, b = floats(4, 6)[::-1, ::2], np.asfortranarray(floats(4, 3))
    b.flags.writeable = False
    assert np.array_equal(add.run((a, b))[0], a + b)


def test_inputs_may_lie_in_shared_memory_already(add: ExecutionSession) -> None:
    a, b = add.empty(LONG), add.empty(LONG)
    for turn in range(4):
        a[...], b[...] = turn, 1
        (total,) = add.run([a, b])
        assert (total == turn + 1).all()
        (total,) = add.run([total, b])
        assert (total == turn + 2).all()


def test_results_with_strides_of_their_own(host: ModelHost, library: Compile) -> None:
    session = ExecutionSession(library("transpose"), host=host)
    for shape in (SHORT, LONG, LONG, LONG, (1, 1), (0, 3)):
        x = floats(*shape)
        turned, same = session.run([x])
        assert turned.flags.c_contiguous
        assert np.array_equal(turned, x.T)
        assert np.array_equal(same, x)


DTYPES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 complex64 complex128"


@pytest.fixture
def identity(host: ModelHost, library: Compile) -> ExecutionSession:
    return ExecutionSession(library("identity"), host=host)


def test_every_dtype_of_the_abi_comes_back(identity: ExecutionSession) -> None:
    for dtype in DTYPES.split():
        for shape in ((), (7,), (2, 0, 3), LONG):
            x = RANDOM.integers(0, 2, shape).astype(dtype)
            (y,) = identity.run([x])
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            assert np.array_equal(y, x)


def test_a_returned_input_is_a_copy(identity: ExecutionSession) -> None:
    inputs = [floats(*LONG), floats(*SHORT)]
    results = [identity.run(inputs) for _ in range(3)]
    for array in inputs:
        array += 1
    results.append(identity.run(inputs))
    for large, small in results[:3]:
        assert np.array_equal(large + 1, inputs[0]) and np.array_equal(small + 1, inputs[1])


def test_a_model_may_take_and_give_nothing(host: ModelHost, library: Compile) -> None:
    session = ExecutionSession(library("nothing"), host=host)
    assert [session.run([]) for _ in range(3)] == [[], [], []]
    assert (session.input_signature(), session.output_signature()) == ("[ \n]", "[\n]")


# --- what a model says of itself ---------------------------------------------------------------------------


def test_signatures_are_the_librarys_own_text(add: ExecutionSession) -> None:
    assert add.input_signature() == (
        '[    { "type" : "f32" , "dims" : [-1 , "columns"] , "name" : "a" }\n'
        ' ,    { "type" : "f32" , "dims" : [-1 , "columns"] , "name" : "b" }\n\n]'
    )
    assert json.loads(add.output_signature()) == [{"type": "f32", "dims": [-1, "columns"], "name": "sum"}]
    assert add.entry_points() == ["run_main_graph"]
    described = add._handle.describe()
    assert [(spec.name, spec.type, spec.shape) for spec in described.inputs] == [
        ("a", "tensor(float)", [None, "columns"]),
        ("b", "tensor(float)", [None, "columns"]),
    ]
    assert [spec.name for spec in described.outputs] == ["sum"]
    assert described.details["input_signature"] == add.input_signature()
    assert described.details["output_signature"] == add.output_signature()


def test_a_signature_that_is_no_json_is_told_and_not_checked(identity: ExecutionSession) -> None:
    assert '"type" : bf16' in identity.input_signature()
    assert identity._handle.describe().inputs == []


def test_entry_points_share_a_worker(host: ModelHost, library: Compile) -> None:
    path, x, y = library("two_entries"), np.arange(3), np.array([1, 1, 5])
    plus = ExecutionSession(path, host=host, entry_point="run_add", eager=True)
    minus = ExecutionSession(path, host=host, entry_point="run_subtract")
    either = ExecutionSession(path, "", False, host=host)
    assert plus.entry_points() == ["run_add", "run_subtract"]
    for _ in range(3):
        assert np.array_equal(plus.run([x, y])[0], x + y)
        assert np.array_equal(minus.run([x, y])[0], x - y)
    assert '"from"' in minus.input_signature() and '"left"' in minus.output_signature()
    for method in (lambda: either.run([x, y]), either.input_signature):
        with pytest.raises(EngineError, match="no default entry point; it has: run_add, run_subtract"):
            method()
    with pytest.raises(EngineError, match="no entry point 'omTensorDestroy'; it has: run_add"):
        either.set_entry_point("omTensorDestroy")
    either.set_entry_point("run_subtract")
    assert np.array_equal(either.run([x, y])[0], x - y)
    assert len(host.snapshot().models) == 1
    with pytest.raises(EngineError, match="no entry point 'run_mul'"):
        ExecutionSession(path, host=host, entry_point="run_mul", eager=True)


@pytest.mark.parametrize("tag", ["", "net"])
def test_functions_may_carry_a_tag(host: ModelHost, library: Compile, tag: str) -> None:
    path = library("add", "-DTAG=_net", to="net" if not tag else "other")
    for name in (None, "run_main_graph", "run_main_graph_net"):
        session = ExecutionSession(path, tag, host=host, entry_point=name)
        assert np.array_equal(session.run([np.ones(SHORT, "f")] * 2)[0], np.full(SHORT, 2, "f"))
    with pytest.raises(EngineError, match="lacks omQueryEntryPoints"):
        ExecutionSession(path, "NONE", host=host, eager=True)


# --- as any other model ------------------------------------------------------------------------------------


def test_construction_loads_nothing_and_the_ttl_unloads(host: ModelHost, library: Compile) -> None:
    session = ExecutionSession(library("add"), ttl=0.05, host=host)
    assert not session.is_loaded and host.snapshot().supervisor_pid is None
    with host.events() as events:
        for _ in range(2):
            session.run([floats(*SHORT), floats(*SHORT)])
            ready, gone = wait_for(events, EventType.READY), wait_for(events, EventType.UNLOADED)
            assert (gone.pid, gone.reason, gone.model) == (ready.pid, "ttl", str(library("add")))
            assert is_gone(gone.pid or 0)


def test_ttl_0_loads_once_for_each_use(host: ModelHost, library: Compile) -> None:
    session = ExecutionSession(library("add"), ttl=0, host=host)
    with host.events() as events:
        for _ in range(2):
            session.run([floats(*SHORT), floats(*SHORT)])
            assert wait_for(events, EventType.UNLOADED).reason == "ttl"
        with session.session() as held:
            held.run([floats(*SHORT), floats(*SHORT)])
            pid = worker_pid(host)
            held.run([floats(*SHORT), floats(*SHORT)])
            assert worker_pid(host) == pid
        wait_for(events, EventType.UNLOADED)
    assert host.snapshot().seq == 3 * 4


def test_two_sessions_share_one_worker_and_unload_ends_it(host: ModelHost, library: Compile) -> None:
    path = library("add")
    one = ExecutionSession(path, host=host)
    two = ExecutionSession(os.path.relpath(path), host=host)
    for session in (one, two):
        session.run([floats(*SHORT), floats(*SHORT)])
    (status,) = host.snapshot().models
    assert status.leases == 2
    assert two.unload() is True
    assert is_gone(status.pid or 0) and not one.is_loaded
    one.close()
    two.run([floats(*SHORT), floats(*SHORT)])
    with pytest.raises(onnx_dl.ProxyClosedError):
        one.run([floats(*SHORT), floats(*SHORT)])


def test_a_relative_path_is_the_constructors(
    host: ModelHost, library: Compile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(library("add").parent)
    session = ExecutionSession("add.so", host=host)
    monkeypatch.chdir(tmp_path)
    session.run([floats(*SHORT), floats(*SHORT)])


def test_a_leak_is_given_back(host: ModelHost, library: Compile) -> None:
    session = ExecutionSession(library("leak"), host=host)
    mine = psutil.Process().memory_info().rss
    for _ in range(8):
        session.run([np.ones(1, np.float32)])
    (status,) = host.snapshot().models
    assert status.usage.private > 80e6
    with host.events() as events:
        session.unload()
        gone = wait_for(events, EventType.UNLOADED)
    assert gone.freed and gone.freed > 80e6
    assert is_gone(status.pid or 0)
    assert psutil.Process().memory_info().rss - mine < 20e6


def test_calls_leak_nothing(host: ModelHost, library: Compile) -> None:
    session = ExecutionSession(library("live"), host=host)
    good, bad = np.array(1), np.array(-1)
    for _ in range(20):
        assert session.run([good])[0] == 2, "what lives is the input and its list"
        with pytest.raises(EngineError):
            session.run([bad])


# --- crashes and time --------------------------------------------------------------------------------------


def test_a_crash_ends_the_worker_only(host: ModelHost, library: Compile, add: ExecutionSession) -> None:
    session = ExecutionSession(library("crash"), host=host)
    add.run([floats(*SHORT), floats(*SHORT)])
    assert session.run([np.zeros(1, np.float32)])[0] == 0
    with pytest.raises(WorkerDied, match="loads the model again") as caught:
        session.run([np.ones(1, np.float32)])
    assert (caught.value.signal, caught.value.reason) == (signal.SIGSEGV, "crash")
    assert is_gone(caught.value.pid)
    assert add.is_loaded
    assert session.run([np.zeros(1, np.float32)])[0] == 0


def test_runs_of_one_model_never_overlap(host: ModelHost, library: Compile) -> None:
    session = ExecutionSession(library("wait"), host=host)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: session.run([np.array(2)])[0], range(64)))
    assert set(map(int, results)) == {1}


def test_many_threads_get_their_own_results(add: ExecutionSession) -> None:
    def call(index: int) -> bool:
        a, b = np.full(LONG, index, np.float32), np.full(LONG, 1, np.float32)
        return all((add.run([a, b])[0] == index + 1).all() for _ in range(4))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(32)))


@pytest.mark.parametrize("repeated", [False, True])
def test_a_timeout_gives_the_caller_back_its_time(host: ModelHost, library: Compile, repeated: bool) -> None:
    session = ExecutionSession(library("wait"), host=host)
    for _ in range(3 if repeated else 1):
        session.run([np.array(0)])
    with pytest.raises(RunTimeout, match=r"longer than 0\.05 s .*unload\(force=True\)"):
        session.run([np.array(3_600_000)], timeout=0.05)
    with pytest.raises(RunTimeout):  # it waits for the first, which nothing can stop
        session.run([np.array(0)], timeout=0.05)
    assert session.unload(force=True)
    assert session.run([np.array(0)], timeout=allowed(DEADLINE))[0] == 1


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no compiled model here .*: '.*/model\.so'") as caught:
        ExecutionSession(tmp_path / "model.so")
    assert caught.value.filename == str(tmp_path / "model.so")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("not_a_model", (), "no compiled model: it lacks omQueryEntryPoints, omInputSignature, .*onnx-mlir"),
        ("no_entries", (), "has no entry points"),
        ("no_entries", ("-DPHANTOM",), "names run_phantom as an entry point, but has no such function"),
    ],
)
def test_libraries_that_are_no_models(
    host: ModelHost, library: Compile, name: str, flags: tuple[str, ...], message: str
) -> None:
    path = library(name, *flags, to="_".join((name, *flags)))
    with pytest.raises(EngineError, match=message) as caught:
        ExecutionSession(path, host=host, eager=True)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no library at all", b"\x7fELF" + bytes(60)])
def test_files_that_are_no_libraries(host: ModelHost, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(content)
    session = ExecutionSession(path, host=host)
    with pytest.raises(EngineError, match=r"cannot be loaded as a shared library: .*EmitLib") as caught:
        session.run([])
    assert isinstance(caught.value, RuntimeError)


def test_the_models_own_refusal_is_told(add: ExecutionSession, library: Compile) -> None:
    for _ in range(3):
        with pytest.raises(EngineError, match=r"run_main_graph of .*add\.so returned no results.*EINVAL"):
            add.run([floats(2, 3), floats(3, 2)])
    assert np.array_equal(add.run([np.ones(SHORT, "f"), np.ones(SHORT, "f")])[0], np.full(SHORT, 2, "f"))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], ValueError, r"takes 2 inputs \(a, b\), but was given 0"),
        ([floats(1, 2)] * 3, ValueError, "given 3"),
        (
            [floats(1, 2), floats(2)],
            ValueError,
            r"inputs\[1\] \(b\) is float32\[2\], but .* \[\?, 'columns'\]",
        ),
        (
            [floats(1, 2), np.ones((1, 2))],
            TypeError,
            r"inputs\[1\] \(b\) is float64\[1, 2\], .*tensor\(float\)",
        ),
        ([floats(1, 2), np.ones((1, 2), np.int32)], TypeError, "int32"),
    ],
)
def test_inputs_that_a_model_does_not_take(
    module_host: ModelHost,
    library: Compile,
    inputs: list,
    error: type[Exception],
    message: str,
    loaded: bool,
) -> None:
    session = ExecutionSession(library("add"), host=module_host)
    if loaded:
        session.load()
    with pytest.raises(error, match=message):
        session.run(inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.ones(2), r"list of numpy arrays, not numpy\.ndarray"),
        ({"a": 1}, "not dict"),
        ([1.5], r"inputs\[0\] is float; "),
        ([np.float32(1)], r"inputs\[0\] is numpy\.float32"),
        ([np.array(["a"], object)], "dtype object"),
        ([np.array(["a"])], "<U1"),
        ([np.ones(1, ">f4")], ">f4"),
        ([np.ones(1, np.longdouble)], "longdouble|float128"),
        ([np.zeros(1, "M8[s]")], "datetime64"),
    ],
)
def test_what_is_no_array_of_the_abi_never_leaves(
    add: ExecutionSession, host: ModelHost, inputs: object, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        add.run(inputs)  # type: ignore[arg-type]
    assert host.snapshot().supervisor_pid is None


def test_fixed_dimensions_are_checked_and_small_integers_are_kin(host: ModelHost, library: Compile) -> None:
    session = ExecutionSession(library("two_entries"), host=host, entry_point="run_add")
    with pytest.raises(ValueError, match=r"inputs\[1\] \(y\) is int64\[2\].* shape \[3\]"):
        session.run([np.arange(3), np.arange(2)])
    assert np.array_equal(session.run([np.arange(3, dtype=np.uint64), np.arange(3)])[0], [0, 2, 4])


def test_results_that_numpy_cannot_have(host: ModelHost, library: Compile) -> None:
    session = ExecutionSession(library("odd"), host=host)
    for number in (8, 16, 99):
        with pytest.raises(TypeError, match=f"OM_DATA_TYPE {number}, which numpy does not have"):
            session.run([np.array([number])])
    with pytest.raises(EngineError, match=r"shape \(1,\) without data"):
        session.run([np.array([-7])])
    for number, dtype in [(7, "int64")] * 3 + [(1, "float32")] * 3 + [(15, "complex128"), (9, "bool")]:
        assert session.run([np.array([number])])[0].dtype == dtype, "also where the last call's was another"


# --- onnxruntime -------------------------------------------------------------------------------------------


def test_onnxruntime_need_not_be_installed(
    add: ExecutionSession, monkeypatch: pytest.MonkeyPatch, host: ModelHost
) -> None:
    installation.check.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    add.run([floats(*SHORT), floats(*SHORT)])


def test_no_process_imports_onnxruntime(library: Compile, tmp_path: Path) -> None:
    """Not the application, and a worker does without, if the one that is installed cannot be imported."""
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('not this one')")
    code = (
        "import sys, numpy, onnx_dl\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"session = onnx_dl.ExecutionSession({str(library('add'))!r})\n"
        "assert (session.run([numpy.ones((1, 2), 'f')] * 2)[0] == 2).all()\n"
        "assert session.input_signature() and session.unload()\n"
        "assert not [name for name in sys.modules if name.startswith('onnxruntime')]\n"
        "try: onnx_dl.ExecutionSession('no.so')\n"
        "except FileNotFoundError: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
