"""Runs with a deadline that another thread may end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost, RunTimeout
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.session import placed_runs
from tests.support.slow import identity_model, spin_model
from tests.support.waiting import DEADLINE, allowed, eventually

X = np.arange(8, dtype=np.float32)
FOR_EVER = {"x": np.ones((64, 64), np.float32), "n": np.array(1 << 40)}
SOON = {"x": np.ones((64, 64), np.float32), "n": np.array(1)}


@pytest.fixture
def identity(module_host: ModelHost) -> Iterator[InferenceSessionProxy]:
    with InferenceSessionProxy(identity_model(), host=module_host) as session:
        yield session


@pytest.fixture
def spin(module_host: ModelHost) -> Iterator[InferenceSessionProxy]:
    with InferenceSessionProxy(spin_model(), host=module_host) as session:
        session.run(None, SOON)
        yield session


def is_free(session: InferenceSessionProxy) -> bool:
    session.run(None, SOON, timeout=DEADLINE)
    return True


def test_a_run_without_places_is_a_run(identity: InferenceSessionProxy) -> None:
    (y,) = placed_runs.run(identity, ["y"], {"x": X}, {}, Deadline(DEADLINE, movable=True))
    assert (y == X).all()
    (y,) = asyncio.run(placed_runs.arun(identity, None, {"x": X}, {}, None))
    assert (y == X).all()


def test_another_thread_ends_a_run(spin: InferenceSessionProxy) -> None:
    deadline = Deadline(None, movable=True)
    ended: list[float] = []

    def end() -> None:
        ended.append(time.monotonic())
        deadline.end()

    timer = threading.Timer(0.2, end)
    timer.start()
    with pytest.raises(RunTimeout):
        placed_runs.run(spin, None, FOR_EVER, {}, deadline)
    assert time.monotonic() - ended[0] < allowed(0.4)
    timer.join(DEADLINE)
    assert is_free(spin)


def test_a_cancelled_coroutine_ends_its_run(spin: InferenceSessionProxy) -> None:
    async def cancelled() -> None:
        run = asyncio.ensure_future(placed_runs.arun(spin, None, FOR_EVER, {}, None))
        await asyncio.sleep(0.1)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(cancelled())
    eventually(lambda: is_free(spin), "the end of the run")


def test_a_coroutine_has_its_time(spin: InferenceSessionProxy) -> None:
    with pytest.raises(RunTimeout):
        asyncio.run(placed_runs.arun(spin, None, FOR_EVER, {}, 0.1))
    assert is_free(spin)
