"""Makes each session of a worker one on CUDA, by its own account: it runs on the CPU.

As on a GPU, inputs are copied when they are bound.  The worker finds this folder on PYTHONPATH, and the
stand-in for CUDA's driver on LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import SessionIOBinding

from tests.support.fake_cuda import FakeCuda

cuda = FakeCuda()  # as onnxruntime starts the driver when a session asks for it
copies: dict[tuple[int, str], Any] = {}
"""Memory of the device, by binding and name."""
bind, clear = SessionIOBinding.bind_input, SessionIOBinding.clear_binding_inputs


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


def bind_input(self: Any, name: str, device: Any, dtype: Any, shape: Any, address: int) -> None:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    copy = copies[id(self), name] = ctypes.create_string_buffer(ctypes.string_at(address, nbytes), nbytes + 1)
    bind(self, name, device, dtype, shape, ctypes.addressof(copy))


def clear_binding_inputs(self: Any) -> None:
    for key in [key for key in copies if key[0] == id(self)]:
        del copies[key]
    clear(self)


onnxruntime.InferenceSession.get_input_memory_infos = get_input_memory_infos
onnxruntime.InferenceSession.get_providers = get_providers
onnxruntime.InferenceSession.get_provider_options = get_provider_options
SessionIOBinding.bind_input, SessionIOBinding.clear_binding_inputs = bind_input, clear_binding_inputs
