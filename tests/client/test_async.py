"""Coroutines, timeouts, and runs that are ended from elsewhere."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost, RunTimeout, WorkerDied
from tests.contract.both import CPU, loop, scaled
from tests.contract.test_async_contract import ENDLESS, TERMINATED
from tests.support.slow import RUNS
from tests.support.waiting import DEADLINE, allowed, eventually

pytestmark = pytest.mark.slow

X = np.ones((2, 3), np.float32)


@pytest.fixture
def scale(host: ModelHost) -> InferenceSessionProxy:
    return InferenceSessionProxy(scaled(), providers=CPU, host=host)


@pytest.fixture
def endless(host: ModelHost) -> InferenceSessionProxy:
    """A model that loops until it is told to end."""
    return InferenceSessionProxy(loop(), providers=CPU, host=host)


def computing(proxy: InferenceSessionProxy) -> Callable[[], None]:
    """Waits until the worker of this model computes: a call that it has not begun is made elsewhere."""
    (status,) = proxy._handle.host.snapshot().models
    worker = psutil.Process(status.pid)
    idle = worker.cpu_times().user

    def wait() -> None:
        eventually(lambda: worker.cpu_times().user >= idle + RUNS, "the worker computes")

    return wait


async def begun(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """The call's task.  A loaded model has an idle lane, so its first step sends the call."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    return task


def test_a_coroutine_gives_what_run_gives(scale: InferenceSessionProxy) -> None:
    expected = scale.run(None, {"x": X})
    result = asyncio.run(scale.arun(None, {"x": X}))
    assert [a.tobytes() for a in result] == [a.tobytes() for a in expected]


def test_many_at_once_take_no_thread_each(scale: InferenceSessionProxy) -> None:
    async def all_of_them() -> tuple[list[Any], int]:
        calls = [asyncio.ensure_future(scale.arun(["twice"], {"x": X * i})) for i in range(200)]
        await calls[0]
        during = threading.active_count()
        return [await call for call in calls], during

    before = threading.active_count()
    results, during = asyncio.run(all_of_them())
    assert [result[0][0, 0] for result in results] == [2 * i for i in range(200)]
    assert during - before < 40  # those of the executor, which opens lanes


def test_large_inputs_are_copied_elsewhere(scale: InferenceSessionProxy) -> None:
    large = np.ones((1024, 1024), np.float32)
    result = asyncio.run(scale.arun(["twice"], {"x": large}))
    assert result[0][1023, 1023] == 2


def test_onnxruntimes_errors_are_its_own(scale: InferenceSessionProxy) -> None:
    with pytest.raises(ValueError, match="Required inputs"):
        asyncio.run(scale.arun(None, {}))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        asyncio.run(scale.arun(None, {"x": X.astype(np.float64)}))
    assert asyncio.run(scale.arun(["twice"], {"x": X}))[0][0, 0] == 2


def test_cancelling_a_task_ends_its_run(endless: InferenceSessionProxy) -> None:
    endless.load()

    async def cancelled() -> None:
        task = await begun(endless.arun(None, ENDLESS))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(cancelled(), allowed(DEADLINE)))
    assert endless.unload(timeout=allowed(DEADLINE))  # waits for calls that run: there is none


def test_a_coroutine_that_takes_too_long(endless: InferenceSessionProxy) -> None:
    endless.load()
    with pytest.raises(RunTimeout, match=r"longer than 0\.05 s "):
        asyncio.run(endless.arun(None, ENDLESS, timeout=0.05))
    assert endless.unload(timeout=allowed(DEADLINE))


def test_a_run_that_takes_too_long(endless: InferenceSessionProxy) -> None:
    endless.load()
    with pytest.raises(RunTimeout, match=r"longer than 0\.05 s "):
        endless.run(None, ENDLESS, timeout=0.05)
    with pytest.raises(TimeoutError):  # which it is
        endless.run(None, ENDLESS, timeout=0.05)
    assert endless.unload(timeout=allowed(DEADLINE))


