"""What tests on a GPU share: sessions, and memory of the device that an application has by some library."""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np
import pytest
from benchmarks.gpu import machine
from benchmarks.models import Case, cases

from onnx_dl import InferenceSessionProxy, ModelHost

# By heuristics, so that two sessions choose the same algorithm, and compute the same to the last bit.
OPTIONS: Final = {"cudnn_conv_algo_search": "HEURISTIC"}
CASES: Final = cases()


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


MEMORY: Final = {"OrtValue": OrtMemory, "torch": TorchMemory}
