"""Inputs of a binding to a model whose session copies them to a GPU when they are bound."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnxruntime import OrtValue

from onnx_dl import ModelHost
from tests.support.cuda_worker import Cuda


@pytest.mark.parametrize("size", [4, 100_000])
def test_an_input_has_the_values_that_it_had_when_it_was_bound(
    host: ModelHost, tmp_path: Path, size: int
) -> None:
    """As in-process: a session on a GPU does not see later changes of the array."""
    proxy = Cuda(tmp_path).proxy(host)
    binding, array = proxy.io_binding(), np.zeros(size, np.float32)
    value = OrtValue.ortvalue_from_numpy(array)
    binding.bind_output("y")

    def result() -> float:
        proxy.run_with_iobinding(binding)
        (found,) = binding.copy_outputs_to_cpu()
        assert found.shape == array.shape
        assert (found == found[0]).all()
        return float(found[0])

    ways = [
        lambda: binding.bind_cpu_input("x", array),
        lambda: binding.bind_input("x", "cpu", 0, np.float32, array.shape, array.ctypes.data),
        lambda: binding.bind_ortvalue_input("x", value),
    ]
    for number, bind in enumerate(ways):
        array[:] = number
        value.update_inplace(array)
        bind()
        array[:] = 9
        value.update_inplace(array)
        assert [result(), result()] == [number + 1.0] * 2
    binding.clear_binding_inputs()
    binding.bind_cpu_input("x", array)
    assert result() == 10.0


def test_runs_that_overlap_compute_with_their_own_inputs(host: ModelHost, tmp_path: Path) -> None:
    """With options, a binding is run as one: see ``ort_bindings.await_copies()``."""
    proxy = Cuda(tmp_path).proxy(host)

    def work(thread: int) -> None:
        binding = proxy.io_binding()
        binding.bind_output("y")
        for turn in range(40):
            array = np.full(16, thread * 1000 + turn, np.float32)
            binding.bind_cpu_input("x", array)
            proxy.run_with_iobinding(binding, onnxruntime.RunOptions())
            (found,) = binding.copy_outputs_to_cpu()
            assert np.array_equal(found, array + 1)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
