"""Calls with arrays to models on a GPU: as in-process, to the last bit."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.gpu import machine
from benchmarks.models import make_model
from onnx import helper

from onnx_dl import ModelHost
from tests.support.gpu import CASES, equal, feed_of, in_process, proxied
from tests.support.waiting import DEADLINE, eventually, is_gone, worker_pid

TURNS = 6
"""From the second on, calls are prepared and blocks of memory pinned."""


@pytest.mark.parametrize("key", ["tiny", "5mb", "64mb", "conv"])
def test_results_are_those_of_in_process(host: ModelHost, key: str) -> None:
    case = CASES[key]
    own, proxy = in_process(case.model), proxied(case.model, host)
    found, expected = [], []
    for turn in range(TURNS):
        feed = feed_of(case, turn)
        found.append(proxy.run(None, feed))
        expected.append(own.run(None, feed))
    for mine, other in zip(found, expected, strict=True):  # the first result is kept by the last call
        equal(mine, other)


@pytest.mark.parametrize("key", ["tiny", "5mb", "conv"])
def test_one_array_that_changes(host: ModelHost, key: str) -> None:
    """A session on CUDA copies what is bound to it when it is bound, so a prepared call must bind again."""
    case = CASES[key]
    own, proxy = in_process(case.model), proxied(case.model, host)
    feed = feed_of(case, 0)
    for _ in range(TURNS):
        for array in feed.values():
            array += 1
        equal(proxy.run(None, feed), own.run(None, feed))


@pytest.mark.parametrize("key", ["5mb", "conv"])
def test_an_input_that_is_built_in_shared_memory(host: ModelHost, key: str) -> None:
    case = CASES[key]
    own, proxy = in_process(case.model), proxied(case.model, host)
    (name,) = case.feed
    inside = proxy.empty(case.feed[name].shape, np.float32)
    for turn in range(TURNS):
        inside[...] = feed_of(case, turn)[name]
        equal(proxy.run(None, {name: inside}), own.run(None, {name: np.array(inside)}))


def test_results_that_are_fed_to_another_model(host: ModelHost) -> None:
    case = CASES["64mb"]
    own, first, second = in_process(case.model), proxied(case.model, host), proxied(case.model, host)
    for turn in range(TURNS):
        (between,) = first.run(None, feed_of(case, turn))
        found = second.run(None, {"x": between})
        equal(found, own.run(None, {"x": own.run(None, feed_of(case, turn))[0]}))


def test_shapes_by_turns(host: ModelHost) -> None:
    model = make_model([helper.make_node("Mul", ["x", "x"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 3]})
    own, proxy = in_process(model), proxied(model, host)
    rng = np.random.default_rng(0)
    for rows in (1, 100_000, 1, 0, 500_000, 100_000, 7) * 2:
        feed = {"x": rng.standard_normal((rows, 3), dtype=np.float32)}
        equal(proxy.run(None, feed), own.run(None, feed))


def test_an_ortvalue_on_the_device_without_a_binding(host: ModelHost) -> None:
    import onnxruntime

    case = CASES["5mb"]
    own, proxy = in_process(case.model), proxied(case.model, host)
    for turn in range(3):
        feed = feed_of(case, turn)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(feed["x"], "cuda", 0)
        (expected,) = own.run_with_ort_values(None, {"x": value})
        (found,) = proxy.run_with_ort_values(None, {"x": value})
        assert found.device_name() == expected.device_name()
        equal([found.numpy()], [expected.numpy()])


@pytest.mark.parametrize(("key", "turns"), [("tiny", 50), ("5mb", 20), ("64mb", 8)])
def test_threads(host: ModelHost, key: str, turns: int) -> None:
    """Calls that overlap compute with their own inputs, which are pinned from the second on."""
    case = CASES[key]
    own, proxy = in_process(case.model), proxied(case.model, host)

    def work(thread: int) -> list[Any]:
        return [proxy.run(None, feed_of(case, thread * 100 + turn)) for turn in range(turns)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for thread, results in enumerate(pool.map(work, range(4))):
            for turn, found in enumerate(results):
                equal(found, own.run(None, feed_of(case, thread * 100 + turn)))


def test_a_group_of_three_in_one_worker(host: ModelHost) -> None:
    keys = ("tiny", "5mb", "conv")
    own = {key: in_process(CASES[key].model) for key in keys}
    proxies = {key: proxied(CASES[key].model, host, group="three") for key in keys}
    for turn in range(3):
        for key, proxy in proxies.items():
            feed = feed_of(CASES[key], turn)
            equal(proxy.run(None, feed), own[key].run(None, feed))
    assert worker_pid(host)


def test_a_worker_that_was_killed(host: ModelHost) -> None:
    case = CASES["conv"]
    own, proxy = in_process(case.model), proxied(case.model, host)
    for turn in range(TURNS):
        feed = feed_of(case, turn)
        equal(proxy.run(None, feed), own.run(None, feed))
        if turn == TURNS // 2:
            os.kill(pid := worker_pid(host), signal.SIGKILL)
            eventually(lambda pid=pid: is_gone(pid), "the worker ends")
            eventually(lambda pid=pid: pid not in machine.processes(), "its memory is free")


WITHOUT_CUDA = """
import sys
import numpy as np
from onnx_dl import InferenceSessionProxy
proxy = InferenceSessionProxy(sys.argv[1], providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
assert proxy.get_providers()[0] == "CUDAExecutionProvider"
for _ in range(5):
    proxy.run(None, {"x": np.zeros((1, 16), np.float32)})
binding = proxy.io_binding()
binding.bind_cpu_input("x", np.zeros((1, 16), np.float32))
binding.bind_output("y")
for _ in range(3):
    proxy.run_with_iobinding(binding)
assert "libcuda" not in open("/proc/self/maps").read()
"""


def test_an_application_without_device_memory_has_no_cuda(tmp_path: Path) -> None:
    """Neither the driver nor a context: forked children could not use CUDA, and a context takes memory."""
    path = tmp_path / "tiny.onnx"
    path.write_bytes(CASES["tiny"].model)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CUDA, str(path)], capture_output=True, text=True, timeout=6 * DEADLINE
    )
    assert done.returncode == 0, done.stderr