def test_a_run_that_is_in_time(scale: InferenceSessionProxy) -> None:
    assert scale.run(["twice"], {"x": X}, timeout=60)[0][0, 0] == 2


def test_a_timeout_of_one_call_ends_no_other(endless: InferenceSessionProxy) -> None:
    options = onnxruntime.RunOptions()
    told: list[str] = []

    def other() -> None:
        try:
            endless.run(None, ENDLESS, options)
        except Exception as error:
            told.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(RunTimeout):
        endless.run(None, ENDLESS, timeout=0.2)
    assert thread.is_alive()
    options.terminate = True
    thread.join(allowed(DEADLINE))
    assert TERMINATED in told[0]


def test_ending_a_coroutine_by_its_options(endless: InferenceSessionProxy) -> None:
    options = onnxruntime.RunOptions()
    endless.load()

    async def ended() -> None:
        task = await begun(endless.arun(None, ENDLESS, options))
        options.terminate = True
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match=TERMINATED):
            await task

    asyncio.run(asyncio.wait_for(ended(), allowed(DEADLINE)))


@pytest.mark.parametrize("how", ["arun", "run_async"])
def test_the_worker_dies_meanwhile(endless: InferenceSessionProxy, how: str) -> None:
    endless.load()
    told = threading.Event()
    errors: list[str] = []

    def callback(results: Any, user_data: Any, error: str) -> None:
        errors.append(error)
        told.set()

    async def awaited() -> None:
        computes = computing(endless)
        task = await begun(endless.arun(None, ENDLESS))
        await asyncio.to_thread(computes)
        await asyncio.to_thread(endless.unload, force=True)
        with pytest.raises(WorkerDied):
            await task

    if how == "arun":
        asyncio.run(asyncio.wait_for(awaited(), allowed(DEADLINE)))
    else:
        endless.run_async(None, ENDLESS, callback, None)
        endless.unload(force=True)
        assert told.wait(allowed(DEADLINE))
        assert "worker" in errors[0]


def test_the_first_coroutine_starts_all(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(scaled(), providers=CPU, ttl=0, host=host)

    async def twice() -> list[float]:
        return [(await proxy.arun(["twice"], {"x": X * i}))[0][0, 0] for i in range(2)]

    assert asyncio.run(twice()) == [0, 2]


def test_callbacks_over_zeromq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_LANE", "zmq")
    told = threading.Event()
    results: list[Any] = []

    def callback(values: Any, user_data: Any, error: str) -> None:
        results.extend((values, user_data, error))
        told.set()

    with ModelHost() as host:
        proxy = InferenceSessionProxy(scaled(), providers=CPU, host=host)
        assert asyncio.run(proxy.arun(["twice"], {"x": X}))[0][0, 0] == 2
        proxy.run_async(["twice"], {"x": X}, callback, 7)
        assert told.wait(allowed(DEADLINE))
        assert (results[0][0][0, 0], *results[1:]) == (2, 7, "")
        endless = InferenceSessionProxy(loop(), providers=CPU, host=host)
        with pytest.raises(RunTimeout):
            asyncio.run(endless.arun(None, ENDLESS, timeout=0.3))
        assert endless.unload(timeout=allowed(DEADLINE))


@pytest.mark.parametrize("how", ["run", "run_with_ort_values"])
def test_ctrl_c_ends_the_run(endless: InferenceSessionProxy, how: str) -> None:
    """The caller is gone at once, and the model does not go on for nobody."""
    endless.load()
    feed: dict[str, Any] = ENDLESS
    if how == "run_with_ort_values":
        feed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in ENDLESS.items()}
    computes = computing(endless)

    def interrupt() -> None:
        computes()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        getattr(endless, how)(None, feed)
    thread.join()
    assert endless.unload(timeout=allowed(DEADLINE))
    assert endless.run(None, ENDLESS | {"n": np.array(1)})
