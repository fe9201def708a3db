"""Memory of a GPU is back when nobody uses it: after unloads and kills, and where a handle was open."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from benchmarks.gpu import machine

from onnx_dl import ModelHost, WorkerDied
from tests.support.gpu import CASES, DriverMemory, equal, feed_of, proxied
from tests.support.waiting import DEADLINE, eventually, is_gone, worker_pid

LARGE = CASES["64mb"].nbytes
IDLE = 8.0
"""Seconds in which a lane that is idle closes what it has open."""


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

    has_run, stop = threading.Event(), threading.Event()

    def call() -> None:
        while not stop.is_set():
            proxy.run(None, case.feed)
            has_run.set()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        calling = pool.submit(call)
        assert has_run.wait(DEADLINE)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: calling.done() or worker_pid_is_not(host, pid), "the end is seen")
        stop.set()
    # None: the end came between two calls, and the next one has loaded the model again.
    assert isinstance(calling.exception(), WorkerDied | None)
    eventually(lambda: is_gone(pid), "the worker ends")
    proxy.unload()
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
    binding = proxy.io_binding()
    binding.bind_output("y")
    before = 0
    for turn in range(8):
        held = bound(proxy, binding, feed_of(case, turn)["x"])
        proxy.run(None, case.feed)
        held.free()
        before = before or machine.used()  # the worker has what runs of this size need
    settled(before + LARGE // 2)


def bound(proxy: Any, binding: Any, array: np.ndarray) -> DriverMemory:
    """One run with an input on the device."""
    held = DriverMemory(array)
    binding.bind_input("x", "cuda", 0, np.float32, list(array.shape), held.address)
    proxy.run_with_iobinding(binding)
    equal(binding.copy_outputs_to_cpu(), [array + np.float32(1)])
    binding.clear_binding_inputs()
    return held


def test_a_handle_is_closed_when_the_lane_is_idle(host: ModelHost, settled: Callable[[int], None]) -> None:
    case = CASES["64mb"]
    proxy = proxied(case.model, host)
    proxy.run(None, case.feed)
    binding = proxy.io_binding()
    binding.bind_output("y")
    before = machine.used()
    held = bound(proxy, binding, case.feed["x"])
    idle = time.monotonic()
    eventually(lambda: time.monotonic() > idle + IDLE, "nothing tells that the worker has closed it")
    held.free()
    settled(before + LARGE // 2)


def test_results_on_the_device_are_the_applications(host: ModelHost, settled: Callable[[int], None]) -> None:
    """They stay when the worker goes, and their memory is used again when the application has dropped them:
    onnxruntime keeps it."""
    case = CASES["64mb"]
    proxy = proxied(case.model, host)
    binding = proxy.io_binding()
    binding.bind_cpu_input("x", case.feed["x"])
    before = 0
    for turn in range(8):
        binding.bind_output("y", "cuda")
        proxy.run_with_iobinding(binding)
        (value,) = binding.get_outputs()
        proxy.unload()
        equal([value.numpy()], [case.feed["x"] + np.float32(1)])
        del value
        binding.clear_binding_outputs()
        before = before if turn != 1 else machine.used()
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
