"""No method waits beyond its timeout, whichever of our processes is stopped, dead, or deaf in native code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pytest

from onnx_dl import ExecutionSession, InferenceSessionProxy, ModelHost, OnnxDLError, RunTimeout
from onnx_dl.client import launcher
from onnx_dl.errors import LoadTimeout, ProxyClosedError, UnloadTimeout, WorkerDied
from onnx_dl.protocol.lane import Touch
from tests.client.test_mute_peers import BY_LANE, METHODS, TIMEOUT, X, at_most, lane
from tests.contract.both import CPU, loop
from tests.contract.test_async_contract import ENDLESS
from tests.support.mlir import compiler
from tests.support.slow import identity_model
from tests.support.waiting import DEADLINE, allowed, eventually, template_of, worker_pid

pytestmark = pytest.mark.slow

__all__ = ["lane"]  # a fixture

SOCKET: Final = pytest.mark.parametrize("lane", ["socket"], indirect=True)
"""For tests that open no lane, or only one that the way of calls changes nothing about."""

BOUND: Final = TIMEOUT + 1.5
"""As for scripted peers."""


class Stage:
    """A host whose processes the test stops, and lets go on at the end."""

    def __init__(self) -> None:
        self.host = ModelHost()
        self._stopped: list[psutil.Process] = []
        self.proxy: Any = None
        self.others: list[threading.Thread] = []
        self.at_the_end = contextlib.ExitStack()

    def open(self, model: bytes | None = None) -> InferenceSessionProxy:
        return InferenceSessionProxy(model or identity_model(), providers=CPU, host=self.host)

    def supervisor(self) -> psutil.Process:
        return psutil.Process(self.host.snapshot().supervisor_pid)

    def template(self) -> psutil.Process:
        return template_of(self.host)

    def worker(self) -> psutil.Process:
        return psutil.Process(worker_pid(self.host))

    def stop(self, process: psutil.Process) -> None:
        self._stopped.append(process)
        process.suspend()
        eventually(lambda: process.status() == psutil.STATUS_STOPPED, "the process is stopped")

    def go_on(self) -> None:
        for process in self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._stopped.clear()

    def close(self) -> None:
        self.go_on()
        self.at_the_end.close()
        self.host.close()
        for other in self.others:
            other.join(allowed(DEADLINE))


@pytest.fixture
def stage(lane: str, nothing_is_left_behind: None) -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def used(stage: Stage) -> None:
    """A model with an idle lane."""
    stage.proxy = stage.open()
    stage.proxy.run(None, X)


def worker_with_an_idle_lane(stage: Stage) -> None:
    used(stage)
    stage.stop(stage.worker())


def worker_whose_lanes_are_in_use(stage: Stage) -> None:
    used(stage)
    call = stage.proxy._handle.model().prepare(stage.proxy._handle.lease, lambda lane: Touch())
    stage.at_the_end.callback(call.lane.close)
    stage.stop(stage.worker())


def worker_of_another_proxy(stage: Stage) -> None:
    used(stage)
    stage.at_the_end.callback(stage.proxy.close)
    stage.stop(stage.worker())
    stage.proxy = stage.open()


def supervisor_before_the_load(stage: Stage) -> None:
    stage.proxy = stage.open()
    stage.host.start()
    stage.stop(stage.supervisor())


def template_before_the_load(stage: Stage) -> None:
    stage.proxy = stage.open()
    stage.host.start()
    stage.stop(stage.template())


def supervisor_and_its_worker_died(stage: Stage) -> None:
    """Nobody answers how the worker ended."""
    used(stage)
    supervisor, worker = stage.supervisor(), stage.worker()
    stage.stop(supervisor)
    worker.kill()


def dead_supervisor(stage: Stage) -> None:
    used(stage)
    stage.supervisor().kill()


def dead_template(stage: Stage) -> None:
    stage.proxy = stage.open()
    stage.host.start()
    stage.template().kill()


def dead_worker(stage: Stage) -> None:
    used(stage)
    stage.worker().kill()


SITUATIONS: Final = {
    situation.__name__: situation
    for situation in (
        worker_with_an_idle_lane,
        worker_whose_lanes_are_in_use,
        worker_of_another_proxy,
        supervisor_before_the_load,
        template_before_the_load,
        supervisor_and_its_worker_died,
        dead_supervisor,
        dead_template,
        dead_worker,
    )
}


@pytest.mark.parametrize(
    ("lane", "situation", "method"),
    [("socket", name, method) for name in SITUATIONS for method in (*METHODS, "unload")]
    # How calls travel matters for stopped workers only, and for methods that use a lane in ways of their own.
    + [("zmq", name, method) for name in SITUATIONS if name.startswith("worker") for method in BY_LANE],
    indirect=["lane"],
)
def test_each_situation_with_each_method(stage: Stage, situation: str, method: str) -> None:
    SITUATIONS[situation](stage)
    call = METHODS.get(method, lambda proxy: proxy.unload(timeout=TIMEOUT))
    with at_most(BOUND), contextlib.suppress(OnnxDLError, ExceptionGroup):
        call(stage.proxy)
    stage.go_on()
    if method != "run_async":  # whose run may still be under way
        eventually(lambda: works(stage.proxy), "a call that is right", 2 * DEADLINE)


def works(proxy: InferenceSessionProxy) -> bool:
    try:
        return bool((proxy.run(None, X, timeout=allowed(DEADLINE))[0] == 1).all())
    except OnnxDLError:
        return False


@pytest.mark.parametrize(
    ("lane", "method"),
    [*(("socket", method) for method in ("run", "load", "session", "unload")), ("zmq", "run")],
    indirect=["lane"],
)
def test_native_code_that_holds_the_interpreters_lock(
    stage: Stage, method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    session = ExecutionSession(compiler(tmp_path_factory.getbasetemp())("gil"), host=stage.host)
    session.load()
    with at_most(BOUND), pytest.raises(RunTimeout):
        session.run([], timeout=TIMEOUT)
    calls: dict[str, Callable[[], object]] = {
        "run": lambda: session.run([], timeout=TIMEOUT),
        "load": lambda: session.load(timeout=TIMEOUT),
        "session": lambda: contextlib.ExitStack().enter_context(session.session(timeout=TIMEOUT)),
        "unload": lambda: session.unload(timeout=TIMEOUT),
    }
    with at_most(BOUND), pytest.raises(OnnxDLError):
        calls[method]()
    with at_most(BOUND):
        assert session.unload(force=True)


def test_a_run_is_told_to_end_within_its_grace(stage: Stage) -> None:
    """In the middle of a run that the worker cannot end."""
    stage.proxy = stage.open(loop())
    stage.proxy.load()
    timer = threading.Timer(0.2, stage.stop, [stage.worker()])
    timer.start()
    with at_most(BOUND), pytest.raises(RunTimeout, match="took longer than"):
        stage.proxy.run(None, ENDLESS, timeout=TIMEOUT)
    timer.join()


# --- a load that a timeout cuts short ----------------------------------------------------------------------


@SOCKET
def test_the_load_goes_on_for_the_next_caller(stage: Stage) -> None:
    template_before_the_load(stage)
    with pytest.raises(LoadTimeout, match="its load continues"):
        stage.proxy.load(timeout=0.1)
    with pytest.raises(RunTimeout, match=r"longer than 0\.1 s .*the model to load, which continues"):
        stage.proxy.run(None, X, timeout=0.1)
    stage.go_on()
    eventually(lambda: stage.proxy.is_loaded, "the load, which nobody waits for")
    assert works(stage.proxy)
    assert [status.loads for status in stage.host.snapshot().models] == [1]


@SOCKET
def test_what_nobody_waits_for_has_a_ttl(stage: Stage) -> None:
    stage.proxy = InferenceSessionProxy(identity_model(), providers=CPU, host=stage.host, ttl=0.3)
    stage.host.start()
    events = stage.host.events()
    stage.stop(stage.template())
    with pytest.raises(LoadTimeout):
        stage.proxy.load(timeout=0.1)
    stage.go_on()
    kinds = [events.get(allowed(DEADLINE)).type for _ in range(4)]
    assert kinds == ["loading", "ready", "draining", "unloaded"]
    events.close()


@SOCKET
def test_the_hosts_start_goes_on_for_the_next_caller(stage: Stage) -> None:
    stage.proxy = stage.open()
    with pytest.raises(RunTimeout, match="the host to start, which continues"):
        stage.proxy.run(None, X, timeout=0.001)
    launcher = stage.host.link._start
    assert launcher is not None
    assert works(stage.proxy)
    assert stage.host.link._start is launcher, "it was not started again"


@SOCKET
def test_threads_wait_together(stage: Stage) -> None:
    """Each for its own time, and all for one load."""
    template_before_the_load(stage)
    took: dict[int, float] = {}

    def call(number: int) -> None:
        began = time.monotonic()
        with contextlib.suppress(OnnxDLError):
            stage.proxy.run(None, X, timeout=0.2 * number)
        took[number] = time.monotonic() - began

    threads = [threading.Thread(target=call, args=(number,)) for number in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(allowed(DEADLINE))
    assert all(took[number] < allowed(0.2 * number + 1.5) for number in took) and len(took) == 4


# --- a run without a timeout -------------------------------------------------------------------------------


def running(stage: Stage, ended: list[object]) -> threading.Thread:
    """A thread whose plain run() waits for a stopped worker."""

    def work() -> None:
        try:
            ended.append(stage.proxy.run(None, X))
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    stage.others.append(thread)
    return thread


def test_unload_by_force_ends_a_run_that_waits_for_a_stopped_worker(stage: Stage) -> None:
    worker_with_an_idle_lane(stage)
    ended: list[object] = []
    thread = running(stage, ended)
    with pytest.raises(UnloadTimeout):
        stage.proxy.unload(timeout=0.2)
    assert not ended
    with at_most(2.0):
        stage.proxy.unload(force=True)
        thread.join(allowed(DEADLINE))
    assert isinstance(ended[0], WorkerDied) or np.array_equal(ended[0], [X["x"]])  # or made elsewhere


@SOCKET
def test_close_ends_the_wait_of_another_thread_for_the_load(stage: Stage) -> None:
    template_before_the_load(stage)
    ended: list[object] = []
    events = stage.host.events()
    thread = running(stage, ended)
    assert events.get(allowed(DEADLINE)).type == "loading"
    stage.proxy.close()
    thread.join(allowed(DEADLINE))
    assert isinstance(ended[0], ProxyClosedError)
    events.close()


def test_an_event_loop_closes_at_once(stage: Stage) -> None:
    """No thread of its executor waits for a worker that does not answer."""
    worker_with_an_idle_lane(stage)
    with at_most(BOUND + 0.5), pytest.raises(RunTimeout):
        asyncio.run(stage.proxy.arun(None, X, timeout=TIMEOUT))


@SOCKET
@pytest.mark.parametrize("method", ["arun", "aload"])
def test_a_cancelled_task_leaves_no_thread_that_waits(stage: Stage, method: str) -> None:
    template_before_the_load(stage)

    async def cancelled() -> None:
        call = stage.proxy.arun(None, X) if method == "arun" else stage.proxy.aload()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(call, 0.2)

    with at_most(BOUND):
        asyncio.run(cancelled())


PROGRAM: Final = """
import os, signal, sys, threading
import numpy as np
import onnx_dl
proxy = onnx_dl.InferenceSessionProxy(sys.argv[1], providers=["CPUExecutionProvider"])
feed = {"x": np.ones(4, np.float32)}
proxy.run(None, feed)
snapshot = onnx_dl.default_host().snapshot()
print(snapshot.supervisor_pid, flush=True)
os.kill(snapshot.models[0].pid, signal.SIGSTOP)
"""
ENDS: Final = {
    "Ctrl-C": "proxy.run(None, feed)",
    "the end of the program": "threading.Thread(target=proxy.run, args=(None, feed), daemon=True).start()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_plain_run_ends_with(end: str, lane: str, tmp_path: Path) -> None:
    model = tmp_path / "identity.onnx"
    model.write_bytes(identity_model())
    code = PROGRAM + "print('calls', flush=True)\n" + ENDS[end]
    program = subprocess.Popen(
        [sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    supervisor = int(program.stdout.readline())
    assert program.stdout.readline() == "calls\n"
    if end == "Ctrl-C":
        eventually(lambda: sleeps(program.pid), "the program waits")
        program.send_signal(signal.SIGINT)
    _, stderr = program.communicate(timeout=allowed(4 * DEADLINE))
    assert ("KeyboardInterrupt" in stderr) == (end == "Ctrl-C")
    eventually(lambda: not group(supervisor), "the end of all that it started", 3.0)


def sleeps(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_SLEEPING


def group(supervisor: int) -> list[int]:
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == supervisor:
                found.append(pid)
    return found


def test_close_ends_a_start_that_another_thread_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    host = ModelHost()
    beginning = threading.Event()
    start = launcher.start

    def slowly(*args: Any, **kwargs: Any) -> Any:
        beginning.set()
        return start(*args, **kwargs)

    monkeypatch.setattr(launcher, "start", slowly)
    ended: list[object] = []

    def use() -> None:
        try:
            host.start()
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    assert beginning.wait(allowed(DEADLINE))
    host.close()
    thread.join(allowed(DEADLINE))
    assert [str(error) for error in ended] in ([], ["The host was closed while it started."])
    assert host.snapshot().supervisor_pid is None


@SOCKET
def test_close_ends_a_supervisor_that_is_stopped(lane: str) -> None:
    """It has 3 s to say goodbye and 3 s to end; what it leaves is killed with it."""
    host = ModelHost()
    proxy = InferenceSessionProxy(identity_model(), providers=CPU, host=host)
    proxy.run(None, X)
    supervisor = host.snapshot().supervisor_pid
    assert supervisor is not None
    psutil.Process(supervisor).suspend()
    with at_most(6.0 + 3.0):
        host.close()
    eventually(lambda: not group(supervisor), "the end of all that it started", 3.0)
