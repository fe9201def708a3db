"""The arrays that a model is warmed up with, and what is said if it does not take them."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_dl.core.spec import Warmup
from onnx_dl.core.status import TensorSpec
from onnx_dl.workers.warmup import array_of, complaint


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        (Warmup("float32", (1, 3)), np.zeros((1, 3), np.float32)),
        (Warmup("int64", (), 16000), np.array(16000, np.int64)),
        (Warmup("bool", (2,), 1), np.array([True, True])),
        (Warmup("str", (2,), "a"), np.array(["a", "a"], object)),
        (Warmup("object", (1,)), np.array(["0"], object)),
        (Warmup("float16", (0, 4)), np.zeros((0, 4), np.float16)),
    ],
)
def test_arrays(wanted: Warmup, made: np.ndarray) -> None:
    array = array_of(wanted)
    assert (array.dtype, array.shape) == (made.dtype, made.shape)
    assert np.array_equal(array, made)


@pytest.mark.parametrize(
    "wanted", [Warmup("float33", (1,)), Warmup("int64", (-1,)), Warmup("float32", (1,), "a")]
)
def test_arrays_that_cannot_be(wanted: Warmup) -> None:
    with pytest.raises((TypeError, ValueError)):
        array_of(wanted)


def test_what_is_said_names_what_to_mend_in_one_line() -> None:
    inputs = [TensorSpec("x", "tensor(float)", ["n", 3]), TensorSpec("y", "tensor(int64)", [])]
    assert complaint("m.onnx", inputs, ValueError("no\n  such shape")) == (
        "onnx-dl: the warm-up of m.onnx failed (ValueError: no such shape). The model is ready anyway; "
        "give its warm-up a dtype, shape and fill for each of its inputs: x: tensor(float) ['n', 3], "
        "y: tensor(int64) []."
    )
