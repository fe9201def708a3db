"""Bound inputs that a session reads when they are bound, and not at each run."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from onnx_dl.ort import ortvalues
from onnx_dl.session.bound_inputs import InputCopies, reads_when_bound

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
HOST, DEVICE = ["Cpu", "OrtArenaAllocator", 0, "DEFAULT"], ["Cuda", "OrtArenaAllocator", 0, "DEFAULT"]


@pytest.mark.parametrize(
    ("name", "infos", "providers", "found"),
    [
        ("x", [HOST, HOST], [CPU], False),
        ("x", [DEVICE, HOST], [CUDA, CPU], True),
        ("n", [DEVICE, HOST], [CUDA, CPU], False),  # an input that only nodes on the CPU use
        ("w", [DEVICE, HOST], [CUDA, CPU], True),  # an overridable initializer: not told of
        ("w", [HOST, HOST], [CPU], False),
        ("x", [], [CUDA, CPU], True),  # an onnxruntime that does not tell
        ("x", [], ["TensorrtExecutionProvider", CUDA, CPU], True),
        ("x", [], ["OpenVINOExecutionProvider", CPU], False),
        ("x", [], [CPU], False),
        ("x", [["XnnpackExecutionProvider", "", 0, ""], HOST], ["XnnpackExecutionProvider", CPU], False),
    ],
)
def test_inputs_that_are_read_when_they_are_bound(
    name: str, infos: list[Any], providers: list[str], found: bool
) -> None:
    assert reads_when_bound(name, ["x", "n"], infos, providers) is found


class Made:
    """A maker of arrays that counts them."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.arrays.append(np.empty(shape, dtype))
        return self.arrays[-1]


def test_a_copy_keeps_what_the_array_had_and_its_memory_is_used_again() -> None:
    made = Made()
    copies = InputCopies(lambda name: name == "x", made)
    array = np.ones((2, 3), np.float32)
    assert copies.read("n", array) is array
    first = copies.read("x", array)
    array[:] = 2
    assert first.tolist() == np.ones((2, 3)).tolist()
    assert copies.read("x", array) is first
    assert first.tolist() == array.tolist()
    assert copies.read("x", np.zeros(4, np.int8)).dtype == np.int8
    assert len(made.arrays) == 2
    copies.clear()
    copies.read("x", array)
    assert len(made.arrays) == 3


def test_arrays_of_any_order_and_none_at_all() -> None:
    copies = InputCopies(lambda name: True, np.empty)
    array = np.arange(6, dtype=np.float64).reshape(2, 3).T
    copy = copies.read("x", array)
    assert copy.tolist() == array.tolist()
    assert copy.flags.c_contiguous
    array[:] = 9
    assert copy[0, 0] == 0
    assert copies.read("x", np.array(7.0)).tolist() == 7.0
    assert copies.read("x", np.zeros((0, 3))).shape == (0, 3)


def test_an_ortvalue_that_numpy_has_no_type_for() -> None:
    bfloat16 = 16
    raw = np.array([1, 2, 3], np.uint16)
    value = ortvalues.put_together("dense", [bfloat16, [3], raw.view(np.uint8)], copy=False)
    copy: Any = InputCopies(lambda name: True, np.empty).read("x", value)
    raw[:] = 9
    assert ortvalues.memory_of(copy).view(np.uint16).tolist() == [1, 2, 3]
    assert copy.element_type() == bfloat16


def test_text_is_the_same_value() -> None:
    """onnxruntime does not copy it to a device."""
    importlib.import_module("onnxruntime")
    value = ortvalues.put_together("text", [np.array(["a"], object)], copy=False)
    assert InputCopies(lambda name: True, np.empty).read("x", value) is value
