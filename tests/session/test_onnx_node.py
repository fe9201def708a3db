"""A sample of ONNX's own backend tests; ``python -m tests.support.onnx_node --all`` does all of them."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.onnx_cases import Case, cases, sample
from tests.support.onnx_node import MODES, compare, real
from tests.support.onnx_values import CPU, picture

pytestmark = pytest.mark.slow

SEED = 1
"""Of the sample and of the mistakes.  Before you change it, see with ``--self`` that onnxruntime survives."""
COUNT, PARTS = 60, 6


@pytest.mark.parametrize("part", range(PARTS))
def test_a_sample_of_onnx_backend_tests(part: int, host: ModelHost) -> None:
    """The same, bit for bit, as from onnxruntime here, in every way of calling it, and for one mistake."""
    make = functools.partial(InferenceSessionProxy, providers=CPU, host=host)
    found = [compare(case, make, tuple(MODES), SEED) for case in sample(COUNT, SEED)[part::PARTS]]
    differences = [str(difference) for of_case in found for difference in of_case]
    assert not differences, "\n".join(differences)


def test_a_sample_has_something_of_everything() -> None:
    chosen = sample(COUNT, SEED)
    assert len(chosen) == COUNT
    assert {case.group for case in chosen} == {case.group for case in cases()}
    assert chosen == sample(COUNT, SEED)


# --- what the comparison notices ---------------------------------------------------------------------------


class Altered:
    """onnxruntime's session, one of whose methods does not do what it should."""

    def __init__(self, method: str, alter: Callable[[Any], Any], blob: bytes) -> None:
        self._real, self._method, self._alter = real(blob), method, alter

    def __getattr__(self, name: str) -> Any:
        genuine = getattr(self._real, name)
        return (lambda *args: self._alter(genuine(*args))) if name == self._method else genuine


def one_bit(result: list[Any]) -> list[Any]:
    changed = result[0].copy()
    changed.view(np.uint8).reshape(-1)[-1] ^= 1
    return [changed, *result[1:]]


def raising(error: Exception) -> Callable[[Any], Any]:
    def alter(_: Any) -> Any:
        raise error

    return alter


def one_bit_of_an_ort_value(result: list[Any]) -> list[Any]:
    arrays = one_bit([value.numpy() for value in result])
    return [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]


class AlteredBinding:
    """A binding whose results are of the session's making, but for one bit."""

    def __init__(self, genuine: Any) -> None:
        self._iobinding, self._genuine = genuine._iobinding, genuine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._genuine, name)

    def copy_outputs_to_cpu(self) -> list[Any]:
        return one_bit(self._genuine.copy_outputs_to_cpu())


ALTERATIONS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "a bit": ("run", "run", one_bit),
    "a dtype": ("run", "run", lambda result: [array.astype(np.float64) for array in result]),
    "a shape": ("run", "run", lambda result: [array[None] for array in result]),
    "a class": ("run", "run", tuple),
    "one result less": ("run", "run", lambda result: result[1:]),
    "not writable": ("run", "run", lambda result: [np.broadcast_to(array, array.shape) for array in result]),
    "an error": ("run", "run", raising(RuntimeError("none is due"))),
    "a bit of an OrtValue": ("ort", "run_with_ort_values", one_bit_of_an_ort_value),
    "arrays for OrtValues": (
        "ort",
        "run_with_ort_values",
        lambda result: [value.numpy() for value in result],
    ),
    "a bit in a binding": ("binding", "io_binding", AlteredBinding),
    "an input": ("meta", "get_inputs", lambda infos: infos[1:]),
}


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_the_comparison_notices(kind: str) -> None:
    mode, method, alter = ALTERATIONS[kind]
    case = plain_case()
    assert not compare(case, real, [mode])
    found = compare(case, functools.partial(Altered, method, alter), [mode])
    assert [difference.mode for difference in found] == [mode]


def test_the_comparison_notices_other_words_of_an_error() -> None:
    class Politely(Altered):
        def run(self, *args: Any) -> Any:
            try:
                return self._real.run(*args)
            except Exception as error:
                raise type(error)(f"Sorry: {error}") from None

    case = plain_case()
    (difference,) = compare(case, functools.partial(Politely, "", list), ["run", "wrong"])
    assert difference.mode == "wrong"


def test_the_comparison_notices_a_model_that_should_not_load() -> None:
    good = plain_case()
    bad = dataclasses.replace(good, model=ModelProto())
    assert not compare(bad, real)
    (difference,) = compare(bad, lambda blob: real(good.blob))
    assert difference.mode == "load"


def sparse(value: float, *, at: int) -> onnxruntime.OrtValue:
    index, cpu = np.array([at], np.int64), onnxruntime.OrtDevice.make("cpu", 0)
    values, shape = np.array([value], np.float32), np.array([2, 3], np.int64)
    made = onnxruntime.SparseTensor.sparse_coo_from_numpy(shape, values, index, cpu)
    return onnxruntime.OrtValue.ort_value_from_sparse_tensor(made)


def test_pictures_of_what_no_backend_test_has() -> None:
    assert picture(sparse(1, at=2)) == picture(sparse(1, at=2))
    assert picture(sparse(1, at=2)) != picture(sparse(1, at=3))
    assert picture(sparse(1, at=2)) != picture(sparse(2, at=2))
    assert picture([{1: 0.5}]) == picture([{1: 0.5}])
    assert picture([{1: 0.5}]) != picture([{1: np.float64(0.5)}])
    assert picture([{1: 0.0}]) != picture([{1: -0.0}])
    assert picture([{1: 0.5, 2: 0.5}]) != picture([{2: 0.5, 1: 0.5}])
    assert picture(np.array(["a"], object)) != picture(np.array([b"a"], object))


def plain_case() -> Case:
    """One float in, one out."""
    return next(case for case in cases() if case.name == "test_abs")


CRASHING = """
import os, signal
from tests.support.onnx_crew import Crashed, each

def work(items, say):
    for item in items:
        say("now", "doing", item)
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        say("done", item)

results = list(each(work, range(8), 2))
crashed = [r for r in results if isinstance(r, Crashed)]
assert sorted(r for r in results if r not in crashed) == [0, 1, 2, 4, 5, 6, 7]
assert crashed == [Crashed(3, ("doing", 3), -signal.SIGKILL)]
"""


def test_a_crash_is_one_item_s_only() -> None:
    """In a process of its own, which forks, as tests with threads should not."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", CRASHING], check=True)
