"""Bindings of memory on a GPU.  ``make`` makes onnxruntime's own session, too: what fails there is wrong."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.models import Case
from onnx import TensorProto, helper

from onnx_dl import ModelHost, WorkerDied
from tests.support.gpu import (
    CASES,
    MEMORY,
    SHAPE,
    DriverMemory,
    OrtMemory,
    TorchMemory,
    equal,
    feed_of,
    in_process,
    proxied,
)
from tests.support.waiting import DEADLINE, eventually, is_gone, worker_pid

Make = Callable[..., Any]
KEYS = ["tiny", "5mb", "64mb", "conv"]
TURNS = 5


@pytest.fixture(params=["in-process", "onnx-dl"])
def make(request: pytest.FixtureRequest, host: ModelHost) -> Make:
    if request.param == "in-process":
        return in_process
    return lambda model, **options: proxied(model, host, **options)


@pytest.fixture(params=list(MEMORY))
def memory(request: pytest.FixtureRequest) -> type[OrtMemory | TorchMemory]:
    kind: type[OrtMemory | TorchMemory] = MEMORY[request.param]
    kind(np.zeros(1, np.float32))  # skips where it is not installed
    return kind


def results(case: Case, turn: int, own: Any = None) -> list[np.ndarray]:
    """What a session in-process makes of arrays."""
    found: list[np.ndarray] = (own or in_process(case.model)).run(None, feed_of(case, turn))
    return found


def bind_input(binding: Any, held: Any, shape: Any) -> None:
    binding.bind_input("x", "cuda", 0, np.float32, list(shape), held.address)


def bind_output(binding: Any, held: Any, shape: Any) -> None:
    binding.bind_output("y", "cuda", 0, np.float32, list(shape), held.address)


# --- the caller's memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_input_and_output_at_addresses(make: Make, memory: Any, key: str) -> None:
    case, own = CASES[key], in_process(CASES[key].model)
    session, first = make(case.model), results(case, 0, own)[0]
    x, y = memory(case.feed["x"]), memory(np.zeros_like(first))
    binding = session.io_binding()
    bind_input(binding, x, case.feed["x"].shape)
    bind_output(binding, y, first.shape)
    for turn in range(TURNS):
        x.set(feed_of(case, turn)["x"])
        session.run_with_iobinding(binding)
        equal([y.numpy()], results(case, turn, own))
        equal([x.numpy()], [feed_of(case, turn)["x"]])


@pytest.mark.parametrize("key", ["tiny", "5mb"])
def test_an_input_on_the_device_and_an_output_of_the_host(make: Make, memory: Any, key: str) -> None:
    case, own = CASES[key], in_process(CASES[key].model)
    session, x = make(case.model), memory(case.feed["x"])
    binding = session.io_binding()
    bind_input(binding, x, case.feed["x"].shape)
    binding.bind_output("y")
    for turn in range(TURNS):
        x.set(feed_of(case, turn)["x"])
        session.run_with_iobinding(binding)
        equal(binding.copy_outputs_to_cpu(), results(case, turn, own))


@pytest.mark.parametrize("key", ["tiny", "5mb"])
def test_an_input_of_the_host_and_an_output_on_the_device(make: Make, memory: Any, key: str) -> None:
    case, own = CASES[key], in_process(CASES[key].model)
    session, first = make(case.model), results(case, 0, own)[0]
    y = memory(np.zeros_like(first))
    binding = session.io_binding()
    for turn in range(TURNS):
        binding.bind_cpu_input("x", feed_of(case, turn)["x"])
        bind_output(binding, y, first.shape)
        session.run_with_iobinding(binding)
        equal([y.numpy()], results(case, turn, own))


def test_an_array_of_the_host_is_read_when_it_is_bound(make: Make) -> None:
    """As in-process on CUDA; on the CPU it is read at each run."""
    case = CASES["tiny"]
    session, x = make(case.model), feed_of(case, 0)["x"]
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y")
    x += 1
    for _ in range(3):
        session.run_with_iobinding(binding)
        equal(binding.copy_outputs_to_cpu(), results(case, 0))


def test_an_array_that_the_session_has_on_the_host_is_read_at_each_run(make: Make) -> None:
    """As in-process: a node on the GPU takes its shape from there."""
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    model = helper.make_model(
        helper.make_graph(
            [node],
            "reshape",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [16]),
                helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    session, x, shape = make(model.SerializeToString()), np.arange(16, dtype=np.float32), np.array([2, 8])
    assert [info.name for info in session.get_input_memory_infos()] == ["Cuda", "Cpu"]
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_cpu_input("shape", shape)
    expected = x.copy()
    for sizes in ((2, 8), (4, 4), (16, 1)):
        shape[:] = sizes
        x += 1
        binding.bind_output("y")
        session.run_with_iobinding(binding)
        equal(binding.copy_outputs_to_cpu(), [expected.reshape(sizes)])


def test_parts_of_one_allocation(make: Make) -> None:
    """torch cuts small tensors out of one allocation; inputs and outputs change places."""
    session = make(CASES["tiny"].model)
    x = TorchMemory(CASES["tiny"].feed["x"], skipped=4096)
    y = TorchMemory(np.zeros((1, 16), np.float32), skipped=512)
    binding = session.io_binding()
    for source, target in ((x, y), (y, x), (x, y)):
        bind_input(binding, source, (1, 16))
        bind_output(binding, target, (1, 16))
        session.run_with_iobinding(binding)
        equal([target.numpy()], [source.numpy() + np.float32(1)])


def test_small_allocations_of_the_driver(host: ModelHost) -> None:
    """Several of them lie in one block of the device; a handle is of the block, or of the allocation."""
    proxy = proxied(CASES["tiny"].model, host)
    held = [DriverMemory(np.full((1, 16), number, np.float32)) for number in range(5)]
    binding = proxy.io_binding()
    for source, target in itertools.permutations(held, 2):
        source.set(expected := np.full((1, 16), source.address % 1000, np.float32))
        bind_input(binding, source, (1, 16))
        bind_output(binding, target, (1, 16))
        proxy.run_with_iobinding(binding)
        equal([target.numpy(), source.numpy()], [expected + np.float32(1), expected])
    binding.clear_binding_inputs()
    binding.clear_binding_outputs()
    proxy.run(None, CASES["tiny"].feed)  # the worker closes its handles
    for each in held:
        each.free()


def test_work_that_is_still_queued(host: ModelHost) -> None:
    """The caller's kernels are done before the model reads what they write.  In-process, the caller has to
    wait for them: onnxruntime's streams do not."""
    held, target = (TorchMemory(np.zeros(SHAPE, np.float32)) for _ in range(2))
    session = proxied(CASES["64mb"].model, host)
    binding = session.io_binding()
    bind_input(binding, held, held.tensor.shape)
    bind_output(binding, target, target.tensor.shape)
    total = 0
    for _ in range(5):
        for _ in range(200):
            held.tensor.add_(1)
        total += 200
        session.run_with_iobinding(binding)
        assert target.tensor[0, 0, 0].item() == target.tensor[-1, -1, -1].item() == total + 1


