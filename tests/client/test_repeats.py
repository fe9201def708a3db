"""Calls that repeat give the same each time, whatever is remembered.  And loading ahead, and tidying."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from onnx import TensorProto, helper

from onnx_dl import ConfigError, EventType, InferenceSessionProxy, ModelHost
from onnx_dl.client import connection, model_table
from onnx_dl.demo.assets import model_path
from tests.support.waiting import DEADLINE, allowed, eventually, wait_for, worker_pid

pytestmark = pytest.mark.slow

CPU = ["CPUExecutionProvider"]
FEED = {"pixels": np.zeros((1, 64), np.float32)}


def save(path: Path, nodes: list, inputs: dict[str, list], outputs: dict[str, tuple[int, list]]) -> str:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return str(path)


@pytest.fixture
def both(tmp_path: Path) -> str:
    """A sum of two inputs, and its first row."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("ReduceMax", ["sum"], ["top"], keepdims=1),
    ]
    floats = TensorProto.FLOAT
    return save(
        tmp_path / "both.onnx",
        nodes,
        {"a": ["n", "m"], "b": ["n", "m"]},
        {"sum": (floats, ["n", "m"]), "top": (floats, [1, 1])},
    )


@pytest.fixture
def nonzero(tmp_path: Path) -> str:
    """Where x is not zero: as many columns as there are."""
    return save(
        tmp_path / "nonzero.onnx",
        [helper.make_node("NonZero", ["x"], ["y"])],
        {"x": ["n"]},
        {"y": (TensorProto.INT64, [1, "found"])},
    )


@pytest.mark.parametrize("latency", ["auto", "normal", "low"])
@pytest.mark.parametrize("size", [(1, 16), (200, 300)])
def test_a_repeated_call_sees_new_bytes_each_time(
    host: ModelHost, both: str, latency: str, size: tuple[int, int]
):
    proxy = InferenceSessionProxy(both, providers=CPU, host=host, latency=latency)
    random = np.random.default_rng(0)
    kept = []
    for _ in range(12):
        a, b = random.standard_normal((2, *size), dtype=np.float32)
        total, top = proxy.run(None, {"a": a, "b": b})
        assert np.array_equal(total, a + b) and top[0, 0] == (a + b).max()
        kept.append((total, a + b))
        a[:] = 0  # the caller's own
    assert all(np.array_equal(total, expected) for total, expected in kept)


def test_results_are_the_callers_own(host: ModelHost, both: str):
    proxy = InferenceSessionProxy(both, providers=CPU, host=host)
    ones = np.ones((2, 8), np.float32)
    for _ in range(6):
        total, top = proxy.run(None, {"a": ones, "b": ones})
        assert (total == 2).all() and top == 2
        total[:] = 7
        top[:] = 7


def test_shapes_and_outputs_take_turns(host: ModelHost, both: str):
    """More of them than are remembered, small and large, so that blocks grow and are replaced."""
    proxy = InferenceSessionProxy(both, providers=CPU, host=host)
    random = np.random.default_rng(1)
    for turn in range(400):
        n, m = (1 + turn % 70, 4) if turn % 3 else (300, 100 + turn % 5)
        a, b = random.standard_normal((2, n, m), dtype=np.float32)
        names = [None, ["sum"], ["top"], ["top", "sum"]][turn % 4]
        results = dict(zip(names or ["sum", "top"], proxy.run(names, {"a": a, "b": b}), strict=True))
        if "sum" in results:
            assert np.array_equal(results["sum"], a + b)
        if "top" in results:
            assert results["top"][0, 0] == (a + b).max()


def test_inputs_change_places(host: ModelHost, both: str):
    """In shared memory, elsewhere, of which part: by turns."""
    proxy = InferenceSessionProxy(both, providers=CPU, host=host)
    shape = (300, 100)
    shared = [proxy.empty(shape) for _ in range(3)]
    for turn in range(120):
        a = shared[turn % 3] if turn % 4 else np.empty(shape, np.float32)
        b = shared[(turn + 1) % 3] if turn % 5 else np.empty(shape, np.float32)
        a[:], b[:] = turn, 1.5
        total, top = proxy.run(None, {"a": a, "b": b})
        assert (total == turn + 1.5).all() and top == turn + 1.5


