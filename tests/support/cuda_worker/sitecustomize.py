"""Makes each session of a worker one on CUDA, by its own account: it runs on the CPU.

As on a GPU, inputs are copied when they are bound, by a stream that onnxruntime takes from a pool and puts
back.  Streams here are as late as they may be: a copy is made when the stream's next work has to be done,
which is that of the run that takes it.  The worker finds this folder on PYTHONPATH, and the stand-in for
CUDA's driver on LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import InferenceSession, SessionIOBinding

from onnx_dl.system.cuda_driver import CudaDriver
from tests.support.fake_cuda import FakeCuda

cpu = onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()
cuda = FakeCuda()  # as onnxruntime starts the driver when a session asks for it
copies: dict[tuple[int, str], Any] = {}
"""Memory of the device, by binding and name."""
streams: list[list[Any]] = []
"""Work that is not done yet, by stream."""
pool: list[list[Any]] = []
doing = threading.Lock()
"""Held while work is done."""
bind, clear = SessionIOBinding.bind_input, SessionIOBinding.clear_binding_inputs
runs = {name: getattr(InferenceSession, name) for name in ("run", "run_with_iobinding")}
synchronize = CudaDriver.synchronize


def get_providers(_: object) -> list[str]:
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def get_provider_options(_: object) -> dict[str, dict[str, str]]:
    return {"CUDAExecutionProvider": {"device_id": "0"}, "CPUExecutionProvider": {}}


def get_input_memory_infos(self: Any) -> list[Any]:
    kinds = SimpleNamespace(name="OrtArenaAllocator"), SimpleNamespace(name="DEFAULT")
    return [
        SimpleNamespace(name="Cuda", allocator_type=kinds[0], device_id=0, mem_type=kinds[1])
        for _ in self.get_inputs()
    ]


def take() -> list[Any]:
    try:
        return pool.pop()
    except IndexError:
        streams.append([])
        return streams[-1]


def bind_input(self: Any, name: str, *where: Any) -> None:
    if len(where) == 1:
        (array,) = where
        where = cpu, array.dtype.type, array.shape, array.ctypes.data
    device, dtype, shape, address = where
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    copy = copies[id(self), name] = ctypes.create_string_buffer(nbytes + 1)
    stream = take()
    stream.append(lambda: ctypes.memmove(copy, address, nbytes))
    pool.append(stream)
    time.sleep(1e-4)  # other threads go on
    bind(self, name, device, dtype, shape, ctypes.addressof(copy))


def finish(stream: list[Any]) -> None:
    with doing:
        while stream:
            stream.pop(0)()


def runner(name: str) -> Any:
    def run(self: Any, *given: Any) -> Any:
        finish(stream := take())
        time.sleep(1e-4)
        try:
            return runs[name](self, *given)
        finally:
            pool.append(stream)

    return run


def synchronize_all(self: Any, device: int) -> None:
    for stream in streams:
        finish(stream)
    synchronize(self, device)


def clear_binding_inputs(self: Any) -> None:
    for key in [key for key in copies if key[0] == id(self)]:
        del copies[key]
    clear(self)


for each in runs:
    setattr(InferenceSession, each, runner(each))
CudaDriver.synchronize = synchronize_all
onnxruntime.InferenceSession.get_input_memory_infos = get_input_memory_infos
onnxruntime.InferenceSession.get_providers = get_providers
onnxruntime.InferenceSession.get_provider_options = get_provider_options
SessionIOBinding.bind_input, SessionIOBinding.clear_binding_inputs = bind_input, clear_binding_inputs
