"""Stands in for torch: what tests of a GPU use of it, over memory of the stand-in for CUDA's driver."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

float32, uint8 = np.dtype("f4"), np.dtype("u1")
if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
    os.environ["FAKE_CUDA_IPC"] = "refuse"
cuda = SimpleNamespace(is_available=lambda: True, empty_cache=lambda: None, synchronize=lambda *_: None)


class Tensor:
    """An array, in memory of a device if it has such."""

    def __init__(self, array: np.ndarray, memory: Any = None, start: int = 0) -> None:
        self.array, self._memory, self._start = array, memory, start

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def data_ptr(self) -> int:
        assert self._memory is not None, "not on a device"
        return int(self._memory.address + self.array.ctypes.data - self._start)

    def _of(self, array: np.ndarray) -> Tensor:
        return Tensor(array, self._memory, self._start)

    def __getitem__(self, index: Any) -> Tensor:
        return self._of(self.array[index])

    def __add__(self, other: Any) -> Tensor:
        return Tensor(self.array + getattr(other, "array", other))

    def view(self, *how: Any) -> Tensor:
        (how,) = how
        return self._of(self.array.view(how) if isinstance(how, np.dtype) else self.array.reshape(how))

    def copy_(self, other: Tensor) -> Tensor:
        self.array[...] = other.array
        return self

    def add_(self, number: float) -> Tensor:
        self.array += number
        return self

    def item(self) -> Any:
        return self.array.item()

    def cpu(self) -> Tensor:
        return Tensor(self.array.copy())

    def numpy(self) -> np.ndarray:
        assert self._memory is None, "on a device"
        return self.array


def zeros(*shape: int, dtype: Any = float32, device: str = "cpu") -> Tensor:
    assert device == "cuda"
    sessions = sys.modules["tests.support.cuda_sessions.sitecustomize"]
    made = np.empty(shape, dtype)
    memory = sessions.Memory(made.nbytes, 0)
    view = np.frombuffer(sessions.driver().view(memory.address, made.nbytes), dtype).reshape(shape)
    view[...] = 0
    return Tensor(view, memory, view.ctypes.data)


def arange(end: int, dtype: Any = float32, device: str = "cpu") -> Tensor:
    return zeros(end, dtype=dtype, device=device).copy_(Tensor(np.arange(end, dtype=dtype)))


def from_numpy(array: np.ndarray) -> Tensor:
    return Tensor(array)


def equal(one: Tensor, other: Tensor) -> bool:
    return np.array_equal(one.array, other.array)
