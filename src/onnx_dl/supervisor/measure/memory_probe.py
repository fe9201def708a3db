"""Measures what a worker holds: the only importer of psutil and NVML.

Nothing is measured on a schedule; each call is one reading.  Limits are not known here.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from typing import Any, Final, NamedTuple

import psutil

from onnx_dl.core.status import Usage

_KNOWN_FOR: Final = 0.05
"""Seconds in which what a process shares with others does not change by much."""


class Probe:
    """Reads memory by process id.  GPU figures are None where NVML finds no GPU or tells nothing.

    Where NVML does not tell what a process has (in many containers, WSL and MIG), what became less of the
    devices between :meth:`begin` and :meth:`loaded` is taken for it.
    """

    def __init__(self) -> None:
        self._gpus = _nvml_devices()
        self._used_before: dict[int, int] = {}
        self._estimates: dict[int, int] = {}
        self._shared: dict[int, tuple[float, int]] = {}
        """By how much PSS was less than resident bytes, and when, of processes that load."""

    def begin(self, pid: int) -> None:
        """The process is about to load a model on a GPU."""
        if (used := self._gpu_sum("used")) is not None:
            self._used_before[pid] = used

    def loaded(self, pid: int) -> None:
        """The process has loaded it."""
        before, used = self._used_before.pop(pid, None), self._gpu_sum("used")
        if before is not None and used is not None:
            self._estimates[pid] = max(0, used - before)

    def end(self, pid: int) -> None:
        """The process is gone."""
        self._used_before.pop(pid, None)
        self._estimates.pop(pid, None)

    def measure(self, pid: int) -> Usage:
        """Resident, private and GPU bytes of a process; zeros if it is gone, or about to: memory goes first,
        and what was read while it did is worth nothing."""
        try:
            full = psutil.Process(pid).memory_full_info()
            shared = _tensor_bytes(pid)
            above = _above_present(pid)
        except (psutil.Error, OSError):
            return Usage()
        if above is None:
            return Usage()
        gpu = self._gpu_bytes(pid)
        estimate = self._estimates.get(pid) if gpu is None else None
        return Usage(
            rss=full.rss,
            private=full.uss,
            gpu=estimate if gpu is None else gpu,
            shared=shared,
            pss=full.pss,
            peak=full.pss + above,
            gpu_estimated=estimate is not None,
        )

    def weigh(self, pid: int, most: int) -> int:
        """Bytes that a process holds, or about that if it is not more than ``most``.

        Resident bytes are cheap (20 µs) and count what processes share in full.  Only if they are more than
        ``most``, PSS counts (1 ms for 500 MB, in which the process gets no fresh pages); what it was less by
        is known for a moment.
        """
        try:
            with open(f"/proc/{pid}/statm") as statm:
                resident = int(statm.read().split()[1]) * mmap.PAGESIZE
            at, shared = self._shared.get(pid, (0.0, 0))
            about = resident - (shared if time.monotonic() - at < _KNOWN_FOR else 0)
            if about <= most:
                return about
            pss = int(psutil.Process(pid).memory_full_info().pss)
        except (psutil.Error, OSError):  # it is gone
            self._shared.pop(pid, None)
            return 0
        self._shared[pid] = time.monotonic(), max(0, resident - pss)
        return pss

    def forget_peak(self, pid: int) -> None:
        """The most that the process had is what it has now; without effect where the kernel refuses that.
        It has loaded."""
        self._shared.pop(pid, None)
        with contextlib.suppress(OSError), open(f"/proc/{pid}/clear_refs", "w") as file:
            file.write("5")

    def gpu_total(self) -> int | None:
        """Bytes of all GPUs."""
        return self._gpu_sum("total")

    def gpu_left(self, pid: int) -> int | None:
        """Bytes that a process that is gone still has on the GPUs; None: the driver shows it no more."""
        return self._gpu_bytes(pid)

    def _gpu_sum(self, field: str) -> int | None:
        """Of all devices, what NVML calls so: ``used`` or ``total``."""
        if not self._gpus:
            return None
        import pynvml

        total = None
        for gpu in self._gpus:
            with contextlib.suppress(pynvml.NVMLError):
                total = (total or 0) + int(getattr(pynvml.nvmlDeviceGetMemoryInfo(gpu), field))
        return total

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


def _above_present(pid: int) -> int | None:
    """Bytes by which the resident memory of a process exceeded what it is, since its mark was set back; None:
    it has no memory any more."""
    with open(f"/proc/{pid}/status") as status:
        lines = (line.split() for line in status)
        found = {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "VmRSS:")}
    if not found.get("VmRSS:"):
        return None
    return max(0, found.get("VmHWM:", 0) - found["VmRSS:"])


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