# --- memory of a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_an_output_that_runs_allocate_on_the_device(make: Make, key: str) -> None:
    """The second run writes where the first one has allocated."""
    case, own = CASES[key], in_process(CASES[key].model)
    session, x = make(case.model), OrtMemory(case.feed["x"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x.value)
    binding.bind_output("y", "cuda")
    addresses = set()
    for turn in range(TURNS):
        x.set(feed_of(case, turn)["x"])
        session.run_with_iobinding(binding)
        (value,) = binding.get_outputs()
        assert value.device_name() == "cuda"
        addresses.add(value.data_ptr())
        equal([value.numpy()], results(case, turn, own))
        equal(binding.copy_outputs_to_cpu(), results(case, turn, own))
    assert len(addresses) == 1


@pytest.mark.parametrize("key", ["tiny", "5mb"])
def test_ortvalues_in_both_directions(make: Make, key: str) -> None:
    case, own = CASES[key], in_process(CASES[key].model)
    session, first = make(case.model), results(case, 0, own)[0]
    x, y = OrtMemory(case.feed["x"]), OrtMemory(np.zeros_like(first))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x.value)
    binding.bind_ortvalue_output("y", y.value)
    for turn in range(TURNS):
        x.set(feed_of(case, turn)["x"])
        session.run_with_iobinding(binding)
        equal([y.numpy()], results(case, turn, own))


def test_a_result_on_the_device_is_fed_to_another_model(make: Make) -> None:
    case = CASES["64mb"]
    first, second = make(case.model), make(case.model)
    x = OrtMemory(case.feed["x"])
    one, two = first.io_binding(), second.io_binding()
    one.bind_ortvalue_input("x", x.value)
    one.bind_output("y", "cuda")
    for turn in range(3):
        x.set(feed_of(case, turn)["x"])
        first.run_with_iobinding(one)
        two.bind_ortvalue_input("x", one.get_outputs()[0])
        two.bind_output("y", "cuda")
        second.run_with_iobinding(two)
        equal(two.copy_outputs_to_cpu(), [feed_of(case, turn)["x"] + np.float32(1) + np.float32(1)])


