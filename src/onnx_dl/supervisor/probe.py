"""Measures what a worker holds: the only importer of psutil and NVML.

Nothing is measured on a schedule; each call is one reading.  Limits are not known here.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import psutil

from onnx_dl.model import Usage


class Probe:
    """Reads memory by process id.  GPU figures are None where NVML finds no GPU or tells nothing."""

    def __init__(self) -> None:
        self._gpus = _nvml_devices()

    def measure(self, pid: int) -> Usage:
        """Resident, private and GPU bytes of a process; zeros if it is gone."""
        try:
            full = psutil.Process(pid).memory_full_info()
            shared = _tensor_bytes(pid)
        except (psutil.Error, OSError):
            return Usage()
        gpu = self._gpu_bytes(pid)
        return Usage(rss=full.rss, private=full.uss, gpu=gpu, shared=shared, pss=full.pss)

    def _gpu_bytes(self, pid: int) -> int | None:
        if not self._gpus:
            return None
        import pynvml

        used = None
        for gpu in self._gpus:
            with contextlib.suppress(pynvml.NVMLError):
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu):
                    if process.pid == pid and process.usedGpuMemory is not None:
                        used = (used or 0) + process.usedGpuMemory
        return used


class Gpu(NamedTuple):
    """What NVML says of a GPU; ``memory`` in bytes."""

    name: str
    memory: int
    driver: str


def gpus() -> list[Gpu]:
    """The machine's GPUs.

    Raises:
        OSError: NVML cannot be asked, and why.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [
            Gpu(pynvml.nvmlDeviceGetName(gpu), pynvml.nvmlDeviceGetMemoryInfo(gpu).total, driver)
            for gpu in handles
        ]
    except Exception as error:  # NVML's own, by version and platform; a library that is there but broken
        raise OSError(str(error)) from error


def _tensor_bytes(pid: int) -> int:
    """Bytes of the shared memory that tensors travel in, as mapped into a process."""
    total = 0
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if "memfd:onnx-dl" in line:
                start, end = line.split(maxsplit=1)[0].split("-")
                total += int(end, 16) - int(start, 16)
    return total


def _nvml_devices() -> list[Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no driver, no library, no permission: then there is no figure
        return []
