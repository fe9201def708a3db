"""The life of a model in this process: loads, TTL, session(), unload(), events, failures."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as C

import onnx_dl
from onnx_dl import EventStream, EventType, ModelHost, ModelState, RunTimeout, UnloadTimeout, WorkerDied
from tests.inprocess.conftest import Open
from tests.support.slow import identity_model, spin_model
from tests.support.waiting import DEADLINE, allowed, eventually, wait_for

ONE = {"x": np.ones(1, np.float32)}
SQUARE = np.ones((64, 64), np.float32)
LONG, BRIEF = ({"x": SQUARE, "n": np.array(n, np.int64)} for n in (10**9, 1))


def until(events: EventStream, kind: EventType) -> list[str]:
    """What comes until an event of this kind."""
    found = []
    while not found or found[-1] != kind:
        found.append(events.get(allowed(DEADLINE)).type)
    return found


def running(proxy: onnx_dl.InferenceSessionProxy) -> bool:
    return any(status.busy for status in proxy._handle.host.snapshot().models)


def test_no_process_is_started_and_all_is_told(here: Open, host: ModelHost, path: str) -> None:
    with host.events() as events:
        proxy = here(path, ttl=-1, priority=3)
        assert not host.snapshot().models and not proxy.is_loaded
        assert np.array_equal(proxy.run(None, ONE)[0], ONE["x"])
        (status,) = host.snapshot().models
        assert (status.model, status.state, status.isolated) == (path, ModelState.READY, False)
        assert (status.pid, status.leases, status.loads, status.runs) == (os.getpid(), 1, 1, 1)
        assert (status.priority, status.ttl) == (3, -1)
        assert status.usage.pss >= os.path.getsize(path)
        assert host.snapshot().supervisor_pid is None and host.snapshot().memory_limit
        assert proxy.unload() and not proxy.unload()
        assert until(events, EventType.UNLOADED) == ["loading", "ready", "draining", "unloaded"]
        assert not proxy.is_loaded
        proxy.run(None, ONE)
        proxy.close()
        event = wait_for(events, EventType.UNLOADED)
        assert (event.reason, event.pid, event.isolated) == ("request", os.getpid(), False)


def test_blocks_nest_while_an_unload_waits_for_them(here: Open, path: str) -> None:
    """As with a worker: blocks join, in all threads, and calls in them go on."""
    proxy = here(path)
    results: list[float] = []

    def join() -> None:
        with proxy.session(timeout=allowed(DEADLINE)):
            results.append(proxy.run(None, ONE)[0][0])

    with proxy.session():
        with pytest.raises(UnloadTimeout):
            proxy.unload(timeout=0.01)
        join()
        other = threading.Thread(target=join)
        other.start()
        other.join(allowed(DEADLINE))
        assert proxy.run(None, ONE, timeout=allowed(DEADLINE))[0][0] == 1
        assert results == [1, 1]
    eventually(lambda: not proxy.is_loaded, "the unload")


def test_a_ttl_ends_it_and_a_session_block_holds_it(here: Open, host: ModelHost, path: str) -> None:
    with host.events() as events:
        proxy = here(path, ttl=0)
        with proxy.session():
            proxy.run(None, ONE)
            proxy.run(None, ONE)
            assert proxy.is_loaded
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"
        proxy.run(None, ONE)
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"
        proxy.ttl = -1
        proxy.run(None, ONE)
        proxy.ttl = 0.01  # counts from now on
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"
        assert np.array_equal(proxy.run(None, ONE)[0], ONE["x"])


def test_many_callers_with_a_ttl_of_0_all_get_results(here: Open) -> None:
    proxy, right = here(identity_model(), ttl=0), []

    def call() -> None:
        right.extend(np.array_equal(proxy.run(None, ONE)[0], ONE["x"]) for _ in range(5))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(allowed(DEADLINE * 4))
    assert right == [True] * 15


def test_two_threads_load_it_once(here: Open, host: ModelHost, path: str) -> None:
    proxies = [here(path), here(path)]
    threads = [threading.Thread(target=proxy.run, args=(None, ONE)) for proxy in (*proxies, proxies[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(allowed(DEADLINE))
    (status,) = host.snapshot().models
    assert (status.loads, status.leases, status.runs) == (1, 2, 3)


def test_unload_waits_for_calls_and_blocks(here: Open, host: ModelHost) -> None:
    proxy = here(spin_model())
    with proxy.session():
        proxy.run(None, BRIEF)
        with pytest.raises(onnx_dl.ReentrantUse, match=r"session\(\) block"):
            proxy.unload()
        with pytest.raises(UnloadTimeout):
            proxy.unload(timeout=0.01)
        proxy.run(None, BRIEF)  # the block still has it
    eventually(lambda: not proxy.is_loaded, "the unload after the block")
    ended: list[BaseException | None] = []

    def call() -> None:
        try:
            proxy.run(None, LONG)
        except WorkerDied as error:
            ended.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    eventually(lambda: running(proxy), "the call")
    with pytest.raises(UnloadTimeout):
        host.unload(proxy._handle.spec.name, timeout=0.01)
    assert proxy.unload(force=True)
    thread.join(allowed(DEADLINE))
    assert "unload(force=True)" in str(ended[0])
    proxy.run(None, BRIEF)


def test_a_call_with_a_timeout_ends(here: Open, host: ModelHost) -> None:
    proxy = here(spin_model())
    proxy.load()
    with pytest.raises(RunTimeout):
        proxy.run(None, LONG, timeout=0.05)
    options = onnxruntime.RunOptions()
    stop = threading.Timer(0.05, setattr, (options, "terminate", True))
    stop.start()
    with pytest.raises(C.Fail, match="terminate flag"):
        proxy.run(None, LONG, options)
    assert proxy.run(None, BRIEF, timeout=allowed(DEADLINE))[0].shape == (64, 64)


def test_a_failed_load_raises_onnxruntimes_error_and_backs_off(
    here: Open, host: ModelHost, tmp_path: Path, path: str
) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    bad, good = here(str(tmp_path / "bad.onnx")), here(path)
    with host.events() as events:
        for _ in range(3):
            with pytest.raises(C.InvalidProtobuf) as caught:
                bad.run(None, ONE)
            good.run(None, ONE)
        assert caught.value.retry_after > 0
        failed = wait_for(events, EventType.FAILED)
        assert "Protobuf parsing failed" in str(failed.detail)
    states = {status.model: status.state for status in host.snapshot().models}
    assert states == {str(tmp_path / "bad.onnx"): ModelState.FAILED, path: ModelState.READY}
    with pytest.raises(C.InvalidArgument):
        good.run(None, {"x": np.ones(1, np.float64)})
    assert np.array_equal(good.run(None, ONE)[0], ONE["x"])


def test_a_changed_file_is_loaded_anew(here: Open, path: str) -> None:
    first = here(path)
    first.run(None, ONE)
    Path(path).write_bytes(spin_model())
    assert [node.name for node in here(path).get_inputs()] == ["x", "n"]
    assert np.array_equal(first.run(None, ONE)[0], ONE["x"])


def test_unload_drops_the_session_also_while_an_error_is_kept(here: Open, path: str) -> None:
    proxy = here(path)
    with pytest.raises(C.InvalidArgument) as kept:
        proxy.run(None, {"x": np.ones(1, np.float64)})
    (session,) = [
        weakref.ref(found)
        for found in gc.get_objects()
        if type(found) is onnxruntime.InferenceSession and found._model_path == path
    ]
    proxy.unload()
    assert session() is None and kept.value


def test_results_are_the_callers_own(here: Open, path: str) -> None:
    proxy = here(path)
    given = np.zeros(1 << 16, np.float32)
    (result,) = proxy.run(None, {"x": given})
    proxy.unload()
    result += 1
    assert result.sum() == 1 << 16 and not given.any()
