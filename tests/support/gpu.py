"""What tests on a GPU share: sessions, and memory of the device that an application has by some library."""

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import Any, Final

import numpy as np
import pynvml
import pytest
from benchmarks.gpu import machine
from benchmarks.gpu.works import add_one
from benchmarks.models import Case, cases

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.system import cuda_driver
from onnx_dl.tensors.foreign import as_bytes

# By heuristics, so that two sessions choose the same algorithm, and compute the same to the last bit.
OPTIONS: Final = {"cudnn_conv_algo_search": "HEURISTIC"}
IS_DRY: Final = hasattr(pynvml, "IS_STAND_IN")
"""True on the machine of tests/support/dry_gpu, where all is smaller."""
SHAPE: Final = (16, 64, 64) if IS_DRY else (16, 1024, 1024)
"""Shape of the large tensors."""
CASES: Final = cases()
if IS_DRY:
    CASES["64mb"] = CASES["64mb"]._replace(model=add_one(*SHAPE), feed={"x": np.ones(SHAPE, np.float32)})
    CASES["conv"] = CASES["5mb"]


def providers(**options: str) -> list[Any]:
    return [(machine.CUDA, OPTIONS | options), "CPUExecutionProvider"]


def in_process(model: bytes, **options: str) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=providers(**options))
    assert session.get_providers()[0] == machine.CUDA
    return session


def proxied(
    model: bytes, host: ModelHost, *, group: str | None = None, **options: str
) -> InferenceSessionProxy:
    proxy = InferenceSessionProxy(model, providers=providers(**options), host=host, group=group)
    assert proxy.get_providers()[0] == machine.CUDA
    return proxy


def feed_of(case: Case, turn: int) -> dict[str, np.ndarray]:
    """Other numbers for each turn."""
    return {name: np.ascontiguousarray(array + np.float32(turn)) for name, array in case.feed.items()}


def equal(found: Any, expected: Any) -> None:
    """To the last bit."""
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(mine, other)


class OrtMemory:
    """A tensor on the device that is onnxruntime's: ``address``, ``set()``, ``numpy()``."""

    def __init__(self, array: np.ndarray) -> None:
        import onnxruntime

        self.value = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        self.address = int(self.value.data_ptr())

    def set(self, array: np.ndarray) -> None:
        self.value.update_inplace(array)

    def numpy(self) -> np.ndarray:
        found: np.ndarray = self.value.numpy()
        return found


class TorchMemory:
    """The same of torch.  ``skipped``: bytes of its allocation before the tensor."""

    def __init__(self, array: np.ndarray, skipped: int = 0) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch = pytest.importorskip("torch", reason="torch is not installed")
        if not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch starts CUDA
            whole = torch.zeros(skipped + array.nbytes, dtype=torch.uint8, device="cuda")
        self.tensor = whole[skipped:].view(torch.float32).view(array.shape)
        self.address = int(self.tensor.data_ptr())
        self.set(array)

    def set(self, array: np.ndarray) -> None:
        import torch

        self.tensor.copy_(torch.from_numpy(array))

    def numpy(self) -> np.ndarray:
        found: np.ndarray = self.tensor.cpu().numpy()
        return found


class DriverMemory:
    """The same of the driver itself: what is freed is free, where a library would keep it for later."""

    def __init__(self, array: np.ndarray) -> None:
        self._call = _library()
        self._driver = cuda_driver.loaded()
        assert self._driver is not None
        address = ctypes.c_uint64()
        self._in_context("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(array.nbytes))
        self.address = address.value
        self._like = np.empty_like(array)
        self.set(array)

    def _in_context(self, function: str, *arguments: Any) -> None:
        assert not self._call.cuCtxPushCurrent_v2(_context())
        code = getattr(self._call, function)(*arguments)
        assert not self._call.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        assert code == 0, f"{function} returned {code}"

    def set(self, array: np.ndarray) -> None:
        self._driver.copy_to_device(0, self.address, as_bytes(array))

    def numpy(self) -> np.ndarray:
        found = np.empty_like(self._like)
        self._driver.copy_to_host(0, as_bytes(found), self.address)
        return found

    def free(self) -> None:
        self._in_context("cuMemFree_v2", ctypes.c_uint64(self.address))


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _context() -> ctypes.c_void_p:
    """The primary context of the first GPU, kept until this process ends."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    assert not _library().cuDeviceGet(ctypes.byref(device), 0)
    assert not _library().cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    return context


MEMORY: Final = {"OrtValue": OrtMemory, "torch": TorchMemory}
