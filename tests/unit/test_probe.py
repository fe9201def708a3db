"""Memory by process id, without and with something that looks like a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

from onnx_dl.model import Usage
from onnx_dl.supervisor.probe import Gpu, Probe, gpus
from onnx_dl.transport import shm


def fake_nvml(used: dict[int, int | None]) -> types.ModuleType:
    """A pynvml of one GPU on which these processes hold so many bytes."""
    module = types.ModuleType("pynvml")
    module.NVMLError = RuntimeError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 1
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetComputeRunningProcesses = lambda gpu: [
        types.SimpleNamespace(pid=pid, usedGpuMemory=nbytes) for pid, nbytes in used.items()
    ]
    return module


def test_this_process() -> None:
    usage = Probe().measure(os.getpid())
    assert usage.rss > usage.private > 1e6


def test_shared_memory_for_tensors_is_counted() -> None:
    before = Probe().measure(os.getpid()).shared
    fd = shm.create(1 << 20)
    mapping = shm.Mapping(fd, 1 << 20)
    assert mapping.address
    assert Probe().measure(os.getpid()).shared - before == 1 << 20
    del mapping
    assert Probe().measure(os.getpid()).shared == before


def test_a_process_that_is_gone_holds_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert Probe().measure(child.pid) == Usage()


def test_no_driver_means_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml({os.getpid(): 7})

    def no_driver() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    module.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert Probe().measure(os.getpid()).gpu is None


@pytest.mark.parametrize(("told", "expected"), [(7_000_000, 7_000_000), (None, None)])
def test_a_gpu(monkeypatch: pytest.MonkeyPatch, told: int | None, expected: int | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml({os.getpid(): told, 1: 99}))
    assert Probe().measure(os.getpid()).gpu == expected


def test_gpus_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml({})
    module.nvmlSystemGetDriverVersion = lambda: "550.1"
    module.nvmlDeviceGetName = lambda gpu: f"GPU {gpu}"
    module.nvmlDeviceGetMemoryInfo = lambda gpu: types.SimpleNamespace(total=8_000_000)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert gpus() == [Gpu("GPU 0", 8_000_000, "550.1")]
    module.nvmlDeviceGetCount = lambda: 0
    assert gpus() == []


def test_why_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml({})

    def no_driver() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    module.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with pytest.raises(OSError, match="NVML Shared Library Not Found"):
        gpus()
