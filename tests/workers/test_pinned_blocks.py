"""Blocks of a worker whose session says that it is on CUDA, and a stand-in for its driver that checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support import cuda_worker, fake_cuda, zoo
from tests.support.fake_cuda import Call
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
PIN, UNPIN = "cuMemHostRegister_v2", "cuMemHostUnregister"
MANY = 1 << 18


class Cuda:
    """What workers ask of the driver."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        path = os.pathsep.join([*cuda_worker.__path__, str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.environment = {
            "PYTHONPATH": path.rstrip(os.pathsep),
            "LD_LIBRARY_PATH": str(fake_cuda.build(folder).parent),
            "FAKE_CUDA_LOG": str(self.log),
        }

    def proxy(self, host: ModelHost, **variables: str) -> InferenceSessionProxy:
        return InferenceSessionProxy(zoo.plus(1), environment=self.environment | variables, host=host)

    def calls(self, function: str) -> list[Call]:
        return [call for call in fake_cuda.calls(self.log) if call.function == function]

    def pinned(self) -> set[int]:
        """Addresses that are pinned now."""
        found: set[int] = set()
        for call in fake_cuda.calls(self.log):
            if call.function == PIN and not call.result:
                found.add(call.address)
            elif call.function == UNPIN and not call.result:
                found.remove(call.address)
        return found


@pytest.fixture
def cuda(tmp_path: Path) -> Iterator[Cuda]:
    found = Cuda(tmp_path)
    yield found
    known = {PIN, UNPIN}
    assert [c for c in fake_cuda.calls(found.log) if c.function in known and c.result not in (0, 800)] == []
    assert [c for c in fake_cuda.calls(found.log) if "after-unmap" in c.function] == []


def run(proxy: InferenceSessionProxy, size: int, times: int) -> None:
    """Runs with other inputs each time; the result before is held until the next one is there."""
    held = None
    for value in range(times):
        array = np.full(size, value, np.float32)
        (held,) = proxy.run(None, {"x": array})
        assert np.array_equal(held, array + 1)


def test_blocks_are_pinned_from_their_second_use_until_they_go(host: ModelHost, cuda: Cuda) -> None:
    proxy = cuda.proxy(host)
    run(proxy, MANY, 1)
    assert cuda.calls(PIN) == []
    run(proxy, MANY, 8)
    eventually(lambda: len(cuda.pinned()) >= 3, "the pins of the inputs' block and of two blocks of results")
    first = cuda.pinned()
    run(proxy, 16 * MANY, 3)  # the caller's scratch block is replaced
    eventually(lambda: cuda.calls(UNPIN), "the end of a pin")
    eventually(lambda: cuda.pinned() - first, "the pin of a larger block")


def test_small_calls_pin_the_two_blocks_that_they_use(host: ModelHost, cuda: Cuda) -> None:
    proxy = cuda.proxy(host)
    run(proxy, 16, 8)
    eventually(lambda: len(cuda.pinned()) == 2, "the pins of two scratch blocks")
    assert {call.size for call in cuda.calls(PIN)} == {(64 << 10) + 64}


def test_where_the_driver_refuses_calls_run_as_without_pins(host: ModelHost, cuda: Cuda) -> None:
    proxy = cuda.proxy(host, FAKE_CUDA_REGISTER="refuse")
    run(proxy, MANY, 12)
    tried = cuda.calls(PIN)
    assert tried
    assert all(call.result for call in tried)
    assert len({call.address for call in tried}) == len(tried)  # no block is tried twice
    assert cuda.calls(UNPIN) == []
