"""Steps that would keep an event loop waiting, and the threads that do them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnx_dl.server.inference.checks import Signature
from onnx_dl.server.inference.long_steps import has_long_inputs, has_long_results
from onnx_dl.server.inference.preparation import Prepared
from onnx_dl.server.inference.threads import Threads
from onnx_dl.server.interfaces import Served
from onnx_dl.server.v2.messages import InferRequest, InputTensor, RegionSlice
from tests.support.waiting import DEADLINE, allowed, eventually


class Sized(bytes):
    """Bytes that claim to be many."""

    def __new__(cls, size: int) -> Sized:
        made = super().__new__(cls)
        made.size = size
        return made

    size: int

    def __len__(self) -> int:
        return self.size


MB = 1 << 20


@pytest.mark.parametrize(
    ("datatype", "data", "nbytes", "is_long"),
    [
        ("FP32", [1.0], MB, False),
        ("FP32", [1.0], MB + 1, True),
        ("BYTES", Sized(40_000), 0, False),
        ("BYTES", Sized(40_001), 0, True),
        ("BYTES", memoryview(bytes(40_001)), 0, True),
        ("BYTES", RegionSlice("r", 0, 40_001), 0, True),
        ("FP32", Sized(16 * MB), 0, False),
        ("FP32", Sized(16 * MB + 1), 0, True),
        ("FP32", RegionSlice("r", 0, 1 << 40), 0, False),
        ("BF16", RegionSlice("r", 0, 1 << 40), 0, True),
    ],
)
def test_inputs(datatype: str, data: Any, nbytes: int, is_long: bool) -> None:
    tensor = InputTensor("x", datatype, (1,), data)
    assert has_long_inputs(InferRequest("m", "", "", [tensor], [], {}, nbytes=nbytes)) is is_long


def test_results() -> None:
    signature = Signature(Served(name="m", version="1", path="", generation=""))
    many = [np.broadcast_to(np.array(item), (1 << 40,)) for item in (None, 1)]
    copies: Any = {"a": None, "b": None}
    for value in many:
        assert has_long_results(Prepared(signature, ["a"], {}, 1, {}, copies, {}), [value])
        assert not has_long_results(Prepared(signature, ["c"], {}, 1, {}, copies, {}), [value])
        assert not has_long_results(Prepared(signature, ["a"], {}, 1, {}, {}, {}), [value])
        assert not has_long_results(Prepared(signature, ["a"], {}, 1, {}, copies, {}), [value[:9]])


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    threads.close()
    eventually(lambda: not any("onnx-dl" in each.name for each in threading.enumerate()), "their end")


def test_a_step_has_its_result_or_its_error(threads: Threads) -> None:
    assert asyncio.run(threads.step(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        asyncio.run(threads.step(lambda: 1 / 0))


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_has_begun_ends_before_its_caller(threads: Threads, fails: bool) -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(allowed(DEADLINE))
        ended.set()
        assert not fails

    async def run() -> None:
        task = asyncio.create_task(threads.step(work))
        await asyncio.to_thread(begun.wait, DEADLINE)
        for _ in range(2):
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, allowed(DEADLINE))
        assert ended.is_set()

    asyncio.run(run())


def test_a_step_that_has_not_begun_never_does(threads: Threads) -> None:
    may_end = threading.Event()
    done: list[int] = []

    async def run() -> None:
        busy = [asyncio.create_task(threads.step(lambda: may_end.wait(allowed(DEADLINE)))) for _ in range(4)]
        late = asyncio.create_task(threads.step(lambda: done.append(1)))
        await asyncio.sleep(0)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(late, allowed(DEADLINE))
        may_end.set()
        await asyncio.gather(*busy)

    asyncio.run(run())
    assert not done
