"""Stands in for pynvml: one GPU, with the memory of all processes that use the stand-in for CUDA's driver."""

from __future__ import annotations

import glob
import os
from types import SimpleNamespace
from typing import Any

IS_STAND_IN = True
_DRIVER = os.path.realpath(os.environ["LD_LIBRARY_PATH"].split(":")[0]) + "/libcuda.so.1"
_CONTEXT = 256 << 20
"""Bytes that a process with the driver takes."""


class NVMLError(Exception):
    """The one error."""


def nvmlInit() -> None:
    pass


def nvmlShutdown() -> None:
    pass


def nvmlDeviceGetCount() -> int:
    return 1


def nvmlDeviceGetHandleByIndex(_: int) -> str:
    return "the GPU"


def nvmlSystemGetDriverVersion() -> str:
    return "0.0"


def nvmlDeviceGetName(_: str) -> str:
    return "stand-in"


def nvmlDeviceGetUUID(_: str) -> str:
    return "GPU-7374616e-642d-696e-0000-000000000001"


def nvmlDeviceGetMemoryInfo(_: str) -> Any:
    found = _found()
    memory = {inode: size for each in found.values() for inode, size in each.items()}
    return SimpleNamespace(total=80 << 30, used=sum(memory.values()) + len(found) * _CONTEXT)


def nvmlDeviceGetComputeRunningProcesses(_: str) -> list[Any]:
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=_CONTEXT + sum(memory.values()))
        for pid, memory in _found().items()
    ]


def _found() -> dict[int, dict[str, int]]:
    """Bytes of what each process has open, by its inode."""
    processes = {}
    for path in glob.glob("/proc/[0-9]*/maps"):
        try:
            with open(path) as file:
                maps = [line.split(maxsplit=5) for line in file]
        except OSError:
            continue
        if any(line[-1].rstrip() == _DRIVER for line in maps):
            ranges = {line[4]: line[0].split("-") for line in maps if line[-1].startswith("/memfd:fake-cuda")}
            sizes = {inode: int(end, 16) - int(start, 16) for inode, (start, end) in ranges.items()}
            processes[int(path.split("/")[2])] = sizes
    return processes
