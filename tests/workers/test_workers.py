"""Workers with real processes and real kills: calls, TTL, blocks, unload, crashes, events."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import onnx_dl
from onnx_dl import EventStream, EventType, InferenceSessionProxy, ModelHost, WorkerDied
from onnx_dl.demo.assets import model_path
from tests.support.slow import RUNS, identity_model, spin_model
from tests.support.waiting import DEADLINE, allowed, eventually, is_gone, template_of, wait_for, worker_pid

FEED = {"pixels": np.linspace(0, 16, 128, dtype=np.float32).reshape(2, 64)}
FOREVER, BRIEF = np.array(10**9), np.array(1)


@pytest.fixture
def digits(host: ModelHost) -> InferenceSessionProxy:
    return InferenceSessionProxy(model_path("digits"), host=host)


class Spinner:
    """A model whose call lasts for as many turns as it is fed."""

    def __init__(self, host: ModelHost) -> None:
        self.proxy = InferenceSessionProxy(spin_model(), host=host)
        self._pool = concurrent.futures.ThreadPoolExecutor(4)
        self.start = np.zeros((64, 64), np.float32)

    def run(self, turns: np.ndarray = BRIEF) -> list[np.ndarray]:
        return self.proxy.run(None, {"x": self.start, "n": turns})

    def begin(self, turns: np.ndarray = FOREVER) -> concurrent.futures.Future:
        """A call in another thread, under way when this returns."""
        before = self._cpu_seconds()
        future = self._pool.submit(self.run, turns)
        eventually(lambda: self._cpu_seconds() > before + RUNS or future.done(), "the call runs")
        return future

    def _cpu_seconds(self) -> float:
        return sum(psutil.Process(worker_pid(self.proxy._handle.host)).cpu_times()[:2])


@pytest.fixture
def spinner(host: ModelHost) -> Iterator[Spinner]:
    spinner = Spinner(host)
    spinner.run()
    yield spinner
    host.close()
    spinner._pool.shutdown()


# --- loading -----------------------------------------------------------------------------------------------


def test_construction_loads_nothing_and_starts_nothing(
    digits: InferenceSessionProxy, host: ModelHost
) -> None:
    assert not digits.is_loaded
    assert host.snapshot().supervisor_pid is None


def test_a_cold_burst_of_32_threads_loads_once(host: ModelHost) -> None:
    proxies = [InferenceSessionProxy(model_path("digits"), host=host) for _ in range(2)]
    with host.events() as events, concurrent.futures.ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda i: proxies[i % 2].run(None, FEED), range(32)))
        assert all(np.array_equal(result[1], results[0][1]) for result in results)
        proxies[0].unload()
        wait_for(events, EventType.UNLOADED)
    assert [event.type for event in events] == []
    assert host.snapshot().seq == 4  # loading, ready, draining, unloaded


def test_workers_are_forked_from_the_template(digits: InferenceSessionProxy, host: ModelHost) -> None:
    digits.run(None, FEED)
    worker, template = psutil.Process(worker_pid(host)), template_of(host)
    assert "digits.onnx" in worker.cmdline()[0] and "template" in template.cmdline()[0]  # titles
    assert worker.ppid() == template.ppid() == host.snapshot().supervisor_pid


def test_workers_that_are_not_forked_work_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_START", "exec")
    with ModelHost() as host:
        first, second = (InferenceSessionProxy(model_path(n), host=host) for n in ("digits", "diabetes"))
        expected = first.run(None, FEED)[1]
        second.run(None, {"measurements": np.zeros((1, 10), np.float32)})
        assert psutil.Process(worker_pid_of(host, first)).ppid() == host.snapshot().supervisor_pid
        first.unload()
        assert np.array_equal(first.run(None, FEED)[1], expected)


def test_calls_over_zeromq_work_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_LANE", "zmq")
    data = np.arange(1 << 18, dtype=np.float32)
    with ModelHost() as host:
        for ttl in (-1, 0):
            proxy = InferenceSessionProxy(identity_model(), ttl=ttl, host=host)
            for i in range(3):
                assert np.array_equal(proxy.run(None, {"x": data + i})[0], data + i)
            proxy.close()


def worker_pid_of(host: ModelHost, proxy: InferenceSessionProxy) -> int:
    (pid,) = [s.pid for s in host.snapshot().models if s.key == proxy._handle.spec.key]
    assert pid is not None
    return pid


def test_options_and_providers_tell_models_apart(host: ModelHost) -> None:
    path = model_path("digits")
    one = InferenceSessionProxy(path, providers=["CPUExecutionProvider"], host=host)
    two = InferenceSessionProxy(path, providers=[("CPUExecutionProvider", {})], host=host)
    for proxy in (one, two):
        proxy.run(None, FEED)
    assert len({status.pid for status in host.snapshot().models}) == 2


def test_a_replaced_file_is_another_model(host: ModelHost, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model_path("digits").read_bytes())
    old = InferenceSessionProxy(path, host=host)
    assert [i.name for i in old.get_inputs()] == ["pixels"]
    replacement = tmp_path / "new.onnx"
    replacement.write_bytes(model_path("diabetes").read_bytes())
    replacement.replace(path)
    assert [i.name for i in InferenceSessionProxy(path, host=host).get_inputs()] == ["measurements"]
    assert old.run(None, FEED)[0].shape == (2,)


def test_the_same_bytes_with_other_options_outlive_the_first_proxy(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(identity_model(), host=host)
    for providers in (["CPUExecutionProvider"], [("CPUExecutionProvider", {})]):
        proxy = InferenceSessionProxy(identity_model(), providers=providers, host=host)
        gc.collect()
        assert proxy.run(None, {"x": np.ones(1, np.float32)})[0] == 1


# --- concurrency -------------------------------------------------------------------------------------------


def test_a_slow_call_delays_no_other(spinner: Spinner) -> None:
    slow = spinner.begin()
    spinner.run()
    assert not slow.done()
    spinner.proxy.unload(force=True)
    with pytest.raises(WorkerDied):
        slow.result(allowed(DEADLINE))


# --- TTL ---------------------------------------------------------------------------------------------------


def test_ttl_0_unloads_after_each_use(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(model_path("digits"), ttl=0, host=host)
    expected = None
    with host.events() as events:
        for _ in range(3):
            result = proxy.run(None, FEED)[1]
            assert expected is None or np.array_equal(result, expected)
            expected = result
            gone = wait_for(events, EventType.UNLOADED)
            assert gone.reason == "ttl"
            assert is_gone(gone.pid or 0)


def test_ttl_0_counts_metadata_as_a_use(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(model_path("digits"), ttl=0, host=host)
    with host.events() as events:
        assert proxy.get_inputs()[0].name == "pixels"
        wait_for(events, EventType.UNLOADED)
        seq = host.snapshot().seq
        assert proxy.get_outputs()[0].name == "label"
        assert proxy.get_providers() == ["CPUExecutionProvider"]
        assert host.snapshot().seq == seq, "metadata that is known loads nothing"


def stays(events: EventStream, use: Callable[[], object], pause: float, count: int, least: float) -> bool:
    """Uses a model so many times, with pauses that are shorter than its TTL; whether it was loaded all the
    time, and then ended.  It may not be where this process was held up.

    It never ends before it has been unused for ``least`` seconds.
    """
    began, ended = [], []
    for _ in range(count):
        began.append(time.time())
        use()
        ended.append(time.time())
        with contextlib.suppress(TimeoutError):
            while (event := events.get(pause)).type != EventType.DRAINING:
                pass
            break
    else:
        event = wait_for(events, EventType.DRAINING)
    before = [first for first, last in zip(began, ended, strict=True) if last <= event.at]
    assert not before or event.at - before[-1] >= least
    return len(before) == count


def test_a_ttl_runs_from_the_last_use(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(model_path("digits"), ttl=0.4, host=host)
    with host.events() as events:
        eventually(lambda: stays(events, lambda: proxy.run(None, FEED), 0.2, 3, 0.39), "short pauses")


def test_metadata_keeps_a_loaded_model_alive_without_a_message(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(model_path("digits"), ttl=1, host=host)

    def stays_loaded() -> bool:
        proxy.run(None, FEED)
        return stays(events, proxy.get_inputs, 0.05, 44, 0.9)

    with host.events() as events:
        eventually(stays_loaded, "short pauses")


def test_status_is_no_use(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(model_path("digits"), ttl=0.3, host=host)
    with host.events() as events:
        proxy.run(None, FEED)
        eventually(
            lambda: not proxy.is_loaded and host.snapshot() is not None, "it unloads while it is watched"
        )
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"


def test_a_ttl_can_be_changed_live(digits: InferenceSessionProxy, host: ModelHost) -> None:
    with host.events() as events:
        digits.run(None, FEED)
        digits.ttl = "50ms"
        assert digits.ttl == 0.05
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"
    with pytest.raises(ValueError, match="three modes"):
        digits.ttl = -2


def test_the_longest_ttl_counts(digits: InferenceSessionProxy, host: ModelHost) -> None:
    brief = InferenceSessionProxy(model_path("digits"), ttl=0, host=host)
    digits.run(None, FEED)
    brief.run(None, FEED)
    assert digits.is_loaded
    with host.events() as events:
        digits.close()
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"


# --- blocks ------------------------------------------------------------------------------------------------


def test_a_block_holds_the_model_and_the_ttl_starts_after_the_last(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(model_path("digits"), ttl=0, host=host)
    with host.events() as events:
        with contextlib.suppress(KeyError), proxy.session() as outer, outer.session() as inner:
            inner.run(None, FEED)
            inner.run(None, FEED)
            pid = worker_pid(host)
            raise KeyError
        gone = wait_for(events, EventType.UNLOADED)
        assert (gone.pid, gone.reason) == (pid, "ttl")


def test_unload_waits_for_blocks_and_calls_inside_go_on(host: ModelHost) -> None:
    proxy, other = (InferenceSessionProxy(model_path("digits"), host=host) for _ in range(2))
    with host.events() as events, concurrent.futures.ThreadPoolExecutor(1) as pool:
        with proxy.session():
            unloading = pool.submit(proxy.unload)
            wait_for(events, EventType.DRAINING)
            pid = worker_pid(host)
            proxy.run(None, FEED)
            other.run(None, FEED)
            assert worker_pid(host) == pid
            assert not unloading.done()
        assert unloading.result(allowed(DEADLINE)) is True


def test_a_block_survives_a_crash(digits: InferenceSessionProxy, host: ModelHost) -> None:
    with host.events() as events:
        with digits.session():
            os.kill(worker_pid(host), signal.SIGKILL)
            wait_for(events, EventType.UNLOADED)
            digits.ttl = 0
            digits.run(None, FEED)
            pid = worker_pid(host)
            digits.run(None, FEED)
            assert worker_pid(host) == pid
        wait_for(events, EventType.UNLOADED)


# --- unload ------------------------------------------------------------------------------------------------


def test_a_proxy_that_the_garbage_collector_finds_ends_its_worker(host: ModelHost) -> None:
    """A cycle holds it, as the traceback of a caught exception does; the model is found in the same step."""
    cycle = [InferenceSessionProxy(model_path("digits"), host=host)]
    cycle[0].run(None, FEED)
    pid = worker_pid(host)
    cycle.append(cycle)
    del cycle
    gc.collect()
    eventually(lambda: is_gone(pid), "the end of the worker")


def test_memory_does_not_wait_for_the_garbage_collector(host: ModelHost) -> None:
    """Blocks and descriptors go when the last proxy of a model does: nothing of ours is in a cycle."""
    proxy = InferenceSessionProxy(spin_model(), host=host)
    for _ in range(3):
        proxy.run(None, {"x": np.zeros((64, 64), np.float32), "n": BRIEF})
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        del proxy
        gc.collect()
        found = {type(thing).__name__ for thing in gc.garbage if type(thing).__module__.startswith("onnx_dl")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found


def test_unload_means_gone(host: ModelHost) -> None:
    before_start = InferenceSessionProxy(model_path("digits"), host=host)
    before_start.run(None, FEED)
    before_start.unload()
    proxy = InferenceSessionProxy(model_path("digits"), host=host)
    gc.collect()
    rss = psutil.Process().memory_info().rss
    expected = proxy.run(None, FEED)
    pid = worker_pid(host)
    assert proxy.is_loaded
    assert proxy.unload() is True
    assert is_gone(pid)
    assert not proxy.is_loaded
    assert proxy.unload() is False
    assert abs(psutil.Process().memory_info().rss - rss) < 5e6
    again = proxy.run(None, FEED)
    assert worker_pid(host) != pid
    assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))


def test_unload_waits_for_running_calls(spinner: Spinner, host: ModelHost) -> None:
    running = spinner.begin(np.array(20_000))
    with host.events() as events:
        assert spinner.proxy.unload()
        assert running.result(allowed(DEADLINE))[0].shape == (64, 64)
        assert wait_for(events, EventType.UNLOADED).reason == "request"


def test_unload_gives_up_on_time_and_force_does_not_wait(spinner: Spinner) -> None:
    running = spinner.begin()
    with pytest.raises(onnx_dl.UnloadTimeout, match="still in use"):
        spinner.proxy.unload(timeout=0.1)
    assert spinner.proxy.unload(force=True)
    with pytest.raises(WorkerDied, match="force=True") as caught:
        running.result(allowed(DEADLINE))
    assert caught.value.reason == "request"
    spinner.run()


# --- crashes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_in_a_call(spinner: Spinner, host: ModelHost, number: int) -> None:
    other = InferenceSessionProxy(model_path("digits"), host=host)
    other.run(None, FEED)
    neighbour = worker_pid_of(host, other)
    running = spinner._pool.submit(spinner.run, FOREVER)
    pid = worker_pid_of(host, spinner.proxy)
    eventually(lambda: sum(psutil.Process(pid).cpu_times()[:2]) > RUNS, "the call runs")
    killed = time.monotonic()
    os.kill(pid, number)
    with pytest.raises(WorkerDied, match="loads the model again") as caught:
        running.result(allowed(DEADLINE))
    assert time.monotonic() - killed < allowed(5)  # the kernel may write its memory to a file first
    assert (caught.value.signal, caught.value.exit_code, caught.value.pid) == (number, None, pid)
    if number == signal.SIGSEGV:
        assert "Segmentation fault" in caught.value.stderr
    assert is_gone(pid)
    other.run(None, FEED)
    assert worker_pid_of(host, other) == neighbour
    spinner.run()


def test_a_model_that_keeps_dying_backs_off(digits: InferenceSessionProxy, host: ModelHost) -> None:
    delays = []
    with host.events() as events:
        for _ in range(3):
            while True:
                try:
                    digits.run(None, FEED)
                    break
                except WorkerDied as error:
                    assert error.retry_after > 0
                    waited = threading.Event()
                    waited.wait(error.retry_after)
            os.kill(worker_pid(host), signal.SIGKILL)
            delays.append(wait_for(events, EventType.FAILED).retry_after)
    assert delays == [0, 1, 2]
    with pytest.raises(WorkerDied) as caught:
        digits.run(None, FEED)
    assert 0 < caught.value.retry_after <= 2


def test_a_corrupt_model_fails_at_first_use_and_backs_off(host: ModelHost, tmp_path: Path) -> None:
    path = tmp_path / "corrupt.onnx"
    path.write_bytes(b"no model at all")
    proxy = InferenceSessionProxy(path, host=host)
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf

    for turn in range(3):
        with pytest.raises(InvalidProtobuf, match=r"Load model from .*corrupt\.onnx failed") as caught:
            proxy.run(None, FEED)
        assert (caught.value.retry_after > 0) == (turn > 0)


# --- tensors that outlive things ---------------------------------------------------------------------------


def shared_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:onnx-dl")


@pytest.mark.parametrize("end", ["unload", "kill", "close"])
def test_large_results_outlive_the_worker(host: ModelHost, end: str) -> None:
    proxy = InferenceSessionProxy(identity_model(), host=host)
    proxy.load()
    before = 1  # the model
    data = np.arange(1 << 20, dtype=np.float32)
    results = [proxy.run(None, {"x": data + i})[0] for i in range(3)]
    ends: dict[str, Callable[[], object]] = {
        "unload": proxy.unload,
        "close": host.close,
        "kill": lambda: os.kill(worker_pid(host), signal.SIGKILL),
    }
    pid = worker_pid(host)
    ends[end]()
    eventually(lambda: is_gone(pid), "the worker is gone")
    eventually(lambda: shared_mappings() == before + 3, "only the results are mapped")
    for i, result in enumerate(results):
        assert np.array_equal(result, data + i)
        result += 1
    view = results[0][:10]
    del result, results
    gc.collect()
    assert shared_mappings() == before + 1
    assert view[9] == 10
    del view
    gc.collect()
    assert shared_mappings() == before


def test_blocks_are_used_again_once_results_are_collected(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(identity_model(), host=host)
    data = np.arange(1 << 18, dtype=np.float32)
    for _ in range(100):
        result = proxy.run(None, {"x": data})[0]
    assert np.array_equal(result, data)
    assert shared_mappings() <= 8


# --- events ------------------------------------------------------------------------------------------------


def test_events_tell_the_whole_story(
    digits: InferenceSessionProxy, host: ModelHost, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[onnx_dl.ModelEvent] = []
    stop = host.on_event(heard.append)
    with caplog.at_level(logging.INFO, "onnx_dl"), host.events() as events:
        digits.run(None, FEED)
        pid = worker_pid(host)
        digits.unload()
        wait_for(events, EventType.UNLOADED)
        eventually(lambda: len(heard) == 4, "the callback heard all")
    stop()
    loading, ready, draining, unloaded = heard
    assert [event.type for event in heard] == ["loading", "ready", "draining", "unloaded"]
    assert [event.seq for event in heard] == [1, 2, 3, 4]
    assert {event.model for event in heard} == {str(model_path("digits"))}
    assert (ready.pid, draining.pid, unloaded.pid) == (pid, pid, pid)
    assert ready.rss and ready.rss > 1e6 and ready.seconds and ready.seconds > 0
    assert draining.reason == unloaded.reason == "request"
    assert unloaded.freed and unloaded.freed > 1e5
    assert loading.at <= ready.at <= draining.at <= unloaded.at
    assert [record.levelname for record in caplog.records] == ["INFO"] * 4
    assert "gave back" in caplog.records[-1].getMessage()


def test_a_callback_may_use_models(digits: InferenceSessionProxy, host: ModelHost) -> None:
    done = threading.Event()
    other = InferenceSessionProxy(model_path("diabetes"), host=host)

    def use(event: onnx_dl.ModelEvent) -> None:
        if event.type == EventType.READY and "digits" in event.model:
            other.run(None, {"measurements": np.zeros((1, 10), np.float32)})
            done.set()

    host.on_event(use)
    digits.run(None, FEED)
    assert done.wait(allowed(DEADLINE))


# --- closing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "with", "gc"])
def test_the_last_proxy_takes_the_model_with_it(host: ModelHost, how: str) -> None:
    with host.events() as events:
        proxy = InferenceSessionProxy(model_path("digits"), host=host)
        if how == "with":
            with proxy:
                proxy.run(None, FEED)
        else:
            proxy.run(None, FEED)
        if how == "close":
            proxy.close()
            proxy.close()
        if how == "gc":
            del proxy
            gc.collect()
        else:
            with pytest.raises(onnx_dl.ProxyClosedError, match="make a new one"):
                proxy.run(None, FEED)
        assert wait_for(events, EventType.UNLOADED).reason == "request"


def test_a_second_proxy_keeps_the_model(digits: InferenceSessionProxy, host: ModelHost) -> None:
    other = InferenceSessionProxy(model_path("digits"), host=host)
    digits.run(None, FEED)
    other.run(None, FEED)
    pid = worker_pid(host)
    other.close()
    digits.run(None, FEED)
    assert worker_pid(host) == pid


def test_a_closed_host_starts_again_on_use(digits: InferenceSessionProxy, host: ModelHost) -> None:
    expected = digits.run(None, FEED)[1]
    host.close()
    host.close()
    assert np.array_equal(digits.run(None, FEED)[1], expected)