def test_a_cuda_graph(make: Make) -> None:
    case, own = CASES["conv"], in_process(CASES["conv"].model)
    session, first = make(case.model, enable_cuda_graph="1"), results(case, 0, own)[0]
    x, y = OrtMemory(case.feed["x"]), OrtMemory(np.zeros_like(first))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x.value)
    binding.bind_ortvalue_output("y", y.value)
    for turn in range(TURNS):  # the first runs are recorded, the others replay them
        x.set(feed_of(case, turn)["x"])
        session.run_with_iobinding(binding)
        np.testing.assert_allclose(y.numpy(), results(case, turn, own)[0], rtol=1e-3, atol=1e-4)


# --- what goes away ----------------------------------------------------------------------------------------


def test_an_address_of_the_device_that_is_said_to_be_the_hosts(host: ModelHost) -> None:
    case = CASES["tiny"]
    proxy, held = proxied(case.model, host), OrtMemory(case.feed["x"])
    binding = proxy.io_binding()
    with pytest.raises(ValueError, match="cuda"):
        binding.bind_input("x", "cpu", 0, np.float32, [1, 16], held.address)
    with pytest.raises(ValueError, match="cuda"):
        binding.bind_output("y", "cpu", 0, np.float32, [1, 16], held.address)


def test_a_tensor_that_is_freed_and_another_at_its_address(host: ModelHost, memory: Any) -> None:
    """An allocation that comes back at an address is another one: an old handle would show what was there."""
    case = CASES["64mb"]
    proxy = proxied(case.model, host)
    binding = proxy.io_binding()
    binding.bind_output("y")
    for turn in range(4):
        held = memory(feed_of(case, turn)["x"])
        bind_input(binding, held, case.feed["x"].shape)
        proxy.run_with_iobinding(binding)
        equal(binding.copy_outputs_to_cpu(), [feed_of(case, turn)["x"] + np.float32(1)])
        binding.clear_binding_inputs()
        del held
        if memory is TorchMemory:
            import torch

            torch.cuda.empty_cache()


@pytest.mark.parametrize("key", ["tiny", "64mb"])
def test_two_threads_with_memory_of_their_own(host: ModelHost, memory: Any, key: str) -> None:
    case = CASES[key]
    proxy = proxied(case.model, host)
    shape = case.feed["x"].shape

    def work(thread: int) -> None:
        x, y = memory(case.feed["x"]), memory(np.zeros(shape, np.float32))
        binding = proxy.io_binding()
        bind_input(binding, x, shape)
        bind_output(binding, y, shape)
        for turn in range(20):
            array = feed_of(case, thread * 100 + turn)["x"]
            x.set(array)
            proxy.run_with_iobinding(binding)
            equal([y.numpy()], [array + np.float32(1)])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


def test_a_worker_that_is_killed_while_it_has_memory_open(host: ModelHost, memory: Any) -> None:
    case = CASES["5mb"]
    proxy, own = proxied(case.model, host), in_process(case.model)
    first = results(case, 0, own)[0]
    x, y = memory(case.feed["x"]), memory(np.zeros_like(first))
    binding = proxy.io_binding()
    bind_input(binding, x, case.feed["x"].shape)
    bind_output(binding, y, first.shape)
    proxy.run_with_iobinding(binding)
    os.kill(pid := worker_pid(host), signal.SIGKILL)
    eventually(lambda: is_gone(pid), "the worker ends")
    for turn in range(TURNS):
        x.set(feed_of(case, turn)["x"])
        with contextlib.suppress(WorkerDied):  # a call that was sent before the end was known
            proxy.run_with_iobinding(binding)
            equal([y.numpy()], results(case, turn, own))
    assert worker_pid(host) != pid
    equal([x.numpy()], [feed_of(case, TURNS - 1)["x"]])


EXPANDABLE = """
import sys, warnings
import numpy as np, torch
from onnx_dl import InferenceSessionProxy
proxy = InferenceSessionProxy(sys.argv[1], providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
x, y = torch.arange(16, dtype=torch.float32, device="cuda"), torch.zeros(16, device="cuda")
binding = proxy.io_binding()
binding.bind_input("x", "cuda", 0, np.float32, [1, 16], x.data_ptr())
binding.bind_output("y", "cuda", 0, np.float32, [1, 16], y.data_ptr())
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for turn in range(3):
        x.add_(1)
        proxy.run_with_iobinding(binding)
        assert torch.equal(y, x + 1), (x, y)
print(len(told), *(str(each.message) for each in told))
"""


def test_memory_that_was_mapped_by_parts(tmp_path: Path) -> None:
    """torch's expandable segments go by descriptors; if the driver refuses, a warning says so once."""
    TorchMemory(np.zeros(1, np.float32))
    path = tmp_path / "tiny.onnx"
    path.write_bytes(CASES["tiny"].model)
    done = subprocess.run(
        [sys.executable, "-c", EXPANDABLE, str(path)],
        env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        capture_output=True,
        text=True,
        timeout=6 * DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout[0] in "01", done.stdout
