"""Blocks of a worker whose session says that it is on CUDA, and a stand-in for its driver that checks."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support import zoo
from tests.support.cuda_worker import PIN, UNPIN, Cuda
from tests.support.waiting import eventually

MANY = 1 << 18


@pytest.fixture
def cuda(tmp_path: Path) -> Iterator[Cuda]:
    found = Cuda(tmp_path)
    yield found
    assert found.wrong() == []


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


@pytest.mark.parametrize("name", ["two", "layers", "found", "dtypes", "scalars", "text"])
def test_calls_that_repeat_give_what_they_give_in_process(host: ModelHost, cuda: Cuda, name: str) -> None:
    """Also calls whose inputs the session would not read again, and results whose shapes change."""
    kind, rng = zoo.kinds()[name], np.random.default_rng(7)
    proxy = cuda.proxy(host, kind.data)
    for size in (5, 70_000):
        for _ in range(6):
            feed = kind.draw(rng, min(size, kind.most))
            wanted = zoo.expected(name, None, feed)
            assert zoo.difference(proxy.run(None, feed), wanted) is None


def test_calls_that_overlap_compute_with_their_own_inputs(host: ModelHost, cuda: Cuda) -> None:
    """A session copies an input when it is bound, by a stream that need not be that of the run."""
    proxy = cuda.proxy(host)

    def work(thread: int) -> None:
        for turn in range(60):
            array = np.full(16, thread * 1000 + turn, np.float32)
            (found,) = proxy.run(None, {"x": array})
            assert np.array_equal(found, array + 1)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
        list(pool.map(work, [5]))  # alone, and bound again