@pytest.mark.parametrize("size", [100, 100_000])
def test_shapes_that_depend_on_data(
    host: ModelHost, nonzero: str, size: int, capfd: pytest.CaptureFixture[str]
):
    proxy = InferenceSessionProxy(nonzero, providers=CPU, host=host)
    x = np.zeros(size, np.float32)
    for found in (7, 7, 7, 7, 0, 3, 3, 3, size, size, size, size, 5, size, size):
        x[:] = 0
        x[:found] = 1
        (y,) = proxy.run(None, {"x": x})
        assert np.array_equal(y, np.arange(found)[None])
    host.close()
    assert capfd.readouterr().err == "", "onnxruntime had nothing to complain of"


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    """Two columns to a label, their name, and a ZipMap of both; text beside them to itself."""
    ml, text = "ai.onnx.ml", TensorProto.STRING
    nodes = [
        helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        helper.make_node(
            "LabelEncoder", ["label"], ["name"], domain=ml, keys_int64s=[0, 1], values_strings=["ä", "b"]
        ),
        helper.make_node("ZipMap", ["x"], ["maps"], domain=ml, classlabels_int64s=[0, 1]),
        helper.make_node("Identity", ["t"], ["u"]),
    ]
    kind = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    )
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", 2]), info("t", text, ["m"])],
        [
            info("label", TensorProto.INT64, ["n"]),
            info("name", text, ["n"]),
            helper.make_value_info("maps", helper.make_sequence_type_proto(kind)),
            info("u", text, ["m"]),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(ml, 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "classifier.onnx")
    return str(tmp_path / "classifier.onnx")


@pytest.mark.parametrize("latency", ["auto", "normal", "low"])
def test_text_and_maps_are_new_each_time(host: ModelHost, classifier: str, latency: str):
    """As many rows and as long texts as chance has it, numbers of every kind; results stay the caller's."""
    proxy = InferenceSessionProxy(classifier, providers=CPU, host=host, latency=latency)
    local = onnxruntime.InferenceSession(classifier, providers=CPU)
    random, kept = np.random.default_rng(3), []
    for turn in range(150):
        x = random.standard_normal((int(random.integers(1, 3)), 2), np.float32)
        x[0, 0] = [np.nan, -0.0, np.inf, 1e-45, 0.5][turn % 5]
        text = [
            "ü" * int(random.integers(1, 10) ** random.integers(5)) for _ in range(int(random.integers(3)))
        ]
        feed = {"x": x, "t": np.array(text, [object, "U"][turn % 2]) if text else np.array(text, object)}
        names = [None, ["maps"], ["u", "label"]][turn // 50]
        kept.append((proxy.run(names, feed), local.run(names, feed)))
    for ours, theirs in kept:
        assert repr(ours) == repr(theirs)
        assert [type(result) for result in ours] == [type(result) for result in theirs]


def test_a_call_that_fails_in_between(host: ModelHost, both: str):
    proxy = InferenceSessionProxy(both, providers=CPU, host=host)
    local = onnxruntime.InferenceSession(both, providers=CPU)
    good = np.ones((2, 8), np.float32)
    bad = {"a": good, "b": np.ones((2, 7), np.float32)}
    for _ in range(4):
        for _ in range(3):
            assert (proxy.run(None, {"a": good, "b": good})[0] == 2).all()
        with pytest.raises(Exception, match="7") as ours:
            proxy.run(None, bad)
        with pytest.raises(type(ours.value)):
            local.run(None, bad)
        with pytest.raises(ValueError, match="Required inputs"):
            proxy.run(None, {"a": good})


def test_many_threads_repeat_the_same_call(host: ModelHost, both: str):
    proxy = InferenceSessionProxy(both, providers=CPU, host=host)

    def work(seed: int) -> bool:
        a = np.full((3, 5), seed, np.float32)
        return all((proxy.run(["sum"], {"a": a, "b": a})[0] == 2 * seed).all() for _ in range(200))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_a_worker_that_died_between_calls_is_replaced(host: ModelHost, both: str):
    """It had not begun the call, so nobody sees an error."""
    proxy = InferenceSessionProxy(both, providers=CPU, host=host)
    ones = np.ones((2, 8), np.float32)
    for _ in range(3):
        proxy.run(None, {"a": ones, "b": ones})
    pid = worker_pid(host)
    os.kill(pid, signal.SIGKILL)
    # At once: whether the supervisor, the lane or the call itself notices first is for chance to decide.
    assert (proxy.run(None, {"a": ones, "b": ones})[0] == 2).all()
    assert worker_pid(host) != pid


def test_latency_is_one_of_three(both: str):
    with pytest.raises(ConfigError, match='"auto", "normal" and "low"'):
        InferenceSessionProxy(both, latency="fast")


def test_an_application_with_the_default_sigpipe_lives_on(tmp_path: Path):
    """Command-line tools set it, to end quietly when their reader is gone."""
    script = f"""
import os, signal, time
import numpy as np
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
from onnx_dl import InferenceSessionProxy, default_host
proxy = InferenceSessionProxy({str(model_path("digits"))!r})
feed = {{"pixels": np.zeros((1, 64), np.float32)}}
proxy.run(None, feed)
os.kill(default_host().snapshot().models[0].pid, 9)
while proxy._handle.served.worker.pool is not None: time.sleep(0.001)
proxy.run(None, feed)
print("lives")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "lives\n", "")


# --- idle lanes ------------------------------------------------------------------------------------------


def shared_bytes(pid: int | str) -> int:
    total = 0
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if "memfd:onnx-dl" in line:
                start, end = (int(text, 16) for text in line.split()[0].split("-"))
                total += end - start
    return total


@pytest.fixture
def tidy_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TIDY_EVERY", 0.1)
    monkeypatch.setattr(model_table, "TIDY_EVERY", 0.1)


def test_idle_lanes_give_their_memory_back(tidy_soon: None, host: ModelHost, both: str):
    proxy = InferenceSessionProxy(both, providers=CPU, host=host)
    large = np.ones((1000, 1000), np.float32)
    for _ in range(4):
        results = proxy.run(None, {"a": large, "b": large})
    pid = worker_pid(host)
    assert host.snapshot().models[0].usage.shared > 8e6
    del results
    gc.collect()
    eventually(lambda: shared_bytes(pid) < 1e6 and shared_bytes("self") < 1e6, "both ends have shrunk")
    assert host.snapshot().models[0].usage.shared < 1e6
    assert (proxy.run(None, {"a": large, "b": large})[0] == 2).all()


def test_a_held_result_stays_when_its_lane_shrinks(tidy_soon: None, host: ModelHost, both: str):
    proxy = InferenceSessionProxy(both, providers=CPU, host=host)
    large = np.ones((1000, 1000), np.float32)
    total, _ = proxy.run(None, {"a": large, "b": large})
    eventually(lambda: shared_bytes(worker_pid(host)) < 6e6, "what is not held has shrunk")
    assert (total == 2).all()
    total[:] = 3
    assert (proxy.run(None, {"a": large, "b": large})[0] == 2).all() and (total == 3).all()


def test_lanes_of_a_burst_are_closed(tidy_soon: None, host: ModelHost, both: str):
    proxy = InferenceSessionProxy(both, providers=CPU, host=host)
    ones = np.ones((300, 300), np.float32)
    barrier = threading.Barrier(8)

    def work(_: int) -> None:
        barrier.wait(allowed(DEADLINE))
        for _ in range(20):
            proxy.run(None, {"a": ones, "b": ones})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    worker = psutil.Process(worker_pid(host))
    threads = worker.num_threads()
    eventually(lambda: sum(map(len, proxy._handle.served.worker.pool.idle.values())) == 1, "one lane is left")
    if threads > worker.num_threads():  # as many as there were lanes at once, which the scheduler decides
        eventually(lambda: worker.num_threads() < threads, "their threads end")
    assert (proxy.run(None, {"a": ones, "b": ones})[0] == 2).all()


# --- loading ahead ---------------------------------------------------------------------------------------


def test_load_has_the_model_ready(host: ModelHost):
    proxy = InferenceSessionProxy(model_path("digits"), host=host)
    proxy.load()
    assert proxy.is_loaded
    pid = worker_pid(host)
    proxy.load()
    proxy.run(None, FEED)
    assert worker_pid(host) == pid


def test_aload_loads_side_by_side(host: ModelHost):
    proxies = [InferenceSessionProxy(model_path(name), host=host) for name in ("digits", "wine")]

    async def load() -> None:
        await asyncio.gather(*(proxy.aload() for proxy in proxies))

    asyncio.run(load())
    assert all(proxy.is_loaded for proxy in proxies)


def test_a_load_that_nobody_needed_ends_by_its_ttl(host: ModelHost):
    proxy = InferenceSessionProxy(model_path("digits"), ttl=0.2, host=host)
    with host.events() as events:
        proxy.load()
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"


def test_with_ttl_0_a_loaded_model_waits_for_its_first_call(host: ModelHost):
    proxy = InferenceSessionProxy(model_path("digits"), ttl=0, host=host)
    with host.events() as events:
        proxy.load()
        pid = worker_pid(host)
        proxy.run(None, FEED)
        assert wait_for(events, EventType.UNLOADED).pid == pid


def test_preload_loads_all_and_tells_how_far_it_is(host: ModelHost):
    proxies = [InferenceSessionProxy(model_path(name), host=host) for name in ("digits", "wine", "diabetes")]
    told = []
    host.preload(proxies, lambda proxy, ready, total: told.append((proxy, ready, total)))
    assert [(ready, total) for _, ready, total in told] == [(1, 3), (2, 3), (3, 3)]
    assert {id(proxy) for proxy, _, _ in told} == {id(proxy) for proxy in proxies}
    assert all(proxy.is_loaded for proxy in proxies)
    host.preload([])


def test_preload_says_what_did_not_load_and_loads_the_others(host: ModelHost, tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    good = InferenceSessionProxy(model_path("digits"), host=host)
    bad = InferenceSessionProxy(str(tmp_path / "bad.onnx"), host=host)
    with pytest.raises(ExceptionGroup, match="1 of 2 models did not load") as caught:
        host.preload([bad, good])
    (error,) = caught.value.exceptions
    assert type(error).__name__ == "InvalidProtobuf"
    assert "bad.onnx" in error.__notes__[0]
    assert good.is_loaded


def test_warm_up_starts_the_processes_in_the_background():
    script = """
import onnx_dl
onnx_dl.warm_up().join()
assert onnx_dl.default_host().snapshot().supervisor_pid
onnx_dl.warm_up()
print("warm")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "warm\n", "")
