"""Memory of a GPU is back when nobody uses it: after unloads and kills, and where a handle was open."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
from benchmarks.gpu import machine

from onnx_dl import ModelHost, WorkerDied
from tests.support.gpu import CASES, OrtMemory, equal, feed_of, proxied
from tests.support.waiting import eventually, is_gone, worker_pid

SHAPE = (16, 1024, 1024)
LARGE = 67_108_864
"""Bytes of a tensor of that shape."""


@pytest.fixture
def settled(alone: None) -> Callable[[int], None]:
    """``settled(bytes)``: waits until the device uses no more."""

    def wait(most: int) -> None:
        eventually(lambda: machine.used() <= most, f"{most:,} bytes in use; now {machine.used():,}")

    return wait


@pytest.mark.parametrize("key", ["tiny", "64mb", "conv"])
def test_an_unload_gives_all_of_it_back(host: ModelHost, alone: None, key: str) -> None:
    case = CASES[key]
    before = machine.used()
    proxy = proxied(case.model, host)
    for turn in range(4):
        proxy.run(None, feed_of(case, turn))
    pid = worker_pid(host)
    assert machine.used() > before
    proxy.unload()
    assert machine.used() <= before, "when unload() returns, not some time after"
    assert pid not in machine.processes()


def test_a_worker_that_is_killed_in_a_run_gives_it_back(
    host: ModelHost, settled: Callable[[int], None]
) -> None:
    case = CASES["conv"]
    before = machine.used()
    proxy = proxied(case.model, host)
    expected = proxy.run(None, case.feed)
    pid = worker_pid(host)

    def call() -> None:
        while True:
            proxy.run(None, case.feed)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        calling = pool.submit(call)
        os.kill(pid, signal.SIGKILL)
        # The loop ends by a call that was under way; it goes on where the end came between two calls.
        while not calling.done():
            eventually(lambda: calling.done() or worker_pid_is_not(host, pid), "the end is seen")
            if not calling.done():
                os.kill(pid := worker_pid(host), signal.SIGKILL)
        assert isinstance(calling.exception(), WorkerDied)
    eventually(lambda: is_gone(pid), "the worker ends")
    settled(before)
    equal(proxy.run(None, case.feed), expected)


def worker_pid_is_not(host: ModelHost, pid: int) -> bool:
    return [status.pid for status in host.snapshot().models if status.pid not in (None, pid)] != []


def test_a_handle_is_closed_when_the_next_call_does_not_name_it(
    host: ModelHost, settled: Callable[[int], None]
) -> None:
    """Memory that is freed while a worker has it open stays in use."""
    case = CASES["64mb"]
    proxy = proxied(case.model, host)
    proxy.run(None, case.feed)
    binding = proxy.io_binding()
    binding.bind_output("y")
    bound(proxy, binding, case.feed["x"])
    before = machine.used()  # the worker has what runs of this size need
    for turn in range(8):
        bound(proxy, binding, feed_of(case, turn)["x"])
    proxy.run(None, case.feed)
    settled(before + LARGE // 2)


def bound(proxy: object, binding: object, array: np.ndarray) -> None:
    """One run with an input on the device, which is freed after it."""
    held = OrtMemory(array)
    binding.bind_ortvalue_input("x", held.value)  # type: ignore[attr-defined]
    proxy.run_with_iobinding(binding)  # type: ignore[attr-defined]
    equal(binding.copy_outputs_to_cpu(), [array + np.float32(1)])  # type: ignore[attr-defined]
    binding.clear_binding_inputs()  # type: ignore[attr-defined]


def test_a_handle_is_closed_when_the_lane_is_idle(host: ModelHost, settled: Callable[[int], None]) -> None:
    case = CASES["64mb"]
    proxy = proxied(case.model, host)
    proxy.run(None, case.feed)
    binding = proxy.io_binding()
    binding.bind_output("y")
    before = machine.used()
    bound(proxy, binding, case.feed["x"])
    settled(before + LARGE // 2)


def test_results_on_the_device_are_the_applications(host: ModelHost, settled: Callable[[int], None]) -> None:
    """They stay when the worker goes, and go when the application drops them."""
    case = CASES["64mb"]
    before = machine.used()
    proxy = proxied(case.model, host)
    binding = proxy.io_binding()
    binding.bind_cpu_input("x", case.feed["x"])
    binding.bind_output("y", "cuda")
    proxy.run_with_iobinding(binding)
    (value,) = binding.get_outputs()
    proxy.unload()
    equal([value.numpy()], [case.feed["x"] + np.float32(1)])
    assert machine.used() >= before + LARGE
    del value
    binding.clear_binding_outputs()
    settled(before + LARGE // 2)


def test_memory_that_was_pinned_does_not_stay(host: ModelHost) -> None:
    """Blocks that were pinned go with the worker, and calls go on with another."""
    case = CASES["64mb"]
    proxy = proxied(case.model, host)
    for _ in range(3):
        for turn in range(4):
            equal(proxy.run(None, feed_of(case, turn)), [feed_of(case, turn)["x"] + np.float32(1)])
        pid = worker_pid(host)
        proxy.unload()
        eventually(lambda pid=pid: is_gone(pid), "the worker ends")


def test_two_models_by_turns_under_a_limit_of_the_device(host: ModelHost, alone: None) -> None:
    case, other = CASES["conv"], CASES["5mb"]
    before = machine.used()
    with proxied(case.model, host) as proxy:
        proxy.run(None, case.feed)
        limit = (machine.used() - before) * 3 // 2  # room for one of them
        proxy.unload()
    with ModelHost(gpu_memory_limit={0: limit}) as limited:
        proxies = [(each, proxied(each.model, limited)) for each in (case, other)]
        for turn in range(3):
            for each, proxy in proxies:
                proxy.run(None, each.feed)
                # What a model takes is known when it was loaded once.
                assert turn == 0 or machine.used() - before <= limit
        for _, proxy in proxies:
            proxy.close()
