"""Bound runs by execution provider: on what sessions, and what they read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_dl.workers.engines import ort_bindings
from onnx_dl.workers.engines.ort_bindings import BindingRule, are_certain, bound_run, cuda_device, rule_of
from tests.support import zoo

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
ON_CPU, ON_DEVICE = BindingRule(None), BindingRule(0)


@pytest.mark.parametrize(
    ("providers", "options", "rule"),
    [
        ([CPU], {}, ON_CPU),
        ([CUDA, CPU], {}, ON_DEVICE),
        ([CUDA, CPU], {CUDA: {"enable_cuda_graph": "0"}}, ON_DEVICE),
        ([CUDA, CPU], {CUDA: {"enable_cuda_graph": "False"}}, ON_DEVICE),
        ([CUDA, CPU], {CUDA: {"enable_cuda_graph": "1"}}, None),
        ([CUDA, CPU], {CUDA: {"enable_cuda_graph": "True"}}, None),
        ([CUDA, CPU], {CUDA: {"device_id": "1"}}, BindingRule(1)),
        ([CUDA, CPU], {CUDA: {"device_id": "first"}}, None),
        ([CUDA], {}, None),
        ([TENSORRT, CUDA, CPU], {}, None),
        (["OpenVINOExecutionProvider", CPU], {}, None),
    ],
)
def test_sessions_whose_calls_are_bound(providers: list[str], options: Any, rule: BindingRule | None) -> None:
    assert rule_of(providers, options) == rule


@pytest.mark.parametrize(
    ("providers", "options", "device"),
    [
        ([CPU], {}, None),
        ([CUDA, CPU], {}, 0),
        ([CUDA, CPU], {CUDA: {"device_id": "3"}}, 3),
        ([TENSORRT, CUDA, CPU], {CUDA: {"device_id": "1"}}, 1),
        ([CUDA, CPU], {CUDA: {"device_id": "-1"}}, None),
    ],
)
def test_the_device_of_a_session(providers: list[str], options: Any, device: int | None) -> None:
    assert cuda_device(providers, options) == device


@pytest.mark.parametrize(
    ("shape", "found", "is_known"),
    [
        ([], (), True),
        ([5, 3], (5, 3), True),
        (["n", 3], (2, 3), True),
        (["n", "k"], (2, 4), True),
        ([], (5,), False),  # a shape that is not known
        (["m", 3], (2, 3), False),
        ([None, 3], (2, 3), False),
        (["n", 3], (3, 3), False),  # it is not as the model declares it
        (["n", 3], (2, 3, 1), False),
    ],
)
def test_a_shape_that_the_inputs_decide(shape: list[Any], found: tuple[int, ...], is_known: bool) -> None:
    declared = {"x": ["n", None, 4], "w": ["k"], "y": shape}
    inputs = {"x": np.zeros((2, 2, 4)), "w": np.zeros(4)}
    assert are_certain(declared, inputs, {"y": np.zeros(found)}) is is_known


class Device:
    """A session on a device, as onnxruntime's: it copies inputs when they are bound."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.fails = False
        self._session = onnxruntime.InferenceSession(zoo.plus(1.0), providers=[CPU])
        self._sess = self

    def io_binding(self) -> Any:
        binding = self._session.io_binding()
        binding._iobinding = Copying(binding._iobinding, self.steps)
        return binding

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.steps.append("run")
        if self.fails:
            raise RuntimeError("of the run")
        self._session._sess.run_with_iobinding(binding.native, options)


class Copying:
    def __init__(self, native: Any, steps: list[str]) -> None:
        self.native, self._steps = native, steps
        self.copies: dict[str, np.ndarray] = {}

    def bind_input(self, name: str, device: Any, dtype: Any, shape: Any, address: int) -> None:
        self._steps.append(f"bind {name}")
        at = (np.ctypeslib.ctypes.c_byte * (4 * int(np.prod(shape)))).from_address(address)  # type: ignore[attr-defined]
        copy = self.copies[name] = np.frombuffer(at, dtype).reshape(shape).copy()
        self.native.bind_input(name, device, dtype, shape, copy.ctypes.data)

    def bind_output(self, *args: Any) -> None:
        self._steps.append(f"bind {args[0]}")
        self.native.bind_output(*args)

    def clear_binding_inputs(self) -> None:
        self._steps.append("clear")
        self.copies.clear()
        self.native.clear_binding_inputs()


def bound(session: Any, rule: BindingRule, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    return bound_run(session, rule, {"x": x}, {"y": y}, onnxruntime.RunOptions())


def test_on_a_device_each_run_computes_with_what_the_input_has_then() -> None:
    session, x, y = Device(), np.zeros(3, np.float32), np.zeros(3, np.float32)
    run = bound(session, ON_DEVICE, x, y)
    found = []
    for value in (1, 5):
        x[:] = value
        run()
        found.append(y.tolist())
    assert found == [[2.0] * 3, [6.0] * 3]
    assert session.steps == ["bind y", *["bind x", "run", "clear"] * 2]


def test_a_run_begins_when_the_copies_of_its_inputs_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    session, x = Device(), np.zeros(3, np.float32)
    run = bound(session, BindingRule(3), x, np.zeros(3, np.float32))
    monkeypatch.setattr(ort_bindings, "await_copies", lambda device: session.steps.append(f"wait {device}"))
    run()
    assert session.steps[1:] == ["bind x", "wait 3", "run", "clear"]


def test_a_run_that_fails_leaves_no_input_on_the_device() -> None:
    session, x = Device(), np.zeros(3, np.float32)
    run = bound(session, ON_DEVICE, x, np.zeros(3, np.float32))
    session.fails = True
    with pytest.raises(RuntimeError, match="of the run"):
        run()
    assert session.steps[-1] == "clear"


@pytest.mark.parametrize("rule", [ON_CPU, ON_DEVICE])
def test_a_session_on_the_cpu_takes_either_way(rule: BindingRule) -> None:
    """Its binding is onnxruntime's own, so that the methods and arguments are."""
    session = onnxruntime.InferenceSession(zoo.plus(1.0), providers=[CPU])
    x, y = np.zeros((2,), np.float32), np.zeros((2,), np.float32)
    run = bound(session, rule, x, y)
    for value in (3, 4):
        x[:] = value
        run()
        assert y.tolist() == [value + 1.0] * 2


def test_a_session_has_the_names_that_the_rules_use() -> None:
    session = onnxruntime.InferenceSession(zoo.plus(1.0), providers=[CPU])
    assert rule_of(session.get_providers(), session.get_provider_options()) == ON_CPU
    assert ort_bindings.cuda_device(session.get_providers(), session.get_provider_options()) is None
