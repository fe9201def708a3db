"""The GPU: whether onnxruntime computes on it here, and how much of its memory is used."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from onnx_dl.supervisor.measure.memory_probe import gpus

CUDA: Final = "CUDAExecutionProvider"


def why_not(tiny: bytes) -> str | None:
    """Why nothing runs on a GPU here; None: ``tiny``, a model, does.  This process has CUDA from then on."""
    try:
        if not gpus():
            return "there is no NVIDIA GPU"
    except OSError as error:
        return f"there is no NVIDIA GPU: {error}"
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA provider (install onnx-dl[gpu])"
    preload()
    session = onnxruntime.InferenceSession(tiny, providers=[CUDA, "CPUExecutionProvider"])
    if CUDA not in session.get_providers():
        return "onnxruntime's CUDA provider does not load: `onnx-dl doctor` tells why"
    return None


def described() -> dict[str, Any]:
    """The GPUs, for a report."""
    return {"gpus": [f"{gpu.name}, {gpu.memory / 1e9:.0f} GB, driver {gpu.driver}" for gpu in gpus()]}


def preload() -> None:
    """Finds CUDA's libraries in Python packages, as workers do."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()


def used(device: int = 0) -> int:
    """Bytes of a GPU that all processes of the machine use."""
    return int(_nvml().nvmlDeviceGetMemoryInfo(_nvml().nvmlDeviceGetHandleByIndex(device)).used)


def processes(device: int = 0) -> dict[int, int]:
    """Bytes by id of the processes that compute on a GPU; empty where the driver does not tell."""
    nvml = _nvml()
    with contextlib.suppress(nvml.NVMLError):
        found = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(device))
        return {each.pid: each.usedGpuMemory or 0 for each in found}
    return {}


def _nvml() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml
