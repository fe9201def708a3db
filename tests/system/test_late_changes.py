"""What an application changes after its host has started reaches the workers that start later."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost, connect
from onnx_dl.concurrency.background import Background
from tests.support.sharing import own_runtime
from tests.support.slow import identity_model, spin_model
from tests.support.waiting import worker_pid

CPU = ["CPUExecutionProvider"]
NICE = os.getpriority(os.PRIO_PROCESS, 0)
PROCESSORS = os.sched_getaffinity(0)

several = pytest.mark.skipif(len(PROCESSORS) < 2, reason="needs two processors")


def in_a_thread(work: Callable[[], Any]) -> None:
    """What it changes of itself is gone with it."""
    Background(lambda _: work(), "changes").wait(None, "the thread")


def umask_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))


def affinities(pid: int) -> list[set[int]]:
    return [os.sched_getaffinity(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")]


@pytest.fixture(params=["fork", "exec"])
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHost]:
    """A host that has started before anything changes."""
    monkeypatch.setenv("ONNX_DL_START", request.param)
    with ModelHost() as host:
        host.start()
        yield host


@several
def test_processors(started: ModelHost) -> None:
    """All threads of the worker: so many as onnxruntime has for one processor."""
    one = {max(PROCESSORS)}

    def change() -> None:
        os.sched_setaffinity(0, one)
        proxy = InferenceSessionProxy(spin_model(), providers=CPU, host=started)
        proxy.load()
        found = affinities(worker_pid(started))
        proxy.unload()
        assert found == [one] * len(found)

    in_a_thread(change)
    assert os.sched_getaffinity(0) == PROCESSORS
    proxy = InferenceSessionProxy(spin_model(), providers=CPU, host=started)
    proxy.load()
    assert os.sched_getaffinity(worker_pid(started)) == PROCESSORS  # of the thread that asked this time
    del proxy


@several
def test_processors_of_an_event_loop(started: ModelHost) -> None:
    """Its pool has a thread already, which loads the model."""
    one = {max(PROCESSORS)}

    async def change() -> None:
        await asyncio.to_thread(bool)
        os.sched_setaffinity(0, one)
        with InferenceSessionProxy(identity_model(), providers=CPU, host=started) as proxy:
            await proxy.arun(None, {"x": np.ones(1, np.float32)})
            assert os.sched_getaffinity(worker_pid(started)) == one

    in_a_thread(lambda: asyncio.run(change()))


def test_priority(started: ModelHost) -> None:
    def change() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, NICE + 3)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        with InferenceSessionProxy(identity_model(), providers=CPU, host=started) as proxy:
            proxy.load()
            pid = worker_pid(started)
            assert os.getpriority(os.PRIO_PROCESS, pid) == NICE + 3
            assert os.sched_getscheduler(pid) == os.SCHED_BATCH

    in_a_thread(change)


def test_umask(started: ModelHost) -> None:
    before = os.umask(0o027)
    try:
        with InferenceSessionProxy(identity_model(), providers=CPU, host=started) as proxy:
            proxy.load()
            assert umask_of(worker_pid(started)) == 0o027
    finally:
        os.umask(before)


def test_a_priority_that_may_not_be() -> None:
    """The host was started with less than the application has by then: a worker starts all the same."""
    code = f"""
import os, resource
from onnx_dl import InferenceSessionProxy, default_host
from tests.support.slow import identity_model
from tests.support.waiting import worker_pid
proxy = InferenceSessionProxy(identity_model(), providers={CPU})
os.setpriority(os.PRIO_PROCESS, 0, {NICE} + 5)
default_host().start()
try:
    os.setpriority(os.PRIO_PROCESS, 0, {NICE})
except PermissionError:
    pass
proxy.load()
print(os.getpriority(os.PRIO_PROCESS, worker_pid(default_host())) in ({NICE}, {NICE} + 5))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@several
def test_a_shared_host_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with own_runtime(monkeypatch):
        host = connect()
        host.start()

        def change() -> None:
            os.sched_setaffinity(0, {max(PROCESSORS)})
            with InferenceSessionProxy(identity_model(), providers=CPU, host=host) as proxy:
                proxy.load()
                assert os.sched_getaffinity(worker_pid(host)) == PROCESSORS

        in_a_thread(change)
        host.stop()
