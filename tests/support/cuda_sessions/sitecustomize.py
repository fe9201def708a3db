"""Has sessions on the CPU take memory of the stand-in for CUDA's driver, in each process of a test.

A stand-in for a session with the CUDA provider: what it is bound to on "cuda" it reads and writes in the
stand-in's readable view, and OrtValues on "cuda" are allocated there.  Used with ``PYTHONPATH``.

With ``FAKE_CUDA_GRAPHS`` in the environment, sessions say that they capture CUDA graphs, and do what the
provider does: a run of a number that was captured runs with what that run was bound to.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_inference_collection as collection
from onnxruntime.capi.onnxruntime_pybind11_state import InferenceSession as NativeSession
from onnxruntime.capi.onnxruntime_pybind11_state import OrtDevice, SessionIOBinding

from onnx_dl.ort import device_ortvalues
from onnx_dl.tensors.device_values import size_of
from onnx_dl.workers.template import THROW_AWAY
from tests.support.fake_cuda import FakeCuda

Binding, Value = collection.IOBinding, collection.OrtValue
bind_input, bind_output = SessionIOBinding.bind_input, Binding.bind_output
get_outputs = Binding.get_outputs_as_ortvaluevector
cpu = onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()
make_session = onnxruntime.InferenceSession.__init__
of_shape_and_type = Value.ortvalue_from_shape_and_type.__func__


@functools.cache
def driver_of(_: int) -> FakeCuda:
    """The driver in this process; not in the one that it was forked from."""
    return FakeCuda()


def driver() -> FakeCuda:
    return driver_of(os.getpid())


class Memory:
    """Memory on a device, freed with its last user."""

    def __init__(self, nbytes: int, device: int) -> None:
        self._driver, self._device = driver(), device
        self.address = self._driver.allocate(nbytes, device)

    def __del__(self) -> None:
        self._driver.free(self.address, self._device)


def view(element_type: int, shape: Any, address: int) -> int:
    found = driver().library.fake_view(address, size_of(element_type, shape))
    assert found, "a session was bound to memory that is not there"
    return int(found)


def on_device(element_type: int, shape: Any, device: int) -> Any:
    memory = Memory(size_of(element_type, shape), device)
    return device_ortvalues.over(element_type, shape, device, memory.address, memory)


def bind_input_there(self: Any, name: str, device: Any, *tensor: Any) -> None:
    if tensor and device.device_type() == OrtDevice.cuda():
        kind, shape, at = tensor
        device, tensor = cpu, (kind, shape, view(kind, shape, at))
    bind_input(self, name, device, *tensor)


def bind_output_there(
    self: Any,
    name: str,
    device: str = "cpu",
    number: int = 0,
    kind: Any = None,
    shape: Any = None,
    at: Any = None,
) -> None:
    names = vars(self).setdefault("names", {})
    names[name] = device == "cuda" and at is None
    if device == "cuda" and at is not None:
        at = view(kind, shape, at)
    bind_output(self, name, "cpu", 0, kind, shape, at)


def get_outputs_there(self: Any) -> Any:
    found = list(get_outputs(self))
    for index, is_moved in enumerate(vars(self).get("names", {}).values()):
        if is_moved:
            value = found[index]
            moved = on_device(value.element_type(), value.shape(), 0)
            driver().write(moved.data_ptr(), value.numpy().tobytes())
            found[index] = moved
    return found


def make(
    cls: Any, shape: Any, kind: Any, device: str = "cpu", number: int = 0, *more: Any, **named: Any
) -> Any:
    if device == "cuda":
        return cls(on_device(kind, shape, number))
    return of_shape_and_type(cls, shape, kind, device, number, *more, **named)


def session_there(self: Any, *given: Any, **named: Any) -> None:
    if THROW_AWAY not in given:  # the template makes this one, before it forks workers
        with contextlib.suppress(AssertionError):  # no GPU is visible
            driver()  # a session with the CUDA provider has a context
    make_session(self, *given, **named)


captured: dict[tuple[int, str], Any] = {}
"""Bindings of graphs, by session and number."""
run_natively, run_plainly = NativeSession.run_with_iobinding, NativeSession.run
running = threading.Lock()


def number_of(options: Any) -> str:
    with contextlib.suppress(RuntimeError, AttributeError):
        return str(options.get_run_config_entry("gpu_graph_id"))
    return "0"


def run_or_replay(self: Any, binding: Any, options: Any) -> None:
    assert running.acquire(blocking=False), "a session with CUDA graphs runs in two threads"
    try:
        if (number := number_of(options)) != "-1":
            binding = captured.setdefault((id(self), number), binding)
        run_natively(self, binding, options)
    finally:
        running.release()


def run_without_graph(self: Any, names: Any, feed: Any, options: Any = None) -> Any:
    assert number_of(options) == "-1", "a graph was captured with memory of one call"
    return run_plainly(self, names, feed, options)


if os.environ.get("FAKE_CUDA_GRAPHS"):
    of_cuda = {"CUDAExecutionProvider": {"enable_cuda_graph": "1"}}
    onnxruntime.InferenceSession.get_provider_options = lambda _: of_cuda
    NativeSession.run_with_iobinding, NativeSession.run = run_or_replay, run_without_graph

onnxruntime.InferenceSession.__init__ = session_there
SessionIOBinding.bind_input, Binding.bind_output = bind_input_there, bind_output_there
Binding.get_outputs_as_ortvaluevector = get_outputs_there
Value.ortvalue_from_shape_and_type = classmethod(make)
assert onnxruntime.OrtValue is Value
